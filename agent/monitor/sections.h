// What a training loop says that it is doing: the stack of sections on a board, sampled, and what
// their names mean to the analysis.
#ifndef HOLDFAST_AGENT_MONITOR_SECTIONS_H_
#define HOLDFAST_AGENT_MONITOR_SECTIONS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "agent/monitor/tick_clock.h"
#include "hook/abi/monitor.h"
#include "monitor/summary.h"

namespace holdfast {

// By the words that a name begins with (letters and underscores; case does not count, '-' and ' '
// are '_'): the table is in docs/MONITOR.md. Any other name is kCompute.
monitor::SectionKind SectionKindOf(std::string_view name);

// Threads: one at a time.
class SectionTracker {
 public:
  // Takes a sample; `passed`: since the last one, or zero. Time inside data sections is counted in
  // whole samples, of kSampleMax at most.
  static constexpr absl::Duration kSampleMax = absl::Seconds(1);
  void Sample(const abi::BoardHeader& header, absl::Duration passed);

  // As of the last sample, outermost first; the innermost kSectionsMax ones.
  std::vector<monitor::Section> Open(const TickInstant& now) const;
  uint64_t data_us() const { return data_us_; }

 private:
  struct Level {
    std::string name;
    uint64_t since = 0;  // ticks
  };
  std::vector<Level> stack_;
  uint64_t changed_ = 0;  // ticks: the last change of the stack that was seen
  uint64_t data_us_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_SECTIONS_H_
