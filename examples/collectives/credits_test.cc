// Goal: nobody has more than kCredits chunks under way on a connection, whatever the other end
// does; what it says is checked.
// Method: a real end of a link, and the test at the other end of a socket pair.
#include <sys/socket.h>

#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "examples/collectives/connection.h"
#include "examples/collectives/link.h"
#include "examples/collectives/ring.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace collectives {
namespace {

using testing::HasSubstr;

struct Pair {
  Pair() {
    int ends[2] = {-1, -1};
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends), 0);
    ours = Socket(ends[0]);
    theirs = Socket(ends[1]);
  }
  Socket ours;
  Socket theirs;
};

template <typename T>
void Put(const Socket& socket, const T& value) {
  ASSERT_EQ(send(socket.fd(), &value, sizeof(value), MSG_NOSIGNAL),
            static_cast<ssize_t>(sizeof(value)));
}

template <typename T>
bool Get(const Socket& socket, T* value) {
  return recv(socket.fd(), value, sizeof(*value), 0) == static_cast<ssize_t>(sizeof(*value));
}

// The last credit on its way; what was there before if none.
LinkCredit LastCredit(const Socket& socket, LinkCredit credit) {
  LinkCredit next;
  while (Get(socket, &next)) credit = next;
  return credit;
}

TEST(Credits, OfAReceiverThatGivesTooManyAreRefused) {
  const std::pair<LinkCredit, const char*> cases[] = {
      {{9, 0}, "credit for 9 chunks"},  // more places than there are
      {{8, 1}, "at most 0 arrived"},    // has what was not sent
      {{UINT64_MAX, 0}, "credit for 18446744073709551615"},
  };
  for (const auto& [credit, reason] : cases) {
    Pair pair;
    LinkSender sender(std::move(pair.ours), LinkHello());
    Put(pair.theirs, credit);
    const absl::Status status = sender.Pump();
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(reason));
  }
  // Totals do not go back.
  Pair pair;
  LinkSender sender(std::move(pair.ours), LinkHello());
  Put(pair.theirs, LinkCredit{8, 0});
  Put(pair.theirs, LinkCredit{7, 0});
  EXPECT_TRUE(absl::IsDataLoss(sender.Pump()));
}

// A flow of `count` chunks of 8 bytes in an operation of its own.
std::shared_ptr<Operation> OneFlow(bool sends, uint32_t count, std::vector<std::byte>& data) {
  data.resize(8 * count);
  auto operation = std::make_shared<Operation>(OperationKind::kSend, Deadline::max());
  operation->flows.push_back(sends ? SendFlow(0, 1, data, 8) : ReceiveFlow(0, 1, data, 8));
  return operation;
}

