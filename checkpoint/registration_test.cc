// Documents understood and refused: every refusal names what is wrong, and no garbage is believed.
#include "checkpoint/registration.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "checkpoint/capture_harness.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;

RegistrationOwner Owner(uint32_t rank = 0, uint32_t world_size = 1, uint64_t block_bytes = 4096) {
  RegistrationOwner owner;
  owner.job = "job";
  owner.job_uuid = kTestUuid;
  owner.rank = Rank{rank};
  owner.world_size = world_size;
  owner.block_bytes = block_bytes;
  return owner;
}

absl::StatusOr<std::shared_ptr<const Registration>> Build(const std::vector<TrainerBuffer>& buffers,
                                                          const std::vector<TrainerBlob>& blobs,
                                                          const std::string& layout = TestLayout(1),
                                                          const RegistrationOwner& owner = Owner(),
                                                          abi::Copies copies = abi::Copies::kOnce) {
  return Registration::Build(EncodeDocument(layout, buffers, blobs, copies), owner,
                             TestScratchDirectory());
}

// Every byte of a slot has exactly one writer: head, an op, a blob's area, or a gap.
void ExpectOneWriterPerByte(const Registration& registration) {
  std::vector<int> writers(registration.slot_bytes());
  const auto add = [&](uint64_t begin, uint64_t end) {
    ASSERT_LE(end, writers.size());
    for (uint64_t i = begin; i < end; ++i) ++writers[i];
  };
  add(0, registration.image().head_bytes());
  uint64_t last_offset = 0;
  for (const abi::CaptureOp& op : registration.capture_ops()) {
    EXPECT_GE(op.image_offset, last_offset);
    last_offset = op.image_offset;
    add(op.image_offset, op.image_offset + op.run_bytes * op.count);
    const RegisteredBuffer& buffer = registration.buffers()[op.buffer_index];
    EXPECT_LE(op.buffer_offset + (op.count - 1) * op.buffer_stride + op.run_bytes, buffer.bytes);
    EXPECT_EQ(op.group, buffer.group);
    for (uint64_t block = op.image_offset / 4096;
         block * 4096 < op.image_offset + op.run_bytes * op.count; ++block) {
      EXPECT_EQ(registration.writer_of(static_cast<uint32_t>(block)), Registration::Writer::kOps);
    }
  }
  for (const RegisteredBlob& blob : registration.blobs()) {
    if (blob.image_offset_bytes) {
      add(*blob.image_offset_bytes, *blob.image_offset_bytes + blob.capacity_bytes);
    }
  }
  for (const ImageRange& gap : registration.gaps()) {
    EXPECT_LT(gap.begin, gap.end);
    add(gap.begin, gap.end);
  }
  for (size_t i = 0; i < writers.size(); ++i) ASSERT_EQ(writers[i], 1) << "byte " << i;
}

TEST(RegistrationTest, EveryByteOfAnImageHasOneWriterOnEveryRank) {
  for (const uint32_t world_size : {1u, 2u, 5u}) {
    uint64_t tensor_bytes = 0;
    for (uint32_t rank = 0; rank < world_size; ++rank) {
      SCOPED_TRACE(testing::Message() << "rank " << rank << " of " << world_size);
      ASSERT_OK_AND_ASSIGN(
          const auto registration,
          Build(TestBuffers(), TestBlobs(), TestLayout(world_size), Owner(rank, world_size)));
      ExpectOneWriterPerByte(*registration);
      for (const abi::CaptureOp& op : registration->capture_ops()) {
        tensor_bytes += op.run_bytes * op.count;
      }
      // A global blob is rank 0's.
      EXPECT_EQ(registration->blobs()[1].image_offset_bytes.has_value(), rank == 0);
      EXPECT_TRUE(registration->blobs()[0].image_offset_bytes.has_value());
      EXPECT_EQ(registration->holdings().buffers.size(), registration->buffer_of_need().size());
    }
    // Replicated state is captured once in all.
    EXPECT_EQ(tensor_bytes, 37u * 5 * 4 * 2 + 14 + 3001 * 4 + 8);
  }
}

