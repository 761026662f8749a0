// Goal: parts of a strided tensor are its elements, each once, in order; what HDF5 cannot show is
// left out by name, and what is not there is refused. What readers see through a view is the matter
// of cli/foreign_view_test.py.
#include "converter/foreign_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/status_macros.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// Next in row-major order; false behind the last one.
bool Next(std::vector<uint64_t>& x, std::span<const uint64_t> size) {
  for (size_t d = size.size(); d-- > 0;) {
    if (++x[d] < size[d]) return true;
    x[d] = 0;
  }
  return false;
}

using Elements = std::map<std::vector<uint64_t>, uint64_t>;  // of the tensor: where it is stored

Elements Direct(std::span<const uint64_t> lo, std::span<const uint64_t> size,
                std::span<const uint64_t> strides) {
  Elements elements;
  std::vector<uint64_t> x(size.size(), 0);
  do {
    std::vector<uint64_t> at(x);
    uint64_t offset = 0;
    for (size_t d = 0; d < x.size(); ++d) {
      at[d] += lo[d];
      offset += x[d] * strides[d];
    }
    elements[at] = offset;
  } while (Next(x, size));
  return elements;
}

// What HDF5 makes of the parts: the taken elements of the part, in the row-major order of its
// shape, go to the elements of the box in its row-major order.
Elements ThroughHdf5(const std::vector<StridedPart>& parts) {
  Elements elements;
  for (const StridedPart& part : parts) {
    std::vector<uint64_t> from(part.shape.size(), 0);
    std::vector<uint64_t> to(part.box.size.size(), 0);
    bool more = true;
    do {
      EXPECT_TRUE(more) << "the part has more elements than its box";
      uint64_t offset = 0;
      for (size_t d = 0; d < from.size(); ++d) {
        EXPECT_LT(from[d], part.shape[d]);
        offset = offset * part.shape[d] + from[d];
      }
      std::vector<uint64_t> at(to);
      for (size_t d = 0; d < at.size(); ++d) at[d] += part.box.lo[d];
      EXPECT_TRUE(elements.emplace(at, part.offset_elements + offset).second) << "twice";
      more = Next(to, part.box.size);
    } while (Next(from, part.take));
    EXPECT_FALSE(more) << "the box has more elements than the part";
  }
  return elements;
}

TEST(CutStrides, PartsAreTheElementsInOrderWhateverTheStrides) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto draw = [&](uint64_t below) { return random() % below; };
  size_t of_one_part = 0;
  size_t of_several = 0;
  for (int i = 0; i < 3000; ++i) {
    const size_t dims = draw(5);
    std::vector<uint64_t> lo(dims), size(dims), strides(dims);
    for (size_t d = 0; d < dims; ++d) {
      lo[d] = draw(3);
      size[d] = 1 + draw(4);
    }
    if (draw(3) == 0) {
      for (uint64_t& stride : strides) stride = draw(9);  // broadcast, overlapping, no grid at all
    } else {  // a slice of a larger array, perhaps permuted
      std::vector<size_t> order(dims);
      for (size_t d = 0; d < dims; ++d) order[d] = d;
      if (draw(2) == 0) std::shuffle(order.begin(), order.end(), random);
      uint64_t stride = 1 + draw(2);
      for (size_t n = dims; n-- > 0;) {
        strides[order[n]] = stride * (1 + draw(2));
        stride = strides[order[n]] * (size[order[n]] + draw(2));
      }
    }
    const auto parts = CutStrides(lo, size, strides);
    ASSERT_TRUE(parts.has_value());
    ASSERT_EQ(ThroughHdf5(*parts), Direct(lo, size, strides))
        << testing::PrintToString(size) << " at " << testing::PrintToString(strides);
    (parts->size() == 1 ? of_one_part : of_several) += 1;
  }
  EXPECT_GT(of_one_part, 500u);
  EXPECT_GT(of_several, 500u);
}

