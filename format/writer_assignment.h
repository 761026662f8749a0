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
