// Faults that a rank makes by itself because nobody can make them from outside, told by a file that
// may change while the training runs. What each kind does is in the trainer; the grammar, with all
// keys, is in examples/README.md.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_FAULTS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_FAULTS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tiny_lm {

enum class FaultKind {
  kSlowCompute,
  kGpuHang,
  kFlushStall,
  kNeverEnter,
  kEndlessLoop,
  kWrongSize,
  kWrongKind,
  kSlowData,
  kPause,
  kNan,
  kExit,
};
// As in the file.
const char* Name(FaultKind kind);

inline constexpr size_t kFaultFileBytesMax = size_t{64} << 10;
inline constexpr size_t kFaultsMax = 100;

struct Fault {
  FaultKind kind{};
  std::vector<uint32_t> ranks;        // empty: all
  std::optional<uint64_t> from_step;  // none: the one that begins when it is first seen
  uint64_t steps = 0;                 // 0: without end
  uint64_t every = 1;
  double factor = 1;
  absl::Duration duration = absl::InfiniteDuration();
  std::string section;  // empty: none
  bool is_busy = false;
  int status = 1;
  std::string line;  // as it stands in the file: what names the fault

  bool IsOf(uint32_t rank) const;
};

// Errors: kInvalidArgument, naming the line, what was expected and what was found.
absl::StatusOr<std::vector<Fault>> ParseFaults(const std::string& text);

// The file, from step to step.
//
// Threads: one at a time.
class FaultFile {
 public:
  // An empty path: there are none.
  FaultFile(std::string path, uint32_t rank) : path_(std::move(path)), rank_(rank) {}

  // Reads the file anew if it has changed. Once before every step. A file that is not there has no
  // faults. Errors: those of ParseFaults(), kInvalidArgument (too large), each time that it has
  // changed; then what was read before stays.
  absl::Status Refresh(uint64_t step);

  // Those of this rank that act in `step`, which is that of the last Refresh().
  std::vector<Fault> ActingIn(uint64_t step) const;

 private:
  // What tells one state of the file from another.
  struct Version {
    int64_t changed_ns = 0;
    uint64_t inode = 0;
    int64_t bytes = -1;  // there is none
    bool operator==(const Version&) const = default;
  };

  const std::string path_;
  const uint32_t rank_;
  Version version_;
  std::vector<Fault> faults_;
  std::map<std::string, uint64_t> seen_;  // by line: the step before which it was first seen
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_FAULTS_H_
