// What became of saves: reading the agent's reports in the rank page.
#ifndef HOLDFAST_HOOK_SAVE_REPORTS_H_
#define HOLDFAST_HOOK_SAVE_REPORTS_H_

#include <cstdint>
#include <optional>

#include "hook/abi/shared_memory.h"
#include "hook/error.h"

namespace holdfast::hook {

struct AgentReport {
  uint64_t step;
  hf_save_state state;
  uint64_t block_count;
  uint64_t blocks_captured;
  uint64_t blocks_flushed;
  int64_t capture_ns;
  int64_t flush_ns;
  int64_t commit_ns;
  Error error;
};

// A consistent copy of the report of `step`, the newest if there are several; nothing if there is
// none. Bounded: an entry that the agent is writing all the time (it died in the middle) counts as
// not there.
std::optional<AgentReport> FindReport(const abi::RankPage& page, uint64_t step);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_SAVE_REPORTS_H_
