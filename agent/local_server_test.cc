// The server against real sockets, with an engine that only notes what it is asked. Restores:
// local_server_restore_test.cc.
#include "agent/local_server.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <random>
#include <set>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/local_server_testing.h"
#include "agent/process.h"
#include "agent/runtime_directory.h"
#include "base/check.h"
#include "base/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

// As many as the limit leaves.
std::vector<UniqueFd> AllDescriptors() {
  std::vector<UniqueFd> all;
  while (all.empty() || all.back()) all.emplace_back(open("/dev/null", O_RDONLY | O_CLOEXEC));
  CHECK(errno == EMFILE);
  return all;
}

size_t OpenDescriptorCount() {
  size_t count = 0;
  DIR* const directory = opendir("/proc/self/fd");
  while (readdir(directory) != nullptr) ++count;
  closedir(directory);
  return count;
}

TEST_F(LocalServerTest, OpenTellsTheEngineWhoTheKernelSaysTheCallerIs) {
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kOpen, GoodOpen(), Fds(Bell()), 77);
  Pump();
  Received received = ReceivePacket(socket.get());
  ASSERT_EQ(received.kind, Received::Kind::kPacket);
  EXPECT_EQ(received.packet.request_id, 77u);
  const abi::OpenReply reply = *BodyAs<abi::OpenReply>(received.packet, 1);
  EXPECT_EQ(reply.status.code, 0);
  EXPECT_EQ(reply.session_id, 1u);
  EXPECT_EQ(reply.attempt, 4u);
  EXPECT_EQ(reply.resumed, 0u);
  EXPECT_EQ(reply.block_bytes, 4096u);
  EXPECT_STREQ(reply.job_uuid, "00000000-0000-4000-8000-000000000000");
  EXPECT_EQ(*ReadAll(received.packet.fds[0].get(), 100), "page");
  ASSERT_EQ(engine_->opened.size(), 1u);
  const OpenParameters& seen = engine_->opened[0];
  EXPECT_EQ(seen.job, "job-1");
  EXPECT_EQ(seen.rank, Rank{1});
  EXPECT_EQ(seen.process_id, static_cast<uint32_t>(getpid()));
  EXPECT_EQ(seen.user_id, geteuid());
  EXPECT_EQ(seen.restore_from, "/somewhere/old");
  EXPECT_EQ(PidOf(seen.process_fd.get()), getpid());
}

TEST_F(LocalServerTest, AnotherVersionIsAnsweredWithBothNumbers) {
  const UniqueFd socket = Connect();
  struct {
    abi::MessageHeader header;
    char body[3];
  } message{};
  message.header = {abi::kProtocolMagic, 99, abi::MessageType::kOpen, 5, 3};
  ASSERT_GT(send(socket.get(), &message, sizeof(message), 0), 0);
  const auto reply = HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 0);
  EXPECT_EQ(reply.status.code, static_cast<int>(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(reply.status.text, HasSubstr(absl::StrFormat("protocol %d, the caller protocol 99",
                                                           abi::kProtocolVersion)));
  EXPECT_TRUE(IsClosed(socket));
}

TEST_F(LocalServerTest, WrongRequestsAreNamedAndNeverReachTheEngine) {
  const auto refused = [&](const abi::OpenRequest& request, std::vector<UniqueFd> fds) {
    const UniqueFd socket = Connect();
    Request(socket, abi::MessageType::kOpen, request, std::move(fds));
    const auto reply = HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 0);
    EXPECT_NE(reply.status.code, 0);
    return std::string(reply.status.text);
  };
  abi::OpenRequest request = GoodOpen();
  std::memset(request.job, 'x', sizeof(request.job));
  EXPECT_THAT(refused(request, Fds(Bell())), HasSubstr("job: expected a NUL within 136 bytes"));
  request = GoodOpen();
  std::strcpy(request.root, "/elsewhere");
  EXPECT_THAT(refused(request, Fds(Bell())), HasSubstr("writes to /root-of-test, asked for /else"));
  EXPECT_THAT(refused(GoodOpen(), {}), HasSubstr("1 descriptors, found 2544 and 0"));
  EXPECT_THAT(refused(GoodOpen(), Fds(UniqueFd(open("/dev/null", O_RDONLY)))),
              HasSubstr("expected an eventfd, found /dev/null"));
  EXPECT_TRUE(engine_->opened.empty());

  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kRestore, abi::RestoreRequest{7, 0});
  const auto reply = HearReply<abi::RestoreReply>(socket, abi::MessageType::kRestoreReply, 0);
  EXPECT_THAT(reply.status.text, HasSubstr("kOpen must have succeeded"));
  // The connection is still good.
  Request(socket, abi::MessageType::kOpen, GoodOpen(), Fds(Bell()));
  EXPECT_EQ(HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 1).status.code, 0);
  Request(socket, abi::MessageType::kOpen, GoodOpen(), Fds(Bell()));
  EXPECT_THAT(HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 0).status.text,
              HasSubstr("open on this connection already"));
}