// The image is the same bytes at the same places, whatever is captured besides.
TEST(RegistrationTest, ExtraCopiesLieBehindAnImageThatDoesNotChange) {
  constexpr uint64_t kTensorBytes = 37u * 5 * 4 * 2 + 14 + 3001 * 4 + 8;
  for (const uint32_t world_size : {1u, 2u, 5u}) {
    for (uint32_t rank = 0; rank < world_size; ++rank) {
      SCOPED_TRACE(testing::Message() << "rank " << rank << " of " << world_size);
      const auto build = [&](abi::Copies copies) {
        return Build(TestBuffers(), TestBlobs(), TestLayout(world_size), Owner(rank, world_size),
                     copies);
      };
      ASSERT_OK_AND_ASSIGN(const auto once, build(abi::Copies::kOnce));
      ASSERT_OK_AND_ASSIGN(const auto per_node, build(abi::Copies::kPerNode));
      ASSERT_OK_AND_ASSIGN(const auto all, build(abi::Copies::kAll));
      ExpectOneWriterPerByte(*all);
      for (const auto& none : {once, per_node}) {
        EXPECT_EQ(none->slot_block_count(), none->block_count());
        EXPECT_TRUE(none->replicas().replicas.empty());
      }
      EXPECT_TRUE(std::ranges::equal(once->capture_plan(), per_node->capture_plan()));
      EXPECT_EQ(all->image_bytes(), once->image_bytes());
      const auto ops = all->capture_ops().first(once->capture_ops().size());
      EXPECT_TRUE(std::ranges::equal(std::as_bytes(ops), std::as_bytes(once->capture_ops())));
      // All that it holds is captured, in the image or behind it.
      uint64_t bytes = 0;
      for (const abi::CaptureOp& op : all->capture_ops()) bytes += op.run_bytes * op.count;
      EXPECT_EQ(bytes, kTensorBytes);
      EXPECT_EQ(all->slot_block_count() > all->block_count(), world_size > 1);
      EXPECT_EQ(all->replicas().replicas.size(), world_size > 1 ? 5u : 0u);
    }
  }
}

TEST(RegistrationTest, APieceOfABoxIsStoredWithItsBox) {
  const std::string layout =
      R"({"holdfast_layout":1,"mesh":[{"axis":"tp","size":2}],"tensors":[
      {"name":"w","shape":[4,5],"states":[{"state":"param","dtype":"float32",
       "place":[{"op":"shard","dim":1,"axis":"tp","rule":"ceil"}]}]}]})";
  for (const uint32_t rank : {0u, 1u}) {
    ASSERT_OK_AND_ASSIGN(const auto registration,
                         Build({{"param/w", 4 * 3 * 4, 0}}, {}, layout, Owner(rank, 2)));
    ASSERT_EQ(registration->stored_pieces().size(), 1u);
    const Piece& piece = registration->stored_pieces()[0].piece;
    ASSERT_LT(piece.box, registration->stored_boxes().size());
    const BoxView box = registration->stored_boxes()[piece.box];
    EXPECT_THAT(box.lo, testing::ElementsAre(0, rank == 0 ? 0 : 3));
    EXPECT_THAT(box.size, testing::ElementsAre(4, rank == 0 ? 3 : 2));
    ExpectOneWriterPerByte(*registration);
  }
}

TEST(RegistrationTest, TheSameDocumentGivesTheSameImage) {
  ASSERT_OK_AND_ASSIGN(const auto first, Build(TestBuffers(), TestBlobs()));
  ASSERT_OK_AND_ASSIGN(const auto second, Build(TestBuffers(), TestBlobs()));
  EXPECT_EQ(first->image_bytes(), second->image_bytes());
  EXPECT_TRUE(std::ranges::equal(first->capture_plan(), second->capture_plan()));
  EXPECT_TRUE(std::ranges::equal(first->gaps(), second->gaps()));
  const uint64_t head_bytes = first->image().head_bytes();
  ASSERT_EQ(head_bytes, second->image().head_bytes());
  const std::vector<uint64_t> lengths = {1, 2, 0};
  std::vector<std::byte> heads[2];
  for (int i = 0; i < 2; ++i) {
    heads[i].resize(head_bytes);
    const ImageStamp stamp = {{Attempt{1}, Step{9}}, lengths};
    (i == 0 ? first : second)->image().StampHead(stamp, 0, heads[i]);
  }
  EXPECT_EQ(heads[0], heads[1]);
}

