// Goal: for any two layouts, what one writes the other reads, to the byte, and nothing else.
// Method: random pairs of documents over all operations; the oracle says what every buffer holds;
// the source's buffers go through writer assignment and plans into images in memory, and from there
// through the planner into buffers of the target, which must be the oracle's, padding untouched.
#include "format/layout_oracle.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "format/layout.h"
#include "format/planner.h"
#include "format/writer_assignment.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using Buffers = std::map<std::string, std::vector<uint8_t>>;

struct Side {
  std::unique_ptr<const Layout> layout;
  std::vector<Buffers> buffers;  // of each rank, by the oracle
};

struct Checkpoint {
  BoxTable boxes;
  std::vector<StoredPiece> pieces;
  std::vector<std::vector<uint8_t>> images;
};

// Nothing if a rule does not fit: then the parser must have said so too.
bool Make(const oracle::Document& document, oracle::Random& random, Side& side) {
  const std::string json = oracle::ToJson(document, random);
  auto layout = Layout::Parse(json);
  bool fits = true;
  for (uint64_t rank = 0; rank < document.WorldSize(); ++rank) {
    auto buffers = oracle::Lower(document, rank);
    fits = fits && buffers.has_value();
    if (buffers.has_value()) side.buffers.push_back(std::move(*buffers));
  }
  EXPECT_EQ(layout.ok(), fits) << layout.status().ToString() << "\n" << json;
  if (!layout.ok() || !fits) return false;
  side.layout = std::move(*layout);
  EXPECT_EQ(side.layout->world_size(), document.WorldSize());
  return true;
}

void ExpectNeedsOf(const RankLayout& layout, const Buffers& buffers) {
  ASSERT_EQ(layout.buffers.size(), buffers.size());
  for (const BufferNeed& need : layout.buffers) {
    const auto found = buffers.find(need.name);
    ASSERT_NE(found, buffers.end()) << need.name;
    EXPECT_EQ(need.bytes, found->second.size()) << need.name;
  }
}

void Copy(const CopyOp& op, const std::vector<uint8_t>& from, std::vector<uint8_t>& to,
          bool to_image) {
  for (uint64_t i = 0; i < op.count; ++i) {
    const uint64_t image = op.image_offset_bytes + i * op.image_stride_bytes;
    const uint64_t buffer = op.buffer_offset_bytes + i * op.buffer_stride_bytes;
    const uint64_t source = to_image ? buffer : image;
    const uint64_t target = to_image ? image : buffer;
    ASSERT_LE(source + op.run_bytes, from.size());
    ASSERT_LE(target + op.run_bytes, to.size());
    memcpy(to.data() + target, from.data() + source, op.run_bytes);
  }
}

// Captures what the assignment says into images, with gaps between the pieces.
void Store(const Side& side, oracle::Random& random, Checkpoint& checkpoint) {
  const WriterAssignment writers = WriterAssignment::Create(*side.layout);
  uint64_t stored_bytes = 0;
  for (uint32_t rank = 0; rank < side.layout->world_size(); ++rank) {
    const auto whole = side.layout->ForRank(Rank{rank});
    ASSERT_TRUE(whole.ok()) << whole.status().ToString();
    ExpectNeedsOf(*whole, side.buffers[rank]);
    std::vector<uint32_t> groups;
    for (size_t i = 0; i < whole->buffers.size(); ++i) {
      groups.push_back(static_cast<uint32_t>(random() % 3));
    }
    const auto stored = writers.ForRank(Rank{rank}, groups);
    ASSERT_TRUE(stored.ok());
    std::vector<uint8_t> image;
    uint32_t last_group = 0;
    for (const Segment& segment : stored->segments) {
      EXPECT_GE(groups[segment.buffer], last_group);
      last_group = groups[segment.buffer];
      const TensorState& state = side.layout->tensor_states()[segment.piece.tensor_state];
      const uint64_t offset = image.size() + random() % 9;
      const uint64_t bytes = segment.piece.ElementCount() * ElementBytes(state.dtype);
      stored_bytes += bytes;
      image.resize(offset + bytes, 0xAA);
      for (const CopyOp& op :
           PlanSegment(side.layout->tensor_states(), *stored, segment, rank, offset)) {
        EXPECT_EQ(op.image, rank);
        Copy(op, side.buffers[rank].at(stored->buffers[op.buffer].name), image, true);
      }
      Piece piece = segment.piece;
      if (piece.box != kWholeTensor) {
        const BoxView box = stored->boxes[piece.box];
        piece.box = checkpoint.boxes.Add(box.lo, box.size);
      }
      checkpoint.pieces.push_back({piece, rank, offset});
    }
    checkpoint.images.push_back(std::move(image));
  }
  uint64_t distinct_bytes = 0;
  for (const TensorState& state : side.layout->tensor_states()) distinct_bytes += state.Bytes();
  EXPECT_EQ(stored_bytes, distinct_bytes) << "every element has exactly one writer";
}