TEST_F(LocalServerTest, ProcessesOfAnotherUserAreRefused) {
  MakeServer([](LocalServer::Options& options) { options.user_id = geteuid() + 1; });
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kQuery, abi::QueryRequest{abi::QueryKind::kStatus, 0});
  const auto reply = HearReply<abi::QueryReply>(socket, abi::MessageType::kQueryReply, 0);
  EXPECT_EQ(reply.status.code, static_cast<int>(absl::StatusCode::kPermissionDenied));
  EXPECT_THAT(reply.status.text, HasSubstr(absl::StrFormat("serves user %d, the caller is user %d",
                                                           geteuid() + 1, geteuid())));
  EXPECT_TRUE(IsClosed(socket));
}

TEST_F(LocalServerTest, TheNextRequestWaitsForThePendingOne) {
  engine_->immediate = false;
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kOpen, GoodOpen(), Fds(Bell()), 1);
  Request(socket, abi::MessageType::kQuery, abi::QueryRequest{abi::QueryKind::kStatus, 0}, {}, 2);
  Pump();
  EXPECT_EQ(ReceivePacket(socket.get()).kind, Received::Kind::kNothing);
  ASSERT_EQ(engine_->answers.size(), 1u);
  engine_->answers[0]();
  HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 1);
  const auto reply = HearReply<abi::QueryReply>(socket, abi::MessageType::kQueryReply, 1);
  EXPECT_EQ(*ReadAll(last_fds_[0].get(), 100), "{\"a\": 1}");
  EXPECT_EQ(reply.text_bytes, 8u);
}

TEST_F(LocalServerTest, RegisterPassesTheDocumentAndThreeDescriptors) {
  const UniqueFd socket = OpenSession();
  Request(socket, abi::MessageType::kRegister, abi::RegisterRequest{8},
          Fds(*SealedMemfd("document", "document")));
  const auto reply = HearReply<abi::RegisterReply>(socket, abi::MessageType::kRegisterReply, 3);
  EXPECT_EQ(reply.registration_id, 7u);
  EXPECT_EQ(engine_->documents, std::vector<std::string>{"document"});
  Request(socket, abi::MessageType::kRegister, abi::RegisterRequest{0},
          Fds(*SealedMemfd("document", "")));
  EXPECT_THAT(
      HearReply<abi::RegisterReply>(socket, abi::MessageType::kRegisterReply, 0).status.text,
      HasSubstr("an empty document"));
}

TEST_F(LocalServerTest, TheDoorbellRingsWhateverItsFlagsAre) {
  const UniqueFd bell = Bell();  // a blocking one
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kOpen, GoodOpen(), Fds(Duplicate(bell.get())));
  HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 1);
  engine_->rung.clear();
  Pump();
  EXPECT_TRUE(engine_->rung.empty());
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(eventfd_write(bell.get(), 3), 0);
    Pump();
    EXPECT_TRUE(engine_->rung.contains(SessionId{1}));
    engine_->rung.clear();
    Pump();
    EXPECT_TRUE(engine_->rung.empty());  // it was taken
  }
}

