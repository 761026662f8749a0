// One communicator's engine: a thread that performs its operations over its links.
//
// The thread is the only one that touches links and queues; callers hand operations in under a
// mutex and wait on the Operation. All waiting is in one poll(2): nothing spins.
//
// How an operation fails. A broken link only makes its peer a suspect: processes die of each other,
// so the first loss in the order of rank 0 is named instead, if it is told within kLossGrace. After
// a failure the communicator stays broken, and every later operation gets the same error.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_PROXY_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_PROXY_H_

#include <poll.h>

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/collectives/collectives.h"
#include "examples/collectives/fabric.h"
#include "examples/collectives/mutex.h"
#include "examples/collectives/ring.h"
#include "examples/collectives/wire.h"

namespace collectives {

// What a Handle and the proxy share.
//
// Threads: any.
class Operation {
 public:
  // At most once.
  void Finish(absl::Status status);
  bool Done() const;
  absl::Status Wait() const;
  // Storage for a barrier's bytes, as long as the operation.
  std::span<std::byte, 2> token() { return token_; }

 private:
  std::array<std::byte, 2> token_ = {};
  mutable Mutex mutex_;
  mutable CondVar finished_;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

// Threads: any may submit.
// Lifetime: must not outlive the Fabric.
class Proxy {
 public:
  static absl::StatusOr<std::unique_ptr<Proxy>> Create(Fabric& fabric, const std::string& name,
                                                       const std::vector<uint32_t>& ranks);
  ~Proxy();

  const std::string& name() const { return name_; }
  RingPlace place() const { return place_; }
  size_t chunk_bytes() const { return fabric_.options().chunk_bytes; }

  Handle SubmitCollective(std::shared_ptr<Operation> operation, OperationKind kind,
                          RingProgram program);
  // `peer`: a position in the communicator, not this rank's.
  Handle SubmitSend(uint32_t peer, std::span<const std::byte> data);
  Handle SubmitReceive(uint32_t peer, std::span<std::byte> data);

 private:
  struct Collective {
    std::shared_ptr<Operation> operation;
    OperationKind kind = OperationKind::kBarrier;
    RingProgram program;
    Deadline deadline;
    size_t step = 0;
    bool send_started = false;
    bool receive_started = false;
  };
  struct Transfer {
    std::shared_ptr<Operation> operation;
    uint32_t peer = 0;
    bool is_send = false;
    std::span<const std::byte> send;
    std::span<std::byte> receive;
    Deadline deadline;
    bool started = false;
  };
  struct Peer {
    std::optional<LinkSender> sender;
    std::optional<LinkReceiver> receiver;
    std::deque<Transfer> sends;
    std::deque<Transfer> receives;
    uint64_t sent_count = 0;
    uint64_t received_count = 0;
    bool silent = false;  // LostPeer::kHang: a link of these two has failed
  };
  struct Suspect {
    uint32_t peer = 0;
    std::string text;
    Deadline deadline;
  };

  Proxy(Fabric& fabric, std::string name, std::vector<uint32_t> ranks, RingPlace place);

  Deadline OperationDeadline() const;
  absl::StatusOr<LinkSender> OpenLink(uint32_t peer, LinkKind kind);
  absl::Status AdoptLink(uint32_t peer, LinkKind kind, std::optional<LinkReceiver>& receiver);

  void Run();
  // False: the proxy shall end.
  bool TakeSubmissions();
  absl::Status Progress();
  absl::Status DriveCollectives();
  // True once the step is done. False also if a link has failed, see suspect_.
  absl::StatusOr<bool> DriveStep(Collective& collective);
  absl::Status DriveSends(uint32_t peer);
  absl::Status DriveReceives(uint32_t peer);
  // Turns a link's error into a suspicion, into silence (LostPeer::kHang), or into the
  // communicator's error.
  absl::Status LinkFailed(uint32_t peer, const std::string& during, const absl::Status& status,
                          bool& silent);
  absl::Status CheckLosses() const;
  // A peer that has left opens no link any more.
  absl::Status CheckLeavers();
  bool WaitsForLink(uint32_t peer) const;
  absl::Status CheckDeadlines() const;
  void FailAll(const absl::Status& status);
  void WaitForEvents();
  std::string Describe(uint32_t peer) const;
  absl::Status Error(absl::StatusCode code, const std::string& text) const;
  uint32_t next() const { return static_cast<uint32_t>((place_.rank + 1) % place_.size); }
  uint32_t previous() const {
    return static_cast<uint32_t>((place_.rank + place_.size - 1) % place_.size);
  }

  Fabric& fabric_;
  const std::string name_;
  const std::vector<uint32_t> ranks_;
  const RingPlace place_;
  uint32_t generation_ = 0;
  uint64_t ranks_hash_ = 0;
  WakeEvent wake_;

  // The thread's alone.
  std::optional<LinkSender> ring_sender_;
  std::optional<LinkReceiver> ring_receiver_;
  bool ring_silent_ = false;
  std::deque<Collective> collectives_;
  uint64_t collective_count_ = 0;  // finished: the sequence number of the front
  std::vector<Peer> peers_;
  std::optional<Suspect> suspect_;
  // Has left without the link that we wait for; one that it had opened may be on its way.
  std::optional<Suspect> leaver_;
  absl::Status broken_;

  Mutex mutex_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<Collective> submitted_collectives_ ABSL_GUARDED_BY(mutex_);
  std::vector<Transfer> submitted_transfers_ ABSL_GUARDED_BY(mutex_);

  std::thread thread_;
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_PROXY_H_
