// Connecting and single messages.
#include "hook/socket.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace holdfast::hook {
namespace {

class SocketTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    trainer_ = std::make_unique<Channel>(UniqueFd(ends[0]));
    agent_ = std::make_unique<Channel>(UniqueFd(ends[1]));
  }
  Error Receive() { return trainer_->Receive(&message_, -1, Deadline::After(0)); }

  std::unique_ptr<Channel> trainer_;
  std::unique_ptr<Channel> agent_;
  Message message_;
};

TEST_F(SocketTest, MessagesKeepTypeIdBodyAndDescriptors) {
  for (size_t bytes : {size_t{0}, size_t{1}, abi::kMessageBytesMax}) {
    std::vector<std::byte> body(bytes);
    for (size_t i = 0; i < bytes; ++i) body[i] = static_cast<std::byte>(i * 7);
    for (size_t count = 0; count <= abi::kMessageFdsMax; ++count) {
      std::vector<UniqueFd> events;
      std::vector<int> fds;
      for (size_t i = 0; i < count; ++i) {
        events.push_back(std::move(MakeEventFd().value()));
        fds.push_back(events.back().get());
      }
      ASSERT_TRUE(
          agent_->Send(abi::MessageType::kRegisterReply, 77, body, fds, Deadline::After(0)).ok());
      ASSERT_TRUE(Receive().ok());
      EXPECT_EQ(message_.header.type, abi::MessageType::kRegisterReply);
      EXPECT_EQ(message_.header.request_id, 77u);
      EXPECT_EQ(message_.header.body_bytes, bytes);
      EXPECT_TRUE(std::equal(body.begin(), body.end(), message_.body.begin()));
      ASSERT_EQ(message_.fd_count, count);
      for (size_t i = 0; i < count; ++i) {
        // The same event, under a descriptor of its own that an exec closes.
        EXPECT_NE(message_.fds[i].get(), fds[i]);
        EXPECT_EQ(fcntl(message_.fds[i].get(), F_GETFD), FD_CLOEXEC);
        RingEventFd(message_.fds[i].get());
        uint64_t rung = 0;
        EXPECT_EQ(read(fds[i], &rung, sizeof(rung)), static_cast<ssize_t>(sizeof(rung)));
      }
    }
  }
}

TEST_F(SocketTest, WhatIsNoMessageIsRefused) {
  const abi::MessageHeader good = {abi::kProtocolMagic, abi::kProtocolVersion,
                                   abi::MessageType::kOpenReply, 1, 0};
  const auto refused = [&](const void* bytes, size_t size) {
    EXPECT_EQ(send(agent_->fd(), bytes, size, 0), static_cast<ssize_t>(size));
    return Receive().code() == HF_INTERNAL;
  };
  EXPECT_FALSE(refused(&good, sizeof(good)));
  EXPECT_TRUE(refused(&good, sizeof(good) - 1));
  EXPECT_TRUE(refused("x", 1));
  abi::MessageHeader wrong = good;
  wrong.magic ^= 1;
  EXPECT_TRUE(refused(&wrong, sizeof(wrong)));
  wrong = good;
  wrong.version = abi::kProtocolVersion + 1;
  EXPECT_TRUE(refused(&wrong, sizeof(wrong)));
  wrong = good;
  wrong.body_bytes = 1;
  EXPECT_TRUE(refused(&wrong, sizeof(wrong)));
  struct {
    abi::MessageHeader header;
    char more[abi::kMessageBytesMax + 1];
  } too_long = {good, {}};
  too_long.header.body_bytes = sizeof(too_long.more);
  EXPECT_TRUE(refused(&too_long, sizeof(too_long)));
}

TEST_F(SocketTest, SurplusDescriptorsAreClosed) {
  const auto open_fds = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                         std::filesystem::directory_iterator());
  };
  const abi::MessageHeader header = {abi::kProtocolMagic, abi::kProtocolVersion,
                                     abi::MessageType::kOpenReply, 1, 0};
  std::array<int, 12> fds;
  fds.fill(1);
  iovec part = {const_cast<abi::MessageHeader*>(&header), sizeof(header)};
  alignas(cmsghdr) char control_bytes[CMSG_SPACE(sizeof(fds))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control_bytes;
  message.msg_controllen = sizeof(control_bytes);
  cmsghdr* control = CMSG_FIRSTHDR(&message);
  control->cmsg_level = SOL_SOCKET;
  control->cmsg_type = SCM_RIGHTS;
  control->cmsg_len = CMSG_LEN(sizeof(fds));
  std::memcpy(CMSG_DATA(control), fds.data(), sizeof(fds));
  const auto before = open_fds();
  ASSERT_GT(sendmsg(agent_->fd(), &message, 0), 0);
  EXPECT_EQ(Receive().code(), HF_INTERNAL);
  message_ = Message();
  EXPECT_EQ(open_fds(), before);
}

