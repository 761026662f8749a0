// Tensors that no machine holds: more than 2^32 elements, planned only. Sampled elements are
// followed from the source's image to the target's buffer by arithmetic of this file's own.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "format/layout.h"
#include "format/planner.h"
#include "format/writer_assignment.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using Random = std::mt19937_64;

constexpr uint64_t kElementBytes = 2;

const std::vector<std::vector<uint64_t>> kShapes = {
    {(uint64_t{1} << 33) + 7},  // a prime's neighbour
    {65'537, 131'071},          // two primes: 2^33
    {3, 1'000'003, 4'096},      // 2^33.5
    {4'096, 5, 3, 140'009},     // 2^33
    {0, uint64_t{1} << 40},    {},
};

std::string Cut(Random& random, size_t dims, const std::string& axis, bool& flat) {
  const char* const rule = random() % 2 == 0 ? "ceil" : "balanced";
  if (flat || dims == 0 || random() % 3 == 0) {
    flat = true;
    return absl::StrCat(R"({"op":"flat","axis":")", axis, R"(","rule":")", rule, "\"}");
  }
  return absl::StrCat(R"({"op":"shard","dim":)", random() % dims, R"(,"axis":")", axis,
                      R"(","rule":")", rule, "\"}");
}

std::string RandomDocument(Random& random) {
  const uint64_t dp = 1 + random() % 5;
  const uint64_t tp = 1 + random() % 4;
  std::vector<std::string> tensors;
  for (size_t i = 0; i < kShapes.size(); ++i) {
    bool flat = false;
    std::vector<std::string> ops;
    if (random() % 4 > 0) ops.push_back(Cut(random, kShapes[i].size(), "tp", flat));
    if (random() % 3 == 0) {
      ops.push_back(R"({"op":"pack","pack":"p"})");
    } else if (random() % 3 > 0) {
      ops.push_back(Cut(random, kShapes[i].size(), "dp", flat));
    }
    tensors.push_back(absl::StrCat(R"({"name":"t)", i, R"(","shape":[)",
                                   absl::StrJoin(kShapes[i], ","),
                                   R"(],"states":[{"state":"s","dtype":"bfloat16","place":[)",
                                   absl::StrJoin(ops, ","), "]}]}"));
  }
  return absl::StrCat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":)", dp, R"(},{"axis":"tp","size":)", tp,
      R"(}],"packs":[{"pack":"p","axis":"dp","buffer":"p","multiple_elements":3}],)",
      R"("tensors":[)", absl::StrJoin(tensors, ","), "]}");
}

// The number of an element in the row-major order of a box; nothing if it is not there.
std::optional<uint64_t> NumberInBox(uint64_t element, const std::vector<uint64_t>& shape,
                                    const Piece& piece, const BoxTable& boxes) {
  uint64_t number = element;
  if (piece.box != kWholeTensor) {
    const BoxView box = boxes[piece.box];
    std::vector<uint64_t> at(shape.size());
    for (size_t d = shape.size(); d-- > 0; element /= shape[d]) at[d] = element % shape[d];
    number = 0;
    for (size_t d = 0; d < shape.size(); ++d) {
      if (at[d] < box.lo[d] || at[d] >= box.lo[d] + box.size[d]) return std::nullopt;
      number = number * box.size[d] + (at[d] - box.lo[d]);
    }
  }
  if (number < piece.begin || number >= piece.end) return std::nullopt;
  return number - piece.begin;
}

// The element that has this number in the piece.
uint64_t ElementOf(uint64_t number, const std::vector<uint64_t>& shape, const Piece& piece,
                   const BoxTable& boxes) {
  number += piece.begin;
  if (piece.box == kWholeTensor) return number;
  const BoxView box = boxes[piece.box];
  uint64_t element = 0;
  std::vector<uint64_t> at(shape.size());
  for (size_t d = shape.size(); d-- > 0; number /= box.size[d]) at[d] = number % box.size[d];
  for (size_t d = 0; d < shape.size(); ++d) element = element * shape[d] + box.lo[d] + at[d];
  return element;
}

