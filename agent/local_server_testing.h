// For tests of LocalServer: the server over a real socket, with an engine that only notes what it
// is asked. Client and server share one thread: Pump() runs the loop until nothing is left to do
// for it.
#ifndef HOLDFAST_AGENT_LOCAL_SERVER_TESTING_H_
#define HOLDFAST_AGENT_LOCAL_SERVER_TESTING_H_

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/local_server.h"
#include "agent/process.h"
#include "agent/runtime_directory.h"
#include "base/check.h"
#include "base/clock.h"
#include "gtest/gtest.h"
#include "io/epoll_loop.h"

namespace holdfast {

// Model: sessions 1, 2, ... each with a rank page of one memfd; calls are answered when the test
// says so (or at once, `immediate`), from the loop. Not modelled: everything behind.
class NotingEngine final : public Engine {
 public:
  explicit NotingEngine(EventLoop& loop) : loop_(loop), page_(*SealedMemfd("page", "page")) {}

  void Recover(std::vector<KeptDescriptor>, std::function<void()> done) override {
    loop_.Post(std::move(done));
  }

  void Open(OpenParameters parameters,
            std::function<void(absl::StatusOr<OpenResult>)> done) override {
    opened.push_back(std::move(parameters));
    OpenParameters& last = opened.back();
    OpenResult result;
    result.resumed = last.resume_session != SessionId{};
    result.session = result.resumed ? last.resume_session : SessionId{next_session_++};
    result.attempt = Attempt{4};
    result.job_uuid = "00000000-0000-4000-8000-000000000000";
    result.rank_page_fd = page_.get();
    result.rank_page_bytes = 4;
    Session& session = sessions_[result.session];
    session.process = Duplicate(last.process_fd.get());
    session.doorbell = Duplicate(last.doorbell_fd.get());
    Answer([done = std::move(done), result] { done(result); });
  }

  void Register(SessionId, UniqueFd document, uint64_t document_bytes,
                std::function<void(absl::StatusOr<RegisterResult>)> done) override {
    const absl::StatusOr<std::string> text = ReadAll(document.get(), 1 << 20);
    documents.push_back(text.ok() ? *text : text.status().ToString());
    if (document_bytes == 0) {
      Answer([done = std::move(done)] { done(absl::InvalidArgumentError("an empty document")); });
      return;
    }
    RegisterResult result;
    result.registration_id = 7;
    result.memory_fd = page_.get();
    result.registration_memory_fd = page_.get();
    result.capture_plan_fd = page_.get();
    Answer([done = std::move(done), result] { done(result); });
  }

  void Restore(SessionId, uint64_t, RestoreSelection selection,
               std::function<void(absl::StatusOr<RestoreBegun>)> begun,
               std::function<void(absl::StatusOr<RestoreEnded>)> ended) override {
    restore_ended = std::move(ended);
    selections.push_back(std::move(selection));
    Answer([this, begun = std::move(begun)] {
      RestoreBegun result;
      result.checkpoint = {Attempt{3}, Step{100}};
      result.tensor_states = 5;
      result.tensor_states_left_out = 6;
      result.restore_from = RestoreFrom::kIgnored;
      result.operations_fd = *SealedMemfd("operations", "ops");
      result.blobs_fd = *SealedMemfd("blobs", "");
      for (size_t i = 0; i < map_count; ++i) {
        result.maps.push_back({*SealedMemfd("map", absl::StrCat("map ", i + 1)), i});
      }
      begun(std::move(result));
    });
  }

  void SetRestoreOrder(const std::string&, std::optional<RestoreOrder> order) override {
    restore_orders.push_back(std::move(order));
  }
  void ReadCheckpoints(
      const std::string&,
      std::function<void(absl::StatusOr<std::vector<KnownCheckpoint>>)> done) override {
    Answer([this, done = std::move(done)] { done(checkpoints); });
  }
  void CancelRestore(SessionId session) override { cancelled.insert(session); }
  void Doorbell(SessionId session) override { rung.insert(session); }
  void Close(SessionId session) override { closed.insert(session); }
  void ProcessDied(SessionId session) override {
    died.insert(session);
    sessions_.erase(session);
  }
  int process_fd(SessionId session) const override {
    return sessions_.contains(session) ? sessions_.at(session).process.get() : -1;
  }
  int doorbell_fd(SessionId session) const override {
    return sessions_.contains(session) ? sessions_.at(session).doorbell.get() : -1;
  }
  std::vector<SessionId> sessions() const override {
    std::vector<SessionId> ids;
    for (const auto& [id, session] : sessions_) ids.push_back(id);
    return ids;
  }
  std::vector<MeshAxis> MeshOf(const std::string&) const override { return {}; }
  size_t open_session_count() const override { return sessions_.size(); }
  std::vector<OpenSession> open_sessions() const override { return {}; }
  size_t pending_image_count() const override { return 0; }
  std::vector<UncommittedSave> uncommitted_saves() const override { return {}; }
  Activity ActivityOf(const std::string&, const std::string&) const override { return {}; }
  std::vector<RankProgress> ProgressOf(const std::string&, const std::string&) const override {
    return progress;
  }
  absl::StatusOr<Step> MakeDue(const std::string&, const std::string&) override {
    return absl::UnimplementedError("no saves here");
  }
  std::string StatusJson() const override { return "{}"; }

