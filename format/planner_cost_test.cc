// Pieces that lie so that finding them is slow, or copying them takes many ops: the planner gives a
// verdict within bounded steps and memory, or says that it takes too much.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "format/planner.h"
#include "format/planner_geometry.h"
#include "tests/support/allocation_meter.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::HasSubstr;

constexpr size_t kCostBytesMax = size_t{512} << 20;

// The pieces of one tensor, each an image of its own.
struct Pieces {
  std::vector<TensorState> states;
  BoxTable boxes;
  std::vector<StoredPiece> pieces;

  explicit Pieces(std::vector<uint64_t> shape)
      : states({{"w", "param", Dtype::kUint8, std::move(shape)}}) {}

  void Add(const std::vector<uint64_t>& lo, const std::vector<uint64_t>& size) {
    uint64_t volume = 1;
    for (uint64_t each : size) volume *= each;
    const uint32_t image = static_cast<uint32_t>(pieces.size());
    pieces.push_back({{0, boxes.Add(lo, size), 0, volume}, image, 0});
  }
  void AddRange(uint64_t begin, uint64_t end) {
    const uint32_t image = static_cast<uint32_t>(pieces.size());
    pieces.push_back({{0, kWholeTensor, begin, end}, image, 0});
  }
  SourceView View() const { return {states, boxes, pieces}; }

  // The whole tensor in one buffer.
  RankLayout Target() const {
    RankLayout target;
    target.buffers = {{"w", states[0].Bytes()}};
    Segment segment;
    segment.piece = {0, kWholeTensor, 0, states[0].ElementCount()};
    target.segments = {segment};
    return target;
  }
};

// Lines along three dimensions that pass each other everywhere: every bounding box of some of them
// is met by most of the others.
Pieces CrossedLines(uint64_t n) {
  Pieces lines({n, n, n});
  for (uint64_t a = 0; a < n; a += 2) {
    for (uint64_t b = 0; b < n; b += 2) {
      lines.Add({0, a, b}, {n, 1, 1});
      lines.Add({a + 1, 0, b + 1}, {1, n, 1});
      lines.Add({a, b + 1, 0}, {1, 1, n});
    }
  }
  return lines;
}

uint64_t StepsOfSearches(const Pieces& pieces) {
  BoxIndex index(pieces.states[0].shape.size());
  std::vector<ElementBox> boxes;
  for (const StoredPiece& piece : pieces.pieces) {
    const BoxView box = pieces.boxes[piece.piece.box];
    CutIntoBoxes(box, piece.piece.begin, piece.piece.end, boxes);
  }
  for (uint32_t i = 0; i < boxes.size(); ++i) index.Add(boxes[i], i);
  index.Build();
  uint64_t steps = 0;
  for (const ElementBox& box : boxes) {
    steps += index.Visit(box, [](uint32_t, const ElementBox&) {});
  }
  return steps / boxes.size();
}

// What the limit must let through, with room: the cuts of tensor, expert and sequence parallelism.
TEST(PlannerCost, CompactBoxesAreFoundInLogarithmicallyManySteps) {
  const auto grid = [](uint64_t rows, uint64_t columns, uint64_t planes) {
    Pieces pieces({rows * 3, columns * 5, planes * 2});
    for (uint64_t r = 0; r < rows; ++r) {
      for (uint64_t c = 0; c < columns; ++c) {
        for (uint64_t p = 0; p < planes; ++p) pieces.Add({r * 3, c * 5, p * 2}, {3, 5, 2});
      }
    }
    EXPECT_OK(CheckCover(pieces.View()));
    return StepsOfSearches(pieces);
  };
  const uint64_t few = grid(8, 1, 1);
  const uint64_t columns = grid(1, 4096, 1);
  const uint64_t many = grid(64, 64, 1);
  const uint64_t planes = grid(16, 16, 16);
  std::printf("steps of a search: 8 rows %d, 4096 columns %d, 64 x 64 %d, 16 x 16 x 16 %d\n",
              static_cast<int>(few), static_cast<int>(columns), static_cast<int>(many),
              static_cast<int>(planes));
  for (uint64_t steps : {few, columns, many, planes})
    EXPECT_LT(steps, BoxIndex::kStepsOfBoxMax / 3);
}

TEST(PlannerCost, LinesAcrossEachOtherAreTooMuchAndNeverQuadratic) {
  const uint64_t few = StepsOfSearches(CrossedLines(16));
  const uint64_t more = StepsOfSearches(CrossedLines(64));
  std::printf("steps of a search among crossed lines: %d of 192, %d of 3072\n",
              static_cast<int>(few), static_cast<int>(more));
  EXPECT_GT(more, 4 * few);  // the fault happens: the tree does not help
  // Few of them are compared anyhow.
  EXPECT_THAT(CheckCover(CrossedLines(16).View()),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("found it in none")));
  EXPECT_THAT(CheckCover(CrossedLines(256).View()),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("tensor \"w\""), HasSubstr("long, thin"))));
}

TEST(PlannerCost, RangesOfATensorOfManyDimensionsAreBoxesUpToALimit) {
  // Each range is up to 59 boxes of 30 dimensions, since there is one piece that is no range.
  Pieces pieces(std::vector<uint64_t>(30, 4));
  std::vector<uint64_t> lo(30, 0);
  std::vector<uint64_t> size(30, 4);
  size[0] = size[29] = 1;
  pieces.Add(lo, size);
  for (uint64_t i = 0; i < 10'000; ++i) {
    const uint64_t begin = (uint64_t{1} << 58) + i * 12'345'678'901'235;
    pieces.AddRange(begin + 1, begin + 12'345'678'901'230);
  }
  const AllocationMeter meter(kCostBytesMax);
  EXPECT_THAT(CheckCover(pieces.View()),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("boxes of 30 dimensions")));
}

TEST(PlannerCost, APlanOfTooManyCopiesIsRefused) {
  // Half of the tensor in every dimension: 2^30 runs, none behind another.
  Pieces pieces(std::vector<uint64_t>(31, 4));
  pieces.Add(std::vector<uint64_t>(31, 0), std::vector<uint64_t>(31, 2));
  const AllocationMeter meter(kCostBytesMax);
  // That the rest is missing counts first.
  EXPECT_THAT(PlanCopy(pieces.View(), pieces.states, pieces.Target()).status(),
              StatusIs(absl::StatusCode::kDataLoss));
  // The other halves, dimension by dimension.
  for (size_t d = 0; d < 31; ++d) {
    std::vector<uint64_t> lo(31, 0);
    std::vector<uint64_t> size(31, 4);
    std::fill_n(size.begin(), d, 2);
    lo[d] = size[d] = 2;
    pieces.Add(lo, size);
  }
  EXPECT_OK(CheckCover(pieces.View()));
  EXPECT_THAT(PlanCopy(pieces.View(), pieces.states, pieces.Target()).status(),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("tensor \"w\""), HasSubstr("copies"))));
}

}  // namespace
}  // namespace holdfast
