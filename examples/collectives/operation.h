// An operation as its three parties share it: the caller waits for it, the device performs it, the
// proxy moves its bytes.
//
// An operation is a set of flows, each over one connection in one direction and cut into chunks.
// Every chunk goes through the hands of device and proxy in turn:
//
//   send     produced (device) -> queued and written (proxy) -> completed (proxy)
//   receive  arrived (proxy) -> flushed (device) -> consumed (device)
//
// Each of these is a counter that one thread advances with release and the other reads with
// acquire; what lies behind it (bytes, staged places) was stored before. A send chunk is produced
// once the receive chunks that it depends on are consumed: so data pass through a ring.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_OPERATION_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_OPERATION_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "examples/collectives/mutex.h"
#include "examples/collectives/wire.h"

namespace collectives {

// Whether and how received bytes are joined with those in memory.
enum class Combine : uint8_t { kCopy, kSumInt64, kSumFloat32 };

// Joins `from` into `into`, which has its size.
void CombineBytes(Combine combine, std::span<std::byte> into, std::span<const std::byte> from);

struct Chunk {
  std::span<const std::byte> from = {};  // of a send
  std::span<std::byte> into = {};        // of a receive
  Combine combine = Combine::kCopy;
  uint16_t step = 0;   // of the operation's program; of long ones the low 16 bits
  uint32_t needs = 0;  // a send: receive chunks of the flow `after` to be consumed before
  uint64_t message_bytes = 0;
  uint64_t offset_bytes = 0;

  size_t bytes() const { return from.size() + into.size(); }
};

struct Flow {
  Flow(uint32_t flow_channel, uint32_t flow_peer, bool sends)
      : channel(flow_channel), peer(flow_peer), is_send(sends) {}
  Flow(const Flow&) = delete;
  Flow& operator=(const Flow&) = delete;

  uint32_t chunk_count() const { return static_cast<uint32_t>(chunks.size()); }
  uint32_t done() const {
    return is_send ? completed.load(std::memory_order_acquire)
                   : consumed.load(std::memory_order_acquire);
  }

  const uint32_t channel;
  const uint32_t peer;  // a position in the communicator
  const bool is_send;
  std::vector<Chunk> chunks;
  const Flow* after = nullptr;  // a send: the receive flow that its chunks depend on

  void* task = nullptr;  // the profiler's handle of the operation, or of this part of it

  // Chunks. Advanced by the device:
  std::atomic<uint32_t> produced{0};
  std::atomic<uint32_t> flushed{0};
  std::atomic<uint32_t> consumed{0};
  // By the proxy:
  std::atomic<uint32_t> arrived{0};
  std::atomic<uint32_t> written{0};    // given to the kernel: the bytes may change
  std::atomic<uint32_t> completed{0};  // the receiver has them
  // Where chunk i lies, at i % kCredits, if it came before the device did; null: in its place.
  std::array<std::byte*, kCredits> staged = {};
};

// Threads: any may wait; see the members.
class Operation {
 public:
  // One that moves nothing: only its end matters.
  Operation() : Operation(OperationKind::kBarrier, Deadline::max()) {}
  Operation(OperationKind kind, Deadline deadline) : kind_(kind), deadline_(deadline) {}

  OperationKind kind() const { return kind_; }
  Deadline deadline() const { return deadline_; }

  // At most once: later calls change nothing.
  void Finish(absl::Status status);
  bool Done() const;
  absl::Status Wait() const;

  // Storage for a barrier's bytes, as long as the operation.
  std::span<std::byte, 2> token() { return token_; }

  // Constant once it is submitted.
  std::vector<std::unique_ptr<Flow>> flows;
  uint64_t sequence = 0;       // per communicator, or per peer and direction
  uint32_t channel_count = 0;  // with a kernel of their own, from channel `first_channel`
  uint32_t first_channel = 0;
  int event_mask = 0;            // of the profiler, when it was enqueued
  bool tells_kernels = false;    // the profiler wants to know when kernels start and stop
  uint64_t computes_before = 0;  // on the device, to be over before this begins

  // Stored by the device, release; nanoseconds of its clock, 0: not yet.
  std::atomic<uint64_t> kernel_started_ns{0};
  std::atomic<uint64_t> kernel_stopped_ns{0};

 private:
  const OperationKind kind_;
  const Deadline deadline_;
  std::array<std::byte, 2> token_ = {};
  mutable Mutex mutex_;
  mutable CondVar finished_;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_OPERATION_H_
