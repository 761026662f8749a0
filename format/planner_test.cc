// What the planner refuses, and by which words; strided targets, block-wise clipping and replicas
// against oracles; plans over more than 2^32 elements. That plans move the right bytes between any
// two layouts is in format/layout_oracle_test.cc.
#include "format/planner.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "format/layout.h"
#include "format/writer_assignment.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;
using Sizes = std::vector<uint64_t>;

// A checkpoint in the making.
struct Stored {
  std::vector<TensorState> states;
  BoxTable boxes;
  std::vector<StoredPiece> pieces;

  void Range(uint32_t state, uint64_t begin, uint64_t end, uint32_t image, uint64_t offset = 0) {
    pieces.push_back({{state, kWholeTensor, begin, end}, image, offset});
  }
  void Box(uint32_t state, const Sizes& lo, const Sizes& size, uint32_t image,
           uint64_t offset = 0) {
    const uint64_t volume =
        std::accumulate(size.begin(), size.end(), uint64_t{1}, std::multiplies<>());
    pieces.push_back({{state, boxes.Add(lo, size), 0, volume}, image, offset});
  }
  SourceView View() const { return {states, boxes, pieces}; }
};

Stored OneTensor(const Sizes& shape, Dtype dtype = Dtype::kInt8) {
  Stored stored;
  stored.states.push_back({"w", "param", dtype, shape});
  return stored;
}

RankLayout WholeTensor(const TensorState& state) {
  RankLayout target;
  target.buffers.push_back({"b", state.Bytes()});
  target.segments.push_back({{0, kWholeTensor, 0, state.ElementCount()}, 0, kContiguous, 0});
  return target;
}

std::string CoverError(const Stored& stored) {
  const absl::Status status = CheckCover(stored.View());
  if (status.ok()) return "covered";
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  // What the whole checkpoint lacks, a plan for all of it lacks too.
  const auto plan = PlanCopy(stored.View(), stored.states, WholeTensor(stored.states[0]));
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kDataLoss);
  return std::string(status.message());
}

TEST(Planner, GapsAreNamed) {
  Stored ranges = OneTensor({10});
  EXPECT_THAT(CoverError(ranges),
              HasSubstr("tensor \"w\", state \"param\": expected elements [0, 10) "
                        "of 10 in an image, found them in none"));
  ranges.Range(0, 2, 5, 3);
  EXPECT_THAT(CoverError(ranges), HasSubstr("elements [0, 2)"));
  ranges.Range(0, 0, 2, 1);
  EXPECT_THAT(CoverError(ranges), HasSubstr("elements [5, 10)"));
  ranges.Range(0, 6, 10, 0);
  EXPECT_THAT(CoverError(ranges), HasSubstr("elements [5, 6)"));
  ranges.Range(0, 5, 6, 0);
  EXPECT_EQ(CoverError(ranges), "covered");

  Stored boxes = OneTensor({4, 6});
  boxes.Box(0, {0, 0}, {4, 3}, 0);
  EXPECT_THAT(CoverError(boxes), HasSubstr("expected element 3 (at [0, 3]) in an image"));
  boxes.Box(0, {0, 3}, {2, 3}, 1);
  EXPECT_THAT(CoverError(boxes), HasSubstr("expected element 15 (at [2, 3]) in an image"));
  boxes.Box(0, {2, 4}, {2, 2}, 2);
  EXPECT_THAT(CoverError(boxes), HasSubstr("expected element 15 (at [2, 3])"));
  boxes.Box(0, {2, 3}, {1, 1}, 2);
  EXPECT_THAT(CoverError(boxes), HasSubstr("expected element 21 (at [3, 3])"));
  boxes.Range(0, 21, 22, 2);
  EXPECT_EQ(CoverError(boxes), "covered");
}

