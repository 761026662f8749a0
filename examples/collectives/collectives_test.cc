// Goal: every operation gives what a naive computation gives, whatever the number of ranks and the
// size; communicators and handles do not disturb each other; what goes wrong names who and what.
// Method: ranks are threads with a Context each; where a rank must die, processes.
#include "examples/collectives/collectives.h"

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <latch>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/collectives/device.h"
#include "examples/collectives/fabric.h"
#include "examples/collectives/proxy.h"
#include "examples/collectives/ranks_testing.h"
#include "examples/collectives/wire.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace collectives {
namespace {

using testing::HasSubstr;

constexpr size_t kSizes[] = {0, 1, 2, 3, 5, 7, 64, 101, 4099};

template <typename Element>
void CheckReductions(Communicator& communicator, uint32_t rank, uint32_t size, size_t count) {
  std::vector<Element> data = Filled<Element>(rank, count);
  ASSERT_TRUE(communicator.AllReduce(std::span(data)).Wait().ok());
  EXPECT_EQ(data, Sum<Element>(size, count));

  data = Filled<Element>(rank, count);
  ASSERT_TRUE(communicator.ReduceScatter(std::span(data)).Wait().ok());
  const Segment own = SegmentOf(count, size, rank);
  for (size_t i = own.begin; i < own.begin + own.count; ++i) {
    EXPECT_EQ(data[i], Sum<Element>(size, count)[i]) << i;
  }
}

TEST(Collectives, EveryOperationEqualsANaiveOneForEverySizeAndWorld) {
  for (uint32_t size = 1; size <= 5; ++size) {
    World world(size);
    RunRanks(world, [&](Context& context, uint32_t rank) {
      auto communicator = context.CreateCommunicator("world");
      ASSERT_TRUE(communicator.ok()) << communicator.status();
      for (const size_t count : kSizes) {
        SCOPED_TRACE(absl::StrCat("world ", size, " rank ", rank, " count ", count));
        CheckReductions<int64_t>(**communicator, rank, size, count);
        CheckReductions<float>(**communicator, rank, size, count);

        std::vector<uint16_t> gathered(count, 0);
        const Segment own = SegmentOf(count, size, rank);
        for (size_t i = own.begin; i < own.begin + own.count; ++i)
          gathered[i] = Value<uint16_t>(7, i);
        ASSERT_TRUE((*communicator)->AllGather(std::span(gathered)).Wait().ok());
        EXPECT_EQ(gathered, Filled<uint16_t>(7, count));

        for (uint32_t root = 0; root < size; ++root) {
          std::vector<char> text = Filled<char>(rank, count);
          ASSERT_TRUE((*communicator)
                          ->Broadcast(std::as_writable_bytes(std::span(text)), root)
                          .Wait()
                          .ok());
          EXPECT_EQ(text, Filled<char>(root, count));
        }
        ASSERT_TRUE((*communicator)->Barrier().Wait().ok());
      }
    });
  }
}

TEST(Collectives, SegmentsCoverEveryElementOnceAndDifferByOneAtMost) {
  for (size_t count = 0; count < 40; ++count) {
    for (size_t parts = 1; parts < 9; ++parts) {
      size_t begin = 0;
      for (size_t part = 0; part < parts; ++part) {
        const Segment segment = SegmentOf(count, parts, part);
        EXPECT_EQ(segment.begin, begin);
        EXPECT_GE(segment.count, count / parts);
        EXPECT_LE(segment.count, count / parts + 1);
        begin += segment.count;
      }
      EXPECT_EQ(begin, count);
    }
  }
}

// Nobody may leave a barrier before the last has come.
TEST(Collectives, BarrierHoldsUntilEverybodyHasCome) {
  for (uint32_t size = 2; size <= 5; ++size) {
    World world(size);
    std::atomic<uint32_t> arrived = 0;
    RunRanks(world, [&](Context& context, uint32_t) {
      auto communicator = *context.CreateCommunicator("world");
      for (uint32_t round = 1; round <= 20; ++round) {
        ++arrived;
        ASSERT_EQ(communicator->Barrier().Wait(), absl::OkStatus());
        EXPECT_GE(arrived, round * size);
      }
    });
  }
}

TEST(Collectives, CommunicatorsOfOneJobLiveAtOnceAndHandlesEndInAnyOrder) {
  World world(4);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto all = *context.CreateCommunicator("all");
    auto reversed = *context.CreateCommunicator("reversed", {3, 2, 1, 0});
    const std::vector<uint32_t> row = {rank / 2 * 2, rank / 2 * 2 + 1};
    auto rows = *context.CreateCommunicator(absl::StrCat("row", rank / 2), row);
    auto columns =
        *context.CreateCommunicator(absl::StrCat("column", rank % 2), {rank % 2, rank % 2 + 2});
    EXPECT_EQ(reversed->rank(), 3 - rank);
    EXPECT_EQ(rows->size(), 2U);

    constexpr size_t kRounds = 10;
    constexpr size_t kCount = 1009;
    std::vector<std::vector<int64_t>> data;
    for (size_t i = 0; i < kRounds * 4; ++i) data.push_back(Filled<int64_t>(rank, kCount));
    std::vector<Handle> handles;
    for (size_t i = 0; i < kRounds; ++i) {
      handles.push_back(columns->AllReduce(std::span(data[4 * i])));
      handles.push_back(rows->AllReduce(std::span(data[4 * i + 1])));
      handles.push_back(reversed->AllReduce(std::span(data[4 * i + 2])));
      handles.push_back(all->AllReduce(std::span(data[4 * i + 3])));
    }
    for (size_t i = handles.size(); i-- > 0;) {
      ASSERT_TRUE(handles[i].Wait().ok());
      EXPECT_TRUE(handles[i].Done());
    }
    const int64_t members[4] = {rank % 2 + 1 + rank % 2 + 3, 2 * row[0] + 3, 10, 10};
    for (size_t i = 0; i < data.size(); ++i) {
      for (size_t k = 0; k < kCount; ++k) {
        ASSERT_EQ(data[i][k], members[i % 4] * static_cast<int64_t>(k % 251 + 1)) << i << " " << k;
      }
    }
  });
}

