// One connection of a communicator (channel, peer, direction) as the proxy drives it: flows queue
// on it, the first one moves. What NCCL's proxy does in src/transport/net.cc, with its steps and
// its words for the profiler.
//
//   send                                            receive
//   posted       a place for the device's chunk     posted     a place, given to the sender as
//                [waits for the device]                        credit [waits for data]
//   transmitted  the device has produced it, and    arrived    it is here [waits for the flush]
//                the receiver has given credit      flushed    the device has it [waits for the
//                [waits for the receiver]                      device]
//   done         it has arrived [waits for wire]    done       the device has consumed it
//
// At most kCredits steps of a flow are open at once. A receiver's credit counts places, so what a
// receiver has consumed opens the next.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_CONNECTION_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_CONNECTION_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "examples/collectives/link.h"
#include "examples/collectives/operation.h"
#include "examples/collectives/profiler.h"

namespace collectives {

// What of an operation is on one connection.
struct FlowInProxy {
  FlowInProxy(std::shared_ptr<Operation> whole, Flow* part, void* profiler_event)
      : operation(std::move(whole)), flow(part), event(profiler_event) {}

  std::shared_ptr<Operation> operation;
  Flow* flow = nullptr;
  void* event = nullptr;  // of the profiler
  bool in_progress = false;
  uint32_t posted = 0;
  uint32_t middle = 0;  // transmitted, or flushed as far as the profiler knows
  uint32_t done = 0;
  uint64_t base = 0;  // chunks of the connection before this flow
  std::array<void*, kCredits> steps = {};
};

// What a step did, for the caller to go on with.
struct Progressed {
  bool moved = false;
  bool tells_device = false;  // it may go on now
  size_t device_bytes = 0;    // that it has to work on then
};

// Threads: the proxy's alone.
// Lifetime: the trace must outlive it.
class SendConnection {
 public:
  explicit SendConnection(CommunicatorTrace& trace) : trace_(trace) {}

  void Push(FlowInProxy flow);

  std::optional<LinkSender> link;
  // LostPeer::kHang: the link has failed, which nobody is told. What the device does is still seen.
  bool is_silent = false;
  std::deque<FlowInProxy> flows;

  // Precondition: there is a link, or the connection is silent. Errors: those of the link.
  absl::Status Progress(Progressed& progressed);

 private:
  bool Post(FlowInProxy& flow);
  bool Transmit(FlowInProxy& flow);
  bool Complete(FlowInProxy& flow, bool& tells_device);

  CommunicatorTrace& trace_;
  uint64_t chunk_count_ = 0;  // of all flows so far
};

// Threads: the proxy's alone.
// Lifetime: the trace must outlive it.
class ReceiveConnection {
 public:
  ReceiveConnection(CommunicatorTrace& trace, size_t chunk_bytes)
      : trace_(trace), chunk_bytes_(chunk_bytes) {}

  void Push(FlowInProxy flow);
  std::optional<LinkReceiver> link;  // perhaps not yet: the sender opens it
  bool is_silent = false;            // as above
  std::deque<FlowInProxy> flows;

  // Whether a chunk may arrive now.
  bool ExpectsData() const {
    return !flows.empty() && flows.front().flow->arrived.load() < flows.front().posted;
  }

  // Errors: those of the link; kFailedPrecondition (the peer is in another operation, or in one of
  // another size; both are named), kDataLoss (no frame that a sender of ours makes).
  absl::Status Progress(Progressed& progressed);

 private:
  bool Post(FlowInProxy& flow);
  // `moved` and `tells_device` are set where anything arrived.
  absl::Status Arrive(FlowInProxy& flow, Progressed& progressed);
  absl::Status CheckHeader(const FlowInProxy& flow, const Chunk& chunk) const;
  bool Consume(FlowInProxy& flow);
  std::byte* TakePlace();

  CommunicatorTrace& trace_;
  const size_t chunk_bytes_;
  uint64_t chunk_count_ = 0;  // of all flows so far
  LinkCredit credit_;
  bool has_header_ = false;
  std::span<std::byte> arriving_into_;
  // Places for chunks that come before the device, or that are to be summed: at most kCredits. The
  // one used last is taken first.
  std::vector<std::unique_ptr<std::byte[]>> places_;
  std::vector<std::byte*> free_places_;
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_CONNECTION_H_