TEST(Planner, OverlapsAreNamedWithImagesAndElements) {
  Stored ranges = OneTensor({10});
  ranges.Range(0, 0, 6, 3);
  ranges.Range(0, 5, 10, 4);
  EXPECT_THAT(CoverError(ranges),
              HasSubstr("expected every element once, found elements [0, 6) (image 3) and elements "
                        "[5, 10) (image 4) overlapping"));
  // As many elements as there are, one of them twice and one missing: not a matter of counting.
  Stored sneaky = OneTensor({10});
  sneaky.Range(0, 0, 6, 0);
  sneaky.Range(0, 5, 9, 1);
  EXPECT_THAT(CoverError(sneaky), HasSubstr("overlapping"));

  Stored boxes = OneTensor({4, 4});
  boxes.Box(0, {0, 0}, {3, 2}, 0);
  boxes.Box(0, {2, 0}, {2, 3}, 7);
  boxes.Box(0, {0, 2}, {2, 2}, 8);
  EXPECT_THAT(
      CoverError(boxes),
      HasSubstr("elements [0, 6) of the box [0:3, 0:2] (image 0) and elements [0, 6) of the "
                "box [2:4, 0:3] (image 7) overlapping"));
  Stored mixed = OneTensor({4, 4});
  mixed.Range(0, 0, 8, 0);
  mixed.Box(0, {1, 0}, {3, 2}, 1);
  mixed.Box(0, {2, 2}, {2, 2}, 2);
  EXPECT_THAT(CoverError(mixed), HasSubstr("overlapping"));
}

TEST(Planner, EqualPiecesAreReplicasHoweverTheyAreWritten) {
  Stored stored = OneTensor({4, 4});
  stored.Range(0, 0, 8, 0);
  stored.Box(0, {0, 0}, {2, 4}, 1);  // the same elements, as a box
  stored.Box(0, {2, 0}, {2, 2}, 2);
  stored.Box(0, {2, 0}, {2, 2}, 3);
  stored.Box(0, {2, 2}, {2, 2}, 3);
  EXPECT_EQ(CoverError(stored), "covered");
}

TEST(Planner, PiecesOutsideOfTheirTensorAreRefused) {
  const auto with = [](auto add) {
    Stored stored = OneTensor({4, 4});
    stored.Range(0, 0, 16, 0);
    add(stored);
    return CoverError(stored);
  };
  EXPECT_THAT(with([](Stored& s) { s.Range(0, 10, 17, 5); }),
              HasSubstr("expected a range within 16 elements, found [10, 17) (image 5)"));
  EXPECT_THAT(with([](Stored& s) { s.Range(0, 3, 2, 5); }), HasSubstr("found [3, 2)"));
  EXPECT_THAT(with([](Stored& s) { s.Range(1, 0, 1, 5); }),
              HasSubstr("image 5: expected a piece of one of 1 tensor states, found number 1"));
  EXPECT_THAT(with([](Stored& s) {
                s.pieces.push_back({{0, 0, 0, 1}, 5, 0});
              }),
              HasSubstr("expected one of 0 boxes, found number 0"));
  EXPECT_THAT(with([](Stored& s) { s.Box(0, {0}, {1}, 5); }),
              HasSubstr("a box of 2 dimensions, found 1"));
  EXPECT_THAT(with([](Stored& s) {
                s.Box(0, {3, 1}, {2, 1}, 5);
              }),
              HasSubstr("within 4 elements of dimension 0, found [3, 3 + 2)"));
  EXPECT_THAT(with([](Stored& s) {
                s.Box(0, {1, UINT64_MAX}, {1, 2}, 5);
              }),
              HasSubstr("dimension 1"));
  EXPECT_THAT(with([](Stored& s) {
                s.Box(0, {0, 0}, {2, 2}, 5);
                s.pieces.back().piece.end = 5;
              }),
              HasSubstr("a range within 4 elements, found [0, 5)"));
  EXPECT_THAT(with([](Stored& s) { s.Range(0, 0, 1, 5, UINT64_MAX); }),
              HasSubstr("an offset of at most 2^62"));
}

