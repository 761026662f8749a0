// Handshake and channel between real sockets, with strangers of every kind on either side, and a
// man in the middle who changes one bit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "preflight/channel.h"
#include "preflight/handshake.h"
#include "preflight/messages.h"
#include "tests/support/status_matchers.h"

namespace holdfast::preflight {
namespace {

using absl::StatusCode;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::Field;
using ::testing::HasSubstr;

constexpr char kToken[] = "0123456789abcdef0123456789abcdef";
constexpr absl::Duration kLong = absl::Seconds(60);
constexpr absl::Duration kShort = absl::Milliseconds(100);

Identity Rank(uint32_t rank, const std::string& token = kToken, uint32_t node_count = 4) {
  return {token, rank, node_count};
}

std::unique_ptr<Listener> Listening(const Identity& self) {
  auto listener = Listener::Create(self, Endpoint::Loopback(0));
  CHECK_OK(listener.status());
  return *std::move(listener);
}

Answer WelcomeAll(const Hello&) { return Answer::kWelcome; }

UniqueFd Dial(const Listener& listener) {
  auto fd = ConnectTcp(listener.endpoint(), Deadline::After(kLong));
  CHECK_OK(fd.status());
  return *std::move(fd);
}

// What both ends say of a handshake with the listener of rank 0. The listening end has nothing to
// say if the other was refused.
struct Meeting {
  absl::StatusOr<Connection> connecting = absl::UnknownError("");
  absl::StatusOr<Connection> listening = absl::UnknownError("");
};

void PumpUntil(Listener& listener, const Listener::Judge& judge, const std::atomic<bool>& done,
               Meeting* meeting) {
  while (!done && !meeting->listening.ok()) {
    auto welcomed = listener.Pump(judge);
    CHECK_OK(welcomed.status());
    if (!welcomed->empty()) meeting->listening = std::move(welcomed->front());
    std::vector<pollfd> entries;
    listener.AppendPollFds(&entries);
    CHECK(poll(entries.data(), entries.size(), 1) >= 0);
  }
}

Meeting Meet(Listener& listener, const Identity& self, const Listener::Judge& judge = WelcomeAll,
             uint32_t to_rank = 0) {
  Meeting meeting;
  std::atomic<bool> done = false;
  std::thread other([&] {
    meeting.connecting =
        Connect(self, to_rank, listener.endpoint(), Line::kForward, 7, Deadline::After(kLong));
    done = true;
  });
  PumpUntil(listener, judge, done, &meeting);
  other.join();
  return meeting;
}

TEST(HandshakeTest, TwoThatKnowTheTokenMeet) {
  const auto listener = Listening(Rank(0));
  const Meeting meeting = Meet(*listener, Rank(3));
  ASSERT_THAT(meeting.connecting.status(), IsOk());
  ASSERT_THAT(meeting.listening.status(), IsOk());
  EXPECT_EQ(meeting.listening->remote_rank, 3U);
  EXPECT_EQ(meeting.connecting->remote_rank, 0U);
  for (const Connection* end : {&*meeting.listening, &*meeting.connecting}) {
    EXPECT_EQ(end->line, Line::kForward);
    EXPECT_EQ(end->round, 7U);
  }
  EXPECT_EQ(meeting.listening->key, meeting.connecting->key);
  // Of this connection alone.
  const Meeting again = Meet(*listener, Rank(3));
  EXPECT_NE(again.listening->key, meeting.listening->key);
  EXPECT_EQ(listener->refusal_count(), 0U);
}

TEST(HandshakeTest, AnotherTokenIsRefusedAndNamed) {
  for (const std::string& token :
       {std::string(), std::string("x"), std::string(kToken) + "0", std::string(31, 'f')}) {
    const auto listener = Listening(Rank(0));
    const Meeting meeting = Meet(*listener, Rank(3, token));
    EXPECT_THAT(meeting.connecting.status(),
                StatusIs(StatusCode::kUnauthenticated, HasSubstr("another token")));
    EXPECT_FALSE(meeting.listening.ok());
    ASSERT_THAT(listener->refusals(), testing::SizeIs(1));
    EXPECT_EQ(listener->refusals()[0].address, "127.0.0.1");
    EXPECT_THAT(listener->refusals()[0].reason, HasSubstr("says that it is rank 3, another token"));
  }
}

TEST(HandshakeTest, ANodeThatIsNotExpectedIsToldSo) {
  const auto listener = Listening(Rank(0));
  const auto refusing = [](Answer answer) { return [answer](const Hello&) { return answer; }; };
  EXPECT_THAT(Meet(*listener, Rank(3, kToken, 5)).connecting.status(),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("WORLD_SIZE")));
  EXPECT_THAT(Meet(*listener, Rank(9, kToken, 4)).connecting.status(),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("WORLD_SIZE")));
  EXPECT_THAT(Meet(*listener, Rank(3), refusing(Answer::kTaken)).connecting.status(),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("has come already")));
  EXPECT_THAT(Meet(*listener, Rank(3), refusing(Answer::kNotNow)).connecting.status(),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("not expected")));
  EXPECT_THAT(Meet(*listener, Rank(3), WelcomeAll, 2).connecting.status(),
              StatusIs(StatusCode::kFailedPrecondition, HasSubstr("not expected")));
  EXPECT_EQ(listener->refusal_count(), 5U);
}

