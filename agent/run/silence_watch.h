// Whether a rank has been silent for too long: by its heartbeats (hf_heartbeat), and by the pauses
// that it names (hf_section_begin: an evaluation, a checkpoint). A pure function of what it is
// told: no clock, no thread. It needs no monitor.
//
// What too long is: `configured` (recovery.hang_timeout), or `busy_factor` times the longest
// silence that ended by itself, of any rank (they do the same), where that is longer; at most
// `section_timeout` (monitor/thresholds.h). It never learns to be less patient: an evaluation that
// nobody has named looks like a hang, and a job that is restarted for it comes to it again. Pauses
// are learned for each name; one that was not seen before has `section_timeout`.
//
// Where the monitor sees the job, it is given kMonitorFirst more: it has the same time-outs, comes
// to them a little later, and says who it is.
//
// One that stands makes all others wait for it, and their heartbeats stop within the same step. So
// whoever has given no sign of life in the second half of a late one's silence is late with it,
// told at once: only a rank that is late alone is the one.
//
// No silence: a rank that has not yet beaten twice in its launch (it may never beat again); time
// that the engine takes (a restore, a capture), and time in which nobody looked.
#ifndef HOLDFAST_AGENT_RUN_SILENCE_WATCH_H_
#define HOLDFAST_AGENT_RUN_SILENCE_WATCH_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "checkpoint/engine.h"
#include "monitor/thresholds.h"

namespace holdfast {

// Threads: one at a time.
class SilenceWatch {
 public:
  // Names of pauses that are remembered; beyond, a further one has what is configured.
  static constexpr size_t kNamesMax = 64;
  static constexpr absl::Duration kMonitorFirst = absl::Seconds(30);

  SilenceWatch(const monitor::Thresholds& thresholds, absl::Duration configured)
      : thresholds_(thresholds), configured_(configured) {}

  // The ranks begin anew; what was learned stays.
  void BeginLaunch() { ranks_.clear(); }

  struct Rank {
    uint32_t rank = 0;
    uint64_t heartbeat_count = 0;
    std::vector<std::string> sections;  // that it is in, outermost first
  };
  // A rank is late, or was and is there again.
  struct Said {
    uint32_t rank = 0;
    bool is_late = false;
    std::string section;    // of a late one: the pause; empty: no heartbeat
    absl::Duration silent;  // of a late one, as the next
    absl::Duration timeout;
    std::vector<uint32_t> with = {};  // that are late with it
    friend bool operator==(const Said&, const Said&) = default;
  };
  // What holds for all of them.
  enum class Engine { kIdle, kWorks };
  enum class Monitor { kBlind, kSees };
  // As of `now`, which does not go back. Ranks that are left out are not looked at.
  std::vector<Said> Look(absl::Duration now, const std::vector<Rank>& ranks, Engine engine,
                         Monitor monitor);

  struct Timeout {
    std::string section;  // empty: of heartbeats
    absl::Duration timeout;
    absl::Duration longest;  // that ended by itself
    uint64_t seen = 0;
    bool is_learned = false;  // else it is what is configured
  };
  // Of heartbeats first.
  std::vector<Timeout> timeouts() const;

 private:
  struct Learned {
    absl::Duration longest;
    uint64_t seen = 0;
    void Add(absl::Duration silence);
  };
  struct Section {
    std::string name;
    absl::Duration since;
  };
  struct State {
    uint64_t heartbeat_count = 0;
    absl::Duration since;   // the last heartbeat, or the end of a pause
    bool is_clean = false;  // no pause since the last heartbeat
    std::vector<Section> sections;
    bool is_late = false;
    absl::Duration last_sign() const;
  };
  // Of a rank that is not late: what is beyond its time-out.
  std::optional<Said> LatenessOf(uint32_t rank, const State& state, absl::Duration now) const;
  void Forgive(absl::Duration passed);
  bool TakeSigns(const Rank& rank, absl::Duration now);
  void ForgiveFollowers(const std::vector<Rank>& ranks, absl::Duration now,
                        std::vector<Said>& said);
  static const Section* PauseOf(const State& state);
  bool TakeSections(State& state, const Rank& rank, absl::Duration now);
  Timeout TimeoutOf(const std::string& section, const Learned& learned) const;
  Timeout OfHeartbeat() const;
  Timeout OfPause(const std::string& name) const;

  const monitor::Thresholds thresholds_;
  const absl::Duration configured_;
  std::map<uint32_t, State> ranks_;
  std::optional<absl::Duration> looked_;
  absl::Duration patience_;  // for the monitor
  Learned heartbeats_;
  std::map<std::string, Learned> pauses_;
};

// Those that are open, as Look takes them.
std::vector<SilenceWatch::Rank> OpenRanks(const std::vector<Engine::RankProgress>& ranks);

// For people.
std::string SentenceOf(const SilenceWatch::Said& said);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_SILENCE_WATCH_H_