TEST(Collectives, ANameCanBeUsedAgainAfterItsCommunicatorIsGone) {
  World world(3);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    for (int round = 0; round < 5; ++round) {
      auto communicator = context.CreateCommunicator("again");
      ASSERT_TRUE(communicator.ok()) << communicator.status();
      EXPECT_TRUE(absl::IsAlreadyExists(context.CreateCommunicator("again").status()));
      std::vector<int64_t> data = {rank};
      ASSERT_TRUE((*communicator)->AllReduce(std::span(data)).Wait().ok());
      EXPECT_EQ(data[0], 3);
    }
  });
}

// Larger than what the kernel buffers, everybody to everybody at once: only a proxy that receives
// while it sends gets through.
TEST(Collectives, SendsAndReceivesOfAllPairsAtOnceDoNotBlockEachOther) {
  World world(3);
  world.options.chunk_bytes = size_t{64} << 10;
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto communicator = *context.CreateCommunicator("world");
    constexpr size_t kCount = size_t{1} << 20;
    std::vector<int64_t> mine = Filled<int64_t>(rank, kCount);
    std::vector<std::vector<int64_t>> theirs(3, std::vector<int64_t>(kCount));
    std::vector<Handle> handles;
    for (uint32_t peer = 0; peer < 3; ++peer) {
      if (peer == rank) continue;
      handles.push_back(communicator->Send(std::as_bytes(std::span(mine)), peer));
      handles.push_back(communicator->Send({}, peer));
      handles.push_back(
          communicator->Receive(std::as_writable_bytes(std::span(theirs[peer])), peer));
      handles.push_back(communicator->Receive({}, peer));
    }
    for (const Handle& handle : handles) ASSERT_TRUE(handle.Wait().ok());
    for (uint32_t peer = 0; peer < 3; ++peer) {
      if (peer == rank) continue;
      EXPECT_EQ(theirs[peer], Filled<int64_t>(peer, kCount));
    }
    ASSERT_TRUE(communicator->Barrier().Wait().ok());
  });
}

