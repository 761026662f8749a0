// Runs the program holdfast-witness, which looks at what may hang or crash whoever looks.
#ifndef HOLDFAST_AGENT_WITNESS_HELPER_H_
#define HOLDFAST_AGENT_WITNESS_HELPER_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace holdfast {

// Running at once: each reads the modules of the process that it looks at, some tens of megabytes
// of a large trainer.
inline constexpr size_t kHelpersAtOnce = 2;
// Of one run: what it printed may be this long at most; the rest is cut.
inline constexpr size_t kHelperOutputBytesMax = size_t{1} << 20;

// The program beside this one (/proc/self/exe), else the name alone, to be found in PATH.
std::string HelperPath();

// Runs one process per list of arguments, in their order, kHelpersAtOnce of them at a time, and
// returns what each printed. One that has not ended `each` after its start, or at the deadline of
// all, is killed: kDeadlineExceeded, as for those whose turn has not come by then. Errors of one:
// kPermissionDenied, kNotFound or kUnavailable with its own words, by its exit code
// (agent/witness/main.cc).
//
// Threads: any; blocks it for `deadline` at most, and the time that a kill takes.
struct HelperDeadlines {
  absl::Duration each;
  absl::Duration all;
};
std::vector<absl::StatusOr<std::string>> RunHelpers(
    const std::string& path, const std::vector<std::vector<std::string>>& runs,
    const HelperDeadlines& deadlines);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_HELPER_H_
