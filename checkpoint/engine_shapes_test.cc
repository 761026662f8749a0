// What must work, from the save to the restore in other numbers of ranks: odd names, odd shapes,
// tensors that share bytes, none at all, very many, very large ones.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "checkpoint/engine_testing.h"
#include "checkpoint/group_index.h"
#include "checkpoint/restore.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

// A document for any number of ranks.
using LayoutOf = std::function<std::string(uint32_t world_size)>;

std::string Document(uint32_t world_size, const std::string& tensors,
                     const std::string& more = "") {
  return absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":%d}],%s"tensors":[%s]})", world_size,
      more, tensors);
}

std::string Tensor(const std::string& name, const std::string& shape, const std::string& dtype,
                   const std::string& more = "") {
  return absl::StrFormat(R"({"name":"%s","shape":%s,"states":[{"state":"param","dtype":"%s"%s}]})",
                         name, shape, dtype, more);
}

LayoutOf Named(std::vector<std::string> names) {
  return [names = std::move(names)](uint32_t world_size) {
    std::string tensors;
    for (const std::string& name : names) {
      absl::StrAppend(&tensors, tensors.empty() ? "" : ",",
                      Tensor(name, "[7,3]", "float32",
                             R"(,"place":[{"op":"shard","dim":0,"axis":"dp","rule":"balanced"}])"));
    }
    return Document(world_size, tensors);
  };
}

// Each in a buffer of its own name, which has a limit of its own.
LayoutOf Long(std::vector<std::string> names) {
  std::string tensors;
  for (size_t i = 0; i < names.size(); ++i) {
    absl::StrAppend(&tensors, i == 0 ? "" : ",",
                    Tensor(names[i], "[7,3]", "float32", absl::StrCat(R"(,"buffer":"b)", i, "\"")));
  }
  return [tensors](uint32_t world_size) { return Document(world_size, tensors); };
}

LayoutOf Fixed(const std::string& tensors) {
  return [tensors](uint32_t world_size) { return Document(world_size, tensors); };
}

struct Shape {
  const char* name;
  LayoutOf layout;
};

std::vector<Shape> Shapes() {
  const std::string tied = R"(,"buffer":"shared","offset_bytes":64)";
  const std::string sharded = R"(,"place":[{"op":"shard","dim":1,"axis":"dp","rule":"ceil"}])";
  return {
      {"no tensor at all", Fixed("")},
      {"a name that is the beginning of another", Named({"a", "a/b", "a/b/c", "a.b", "a/", "ab"})},
      {"dots and slashes", Named({".", "..", "/", "//", "a//b", "../up", "./a", "a/../b"})},
      {"unicode and blanks",
       Named({"模型/层.0", "é", "e\u0301", " ", "a b", "\\\"", "\\\\", "\\n"})},
      {"names of 4 KiB", Long({std::string(4096, 'x'), std::string(4095, 'x') + "y",
                               std::string(2048, 'x') + "/" + std::string(2047, 'x')})},
      {"sizes of zero, and scalars",
       Fixed(absl::StrCat(Tensor("none", "[0]", "float32"), ",", Tensor("no rows", "[0,5]", "int8"),
                          ",", Tensor("no columns", "[5,0,2]", "float64"), ",",
                          Tensor("scalar", "[]", "int64"), ",", Tensor("one", "[1,1]", "bool"), ",",
                          Tensor("cut", "[3,2]", "bfloat16", sharded)))},
      {"tied tensors",
       Fixed(absl::StrCat(Tensor("wte", "[9,5]", "float32", tied), ",",
                          Tensor("lm_head", "[9,5]", "float32", tied), ",",
                          Tensor("other", "[4]", "int16", R"(,"buffer":"shared")")))},
  };
}

// Saved in `from` ranks, restored in `to`, by this agent from its memory and by another one from
// storage.
void ExpectRoundTrip(const LayoutOf& layout, uint32_t from, uint32_t to,
                     const EngineHarnessOptions& options,
                     const std::vector<bool>& from_memory_choices) {
  for (const bool from_memory : from_memory_choices) {
    SimDisk disk;
    auto harness = std::make_unique<EngineHarness>(disk, options);
    ASSERT_OK_AND_ASSIGN(const auto trainers, harness->LaunchIn(layout(from), "a"));
    harness->SaveAll(trainers, 7);
    for (TestTrainer* trainer : trainers) {
      ASSERT_EQ(EngineHarness::CommittedPower(*trainer), 7u) << trainer->script->ReportOf(7)->text;
    }
    for (TestTrainer* trainer : trainers) harness->Kill(*trainer);
    if (!from_memory) {
      harness.reset();
      EngineHarnessOptions other = options;
      other.writer = "x";
      harness = std::make_unique<EngineHarness>(disk, other);
    }
    ASSERT_OK_AND_ASSIGN(const auto again, harness->LaunchIn(layout(to), "b"));
    for (TestTrainer* trainer : again) {
      const RestoreOutcome outcome = harness->Restore(*trainer);
      ASSERT_OK(outcome.status);
      EXPECT_EQ(outcome.bytes_from_memory, from_memory ? outcome.bytes : 0);
      EXPECT_TRUE(outcome.buffers == StateAfter(*trainer->layout, trainer->rank, 7));
      EXPECT_EQ(outcome.blobs.size(), from + 1);
    }
  }
}

