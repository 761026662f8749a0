// Goal: whatever the order of a ring, and with several at once, every operation gives what a naive
// computation gives; all-to-all too.
// Method: every cyclic order of 2 to 5 ranks, alone and together with its reverse.
#include <algorithm>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/collectives/collectives.h"
#include "examples/collectives/ranks_testing.h"
#include "examples/collectives/ring.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace collectives {
namespace {

using testing::HasSubstr;

template <typename Element>
void CheckReductions(Communicator& communicator, size_t count) {
  const uint32_t rank = communicator.rank();
  const std::vector<Element> sum = Sum<Element>(communicator.size(), count);
  std::vector<Element> data = Filled<Element>(rank, count);
  ASSERT_EQ(communicator.AllReduce(std::span(data)).Wait(), absl::OkStatus());
  EXPECT_EQ(data, sum);
  data = Filled<Element>(rank, count);
  ASSERT_EQ(communicator.ReduceScatter(std::span(data)).Wait(), absl::OkStatus());
  const Segment own = SegmentOf(count, communicator.size(), rank);
  for (size_t i = own.begin; i < own.begin + own.count; ++i) EXPECT_EQ(data[i], sum[i]) << i;
}

void CheckCopies(Communicator& communicator, size_t count) {
  std::vector<uint16_t> gathered(count, 0);
  const Segment own = SegmentOf(count, communicator.size(), communicator.rank());
  for (size_t i = own.begin; i < own.begin + own.count; ++i) gathered[i] = Value<uint16_t>(7, i);
  ASSERT_EQ(communicator.AllGather(std::span(gathered)).Wait(), absl::OkStatus());
  EXPECT_EQ(gathered, Filled<uint16_t>(7, count));
  for (uint32_t root = 0; root < communicator.size(); ++root) {
    std::vector<char> text = Filled<char>(communicator.rank(), count);
    ASSERT_EQ(communicator.Broadcast(std::as_writable_bytes(std::span(text)), root).Wait(),
              absl::OkStatus());
    EXPECT_EQ(text, Filled<char>(root, count));
  }
}

TEST(Rings, OfEveryOrderAloneAndWithTheirReverseGiveWhatANaiveComputationGives) {
  for (uint32_t size = 2; size <= 5; ++size) {
    std::vector<RingOrder> orders;
    RingOrder order(size);
    std::iota(order.begin(), order.end(), 0u);
    do {
      orders.push_back(order);
    } while (std::next_permutation(order.begin() + 1, order.end()));
    World world(size);
    RunRanks(world, [&](Context& context, uint32_t rank) {
      std::vector<uint32_t> ranks(size);
      std::iota(ranks.begin(), ranks.end(), 0u);
      for (const RingOrder& one : orders) {
        SCOPED_TRACE(absl::StrCat("world ", size, " rank ", rank, " order of ", one[1]));
        const RingOrder reverse(one.rbegin(), one.rend());
        for (const std::vector<RingOrder>& rings :
             {std::vector<RingOrder>{one}, std::vector<RingOrder>{one, reverse}}) {
          auto communicator = context.CreateCommunicator("rings", ranks, rings);
          ASSERT_TRUE(communicator.ok()) << communicator.status();
          for (const size_t count : {size_t{1}, size_t{size - 1}, size_t{101}, size_t{499}}) {
            CheckReductions<int64_t>(**communicator, count);
            CheckReductions<float>(**communicator, count);
            CheckCopies(**communicator, count);
          }
          ASSERT_EQ((*communicator)->Barrier().Wait(), absl::OkStatus());
        }
      }
    });
  }
}

TEST(Rings, WithStridesHaveEveryRankOnceAndShareNoConnectionWhereThereAreEnough) {
  for (uint32_t size = 1; size <= 24; ++size) {
    uint32_t strides = 0;  // that have no divisor in common with size
    for (uint32_t stride = 1; stride < size; ++stride) strides += std::gcd(stride, size) == 1;
    std::set<std::pair<uint32_t, uint32_t>> connections;
    for (uint32_t ring = 0; ring < std::min(strides, 8u); ++ring) {
      RingOrder order = StridedRing(size, ring);
      for (size_t i = 0; i < size; ++i) {
        EXPECT_TRUE(connections.emplace(order[i], order[(i + 1) % size]).second)
            << size << " ranks, ring " << ring;
      }
      std::sort(order.begin(), order.end());
      for (uint32_t i = 0; i < size; ++i) EXPECT_EQ(order[i], i);
    }
    EXPECT_EQ(StridedRing(size, strides), StridedRing(size, 0)) << "over again";
  }
}

TEST(Rings, OrdersThatAreNoneAreRefused) {
  World world(2);
  RunRanks(world, [&](Context& context, uint32_t) {
    for (const std::vector<RingOrder>& rings :
         {std::vector<RingOrder>{}, std::vector<RingOrder>{{0}}, std::vector<RingOrder>{{0, 0}},
          std::vector<RingOrder>{{0, 1}, {0, 2}}, std::vector<RingOrder>(9, {0, 1})}) {
      const absl::Status status = context.CreateCommunicator("x", {0, 1}, rings).status();
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("rings"));
    }
  });
}