TEST_F(LocalServerTest, AConnectionsEndIsNotADeathAndTheSessionCanBeResumed) {
  UniqueFd socket = OpenSession();
  socket.Reset();
  ASSERT_TRUE(PumpUntil([&] { return server_->connection_count() == 0; }));
  EXPECT_TRUE(engine_->died.empty());
  EXPECT_TRUE(engine_->closed.empty());
  EXPECT_EQ(server_->session_count(), 1u);
  socket = Connect();
  abi::OpenRequest request = GoodOpen();
  request.resume_attempt = 4;
  request.resume_session_id = 1;
  const UniqueFd bell = Bell();
  Request(socket, abi::MessageType::kOpen, request, Fds(Duplicate(bell.get())));
  const auto reply = HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 0);
  EXPECT_EQ(reply.resumed, 1u);
  EXPECT_EQ(server_->session_count(), 1u);
  engine_->rung.clear();
  eventfd_write(bell.get(), 1);
  Pump();
  EXPECT_TRUE(engine_->rung.contains(SessionId{1}));
  // A close is a close.
  ASSERT_EQ(SendPacket(socket.get(), Packet{abi::MessageType::kClose, 6, {}, {}}), Sent::kYes);
  EXPECT_TRUE(IsClosed(socket));
  EXPECT_TRUE(engine_->closed.contains(SessionId{1}));
}

TEST_F(LocalServerTest, TheProcessesEndIsADeathEvenIfItsConnectionLivesOn) {
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    const UniqueFd socket = Connect();
    Request(socket, abi::MessageType::kOpen, GoodOpen(), Fds(Bell()));
    // A data loader that inherits everything, and ends with the test.
    if (fork() == 0) {
      char wait = 0;
      [[maybe_unused]] const ssize_t got = read(ends[1], &wait, 1);
      _exit(0);
    }
    pause();
    _exit(0);
  }
  close(ends[1]);
  ASSERT_TRUE(PumpUntil([&] { return server_->session_count() == 1; }));
  Pump();
  EXPECT_TRUE(engine_->died.empty());
  kill(child, SIGKILL);
  ASSERT_TRUE(PumpUntil([&] { return !engine_->died.empty(); }));
  EXPECT_EQ(server_->session_count(), 0u);
  EXPECT_EQ(server_->connection_count(), 0u);
  close(ends[0]);
  waitpid(child, nullptr, 0);
}

// The waiting connection keeps the listener readable, which must neither spin nor fill the log.
TEST_F(LocalServerTest, WithoutDescriptorsItWaitsInsteadOfSpinning) {
  const UniqueFd served = OpenSession();
  const UniqueFd waiting = Connect();
  std::vector<UniqueFd> all = AllDescriptors();
  ASSERT_TRUE(PumpUntil([&] { return server_->accept_failure_count() > 0; }));
  // A thousand turns take far less than a hundred pauses.
  Pump(1000);
  const uint64_t failures = server_->accept_failure_count();
  EXPECT_LT(failures, 100u);
  all.clear();
  EXPECT_TRUE(PumpUntil([&] { return server_->connection_count() == 2; }));
  // It may end while it waits.
  const UniqueFd late = Connect();
  all = AllDescriptors();
  ASSERT_TRUE(PumpUntil([&] { return server_->accept_failure_count() > failures; }));
  server_.reset();
  all.clear();
  Pump();
}

TEST_F(LocalServerTest, TheLimitsFitTheDescriptorsOfTheProcess) {
  for (const uint64_t files : {1024, 4096, 20'000, 33'280, 1 << 20}) {
    const size_t sessions = LocalServer::SessionsFor(files);
    // A session's 32 hold its connection, too; the others take two each.
    const size_t spare = LocalServer::ConnectionsFor(files) - sessions;
    EXPECT_EQ(spare, 128u) << files;
    EXPECT_LT(sessions * 32 + spare * 2, files) << files;
  }
  EXPECT_EQ(LocalServer::ConnectionsFor(256), 1u + 32u);
  EXPECT_EQ(LocalServer::ConnectionsFor(1024), 16u + 128u);
}

