// The session with the agent: one connection, kept alive by a thread of its own.
//
// The thread owns the connection after Open. When it is lost because the agent's worker died, the
// thread connects again with backoff and resumes the session; if the agent is a new one, it takes
// the new rank page and registers the kept document again. Calls sleep meanwhile, at most their
// deadline and at most a grace period, so that a worker's restart goes unnoticed and an agent that
// is gone is HF_UNAVAILABLE.
//
// What it does not do: find or start an agent (private_agent.h), copy anything (capture.h,
// restore.h).
#ifndef HOLDFAST_HOOK_LINK_H_
#define HOLDFAST_HOOK_LINK_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hook/abi/messages.h"
#include "hook/abi/shared_memory.h"
#include "hook/annotations.h"
#include "hook/error.h"
#include "hook/os.h"
#include "hook/registration.h"
#include "hook/selection.h"
#include "hook/socket.h"

namespace holdfast::hook {

// How long a call waits for an agent that does not listen, and for one that listens but has not
// resumed the session yet (its worker is being restarted), counted from the loss.
inline constexpr int64_t kAbsentGraceNs = 2 * kNsPerSecond;
inline constexpr int64_t kResumingGraceNs = 10 * kNsPerSecond;
// Between attempts to connect: doubles from the first to the last.
inline constexpr int64_t kBackoffFirstNs = 10 * kNsPerMs;
inline constexpr int64_t kBackoffLastNs = kNsPerSecond;
// Memories that one restore may deliver besides the rank's own.
inline constexpr size_t kImageMapsMax = 4096;

class Link;

struct LinkOptions {
  std::string socket_path;
  abi::OpenRequest open;  // resume fields zero
  // Gives a fresh connection for the first open: connects, perhaps after starting an agent.
  std::function<Result<UniqueFd>(Deadline)> connect_first;
  int doorbell_fd = -1;  // an eventfd that outlives the link
  // Called on the link's thread whenever a session was established after the first, resumed or
  // not. May be empty.
  std::function<void(Link&)> on_session;
};

// What kRestoreReply brought.
struct RestoreStart {
  abi::RestoreReply reply;
  UniqueFd operations;
  UniqueFd blobs;
  std::vector<std::pair<abi::ImageMap, UniqueFd>> image_maps;
  uint64_t epoch;  // of the connection that it came on
};

// Threads: any, unless said otherwise.
class Link {
 public:
  // Connects, opens the session, starts the thread. Tries again until the deadline if the agent
  // goes away in between, or says that it is unavailable. Errors: those of connect_first and of the
  // agent, HF_DEADLINE_EXCEEDED.
  static Result<std::unique_ptr<Link>> Open(LinkOptions options, Deadline deadline);
  // Says kClose, if connected, and joins the thread.
  ~Link();

  // The rank page of the newest session. Pages stay mapped until the link is destroyed.
  abi::RankPage& page() const { return *page_.load(std::memory_order_acquire); }
  void RingDoorbell() const { RingEventFd(options_.doorbell_fd); }

  struct Session {
    uint64_t id;
    uint32_t attempt;
    uint64_t block_bytes;
  };
  Session session() const HOOK_EXCLUDES(mutex_);

  // Everything that hf_save needs, and a number that changes when any of it does: so hf_save looks
  // at the number only, and never meets the link's thread at a lock.
  struct Snapshot {
    uint64_t version = 0;
    bool ready = false;  // connected
    Session session = {};
    std::shared_ptr<Registration> registration;  // nullptr: none, for this reason
    Error registration_error;
  };
  uint64_t version() const { return version_.load(std::memory_order_acquire); }
  Snapshot snapshot() const HOOK_EXCLUDES(mutex_);
  bool connected() const HOOK_EXCLUDES(mutex_);
  uint32_t reconnect_count() const HOOK_EXCLUDES(mutex_);
  // Counts the connections that were lost.
  uint64_t epoch() const HOOK_EXCLUDES(mutex_);

  // OK if the agent is there, or was there within the grace period and its socket still listens.
  // Else HF_UNAVAILABLE, or HF_FAILED_PRECONDITION if the agent has refused to resume (fenced).
  Error Reachable() const HOOK_EXCLUDES(mutex_);
  // OK while a wait for the agent is worth going on: like Reachable, but with the grace period also
  // for a socket on which nobody listens.
  Error WorthWaiting() const HOOK_EXCLUDES(mutex_);

  // Waits until the session is established. Errors: those of WorthWaiting, HF_DEADLINE_EXCEEDED.
  Error WaitConnected(Deadline deadline) HOOK_EXCLUDES(mutex_);

  // Replaces the registration. After an error nothing is registered.
  Error Register(std::shared_ptr<const Document> document, Deadline deadline) HOOK_EXCLUDES(mutex_);
  // The registration; if there is none, HF_FAILED_PRECONDITION or why the agent refused it.
  Result<std::shared_ptr<Registration>> registration() const HOOK_EXCLUDES(mutex_);

