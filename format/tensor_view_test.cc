// Goal: what a view says of itself is so, and its limit is one. What readers see through it is the
// matter of cli/view_test.py.
// Method: an INDEX made by hand, of two images.
#include "format/tensor_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

constexpr char kCheckpoint[] = "/root/job/s000000000001.a0001";

// Of each tensor state, a vector of 8 float32 or of none, pieces as [begin, end) of an image.
struct Range {
  uint32_t image = 0;
  uint64_t begin = 0;
  uint64_t end = 0;
};

Index IndexOf(const std::vector<std::vector<Range>>& states) {
  Index index;
  index.job = "job";
  index.job_uuid = "01234567-89ab-4cde-8f01-23456789abcd";
  index.checkpoint = {Attempt{1}, Step{1}};
  index.world_size = 2;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    index.images.push_back({ImageFileName(Rank{rank}), Rank{rank}, 0, 8192, 4096, {}});
  }
  for (uint32_t i = 0; i < states.size(); ++i) {
    uint64_t elements = 0;
    for (const Range& range : states[i]) {
      index.pieces.push_back({{i, kWholeTensor, range.begin, range.end},
                              range.image,
                              4096 + 64 * i + 4 * range.begin});
      elements = std::max(elements, range.end);
    }
    TensorState& state = index.tensor_states.emplace_back();
    state.tensor = std::string(1, static_cast<char>('a' + i));
    state.state = "param";
    state.dtype = Dtype::kFloat32;
    state.shape = {elements};
    index.facts.emplace_back();
  }
  SortIndex(index);
  return index;
}

absl::StatusOr<TensorView> Build(const Index& index, uint64_t bytes_max = kViewBytesMax) {
  return BuildTensorView(index, kCheckpoint, AbsoluteViewPaths(kCheckpoint), bytes_max);
}

TEST(TensorView, AnEmptyPieceAmongOthersMakesPartsAndAnEmptyTensorDoesNot) {
  ASSERT_OK_AND_ASSIGN(const TensorView plain, Build(IndexOf({{{0, 0, 4}, {1, 4, 8}}})));
  EXPECT_EQ(plain.in_parts_count, 0u);
  EXPECT_EQ(plain.files_of_one_max, 2u);
  ASSERT_OK_AND_ASSIGN(const TensorView none, Build(IndexOf({{{0, 0, 0}}, {{0, 0, 8}}})));
  EXPECT_EQ(none.tensor_count, 2u);
  EXPECT_EQ(none.in_parts_count, 0u);
  // Between two others of its image, which may be the first and second dataset there or the third.
  ASSERT_OK_AND_ASSIGN(const TensorView between,
                       Build(IndexOf({{{0, 0, 4}, {0, 4, 4}, {0, 4, 8}}, {{1, 0, 8}}})));
  EXPECT_EQ(between.tensor_count, 2u);
  EXPECT_EQ(between.in_parts_count, 1u);
  EXPECT_EQ(between.files_of_one_max, 1u);
}

// libhdf5 makes room in steps of 4 MiB, and these count: the least limit that suffices is a step.
TEST(TensorView, ALimitThatSufficesChangesNothingAndOneLessIsRefused) {
  const Index index = IndexOf({{{0, 0, 4}, {1, 4, 8}}, {{1, 0, 8}}});
  ASSERT_OK_AND_ASSIGN(const TensorView view, Build(index));
  uint64_t refused = view.bytes.size() - 1;
  uint64_t suffices = kViewBytesMax;
  while (suffices - refused > 1) {
    const uint64_t limit = refused + (suffices - refused) / 2;
    (Build(index, limit).ok() ? suffices : refused) = limit;
  }
  ASSERT_OK_AND_ASSIGN(const TensorView same, Build(index, suffices));
  EXPECT_TRUE(same.bytes == view.bytes);
  EXPECT_THAT(Build(index, suffices - 1), StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(suffices, uint64_t{4} << 20);
  EXPECT_LT(view.bytes.size(), suffices);
}

}  // namespace
}  // namespace holdfast
