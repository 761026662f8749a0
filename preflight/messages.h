// What rank 0 and the nodes say to each other, in channels (channel.h): numbers, and the nodes' own
// names for themselves and their disks. Plain data, little-endian.
//
//   node to rank 0                 rank 0 to node
//   kReady                         kBegin        once all nodes have come
//   kClocks                        kReadClocks   a few times in a row, before and after
//   kAlone                         kMeasureAlone
//   kPair                          kMeasurePair  one a round, but for who sits out
//                                  kEnd          always the last, at any time
// and in a pair, from the end that receives to the end that sends: kLegDone (pair.h).
#ifndef HOLDFAST_PREFLIGHT_MESSAGES_H_
#define HOLDFAST_PREFLIGHT_MESSAGES_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "preflight/measurements.h"

namespace holdfast::preflight {

enum class MessageType : uint32_t {
  kReady = 1,
  kBegin = 2,
  kReadClocks = 3,
  kClocks = 4,
  kMeasureAlone = 5,
  kAlone = 6,
  kMeasurePair = 7,
  kPair = 8,
  kEnd = 9,
  kLegDone = 10,
};

// How it ends, the same on every node.
enum class Outcome : uint32_t {
  kFine = 0,
  kOdd = 1,     // odd ones were found
  kFailed = 2,  // it could not be done
};

// Text of at most N - 1 bytes; the rest is zero. Longer text is cut.
template <size_t N>
struct FixedText {
  std::array<char, N> bytes = {};

  FixedText() = default;
  explicit FixedText(std::string_view text) {
    std::memcpy(bytes.data(), text.data(), std::min(text.size(), N - 1));
  }
  std::string ToString() const { return std::string(bytes.data(), strnlen(bytes.data(), N)); }
};

struct ReadyMessage {
  uint16_t pair_port = 0;  // where it listens for its partners
  uint16_t reserved = 0;
  uint32_t cpu_count = 0;
  FixedText<64> host = {};
};
static_assert(sizeof(ReadyMessage) == 72);

struct BeginMessage {
  double seconds_max = 0;  // kEnd comes within this time, or rank 0 is lost
};

// CLOCK_REALTIME and CLOCK_MONOTONIC of one instant, and the greatest change of their difference
// since the process began.
struct ClocksMessage {
  int64_t realtime_ns = 0;
  int64_t monotonic_ns = 0;
  int64_t step_ns = 0;
};

struct MeasureAloneMessage {
  double seconds = 0;  // for all of it
};

struct AloneMessage {
  std::array<double, kNodeMetricCount> values = {};
  uint32_t measured = 0;  // bit i: values[i] is one
  uint32_t reserved = 0;
  FixedText<128> disk = {};
  FixedText<512> disk_error = {};
};
static_assert(sizeof(AloneMessage) == 696);

struct MeasurePairMessage {
  double seconds = 0;  // for all legs
  uint32_t round = 0;
  uint32_t partner_rank = 0;
  std::array<std::byte, 16> partner_address = {};  // Endpoint::Encode
  uint16_t partner_port = 0;
  uint16_t connects = 0;           // 1: this node connects to the partner, 0: it waits for it
  uint32_t partner_is_rank_0 = 0;  // 1: its address is the one by which this node reached rank 0
};
static_assert(sizeof(MeasurePairMessage) == 40);

// What this node saw of a pair; round trips are measured by the end that connects.
struct PairMessage {
  double one_way_bytes_per_second = 0;  // that arrived here
  double both_ways_bytes_per_second = 0;
  double round_trip_seconds = 0;
  double round_trip_p99_seconds = 0;
  FixedText<512> error = {};  // empty: all was measured
};
static_assert(sizeof(PairMessage) == 544);

struct EndMessage {
  Outcome outcome = Outcome::kFine;
  FixedText<1024> text = {};  // why, if it is kFailed
};
static_assert(sizeof(EndMessage) == 1028);

// Ends a leg: this end has measured what it wanted.
struct LegDoneMessage {
  uint32_t leg = 0;
};

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_MESSAGES_H_
