// How a process ended that need not be our child, as the kernel tells it.
#ifndef HOLDFAST_AGENT_MONITOR_PROCESS_END_H_
#define HOLDFAST_AGENT_MONITOR_PROCESS_END_H_

#include <optional>

namespace holdfast {

// As waitpid(2) would say it to the parent of the process that `pidfd` is of. Until the parent has
// waited, the kernel tells whoever may trace the process (its own user, or CAP_SYS_PTRACE):
// /proc/PID/stat has the status of a zombie. Afterwards it tells whoever has had a pidfd from
// before (PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15). Nothing: it lives, or nobody tells us
// (yet). Never waits.
std::optional<int> WaitStatusOf(int pidfd);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_PROCESS_END_H_