TEST(Planner, WhatTheCheckpointHasNotIsNamed) {
  Stored stored = OneTensor({4});
  stored.Range(0, 0, 4, 0);
  stored.states.push_back({"w", "exp_avg", Dtype::kFloat32, {4}});
  stored.Range(1, 0, 4, 0, 64);
  const auto plan_of = [&](const TensorState& wanted) {
    return PlanCopy(stored.View(), {wanted}, WholeTensor(wanted)).status();
  };
  EXPECT_TRUE(plan_of({"w", "param", Dtype::kInt8, {4}}).ok());
  EXPECT_EQ(plan_of({"v", "param", Dtype::kInt8, {4}}).ToString(),
            "FAILED_PRECONDITION: tensor \"v\", state \"param\": expected it in the checkpoint, "
            "found no such "
            "tensor; did you mean \"w\"?");
  EXPECT_EQ(plan_of({"w", "exp_avg_sq", Dtype::kInt8, {4}}).ToString(),
            "FAILED_PRECONDITION: tensor \"w\", state \"exp_avg_sq\": expected it in the "
            "checkpoint, found only "
            "its states param, exp_avg");
  EXPECT_EQ(
      plan_of({"w", "param", Dtype::kInt8, {2, 2}}).ToString(),
      "FAILED_PRECONDITION: tensor \"w\", state \"param\": expected int8[2, 2], as the layout "
      "says, found int8[4] in the checkpoint");
  EXPECT_EQ(plan_of({"w", "exp_avg", Dtype::kBfloat16, {4}}).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(StatesNotIn(stored.states, {stored.states[0]}), (std::vector<uint32_t>{1}));

  stored.states[1].state = "param";
  EXPECT_EQ(CheckCover(stored.View()).message(),
            "tensor \"w\", state \"param\": expected it once, found it twice");
}

TEST(Planner, NothingToCoverIsCovered) {
  Stored stored = OneTensor({3, 0});
  EXPECT_TRUE(CheckCover(stored.View()).ok());
  stored.Range(0, 0, 0, 0);
  stored.Box(0, {1, 0}, {2, 0}, 0);
  EXPECT_TRUE(CheckCover(stored.View()).ok());
  EXPECT_TRUE(CheckCover(Stored().View()).ok());
  Stored scalar = OneTensor({});
  EXPECT_FALSE(CheckCover(scalar.View()).ok());
  scalar.Box(0, {}, {}, 0);
  EXPECT_TRUE(CheckCover(scalar.View()).ok());
}

TEST(Planner, ReplicasAreReadEvenly) {
  Stored stored;
  RankLayout target;
  for (uint32_t i = 0; i < 90; ++i) {
    stored.states.push_back({absl::StrCat("t", i), "param", Dtype::kInt8, {100}});
    for (uint32_t image : {7u, 2u, 5u}) stored.Range(i, 0, 100, image, i * 100);
    target.segments.push_back({{i, kWholeTensor, 0, 100}, 0, kContiguous, i * 100});
  }
  target.buffers.push_back({"b", 9000});
  const auto plan = PlanCopy(stored.View(), stored.states, target);
  ASSERT_TRUE(plan.ok());
  std::map<uint32_t, uint64_t> bytes;
  for (const CopyOp& op : plan->ops) bytes[op.image] += op.Bytes();
  EXPECT_EQ(bytes, (std::map<uint32_t, uint64_t>{{2, 3000}, {5, 3000}, {7, 3000}}));
}

// Random grids of boxes, from which pieces are taken away, moved or grown: the verdict must be that
// of counting every element.
TEST(Planner, TheVerdictIsThatOfCountingEveryElement) {
  const uint64_t seed = 20251126;
  printf("seed %llu\n", static_cast<unsigned long long>(seed));
  int good = 0;
  int bad = 0;
  for (uint64_t round = 0; round < 6000; ++round) {
    std::mt19937_64 random(seed + round);
    const size_t dims = 1 + random() % 3;
    Sizes shape;
    for (size_t d = 0; d < dims; ++d) shape.push_back(1 + random() % 5);
    Stored stored = OneTensor(shape);
    // A grid by recursive halving.
    std::vector<std::pair<Sizes, Sizes>> boxes = {{Sizes(dims, 0), shape}};
    for (int split = static_cast<int>(random() % 8); split > 0; --split) {
      const size_t which = random() % boxes.size();
      const size_t d = random() % dims;
      if (boxes[which].second[d] < 2) continue;
      const uint64_t cut = 1 + random() % (boxes[which].second[d] - 1);
      auto upper = boxes[which];
      upper.first[d] += cut;
      upper.second[d] -= cut;
      boxes[which].second[d] = cut;
      boxes.push_back(upper);
    }
    for (size_t i = 0; i < boxes.size(); ++i) {
      auto& [lo, size] = boxes[i];
      const int fate = static_cast<int>(random() % 24);
      if (fate == 0) continue;
      const size_t d = random() % dims;
      if (fate == 1 && lo[d] > 0) --lo[d];
      if (fate == 2 && lo[d] + size[d] < shape[d]) ++size[d];
      if (fate == 3) --size[d];
      stored.Box(0, lo, size, static_cast<uint32_t>(i));
      if (fate == 4) stored.Box(0, lo, size, 99);
      if (fate == 5 && stored.pieces.back().piece.end > 1) {  // one piece as two ranges of its box
        StoredPiece rest = stored.pieces.back();
        stored.pieces.back().piece.end = 1;
        rest.piece.begin = 1;
        stored.pieces.push_back(rest);
      }
    }
    // Count, after dropping equal sets of elements.
    std::set<std::vector<uint64_t>> distinct;
    for (const StoredPiece& stored_piece : stored.pieces) {
      const BoxView box = stored.boxes[stored_piece.piece.box];
      std::vector<uint64_t> elements;
      for (uint64_t e = stored_piece.piece.begin; e < stored_piece.piece.end; ++e) {
        uint64_t rest = e;
        Sizes at(dims);
        for (size_t d = dims; d-- > 0;) {
          at[d] = box.lo[d] + rest % box.size[d];
          rest /= box.size[d];
        }
        uint64_t global = 0;
        for (size_t d = 0; d < dims; ++d) global = global * shape[d] + at[d];
        elements.push_back(global);
      }
      if (!elements.empty()) distinct.insert(elements);
    }
    std::vector<int> count(stored.states[0].ElementCount(), 0);
    for (const auto& elements : distinct) {
      for (uint64_t element : elements) ++count[element];
    }
    const bool exact = std::all_of(count.begin(), count.end(), [](int n) { return n == 1; });
    const std::string verdict = CoverError(stored);
    ASSERT_EQ(verdict == "covered", exact) << "round " << round << ": " << verdict;
    ++(exact ? good : bad);
  }
  printf("%d covered, %d refused\n", good, bad);
  EXPECT_GT(good, 1000);
  EXPECT_GT(bad, 1000);
}

// Targets whose elements lie at any strides, permuted and padded; and back into an image.
TEST(Planner, StridedBuffersAreFilledAndCapturedElementByElement) {
  const uint64_t seed = 20251127;
  printf("seed %llu\n", static_cast<unsigned long long>(seed));
  for (uint64_t round = 0; round < 3000; ++round) {
    std::mt19937_64 random(seed + round);
    const size_t dims = random() % 5;
    Sizes shape;
    for (size_t d = 0; d < dims; ++d) shape.push_back(1 + random() % 5);
    Stored stored = OneTensor(shape);
    const uint64_t count = stored.states[0].ElementCount();
    const uint64_t cut = random() % (count + 1);
    stored.Range(0, 0, cut, 0, 3);
    stored.Range(0, cut, count, 1, 5);
    std::vector<std::vector<uint8_t>> images = {std::vector<uint8_t>(3 + cut),
                                                std::vector<uint8_t>(5 + count - cut)};
    for (uint64_t e = 0; e < count; ++e) {
      (e < cut ? images[0][3 + e] : images[1][5 + e - cut]) = static_cast<uint8_t>(e);
    }
    Sizes lo;
    Sizes size;
    for (size_t d = 0; d < dims; ++d) {
      lo.push_back(random() % shape[d]);
      size.push_back(1 + random() % (shape[d] - lo[d]));
    }
    std::vector<size_t> order(dims);
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), random);
    std::vector<uint64_t> strides(dims);
    uint64_t stride = 1 + random() % 2;
    for (size_t d : order) {
      strides[d] = stride;
      stride = stride * size[d] + random() % 3;
    }
    RankLayout target;
    target.buffers.push_back({"b", stride + 7});
    target.strides_bytes.push_back(strides);
    const uint64_t volume =
        std::accumulate(size.begin(), size.end(), uint64_t{1}, std::multiplies<>());
    const uint32_t box = dims == 0 ? kWholeTensor : target.boxes.Add(lo, size);
    target.segments.push_back({{0, box, 0, volume}, 0, 0, 7});

    const auto plan = PlanCopy(stored.View(), stored.states, target);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    std::vector<uint8_t> buffer(target.buffers[0].bytes, 0xEE);
    std::vector<int> written(buffer.size(), 0);
    for (const CopyOp& op : plan->ops) {
      for (uint64_t i = 0; i < op.count; ++i) {
        for (uint64_t b = 0; b < op.run_bytes; ++b) {
          const uint64_t at = op.buffer_offset_bytes + i * op.buffer_stride_bytes + b;
          buffer.at(at) =
              images[op.image].at(op.image_offset_bytes + i * op.image_stride_bytes + b);
          ++written.at(at);
        }
      }
    }
    std::vector<uint8_t> expected(buffer.size(), 0xEE);
    std::vector<uint8_t> expected_image;
    for (uint64_t e = 0; e < count; ++e) {
      uint64_t rest = e;
      uint64_t at = 7;
      bool inside = true;
      for (size_t d = dims; d-- > 0;) {
        const uint64_t x = rest % shape[d];
        rest /= shape[d];
        inside = inside && x >= lo[d] && x < lo[d] + size[d];
        if (inside) at += (x - lo[d]) * strides[d];
      }
      if (!inside) continue;
      expected[at] = static_cast<uint8_t>(e);
      expected_image.push_back(static_cast<uint8_t>(e));
    }
    ASSERT_EQ(buffer, expected) << "round " << round;
    EXPECT_LE(*std::max_element(written.begin(), written.end()), 1);

    // A part of it back, as capture does: one behind the other in the image.
    Segment part = target.segments[0];
    part.piece.begin = random() % volume;
    part.piece.end = part.piece.begin + 1 + random() % (volume - part.piece.begin);
    std::vector<uint8_t> image(part.piece.ElementCount());
    for (const CopyOp& op : PlanSegment(stored.states, target, part, 0, 100)) {
      EXPECT_TRUE(op.count == 1 || op.image_stride_bytes == op.run_bytes);
      for (uint64_t i = 0; i < op.count; ++i) {
        for (uint64_t b = 0; b < op.run_bytes; ++b) {
          image.at(op.image_offset_bytes - 100 + i * op.image_stride_bytes + b) =
              buffer.at(op.buffer_offset_bytes + i * op.buffer_stride_bytes + b);
        }
      }
    }
    const auto begin = expected_image.begin() + static_cast<long>(part.piece.begin);
    EXPECT_EQ(image, std::vector<uint8_t>(begin, begin + static_cast<long>(image.size())));
  }
}

