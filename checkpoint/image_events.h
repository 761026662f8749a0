// What the two halves of the engine say to each other: RankImages (one session's images: grants,
// capture, checksums, flush) reports to its Job (the group: directory, commit, recycling), and Job
// decides.
#ifndef HOLDFAST_CHECKPOINT_IMAGE_EVENTS_H_
#define HOLDFAST_CHECKPOINT_IMAGE_EVENTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/ids.h"

namespace holdfast {

enum class SessionId : uint64_t {};

// One image of one session. A slot is used again and again; the generation tells the uses apart.
struct ImageId {
  SessionId session{};
  uint32_t slot_index = 0;
  uint64_t generation = 0;
  friend constexpr auto operator<=>(const ImageId&, const ImageId&) = default;
};

// An image whose every block has been captured and checksummed: from now on it survives `process`.
struct SealedImage {
  ImageId id;
  Rank rank{};
  CheckpointId checkpoint;
  uint64_t image_bytes = 0;
  uint64_t block_bytes = 0;
  std::vector<uint32_t> block_crc32c;
  // Bytes of each registered blob at this step, in the order of the registration; UINT64_MAX: none.
  std::vector<uint64_t> blob_bytes;
};

// Threads: all calls on the event loop's.
// Lifetime: the observer (a Job) outlives the RankImages that report to it.
class ImageObserver {
 public:
  virtual ~ImageObserver() = default;
  // The trainer has begun to capture `checkpoint` (hf_save), or did so under a former worker. The
  // observer answers, now or later, with RankImages::StartFlush(id, path), or with
  // RankImages::Void(id, why): fenced, step committed already, no directory, ...
  virtual void OnCaptureBegun(ImageId id, Rank rank, CheckpointId checkpoint) = 0;
  // Every block is in the agent's memory and has its checksum.
  virtual void OnSealed(const SealedImage& image) = 0;
  // The file given to StartFlush holds the whole image, is durable, and was checked once more
  // against the checksums. (Its name is durable when its directory has been synced.)
  virtual void OnDurable(ImageId id, const std::string& path) = 0;
  // The image will never be durable. kGone: it was not sealed, or its bytes changed since;
  // RankImages releases its blocks by itself as soon as nobody can write them any more. kInMemory:
  // it is sealed, only its storage failed; it stays readable until RankImages::Release(id), which
  // the observer must call at some time. May come after OnSealed, never after OnDurable.
  enum class Afterwards { kGone, kInMemory };
  virtual void OnVoid(ImageId id, Rank rank, CheckpointId checkpoint, absl::Status why,
                      Afterwards afterwards) = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_IMAGE_EVENTS_H_