// A service that answers whoever connects with `bytes`, reads a Hello's length, answers with
// `more`, and holds the connection until the caller has seen the end.
absl::Status ConnectToService(const std::string& bytes, const std::string& more,
                              absl::Duration within) {
  auto listener = ListenTcp(Endpoint::Loopback(0), 8);
  CHECK_OK(listener.status());
  const Endpoint endpoint = *LocalEndpoint(listener->get());
  absl::Status status;
  std::thread caller([&] {
    status = Connect(Rank(1), 0, endpoint, Line::kControl, 0, Deadline::After(within)).status();
  });
  UniqueFd fd;
  while (!fd) fd = *AcceptTcp(listener->get());
  CHECK_OK(SendAll(fd.get(), std::as_bytes(std::span(bytes)), Deadline::After(kLong)));
  std::array<std::byte, sizeof(Hello)> hello;
  if (!more.empty()) {
    CHECK_OK(ReceiveAll(fd.get(), hello, Deadline::After(kLong)));
    CHECK_OK(SendAll(fd.get(), std::as_bytes(std::span(more)), Deadline::After(kLong)));
  }
  caller.join();
  return status;
}

template <typename T>
std::string Text(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}

TEST(HandshakeTest, WhoConnectsBelievesNoStranger) {
  const std::string greeting = Text(Greeting());
  // A silent one, as a torchrun's store is: nothing is sent to it before it has spoken.
  EXPECT_THAT(ConnectToService("", "", kShort), StatusIs(StatusCode::kDeadlineExceeded));
  EXPECT_THAT(
      ConnectToService("220 mail.example.org ESMTP, and a lot of words more\r\n", "", kLong),
      StatusIs(StatusCode::kUnauthenticated, HasSubstr("does not speak this protocol")));
  EXPECT_THAT(ConnectToService(greeting, "", kShort), StatusIs(StatusCode::kDeadlineExceeded));
  EXPECT_THAT(ConnectToService(greeting, std::string(sizeof(Reply), 'x'), kLong),
              StatusIs(StatusCode::kUnauthenticated, HasSubstr("does not speak this protocol")));
  for (const Answer answer : {Answer::kWelcome, Answer::kTaken, Answer{99}}) {
    EXPECT_THAT(ConnectToService(greeting, Text(Reply{.answer = answer}), kLong),
                StatusIs(StatusCode::kUnauthenticated, HasSubstr("does not know the token")));
  }
}

TEST(HandshakeTest, AServiceThatClosesIsNotWaitedFor) {
  auto listener = ListenTcp(Endpoint::Loopback(0), 8);
  ASSERT_THAT(listener.status(), IsOk());
  const Endpoint endpoint = *LocalEndpoint(listener->get());
  std::thread closer([&] {
    UniqueFd fd;
    while (!fd) fd = *AcceptTcp(listener->get());
  });
  EXPECT_THAT(Connect(Rank(1), 0, endpoint, Line::kControl, 0, Deadline::After(kLong)).status(),
              StatusIs(StatusCode::kUnavailable));
  closer.join();
  listener->Reset();
  EXPECT_THAT(Connect(Rank(1), 0, endpoint, Line::kControl, 0, Deadline::After(kLong)).status(),
              StatusIs(StatusCode::kUnavailable));
}

