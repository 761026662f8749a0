// The recovery policy: a pure function of an event, what it remembers, and the settings. It reads
// no clock, no file and no random number; the same events give the same actions.
//
// Protocol of whoever carries it out, for each event:
//   1. actions = Decide(settings, event, history);
//   2. Encode(history) is made durable;
//   3. the actions are carried out, in their order. Each may fail and be carried out again.
// After a crash between 1 and 2 the event has not happened: what it said is found again (shims keep
// exits, the monitor its findings, the root its checkpoints). After one between 2 and 3
// AgentRestarted gives the actions once more that follow from the history.
//
// Invariants, whatever the events (policy_random_test.cc):
// - at most one launch may publish: StartRanks comes only when every rank of the one before has
//   ended or is fenced and counts as stuck;
// - no more charged restarts than settings.max_restarts; a restart is free of charge only after a
//   healthy attempt, or if a person asked for it;
// - with Mode::kObserve nothing is stopped or started that a person has not asked for;
// - no checkpoint that is marked bad or holds non-finite values is chosen, nor one that crashed
//   `checkpoint_tries` times; one captured under an anomaly only with a person's approval;
// - a withdrawn finding, a suspicion and a silent monitor never stop anything.
#ifndef HOLDFAST_AGENT_RECOVERY_POLICY_H_
#define HOLDFAST_AGENT_RECOVERY_POLICY_H_

#include <vector>

#include "agent/recovery/actions.h"
#include "agent/recovery/events.h"
#include "agent/recovery/history.h"
#include "agent/recovery/settings.h"

namespace holdfast::recovery {

// Of any length and content: texts are cut, ranks and lists beyond their limits ignored.
std::vector<Action> Decide(const Settings& settings, const Event& event, History& history);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_POLICY_H_
