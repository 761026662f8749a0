// Which GPU is meant, and the lemon list: GPUs that made trouble, remembered beyond the job.
//
// A GPU is known by its node and its UUID; where no UUID is known (no driver, CPU jobs, where a
// "GPU" is the slot of a local rank), by its number. Marks are what was observed; an exclusion is
// what was decided. The list is a value: the agent reads the file, the policy works on a copy and
// says with actions what has changed, and the agent merges that into the file, which other jobs may
// have changed meanwhile.
//
// The file is sealed JSON (checkpoint/sealed_json.h), one lemon a line:
//
//   {"schema_version": 1,
//   "lemons": [
//   {"node": "n1", "gpu": 3, "uuid": "GPU-...", "excluded": {"at": 1764150000, "until": 1764754800,
//     "reason": "Xid 79"}, "marks": [{"at": 1764150000, "job": "llama", "hardware": true,
//     "reason": "Xid 79"}]}
//   ],
//   "crc32c": "89abcdef"}
//
// Times are whole seconds since 1970, of the wall clock: the list outlives a boot. They order
// nothing; a wrong clock can only forget too early or too late.
#ifndef HOLDFAST_AGENT_RECOVERY_GPUS_H_
#define HOLDFAST_AGENT_RECOVERY_GPUS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace holdfast::recovery {

struct Gpu {
  std::string node;
  uint32_t index = 0;  // as the driver numbers it; without a driver the local rank's
  std::string uuid;    // may be empty
  friend bool operator==(const Gpu&, const Gpu&) = default;
};
// The same UUID, or, if one of them has none, the same node and number.
bool IsSame(const Gpu& a, const Gpu& b);
// "GPU 3"; with a node name in front of it where `home` is another: "n2 GPU 3".
std::string Name(const Gpu& gpu, std::string_view home);

inline constexpr size_t kGpuNodeBytesMax = 135;
inline constexpr size_t kGpuUuidBytesMax = 64;
inline constexpr size_t kLemonReasonBytesMax = 256;
inline constexpr size_t kLemonJobBytesMax = 128;

struct LemonMark {
  absl::Time at;
  std::string job;
  std::string reason;
  bool hardware = false;  // the driver's own word: an Xid, a lost GPU
  friend bool operator==(const LemonMark&, const LemonMark&) = default;
};

struct Exclusion {
  absl::Time at;
  absl::Time until;
  std::string reason;
  friend bool operator==(const Exclusion&, const Exclusion&) = default;
};

struct Lemon {
  Gpu gpu;
  std::optional<Exclusion> excluded;
  std::vector<LemonMark> marks;  // oldest first
  friend bool operator==(const Lemon&, const Lemon&) = default;
};

// Threads: one at a time.
class LemonList {
 public:
  static constexpr size_t kLemonsMax = 1024;  // beyond, the one whose last mark is oldest goes
  static constexpr size_t kMarksMax = 8;      // of a GPU; beyond, the oldest goes
  static constexpr size_t kFileBytesMax = size_t{8} << 20;

  // Times are cut to whole seconds, texts to their limits. A mark that is there already is not
  // added once more, so that an action may be carried out twice.
  void Mark(const Gpu& gpu, LemonMark mark);
  void Exclude(const Gpu& gpu, Exclusion exclusion);
  // Forgets the GPU, marks and all: a person vouches for it. False: it was not in the list.
  bool Readmit(const Gpu& gpu);
  // Drops marks older than `memory` and exclusions that have ended.
  void Forget(absl::Time now, absl::Duration memory);

  const Lemon* Find(const Gpu& gpu) const;  // null: not in the list
  // Null: it is not excluded at `now`.
  const Exclusion* ExclusionOf(const Gpu& gpu, absl::Time now) const;
  size_t MarksSince(const Gpu& gpu, absl::Time since) const;
  const std::vector<Lemon>& lemons() const { return lemons_; }

  std::string Encode() const;
  // Strict. kDataLoss: names `where`, the member, what was expected and found.
  static absl::StatusOr<LemonList> Decode(std::string_view bytes, const std::string& where);

  friend bool operator==(const LemonList&, const LemonList&) = default;

 private:
  Lemon& Place(const Gpu& gpu);

  std::vector<Lemon> lemons_;  // in the order of their first mark or exclusion
};

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_GPUS_H_