TEST(AllToAll, GivesEveryRankTheBlockThatWasMeantForIt) {
  for (uint32_t size = 1; size <= 5; ++size) {
    World world(size);
    RunRanks(world, [&](Context& context, uint32_t rank) {
      auto communicator = *context.CreateCommunicator("world");
      for (const size_t block : {size_t{0}, size_t{1}, size_t{63}, size_t{64}, size_t{1000}}) {
        std::vector<uint32_t> send(size * block);
        std::vector<uint32_t> receive(size * block, 0);
        for (uint32_t i = 0; i < send.size(); ++i) send[i] = rank * 1'000'000 + i;
        ASSERT_EQ(communicator
                      ->AllToAll(std::as_bytes(std::span(send)),
                                 std::as_writable_bytes(std::span(receive)))
                      .Wait(),
                  absl::OkStatus());
        for (uint32_t i = 0; i < receive.size(); ++i) {
          const size_t from = i / block;
          EXPECT_EQ(receive[i], from * 1'000'000 + rank * block + i % block) << "from " << from;
        }
      }
    });
  }
}

TEST(AllToAll, RunsBesidesOtherOperationsAndInTheirOrder) {
  constexpr uint32_t kSize = 4;
  World world(kSize);
  world.options.chunk_bytes = 4096;
  world.options.ring_count = 2;
  RunRanks(world, [&](Context& context, uint32_t rank) {
    auto communicator = *context.CreateCommunicator("world");
    constexpr size_t kCount = 10'000;
    std::vector<std::vector<int64_t>> sent(4, Filled<int64_t>(rank, kCount));
    std::vector<std::vector<int64_t>> received(4, std::vector<int64_t>(kCount));
    std::vector<std::vector<int64_t>> reduced(4, Filled<int64_t>(rank, kCount));
    std::vector<int64_t> from_previous(kCount);
    std::vector<Handle> handles;
    handles.push_back(communicator->Send(std::as_bytes(std::span(sent[0])), (rank + 1) % kSize));
    handles.push_back(communicator->Receive(std::as_writable_bytes(std::span(from_previous)),
                                            (rank + kSize - 1) % kSize));
    for (size_t i = 0; i < 4; ++i) {
      handles.push_back(communicator->AllToAll(std::as_bytes(std::span(sent[i])),
                                               std::as_writable_bytes(std::span(received[i]))));
      handles.push_back(communicator->AllReduce(std::span(reduced[i])));
    }
    for (const Handle& handle : handles) ASSERT_EQ(handle.Wait(), absl::OkStatus());
    EXPECT_EQ(from_previous, Filled<int64_t>((rank + kSize - 1) % kSize, kCount));
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(reduced[i], Sum<int64_t>(kSize, kCount));
      for (size_t k = 0; k < kCount; ++k) {
        const size_t block = kCount / kSize;
        ASSERT_EQ(received[i][k], Value<int64_t>(k / block, rank * block + k % block));
      }
    }
  });
}

TEST(AllToAll, WrongSizesAreRefused) {
  World world(2);
  RunRanks(world, [&](Context& context, uint32_t) {
    auto communicator = *context.CreateCommunicator("world");
    std::vector<std::byte> four(4), six(6), odd(3);
    for (const auto& [send, receive] :
         {std::pair{std::span(four), std::span(six)}, {std::span(odd), std::span(odd)}}) {
      EXPECT_TRUE(absl::IsInvalidArgument(communicator->AllToAll(send, receive).Wait()));
    }
    EXPECT_TRUE(communicator->Barrier().Wait().ok());
  });
}

}  // namespace
}  // namespace collectives
