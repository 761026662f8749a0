// /proc/PID/stat: what the kernel says of a process in one line (proc(5)).
#ifndef HOLDFAST_AGENT_PROC_STAT_H_
#define HOLDFAST_AGENT_PROC_STAT_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/string_view.h"

namespace holdfast {

// The line of the process that `pidfd` is of. Empty: it has ended and was waited for, or /proc does
// not tell.
std::string ReadStat(int pidfd);

// Its fields behind the process's name, which may hold anything: the first is field 3, the state.
// Views into `line`; none if it is no such line.
std::vector<absl::string_view> FieldsOfStat(std::string_view line);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_PROC_STAT_H_