TEST(HandshakeTest, StrangersHinderNobodyAndAreNamed) {
  const auto listener = Listening(Rank(0));
  std::vector<UniqueFd> strangers;
  const auto pump = [&] { ASSERT_THAT(listener->Pump(WelcomeAll).status(), IsOk()); };
  for (size_t i = 0; i < Listener::kPendingMax + 20; ++i) {
    strangers.push_back(Dial(*listener));
    if (i % 100 == 99) pump();
  }
  pump();
  const std::string garbage = "GET / HTTP/1.1\r\n\r\n";
  ASSERT_THAT(
      SendAll(strangers.back().get(), std::as_bytes(std::span(garbage)), Deadline::After(kLong)),
      IsOk());
  const std::string half_magic(kMagic.begin(), kMagic.begin() + 4);
  UniqueFd half = Dial(*listener);
  ASSERT_THAT(SendAll(half.get(), std::as_bytes(std::span(half_magic)), Deadline::After(kLong)),
              IsOk());
  half.Reset();

  const Meeting meeting = Meet(*listener, Rank(2));
  ASSERT_THAT(meeting.listening.status(), IsOk());
  EXPECT_EQ(meeting.listening->remote_rank, 2U);
  std::vector<pollfd> entries;
  listener->AppendPollFds(&entries);
  EXPECT_LE(entries.size(), Listener::kPendingMax + 1);
  for (const char* reason :
       {"does not speak this protocol", "silent while others came", "broke off in the middle"}) {
    EXPECT_THAT(listener->refusals(), Contains(Field(&Refusal::reason, reason)));
  }
}

TEST(HandshakeTest, TheListOfStrangersIsBounded) {
  const auto listener = Listening(Rank(0));
  for (uint32_t node_count = 5; node_count < 5 + 2 * Listener::kRefusalsMax; ++node_count) {
    // A reason of its own for each rank.
    static_cast<void>(Meet(*listener, Rank(node_count - 1, kToken, node_count)));
  }
  EXPECT_EQ(listener->refusal_count(), 2 * Listener::kRefusalsMax);
  EXPECT_EQ(listener->refusals().size(), Listener::kRefusalsMax);
}

// Sits between a caller and a listener and forwards the three messages of a handshake, changed.
struct Middle {
  std::function<void(std::span<std::byte>)> greeting = [](auto) {};
  std::function<void(std::span<std::byte>)> hello = [](auto) {};
  std::function<void(std::span<std::byte>)> reply = [](auto) {};
};
Meeting MeetThrough(Listener& listener, const Middle& middle) {
  auto front = ListenTcp(Endpoint::Loopback(0), 8);
  CHECK_OK(front.status());
  const Endpoint endpoint = *LocalEndpoint(front->get());
  Meeting meeting;
  std::thread caller([&] {
    meeting.connecting = Connect(Rank(3), 0, endpoint, Line::kControl, 0, Deadline::After(kLong));
  });
  UniqueFd caller_fd;
  while (!caller_fd) caller_fd = *AcceptTcp(front->get());
  const UniqueFd listener_fd = Dial(listener);
  const auto pump = [&] {
    auto welcomed = listener.Pump(WelcomeAll);
    CHECK_OK(welcomed.status());
    if (!welcomed->empty()) meeting.listening = std::move(welcomed->front());
  };
  const auto forward = [](int from, int to, size_t bytes, const auto& change) {
    std::vector<std::byte> message(bytes);
    if (!ReceiveAll(from, message, Deadline::After(kLong)).ok()) return false;
    change(std::span(message));
    return SendAll(to, message, Deadline::After(kLong)).ok();
  };
  pump();
  if (forward(listener_fd.get(), caller_fd.get(), sizeof(Greeting), middle.greeting) &&
      forward(caller_fd.get(), listener_fd.get(), sizeof(Hello), middle.hello)) {
    pump();
    forward(listener_fd.get(), caller_fd.get(), sizeof(Reply), middle.reply);
  }
  caller_fd.Reset();
  caller.join();
  return meeting;
}

TEST(HandshakeTest, AManInTheMiddleCannotChangeABit) {
  const auto listener = Listening(Rank(0));
  // Unchanged it passes: what follows is not vacuous.
  ASSERT_THAT(MeetThrough(*listener, {}).connecting.status(), IsOk());
  const auto flip = [](size_t bit) {
    return [bit](std::span<std::byte> message) { message[bit / 8] ^= std::byte{1} << (bit % 8); };
  };
  for (size_t bit = 0; bit < 8 * sizeof(Hello); bit += 5) {
    const Meeting meeting = MeetThrough(*listener, {.hello = flip(bit)});
    EXPECT_FALSE(meeting.connecting.ok()) << bit;
    EXPECT_FALSE(meeting.listening.ok()) << bit;
  }
  for (size_t bit = 0; bit < 8 * sizeof(Greeting); bit += 5) {
    const Meeting meeting = MeetThrough(*listener, {.greeting = flip(bit)});
    EXPECT_FALSE(meeting.connecting.ok()) << bit;
    EXPECT_FALSE(meeting.listening.ok()) << bit;
  }
  for (size_t bit = 0; bit < 8 * sizeof(Reply); bit += 3) {
    const size_t byte = bit / 8;
    if (byte >= 12 && byte < 16) continue;  // reserved: nobody looks at it
    EXPECT_FALSE(MeetThrough(*listener, {.reply = flip(bit)}).connecting.ok()) << bit;
  }
}

