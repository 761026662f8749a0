// How what other witnesses say (testimony.h) enters the analysis. Telemetry speaks first; then
// every testimony that is about the same time is held against what it has found:
//
//   it names a suspect of the finding, and what it says fits -> it agrees: evidence, more
//       confidence, and the verdict may come as soon as two witnesses suffice for it
//       (hang_verdict);
//   the finding names nobody (an operation that all have entered, a rank without telemetry, one of
//       a node), and it does -> it tells who, and why;
//   it is a fault of the suspect's GPU -> it tells why;
//   it names somebody else, or says that the suspect did come -> less confidence. It never changes
//       the direction of a finding, and never takes a verdict back;
//   no finding is about those ranks, and telemetry is blind for them -> a finding of its own: a
//       suspicion; a verdict after the time that one witness needs, or where two agree. A fault
//       that takes the GPU away needs no other: it is a verdict at once.
//
// A testimony about standing still counts for a standstill if it was observed during it; a fault or
// an end if it was observed up to witness_cause_age before now. Those of one source, node and group
// are replaced by what it says next.
//
// Which sources could not be heard is said in the evidence of every finding: what they would have
// said is missing there.
#ifndef HOLDFAST_MONITOR_TESTIMONY_BOOK_H_
#define HOLDFAST_MONITOR_TESTIMONY_BOOK_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "monitor/candidates.h"
#include "monitor/job_state.h"
#include "monitor/testimony.h"

namespace holdfast::monitor {

// Testimonies that are kept: the oldest give way.
inline constexpr size_t kTestimoniesKeptMax = 4096;
// Sources on nodes whose last state is kept: beyond, a new one is not.
inline constexpr size_t kWitnessStatesMax = 16'384;

// Threads: one at a time. Lifetime: owns all it refers to.
class TestimonyBook {
 public:
  // Takes what has arrived at `now`, and forgets what explains nothing any more. The order of
  // `arrived` does not matter.
  void Take(absl::Duration now, std::span<const Testimony> arrived, const Thresholds& thresholds);

  // Lets them speak: changes the candidates, and adds some.
  void Speak(const JobState& state, Candidates& candidates) const;

  size_t size() const { return entries_.size(); }

  // What was last said of each source on each node, in the order of both.
  std::vector<WitnessState> states() const;

 private:
  struct Entry {
    Testimony testimony;
    absl::Duration observed;  // on the receiver's clock
    uint64_t batch = 0;       // with which it came
  };

  struct State {
    bool heard = false;
    std::string why;
    absl::Duration observed;
  };

  void TakeState(absl::Duration now, const Testimony& testimony);
  // One line for each source that was not heard on some node.
  std::vector<std::string> Unheard() const;
  void SpeakOf(const JobState& state, Candidate& candidate) const;
  void SpeakAlone(const JobState& state, Candidates& candidates) const;
  bool IsAbout(const JobState& state, const Entry& entry, const Candidate& candidate) const;

  std::vector<Entry> entries_;  // by source, group, claim, ranks, code and node
  std::map<std::pair<Source, std::string>, State> states_;  // by source and node
  uint64_t batch_ = 0;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_TESTIMONY_BOOK_H_