void RestoreAndCompare(const Side& from, const Checkpoint& checkpoint, const Side& to) {
  const SourceView source{from.layout->tensor_states(), checkpoint.boxes, checkpoint.pieces};
  const absl::Status cover = CheckCover(source);
  ASSERT_TRUE(cover.ok()) << cover.ToString();
  for (uint32_t rank = 0; rank < to.layout->world_size(); ++rank) {
    const auto target = to.layout->ForRank(Rank{rank});
    ASSERT_TRUE(target.ok()) << target.status().ToString();
    const auto plan = PlanCopy(source, to.layout->tensor_states(), *target);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    Buffers filled;
    for (const BufferNeed& need : target->buffers) {
      filled[need.name].resize(need.bytes, oracle::kNothing);
    }
    uint64_t bytes = 0;
    for (size_t i = 0; i < plan->ops.size(); ++i) {
      const CopyOp& op = plan->ops[i];
      if (i > 0) {
        EXPECT_LE(std::pair(plan->ops[i - 1].image, plan->ops[i - 1].image_offset_bytes),
                  std::pair(op.image, op.image_offset_bytes));
      }
      bytes += op.Bytes();
      Copy(op, checkpoint.images[op.image], filled[target->buffers[op.buffer].name], false);
    }
    EXPECT_EQ(bytes, plan->bytes);
    EXPECT_TRUE(filled == to.buffers[rank]) << "rank " << rank << " of\n" << to.layout->text();
  }
}

// The bytes of a replica, its elements one behind the other.
std::vector<uint8_t> BytesOf(const Layout& layout, const RankShare& share, const Replica& replica,
                             const Buffers& buffers) {
  const uint64_t bytes =
      replica.segment.piece.ElementCount() *
      ElementBytes(layout.tensor_states()[replica.segment.piece.tensor_state].dtype);
  std::vector<uint8_t> read(bytes, 0xAA);
  for (const CopyOp& op :
       PlanSegment(layout.tensor_states(), share.stored, replica.segment, 0, 0)) {
    Copy(op, buffers.at(share.stored.buffers[op.buffer].name), read, true);
  }
  return read;
}

struct ReplicaCounts {
  uint64_t replicas = 0;
  uint64_t strided = 0;
  uint64_t in_parts = 0;  // written by several holders
};

// Holders agree about what they hold and who writes which part of it. (The oracle's values differ
// from element to element, so equal bytes are the same elements in the same order.)
void ExpectReplicasToAgree(const Side& side, oracle::Random& random, ReplicaCounts& counts) {
  const WriterAssignment writers = WriterAssignment::Create(*side.layout);
  // The n-th replica of a set of holders: its bytes, and the parts that holders write.
  struct Known {
    std::vector<uint8_t> bytes;
    uint32_t tensor_state = 0;
    size_t holders_seen = 0;
    std::map<uint64_t, uint64_t> written;  // first element -> end, counted from the replica's first
  };
  std::map<std::vector<uint32_t>, std::vector<Known>> known;
  for (uint32_t rank = 0; rank < side.layout->world_size(); ++rank) {
    std::vector<uint32_t> groups;
    const size_t buffer_count = side.layout->ForRank(Rank{rank})->buffers.size();
    for (size_t i = 0; i < buffer_count; ++i) groups.push_back(static_cast<uint32_t>(random() % 3));
    const auto share = writers.ShareOf(Rank{rank}, groups);
    ASSERT_TRUE(share.ok());
    std::map<uint32_t, size_t> next;  // of each set of holders
    for (const Replica& replica : share->replicas) {
      const std::vector<uint32_t>& holders = share->holder_sets.at(replica.holders);
      ASSERT_GE(holders.size(), 2u);
      const Piece& piece = replica.segment.piece;
      std::vector<Known>& of_holders = known[holders];
      const size_t n = next[replica.holders]++;
      const std::vector<uint8_t> bytes = BytesOf(*side.layout, *share, replica, side.buffers[rank]);
      if (of_holders.size() == n) {
        ASSERT_EQ(rank, holders[0]);
        of_holders.push_back({bytes, piece.tensor_state, 0, {}});
      }
      ASSERT_LT(n, of_holders.size());
      Known& here = of_holders[n];
      EXPECT_EQ(here.tensor_state, piece.tensor_state);
      EXPECT_TRUE(here.bytes == bytes) << "replica " << n << " of rank " << rank;
      ASSERT_LT(here.holders_seen, holders.size());
      EXPECT_EQ(holders[here.holders_seen++], rank);
      ++counts.replicas;
      counts.strided += replica.segment.strides == kContiguous ? 0 : 1;
      if (replica.written_begin == replica.written_end) continue;
      counts.in_parts += replica.written_end - replica.written_begin < piece.ElementCount() ? 1 : 0;
      const Piece& stored = share->stored.segments.at(replica.stored).piece;
      EXPECT_EQ(stored.tensor_state, piece.tensor_state);
      EXPECT_EQ(stored.box, piece.box);
      EXPECT_LE(stored.begin, replica.written_begin);
      EXPECT_GE(stored.end, replica.written_end);
      here.written[replica.written_begin - piece.begin] = replica.written_end - piece.begin;
    }
  }
  std::map<std::vector<uint32_t>, uint64_t> loads;
  for (const auto& [holders, replicas] : known) {
    for (const Known& replica : replicas) {
      EXPECT_EQ(replica.holders_seen, holders.size());
      loads[holders] += replica.bytes.size();
      const uint64_t element_bytes =
          ElementBytes(side.layout->tensor_states()[replica.tensor_state].dtype);
      uint64_t covered = 0;
      for (const auto& [begin, end] : replica.written) {
        EXPECT_EQ(begin, covered);
        covered = end;
      }
      EXPECT_EQ(covered * element_bytes, replica.bytes.size());
    }
  }
  // Nothing that several ranks hold is left out.
  for (const HolderLoad& load : side.layout->HolderLoads()) {
    if (load.ranks.size() == 1 || load.bytes == 0) continue;
    EXPECT_EQ(loads[load.ranks], load.bytes);
    loads.erase(load.ranks);
  }
  EXPECT_TRUE(loads.empty());
}

