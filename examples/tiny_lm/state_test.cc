// Goal: however the state is cut, the ranks hold every element once (or all of them, if it is
// replicated), in the memory that is registered, with the same values; and a step of the optimizer
// gives the same bits in every cut.
// Method: all worlds up to 5 against a world of 1.
#include "examples/tiny_lm/state.h"

#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "examples/tiny_lm/exact.h"
#include "examples/tiny_lm/optimizer.h"
#include "examples/tiny_lm/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

constexpr uint64_t kBallastBytes = 7 * kPageBytes - 5;

class StateTest : public testing::TestWithParam<std::tuple<Zero, uint32_t>> {
 protected:
  std::vector<std::unique_ptr<TrainingState>> AllRanks(Zero zero, uint32_t world_size) const {
    std::vector<std::unique_ptr<TrainingState>> ranks;
    for (uint32_t rank = 0; rank < world_size; ++rank) {
      ranks.push_back(std::make_unique<TrainingState>(
          table_, Layout{zero, rank, world_size, kBallastBytes}, 11));
    }
    return ranks;
  }

  // Per (tensor, state): digest of the whole tensor, put together from the ranks' pieces. Checks
  // that they cover every element once, and that replicas are equal.
  std::map<std::string, uint64_t> Digests(
      const std::vector<std::unique_ptr<TrainingState>>& ranks) const {
    std::map<std::string, uint64_t> digests;
    std::map<std::string, uint64_t> covered;
    for (const auto& rank : ranks) {
      for (const Piece& piece : rank->Pieces()) {
        const std::string name = piece.state + "/" + piece.tensor;
        if (piece.replicated) {
          EXPECT_EQ(piece.begin, 0U) << name;
          EXPECT_EQ(digests.emplace(name, DigestOf(piece)).first->second, DigestOf(piece)) << name;
        } else {
          EXPECT_EQ(piece.begin, covered[name]) << name << ": a gap or an overlap";
          covered[name] += piece.count;
          digests[name] += DigestOf(piece);
        }
      }
    }
    return digests;
  }

  const ParameterTable table_{ModelConfig()};
};

TEST_P(StateTest, RanksTogetherHoldEveryElementOnceWithTheValuesOfAWorldOfOne) {
  const auto [zero, world_size] = GetParam();
  const auto expected = Digests(AllRanks(Zero::kReplicated, 1));
  EXPECT_EQ(expected.size(), 4 * table_.parameters().size() + 2);
  EXPECT_EQ(Digests(AllRanks(zero, world_size)), expected);
}

TEST_P(StateTest, EveryPieceLiesInARegisteredBufferAndNoBufferIsWithoutOne) {
  const auto [zero, world_size] = GetParam();
  for (const auto& rank : AllRanks(zero, world_size)) {
    const std::vector<Piece> pieces = rank->Pieces();
    std::vector<int> uses;
    for (const StateBuffer& buffer : rank->Buffers()) {
      const std::byte* begin = static_cast<const std::byte*>(buffer.data);
      int& count = uses.emplace_back(0);
      for (const Piece& piece : pieces) {
        if (piece.data < begin || piece.data >= begin + buffer.bytes) continue;
        ++count;
        EXPECT_LE(piece.data + piece.count * piece.element_bytes, begin + buffer.bytes);
      }
      EXPECT_GT(count, 0) << buffer.name;
    }
    EXPECT_EQ(std::accumulate(uses.begin(), uses.end(), size_t{0}), pieces.size());
  }
}

