// One communicator's engine: a thread that moves the bytes of its operations over its links.
//
// The thread is the only one that touches connections; callers hand operations in under a mutex and
// wait on the Operation; the device performs them and signals progress. All waiting is in one
// poll(2): nothing spins. The thread is called as NCCL's proxy thread is, "NCCL Progress N".
//
// Channels: one for each ring, then one for sends and receives, then one for all-to-all.
//
// How an operation fails. A broken link only makes its peer a suspect: processes die of each other,
// so the first loss in the order of rank 0 is named instead, if it is told within kLossGrace. After
// a failure the communicator stays broken, and every later operation gets the same error.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_PROXY_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_PROXY_H_

#include <poll.h>

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/collectives/collectives.h"
#include "examples/collectives/connection.h"
#include "examples/collectives/device.h"
#include "examples/collectives/fabric.h"
#include "examples/collectives/mutex.h"
#include "examples/collectives/operation.h"
#include "examples/collectives/profiler.h"
#include "examples/collectives/ring.h"
#include "examples/collectives/wire.h"

namespace collectives {

// Threads: any may submit.
// Lifetime: must not outlive the Fabric and the Device.
class Proxy {
 public:
  // `rings`: orders of all positions of `ranks`, at least one. `plugin`: or null.
  static absl::StatusOr<std::unique_ptr<Proxy>> Create(Fabric& fabric, Device& device,
                                                       std::shared_ptr<ProfilerPlugin> plugin,
                                                       const std::string& name,
                                                       const std::vector<uint32_t>& ranks,
                                                       std::vector<RingOrder> rings);
  ~Proxy();

  const std::string& name() const { return name_; }
  uint32_t size() const { return static_cast<uint32_t>(ranks_.size()); }
  uint32_t rank() const { return rank_; }
  size_t chunk_bytes() const { return fabric_.options().chunk_bytes; }
  // Rings that an operation on so many bytes uses: all, if each gets a few bytes of every segment.
  uint32_t RingCountFor(size_t bytes) const;
  RingPlace PlaceIn(uint32_t ring, uint32_t ring_count) const;

  std::shared_ptr<Operation> NewOperation(OperationKind kind) const;
  // `operation` has its flows.
  Handle Submit(std::shared_ptr<Operation> operation, const CallInfo& info);
  // `peer`: a position in the communicator, not this rank's. `count` elements of `info.data_type`.
  Handle SubmitSend(uint32_t peer, std::span<const std::byte> data);
  Handle SubmitReceive(uint32_t peer, std::span<std::byte> data);
  // One block for each rank in both; this rank's own is the caller's business.
  Handle SubmitAllToAll(std::span<const std::byte> send, std::span<std::byte> receive,
                        size_t block_bytes);

 private:
  using Key = std::pair<uint32_t, uint32_t>;  // channel, peer
  // An operation until its flows are over and its kernels told.
  struct Running {
    std::shared_ptr<Operation> operation;
    std::vector<void*> kernels;
    bool told_start = false;
    bool told_stop = false;
  };
  struct Suspect {
    uint32_t peer = 0;
    std::string text;
    Deadline deadline;
  };

  Proxy(Fabric& fabric, Device& device, std::string name, std::vector<uint32_t> ranks,
        std::vector<RingOrder> rings, uint32_t rank);

  uint32_t point_to_point_channel() const { return static_cast<uint32_t>(rings_.size()); }
  uint32_t all_to_all_channel() const { return point_to_point_channel() + 1; }
  void StartTrace(std::shared_ptr<ProfilerPlugin> plugin);
  Device::StreamId StreamOf(const Operation& operation) const;

  absl::StatusOr<LinkSender> OpenLink(uint32_t peer, uint32_t channel);
  absl::Status AdoptLink(const Key& key, ReceiveConnection& connection);

  void Run();
  // False: the proxy shall end.
  bool TakeSubmissions();
  void Append(const std::vector<std::shared_ptr<Operation>>& operations);
  absl::Status Progress();
  absl::Status DriveSend(const Key& key, SendConnection& connection, Progressed& progressed);
  absl::Status DriveReceive(const Key& key, ReceiveConnection& connection, Progressed& progressed);
  void TellKernels();
  // Turns a link's error into a suspicion, into silence (LostPeer::kHang), or into the
  // communicator's error.
  absl::Status LinkFailed(uint32_t peer, const std::string& during, const absl::Status& status,
                          bool& is_silent);
  absl::Status CheckLosses() const;
  // A peer that has left opens no link any more.
  absl::Status CheckLeavers();
  bool WaitsForLink(uint32_t peer) const;
  absl::Status CheckDeadlines() const;
  void FailAll(const absl::Status& status);
  Deadline NextDeadline() const;
  void WaitForEvents(Deadline deadline);
  // Before the end: what was sent is on its way until the receivers say that it is there, and what
  // has ended is told.
  void Linger();
  std::string Describe(uint32_t peer) const;
  std::string During(const FlowInProxy& flow) const;
  absl::Status Error(absl::StatusCode code, const std::string& text) const;

  Fabric& fabric_;
  Device& device_;
  const std::string name_;
  const std::vector<uint32_t> ranks_;  // global, by position
  const std::vector<RingOrder> rings_;
  const uint32_t rank_;  // this process's position
  uint32_t generation_ = 0;
  uint64_t ranks_hash_ = 0;
  WakeEvent wake_;
  std::unique_ptr<CommunicatorTrace> trace_;

  // The thread's alone.
  std::map<Key, SendConnection> sends_;
  std::map<Key, ReceiveConnection> receives_;
  std::list<Running> running_;
  std::optional<Suspect> suspect_;
  // Has left without the link that we wait for; one that it had opened may be on its way.
  std::optional<Suspect> leaver_;
  std::optional<Suspect> silence_;  // LostPeer::kHang: the first link that failed
  void* sleep_event_ = nullptr;
  absl::Status broken_;

  Mutex mutex_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::shared_ptr<Operation>> submitted_ ABSL_GUARDED_BY(mutex_);
  uint64_t collective_count_ ABSL_GUARDED_BY(mutex_) = 0;
  // Sends and receives so far, by (peer, 0 or 1).
  std::map<std::pair<uint32_t, bool>, uint64_t> point_to_point_counts_ ABSL_GUARDED_BY(mutex_);

  std::thread thread_;
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_PROXY_H_