TEST_F(SocketTest, APeerThatIsGoneIsUnavailableAndNoSignal) {
  EXPECT_EQ(Receive().code(), HF_DEADLINE_EXCEEDED);
  agent_.reset();
  EXPECT_EQ(Receive().code(), HF_UNAVAILABLE);
  EXPECT_EQ(trainer_->Send(abi::MessageType::kClose, 1, {}, {}, Deadline::After(0)).code(),
            HF_UNAVAILABLE);
}

TEST_F(SocketTest, APeerThatDoesNotReadIsLeftAtTheDeadline) {
  const std::vector<std::byte> body(4096);
  Error error;
  for (int i = 0; i < 100'000 && error.ok(); ++i) {
    error = agent_->Send(abi::MessageType::kQueryReply, 1, body, {}, Deadline::After(0));
  }
  EXPECT_EQ(error.code(), HF_DEADLINE_EXCEEDED);
  // What was sent arrives whole.
  ASSERT_TRUE(Receive().ok());
  EXPECT_EQ(message_.header.body_bytes, body.size());
}

TEST_F(SocketTest, AnInterruptEndsTheWait) {
  const UniqueFd interrupt = std::move(MakeEventFd().value());
  RingEventFd(interrupt.get());
  EXPECT_EQ(trainer_->Receive(&message_, interrupt.get(), Deadline::Never()).code(), HF_ABORTED);
  // A message that is there comes first.
  ASSERT_TRUE(agent_->Send(abi::MessageType::kOpenReply, 1, {}, {}, Deadline::After(0)).ok());
  EXPECT_TRUE(trainer_->Receive(&message_, interrupt.get(), Deadline::Never()).ok());
}

TEST(ConnectTest, PathsOfAnyLengthServe) {
  char base[] = "/tmp/holdfast-socket-test-XXXXXX";
  ASSERT_NE(mkdtemp(base), nullptr);
  const std::filesystem::path before = std::filesystem::current_path();
  for (const size_t length : {size_t{40}, size_t{106}, size_t{107}, size_t{108}, size_t{109},
                              size_t{500}, size_t{3000}}) {
    std::string path = base;
    while (path.size() + 2 < length) {
      const size_t left = length - 2 - path.size();  // at least 2: a slash and a letter
      path += "/" + std::string(left <= 200 ? left - 1 : 100, 'd');
    }
    std::filesystem::create_directories(path);
    path += "/s";
    ASSERT_EQ(path.size(), length);
    EXPECT_EQ(ConnectToAgent(path, Deadline::After(0)).error().code(), HF_NOT_FOUND);
    const UniqueFd listener(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    address.sun_path[0] = 's';
    std::filesystem::current_path(path.substr(0, path.size() - 2));
    ASSERT_EQ(bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)),
              0);
    EXPECT_EQ(ConnectToAgent(path, Deadline::After(0)).error().code(), HF_UNAVAILABLE);
    ASSERT_EQ(listen(listener.get(), 1), 0);
    const Result<UniqueFd> connected = ConnectToAgent(path, Deadline::After(kNsPerSecond));
    EXPECT_TRUE(connected.ok()) << length << ": " << connected.error().text();
    // With a full queue the connection is waited for, until the deadline.
    std::vector<Result<UniqueFd>> queued;
    Error full;
    for (int i = 0; i < 10 && full.ok(); ++i) {
      queued.push_back(ConnectToAgent(path, Deadline::After(0)));
      if (!queued.back().ok()) full = queued.back().error();
    }
    EXPECT_EQ(full.code(), HF_DEADLINE_EXCEEDED) << full.text();
    std::filesystem::current_path(before);
  }
  std::filesystem::remove_all(base);
}

// In /tmp anybody may have made the directory before its user.
TEST(ConnectTest, WhereAnotherUserListensNobodyIsTalkedTo) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can have another user listen";
  constexpr uid_t kNobody = 65534;
  char directory[] = "/tmp/holdfast-socket-test-XXXXXX";
  ASSERT_NE(mkdtemp(directory), nullptr);
  const std::string path = std::string(directory) + "/s";
  const UniqueFd listener(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  ASSERT_EQ(bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  // The listener is whoever calls listen(2).
  ASSERT_EQ(seteuid(kNobody), 0);
  const int listens = listen(listener.get(), 1);
  ASSERT_EQ(seteuid(0), 0);
  ASSERT_EQ(listens, 0);
  const Result<UniqueFd> connected = ConnectToAgent(path, Deadline::After(kNsPerSecond));
  ASSERT_FALSE(connected.ok());
  EXPECT_EQ(connected.error().code(), HF_PERMISSION_DENIED);
  EXPECT_STREQ(connected.error().text(),
               ("agent at " + path + ": expected user 0's, found user 65534's").c_str());
  ASSERT_EQ(listen(listener.get(), 1), 0);  // and as ourselves
  const Result<UniqueFd> again = ConnectToAgent(path, Deadline::After(kNsPerSecond));
  EXPECT_TRUE(again.ok()) << again.error().text();
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace holdfast::hook
