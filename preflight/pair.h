// What two nodes measure of the path between them: round trips while nothing else goes between
// them, then bytes from the one to the other, back, and both ways at once.
//
// One connection carries messages, and each of these legs has a connection of its own, opened by
// the same end and proven like the first. A receiver measures what arrives, from the first byte on,
// leaving out the beginning (TCP has to find its speed first, and queues on the way have to fill);
// when it has enough it says so (kLegDone), and the leg's connection is broken off: what a slow
// path still holds is not waited for.
#ifndef HOLDFAST_PREFLIGHT_PAIR_H_
#define HOLDFAST_PREFLIGHT_PAIR_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "io/tcp.h"
#include "preflight/handshake.h"
#include "preflight/messages.h"

namespace holdfast::preflight {

inline constexpr uint32_t kLegCount = 4;
// Of a leg's time, not counted.
inline constexpr double kLegWarmUpShare = 0.25;
inline constexpr size_t kPingBytes = 64;
inline constexpr size_t kPingsMax = 20'000;
// What connecting, proving and waiting for the other end may take besides the legs' times.
inline constexpr absl::Duration kPairPatience = absl::Seconds(15);

struct PairPlan {
  uint32_t round = 0;
  uint32_t partner_rank = 0;
  Endpoint partner;         // where it listens; not used if this end waits for it
  bool connects = false;    // exactly one of the two
  absl::Duration duration;  // of all legs
};

// Errors, all of the pair: kUnavailable (no connection, or it broke), kDeadlineExceeded (after
// duration + kPairPatience), kUnauthenticated, kFailedPrecondition, kDataLoss.
absl::StatusOr<PairMessage> MeasurePair(const Identity& self, Listener& listener,
                                        const PairPlan& plan);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_PAIR_H_
