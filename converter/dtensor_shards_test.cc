#include "converter/dtensor_shards.h"

#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast::converter {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Kind = Placement::Kind;
using Elements = std::vector<uint64_t>;

std::vector<std::vector<ShardRun>> Must(const std::vector<uint64_t>& shape,
                                        const std::vector<MeshDim>& mesh,
                                        const std::vector<Placement>& placements) {
  auto runs = ShardRuns(shape, mesh, placements);
  EXPECT_TRUE(runs.ok()) << runs.status().ToString();
  return runs.ok() ? *runs : std::vector<std::vector<ShardRun>>{};
}

TEST(DTensorShards, ShardIsTorchChunk) {
  // 251 rows over 4 ranks: 63, 63, 63, 62; 5 rows: 2, 2, 1 and none.
  const Placement shard{.kind = Kind::kShard, .dim = 0};
  EXPECT_THAT(Must({251, 36}, {{4, 0}}, {shard}),
              ElementsAre(ElementsAre(ShardRun{0, 63}), ElementsAre(ShardRun{0, 36})));
  EXPECT_THAT(Must({251}, {{4, 3}}, {shard}), ElementsAre(ElementsAre(ShardRun{189, 62})));
  EXPECT_THAT(Must({5}, {{4, 2}}, {shard}), ElementsAre(ElementsAre(ShardRun{4, 1})));
  EXPECT_THAT(Must({5}, {{4, 3}}, {shard}), ElementsAre(IsEmpty()));
  EXPECT_THAT(Must({0, 3}, {{4, 1}}, {shard}), ElementsAre(IsEmpty(), ElementsAre(ShardRun{0, 3})));
}

TEST(DTensorShards, FullyShardedAboveTensorParallel) {
  // torch: _StridedShard(0, split_factor=2) over dp=3, Shard(0) over tp=2, 50 rows: tp holds 25
  // each, of which dp has 9, 9 and 7.
  const std::vector<Placement> placements = {
      {.kind = Kind::kStridedShard, .dim = 0, .split_factor = 2}, {.kind = Kind::kShard, .dim = 0}};
  EXPECT_THAT(Must({50}, {{3, 0}, {2, 0}}, placements), ElementsAre(ElementsAre(ShardRun{0, 9})));
  EXPECT_THAT(Must({50}, {{3, 0}, {2, 1}}, placements), ElementsAre(ElementsAre(ShardRun{25, 9})));
  EXPECT_THAT(Must({50}, {{3, 2}, {2, 1}}, placements), ElementsAre(ElementsAre(ShardRun{43, 7})));
}

TEST(DTensorShards, AStridedShardAloneHoldsARunOfEveryPart) {
  // The example in torch's own source: 9 elements, split factor 2, 4 ranks.
  const std::vector<Placement> placement = {
      {.kind = Kind::kStridedShard, .dim = 0, .split_factor = 2}};
  EXPECT_THAT(Must({9}, {{4, 0}}, placement),
              ElementsAre(ElementsAre(ShardRun{0, 2}, ShardRun{5, 1})));
  EXPECT_THAT(Must({9}, {{4, 1}}, placement),
              ElementsAre(ElementsAre(ShardRun{2, 2}, ShardRun{6, 1})));
  EXPECT_THAT(Must({9}, {{4, 2}}, placement),
              ElementsAre(ElementsAre(ShardRun{4, 1}, ShardRun{7, 1})));
  EXPECT_THAT(Must({9}, {{4, 3}}, placement), ElementsAre(ElementsAre(ShardRun{8, 1})));
}

// torch's own way, element by element: _StridedShard._split_tensor and Shard's chunks.
Elements Chunk(const Elements& elements, uint64_t parts, uint64_t index) {
  const uint64_t chunk = (elements.size() + parts - 1) / parts;
  Elements held;
  for (uint64_t i = index * chunk; i < (index + 1) * chunk && i < elements.size(); ++i) {
    held.push_back(elements[i]);
  }
  return held;
}

TEST(DTensorShards, AgreesWithTheListsOfElementsThatTorchMakes) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto below = [&random](uint64_t n) { return random() % n; };
  for (int round = 0; round < 3000; ++round) {
    const uint64_t size = below(60);
    std::vector<MeshDim> mesh;
    std::vector<Placement> placements;
    Elements expected(size);
    for (uint64_t i = 0; i < size; ++i) expected[i] = i;
    for (uint64_t m = 0, dims = 1 + below(3); m < dims; ++m) {
      const uint64_t ranks = 1 + below(5);
      mesh.push_back({ranks, below(ranks)});
      placements.push_back(
          {.kind = static_cast<Kind>(below(3)), .dim = 0, .split_factor = 1 + below(4)});
      const Placement& placement = placements.back();
      if (placement.kind == Kind::kShard) {
        expected = Chunk(expected, ranks, mesh.back().coordinate);
      } else if (placement.kind == Kind::kStridedShard) {
        Elements held;
        for (uint64_t part = 0; part < placement.split_factor; ++part) {
          for (const uint64_t i : Chunk(Chunk(expected, placement.split_factor, part), ranks,
                                        mesh.back().coordinate)) {
            held.push_back(i);
          }
        }
        expected = held;
      }
    }
    Elements found;
    const auto runs = Must({size}, mesh, placements);
    for (const ShardRun& run : runs[0]) {
      for (uint64_t i = 0; i < run.size; ++i) found.push_back(run.begin + i);
    }
    ASSERT_EQ(found, expected) << "round " << round;
  }
}

TEST(DTensorShards, RefusesWhatDoesNotFit) {
  const Placement shard{.kind = Kind::kShard, .dim = 1};
  const std::vector<uint64_t> shape = {4};
  const auto error = [&](const std::vector<MeshDim>& mesh, const std::vector<Placement>& placements,
                         const std::vector<uint64_t>& of) {
    return std::string(ShardRuns(of, mesh, placements).status().message());
  };
  EXPECT_THAT(error({{2, 0}}, {shard}, shape), HasSubstr("found dimension 1"));
  EXPECT_THAT(error({{2, 2}}, {{}}, shape), HasSubstr("coordinate below 2"));
  EXPECT_THAT(error({{0, 0}}, {{}}, shape), HasSubstr("coordinate below 0"));
  EXPECT_THAT(error({{2, 0}, {2, 0}}, {{}}, shape), HasSubstr("2 mesh dimensions, found 1"));
  EXPECT_THAT(error({{2, 0}}, {{.kind = Kind::kStridedShard, .split_factor = 0}}, shape),
              HasSubstr("split factor"));
  EXPECT_THAT(error({{2, 0}}, {{.kind = Kind::kStridedShard, .split_factor = 1'000'000}},
                    {uint64_t{1} << 40}),
              HasSubstr("4096 parts"));
  // As many parts as one likes, where there are few elements.
  EXPECT_TRUE(
      ShardRuns(shape, std::vector<MeshDim>{{UINT64_MAX, UINT64_MAX - 1}},
                std::vector<Placement>{{.kind = Kind::kStridedShard, .split_factor = UINT64_MAX}})
          .ok());
}

}  // namespace
}  // namespace holdfast::converter