// Whether the plan copies this byte of an image to this byte of a buffer.
bool Copies(const CopyPlan& plan, uint32_t image, uint64_t image_byte, uint32_t buffer,
            uint64_t buffer_byte) {
  for (const CopyOp& op : plan.ops) {
    if (op.image != image || op.buffer != buffer || image_byte < op.image_offset_bytes) continue;
    const uint64_t from = image_byte - op.image_offset_bytes;
    const uint64_t run = op.count == 1 ? 0 : std::min(op.count - 1, from / op.image_stride_bytes);
    const uint64_t in_run = from - run * op.image_stride_bytes;
    if (in_run < op.run_bytes &&
        op.buffer_offset_bytes + run * op.buffer_stride_bytes + in_run == buffer_byte) {
      return true;
    }
  }
  return false;
}

struct Source {
  BoxTable boxes;
  std::vector<StoredPiece> pieces;
};

Source Store(const Layout& layout) {
  Source source;
  const WriterAssignment writers = WriterAssignment::Create(layout);
  for (uint32_t rank = 0; rank < layout.world_size(); ++rank) {
    const auto stored = writers.ForRank(Rank{rank}, {});
    EXPECT_TRUE(stored.ok());
    uint64_t at = 64;
    for (const Segment& segment : stored->segments) {
      Piece piece = segment.piece;
      if (piece.box != kWholeTensor) {
        const BoxView box = stored->boxes[piece.box];
        piece.box = source.boxes.Add(box.lo, box.size);
      }
      source.pieces.push_back({piece, rank, at});
      at += piece.ElementCount() * kElementBytes;
    }
  }
  return source;
}

TEST(LayoutLarge, SampledElementsAreCopiedFromWhereTheyAreToWhereTheyBelong) {
  const uint64_t seed = std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  uint64_t samples = 0;
  for (int round = 0; round < 300; ++round) {
    const auto from = Layout::Parse(RandomDocument(random));
    const auto to = Layout::Parse(RandomDocument(random));
    ASSERT_TRUE(from.ok()) << from.status().ToString();
    ASSERT_TRUE(to.ok()) << to.status().ToString();
    SCOPED_TRACE(absl::StrCat((*from)->text(), "\n", (*to)->text()));
    const Source source = Store(**from);
    const SourceView view{(*from)->tensor_states(), source.boxes, source.pieces};
    ASSERT_TRUE(CheckCover(view).ok());
    const Rank rank{static_cast<uint32_t>(random() % (*to)->world_size())};
    const auto target = (*to)->ForRank(rank);
    ASSERT_TRUE(target.ok());
    const auto plan = PlanCopy(view, (*to)->tensor_states(), *target);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    for (const Segment& segment : target->segments) {
      const TensorState& state = (*to)->tensor_states()[segment.piece.tensor_state];
      const uint64_t count = segment.piece.ElementCount();
      // The first, the last, and some between.
      for (const uint64_t number : {uint64_t{0}, count - 1, random() % count, random() % count}) {
        const uint64_t element = ElementOf(number, state.shape, segment.piece, target->boxes);
        bool found = false;
        for (const StoredPiece& stored : source.pieces) {
          if ((*from)->tensor_states()[stored.piece.tensor_state].tensor != state.tensor) continue;
          const auto at = NumberInBox(element, state.shape, stored.piece, source.boxes);
          found = found ||
                  (at.has_value() &&
                   Copies(*plan, stored.image, stored.image_offset_bytes + *at * kElementBytes,
                          segment.buffer, segment.buffer_offset_bytes + number * kElementBytes));
        }
        ASSERT_TRUE(found) << "element " << element << " of " << state.tensor;
        ++samples;
      }
    }
  }
  std::printf("%llu elements followed\n", static_cast<unsigned long long>(samples));
  EXPECT_GT(samples, 2500u);
}

}  // namespace
}  // namespace holdfast
