// Collective operations between the processes of a job, over TCP: what a training program sees.
//
// A `Context` joins the job (rendezvous at MASTER_ADDR:MASTER_PORT), has the rank's device, and
// knows who is lost. A `Communicator` is a named, ordered list of ranks; any number of them live at
// once, each with links and a proxy thread of its own. Operations are asynchronous: a call queues
// the operation and returns a `Handle`. Collectives of one communicator run in the order of the
// calls, which must be the same on all its ranks; sends and receives between two ranks run in their
// order beside them. Handles may be waited for in any order.
//
// It is built as NCCL is, so that what watches NCCL can watch it, and so that it fails as NCCL
// does: a device performs the operations once it comes to them, chunk by chunk (device.h); a proxy
// thread moves the chunks (proxy.h, connection.h), of which at most 8 are under way on a connection
// and none for which the receiver has no place; a profiler plugin is told of it (profiler.h).
//
// A lost peer. Rank 0 holds a control connection to every rank and tells all when one breaks. Then
// every communicator that has the lost rank as a member fails, and with it all its operations, with
// an error that names the rank that was lost first: also where another rank died of it.
// `LostPeer::kHang` turns this off: as with NCCL, operations then simply never end.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_COLLECTIVES_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_COLLECTIVES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "examples/collectives/mutex.h"

namespace collectives {

class Device;
class Fabric;
class Operation;
class ProfilerPlugin;
class Proxy;

enum class OperationKind : uint16_t;

enum class LostPeer { kFail, kHang };

struct Options {
  uint32_t rank = 0;
  uint32_t world_size = 1;
  std::string master_address = "127.0.0.1";
  uint16_t master_port = 0;
  // The address that this rank listens on and connects from. Others must be able to reach it.
  std::string bind_address = "127.0.0.1";
  // Names the job and its attempt. Ranks with another token are refused.
  std::string token;
  absl::Duration rendezvous_timeout = absl::Seconds(60);
  // An operation that takes longer fails its communicator. Not with LostPeer::kHang.
  absl::Duration operation_timeout = absl::Minutes(10);
  LostPeer lost_peer = LostPeer::kFail;
  // With LostPeer::kHang: after so long the operations of the communicator fail after all.
  absl::Duration lost_peer_silence = absl::Hours(24 * 365);
  // What moves at once. A multiple of 8, up to 16 MiB.
  size_t chunk_bytes = size_t{256} << 10;
  // Rings of a communicator for which none are given, 1 to 8.
  uint32_t ring_count = 1;
  // As NCCL_PROFILER_PLUGIN.
  std::string profiler_plugin = "none";
  // Rank 0: a listening socket to use in place of master_port, or -1. Ownership passes.
  int master_listener_fd = -1;

  // From torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_RUN_ID,
  // TORCHELASTIC_RESTART_COUNT), NCCL_PROFILER_PLUGIN and COLLECTIVES_BIND_ADDR,
  // COLLECTIVES_LOST_PEER (fail, hang, hang:SECONDS), COLLECTIVES_TIMEOUT_SECONDS,
  // COLLECTIVES_RINGS, COLLECTIVES_CHUNK_BYTES. Errors: kInvalidArgument, naming the variable.
  static absl::StatusOr<Options> FromEnvironment();
};

// The end of an asynchronous operation. Copies share it.
//
// Threads: any.
class Handle {
 public:
  explicit Handle(std::shared_ptr<Operation> operation) : operation_(std::move(operation)) {}
  // True once the operation has ended, well or not.
  bool Done() const;
  // Returns when the operation has ended. Until then its buffers must neither move nor change.
  // Errors: kUnavailable (a peer is lost; named), kDeadlineExceeded (operation_timeout; whom it
  // waited for is named), kFailedPrecondition (ranks disagree about the operation),
  // kInvalidArgument (this call's arguments), kCancelled (the communicator was destroyed). After
  // any but kInvalidArgument the communicator is broken, and the buffers' contents are unspecified.
  absl::Status Wait() const;

