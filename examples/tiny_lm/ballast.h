// State without meaning, as large as one likes: what a large model would have, for a price of
// almost no arithmetic. It is made so that a wrong capture cannot go unseen: every page of 4 KiB
// begins with (step, index of the page), written anew by every optimizer step, and is filled with
// numbers that belong to its index.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_BALLAST_H_
#define HOLDFAST_EXAMPLES_TINY_LM_BALLAST_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"

namespace tiny_lm {

inline constexpr size_t kPageElements = 512;  // of uint64: 4 KiB
inline constexpr size_t kPageBytes = kPageElements * sizeof(uint64_t);

// This rank's pages [first_page, first_page + page_count) of the job's.
//
// Threads: one at a time.
class Ballast {
 public:
  // Room for `room_pages` pages (padding included), filled and stamped with step 0.
  Ballast(uint64_t first_page, uint64_t page_count, uint64_t room_pages);

  uint64_t first_page() const { return first_page_; }
  uint64_t page_count() const { return page_count_; }
  uint64_t* data() { return elements_.data(); }
  const uint64_t* data() const { return elements_.data(); }

  void Stamp(uint64_t step);
  // Checks every stamp and every filling. Errors: kDataLoss, naming the first wrong page, how many
  // are wrong, expected and found.
  absl::Status Verify(uint64_t step) const;

 private:
  uint64_t first_page_;
  uint64_t page_count_;
  std::vector<uint64_t> elements_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_BALLAST_H_
