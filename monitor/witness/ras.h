// NCCL's RAS subsystem: what its client port (TCP 28028) answers to VERBOSE STATUS, as JSON (NCCL
// 2.28.7 and newer) or as text (2.24 and newer), and what two answers say about ranks.
//
// RAS sees which processes answer and how many collectives each rank has launched. It sees no point
// to point, no captured graphs, and nothing of an operation that all have launched. Counts differ
// at any moment of a healthy job; a rank counts as behind only if they are the same at two looks.
// Forms as NCCL's src/ras/client_support.cc writes them (read in 2.30.7). The text prints
// individual ranks only where few differ ("outliers").
#ifndef HOLDFAST_MONITOR_WITNESS_RAS_H_
#define HOLDFAST_MONITOR_WITNESS_RAS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/ids.h"
#include "monitor/testimony.h"

namespace holdfast::monitor {

inline constexpr size_t kRasAnswerBytesMax = size_t{64} << 20;

struct RasRank {
  uint32_t index = 0;                        // inside its communicator
  int64_t process = -1;                      // pid in its own namespace; -1: not told
  std::string host;                          // an address; empty: not told
  bool missing = false;                      // gave no answer
  bool dead = false;                         // RAS takes it for dead: it has given none for 60 s
  int64_t async_error = 0;                   // ncclResult_t; 0 and 7 (in progress) are none
  std::map<std::string, uint64_t> launched;  // by collective; as far as told
};

struct RasCommunicator {
  uint64_t hash = 0;  // commHash, as the profiler plugin has it
  uint32_t size = 0;  // ranks; 0: not told
  std::vector<RasRank> ranks;
  // Text only: how many each of most ranks have launched, by collective.
  std::map<std::string, uint64_t> most_launched;
};

struct RasReport {
  std::vector<RasCommunicator> communicators;
  std::vector<RasRank> dead;  // text only: processes of no named communicator
};

// Either form. Errors: kInvalidArgument (neither, or a field of another type), with the place.
absl::StatusOr<RasReport> ParseRasReport(std::string answer);

// The global rank behind a communicator's member, or nothing if it is not known.
using RankOfMember = std::function<std::optional<Rank>(const RasCommunicator&, const RasRank&)>;

// What two answers, taken `apart` from each other, say. Members whose rank is not known are named
// in the sentence only.
std::vector<Testimony> TestifyRas(const RasReport& first, const RasReport& second,
                                  absl::Duration apart, const RankOfMember& rank_of);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_WITNESS_RAS_H_