TEST(Collectives, RanksThatDisagreeAboutAnOperationAreToldBothSides) {
  World world(2);
  std::latch both_failed(2);
  std::atomic<int> told = 0;
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto communicator = *context.CreateCommunicator("world");
    std::vector<int64_t> data(rank == 0 ? 16 : 24);
    const absl::Status status = communicator->AllReduce(std::span(data)).Wait();
    EXPECT_FALSE(status.ok());
    // One of the two may see the other's end first.
    if (absl::IsFailedPrecondition(status)) {
      ++told;
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr(rank == 0 ? "of 64 bytes, found" : "of 96 bytes, found"));
      EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("rank ", 1 - rank)));
    }
    EXPECT_EQ(communicator->Barrier().Wait(), status) << "a broken communicator stays broken";
    both_failed.arrive_and_wait();
  });
  EXPECT_GE(told, 1);
}

TEST(Collectives, RanksThatDisagreeAboutTheListOfRanksAreTold) {
  World world(2);
  std::latch both_failed(2);
  std::atomic<int> told = 0;
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto communicator = rank == 0 ? *context.CreateCommunicator("pair", {0, 1})
                                  : *context.CreateCommunicator("pair", {1, 0});
    const absl::Status status = communicator->Barrier().Wait();
    EXPECT_FALSE(status.ok());
    if (absl::IsFailedPrecondition(status)) {
      ++told;
      EXPECT_THAT(std::string(status.message()), HasSubstr("another list of ranks"));
    }
    both_failed.arrive_and_wait();
  });
  EXPECT_GE(told, 1);
}

TEST(Collectives, ADeadlineNamesWhomTheOperationWaitedFor) {
  World world(3);
  world.options.operation_timeout = absl::Milliseconds(100);
  std::latch failed(3);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto communicator = *context.CreateCommunicator("world");
    if (rank == 2) {
      const absl::Status status = communicator->Barrier().Wait();
      EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("receive from rank 1"));
    }
    failed.arrive_and_wait();
  });
}

TEST(Collectives, WrongArgumentsAreRefusedAndBreakNothing) {
  World world(2);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    EXPECT_TRUE(absl::IsInvalidArgument(context.CreateCommunicator("").status()));
    EXPECT_TRUE(absl::IsInvalidArgument(context.CreateCommunicator("x", {0, 0, 1}).status()));
    EXPECT_TRUE(absl::IsInvalidArgument(context.CreateCommunicator("x", {0, 1, 2}).status()));
    EXPECT_TRUE(absl::IsInvalidArgument(context.CreateCommunicator("x", {1 - rank}).status()));
    auto communicator = *context.CreateCommunicator("world");
    std::vector<std::byte> bytes(10);
    EXPECT_TRUE(absl::IsInvalidArgument(communicator->AllGather(bytes, 4).Wait()));
    EXPECT_TRUE(absl::IsInvalidArgument(communicator->Broadcast(bytes, 2).Wait()));
    EXPECT_TRUE(absl::IsInvalidArgument(communicator->Send(bytes, rank).Wait()));
    EXPECT_TRUE(absl::IsInvalidArgument(communicator->Receive(bytes, 2).Wait()));
    EXPECT_TRUE(communicator->Barrier().Wait().ok());
  });
}

TEST(Collectives, DestroyingACommunicatorCancelsWhatIsUnfinished) {
  World world(2);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto communicator = *context.CreateCommunicator("world");
    std::vector<std::byte> bytes(10);
    const Handle handle = communicator->Receive(bytes, 1 - rank);
    communicator.reset();
    EXPECT_TRUE(absl::IsCancelled(handle.Wait()));
  });
}

// Rendezvous.

TEST(Rendezvous, ARankThatDoesNotComeIsCountedInTheError) {
  World world(3);
  world.options.rendezvous_timeout = absl::Milliseconds(50);
  const absl::Status status = Context::Create(world.ForRank(0)).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("1 of 3 ranks"));

  World empty(3);
  empty.options.rendezvous_timeout = absl::Milliseconds(50);
  empty.listener.Close();
  EXPECT_THAT(std::string(Context::Create(empty.ForRank(1)).status().message()),
              HasSubstr("no rank 0"));
}