TEST(Planner, ClippingGivesEveryByteOfTheWindowOnceInOrder) {
  using Byte = std::pair<uint64_t, uint64_t>;  // image offset, buffer offset
  const auto bytes_of = [](const CopyOp& op, std::vector<Byte>& out) {
    for (uint64_t i = 0; i < op.count; ++i) {
      for (uint64_t b = 0; b < op.run_bytes; ++b) {
        out.emplace_back(op.image_offset_bytes + i * op.image_stride_bytes + b,
                         op.buffer_offset_bytes + i * op.buffer_stride_bytes + b);
      }
    }
  };
  for (uint64_t run : {1, 2, 3, 5}) {
    for (uint64_t count : {1, 2, 3, 6}) {
      for (uint64_t gap : {0, 1, 4}) {
        CopyOp op{4, 2, 10, 1000, run, count, run + gap, run + 3};
        if (count == 1) op.image_stride_bytes = op.buffer_stride_bytes = 0;
        std::vector<Byte> all;
        bytes_of(op, all);
        for (uint64_t begin = 0; begin <= op.ImageEnd() + 2; ++begin) {
          for (uint64_t end = begin; end <= op.ImageEnd() + 2; ++end) {
            std::vector<CopyOp> parts;
            ClipToImage(op, begin, end, parts);
            EXPECT_LE(parts.size(), 3u);
            std::vector<Byte> clipped;
            for (const CopyOp& part : parts) {
              EXPECT_EQ(part.image, 4u);
              EXPECT_EQ(part.buffer, 2u);
              EXPECT_GT(part.Bytes(), 0u);
              EXPECT_TRUE(part.count > 1 || part.image_stride_bytes == 0);
              bytes_of(part, clipped);
            }
            std::vector<Byte> expected;
            for (const Byte& byte : all) {
              if (byte.first >= begin && byte.first < end) expected.push_back(byte);
            }
            ASSERT_EQ(clipped, expected)
                << run << " " << count << " " << gap << " " << begin << " " << end;
          }
        }
      }
    }
  }
}

