// Reads a whole checkpoint back and says whether every byte that a restore would need is good, and
// whether every tensor has the fingerprint that INDEX says. Uses
// nothing of the engine: `holdfast verify` runs it where no agent is.
#ifndef HOLDFAST_CHECKPOINT_VERIFY_H_
#define HOLDFAST_CHECKPOINT_VERIFY_H_

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/catalog.h"
#include "format/index.h"
#include "io/file_system.h"

namespace holdfast {

// Something wrong, as a sentence and in parts.
struct Finding {
  std::string file;           // in the checkpoint's directory
  uint64_t offset_bytes = 0;  // 0 with bytes 0: the whole file
  uint64_t bytes = 0;
  std::vector<std::string> tensors =
      {};  // that lie there, at most kFindingTensorsMax, "wte (param)"
  std::string text;
};
inline constexpr size_t kFindingTensorsMax = 8;
inline constexpr size_t kFindingsMax = 1'000;  // what comes after is counted only

enum class Verdict {
  kGood,           // exit code 0
  kDamagedUnread,  // 3: damaged only where no restore reads: gaps and padding
  kDamaged,        // 4
  kNotFound,       // 5: no such checkpoint, or it was never committed
};

struct VerifyReport {
  Verdict verdict = Verdict::kNotFound;
  std::vector<Finding> findings;
  uint64_t finding_count = 0;  // may exceed findings.size()
  uint64_t bytes_read = 0;
  uint64_t blocks_checked = 0;
  // Tensor states whose bytes were all read and have the fingerprint of INDEX, and those without
  // one in INDEX.
  uint64_t fingerprints_checked = 0;
  uint64_t fingerprints_not_computed = 0;
};

struct VerifyOptions {
  // Called now and then with bytes read and bytes in all; false stops: kCancelled.
  std::function<bool(uint64_t bytes_done, uint64_t bytes_total)> progress;
};

// Reads bytes [offset, offset + out.size()) of a file, blocking; kDataLoss past the end.
using ReadAt = std::function<absl::Status(IoFile& file, uint64_t offset, std::span<std::byte> out)>;

// Of a real file system: pread(2) on the descriptor.
ReadAt PlainReadAt();

// Blocking. Errors are about verifying, not about the checkpoint: kCancelled, kUnavailable,
// kPermissionDenied; what is wrong with the checkpoint is in the report.
absl::StatusOr<VerifyReport> VerifyCheckpoint(FileSystem& file_system, const ReadAt& read_at,
                                              const CatalogEntry& entry,
                                              const VerifyOptions& options);

// INDEX of a committed checkpoint, checked and compared with its manifest: what restore, verify and
// inspect begin with. kDataLoss names the file and says what was expected and found.
absl::StatusOr<Index> LoadIndex(FileSystem& file_system, const std::string& directory,
                                const Manifest& manifest);
// Of what was located: the same, if it is committed. Else kNotFound (incomplete, fenced) or
// kDataLoss (damaged), with the reason.
absl::StatusOr<Index> LoadCommittedIndex(FileSystem& file_system, const CatalogEntry& entry);
// Whether every image file is there with its size: what is cheap to know of the images.
absl::Status CheckImageSizes(FileSystem& file_system, const std::string& directory,
                             const Manifest& manifest);

// Names of the tensor states and blobs with bytes in [begin, end) of an image, as in
// Finding::tensors; empty: no restore reads there.
std::vector<std::string> TensorsAt(const Index& index, uint32_t image, uint64_t begin_bytes,
                                   uint64_t end_bytes, size_t count_max);

// How every reader says that a block is not as INDEX says: "<file>: block 2, bytes [8192, 12288):
// <what>; there lies: wte (param), blob rng". `tensors`: what TensorsAt gives for the block.
std::string BadBlockText(const IndexImage& image, const std::string& file, uint64_t block,
                         const std::string& what, const std::vector<std::string>& tensors);
// And that the bytes of a tensor state, all of them good by their checksums, have not the
// fingerprint that INDEX says.
std::string WrongFingerprintText(const TensorState& tensor_state, const Fingerprint& expected,
                                 const Fingerprint& found);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_VERIFY_H_
