// Sockets on this machine, of both families where the kernel has them.
#include "io/tcp.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using absl::StatusCode;
using ::testing::HasSubstr;

constexpr absl::Duration kLong = absl::Seconds(20);

struct Connected {
  UniqueFd listener;
  UniqueFd calling;
  UniqueFd called;
};

Connected Connect(const Endpoint& at) {
  Connected connected;
  connected.listener = *ListenTcp(at, 8);
  connected.calling = *ConnectTcp(*LocalEndpoint(connected.listener.get()), Deadline::After(kLong));
  while (!connected.called) connected.called = *AcceptTcp(connected.listener.get());
  return connected;
}

Endpoint V6Loopback(uint16_t port) {
  std::array<std::byte, 16> bytes = {};
  bytes[15] = std::byte{1};
  return Endpoint::Decode(bytes, port);
}

TEST(EndpointTest, SurvivesItsEncoding) {
  for (const char* host : {"127.0.0.1", "10.1.2.3", "::1", "fd00::12:1"}) {
    ASSERT_OK_AND_ASSIGN(const std::vector<Endpoint> found, ResolveHost(host, 29500));
    ASSERT_EQ(found.size(), 1U);
    std::array<std::byte, 16> bytes;
    found[0].Encode(bytes);
    const Endpoint decoded = Endpoint::Decode(bytes, 29500);
    EXPECT_EQ(decoded.ToString(), found[0].ToString());
    EXPECT_EQ(decoded.family(), found[0].family());
    EXPECT_EQ(decoded.WithPort(7).port(), 7);
  }
  EXPECT_EQ(Endpoint::Loopback(1).ToString(), "127.0.0.1:1");
  EXPECT_EQ(V6Loopback(2).ToString(), "[::1]:2");
  EXPECT_EQ(Endpoint().ToString(), "no address");
}

TEST(EndpointTest, KnowsWhatLeavesTheMachine) {
  const auto is_loopback = [](const char* host) {
    return ResolveHost(host, 1)->front().is_loopback();
  };
  for (const char* host : {"127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"}) {
    EXPECT_TRUE(is_loopback(host)) << host;
  }
  for (const char* host : {"128.0.0.1", "126.255.255.255", "10.0.0.1", "::2", "::", "0.0.0.0"}) {
    EXPECT_FALSE(is_loopback(host)) << host;
  }
  EXPECT_TRUE(Endpoint::Any(0).is_any());
  EXPECT_FALSE(Endpoint::Loopback(0).is_any());
}

TEST(TcpTest, ANameWithoutAnAddressIsNamed) {
  EXPECT_THAT(ResolveHost("no.such.host.invalid", 1).status(),
              StatusIs(StatusCode::kNotFound, HasSubstr("no.such.host.invalid")));
}

TEST(TcpTest, BytesArriveInBothFamilies) {
  std::vector<Endpoint> places = {Endpoint::Loopback(0)};
  if (ListenTcp(V6Loopback(0), 1).ok()) places.push_back(V6Loopback(0));
  for (const Endpoint& place : places) {
    const Connected connected = Connect(place);
    std::vector<std::byte> sent(3 << 20);
    for (size_t i = 0; i < sent.size(); ++i) sent[i] = static_cast<std::byte>(i * 7 >> 3);
    std::vector<std::byte> received(sent.size());
    std::thread sender([&] {
      EXPECT_THAT(SendAll(connected.calling.get(), sent, Deadline::After(kLong)), IsOk());
    });
    EXPECT_THAT(ReceiveAll(connected.called.get(), received, Deadline::After(kLong)), IsOk());
    sender.join();
    EXPECT_EQ(received, sent);
    EXPECT_EQ(RemoteEndpoint(connected.called.get())->ToString(),
              LocalEndpoint(connected.calling.get())->ToString());
  }
}

