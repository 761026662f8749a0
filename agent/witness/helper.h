// Runs the program holdfast-witness, which looks at what may hang or crash whoever looks.
#ifndef HOLDFAST_AGENT_WITNESS_HELPER_H_
#define HOLDFAST_AGENT_WITNESS_HELPER_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace holdfast {

// Of one run: what it printed may be this long at most; the rest is cut.
inline constexpr size_t kHelperOutputBytesMax = size_t{1} << 20;

// The program beside this one (/proc/self/exe), else the name alone, to be found in PATH.
std::string HelperPath();

// Runs one process per list of arguments, all at once, and returns what each printed. Those that
// have not ended at the deadline are killed: kDeadlineExceeded. Errors of one: kPermissionDenied,
// kNotFound or kUnavailable with its own words, by its exit code (agent/witness/main.cc).
//
// Threads: any; blocks it for `deadline` at most, and the time that a kill takes.
std::vector<absl::StatusOr<std::string>> RunHelpers(
    const std::string& path, const std::vector<std::vector<std::string>>& runs,
    absl::Duration deadline);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_HELPER_H_
