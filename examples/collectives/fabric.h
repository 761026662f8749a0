// Who is in the job, where they listen, and who is lost. Below the communicators, above the
// sockets.
//
// Rendezvous, in steps:
//  1. every rank opens a listening socket of its own for links (an ephemeral port);
//  2. rank 0 listens on the first free port of MASTER_PORT .. MASTER_PORT + 7 (under torchrun a
//     TCPStore may hold the first);
//  3. the others try these ports until one answers `kWelcome` to their `kHello`, which carries the
//     job's token, their rank and where they listen;
//  4. once all have come rank 0 sends everybody one `kPeer` for each rank.
// The connections of step 3 stay open: an end of one without `kLeaving` is the loss of that rank,
// which rank 0 tells everybody (`kLost`) in one order. If rank 0 is lost, everybody sees it.
//
// The token keeps jobs apart that meet by accident. It is no protection against anybody.
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_FABRIC_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_FABRIC_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/collectives/collectives.h"
#include "examples/collectives/mutex.h"
#include "examples/collectives/wire.h"

namespace collectives {

uint64_t HashOf(const std::string& text);

struct ControlMessage {
  enum class Kind : uint32_t {
    kHello = 1,    // rank, world_size, endpoint: of the sender
    kWelcome = 2,  // rank 0 knows this rank now
    kRefused = 3,  // rank: why, a RefusalReason
    kPeer = 4,     // rank and endpoint of a member
    kLost = 5,     // rank
    kLeaving = 6,  // rank ends in good order
  };
  uint32_t magic = kWireMagic;
  Kind kind = Kind::kHello;
  uint64_t token = 0;
  uint32_t rank = 0;
  uint32_t world_size = 0;
  uint32_t address = 0;
  uint32_t port = 0;
};
static_assert(sizeof(ControlMessage) == 32);

enum class RefusalReason : uint32_t { kToken = 1, kWorldSize = 2, kRankTwice = 3 };

// Threads: any may call the public functions; a thread of its own accepts links and watches.
// Lifetime: a WakeEvent given to Attach() must live until Detach().
class Fabric {
 public:
  static absl::StatusOr<std::unique_ptr<Fabric>> Create(Options options);
  ~Fabric();

  const Options& options() const { return options_; }
  uint64_t token_hash() const { return HashOf(options_.token); }
  const Endpoint& endpoint(uint32_t rank) const { return peers_[rank]; }

  // Registers a communicator: `wake` is signalled when a link for it arrives, or a rank is lost or
  // leaves. Returns the generation of the name. Errors: kAlreadyExists.
  absl::StatusOr<uint32_t> Attach(const std::string& name, const WakeEvent* wake);
  // Drops links that nobody took.
  void Detach(const std::string& name);

  struct LinkKey {
    std::string name;
    uint32_t generation;
    uint32_t channel;
    uint32_t from_rank;
    auto operator<=>(const LinkKey&) const = default;
  };
  struct Link {
    Socket socket;
    uint64_t ranks_hash = 0;
  };
  // A link that has arrived, once.
  std::optional<Link> TakeLink(const LinkKey& key);

  // Ranks lost so far, in the order in which rank 0 saw it.
  std::vector<uint32_t> Lost() const;
  bool HasLeft(uint32_t rank) const;
  // Whether anybody is lost or has left. Cheap.
  bool AnyGone() const { return any_gone_.load(std::memory_order_acquire); }

 private:
  // A control connection with the message that is being received on it.
  struct Control {
    uint32_t rank = 0;
    Socket socket;
    ControlMessage message;
    size_t done_bytes = 0;
  };
  struct PendingLink {
    Socket socket;
    Deadline deadline;
    LinkHello hello;
    size_t done_bytes = 0;
  };

  explicit Fabric(Options options);
  absl::Status Rendezvous();
  absl::Status GatherPeers(Socket listener, Deadline deadline);
  absl::Status Welcome(Socket socket, Deadline deadline);
  absl::Status JoinMaster(Deadline deadline);
  absl::StatusOr<Socket> KnockAt(const Endpoint& master, Deadline deadline);
  absl::Status ReceivePeers(const Socket& socket, Deadline deadline);
  ControlMessage Message(ControlMessage::Kind kind) const;

  void Run();
  void AcceptLinks();
  // False: the connection has ended, or was useless.
  bool ReadPending(PendingLink& pending);
  bool ReadControl(Control& control);
  void HandleControl(const Control& control);
  void RecordLoss(uint32_t rank);
  void RecordLeft(uint32_t rank);
  void TellOthers(ControlMessage::Kind kind, uint32_t rank);
  void WakeAll();

  Options options_;
  Socket listener_;
  std::vector<Endpoint> peers_;
  WakeEvent wake_;
  std::atomic<bool> any_gone_{false};

  // Used by Create(), then by the thread alone.
  std::vector<Control> controls_;
  std::vector<PendingLink> pending_;

  mutable Mutex mutex_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<std::string, const WakeEvent*> attached_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, uint32_t> generations_ ABSL_GUARDED_BY(mutex_);
  std::map<LinkKey, Link> arrived_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint32_t> lost_ ABSL_GUARDED_BY(mutex_);
  std::set<uint32_t> left_ ABSL_GUARDED_BY(mutex_);

  std::thread thread_;
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_FABRIC_H_