TEST_P(StateTest, AnOptimizerStepGivesTheSameBitsInEveryCut) {
  const auto [zero, world_size] = GetParam();
  const size_t count = table_.element_count();
  std::vector<int64_t> sums(count + world_size, 0);
  Random random(3);
  for (size_t i = 0; i < count; ++i) sums[i] = static_cast<int64_t>(random.Next()) >> 24;
  const auto run = [&](const std::vector<std::unique_ptr<TrainingState>>& ranks) {
    for (const auto& rank : ranks) {
      const Slice own = rank->own();
      for (int64_t step = 1; step <= 3; ++step) {
        AdamStep(AdamConfig(), step, std::span(sums).subspan(own.begin, own.count), 24,
                 {rank->master, rank->exp_avg, rank->exp_avg_sq,
                  std::span(rank->parameters).subspan(own.begin, own.count)});
      }
    }
    // What the all-gather does.
    for (const auto& rank : ranks) {
      for (const auto& other : ranks) {
        const Slice own = other->own();
        std::copy_n(other->parameters.begin() + static_cast<ptrdiff_t>(own.begin), own.count,
                    rank->parameters.begin() + static_cast<ptrdiff_t>(own.begin));
      }
    }
  };
  const auto one = AllRanks(Zero::kReplicated, 1);
  run(one);
  const auto cut = AllRanks(zero, world_size);
  run(cut);
  EXPECT_EQ(Digests(cut), Digests(one));
  EXPECT_NE(Digests(one), Digests(AllRanks(Zero::kReplicated, 1))) << "nothing has changed";
}

TEST_P(StateTest, TheLayoutDocumentIsTheSameOnAllRanks) {
  const auto [zero, world_size] = GetParam();
  const auto ranks = AllRanks(zero, world_size);
  for (const auto& rank : ranks) EXPECT_EQ(rank->LayoutJson(), ranks[0]->LayoutJson());
}

INSTANTIATE_TEST_SUITE_P(Worlds, StateTest,
                         testing::Combine(testing::Values(Zero::kReplicated, Zero::kOptimizer),
                                          testing::Range(1U, 6U)));

TEST(State, DigestsOfPiecesAddUpToThatOfTheWhole) {
  std::vector<uint16_t> data(100);
  std::iota(data.begin(), data.end(), uint16_t{500});
  const auto piece = [&](uint64_t begin, uint64_t count) {
    return Piece{
        "t", "s", begin, count, 2, false, reinterpret_cast<const std::byte*>(data.data() + begin)};
  };
  const uint64_t whole = DigestOf(piece(0, 100));
  for (uint64_t cut = 0; cut <= 100; ++cut) {
    EXPECT_EQ(DigestOf(piece(0, cut)) + DigestOf(piece(cut, 100 - cut)), whole);
  }
  std::swap(data[3], data[4]);
  EXPECT_NE(DigestOf(piece(0, 100)), whole) << "blind to order";
}

// A value computed by hand from the description in state.h, which other programs follow too.
TEST(State, TheDigestIsTheOneThatIsDescribed) {
  const uint16_t value = 0xbeef;
  const Piece piece{"t", "s", 5, 1, 2, false, reinterpret_cast<const std::byte*>(&value)};
  EXPECT_EQ(DigestOf(piece), Mix(Mix(5) + 0xbeef));
  EXPECT_EQ(Mix(0), 0xe220a8397b1dcdafU);  // SplitMix64's first number for seed 0
}

TEST(Ballast, AnyWrongWordIsSeen) {
  Ballast ballast(3, 2, 2);
  ballast.Stamp(9);
  ASSERT_TRUE(ballast.Verify(9).ok());
  EXPECT_TRUE(absl::IsDataLoss(ballast.Verify(8)));
  for (size_t i = 0; i < 2 * kPageElements; ++i) {
    ballast.data()[i] ^= uint64_t{1} << (i % 64);
    const absl::Status status = ballast.Verify(9);
    EXPECT_TRUE(absl::IsDataLoss(status)) << i;
    EXPECT_THAT(std::string(status.message()),
                testing::HasSubstr(i < kPageElements ? "the first is 3" : "the first is 4"));
    ballast.data()[i] ^= uint64_t{1} << (i % 64);
  }
  ASSERT_TRUE(ballast.Verify(9).ok());
}

}  // namespace
}  // namespace tiny_lm