TEST(LayoutOracle, HoldersAgreeAboutTheirReplicasAndWhoWritesThem) {
  const uint64_t seed = 20251126;
  printf("seed %llu\n", static_cast<unsigned long long>(seed));
  ReplicaCounts counts;
  for (uint64_t round = 0; round < 8000; ++round) {
    oracle::Random random(seed + round);
    Side side;
    if (!Make(oracle::RandomDocument(random, oracle::RandomTensors(random)), random, side)) {
      continue;
    }
    SCOPED_TRACE(absl::StrCat("round ", round, "\n", side.layout->text()));
    ExpectReplicasToAgree(side, random, counts);
    if (testing::Test::HasFailure()) return;
  }
  printf("%llu replicas, %llu strided, %llu in parts\n",
         static_cast<unsigned long long>(counts.replicas),
         static_cast<unsigned long long>(counts.strided),
         static_cast<unsigned long long>(counts.in_parts));
  EXPECT_GT(counts.replicas, 10'000u);
  EXPECT_GT(counts.strided, 1000u);
  EXPECT_GT(counts.in_parts, 500u);
}

TEST(LayoutOracle, WhatOneLayoutWritesAnyOtherReads) {
  const uint64_t seed = 20251125;
  const int rounds = 20000;
  printf("seed %llu\n", static_cast<unsigned long long>(seed));
  int pairs = 0;
  int refused = 0;
  uint64_t boxes = 0;
  uint64_t strided = 0;
  uint64_t shared = 0;  // pieces of a replicated tensor that one writer stores in part
  for (int round = 0; round < rounds; ++round) {
    oracle::Random random(seed + static_cast<uint64_t>(round));
    const auto tensors = oracle::RandomTensors(random);
    Side from;
    Side to;
    if (!Make(oracle::RandomDocument(random, tensors), random, from) ||
        !Make(oracle::RandomDocument(random, tensors), random, to)) {
      ++refused;
      continue;
    }
    SCOPED_TRACE(absl::StrCat("round ", round, "\n", from.layout->text(), "\n", to.layout->text()));
    Checkpoint checkpoint;
    Store(from, random, checkpoint);
    RestoreAndCompare(from, checkpoint, to);
    if (testing::Test::HasFailure()) return;
    ++pairs;
    boxes += checkpoint.boxes.size();
    strided += to.layout->ForRank(Rank{0})->strides_bytes.size();
    for (const StoredPiece& stored : checkpoint.pieces) {
      const TensorState& state = from.layout->tensor_states()[stored.piece.tensor_state];
      const uint64_t begin_bytes = stored.piece.begin * ElementBytes(state.dtype);
      shared += begin_bytes > 0 && begin_bytes % kWriterGrainBytes == 0 ? 1 : 0;
    }
  }
  printf(
      "%d pairs, %d refused for a rule that does not fit, %llu boxes, %llu strides, %llu shared\n",
      pairs, refused, static_cast<unsigned long long>(boxes),
      static_cast<unsigned long long>(strided), static_cast<unsigned long long>(shared));
  EXPECT_GE(pairs, 10000);
  EXPECT_GT(refused, rounds / 20);
  EXPECT_GT(boxes, 1000u);
  EXPECT_GT(strided, 1000u);
  EXPECT_GT(shared, 100u);
}

}  // namespace
}  // namespace holdfast
