#include "monitor/summary.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <span>
#include <string>

#include "base/crc32c.h"
#include "tests/support/status_matchers.h"

namespace holdfast::monitor {
namespace {

using testing::HasSubstr;

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

// The checksum of `text` replaces its last four bytes.
std::string Sealed(std::string text) {
  const uint32_t checksum = Crc32c(Bytes(text).first(text.size() - 4));
  for (size_t i = 0; i < 4; ++i) {
    text[text.size() - 4 + i] = static_cast<char>(checksum >> (8 * i) & 0xFF);
  }
  return text;
}

ConnectionReport MakeConnection(uint32_t channel, uint32_t peer, Direction direction) {
  ConnectionReport c;
  c.channel = static_cast<uint16_t>(channel);
  c.peer = peer;
  c.direction = direction;
  c.state = direction == Direction::kSend ? WaitState::kSendWait : WaitState::kReceiveWait;
  c.operation = 1'000'000;
  c.steps_done = 200;
  c.steps_total = 500;
  c.waiting_us = 3'000'000;
  c.bytes = uint64_t{50} << 40;  // a month at 20 MB/s
  c.wire_wait_us = uint64_t{1'000'000} * 86'400 * 3;
  return c;
}

// A node of 8 ranks in 10 communicators, each with `channels` rings, after a month.
NodeSummary MakeNode(uint32_t channels) {
  NodeSummary node;
  node.node = 1000;
  node.attempt = Attempt{3};
  node.incarnation = 7;
  node.sequence = 2'600'000;
  node.clock_us = uint64_t{1'000'000} * 86'400 * 30;
  for (uint32_t r = 0; r < 8; ++r) {
    RankReport rank;
    rank.rank = Rank{8000 + r};
    rank.process = ProcessState::kRunning;
    rank.cpu_us = node.clock_us;
    rank.operation_us = node.clock_us / 3;
    rank.level = TelemetryLevel::kLight;
    rank.sections = {{SectionKind::kCompute, 123'456, "forward"}};
    for (uint32_t c = 0; c < 10; ++c) {
      CommunicatorReport communicator;
      communicator.id = 0xF123456789ABCDEF + c;
      communicator.size = 1024;
      communicator.index = 1000;
      communicator.counts[static_cast<size_t>(OperationKind::kAllReduce)] = {1'000'000, 1'000'000,
                                                                             999'999};
      communicator.last_kind = OperationKind::kAllReduce;
      communicator.last_bytes = 1 << 30;
      communicator.last_sequence = 1'000'000;
      communicator.open_us = 123'456;
      for (uint32_t channel = 0; channel < channels; ++channel) {
        communicator.connections.push_back(MakeConnection(channel, 999, Direction::kReceive));
        communicator.connections.push_back(MakeConnection(channel, 1001, Direction::kSend));
      }
      rank.communicators.push_back(communicator);
    }
    node.ranks.push_back(rank);
  }
  return node;
}

TEST(SummaryTest, WhatIsDecodedIsWhatWasEncoded) {
  NodeSummary node = MakeNode(2);
  node.engine_paused = true;
  node.observer_gap_us = 5;
  node.ranks[3].process = ProcessState::kGone;
  node.ranks[3].exit = ExitKind::kError;
  node.ranks[3].exit_value = -17;
  node.ranks[4].local_rank = 0;
  node.ranks[4].held_us = 0;
  node.ranks[5].held_us = UINT64_MAX - 1;
  node.ranks[5].local_rank = kLocalRankMax;
  node.ranks[5].communicators[2].operations = {{OperationKind::kReduce, 0, 0},
                                               {OperationKind::kAllReduce, UINT64_MAX, kNoRoot},
                                               {OperationKind::kScatter, 1, kNoRoot - 1}};
  node.ranks[4].sections.clear();
  const std::string bytes = EncodeSummary(node);
  ASSERT_OK_AND_ASSIGN(const NodeSummary found, DecodeSummary(Bytes(bytes)));
  EXPECT_EQ(found, node);
}

TEST(SummaryTest, EveryFlippedBitAndEveryTruncationIsRefused) {
  NodeSummary node = MakeNode(1);
  node.ranks.resize(1);
  node.ranks[0].communicators.resize(1);
  const std::string bytes = EncodeSummary(node);
  for (size_t i = 0; i < bytes.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = bytes;
      damaged[i] = static_cast<char>(damaged[i] ^ (1 << bit));
      EXPECT_THAT(DecodeSummary(Bytes(damaged)), testing::Not(IsOk())) << i << "." << bit;
    }
    EXPECT_THAT(DecodeSummary(Bytes(bytes).first(i)), testing::Not(IsOk())) << i;
  }
}

TEST(SummaryTest, AForgedBodyIsRefusedWhateverItsChecksum) {
  NodeSummary node = MakeNode(1);
  node.ranks.resize(1);
  const std::string bytes = EncodeSummary(node);
  constexpr uint32_t kSeed = 7;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 random(kSeed);
  int refused = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string forged = bytes;
    for (uint32_t k = 1 + random() % 3; k > 0; --k) {
      forged[4 + random() % (forged.size() - 8)] = static_cast<char>(random());
    }
    const auto found = DecodeSummary(Bytes(Sealed(forged)));
    // What is taken is canonical: it has these bytes and no others.
    if (found.ok()) {
      ASSERT_EQ(EncodeSummary(*found), Sealed(forged));
    } else {
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST(SummaryTest, AByteLeftOverALongNumberAndAnotherVersionAreNamed) {
  NodeSummary node;
  const std::string bytes = EncodeSummary(node);
  std::string longer = bytes;
  longer.insert(bytes.size() - 4, 1, '\0');
  EXPECT_THAT(DecodeSummary(Bytes(Sealed(longer))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("end of the body")));
  std::string padded = bytes;
  padded[5] = static_cast<char>(0x80);  // the node's number, 0, in two bytes
  padded.insert(6, 1, '\0');
  EXPECT_THAT(DecodeSummary(Bytes(Sealed(padded))),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("shortest form")));
  std::string newer = bytes;
  newer[4] = 4;
  EXPECT_THAT(DecodeSummary(Bytes(Sealed(newer))),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("expected 3, found 4")));
}

// Recordings that were made before our own calls or operations were told are still read.
TEST(SummaryTest, OlderVersionsHaveLessAndAreRead) {
  NodeSummary node = MakeNode(0);
  node.ranks.resize(1);
  node.ranks[0].communicators.resize(1);
  const std::string newest = EncodeSummary(node);
  // The last three fields before the checksum: how many operations, the local rank, and the time
  // held up.
  std::string second = newest;
  second[4] = 2;
  second.erase(second.size() - 5, 1);
  ASSERT_OK_AND_ASSIGN(const NodeSummary without_held, DecodeSummary(Bytes(Sealed(second))));
  EXPECT_EQ(without_held, node);
  std::string first = newest;
  first[4] = 1;
  first.erase(first.size() - 7, 3);
  ASSERT_OK_AND_ASSIGN(const NodeSummary found, DecodeSummary(Bytes(Sealed(first))));
  EXPECT_EQ(found, node);
}

TEST(SummaryTest, ANodeOfEightRanksInTenCommunicatorsKeepsItsBudget) {
  for (const uint32_t channels : {1u, 2u, 4u, 16u, 64u}) {
    NodeSummary node = MakeNode(channels);
    const bool fits_as_it_is = EncodeSummary(node).size() <= kSummaryBytesBudget;
    EXPECT_TRUE(FitToBudget(node, kSummaryBytesBudget)) << channels;
    EXPECT_LE(EncodeSummary(node).size(), kSummaryBytesBudget) << channels;
    const auto& connections = node.ranks[0].communicators[0].connections;
    EXPECT_EQ(connections.size(), fits_as_it_is ? 2 * channels : 2u) << channels;
    RecordProperty("channels_" + std::to_string(channels),
                   static_cast<int>(EncodeSummary(node).size()));
  }
}

// The worst second: everything stands, and says what it has called.
TEST(SummaryTest, ANodeInWhichEverythingStandsKeepsItsBudgetWithItsOperations) {
  for (const uint32_t channels : {1u, 2u, 16u}) {
    NodeSummary node = MakeNode(channels);
    for (RankReport& rank : node.ranks) {
      for (CommunicatorReport& communicator : rank.communicators) {
        communicator.operations.assign(kOperationsMax,
                                       {OperationKind::kBroadcast, uint64_t{1} << 30, 1000});
      }
    }
    EXPECT_TRUE(FitToBudget(node, kSummaryBytesBudget)) << channels;
    EXPECT_LE(EncodeSummary(node).size(), kSummaryBytesBudget) << channels;
    const CommunicatorReport& communicator = node.ranks[7].communicators[9];
    EXPECT_EQ(communicator.connections.size(), 2u) << channels;
    EXPECT_EQ(communicator.operations.size(), kOperationsMax) << channels;
    RecordProperty("standing_channels_" + std::to_string(channels),
                   static_cast<int>(EncodeSummary(node).size()));
  }
}

// Goal: whatever trainers claim, what a node says fits: limits first, then the least telling goes.
TEST(SummaryTest, TheLargestSummaryThatThereCanBeFits) {
  NodeSummary node = MakeNode(1);
  RankReport rank = node.ranks[0];
  rank.sections.assign(kSectionsMax,
                       {SectionKind::kData, UINT64_MAX, std::string(kSectionNameBytesMax, 'x')});
  rank.cpu_us = rank.operation_us = rank.data_us = rank.run_delay_us = rank.drops = UINT64_MAX;
  rank.held_us = UINT64_MAX;
  rank.exit_value = INT32_MIN;
  CommunicatorReport communicator = rank.communicators[0];
  communicator.id = communicator.last_bytes = communicator.open_us = UINT64_MAX;
  communicator.counts.fill({UINT64_MAX, UINT64_MAX, UINT64_MAX});
  ConnectionReport connection = communicator.connections[0];
  connection.state = WaitState::kSendWait;
  connection.operation = connection.bytes = connection.wire_wait_us = UINT64_MAX;
  connection.peer = UINT32_MAX;
  communicator.connections.assign(8, connection);
  communicator.operations.assign(kOperationsMax,
                                 {OperationKind::kBarrier, UINT64_MAX, kNoRoot - 1});
  for (size_t i = 0; i < communicator.connections.size(); ++i) {
    communicator.connections[i].peer -= static_cast<uint32_t>(i);
    communicator.connections[i].waiting_us = UINT64_MAX - i;
  }
  rank.communicators.assign(kCommunicatorsMax, communicator);
  node.ranks.assign(kRanksMax, rank);
  EXPECT_TRUE(FitToBudget(node, kSummaryBytesBudget));
  EXPECT_LE(EncodeSummary(node).size(), kSummaryBytesBudget);
  EXPECT_EQ(node.ranks.size(), kRanksMax);
  // With room for some, those remain that wait the longest.
  node.ranks.assign(1, rank);
  node.ranks[0].communicators.resize(1);
  node.ranks[0].communicators[0].operations.clear();
  const size_t all = EncodeSummary(node).size();
  EXPECT_TRUE(FitToBudget(node, all - 1));
  const auto& left = node.ranks[0].communicators.at(0).connections;
  ASSERT_FALSE(left.empty());
  EXPECT_LT(left.size(), 8u);
  for (const ConnectionReport& one : left) EXPECT_GT(one.waiting_us, UINT64_MAX - 4);
}

TEST(SummaryTest, MergedChannelsKeepTheirSumsAndTheStateOfTheOneThatWaitsLongest) {
  NodeSummary node = MakeNode(3);
  auto& connections = node.ranks[0].communicators[0].connections;
  connections[3].waiting_us = 9'000'000;  // channel 1, sending
  connections[3].state = WaitState::kSendPeerWait;
  connections[5].state = WaitState::kNone;  // idle for longer, but idle
  connections[5].waiting_us = 99'000'000;
  const uint64_t bytes = connections[1].bytes;
  EXPECT_TRUE(FitToBudget(node, EncodeSummary(node).size() - 1));
  ASSERT_EQ(connections.size(), 2u);
  const auto sent = std::find_if(connections.begin(), connections.end(),
                                 [](const auto& c) { return c.direction == Direction::kSend; });
  ASSERT_NE(sent, connections.end());
  EXPECT_EQ(sent->channel, 1);
  EXPECT_EQ(sent->channels, 3);
  EXPECT_EQ(sent->state, WaitState::kSendPeerWait);
  EXPECT_EQ(sent->bytes, 3 * bytes);
}

}  // namespace
}  // namespace holdfast::monitor