std::string BigDocument(const std::string& mesh, const std::string& place) {
  return absl::StrCat(R"({"holdfast_layout":1,"mesh":)", mesh,
                      R"(,"tensors":[{"name":"big","shape":[262144,65536],"states":[)",
                      R"({"state":"param","dtype":"float32","place":)", place, "}]}]}");
}

// What a layout's writers store, with images packed tightly.
Stored Store(const Layout& layout) {
  Stored stored;
  stored.states = layout.tensor_states();
  const WriterAssignment writers = WriterAssignment::Create(layout);
  for (uint32_t rank = 0; rank < layout.world_size(); ++rank) {
    uint64_t offset = 0;
    const auto pieces = writers.ForRank(Rank{rank}, {});
    EXPECT_TRUE(pieces.ok());
    for (const Segment& segment : pieces->segments) {
      Piece piece = segment.piece;
      if (piece.box != kWholeTensor) {
        piece.box = stored.boxes.Add(pieces->boxes[piece.box].lo, pieces->boxes[piece.box].size);
      }
      stored.pieces.push_back({piece, rank, offset});
      offset += piece.ElementCount() * ElementBytes(stored.states[piece.tensor_state].dtype);
    }
  }
  return stored;
}

TEST(Planner, MoreThanFourBillionElementsArePlannedInFewOps) {
  const auto from = Layout::Parse(BigDocument(
      R"([{"axis":"tp","size":4}])", R"([{"op":"shard","dim":1,"axis":"tp","rule":"even"}])"));
  const auto to = Layout::Parse(BigDocument(R"([{"axis":"dp","size":3}])",
                                            R"([{"op":"flat","axis":"dp","rule":"balanced"}])"));
  ASSERT_TRUE(from.ok() && to.ok());
  const Stored stored = Store(**from);
  ASSERT_TRUE(CheckCover(stored.View()).ok());
  uint64_t all = 0;
  for (uint32_t rank = 0; rank < 3; ++rank) {
    const auto target = (*to)->ForRank(Rank{rank});
    const auto plan = PlanCopy(stored.View(), (*to)->tensor_states(), *target);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    EXPECT_EQ(plan->bytes, target->buffers[0].bytes);
    EXPECT_LE(plan->ops.size(), 12u);
    for (const CopyOp& op : plan->ops) {
      EXPECT_LE(op.ImageEnd(), uint64_t{1} << 34);
      EXPECT_LE(op.buffer_offset_bytes + (op.count - 1) * op.buffer_stride_bytes + op.run_bytes,
                target->buffers[0].bytes);
    }
    all += plan->bytes;
  }
  EXPECT_EQ(all, uint64_t{1} << 36);
}