  // Sends kRestore for this registration and waits for the reply, whose status is OK. `selection`:
  // nullptr for everything. HF_ABORTED: the session or registration is another one now; take the
  // new registration and try again.
  Result<RestoreStart> StartRestore(const Registration& registration,
                                    std::shared_ptr<const Selection> selection, Deadline deadline)
      HOOK_EXCLUDES(mutex_);
  // Whoever waited for a restore does not any more, for whatever reason: the agent is told, behind
  // the kRestore if that was sent, and before the next one. Never waits; without a connection there
  // is nothing to tell.
  void CancelRestore() HOOK_EXCLUDES(mutex_);
  // kRestoreDone, if it came on the connection `epoch` after the last kRestoreReply.
  std::optional<abi::RestoreDone> restore_done(uint64_t epoch) const HOOK_EXCLUDES(mutex_);

 private:
  enum class Phase {
    kReady,
    kResuming,  // connected, but the session is not established again
    kAbsent,    // nobody listens
    kRefused,   // the agent is there and does not take us back: final
    kClosed
  };
  // A request of the one thread that uses the job.
  struct PendingCall {
    abi::MessageType type;
    std::array<std::byte, 16> body;
    size_t body_bytes = 0;
    int fd = -1;  // travels with the request; -1: none. `owner` keeps it open
    std::shared_ptr<const void> owner;
    uint32_t request_id = 0;
    bool sent = false;
    bool lost = false;
    std::optional<Message> reply;
    std::vector<std::pair<abi::ImageMap, UniqueFd>> image_maps;
    uint64_t epoch = 0;
  };

  explicit Link(LinkOptions options);
  static void Main(void* self);
  void Run();
  void Serve();
  void Reconnect();
  void SleepUntilWoken(Deadline deadline);
  Error SendPending() HOOK_EXCLUDES(mutex_);
  Error SendRestoreCancel() HOOK_EXCLUDES(mutex_);
  Error Dispatch(Message message) HOOK_EXCLUDES(mutex_);
  Error DeliverReply(abi::MessageType request, Message message) HOOK_EXCLUDES(mutex_);
  Error EstablishSession(Deadline deadline) HOOK_EXCLUDES(mutex_);
  Error OpenSession(Deadline deadline, bool* answered) HOOK_EXCLUDES(mutex_);
  Error AdoptSession(const abi::OpenReply& reply, Mapping page) HOOK_EXCLUDES(mutex_);
  Error RegisterAgain(Deadline deadline) HOOK_EXCLUDES(mutex_);
  Error ReceiveReply(abi::MessageType type, uint32_t request_id, Message* message,
                     Deadline deadline) HOOK_EXCLUDES(mutex_);
  void SetPhase(Phase phase) HOOK_EXCLUDES(mutex_);
  void Refuse(const Error& error) HOOK_EXCLUDES(mutex_);
  void SetLastFailure(const Error& error) HOOK_EXCLUDES(mutex_);
  void LoseConnection() HOOK_EXCLUDES(mutex_);
  bool closing() const HOOK_EXCLUDES(mutex_);
  bool refused() const HOOK_EXCLUDES(mutex_);

  template <typename Request>
  static std::shared_ptr<PendingCall> MakeCall(abi::MessageType type, const Request& request);
  void ChangedLocked() HOOK_REQUIRES(mutex_);
  Error WorthWaitingLocked(int64_t absent_grace_ns) const HOOK_REQUIRES(mutex_);
  Error Call(std::shared_ptr<PendingCall> call, Deadline deadline) HOOK_EXCLUDES(mutex_);
  Error WaitReadyLocked(Deadline deadline) HOOK_REQUIRES(mutex_);

  const LinkOptions options_;
  UniqueFd wake_;
  Thread thread_;
  std::unique_ptr<Channel> channel_;      // the thread's, after Open
  uint32_t last_request_id_ = 0;          // the thread's, after Open
  int64_t backoff_ns_ = kBackoffFirstNs;  // the thread's
  std::atomic<abi::RankPage*> page_{nullptr};
  std::atomic<uint64_t> version_{1};

  mutable Mutex mutex_;
  CondVar changed_;
  Phase phase_ HOOK_GUARDED_BY(mutex_) = Phase::kReady;
  Error refusal_ HOOK_GUARDED_BY(mutex_);
  Error last_failure_ HOOK_GUARDED_BY(mutex_);  // to connect or resume; for texts
  bool closing_ HOOK_GUARDED_BY(mutex_) = false;
  int64_t lost_ns_ HOOK_GUARDED_BY(mutex_) = 0;
  uint64_t epoch_ HOOK_GUARDED_BY(mutex_) = 0;
  uint32_t reconnect_count_ HOOK_GUARDED_BY(mutex_) = 0;
  Session session_ HOOK_GUARDED_BY(mutex_) = {};
  std::vector<Mapping> pages_ HOOK_GUARDED_BY(mutex_);
  std::shared_ptr<const Document> document_ HOOK_GUARDED_BY(mutex_);
  std::shared_ptr<Registration> registration_ HOOK_GUARDED_BY(mutex_);
  Error registration_error_ HOOK_GUARDED_BY(mutex_);
  std::shared_ptr<PendingCall> pending_ HOOK_GUARDED_BY(mutex_);
  std::vector<std::pair<abi::ImageMap, UniqueFd>> image_maps_ HOOK_GUARDED_BY(mutex_);
  std::optional<abi::RestoreDone> restore_done_ HOOK_GUARDED_BY(mutex_);
  bool cancels_restore_ HOOK_GUARDED_BY(mutex_) = false;  // to be sent
};

// A reply's status as an Error. An unknown code is HF_INTERNAL.
Error ToError(const abi::ReplyStatus& status);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_LINK_H_
