// State without meaning, as large as one likes: what a large model would have, for a price of
// almost no arithmetic. It is made so that a wrong capture cannot go unseen: every page of 4 KiB
// begins with (step, index of the page), written anew by every optimizer step, and is filled with
// numbers that belong to its index.
//
// The job's pages are rows of tensors of up to 64 MiB. ZeRO-0: all pages on every rank. Else they
// are cut over all ranks, page by page: the rows of each tensor over pp, those over tp (both by
// rule "ceil"), and what is left of all tensors, one behind the other, over dp (a pack).
#ifndef HOLDFAST_EXAMPLES_TINY_LM_BALLAST_H_
#define HOLDFAST_EXAMPLES_TINY_LM_BALLAST_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "examples/tiny_lm/parallel.h"

namespace tiny_lm {

inline constexpr size_t kPageElements = 512;  // of uint64: 4 KiB
inline constexpr size_t kPageBytes = kPageElements * sizeof(uint64_t);

// Pages [first_page, first_page + page_count) of the job.
struct BallastTensor {
  std::string name;
  uint64_t first_page = 0;
  uint64_t page_count = 0;
};
std::vector<BallastTensor> BallastTensors(uint64_t ballast_bytes);

// Pages of one tensor, one behind the other in a rank's memory.
struct BallastRange {
  size_t tensor = 0;        // index into BallastTensors()
  uint64_t first_page = 0;  // of the job
  uint64_t page_count = 0;
};

struct BallastPart {
  std::vector<BallastRange> ranges;
  uint64_t room_pages = 0;  // with the pack's padding
};
BallastPart BallastPartOf(const JobLayout& layout, const Coordinates& at);

// This rank's pages.
//
// Threads: one at a time.
class Ballast {
 public:
  // Filled, and stamped with step 0.
  explicit Ballast(BallastPart part);

  const std::vector<BallastRange>& ranges() const { return part_.ranges; }
  uint64_t page_count() const { return page_count_; }
  // Of the pages and the padding behind them.
  uint64_t bytes() const { return elements_.size() * sizeof(uint64_t); }
  uint64_t* data() { return elements_.data(); }
  const uint64_t* data() const { return elements_.data(); }

  void Stamp(uint64_t step);
  // Checks every stamp and every filling. Errors: kDataLoss, naming the first wrong page, how many
  // are wrong, expected and found.
  absl::Status Verify(uint64_t step) const;

 private:
  BallastPart part_;
  uint64_t page_count_ = 0;
  std::vector<uint64_t> elements_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_BALLAST_H_