TEST(TcpTest, AnyAddressTakesCallersOfBothFamilies) {
  const UniqueFd listener = *ListenTcp(Endpoint::Any(0), 8);
  const uint16_t port = LocalEndpoint(listener.get())->port();
  std::vector<Endpoint> places = {Endpoint::Loopback(port)};
  if (Endpoint::Any(0).family() == AF_INET6) places.push_back(V6Loopback(port));
  for (const Endpoint& place : places) {
    const absl::StatusOr<UniqueFd> caller = ConnectTcp(place, Deadline::After(kLong));
    ASSERT_THAT(caller.status(), IsOk()) << place.ToString();
    UniqueFd called;
    while (!called) called = *AcceptTcp(listener.get());
    // Not as ::ffff:127.0.0.1.
    EXPECT_EQ(RemoteEndpoint(called.get())->family(), place.family());
  }
}

TEST(TcpTest, ATakenPortIsSaid) {
  const UniqueFd listener = *ListenTcp(Endpoint::Loopback(0), 8);
  EXPECT_THAT(ListenTcp(*LocalEndpoint(listener.get()), 8).status(),
              StatusIs(StatusCode::kAlreadyExists, HasSubstr("127.0.0.1")));
}

TEST(TcpTest, NobodyThereIsSaidAtOnce) {
  Endpoint nobody;
  {
    const UniqueFd listener = *ListenTcp(Endpoint::Loopback(0), 8);
    nobody = *LocalEndpoint(listener.get());
  }
  EXPECT_THAT(ConnectTcp(nobody, Deadline::After(kLong)).status(),
              StatusIs(StatusCode::kUnavailable, HasSubstr("127.0.0.1")));
}

TEST(TcpTest, EveryWaitEndsAtItsDeadline) {
  const Connected connected = Connect(Endpoint::Loopback(0));
  std::array<std::byte, 1> byte;
  EXPECT_THAT(ReceiveAll(connected.called.get(), byte, Deadline::After(absl::Milliseconds(20))),
              StatusIs(StatusCode::kDeadlineExceeded));
  // Nobody reads: the sockets' buffers fill.
  const std::vector<std::byte> much(size_t{64} << 20);
  EXPECT_THAT(SendAll(connected.calling.get(), much, Deadline::After(absl::Milliseconds(50))),
              StatusIs(StatusCode::kDeadlineExceeded));
  // A full queue of connections does not answer.
  const UniqueFd full = *ListenTcp(Endpoint::Loopback(0), 0);
  std::vector<UniqueFd> callers;
  absl::Status last;
  for (int i = 0; i < 8 && last.ok(); ++i) {
    absl::StatusOr<UniqueFd> caller =
        ConnectTcp(*LocalEndpoint(full.get()), Deadline::After(absl::Milliseconds(20)));
    last = caller.status();
    if (caller.ok()) callers.push_back(*std::move(caller));
  }
  EXPECT_THAT(last, StatusIs(StatusCode::kDeadlineExceeded));
  EXPECT_TRUE(Deadline().passed());
  EXPECT_EQ(Deadline().PollMilliseconds(), 0);
}

TEST(TcpTest, AClosedConnectionIsSaid) {
  Connected connected = Connect(Endpoint::Loopback(0));
  std::array<std::byte, 4> bytes = {};
  EXPECT_THAT(ReceiveSome(connected.called.get(), bytes), IsOkAndHolds(0U));
  connected.calling.Reset();
  EXPECT_THAT(ReceiveAll(connected.called.get(), bytes, Deadline::After(kLong)),
              StatusIs(StatusCode::kUnavailable, HasSubstr("closed")));
}

TEST(TcpTest, WhatIsNotSentYetIsDroppedOnClose) {
  Connected connected = Connect(Endpoint::Loopback(0));
  DropUnsentOnClose(connected.calling.get());
  const std::vector<std::byte> much(size_t{64} << 20);
  ASSERT_THAT(SendAll(connected.calling.get(), much, Deadline::After(absl::Milliseconds(50))),
              StatusIs(StatusCode::kDeadlineExceeded));
  connected.calling.Reset();
  // The end is told at once, not after what was under way.
  std::vector<std::byte> received(much.size());
  EXPECT_THAT(ReceiveAll(connected.called.get(), received, Deadline::After(kLong)),
              StatusIs(StatusCode::kUnavailable, HasSubstr("reset")));
}

}  // namespace
}  // namespace holdfast
