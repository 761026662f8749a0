#include "format/writer_assignment.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/check.h"

namespace holdfast {
namespace {

// How `bytes` go to those with the given loads so that the greatest is as small as can be, and the
// others even: as water fills vessels. Adds them to `loads`; returns each one's part.
std::vector<uint64_t> Fill(uint64_t bytes, const std::vector<uint32_t>& ranks,
                           std::vector<uint64_t>& loads) {
  std::vector<size_t> order(ranks.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return loads[ranks[a]] < loads[ranks[b]]; });
  // The level reaches the first `count` vessels: the most for which the water suffices.
  size_t count = 1;
  uint64_t needed = 0;  // to raise the first `count` to the load of the last of them
  while (count < order.size()) {
    const uint64_t step = loads[ranks[order[count]]] - loads[ranks[order[count - 1]]];
    if (step > 0 && (bytes - needed) / step < count) break;
    needed += step * count;
    ++count;
  }
  const uint64_t level = loads[ranks[order[count - 1]]] + (bytes - needed) / count;
  uint64_t remainder = (bytes - needed) % count;
  std::vector<uint64_t> parts(ranks.size(), 0);
  for (size_t i = 0; i < count; ++i) {
    uint64_t& load = loads[ranks[order[i]]];
    parts[order[i]] = level - load + (remainder > 0 ? 1 : 0);
    remainder -= remainder > 0 ? 1 : 0;
    load += parts[order[i]];
  }
  return parts;
}

// Where a cut of the stream at `at` falls in a piece at [begin, begin + bytes) of it: at a multiple
// of the grain from the piece's beginning, or at its end; bytes from its beginning.
uint64_t CutInPiece(uint64_t at, uint64_t begin, uint64_t bytes) {
  if (at <= begin) return 0;
  const uint64_t offset = at - begin;
  if (offset >= bytes) return bytes;
  const uint64_t rounded = (offset + kWriterGrainBytes / 2) / kWriterGrainBytes * kWriterGrainBytes;
  return std::min(rounded, bytes);
}

bool Continues(const Segment& before, const Segment& here, uint64_t element_bytes) {
  return before.piece.tensor_state == here.piece.tensor_state &&
         before.piece.box == here.piece.box && before.piece.end == here.piece.begin &&
         before.buffer == here.buffer && before.strides == kContiguous &&
         here.strides == kContiguous &&
         before.buffer_offset_bytes + before.piece.ElementCount() * element_bytes ==
             here.buffer_offset_bytes;
}

// The segments' numbers, ordered by the group of their buffer.
std::vector<uint32_t> OrderByGroup(const std::vector<Segment>& segments,
                                   std::span<const uint32_t> group_of_buffer) {
  std::vector<uint32_t> order(segments.size());
  std::iota(order.begin(), order.end(), 0u);
  if (group_of_buffer.empty()) return order;
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return group_of_buffer[segments[a].buffer] < group_of_buffer[segments[b].buffer];
  });
  return order;
}

}  // namespace

Segment PartOf(const Segment& segment, uint64_t first, uint64_t last, uint64_t element_bytes) {
  Segment part = segment;
  part.piece.begin = segment.piece.begin + first;
  part.piece.end = segment.piece.begin + last;
  if (part.strides == kContiguous) part.buffer_offset_bytes += first * element_bytes;
  return part;
}

WriterAssignment WriterAssignment::Create(const Layout& layout) {
  WriterAssignment assignment(layout);
  std::vector<HolderLoad> sets = layout.HolderLoads();
  // Those with the least choice first; then as ordered by ranks.
  std::stable_sort(sets.begin(), sets.end(), [](const HolderLoad& a, const HolderLoad& b) {
    return a.ranks.size() < b.ranks.size();
  });
  std::vector<uint64_t> loads(layout.world_size(), 0);
  for (HolderLoad& set : sets) {
    std::vector<uint64_t> ends = Fill(set.bytes, set.ranks, loads);
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    CHECK(ends.back() == set.bytes);
    assignment.interval_ends_.emplace(std::move(set.ranks), std::move(ends));
  }
  return assignment;
}