TEST(HandshakeTest, ARecordedHelloIsOfNoUse) {
  const auto listener = Listening(Rank(0));
  std::vector<std::byte> recorded;
  ASSERT_THAT(MeetThrough(*listener, {.hello =
                                          [&](std::span<std::byte> hello) {
                                            recorded.assign(hello.begin(), hello.end());
                                          }})
                  .listening.status(),
              IsOk());
  const UniqueFd thief = Dial(*listener);
  ASSERT_THAT(SendAll(thief.get(), recorded, Deadline::After(kLong)), IsOk());
  EXPECT_THAT(listener->Accept(WelcomeAll, -1, Deadline::After(kShort)).status(),
              StatusIs(StatusCode::kDeadlineExceeded));
  ASSERT_THAT(listener->refusals(), testing::SizeIs(1));
  EXPECT_THAT(listener->refusals()[0].reason, HasSubstr("another token"));
}

// ---- Channels ----

struct Channels {
  std::unique_ptr<Channel> a;
  std::unique_ptr<Channel> b;
};

// Two channels, and the raw ends in between, if `raw` is given: a writes into raw[0], b reads from
// raw[1].
Channels Connected(std::array<UniqueFd, 2>* raw = nullptr) {
  const auto pair = [] {
    std::array<int, 2> fds = {};
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds.data()) == 0);
    return std::array<UniqueFd, 2>{UniqueFd(fds[0]), UniqueFd(fds[1])};
  };
  Sha256Digest key;
  key.fill(std::byte{7});
  std::array<UniqueFd, 2> first = pair();
  Channels channels;
  channels.a = std::make_unique<Channel>(Connection{.fd = std::move(first[0]), .key = key},
                                         Channel::End::kConnecting);
  if (raw == nullptr) {
    channels.b = std::make_unique<Channel>(Connection{.fd = std::move(first[1]), .key = key},
                                           Channel::End::kListening);
    return channels;
  }
  std::array<UniqueFd, 2> second = pair();
  channels.b = std::make_unique<Channel>(Connection{.fd = std::move(second[1]), .key = key},
                                         Channel::End::kListening);
  *raw = {std::move(first[1]), std::move(second[0])};
  return channels;
}

TEST(ChannelTest, MessagesArriveWholeAndInOrder) {
  Channels channels = Connected();
  for (uint32_t i = 0; i < 100; ++i) {
    ASSERT_THAT(channels.a->Send(MessageType::kLegDone, LegDoneMessage{i}, Deadline::After(kLong)),
                IsOk());
    if (i % 10 == 0) {
      ASSERT_THAT(
          channels.b->Send(MessageType::kEnd, EndMessage{Outcome::kFailed, FixedText<1024>("why")},
                           Deadline::After(kLong)),
          IsOk());
    }
  }
  for (uint32_t i = 0; i < 100; ++i) {
    ASSERT_OK_AND_ASSIGN(const Message message, channels.b->Receive(Deadline::After(kLong)));
    EXPECT_EQ(message.type, MessageType::kLegDone);
    ASSERT_OK_AND_ASSIGN(const LegDoneMessage done, message.As<LegDoneMessage>());
    EXPECT_EQ(done.leg, i);
    EXPECT_THAT(message.As<EndMessage>().status(), StatusIs(StatusCode::kInvalidArgument));
  }
  ASSERT_OK_AND_ASSIGN(const Message message, channels.a->Receive(Deadline::After(kLong)));
  EXPECT_EQ(message.As<EndMessage>()->text.ToString(), "why");
  EXPECT_THAT(channels.b->Receive(Deadline::After(kShort)).status(),
              StatusIs(StatusCode::kDeadlineExceeded));
  ASSERT_OK_AND_ASSIGN(const std::optional<Message> nothing, channels.b->TryReceive());
  EXPECT_FALSE(nothing.has_value());
  channels.a.reset();
  EXPECT_THAT(channels.b->Receive(Deadline::After(kLong)).status(),
              StatusIs(StatusCode::kUnavailable));
}

