// The monitor board of this process's hook API: made with the first communicator, or when a job is
// opened, and there until the process ends, also if the library is unloaded before: events may
// still be on their way. In a forked child there is none until it makes its own.
#ifndef HOLDFAST_HOOK_PROCESS_MONITOR_H_
#define HOLDFAST_HOOK_PROCESS_MONITOR_H_

#include "hook/monitor_events.h"
#include "hook/settings.h"

namespace holdfast::hook {

// The process's events, or null: none yet, level off, or a forked child. Any thread, no lock.
MonitorEvents* ProcessMonitor();

// Makes them unless they are there; null at level off, or if there is no memory or descriptor for
// them, which is not told: a job must not fail for its monitor. Identity from the environment, or
// from the job that was opened.
MonitorEvents* MakeProcessMonitor();

// A section of the training loop, on the board. Threads: any; a lock, that nobody holds for long.
void BeginMonitorSection(MonitorEvents& events, const char* name);
void EndMonitorSection(MonitorEvents& events);

// Offers the board, if there is one, to the agent of the job that was opened, else to the
// environment's (monitor_offer.h). That there is none is not told.
void OfferProcessMonitor();

// Of the job that was opened: before the board is made its names are better than the environment's.
void SetMonitorIdentity(const Settings& settings);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_PROCESS_MONITOR_H_