absl::StatusOr<RankLayout> WriterAssignment::ForRank(
    Rank rank, std::span<const uint32_t> group_of_buffer) const {
  absl::StatusOr<RankShare> share = ShareOf(rank, group_of_buffer);
  if (!share.ok()) return share.status();
  return std::move(share->stored);
}

absl::StatusOr<RankShare> WriterAssignment::ShareOf(
    Rank rank, std::span<const uint32_t> group_of_buffer) const {
  absl::StatusOr<RankLayout> whole = layout_->ForRank(rank);
  if (!whole.ok()) return whole.status();
  CHECK(group_of_buffer.empty() || group_of_buffer.size() == whole->buffers.size());
  RankHoldings held = layout_->HeldByRank(rank);

  struct Stream {
    uint64_t at = 0;     // bytes of its pieces so far
    uint64_t begin = 0;  // this rank's interval
    uint64_t end = 0;
  };
  std::vector<Stream> streams;
  for (const std::vector<uint32_t>& ranks : held.holder_sets) {
    const std::vector<uint64_t>& ends = interval_ends_.at(ranks);
    const size_t mine = static_cast<size_t>(
        std::lower_bound(ranks.begin(), ranks.end(), Value(rank)) - ranks.begin());
    CHECK(mine < ranks.size() && ranks[mine] == Value(rank));
    streams.push_back({0, mine == 0 ? 0 : ends[mine - 1], ends[mine]});
  }

  RankShare share;
  std::vector<Segment> stored;
  for (size_t i = 0; i < held.layout.segments.size(); ++i) {
    const Segment& segment = held.layout.segments[i];
    Stream& stream = streams[held.holders[i]];
    const uint64_t element_bytes =
        ElementBytes(layout_->tensor_states()[segment.piece.tensor_state].dtype);
    const uint64_t bytes = segment.piece.ElementCount() * element_bytes;
    const uint64_t first = CutInPiece(stream.begin, stream.at, bytes);
    const uint64_t last = CutInPiece(stream.end, stream.at, bytes);
    stream.at += bytes;
    const Segment part =
        PartOf(segment, first / element_bytes, last / element_bytes, element_bytes);
    if (first < last) {
      if (!stored.empty() && Continues(stored.back(), part, element_bytes)) {
        stored.back().piece.end = part.piece.end;
      } else {
        stored.push_back(part);
      }
    }
    if (held.holder_sets[held.holders[i]].size() == 1) continue;
    share.replicas.push_back(
        {.segment = segment,
         .holders = held.holders[i],
         .written_begin = part.piece.begin,
         .written_end = part.piece.end,
         .stored = first < last ? static_cast<uint32_t>(stored.size() - 1) : 0});
  }

  const std::vector<uint32_t> order = OrderByGroup(stored, group_of_buffer);
  std::vector<uint32_t> place_of(stored.size());
  held.layout.segments.clear();
  for (const uint32_t from : order) {
    place_of[from] = static_cast<uint32_t>(held.layout.segments.size());
    held.layout.segments.push_back(stored[from]);
  }
  for (Replica& replica : share.replicas) {
    if (replica.written_begin < replica.written_end) replica.stored = place_of[replica.stored];
  }
  share.stored = std::move(held.layout);
  share.holder_sets = std::move(held.holder_sets);
  return share;
}

std::vector<uint64_t> WriterAssignment::AssignedBytes() const {
  std::vector<uint64_t> bytes(layout_->world_size(), 0);
  for (const auto& [ranks, ends] : interval_ends_) {
    for (size_t i = 0; i < ranks.size(); ++i) bytes[ranks[i]] += ends[i] - (i ? ends[i - 1] : 0);
  }
  return bytes;
}

}  // namespace holdfast
