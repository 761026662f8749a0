// Goal: the mesh's numbering, the cuts and the stages are those that are described, and what does
// not fit is refused by name.
#include "examples/tiny_lm/parallel.h"

#include <set>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(Mesh, RanksAreNumberedWithStagesOutermostAndTensorRanksInnermost) {
  const Mesh mesh{2, 3, 4};
  uint32_t rank = 0;
  for (uint32_t pp = 0; pp < 2; ++pp) {
    for (uint32_t dp = 0; dp < 3; ++dp) {
      for (uint32_t tp = 0; tp < 4; ++tp, ++rank) {
        EXPECT_EQ(mesh.RankAt({pp, dp, tp}), rank);
        const Coordinates at = mesh.Of(rank);
        EXPECT_EQ(std::tie(at.pp, at.dp, at.tp), std::tie(pp, dp, tp));
      }
    }
  }
  EXPECT_EQ(rank, mesh.world_size());
  EXPECT_THAT(mesh.TensorRanks({1, 2, 3}), ElementsAre(20, 21, 22, 23));
  EXPECT_THAT(mesh.DataRanks({1, 2, 3}), ElementsAre(15, 19, 23));
  EXPECT_THAT(mesh.Stages({1, 2, 3}), ElementsAre(11, 23));
}

TEST(CeilPart, PartsAreTheWholeInOrderInGrainsAndNoneIsLongerThanTheFirst) {
  for (size_t count = 0; count <= 50; ++count) {
    for (const size_t grain : {1, 8}) {
      for (size_t parts = 1; parts <= 7; ++parts) {
        size_t end = 0;
        const size_t first = CeilPart(count, grain, parts, 0).count;
        for (size_t i = 0; i < parts; ++i) {
          const Slice part = CeilPart(count, grain, parts, i);
          EXPECT_EQ(part.begin, end);
          EXPECT_LE(part.count, first);
          EXPECT_TRUE(part.begin % grain == 0 || part.count == 0);
          end += part.count;
        }
        EXPECT_EQ(end, count);
      }
    }
  }
  EXPECT_EQ(CeilPart(97, 1, 4, 0).count, 25U);
  EXPECT_EQ(CeilPart(97, 1, 4, 3).count, 22U);
  EXPECT_EQ(CeilPart(32, 8, 3, 2).count, 0U);  // four heads over three ranks: 2, 2, 0
}

TEST(JobLayout, WhatIsLeftOfTheWorldIsDataParallelAndLayersAreCutEvenlyOrAsTold) {
  ParallelOptions options;
  options.pp = 3;
  options.tp = 2;
  const auto even = MakeJobLayout(options, 5, 12, 100);
  ASSERT_TRUE(even.ok()) << even.status();
  EXPECT_EQ(even->mesh.dp, 2U);
  EXPECT_THAT(even->stage_layers, ElementsAre(2, 2, 1));
  EXPECT_EQ(even->LayersOf(2).begin, 4U);
  EXPECT_EQ(even->LayersOf(2).count, 1U);
  EXPECT_THAT(MakeJobLayout(options, 2, 6, 0)->stage_layers, ElementsAre(1, 1, 0));
  options.pp_layers = {3, 0, 2};
  EXPECT_THAT(MakeJobLayout(options, 5, 6, 0)->stage_layers, ElementsAre(3, 0, 2));
}

TEST(JobLayout, WhatDoesNotFitIsRefusedByName) {
  ParallelOptions options;
  options.pp = 2;
  options.tp = 2;
  const auto error = [&](size_t layers, uint32_t world_size) {
    return std::string(MakeJobLayout(options, layers, world_size, 0).status().message());
  };
  EXPECT_THAT(error(2, 6), HasSubstr("--pp 2 --tp 2: expected a multiple of 4 ranks, found 6"));
  options.pp_layers = {1, 2};
  EXPECT_THAT(error(2, 4), HasSubstr("--pp-layers 1,2: expected 2 stages (--pp) of 2 layers in all "
                                     "(--layers), found 2 of 3"));
  options.pp_layers = {2};
  EXPECT_THAT(error(2, 4), HasSubstr("found 1 of 2"));
}

}  // namespace
}  // namespace tiny_lm