TEST(Rendezvous, StrangersAtThePortAreSentAwayAndDisturbNobody) {
  World world(2);
  std::vector<Socket> strangers;
  for (const char* text :
       {"", "GET / HTTP/1.0\r\n\r\n and more than the bytes of a hello, for sure"}) {
    strangers.push_back(*BeginConnect({0x7f000001, world.options.master_port}, 0x7f000001));
    ASSERT_TRUE(
        SendAll(strangers.back(), std::as_bytes(std::span(text, strlen(text))), Deadline::max())
            .ok());
    if (text[0] == '\0') strangers.pop_back();
  }
  RunRanks(world, [&](Context& context, uint32_t) {
    EXPECT_TRUE((*context.CreateCommunicator("world"))->Barrier().Wait().ok());
  });
}

TEST(Rendezvous, APortThatAnotherJobHoldsIsPassedOver) {
  // Rank 0 of another job waits at the port for its rank 1, which never comes.
  World other(2);
  other.options.token = "another job";
  std::thread other_job([options = other.ForRank(0)]() mutable {
    options.rendezvous_timeout = absl::Seconds(1);
    EXPECT_FALSE(Context::Create(options).ok());
  });
  World world(2);
  world.listener.Close();
  world.options.master_port = other.options.master_port;
  RunRanks(world, [&](Context& context, uint32_t) {
    EXPECT_TRUE((*context.CreateCommunicator("world"))->Barrier().Wait().ok());
  });
  other_job.join();
}

TEST(Rendezvous, RanksOfAnotherWorldSizeAreRefused) {
  World world(2);
  Options own = world.ForRank(1);
  Options other = own;
  other.world_size = 3;
  std::thread rank_0([options = world.ForRank(0)] {
    auto context = *Context::Create(options);
    EXPECT_TRUE((*context->CreateCommunicator("world"))->Barrier().Wait().ok());
  });
  EXPECT_THAT(std::string(Context::Create(other).status().message()),
              HasSubstr("rank 0 has world size 2, rank 1 has 3"));
  auto context = *Context::Create(own);
  EXPECT_TRUE((*context->CreateCommunicator("world"))->Barrier().Wait().ok());
  rank_0.join();
}

// A lost peer. Ranks are processes where one must die; each writes what it got into a pipe.