 private:
  std::shared_ptr<Operation> operation_;
};

// How `count` elements are cut over `parts` for ReduceScatter and AllGather: contiguous, in order,
// the first count % parts of them one longer.
struct Segment {
  size_t begin = 0;
  size_t count = 0;
};
Segment SegmentOf(size_t count, size_t parts, size_t part);

// Threads: calls from any thread, but the order of collectives must be the same on all ranks.
// Lifetime: must not outlive its Context. Destroying it cancels what is unfinished.
class Communicator {
 public:
  explicit Communicator(std::unique_ptr<Proxy> proxy);
  ~Communicator();

  const std::string& name() const;
  uint32_t size() const;
  // This process's position in the list of ranks. The ranks below are positions too.
  uint32_t rank() const;

  // Sums element by element over all ranks, in place. int64_t wraps, so that its sum is exact and
  // independent of order; float sums depend on the number of ranks, and are the same on all.
  Handle AllReduce(std::span<int64_t> data);
  Handle AllReduce(std::span<float> data);
  // In place: afterwards SegmentOf(data.size(), size(), rank()) holds the sum; the rest is
  // unspecified.
  Handle ReduceScatter(std::span<int64_t> data);
  Handle ReduceScatter(std::span<float> data);
  // In place: each rank gives its segment of data.size() / element_bytes elements and gets all.
  Handle AllGather(std::span<std::byte> data, size_t element_bytes);
  template <typename Element>
  Handle AllGather(std::span<Element> data) {
    return AllGather(std::as_writable_bytes(data), sizeof(Element));
  }
  Handle Broadcast(std::span<std::byte> data, uint32_t root);
  // Block i of `send` goes to rank i, block i of `receive` comes from there: size() equal blocks in
  // each, which must not overlap. This rank's own block is copied by the call. kInvalidArgument:
  // other sizes.
  Handle AllToAll(std::span<const std::byte> send, std::span<std::byte> receive);
  // Ends when all ranks have called it.
  Handle Barrier();
  // The receiver's size must be the sender's. Ends when the data may be reused, or is there. A send
  // does not end before the receiver has called Receive().
  Handle Send(std::span<const std::byte> data, uint32_t to);
  Handle Receive(std::span<std::byte> data, uint32_t from);

 private:
  Handle Reduce(OperationKind kind, std::span<std::byte> data, size_t element_bytes);

  std::unique_ptr<Proxy> proxy_;
};

// Threads: any.
// Lifetime: outlives its communicators. Destroying it tells the others that this rank leaves, which
// is no loss: only operations that still need something of it fail.
class Context {
 public:
  // Joins the job: blocks until all ranks have come. Errors: kDeadlineExceeded (says how many
  // came), kInvalidArgument, kUnavailable, kAlreadyExists (a rank came twice).
  static absl::StatusOr<std::unique_ptr<Context>> Create(Options options);
  ~Context();

  // `ranks` are global, each at most once, this one among them, the same list everywhere. Does not
  // wait for the others. The same name may be used again after the communicator is gone, in the
  // same order on all ranks. Errors: kInvalidArgument, kAlreadyExists (the name is in use).
  absl::StatusOr<std::unique_ptr<Communicator>> CreateCommunicator(
      const std::string& name, const std::vector<uint32_t>& ranks);
  // With rings of chosen orders, the same everywhere: each has every position of `ranks` once, and
  // is a channel with its part of the data.
  absl::StatusOr<std::unique_ptr<Communicator>> CreateCommunicator(
      const std::string& name, const std::vector<uint32_t>& ranks,
      std::vector<std::vector<uint32_t>> rings);
  // All ranks of the job.
  absl::StatusOr<std::unique_ptr<Communicator>> CreateCommunicator(const std::string& name);

  // This rank's, on which operations run.
  Device& device() { return *device_; }

 private:
  explicit Context(std::unique_ptr<Fabric> fabric);
  std::shared_ptr<ProfilerPlugin> Plugin();

  std::unique_ptr<Fabric> fabric_;
  std::unique_ptr<Device> device_;
  Mutex mutex_;
  // Held by the communicators alone: the library is closed with the last.
  std::weak_ptr<ProfilerPlugin> plugin_ ABSL_GUARDED_BY(mutex_);
  bool plugin_failed_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_COLLECTIVES_H_