  bool immediate = true;
  size_t map_count = 2;
  std::vector<KnownCheckpoint> checkpoints;
  std::vector<RankProgress> progress;
  std::vector<std::optional<RestoreOrder>> restore_orders;  // as they were given
  std::vector<std::function<void()>> answers;               // not immediate: the test runs them
  std::vector<OpenParameters> opened;
  std::vector<std::string> documents;
  std::vector<RestoreSelection> selections;
  std::function<void(absl::StatusOr<RestoreEnded>)> restore_ended;
  std::set<SessionId> cancelled;
  std::set<SessionId> rung;
  std::set<SessionId> closed;
  std::set<SessionId> died;

 private:
  struct Session {
    UniqueFd process;
    UniqueFd doorbell;
  };
  void Answer(std::function<void()> answer) {
    if (immediate) {
      loop_.Post(std::move(answer));
    } else {
      answers.push_back(std::move(answer));
    }
  }

  EventLoop& loop_;
  UniqueFd page_;
  uint64_t next_session_ = 1;
  std::map<SessionId, Session> sessions_;
};

inline abi::OpenRequest GoodOpen() {
  abi::OpenRequest request{};
  std::strcpy(request.job, "job-1");
  std::strcpy(request.attempt_key, "key");
  std::strcpy(request.node, "node");
  std::strcpy(request.restore_from, "/somewhere/old");
  request.rank = 1;
  request.world_size = 2;
  return request;
}

class LocalServerTest : public ::testing::Test {
 protected:
  LocalServerTest() { MakeServer({}); }
  ~LocalServerTest() override {
    server_.reset();
    unlink(path_.c_str());
    unlink((path_ + ".lock").c_str());
  }

  void MakeServer(std::function<void(LocalServer::Options&)> change) {
    server_.reset();
    path_ = absl::StrCat("/tmp/holdfast-server-test-", getpid(), ".sock");
    listener_ = *Listen(path_);
    LocalServer::Options options;
    options.user_id = geteuid();
    options.root = "/root-of-test";
    options.block_bytes = 4096;
    if (change) change(options);
    engine_ = std::make_unique<NotingEngine>(*loop_);
    server_ = std::make_unique<LocalServer>(options, listener_.get(), *engine_, *loop_,
                                            [] { return std::string("{\"a\": 1}"); });
    server_->Start();
  }

  // Runs the loop until it had nothing to do for a while of its own.
  void Pump(int rounds = 6) {
    for (int i = 0; i < rounds; ++i) {
      loop_->Post([this] { loop_->Stop(); });  // behind what is posted already
      loop_->Run();
    }
  }

  // Runs the loop until `holds`; false after a minute.
  bool PumpUntil(const std::function<bool()>& holds) {
    const absl::Duration end = RealClock().Elapsed() + absl::Seconds(60);
    while (!holds()) {
      if (RealClock().Elapsed() > end) return false;
      Pump(1);
    }
    return true;
  }

  UniqueFd Connect() {
    UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, path_.c_str());
    CHECK(connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0);
    return socket;
  }

  template <typename Body>
  void Request(const UniqueFd& socket, abi::MessageType type, const Body& body,
               std::vector<UniqueFd> fds = {}, uint32_t request_id = 5) {
    ASSERT_EQ(SendPacket(socket.get(), Packet{type, request_id, BodyBytes(body), std::move(fds)}),
              Sent::kYes);
  }

  static std::vector<UniqueFd> Fds(UniqueFd fd) {
    std::vector<UniqueFd> fds;
    fds.push_back(std::move(fd));
    return fds;
  }
  static UniqueFd Bell() { return UniqueFd(eventfd(0, EFD_CLOEXEC)); }

  Received Hear(const UniqueFd& socket) {
    Pump();
    return ReceivePacket(socket.get());
  }

  template <typename Reply>
  Reply HearReply(const UniqueFd& socket, abi::MessageType type, size_t fd_count) {
    Received received = Hear(socket);
    EXPECT_EQ(received.kind, Received::Kind::kPacket) << received.problem;
    EXPECT_EQ(received.packet.type, type);
    absl::StatusOr<Reply> reply = BodyAs<Reply>(received.packet, fd_count);
    EXPECT_TRUE(reply.ok()) << reply.status();
    last_fds_ = std::move(received.packet.fds);
    return reply.ok() ? *reply : Reply{};
  }

  // Opens a session on a new connection.
  UniqueFd OpenSession() {
    UniqueFd socket = Connect();
    Request(socket, abi::MessageType::kOpen, GoodOpen(), Fds(Bell()));
    const auto reply = HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 1);
    EXPECT_EQ(reply.status.code, 0) << reply.status.text;
    return socket;
  }

  bool IsClosed(const UniqueFd& socket) {
    return PumpUntil([&] {
      pollfd entry{socket.get(), POLLRDHUP, 0};
      return poll(&entry, 1, 0) > 0;
    });
  }

  std::unique_ptr<EpollLoop> loop_ = *EpollLoop::Create(RealClock());
  std::string path_;
  UniqueFd listener_;
  std::unique_ptr<NotingEngine> engine_;
  std::unique_ptr<LocalServer> server_;
  std::vector<UniqueFd> last_fds_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_LOCAL_SERVER_TESTING_H_