TEST(RegistrationTest, NothingAtAllIsAnImageToo) {
  ASSERT_OK_AND_ASSIGN(
      const auto registration,
      Build({}, {}, R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":1}],"tensors":[]})"));
  EXPECT_TRUE(registration->capture_ops().empty());
  EXPECT_GE(registration->block_count(), 1u);
  ExpectOneWriterPerByte(*registration);
}

TEST(RegistrationTest, BuffersAreComparedByName) {
  std::vector<TrainerBuffer> buffers = TestBuffers();
  buffers.erase(buffers.begin() + 1);
  EXPECT_THAT(Build(buffers, {}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("\"param/wte\" is not registered"), HasSubstr("740"))));
  buffers = TestBuffers();
  buffers[1].bytes = 739;
  EXPECT_THAT(Build(buffers, {}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("\"param/wte\""), HasSubstr("740"), HasSubstr("739"))));
  buffers = TestBuffers();
  buffers.push_back({"param/wtf", 8, 0});
  EXPECT_THAT(Build(buffers, {}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("\"param/wtf\""), HasSubstr("places nothing"),
                             HasSubstr("did you mean \"param/wte\""))));
  buffers = TestBuffers();
  buffers.push_back(buffers[2]);
  EXPECT_THAT(Build(buffers, {}), StatusIs(absl::StatusCode::kInvalidArgument,
                                           HasSubstr("\"exp_avg/wte\" is registered twice")));
  buffers = TestBuffers();
  buffers[0].group = 64;
  EXPECT_THAT(Build(buffers, {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("64")));
  buffers = TestBuffers();
  buffers[0].name = std::string(5000, 'n');
  EXPECT_THAT(Build(buffers, {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("4096")));
  buffers[0].name = "param/\xff";
  EXPECT_THAT(Build(buffers, {}), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(RegistrationTest, WhatElseIsRefusedByName) {
  EXPECT_THAT(Build(TestBuffers(), {{"x", 0, 1}, {"x", 1, 1}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"x\" is registered twice")));
  EXPECT_THAT(Build(TestBuffers(), {{"x", 2, 1}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("found 2")));
  EXPECT_THAT(Build(TestBuffers(), {{"x", 0, UINT64_MAX}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("capacity")));
  EXPECT_THAT(Build(TestBuffers(), {}, TestLayout(2)),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("2 ranks"), HasSubstr("world size 1"))));
  EXPECT_THAT(Build(TestBuffers(), {}, TestLayout(1), Owner(), static_cast<abi::Copies>(3)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expected copies")));
  EXPECT_THAT(Build(TestBuffers(), {}, "{"), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(Build(TestBuffers(), {}, TestLayout(1), Owner(1, 1)),
              StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(Build(TestBuffers(), {}, TestLayout(1), Owner(0, 1, 5000)),
              StatusIs(absl::StatusCode::kInvalidArgument));
}

// A buffer is a number until somebody writes to it; the tables of its blocks are memory at once.
TEST(RegistrationTest, AnImageOfMoreBlocksThanTablesMayHaveIsRefused) {
  const auto error = [](uint64_t bytes) {
    const std::string layout = absl::StrFormat(
        R"({"holdfast_layout":1,"mesh":[],"tensors":[
        {"name":"w","shape":[%d],"states":[{"state":"param","dtype":"uint8"}]}]})",
        bytes);
    return Build({{"param/w", bytes, 0}}, {}, layout).status();
  };
  EXPECT_OK(error(uint64_t{1} << 30));
  EXPECT_THAT(error(kImageBlocksMax * 4096),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 67108864 blocks")));
}

// Offsets and counts are the trainer's: any value is refused or harmless.
TEST(RegistrationTest, GarbageDocumentsAreRefused) {
  const std::string good = EncodeDocument(TestLayout(1), TestBuffers(), TestBlobs());
  size_t refused = 0;
  for (size_t length = 0; length < sizeof(abi::RegistrationDocument) + 8; ++length) {
    EXPECT_FALSE(Registration::Build(good.substr(0, length), Owner(), TestScratchDirectory()).ok());
  }
  // Every field of the header and of the tables at its edges.
  const size_t tables = sizeof(abi::RegistrationDocument) +
                        TestBuffers().size() * sizeof(abi::DocumentBuffer) +
                        TestBlobs().size() * sizeof(abi::DocumentBlob);
  const uint64_t edges[] = {0,
                            1,
                            63,
                            good.size() - 1,
                            good.size(),
                            UINT32_MAX,
                            UINT64_MAX,
                            UINT64_MAX - 7,
                            uint64_t{1} << 63};
  for (size_t at = 0; at < tables; at += 8) {
    for (const uint64_t edge : edges) {
      std::string bad = good;
      if (std::memcmp(bad.data() + at, &edge, 8) == 0) continue;
      std::memcpy(bad.data() + at, &edge, 8);
      const auto built = Registration::Build(bad, Owner(), TestScratchDirectory());
      refused += built.ok() ? 0 : 1;
      // A capacity of gigabytes is allowed; looking at each byte of it would take long.
      if (built.ok() && (*built)->image_bytes() < 100'000) ExpectOneWriterPerByte(**built);
    }
  }
  EXPECT_GT(refused, 100u);
}

TEST(RegistrationTest, DocumentsMustBeSealed) {
  const std::string document = EncodeDocument(TestLayout(1), TestBuffers(), TestBlobs());
  const UniqueFd sealed = SealedDocument(document);
  EXPECT_THAT(ReadSealedMemory("document", sealed.get(), document.size(), 1 << 20),
              IsOkAndHolds(document));
  EXPECT_THAT(ReadSealedMemory("document", sealed.get(), document.size() + 1, 1 << 20),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("announced")));
  EXPECT_THAT(ReadSealedMemory("document", sealed.get(), document.size(), 10),
              StatusIs(absl::StatusCode::kResourceExhausted));
  ASSERT_OK_AND_ASSIGN(const auto writable, SharedMapping::Create("x", 4096));
  EXPECT_THAT(ReadSealedMemory("document", writable->fd(), 4096, 1 << 20),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("seals")));
  EXPECT_THAT(ReadSealedMemory("document", STDIN_FILENO, 4096, 1 << 20),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no memfd")));
}

// DESIGN's figure for registration: 100,000 tensors in less than 10 s. Printed, not asserted.
TEST(RegistrationTest, AHundredThousandTensors) {
  std::string layout = R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":4}],"tensors":[)";
  std::vector<TrainerBuffer> buffers;
  constexpr int kTensors = 100'000;
  for (int i = 0; i < kTensors; ++i) {
    absl::StrAppend(&layout, i == 0 ? "" : ",", R"({"name":"layer.)", i,
                    R"(.weight","shape":[16,4],"states":[{"state":"param","dtype":"float32"}]})");
    buffers.push_back({absl::StrCat("param/layer.", i, ".weight"), 256, 0});
  }
  layout += "]}";
  const auto begin = std::chrono::steady_clock::now();
  ASSERT_OK_AND_ASSIGN(const auto registration,
                       Build(buffers, {}, layout, Owner(1, 4, uint64_t{4} << 20)));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  printf("registration of %d tensors: %.2f s, head of %lu bytes\n", kTensors, took.count(),
         registration->image().head_bytes());
  // A quarter of the bytes is this rank's.
  uint64_t bytes = 0;
  for (const abi::CaptureOp& op : registration->capture_ops()) bytes += op.run_bytes * op.count;
  EXPECT_NEAR(static_cast<double>(bytes), kTensors * 256 / 4.0, 4096.0);
}

}  // namespace
}  // namespace holdfast