TEST(EngineShapes, GoFromTheSaveToTheRestoreInOtherNumbersOfRanks) {
  for (const Shape& shape : Shapes()) {
    for (const auto& [from, to] : {std::pair(1u, 3u), std::pair(3u, 2u), std::pair(2u, 2u)}) {
      SCOPED_TRACE(testing::Message() << shape.name << ", " << from << " to " << to);
      ExpectRoundTrip(shape.layout, from, to, {}, {true, false});
      if (HasFatalFailure()) return;
    }
  }
}

TEST(EngineShapes, AHundredThousandTensors) {
  const LayoutOf layout = [](uint32_t world_size) {
    std::string tensors;
    for (int i = 0; i < 100'000; ++i) {
      absl::StrAppend(&tensors, i == 0 ? "" : ",",
                      Tensor(absl::StrCat("layer.", i, ".weight"), "[3]", "int16"));
    }
    return Document(world_size, tensors);
  };
  ExpectRoundTrip(layout, 2, 1,
                  {.host_memory_bytes = uint64_t{2} << 30, .block_bytes = uint64_t{1} << 20},
                  {false});
}

// A tensor of 5 GiB, of which nothing is allocated: every element of the ranks that restore it
// comes from its own place in the image, on both sides of 4 GiB.
TEST(EngineShapes, ATensorOfMoreThanFourGibibytesIsPlannedElementByElement) {
  constexpr uint64_t kElements = uint64_t{5} << 28;  // of 4 bytes
  constexpr uint64_t kBlockBytes = uint64_t{4} << 20;
  const auto build = [&](Rank rank, uint32_t world_size) {
    const std::string document = Document(
        world_size, Tensor("big", absl::StrFormat("[%d]", kElements), "float32",
                           R"(,"place":[{"op":"shard","dim":0,"axis":"dp","rule":"balanced"}])"));
    std::vector<TrainerBuffer> buffers;
    const std::unique_ptr<const Layout> layout = Layout::Parse(document).value();
    const RankLayout held = layout->ForRank(rank).value();
    for (const BufferNeed& need : held.buffers) buffers.push_back({need.name, need.bytes, 0});
    return Registration::Build(EncodeDocument(document, buffers, {}),
                               {.job = "job",
                                .job_uuid = "01234567-89ab-4cde-8f01-23456789abcd",
                                .rank = rank,
                                .world_size = world_size,
                                .block_bytes = kBlockBytes},
                               testing::TempDir());
  };
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<const Registration> source, build(Rank{0}, 1));
  const CheckpointId id{Attempt{1}, Step{1}};
  SealedImage image;
  image.checkpoint = id;
  image.image_bytes = source->image_bytes();
  image.block_bytes = kBlockBytes;
  image.block_crc32c.resize(source->block_count());
  ASSERT_OK_AND_ASSIGN(const Index index, BuildIndex(id, {{source, image, "rank-00000.h5"}}));
  ASSERT_EQ(index.pieces.size(), 1u);
  const uint64_t dataset = index.pieces[0].offset_bytes;

  // What is captured: one run, in order.
  uint64_t captured = 0;
  for (const abi::CaptureOp& op : source->capture_ops()) {
    EXPECT_EQ(op.image_offset, dataset + op.buffer_offset);
    EXPECT_EQ(op.buffer_offset, captured);
    captured += op.run_bytes * op.count;
  }
  EXPECT_EQ(captured, 4 * kElements);

  uint64_t rank_begin = 0;  // of the buffer, in the tensor
  for (uint32_t rank = 0; rank < 3; ++rank) {
    ASSERT_OK_AND_ASSIGN(const std::shared_ptr<const Registration> target, build(Rank{rank}, 3));
    ASSERT_OK_AND_ASSIGN(const RestorePlan plan, PlanRestore(index, *target, kBlockBytes));
    uint64_t next = 0;
    for (const RestorePiece& piece : plan.pieces) {
      for (uint64_t i = piece.first_op; i < piece.first_op + piece.op_count; ++i) {
        const abi::RestoreOp& op = plan.ops[i];
        ASSERT_EQ(op.count, 1u);
        ASSERT_LE(op.source_offset + op.run_bytes, piece.bytes);
        ASSERT_EQ(op.buffer_offset, next);
        ASSERT_EQ(piece.block * kBlockBytes + piece.offset_bytes + op.source_offset,
                  dataset + rank_begin + next);
        next += op.run_bytes;
      }
    }
    EXPECT_EQ(next, target->buffers()[0].bytes);
    rank_begin += next;
  }
  EXPECT_EQ(rank_begin, 4 * kElements);
  EXPECT_GT(rank_begin, uint64_t{UINT32_MAX});
}

}  // namespace
}  // namespace holdfast