TEST(CutStrides, TakesAsFewPartsAsTheGridAllows) {
  const std::vector<uint64_t> lo = {0, 0};
  const auto parts = [&](std::vector<uint64_t> size, std::vector<uint64_t> strides) {
    return CutStrides(lo, size, strides);
  };
  EXPECT_EQ(parts({100, 7}, {7, 1})->size(), 1u);
  EXPECT_EQ(parts({100, 7}, {14, 2})->size(), 1u);
  EXPECT_EQ(parts({100, 7}, {1, 100})->size(), 7u);  // transposed: loops over the shorter one
  EXPECT_EQ(parts({7, 100}, {1, 7})->size(), 7u);
  EXPECT_EQ(parts({100, 7}, {0, 1})->size(), 100u);
  EXPECT_EQ(parts({1, 7}, {0, 1})->size(), 1u);
  EXPECT_EQ(parts({kViewPartsOfPieceMax, kViewPartsOfPieceMax}, {1, kViewPartsOfPieceMax})->size(),
            kViewPartsOfPieceMax);
  EXPECT_FALSE(
      parts({kViewPartsOfPieceMax + 1, kViewPartsOfPieceMax + 1}, {1, kViewPartsOfPieceMax + 1})
          .has_value());
}

// One file of 4,096 bytes, and tensors of 8 float32.
ForeignIndex IndexOf(std::vector<std::string> names) {
  ForeignIndex index;
  index.format = "torch";
  index.files.push_back({"w.pt", 4096});
  index.AddRaw(0, 0, 4096);
  for (const std::string& name : names) {
    index.AddWholePiece(index.AddState({name, "param", Dtype::kFloat32, {2, 4}}), 0, 64);
  }
  return index;
}

absl::StatusOr<ForeignView> Build(ForeignIndex& index) {
  RETURN_IF_ERROR(Finish(index));
  ForeignViewOptions options;
  options.source = "/w.pt";
  options.prefix = "/";
  return BuildForeignView(index, options);
}

TEST(ForeignView, WhatHdf5CannotShowIsLeftOutByName) {
  ForeignIndex index = IndexOf({"good", "negated", "rounded", "deflated", ""});
  index.pieces[1].negate = true;
  index.tensor_states[2].dtype = Dtype::kBfloat16;
  index.pieces[2].rounded = true;
  index.extents.push_back({0, 0, 100, Codec::kDeflate, 4096});
  index.pieces[3].extent = 1;
  const uint32_t deep = index.AddState({"deep", "param", Dtype::kUint8, {}});
  index.tensor_states[deep].shape.assign(33, 1);
  index.AddWholePiece(deep, 0, 0);
  index.unreadable.push_back({"sparse", "is a sparse tensor"});
  ASSERT_OK_AND_ASSIGN(const ForeignView view, Build(index));
  EXPECT_EQ(view.tensor_count, 2u);  // one of them without a name
  EXPECT_EQ(view.copied_bytes, 0u);
  std::map<std::string, std::string> reasons;
  for (const auto& each : view.left_out) reasons[each.tensor] = each.reason;
  EXPECT_EQ(reasons, (std::map<std::string, std::string>{
                         {"deep", "has 33 dimensions, of which HDF5 knows at most 32"},
                         {"deflated", "is stored compressed (deflate)"},
                         {"negated", "is stored negated"},
                         {"rounded", "is not stored: it is made by rounding float32 to bfloat16"},
                         {"sparse", "is a sparse tensor"}}));
}

TEST(ForeignView, OfReplicasOneThatCanBeShownIsTaken) {
  ForeignIndex index = IndexOf({"w"});
  index.pieces[0].negate = true;
  index.AddWholePiece(0, 0, 128);
  ASSERT_OK_AND_ASSIGN(const ForeignView view, Build(index));
  EXPECT_EQ(view.tensor_count, 1u);
  EXPECT_TRUE(view.left_out.empty());
}

TEST(ForeignView, AViewOfNothingIsRefusedAndOneOfNoTensorsIsNot) {
  ForeignIndex index = IndexOf({"w"});
  index.pieces[0].negate = true;
  EXPECT_THAT(Build(index),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("/w.pt"), HasSubstr("w, param is stored negated"))));
  ForeignIndex empty = IndexOf({});
  ASSERT_OK_AND_ASSIGN(const ForeignView view, Build(empty));
  EXPECT_EQ(view.tensor_count, 0u);
}

TEST(ForeignView, WhatIsNotThereIsDamage) {
  ForeignIndex index = IndexOf({"w"});
  index.pieces[0].piece.end = 7;
  EXPECT_THAT(Build(index),
              StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr("/w.pt"), HasSubstr("\"w\""))));
}

TEST(ForeignView, ALimitOfBytesIsOne) {
  ForeignIndex index = IndexOf({"w"});
  ASSERT_OK(Finish(index));
  EXPECT_THAT(BuildForeignView(index, {.source = "/w.pt", .prefix = "/", .bytes_max = 100}),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("100 bytes")));
}

}  // namespace
}  // namespace holdfast::converter
