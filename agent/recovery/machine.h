// The policy while it takes one event: first the facts (absorb.cc), then what follows from them
// (policy.cc). Inside of agent/recovery/.
//
// Decisions look at facts only, never at the event itself, so that the order of two events that
// come together matters as little as can be.
#ifndef HOLDFAST_AGENT_RECOVERY_MACHINE_H_
#define HOLDFAST_AGENT_RECOVERY_MACHINE_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/actions.h"
#include "agent/recovery/events.h"
#include "agent/recovery/history.h"
#include "agent/recovery/settings.h"
#include "agent/recovery/trouble.h"

namespace holdfast::recovery {

// Lifetime: refers to all three.
class Machine {
 public:
  Machine(const Settings& settings, History& history, std::vector<Action>& actions)
      : settings_(settings), h_(history), actions_(actions) {}

  void Absorb(const Event& event);
  void Advance();

 private:
  // ---- absorb.cc
  void SetClock(const Event& event);
  void Take(const Tick&) {}
  void Take(const RunBegun& begun);
  void Take(const AgentRestarted& restarted);
  void Take(const RankStarted& started);
  void Take(const RankOpened& opened);
  void Take(const RankRestored& restored);
  void Take(const StepDone& done);
  void Take(const RankExited& exited);
  void Take(const RankTimedOut& timed_out);
  void Take(const RankBeats& beats);
  void Take(const FindingTold& told);
  void Take(const FindingWithdrawn& withdrawn);
  void Take(const SightChanged& sight);
  void Take(const XidSeen& xid);
  void Take(const NodeGone& gone);
  void Take(const NodeBack& back);
  void Take(const EvidenceCollected& collected);
  void Take(const CheckpointCommitted& committed);
  void Take(const SaveFailed& failed);
  void Take(const CheckpointsRead& read);
  void Take(const Approve& approve);
  void Take(const Veto& veto);
  void Take(const Hold& hold);
  void Take(const Readmit& readmit);
  void Take(const Save& save);
  void Take(const Stop& stop);
  void Take(const SignalCame& signal);

  void End(EndRequest request);
  void AskAgain();
  // Null: not of this launch, not a rank, or it has ended.
  RankRecord* Living(Launch launch, Rank rank);
  void Forward(Launch launch, Rank rank, RankPhase phase);
  CheckpointRecord& RecordOf(const CheckpointFacts& facts);
  void KeepLemon(const Gpu& gpu);

  // ---- policy.cc: each true if the phase has changed.
  bool Step();
  bool Alive();
  bool Saving();
  bool Stopping();
  bool Down();

  void NoteProgress();
  void NoteAnomalies();
  void OpenIncident(const Trouble& trouble);
  void CloseIncident(Outcome outcome);
  bool EvidenceIsOver();
  void BeginSave(const std::string& why);
  bool BeginStop(const std::string& why);
  bool WriteOff(Rank rank);
  bool EnterDown();
  bool NextIsFree() const;
  enum class Permission { kGiven, kObserve, kVetoed, kHeld, kAsked };
  Permission MayAct();
  bool Held() const;
  Permission Ask(const std::string& key, const std::string& question);
  void DropProposal();
  bool WaitForPerson();  // after kAsked, while no rank runs
  bool ActsByItself(Cause cause) const;
  std::vector<Gpu> WouldExclude() const;
  std::string PlanText() const;
  void Blame();
  std::optional<absl::Duration> PauseEnd();
  void Start(Placement placement, RestoreRule rule, const std::string& why);
  bool Over(int32_t code, const std::string& why);
  void SetState(State state);
  void SetWakeAt();

  // Both files.
  absl::Duration ToEventClock(absl::Duration at) const {
    return at - absl::Microseconds(h_.clock_offset_us);
  }
  void Emit(Action action) { actions_.push_back(std::move(action)); }
  void Say(std::string text) { Emit(Notice{std::move(text)}); }
  void EmitStart();
  void EmitStop();
  void EmitSave(const std::string& why);
  void EmitEvidence();

  const Settings& settings_;
  History& h_;
  std::vector<Action>& actions_;
};

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_MACHINE_H_