TEST(Planner, LargeCheckpointsPlanRankByRank) {
  std::string tensors;
  for (int i = 0; i < 20'000; ++i) {
    absl::StrAppend(&tensors, i ? "," : "", R"({"name":"layers.)", i, R"(","shape":[)", 60 + i % 7,
                    R"(,48],"states":[{"state":"param","dtype":"bfloat16","place":"w"},)",
                    R"({"state":"exp_avg","dtype":"float32","place":"o"}]})");
  }
  const auto job = [&tensors](const std::string& mesh, const std::string& row) {
    return Layout::Parse(
        absl::StrCat(R"({"holdfast_layout":1,"mesh":)", mesh,
                     R"(,"packs":[{"pack":"m","axis":"dp","buffer":"m"}],"placements":{"w":)", row,
                     R"(,"o":[{"op":"pack","pack":"m"}]},"tensors":[)", tensors, "]}"));
  };
  const auto from = job(R"([{"axis":"dp","size":8},{"axis":"tp","size":2}])",
                        R"([{"op":"shard","dim":1,"axis":"tp","rule":"even"}])");
  const auto to = job(R"([{"axis":"dp","size":3}])", "[]");
  ASSERT_TRUE(from.ok() && to.ok()) << from.status().ToString() << to.status().ToString();
  const Stored stored = Store(**from);
  const auto target = (*to)->ForRank(Rank{1});
  const absl::Time begin = absl::Now();
  ASSERT_TRUE(CheckCover(stored.View()).ok());
  const absl::Time checked = absl::Now();
  const auto plan = PlanCopy(stored.View(), (*to)->tensor_states(), *target);
  const absl::Time planned = absl::Now();
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  printf("%zu pieces of %zu tensor states: cover %s, plan of one rank %s (%zu ops)\n",
         stored.pieces.size(), stored.states.size(), absl::FormatDuration(checked - begin).c_str(),
         absl::FormatDuration(planned - checked).c_str(), plan->ops.size());
  uint64_t bytes = 0;
  for (const Segment& segment : target->segments) {
    bytes += segment.piece.ElementCount() *
             ElementBytes(stored.states[segment.piece.tensor_state].dtype);
  }
  EXPECT_EQ(plan->bytes, bytes);
}

}  // namespace
}  // namespace holdfast