TEST_F(LocalServerTest, AClientThatDoesNotReadHoldsUpNobodyElse) {
  engine_->map_count = 2000;  // more than a socket's buffer holds
  const UniqueFd slow = OpenSession();
  Request(slow, abi::MessageType::kRestore, abi::RestoreRequest{7, 0});
  Pump();
  const UniqueFd other = Connect();
  Request(other, abi::MessageType::kQuery, abi::QueryRequest{abi::QueryKind::kStatus, 0});
  EXPECT_EQ(HearReply<abi::QueryReply>(other, abi::MessageType::kQueryReply, 1).status.code, 0);
  for (uint32_t map = 1; map <= 2000; ++map) {
    const auto body = HearReply<abi::ImageMap>(slow, abi::MessageType::kImageMap, 1);
    ASSERT_EQ(body.map_id, map);
  }
  HearReply<abi::RestoreReply>(slow, abi::MessageType::kRestoreReply, 2);
}

TEST_F(LocalServerTest, AClientThatNeverReadsIsClosedAtTheLimit) {
  engine_->map_count = 12000;
  const UniqueFd slow = OpenSession();
  Request(slow, abi::MessageType::kRestore, abi::RestoreRequest{7, 0});
  EXPECT_TRUE(PumpUntil([&] { return server_->connection_count() == 0; }));
  EXPECT_EQ(server_->session_count(), 1u);  // it may come back
}

TEST_F(LocalServerTest, ConnectionsAndSessionsAreBounded) {
  MakeServer([](LocalServer::Options& options) {
    options.connections_max = 3;
    options.sessions_max = 2;
  });
  std::vector<UniqueFd> sockets;
  sockets.push_back(OpenSession());
  sockets.push_back(OpenSession());
  sockets.push_back(Connect());
  Request(sockets[2], abi::MessageType::kOpen, GoodOpen(), Fds(Bell()));
  EXPECT_THAT(HearReply<abi::OpenReply>(sockets[2], abi::MessageType::kOpenReply, 0).status.text,
              HasSubstr("2 sessions are there already, the limit is 2"));
  const UniqueFd one_more = Connect();
  EXPECT_TRUE(IsClosed(one_more));
  sockets.pop_back();
  ASSERT_TRUE(PumpUntil([&] { return server_->connection_count() == 2; }));
  const UniqueFd again = Connect();
  Request(again, abi::MessageType::kQuery, abi::QueryRequest{abi::QueryKind::kStatus, 0});
  EXPECT_EQ(HearReply<abi::QueryReply>(again, abi::MessageType::kQueryReply, 1).status.code, 0);
}

TEST_F(LocalServerTest, WatchesTheSessionsThatTheEngineRecovered) {
  UniqueFd socket = OpenSession();
  // Another server on the same engine is what a restarted worker is.
  server_ = std::make_unique<LocalServer>(
      LocalServer::Options{.user_id = geteuid(), .root = "/root-of-test", .block_bytes = 4096},
      listener_.get(), *engine_, *loop_, [] { return std::string("{}"); });
  server_->Start();
  EXPECT_EQ(server_->session_count(), 1u);
  engine_->rung.clear();
  eventfd_write(engine_->doorbell_fd(SessionId{1}), 1);
  Pump();
  EXPECT_TRUE(engine_->rung.contains(SessionId{1}));
}

TEST_F(LocalServerTest, WhileEndingOpensAreRefusedAndQueriesAreNot) {
  server_->RefuseOpens("the agent is ending");
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kOpen, GoodOpen(), Fds(Bell()));
  const auto reply = HearReply<abi::OpenReply>(socket, abi::MessageType::kOpenReply, 0);
  EXPECT_EQ(reply.status.code, static_cast<int>(absl::StatusCode::kUnavailable));
  Request(socket, abi::MessageType::kQuery, abi::QueryRequest{abi::QueryKind::kStatus, 0});
  EXPECT_EQ(HearReply<abi::QueryReply>(socket, abi::MessageType::kQueryReply, 1).status.code, 0);
}

