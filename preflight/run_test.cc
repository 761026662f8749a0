// The parts that measure and coordinate, in one process: real sockets, real threads, a real disk.
// Whole runs of several processes are preflight_test.py's.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "io/posix_file_system.h"
#include "preflight/channel.h"
#include "preflight/clocks.h"
#include "preflight/coordinator.h"
#include "preflight/measure_disk.h"
#include "preflight/measure_node.h"
#include "preflight/pair.h"
#include "preflight/preflight.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::preflight {
namespace {

using absl::StatusCode;
using ::testing::ElementsAre;
using ::testing::Gt;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kToken[] = "0123456789abcdef0123456789abcdef";
constexpr absl::Duration kLong = absl::Seconds(60);

std::unique_ptr<Listener> Listening(const Identity& self) {
  auto listener = Listener::Create(self, Endpoint::Loopback(0));
  CHECK_OK(listener.status());
  return *std::move(listener);
}

// ---- A node alone ----

TEST(MeasureTest, MemoryAndCpusHaveASpeed) {
  ASSERT_OK_AND_ASSIGN(const double memory, MeasureMemory(absl::Milliseconds(40)));
  EXPECT_THAT(memory, Gt(1e6));
  ASSERT_OK_AND_ASSIGN(const CpuSpeed cpus, MeasureCpus(absl::Milliseconds(40)));
  EXPECT_THAT(cpus.slowest_steps_per_second, Gt(1e3));
  EXPECT_LE(cpus.slowest_steps_per_second, cpus.steps_per_second);
}

TEST(MeasureTest, ADiskHasASpeedAndKeepsNothing) {
  const TemporaryDirectory directory;
  const auto file_system = NewPosixFileSystem();
  ASSERT_OK_AND_ASSIGN(const DiskSpeed disk,
                       MeasureDisk(*file_system, directory.path(), absl::Milliseconds(50)));
  EXPECT_THAT(disk.write_bytes_per_second, Gt(1e3));
  EXPECT_THAT(disk.sync_seconds, Gt(0));
  EXPECT_THAT(disk.read_bytes_per_second, Gt(1e3));
  EXPECT_THAT(disk.description, HasSubstr(","));
  EXPECT_THAT(file_system->List(directory.path(), 10), IsOkAndHolds(IsEmpty()));
}

TEST(MeasureTest, ADiskThatIsNotThereIsNamed) {
  const TemporaryDirectory directory;
  const auto file_system = NewPosixFileSystem();
  EXPECT_THAT(MeasureDisk(*file_system, directory.Join("nothing"), absl::Milliseconds(10)).status(),
              StatusIs(StatusCode::kNotFound, HasSubstr("nothing")));
}

TEST(ClocksTest, NobodySetsThemDuringATest) {
  ClockWatch watch;
  const ClockReading first = watch.Look();
  const ClockReading second = watch.Look();
  EXPECT_GE(second.monotonic_ns, first.monotonic_ns);
  EXPECT_LT(std::abs(watch.step_ns()), 5'000'000);
}

// ---- A pair ----

TEST(PairTest, BothEndsMeasure) {
  const Identity low{kToken, 1, 4};
  const Identity high{kToken, 2, 4};
  const auto low_listener = Listening(low);
  const auto high_listener = Listening(high);
  const absl::Duration duration = absl::Milliseconds(200);
  absl::StatusOr<PairMessage> from_high = absl::UnknownError("");
  std::thread other([&] {
    from_high = MeasurePair(high, *high_listener,
                            {.round = 1,
                             .partner_rank = 1,
                             .partner = low_listener->endpoint(),
                             .connects = true,
                             .duration = duration});
  });
  const absl::StatusOr<PairMessage> from_low = MeasurePair(
      low, *low_listener,
      {.round = 1, .partner_rank = 2, .partner = {}, .connects = false, .duration = duration});
  other.join();
  ASSERT_THAT(from_low.status(), IsOk());
  ASSERT_THAT(from_high.status(), IsOk());
  for (const PairMessage& message : {*from_low, *from_high}) {
    EXPECT_THAT(message.one_way_bytes_per_second, Gt(0));
    EXPECT_THAT(message.both_ways_bytes_per_second, Gt(0));
  }
  EXPECT_THAT(from_high->round_trip_seconds, Gt(0));
  EXPECT_GE(from_high->round_trip_p99_seconds, from_high->round_trip_seconds);
  EXPECT_EQ(from_low->round_trip_seconds, 0);
}

// Goal: a partner that goes is noticed at once, whatever it has done before.
// Method: it opens one connection after the other, up to the k-th, and then closes all.
TEST(PairTest, APartnerThatGoesIsNoticedInEveryLeg) {
  const Identity low{kToken, 1, 4};
  const Identity high{kToken, 2, 4};
  for (int line_count = 1; line_count <= 2; ++line_count) {
    const auto listener = Listening(low);
    std::thread partner([&] {
      std::vector<Connection> lines;
      for (const Line line : {Line::kPair, Line::kRoundTrips}) {
        if (static_cast<int>(lines.size()) == line_count) break;
        auto connection = Connect(high, 1, listener->endpoint(), line, 0, Deadline::After(kLong));
        CHECK_OK(connection.status());
        lines.push_back(*std::move(connection));
      }
      // The listener waits for another leg, or for a ping, of whoever is gone.
    });
    const absl::Status status = MeasurePair(low, *listener,
                                            {.round = 0,
                                             .partner_rank = 2,
                                             .partner = {},
                                             .connects = false,
                                             .duration = absl::Milliseconds(40)})
                                    .status();
    partner.join();
    // Not that it was waited for in vain.
    EXPECT_THAT(status, StatusIs(StatusCode::kUnavailable));
  }
}

// ---- The coordinator ----

// What a node of these tests does with a message; false: it goes.
using Behaviour = std::function<bool(Channel&, const Message&)>;

bool Behave(Channel& channel, const Message& message) {
  switch (message.type) {
    case MessageType::kReadClocks: {
      const ClockReading now = ReadClocks();
      CHECK_OK(channel.Send(MessageType::kClocks,
                            ClocksMessage{now.realtime_ns, now.monotonic_ns, 0},
                            Deadline::After(kLong)));
      return true;
    }
    case MessageType::kMeasureAlone:
      CHECK_OK(channel.Send(MessageType::kAlone,
                            AloneMessage{.values = {1e9, 1e9, 1e9, 0, 0, 0}, .measured = 7},
                            Deadline::After(kLong)));
      return true;
    case MessageType::kMeasurePair:
      CHECK_OK(channel.Send(MessageType::kPair,
                            PairMessage{.one_way_bytes_per_second = 1e9,
                                        .both_ways_bytes_per_second = 1e9,
                                        .round_trip_seconds = 1e-5,
                                        .round_trip_p99_seconds = 1e-4},
                            Deadline::After(kLong)));
      return true;
    case MessageType::kEnd:
      return false;
    default:
      return true;
  }
}

struct Outing {
  Report report;
  std::map<uint32_t, EndMessage> ends;  // what each node heard, if it stayed
};

// How long a coordinator waits for nodes to come, and for each when they have.
struct Patience {
  absl::Duration join = kLong;
  absl::Duration alone = kLong;
};

// A coordinator and nodes that behave, but for `odd_rank`, which behaves as `odd`.
Outing RunWith(uint32_t node_count, uint32_t odd_rank, const Behaviour& odd,
               std::vector<uint32_t> ranks = {}, Patience patience = {}) {
  auto listener = Listening({kToken, 0, node_count});
  const Endpoint rank_0 = listener->endpoint();
  if (ranks.empty()) {
    for (uint32_t rank = 0; rank < node_count; ++rank) ranks.push_back(rank);
  }
  std::vector<std::optional<EndMessage>> ends(ranks.size());
  std::vector<std::thread> nodes;
  for (size_t at = 0; at < ranks.size(); ++at) {
    nodes.emplace_back([&, at] {
      const uint32_t rank = ranks[at];
      auto connection =
          Connect({kToken, rank, node_count}, 0, rank_0, Line::kControl, 0, Deadline::After(kLong));
      if (!connection.ok()) return;  // the second one of a rank
      Channel channel(*std::move(connection), Channel::End::kConnecting);
      if (!channel
               .Send(
                   MessageType::kReady,
                   ReadyMessage{.pair_port = 1, .host = FixedText<64>("h" + std::to_string(rank))},
                   Deadline::After(kLong))
               .ok()) {
        return;
      }
      while (true) {
        const absl::StatusOr<Message> message = channel.Receive(Deadline::After(kLong));
        if (!message.ok()) return;
        if (message->type == MessageType::kEnd) ends[at] = *message->As<EndMessage>();
        if (!(rank == odd_rank ? odd : Behave)(channel, *message)) return;
      }
    });
  }
  Outing outing;
  outing.report = Coordinate({.node_count = node_count,
                              .measure_for = absl::Milliseconds(10),
                              .join_within = patience.join,
                              .alone_patience = patience.alone},
                             *listener);
  listener.reset();  // whoever comes too late finds nobody
  for (std::thread& node : nodes) node.join();
  for (size_t at = 0; at < ranks.size(); ++at) {
    if (ends[at].has_value()) outing.ends[ranks[at]] = *ends[at];
  }
  return outing;
}

TEST(CoordinatorTest, NodesThatAreAlikeAreFine) {
  for (const uint32_t node_count : {1U, 2U, 3U, 4U, 7U}) {
    const Outing outing = RunWith(node_count, 0, Behave);
    EXPECT_EQ(outing.report.outcome, Outcome::kFine) << outing.report.failure;
    EXPECT_EQ(outing.report.job.pairs.size(), node_count == 1   ? 0
                                              : node_count == 2 ? 1
                                                                : node_count);
    ASSERT_EQ(outing.ends.size(), node_count);
    for (const auto& [rank, end] : outing.ends) EXPECT_EQ(end.outcome, Outcome::kFine);
  }
}

// Goal: whatever a node does wrong, and at whatever message, it is named, and all others hear that
// it could not be done, and why.
TEST(CoordinatorTest, ANodeThatFailsIsNamedToAll) {
  const std::vector<std::pair<std::string, Behaviour>> faults = {
      {"is lost", [](Channel&, const Message&) { return false; }},
      {"unexpected message",
       [](Channel& channel, const Message&) {
         return channel.Send(MessageType::kReady, ReadyMessage{}, Deadline::After(kLong)).ok();
       }},
      {"unexpected message",
       [](Channel& channel, const Message& message) {
         // The right type with the wrong size.
         const auto type = static_cast<MessageType>(static_cast<uint32_t>(message.type) + 1);
         return channel.Send(type, uint16_t{1}, Deadline::After(kLong)).ok();
       }},
  };
  for (const MessageType at :
       {MessageType::kReadClocks, MessageType::kMeasureAlone, MessageType::kMeasurePair}) {
    for (const auto& [expected, fault] : faults) {
      const Outing outing =
          RunWith(4, 2, [&, act = fault](Channel& channel, const Message& message) {
            return message.type == at ? act(channel, message) : Behave(channel, message);
          });
      EXPECT_EQ(outing.report.outcome, Outcome::kFailed);
      EXPECT_THAT(outing.report.failure, HasSubstr("rank 2 (h2) is lost"));
      EXPECT_THAT(outing.report.failure, HasSubstr(expected));
      EXPECT_THAT(outing.report.missing, ElementsAre(2));
      for (const uint32_t rank : {0U, 1U, 3U}) {
        ASSERT_TRUE(outing.ends.contains(rank)) << rank;
        EXPECT_EQ(outing.ends.at(rank).outcome, Outcome::kFailed);
        EXPECT_EQ(outing.ends.at(rank).text.ToString(), outing.report.failure);
      }
    }
  }
}

TEST(CoordinatorTest, ANodeThatStaysSilentIsNamed) {
  Outing outing;
  // With more patience if others were not fast enough.
  for (absl::Duration alone = absl::Milliseconds(300); alone < kLong; alone *= 4) {
    outing =
        RunWith(3, 1,
                [](Channel& channel, const Message& message) {
                  return message.type == MessageType::kMeasureAlone || Behave(channel, message);
                },
                {}, {.alone = alone});
    if (outing.report.missing == std::vector<uint32_t>{1}) break;
  }
  EXPECT_EQ(outing.report.outcome, Outcome::kFailed);
  EXPECT_THAT(outing.report.failure, HasSubstr("no answer from rank 1 (h1) within"));
  EXPECT_THAT(outing.report.missing, ElementsAre(1));
  // It hears of it too, if it listens.
  EXPECT_EQ(outing.ends.size(), 3U);
}

// Goal: a pair that could not be measured does not end it: it is a finding, of the pair or, if both
// pairs of a node failed, of the node.
TEST(CoordinatorTest, APairThatCannotBeMeasuredIsOdd) {
  for (const uint32_t failing_rounds : {1U, 2U}) {
    const Outing outing = RunWith(4, 2, [&](Channel& channel, const Message& message) {
      if (message.type != MessageType::kMeasurePair) return Behave(channel, message);
      if (message.As<MeasurePairMessage>()->round >= failing_rounds) {
        return Behave(channel, message);
      }
      return channel
          .Send(MessageType::kPair, PairMessage{.error = FixedText<512>("no route to host")},
                Deadline::After(kLong))
          .ok();
    });
    EXPECT_EQ(outing.report.outcome, Outcome::kOdd) << outing.report.failure;
    ASSERT_EQ(outing.report.findings.size(), 1U);
    const Finding& finding = outing.report.findings[0];
    EXPECT_EQ(finding.evidence[0].metric, "connection");
    EXPECT_THAT(finding.evidence[0].text, HasSubstr("rank 2: no route to host"));
    if (failing_rounds == 1) {
      EXPECT_THAT(finding.ranks, ElementsAre(2, 3));
    } else {
      EXPECT_THAT(finding.ranks, ElementsAre(2));
    }
    for (const auto& [rank, end] : outing.ends) EXPECT_EQ(end.outcome, Outcome::kOdd);
    EXPECT_EQ(outing.ends.size(), 4U);
  }
}

TEST(CoordinatorTest, AValueThatCannotBeIsNamed) {
  for (const double value : {std::nan(""), -1.0, std::numeric_limits<double>::infinity()}) {
    const Outing outing = RunWith(3, 1, [value](Channel& channel, const Message& message) {
      if (message.type != MessageType::kMeasureAlone) return Behave(channel, message);
      return channel
          .Send(MessageType::kAlone, AloneMessage{.values = {value}, .measured = 1},
                Deadline::After(kLong))
          .ok();
    });
    EXPECT_EQ(outing.report.outcome, Outcome::kFailed);
    EXPECT_THAT(outing.report.failure, HasSubstr("rank 1 (h1) is lost after it had measured"));
  }
}

TEST(CoordinatorTest, ARankThatComesTwiceIsNamed) {
  const Outing outing = RunWith(3, 0, Behave, {0, 1, 1});
  EXPECT_EQ(outing.report.outcome, Outcome::kFailed);
  EXPECT_THAT(outing.report.failure, HasSubstr("two processes say that they are rank 1"));
}

TEST(CoordinatorTest, AMissingNodeIsNamed) {
  Outing outing;
  absl::Duration join = absl::Seconds(1);
  // With more patience if the others were not fast enough.
  for (; join < kLong; join *= 4) {
    outing = RunWith(3, 0, Behave, {0, 2}, {.join = join});
    if (outing.report.missing == std::vector<uint32_t>{1}) break;
  }
  EXPECT_EQ(outing.report.outcome, Outcome::kFailed);
  EXPECT_THAT(outing.report.failure, HasSubstr("2 of 3 nodes came within " +
                                               absl::FormatDuration(join) + "; missing: rank 1"));
  EXPECT_THAT(outing.report.missing, ElementsAre(1));
}

// ---- The environment ----

absl::StatusOr<Place> Read(const std::map<std::string, std::string>& environment) {
  return ReadPlace([&](const char* name) -> const char* {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

const std::map<std::string, std::string> kTorchrun = {{"RANK", "2"},
                                                      {"WORLD_SIZE", "4"},
                                                      {"LOCAL_RANK", "0"},
                                                      {"GROUP_RANK", "2"},
                                                      {"LOCAL_WORLD_SIZE", "1"},
                                                      {"MASTER_ADDR", "node-a"},
                                                      {"MASTER_PORT", "29500"},
                                                      {"HOLDFAST_PREFLIGHT_TOKEN", kToken},
                                                      {"HOLDFAST_NODE", "node-c"}};

TEST(PlaceTest, ComesFromTorchrunOrSrun) {
  ASSERT_OK_AND_ASSIGN(const Place torchrun, Read(kTorchrun));
  EXPECT_EQ(torchrun.rank, 2U);
  EXPECT_EQ(torchrun.node_count, 4U);
  EXPECT_EQ(torchrun.master_host, "node-a");
  EXPECT_EQ(torchrun.master_port, 29500);
  EXPECT_EQ(torchrun.token, kToken);
  EXPECT_EQ(torchrun.host, "node-c");
  ASSERT_OK_AND_ASSIGN(const Place srun, Read({{"SLURM_PROCID", "3"},
                                               {"SLURM_STEP_NUM_TASKS", "5"},
                                               {"SLURM_NTASKS", "9"},
                                               {"SLURM_LOCALID", "0"},
                                               {"MASTER_ADDR", "node-a"},
                                               {"MASTER_PORT", "1"}}));
  EXPECT_EQ(srun.rank, 3U);
  EXPECT_EQ(srun.node_count, 5U);
  EXPECT_EQ(srun.token, "");
  EXPECT_FALSE(srun.host.empty());
}

TEST(PlaceTest, WhatIsMissingOrWrongIsNamed) {
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) {
    auto environment = kTorchrun;
    environment.erase(name);
    EXPECT_THAT(Read(environment).status(),
                StatusIs(StatusCode::kInvalidArgument, HasSubstr(name)));
  }
  for (const auto& [name, value] :
       std::vector<std::pair<std::string, std::string>>{{"RANK", "4"},
                                                        {"RANK", "-1"},
                                                        {"RANK", "two"},
                                                        {"RANK", ""},
                                                        {"WORLD_SIZE", "0"},
                                                        {"WORLD_SIZE", "10001"},
                                                        {"MASTER_PORT", "0"},
                                                        {"MASTER_PORT", "65536"},
                                                        {"MASTER_ADDR", ""},
                                                        {"LOCAL_RANK", "1"},
                                                        {"GROUP_RANK", "1"},
                                                        {"LOCAL_WORLD_SIZE", "8"},
                                                        {"SLURM_LOCALID", "3"},
                                                        {"LOCAL_RANK", "x"}}) {
    auto environment = kTorchrun;
    environment[name] = value;
    EXPECT_THAT(Read(environment).status(), StatusIs(StatusCode::kInvalidArgument, HasSubstr(name)))
        << name << "=" << value;
  }
}

TEST(RunPreflightTest, WithoutATokenNothingLeavesTheMachine) {
  const auto file_system = NewPosixFileSystem();
  for (const std::string& token : {std::string(), std::string("too short")}) {
    Place place{.rank = 0, .node_count = 2, .master_host = "192.0.2.1", .master_port = 1};
    place.token = token;
    EXPECT_THAT(RunPreflight(*file_system, place, {}).status(),
                StatusIs(StatusCode::kInvalidArgument, HasSubstr("HOLDFAST_PREFLIGHT_TOKEN")));
  }
  Place place{.rank = 0, .node_count = 2, .master_host = "127.0.0.1", .master_port = 1};
  place.token = "too short";
  EXPECT_THAT(RunPreflight(*file_system, place, {}).status(),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("HOLDFAST_PREFLIGHT_TOKEN")));
}

TEST(RunPreflightTest, TwoNodesOnLoopbackFindEachOther) {
  const auto file_system = NewPosixFileSystem();
  // Rank 0 takes the first free port from here on, whoever takes this one in between.
  const uint16_t port = Listening({kToken, 0, 2})->endpoint().port();
  RunOptions options;
  options.measure_for = absl::Milliseconds(200);
  options.join_within = kLong;
  options.slow_ratio = 1e6;  // no measured speed decides
  std::vector<absl::StatusOr<Result>> results(2, absl::UnknownError(""));
  const auto run = [&](uint32_t rank) {
    results[rank] = RunPreflight(
        *file_system,
        {.rank = rank, .node_count = 2, .master_host = "127.0.0.1", .master_port = port}, options);
  };
  std::thread other(run, 1);
  run(0);
  other.join();
  for (const absl::StatusOr<Result>& result : results) {
    ASSERT_THAT(result.status(), IsOk());
    EXPECT_EQ(result->ending.outcome, Outcome::kFine) << result->ending.text;
  }
  EXPECT_FALSE(results[1]->report.has_value());
  ASSERT_TRUE(results[0]->report.has_value());
  EXPECT_EQ(results[0]->report->job.pairs.size(), 1U);
}

}  // namespace
}  // namespace holdfast::preflight
