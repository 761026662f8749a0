#include "examples/tiny_lm/ballast.h"

#include "absl/strings/str_format.h"
#include "examples/tiny_lm/random.h"

namespace tiny_lm {

Ballast::Ballast(uint64_t first_page, uint64_t page_count, uint64_t room_pages)
    : first_page_(first_page), page_count_(page_count), elements_(room_pages * kPageElements) {
  for (uint64_t i = 0; i < page_count_; ++i) {
    uint64_t* page = elements_.data() + i * kPageElements;
    const uint64_t filling = Mix(first_page_ + i);
    for (size_t k = 2; k < kPageElements; ++k) page[k] = filling + k;
  }
  Stamp(0);
}

void Ballast::Stamp(uint64_t step) {
  for (uint64_t i = 0; i < page_count_; ++i) {
    elements_[i * kPageElements] = step;
    elements_[i * kPageElements + 1] = first_page_ + i;
  }
}

absl::Status Ballast::Verify(uint64_t step) const {
  uint64_t wrong_count = 0;
  uint64_t first_wrong = 0;
  for (uint64_t i = 0; i < page_count_; ++i) {
    const uint64_t* page = elements_.data() + i * kPageElements;
    const uint64_t filling = Mix(first_page_ + i);
    uint64_t difference = (page[0] ^ step) | (page[1] ^ (first_page_ + i));
    for (size_t k = 2; k < kPageElements; ++k) difference |= page[k] ^ (filling + k);
    if (difference != 0 && wrong_count++ == 0) first_wrong = i;
  }
  if (wrong_count == 0) return absl::OkStatus();
  const uint64_t* page = elements_.data() + first_wrong * kPageElements;
  return absl::DataLossError(absl::StrFormat(
      "ballast: %d of %d pages are wrong; the first is %d: expected stamp (%d, %d), found (%d, %d)",
      wrong_count, page_count_, first_page_ + first_wrong, step, first_page_ + first_wrong, page[0],
      page[1]));
}

}  // namespace tiny_lm