// Sends one random datagram: often nearly a good message, with any number of descriptors.
void SendRandom(int socket, std::minstd_rand& random) {
  std::vector<std::byte> bytes(sizeof(abi::MessageHeader));
  abi::MessageHeader header{abi::kProtocolMagic, abi::kProtocolVersion,
                            static_cast<abi::MessageType>(random() % 13),
                            static_cast<uint32_t>(random()), 0};
  const auto append = [&bytes](const auto& body) {
    const std::vector<std::byte> more = BodyBytes(body);
    bytes.insert(bytes.end(), more.begin(), more.end());
  };
  const uint64_t kind = random() % 6;
  constexpr abi::MessageType kMatching[] = {abi::MessageType::kOpen,    abi::MessageType::kRegister,
                                            abi::MessageType::kRestore, abi::MessageType::kQuery,
                                            abi::MessageType::kClose,   abi::MessageType::kClose};
  if (random() % 3 != 0) header.type = kMatching[kind];
  switch (kind) {
    case 0:
      append(GoodOpen());
      break;
    case 1:
      append(abi::RegisterRequest{random() % 3});
      break;
    case 2:
      append(abi::RestoreRequest{random() % 9, random() % 2});
      break;
    case 3:
      append(abi::QueryRequest{static_cast<abi::QueryKind>(random() % 3), 0});
      break;
    case 4:
      bytes.resize(bytes.size() + random() % 5000);
      break;
    default:
      break;
  }
  header.body_bytes = static_cast<uint32_t>(bytes.size() - sizeof(header));
  std::memcpy(bytes.data(), &header, sizeof(header));
  // Damage: nothing, some bytes anywhere, or the length.
  for (uint64_t left = random() % 3 == 0 ? random() % 8 : 0; left > 0; --left) {
    bytes[random() % bytes.size()] = static_cast<std::byte>(random());
  }
  if (random() % 8 == 0) bytes.resize(random() % (bytes.size() + 1));
  std::vector<int> fds;
  UniqueFd bell(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  for (uint64_t i = random() % 3 == 0 ? random() % 9 : random() % 2; i > 0; --i) {
    fds.push_back(random() % 4 == 0 ? STDERR_FILENO : bell.get());
  }
  iovec part{bytes.data(), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(9 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* const rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
  }
  // Dropped: the server may have closed this connection.
  [[maybe_unused]] const ssize_t sent = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

// ---- Ends of ranks

abi::RankExit GoodExit() {
  abi::RankExit exit{};
  std::strcpy(exit.job, "job");
  std::strcpy(exit.attempt_key, "run:1");
  std::strcpy(exit.node, "n1");
  exit.rank = 3;
  exit.world_size = 4;
  exit.process_id = 77;
  exit.wait_status = 9;
  exit.was_stopped = 1;
  return exit;
}

TEST_F(LocalServerTest, ALaunchersWordOfAnEndIsPassedOn) {
  std::vector<RankExit> exits;
  MakeServer([&](LocalServer::Options& options) {
    options.take_exit = [&](RankExit exit) { exits.push_back(std::move(exit)); };
  });
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kRankExit, GoodExit());
  const auto reply =
      HearReply<abi::RankExitReply>(socket, abi::MessageType::kRankExitReply, 0).status;
  EXPECT_EQ(reply.code, 0) << reply.text;
  ASSERT_EQ(exits.size(), 1u);
  EXPECT_EQ(exits[0].job, "job");
  EXPECT_EQ(exits[0].attempt_key, "run:1");
  EXPECT_EQ(exits[0].node, "n1");
  EXPECT_EQ(exits[0].rank, 3u);
  EXPECT_EQ(exits[0].world_size, 4u);
  EXPECT_EQ(exits[0].process_id, 77u);
  EXPECT_EQ(exits[0].wait_status, 9);
  EXPECT_TRUE(exits[0].stopped);
}

TEST_F(LocalServerTest, AnEndThatCannotBeIsRefusedByName) {
  size_t taken = 0;
  MakeServer([&](LocalServer::Options& options) {
    options.take_exit = [&](const RankExit&) { ++taken; };
  });
  const UniqueFd socket = Connect();
  const auto refusal = [&](const std::function<void(abi::RankExit&)>& spoil) {
    abi::RankExit exit = GoodExit();
    spoil(exit);
    Request(socket, abi::MessageType::kRankExit, exit);
    const auto reply =
        HearReply<abi::RankExitReply>(socket, abi::MessageType::kRankExitReply, 0).status;
    EXPECT_EQ(reply.code, static_cast<int32_t>(absl::StatusCode::kInvalidArgument));
    return std::string(reply.text);
  };
  EXPECT_THAT(refusal([](auto& exit) { exit.rank = RankExit::kRanksMax; }), HasSubstr("262144"));
  EXPECT_THAT(refusal([](auto& exit) { exit.world_size = RankExit::kRanksMax + 1; }),
              HasSubstr("world size"));
  EXPECT_THAT(refusal([](auto& exit) { exit.wait_status = 0x137f; }), HasSubstr("0x137f"));
  EXPECT_THAT(refusal([](auto& exit) { exit.was_stopped = 2; }), HasSubstr("found 2"));
  EXPECT_THAT(refusal([](auto& exit) { std::memset(exit.job, 'x', sizeof(exit.job)); }),
              HasSubstr("job"));
  EXPECT_THAT(refusal([](auto& exit) { std::memset(exit.node, 'x', sizeof(exit.node)); }),
              HasSubstr("node"));
  EXPECT_EQ(taken, 0u);
  MakeServer({});
  const UniqueFd other = Connect();
  Request(other, abi::MessageType::kRankExit, GoodExit());
  EXPECT_EQ(HearReply<abi::RankExitReply>(other, abi::MessageType::kRankExitReply, 0).status.code,
            static_cast<int32_t>(absl::StatusCode::kUnimplemented));
}

TEST_F(LocalServerTest, SurvivesRandomMessagesAndLeaksNothing) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::minstd_rand random(seed);
  const UniqueFd good = OpenSession();
  last_fds_.clear();
  engine_->opened.clear();
  const size_t open_before = OpenDescriptorCount();
  uint64_t replies = 0;
  {
    std::vector<UniqueFd> sockets(8);
    for (int i = 0; i < 4000; ++i) {
      UniqueFd& socket = sockets[random() % sockets.size()];
      if (!socket || random() % 50 == 0) socket = Connect();
      SendRandom(socket.get(), random);
      if (random() % 4 == 0) Pump(2);
      const Received received = ReceivePacket(socket.get());
      if (received.kind == Received::Kind::kPacket) ++replies;
      if (received.kind == Received::Kind::kEnd) socket.Reset();
    }
  }
  Pump();
  // Not vacuous: much was refused, and much was good.
  EXPECT_GT(server_->garbage_count(), 100u);
  EXPECT_GT(replies, 100u);
  EXPECT_GT(engine_->opened.size(), 10u);
  // The good client has noticed nothing.
  Request(good, abi::MessageType::kQuery, abi::QueryRequest{abi::QueryKind::kStatus, 0});
  EXPECT_EQ(HearReply<abi::QueryReply>(good, abi::MessageType::kQueryReply, 1).status.code, 0);
  EXPECT_EQ(server_->connection_count(), 1u);
  // Sessions live as long as this process; each holds the server's two descriptors and the
  // engine's, which are of the test.
  last_fds_.clear();
  engine_->opened.clear();
  engine_->restore_ended = nullptr;
  const size_t sessions = server_->session_count() - 1;
  EXPECT_EQ(OpenDescriptorCount(), open_before + sessions * 4);
}

}  // namespace
}  // namespace holdfast
