// The pure half of a restore: what is copied where, and the bytes of the blobs memfd.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/restore.h"

namespace holdfast {
namespace {

// A cut operation and the piece that it reads.
struct CutOp {
  uint32_t image = 0;
  uint64_t piece = 0;  // its index in the image, in units of piece_bytes
  abi::RestoreOp op{};
};

// Cuts `op` at multiples of `piece_bytes` of its image.
void Cut(const CopyOp& op, uint32_t buffer_index, uint64_t piece_bytes, std::vector<CutOp>& out) {
  if (op.Bytes() == 0) return;
  std::vector<CopyOp> parts;
  const uint64_t last = (op.ImageEnd() - 1) / piece_bytes;
  for (uint64_t piece = op.image_offset_bytes / piece_bytes; piece <= last; ++piece) {
    const uint64_t begin = piece * piece_bytes;
    parts.clear();
    ClipToImage(op, begin, begin + piece_bytes, parts);
    for (const CopyOp& part : parts) {
      CutOp cut;
      cut.image = op.image;
      cut.piece = piece;
      cut.op.source_offset = part.image_offset_bytes - begin;
      cut.op.buffer_offset = part.buffer_offset_bytes;
      cut.op.run_bytes = part.run_bytes;
      cut.op.count = part.count;
      cut.op.source_stride = part.image_stride_bytes;
      cut.op.buffer_stride = part.buffer_stride_bytes;
      cut.op.buffer_index = buffer_index;
      out.push_back(cut);
    }
  }
}

// What of the target is to be filled, and how many tensor states that is.
absl::StatusOr<RankLayout> Choose(const Registration& target, const RestoreSelection& selection,
                                  RestorePlan& plan) {
  const std::vector<TensorState>& states = target.layout().tensor_states();
  std::vector<bool> chosen(states.size(), true);
  if (!selection.is_everything()) {
    ASSIGN_OR_RETURN(chosen, ChooseStates(selection, states));
  }
  std::vector<bool> held(states.size(), false);
  for (const Segment& segment : target.holdings().segments) {
    const uint32_t state = segment.piece.tensor_state;
    if (!held[state]) ++(chosen[state] ? plan.tensor_states : plan.tensor_states_left_out);
    held[state] = true;
  }
  RankLayout rank = target.holdings();
  std::erase_if(rank.segments,
                [&](const Segment& segment) { return !chosen[segment.piece.tensor_state]; });
  return rank;
}

}  // namespace

absl::StatusOr<RestorePlan> PlanRestore(const Index& index, const Registration& target,
                                        uint64_t piece_bytes_max,
                                        const RestoreSelection& selection) {
  RestorePlan plan;
  ASSIGN_OR_RETURN(const RankLayout rank, Choose(target, selection, plan));
  const std::vector<StoredPiece> stored = StoredPieces(index);
  ASSIGN_OR_RETURN(const CopyPlan copies, PlanCopy({index.tensor_states, index.boxes, stored},
                                                   target.layout().tensor_states(), rank));
  std::vector<CutOp> cuts;
  cuts.reserve(copies.ops.size());
  for (const CopyOp& op : copies.ops) {
    const uint32_t buffer = target.buffer_of_need()[op.buffer];
    CHECK(buffer != Registration::kNoBuffer || op.Bytes() == 0);
    Cut(op, buffer, std::min(piece_bytes_max, index.images[op.image].block_bytes), cuts);
  }
  std::stable_sort(cuts.begin(), cuts.end(), [](const CutOp& a, const CutOp& b) {
    return std::pair(a.image, a.piece) < std::pair(b.image, b.piece);
  });

  plan.bytes = copies.bytes;
  plan.ops.reserve(cuts.size());
  for (const CutOp& cut : cuts) {
    const uint64_t block_bytes = index.images[cut.image].block_bytes;
    const uint64_t piece_bytes = std::min(piece_bytes_max, block_bytes);
    const uint64_t begin = cut.piece * piece_bytes;
    const uint64_t block = begin / block_bytes;
    const uint64_t offset = begin % block_bytes;
    if (plan.pieces.empty() || plan.pieces.back().image != cut.image ||
        plan.pieces.back().block != block || plan.pieces.back().offset_bytes != offset) {
      plan.pieces.push_back({.image = cut.image,
                             .block = block,
                             .offset_bytes = offset,
                             .bytes = piece_bytes,
                             .first_op = plan.ops.size(),
                             .op_count = 0});
    }
    ++plan.pieces.back().op_count;
    plan.ops.push_back(cut.op);
  }
  return plan;
}

RestoredBlobsFrame FrameRestoredBlobs(const Index& index) {
  const abi::RestoredBlobs header{.magic = abi::kProtocolMagic,
                                  .version = abi::kProtocolVersion,
                                  .blob_count = index.blobs.size()};
  RestoredBlobsFrame frame;
  std::vector<abi::RestoredBlob> entries;
  uint64_t at = sizeof(header) + index.blobs.size() * sizeof(abi::RestoredBlob);
  for (const IndexBlob& blob : index.blobs) {
    abi::RestoredBlob entry{};
    entry.name_offset = at;
    entry.name_bytes = static_cast<uint32_t>(blob.name.size());
    at += blob.name.size();
    entry.data_offset = at;
    entry.data_bytes = blob.bytes;
    at += blob.bytes;
    entry.scope = static_cast<uint32_t>(blob.scope);
    entry.rank = Value(blob.rank);
    entries.push_back(entry);
  }
  frame.bytes.resize(at);
  std::memcpy(frame.bytes.data(), &header, sizeof(header));
  if (!entries.empty()) {
    std::memcpy(frame.bytes.data() + sizeof(header), entries.data(),
                entries.size() * sizeof(abi::RestoredBlob));
  }
  for (size_t i = 0; i < entries.size(); ++i) {
    std::memcpy(frame.bytes.data() + entries[i].name_offset, index.blobs[i].name.data(),
                index.blobs[i].name.size());
    frame.data_offsets.push_back(entries[i].data_offset);
  }
  return frame;
}

}  // namespace holdfast
