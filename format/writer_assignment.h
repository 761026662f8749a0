// Who stores what: every distinct element of a layout has exactly one writer among its holders, so
// that replicated state is neither captured nor written once per replica.
//
// All elements that one set of ranks holds, in document order, are one stream of bytes. Each holder
// writes one interval of it; intervals are chosen so that the total per rank is even, from the
// smallest sets (which have least choice) to the largest. Every rank finds its own intervals alone,
// and all agree, because the result depends on the layout only.
#ifndef HOLDFAST_FORMAT_WRITER_ASSIGNMENT_H_
#define HOLDFAST_FORMAT_WRITER_ASSIGNMENT_H_

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/ids.h"
#include "format/layout.h"

namespace holdfast {

// A replicated piece is cut only at multiples of this many bytes from its beginning.
inline constexpr uint64_t kWriterGrainBytes = 4096;

// A segment that other ranks hold, too, and which of its elements this rank writes. Every holder
// has as many replicas with this set of holders, in the same order: the n-th of one rank has the
// same elements in the same order as the n-th of every other.
struct Replica {
  Segment segment;       // the whole of it, in the terms of RankShare::stored
  uint32_t holders = 0;  // index into RankShare::holder_sets
  // Elements [written_begin, written_end) of the piece's box lie in stored.segments[stored]. Equal:
  // none, and `stored` says nothing.
  uint64_t written_begin = 0;
  uint64_t written_end = 0;
  uint32_t stored = 0;
};

// Elements [first, last) of a segment, counted from its first.
Segment PartOf(const Segment& segment, uint64_t first, uint64_t last, uint64_t element_bytes);

// What a rank writes, and what it holds of what others may write as well.
struct RankShare {
  RankLayout stored;                               // as WriterAssignment::ForRank gives it
  std::vector<Replica> replicas;                   // in document order
  std::vector<std::vector<uint32_t>> holder_sets;  // ranks, ascending
};

// Threads: any; immutable. Lifetime: refers to the layout, which must outlive it.
class WriterAssignment {
 public:
  // O(holder sets x holders); layouts of 1,000 ranks take milliseconds to a second.
  static WriterAssignment Create(const Layout& layout);

  // What this rank stores: `buffers` as Layout::ForRank gives them, `segments` ordered by the group
  // of their buffer, then in document order; pieces of one tensor state are in order of their
  // elements. `group_of_buffer` gives the capture group of each of ForRank's buffers (CHECKed
  // size), or is empty: one group. Errors: those of Layout::ForRank.
  absl::StatusOr<RankLayout> ForRank(Rank rank, std::span<const uint32_t> group_of_buffer) const;
  // The same with the rank's replicas. Errors: as ForRank.
  absl::StatusOr<RankShare> ShareOf(Rank rank, std::span<const uint32_t> group_of_buffer) const;

  // What each rank was assigned. ForRank, which cuts pieces at multiples of the grain only, gives a
  // rank up to half a grain more or less per set of holders and end of its interval.
  std::vector<uint64_t> AssignedBytes() const;

 private:
  explicit WriterAssignment(const Layout& layout) : layout_(&layout) {}

  const Layout* layout_;
  // Holders -> end of each holder's interval in the stream; the first begins at 0.
  std::map<std::vector<uint32_t>, std::vector<uint64_t>> interval_ends_;
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_WRITER_ASSIGNMENT_H_
