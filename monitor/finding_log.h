// What became of each finding over time: opened as a suspicion, a verdict, explained otherwise,
// withdrawn; and, from what the analysis says every second, what is worth telling anybody. The
// agent keeps such a log on disk, a replay prints one.
//
// No clock: the caller says when, on the clock of the steps, and what a wall clock shows, which is
// kept for people and decides nothing.
#ifndef HOLDFAST_MONITOR_FINDING_LOG_H_
#define HOLDFAST_MONITOR_FINDING_LOG_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "monitor/finding.h"
#include "monitor/job_analysis.h"

namespace holdfast::monitor {

enum class FindingChange : uint8_t {
  kSuspicion,  // opened
  kVerdict,    // opened as one, or became one
  kChanged,    // another fault, scope or first suspect
  kWithdrawn,  // its evidence has gone
  kReopened,   // soon after that it was there again
  kEnded,      // its job, or the attempt, is over
};
inline constexpr size_t kFindingChanges = 6;
std::string_view Name(FindingChange change);

enum class FindingState : uint8_t {
  kOpen,
  kWithdrawn,
  kEnded,
  kUnwatched,  // it was open when the analysis was stopped; whether it still is shows soon
};
inline constexpr size_t kFindingStates = 4;
std::string_view Name(FindingState state);

struct FindingEvent {
  FindingChange change{};
  absl::Duration elapsed;  // on the clock of the steps; of no meaning after a restart
  std::optional<absl::Time> wall_time;
  std::string text;  // the sentence then, or why it was closed
};

struct FindingRecord {
  std::string job;
  std::string attempt_key;
  Finding finding;  // as last told by the analysis
  FindingState state{};
  std::vector<FindingEvent> history;  // oldest first; at most kHistoryMax
  uint64_t history_left_out = 0;      // between the first and the second of them
};

// One line for people: "verdict 1f3a5c7d (job llama): Rank 3 ...".
std::string Line(const FindingRecord& record, const FindingEvent& event);

// Threads: one at a time. Lifetime: owns all it refers to.
class FindingLog {
 public:
  static constexpr size_t kHistoryMax = 32;  // of one finding
  // Of all jobs together; beyond, the oldest closed one is forgotten, then the oldest.
  static constexpr size_t kRecordsMax = 1024;
  // Another explanation of a finding is told at most so often; another grade at once.
  static constexpr absl::Duration kChangedEvery = absl::Seconds(10);

  struct When {
    absl::Duration elapsed;
    std::optional<absl::Time> wall_time;
  };
  // What happened, in the order of happening. `record` is valid until the next call that is not
  // const.
  struct Told {
    const FindingRecord* record = nullptr;
    FindingEvent event;
  };

  // What a step of the job's analysis has said (job_analysis.h).
  std::vector<Told> Take(const JobAnalysis& analysis, const JobAnalysis::Result& result,
                         const When& when);

  // The parts of it. `open`: all findings of the job that are open now. Those of it that were open
  // and are not among them are withdrawn.
  std::vector<Told> Update(const std::string& job, const std::string& attempt_key,
                           const std::vector<Finding>& open, const When& when);
  // The attempt or the job is over: its open findings end. Unwatched ones of `attempt_key`, if that
  // is not null, stay: it is what goes on.
  std::vector<Told> End(const std::string& job, const When& when,
                        const std::string* attempt_key = nullptr);

  // A record of an earlier life, for `Update` to go on with. One that was open is unwatched from
  // then on: a finding of the same job, attempt, fault and first suspect takes it up again, id and
  // all.
  void Restore(FindingRecord record);
  // Unwatched ones that nothing has taken up by now are withdrawn: those opened again by then would
  // have been seen.
  std::vector<Told> GiveUpUnwatched(const std::string& job, const When& when);
  // Those whose last event was before `oldest`, and which are not open.
  void Forget(absl::Time oldest);

  // In the order in which they were opened.
  std::vector<const FindingRecord*> Records(std::string_view job = "") const;
  const FindingRecord* Find(std::string_view id) const;
  size_t size() const { return records_.size(); }

 private:
  struct Entry {
    FindingRecord record;
    std::string analysis_id;  // as Finding::id says; empty: of an earlier life
    // As last told.
    Grade grade{};
    FaultClass fault{};
    Scope scope{};
    std::optional<Suspect> first_suspect;
    absl::Duration told_at;
  };

  Entry* FindOpenable(const std::string& job, const std::string& attempt_key,
                      const Finding& finding);
  Entry& Open(const std::string& job, const std::string& attempt_key, const Finding& finding);
  void Tell(Entry& entry, FindingChange change, std::string text, const When& when,
            std::vector<Told>& told);
  static bool LooksOther(const Entry& entry, const Finding& finding);
  void MakeRoom();

  std::map<uint64_t, Entry> records_;  // by order of opening
  uint64_t opened_ = 0;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_FINDING_LOG_H_