TEST(Credits, ASenderHasAtMostEightChunksUnderWayWhateverItCouldSend) {
  constexpr uint32_t kChunks = 100;
  Pair pair;
  CommunicatorTrace no_trace(nullptr, {});
  SendConnection connection(no_trace);
  connection.link.emplace(std::move(pair.ours), LinkHello());
  std::vector<std::byte> data;
  const std::shared_ptr<Operation> operation = OneFlow(true, kChunks, data);
  Flow& flow = *operation->flows.front();
  connection.Push({operation, &flow, nullptr});
  flow.produced = kChunks;  // a device that knows no limit
  const uint32_t seed = 7;
  std::mt19937 random(seed);
  LinkCredit given;
  LinkHello hello;
  uint64_t seen = 0;
  for (int round = 0; !connection.flows.empty(); ++round) {
    ASSERT_LT(round, 10'000) << "seed " << seed;
    Progressed progressed;
    connection.link->Ready(true, true);
    ASSERT_EQ(connection.Progress(progressed), absl::OkStatus());
    if (round == 0) {
      ASSERT_TRUE(Get(pair.theirs, &hello));
    }
    struct {
      FrameHeader header;
      std::byte payload[8];
    } chunk;
    while (Get(pair.theirs, &chunk)) ++seen;
    ASSERT_LE(seen, given.posted) << "without a place; seed " << seed;
    ASSERT_LE(seen - given.arrived, kCredits);
    // Some of what was seen is consumed, and some of those places are given.
    given.arrived += random() % (seen - given.arrived + 1);
    const uint64_t more = given.arrived + kCredits - given.posted;
    given.posted += random() % (more + 1);
    Put(pair.theirs, given);
  }
  EXPECT_EQ(seen, kChunks);
}

TEST(Credits, AReceiverTakesEightChunksAndNoMoreUntilItsDeviceHasConsumedOne) {
  constexpr uint32_t kChunks = 20;
  Pair pair;
  CommunicatorTrace no_trace(nullptr, {});
  ReceiveConnection connection(no_trace, 8);
  connection.link.emplace(std::move(pair.ours));
  std::vector<std::byte> data;
  const std::shared_ptr<Operation> operation = OneFlow(false, kChunks, data);
  Flow& flow = *operation->flows.front();
  connection.Push({operation, &flow, nullptr});
  const auto progress = [&] {
    Progressed progressed;
    connection.link->Ready(true, true);
    EXPECT_EQ(connection.Progress(progressed), absl::OkStatus());
  };
  progress();
  LinkCredit credit = LastCredit(pair.theirs, {});
  EXPECT_EQ(credit.posted, kCredits);
  EXPECT_EQ(credit.arrived, 0U);
  // A sender that waits for nothing.
  for (uint32_t i = 0; i < kChunks; ++i) {
    FrameHeader header;
    header.kind = OperationKind::kSend;
    header.message_bytes = data.size();
    header.offset_bytes = 8 * i;
    header.payload_bytes = 8;
    Put(pair.theirs, header);
    Put(pair.theirs, uint64_t{i});
  }
  progress();
  EXPECT_EQ(flow.arrived, kCredits);
  EXPECT_FALSE(connection.ExpectsData());
  for (uint32_t consumed = 1; consumed <= kChunks; ++consumed) {
    const std::byte* const staged = flow.staged[(consumed - 1) % kCredits];
    ASSERT_NE(staged, nullptr) << "the device has not come: not into its memory";
    uint64_t value = 0;
    std::memcpy(&value, staged, sizeof(value));
    EXPECT_EQ(value, consumed - 1);
    flow.flushed = flow.arrived.load();
    flow.consumed = consumed;
    progress();
    EXPECT_EQ(flow.arrived, std::min(kChunks, consumed + kCredits));
    credit = LastCredit(pair.theirs, credit);
    EXPECT_EQ(credit.posted, std::min(kChunks, consumed + kCredits));
    EXPECT_EQ(credit.arrived, flow.arrived);
  }
  EXPECT_TRUE(connection.flows.empty());
}

TEST(Credits, FramesThatDoNotFitAreRefused) {
  FrameHeader good;
  good.kind = OperationKind::kSend;
  good.message_bytes = 16;
  good.payload_bytes = 8;
  const auto changed = [&](const auto& change) {
    FrameHeader header = good;
    change(header);
    return header;
  };
  const std::pair<FrameHeader, absl::StatusCode> cases[] = {
      {changed([](FrameHeader& h) { h.magic = 1; }), absl::StatusCode::kDataLoss},
      {changed([](FrameHeader& h) { h.payload_bytes = 9; }), absl::StatusCode::kDataLoss},
      {changed([](FrameHeader& h) { h.payload_bytes = UINT32_MAX; }), absl::StatusCode::kDataLoss},
      {changed([](FrameHeader& h) { h.offset_bytes = 8; }), absl::StatusCode::kDataLoss},
      {changed([](FrameHeader& h) { h.sequence = 1; }), absl::StatusCode::kFailedPrecondition},
      {changed([](FrameHeader& h) { h.step = 1; }), absl::StatusCode::kFailedPrecondition},
      {changed([](FrameHeader& h) { h.message_bytes = 8; }), absl::StatusCode::kFailedPrecondition},
      {changed([](FrameHeader& h) { h.kind = static_cast<OperationKind>(99); }),
       absl::StatusCode::kFailedPrecondition},
  };
  for (const auto& [header, code] : cases) {
    Pair pair;
    CommunicatorTrace no_trace(nullptr, {});
    ReceiveConnection connection(no_trace, 8);
    connection.link.emplace(std::move(pair.ours));
    std::vector<std::byte> data;
    const std::shared_ptr<Operation> operation = OneFlow(false, 2, data);
    connection.Push({operation, operation->flows.front().get(), nullptr});
    Put(pair.theirs, header);
    Progressed progressed;
    EXPECT_EQ(connection.Progress(progressed).code(), code);
  }
}

}  // namespace
}  // namespace collectives