TEST(LostPeer, AKilledRankIsNamedByAllOthersInEveryCommunicator) {
  constexpr uint32_t kSize = 4;
  for (uint32_t victim = 0; victim < kSize; ++victim) {
    World world(kSize);
    Children children;
    Fork(world, children, [&](const Options& options, int report) {
      auto context = *Context::Create(options);
      auto all = *context->CreateCommunicator("all");
      auto others = *context->CreateCommunicator("reversed", {3, 2, 1, 0});
      Report(report, all->Barrier().Wait().ok() ? "ready" : "failed");
      if (options.rank == victim) pause();
      std::vector<int64_t> data(100'000);
      const Handle first = all->AllReduce(std::span(data));
      std::vector<int64_t> more(100'000);
      const Handle second = others->AllReduce(std::span(more));
      // Everybody leaves as soon as it fails, so that ranks die of each other.
      const absl::Status status = second.Wait();
      Report(report, status.ToString());
      Report(report, first.Wait().ToString());
    });
    for (uint32_t rank = 0; rank < kSize; ++rank) ASSERT_EQ(children.ReadLine(rank), "ready");
    ASSERT_EQ(kill(children.pids[victim], SIGKILL), 0);
    for (uint32_t rank = 0; rank < kSize; ++rank) {
      if (rank == victim) continue;
      for (const char* name : {"'reversed'", "'all'"}) {
        const std::string line = children.ReadLine(rank);
        EXPECT_THAT(line, HasSubstr(absl::StrCat("rank ", victim, " (127.0.0.1:"))) << rank;
        EXPECT_THAT(line, HasSubstr(") is lost")) << rank;
        EXPECT_THAT(line, HasSubstr(name)) << rank;
      }
    }
  }
}

TEST(LostPeer, InHangModeTheOperationStaysUnfinishedAndOtherLinksGoOn) {
  World world(3);
  world.options.lost_peer = LostPeer::kHang;
  Children children;
  Fork(world, children, [&](const Options& options, int report) {
    // Outlives the communicator, whose operation never ends.
    std::vector<int64_t> data(100'000);
    auto fabric = *Fabric::Create(options);
    auto device = Device::Start();
    Communicator all(*Proxy::Create(*fabric, *device, nullptr, "all", {0, 1, 2}, {{0, 1, 2}}));
    Report(report, all.Barrier().Wait().ok() ? "ready" : "failed");
    if (options.rank == 2) pause();
    const Handle hanging = all.AllReduce(std::span(data));
    // The loss is known ...
    while (fabric->Lost().empty()) static_cast<void>(poll(nullptr, 0, 1));
    // ... and both proxies have worked since.
    for (int i = 0; i < 10; ++i) {
      std::byte byte{7};
      const Handle handle = options.rank == 0 ? all.Send(std::span(&byte, 1), 1)
                                              : all.Receive(std::span(&byte, 1), 0);
      if (!handle.Wait().ok()) Report(report, "send or receive failed");
    }
    Report(report, hanging.Done() ? "ended" : "hangs");
    // Neither leaves before both have reported.
    std::byte byte{7};
    static_cast<void>(
        (options.rank == 1 ? all.Send(std::span(&byte, 1), 0) : all.Receive(std::span(&byte, 1), 1))
            .Wait());
  });
  for (uint32_t rank = 0; rank < 3; ++rank) ASSERT_EQ(children.ReadLine(rank), "ready");
  ASSERT_EQ(kill(children.pids[2], SIGKILL), 0);
  for (uint32_t rank = 0; rank < 2; ++rank) EXPECT_EQ(children.ReadLine(rank), "hangs");
}

TEST(LostPeer, ARankThatLeavesInGoodOrderIsNoLoss) {
  World world(3);
  std::latch left(1);
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < 3; ++rank) {
    threads.emplace_back([&, options = world.ForRank(rank), rank] {
      auto context = *Context::Create(options);
      auto all = *context->CreateCommunicator("all");
      auto pair = rank < 2 ? *context->CreateCommunicator("pair", {0, 1}) : nullptr;
      EXPECT_TRUE(all->Barrier().Wait().ok());
      if (rank == 2) {
        all.reset();
        context.reset();
        left.count_down();
        return;
      }
      left.wait();
      EXPECT_TRUE(pair->Barrier().Wait().ok());
      const absl::Status status = all->Barrier().Wait();
      EXPECT_TRUE(absl::IsUnavailable(status)) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("has left"));
      EXPECT_TRUE(pair->Barrier().Wait().ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// It opens no links any more: whoever waits for one waits no longer.
TEST(LostPeer, ARankThatLeavesBeforeItHasSentAnythingIsNotWaitedFor) {
  World world(2);
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto ring = *context.CreateCommunicator("ring");
    auto pair = *context.CreateCommunicator("pair");
    if (rank == 1) return;
    std::vector<std::byte> data(100);
    for (const Handle& handle : {ring->Broadcast(data, 1), pair->Receive(data, 1)}) {
      const absl::Status status = handle.Wait();
      EXPECT_TRUE(absl::IsUnavailable(status)) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("has left without sending"));
    }
  });
}

// What it has sent before is not lost: a send that has ended needs its sender no more.
TEST(LostPeer, WhatARankHasSentBeforeItLeftArrives) {
  for (const size_t bytes : {size_t{1}, size_t{500}, size_t{100'000}}) {
    World world(2);
    world.options.chunk_bytes = 16384;
    RunRanks(world, [&](Context& context, uint32_t rank) {
      auto pair = *context.CreateCommunicator("pair");
      std::vector<std::byte> data(bytes, std::byte{7});
      if (rank == 1) {
        // Somebody has places for it, which it never takes: its link is closed with credit unread.
        EXPECT_TRUE(pair->Send(data, 0).Wait().ok());
        return;
      }
      std::vector<std::byte> received(bytes);
      std::vector<std::byte> never(bytes);
      const Handle first = pair->Receive(received, 1);
      const Handle second = pair->Receive(never, 1);
      EXPECT_TRUE(first.Wait().ok());
      EXPECT_EQ(received, data);
      EXPECT_TRUE(absl::IsUnavailable(second.Wait()));
    });
  }
}

}  // namespace
}  // namespace collectives