// The bytes of two messages of a, taken from the wire.
std::vector<std::byte> BytesOnTheWire(Channels& channels, int from) {
  for (uint32_t i = 0; i < 2; ++i) {
    CHECK_OK(channels.a->Send(MessageType::kLegDone, LegDoneMessage{i}, Deadline::After(kLong)));
  }
  std::vector<std::byte> bytes(2 * (8 + sizeof(LegDoneMessage) + kSha256Bytes));
  CHECK_OK(ReceiveAll(from, bytes, Deadline::After(kLong)));
  return bytes;
}

TEST(ChannelTest, AChangedBitIsNoticed) {
  for (size_t bit = 0; bit < 8 * 44; ++bit) {
    std::array<UniqueFd, 2> raw;
    Channels channels = Connected(&raw);
    std::vector<std::byte> bytes = BytesOnTheWire(channels, raw[0].get());
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_THAT(SendAll(raw[1].get(), bytes, Deadline::After(kLong)), IsOk());
    raw[1].Reset();  // a greater length is waited for in vain otherwise
    const absl::Status status = channels.b->Receive(Deadline::After(kLong)).status();
    EXPECT_TRUE(status.code() == StatusCode::kDataLoss || status.code() == StatusCode::kUnavailable)
        << bit << ": " << status;
  }
}

TEST(ChannelTest, MessagesCannotBeRepeatedLeftOutSwappedOrSentBack) {
  const auto receive = [](const std::function<std::vector<std::byte>(std::vector<std::byte>)>& edit,
                          bool back = false) {
    std::array<UniqueFd, 2> raw;
    Channels channels = Connected(&raw);
    const std::vector<std::byte> bytes = edit(BytesOnTheWire(channels, raw[0].get()));
    CHECK_OK(SendAll(raw[back ? 0 : 1].get(), bytes, Deadline::After(kLong)));
    raw[1].Reset();
    raw[0].Reset();
    Channel& receiver = back ? *channels.a : *channels.b;
    int good_count = 0;
    while (receiver.Receive(Deadline::After(kLong)).ok()) ++good_count;
    return good_count;
  };
  using Bytes = std::vector<std::byte>;
  const auto first = [](const Bytes& bytes) { return Bytes(bytes.begin(), bytes.begin() + 44); };
  const auto second = [](const Bytes& bytes) { return Bytes(bytes.begin() + 44, bytes.end()); };
  const auto joined = [](Bytes a, const Bytes& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  };
  EXPECT_EQ(receive([](Bytes bytes) { return bytes; }), 2);
  EXPECT_EQ(receive([&](Bytes bytes) { return joined(first(bytes), first(bytes)); }), 1);
  EXPECT_EQ(receive([&](Bytes bytes) { return second(bytes); }), 0);
  EXPECT_EQ(receive([&](Bytes bytes) { return joined(second(bytes), first(bytes)); }), 0);
  EXPECT_EQ(receive([](Bytes bytes) { return bytes; }, /*back=*/true), 0);
}

TEST(ChannelTest, ACutOffMessageIsNone) {
  for (size_t bytes_kept = 0; bytes_kept < 44; ++bytes_kept) {
    std::array<UniqueFd, 2> raw;
    Channels channels = Connected(&raw);
    std::vector<std::byte> bytes = BytesOnTheWire(channels, raw[0].get());
    bytes.resize(bytes_kept);
    ASSERT_THAT(SendAll(raw[1].get(), bytes, Deadline::After(kLong)), IsOk());
    raw[1].Reset();
    EXPECT_THAT(channels.b->Receive(Deadline::After(kLong)).status(),
                StatusIs(StatusCode::kUnavailable));
  }
}

TEST(ChannelTest, AHugeLengthIsRefusedAtOnce) {
  std::array<UniqueFd, 2> raw;
  Channels channels = Connected(&raw);
  const std::array<uint32_t, 2> header = {1, Channel::kPayloadBytesMax + 1};
  ASSERT_THAT(SendAll(raw[1].get(), std::as_bytes(std::span(header)), Deadline::After(kLong)),
              IsOk());
  EXPECT_THAT(channels.b->Receive(Deadline::After(kLong)).status(),
              StatusIs(StatusCode::kDataLoss, HasSubstr("4097 bytes")));
}

}  // namespace
}  // namespace holdfast::preflight
