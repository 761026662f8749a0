// When a process was started, as the kernel tells it.
#ifndef HOLDFAST_AGENT_RUN_PROCESS_START_H_
#define HOLDFAST_AGENT_RUN_PROCESS_START_H_

#include <optional>

#include "absl/time/time.h"

namespace holdfast {

// On the clock of Clock::Elapsed, rounded down to a tick of /proc (10 ms). Nothing: the process of
// `pidfd` has ended, or /proc does not tell.
std::optional<absl::Duration> StartOf(int pidfd);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_PROCESS_START_H_
