#include "examples/tiny_lm/ballast.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"
#include "examples/tiny_lm/random.h"

namespace tiny_lm {
namespace {

constexpr uint64_t kTensorPages = 16384;  // 64 MiB

// Calls visit(index of the page in the job, its elements) for every page, in memory's order.
template <typename Element, typename Visit>
void ForEachPage(const std::vector<BallastRange>& ranges, Element* elements, Visit visit) {
  for (const BallastRange& range : ranges) {
    for (uint64_t i = 0; i < range.page_count; ++i, elements += kPageElements) {
      visit(range.first_page + i, elements);
    }
  }
}

}  // namespace

std::vector<BallastTensor> BallastTensors(uint64_t ballast_bytes) {
  const uint64_t pages = (ballast_bytes + kPageBytes - 1) / kPageBytes;
  std::vector<BallastTensor> tensors;
  for (uint64_t page = 0; page < pages; page += kTensorPages) {
    tensors.push_back({absl::StrFormat("ballast.%04d", page / kTensorPages), page,
                       std::min(kTensorPages, pages - page)});
  }
  return tensors;
}

BallastPart BallastPartOf(const JobLayout& layout, const Coordinates& at) {
  BallastPart part;
  const std::vector<BallastTensor> tensors = BallastTensors(layout.ballast_bytes);
  const bool cut = layout.zero != Zero::kReplicated;
  uint64_t packed_pages = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Slice rows{0, tensors[i].page_count};
    if (cut) {
      const Slice stage = CeilPart(rows.count, 1, layout.mesh.pp, at.pp);
      const Slice own = CeilPart(stage.count, 1, layout.mesh.tp, at.tp);
      rows = {stage.begin + own.begin, own.count};
    }
    part.ranges.push_back({i, tensors[i].first_page + rows.begin, rows.count});
    packed_pages += rows.count;
  }
  part.room_pages = packed_pages;
  if (!cut) return part;
  part.room_pages = (packed_pages + layout.mesh.dp - 1) / layout.mesh.dp;
  const uint64_t begin = at.dp * part.room_pages;
  uint64_t packed = 0;  // pages of the ranges before
  for (BallastRange& range : part.ranges) {
    const uint64_t first = std::clamp(begin, packed, packed + range.page_count);
    const uint64_t last = std::clamp(begin + part.room_pages, packed, packed + range.page_count);
    const uint64_t next = packed + range.page_count;
    range = {range.tensor, range.first_page + first - packed, last - first};
    packed = next;
  }
  std::erase_if(part.ranges, [](const BallastRange& range) { return range.page_count == 0; });
  return part;
}

Ballast::Ballast(BallastPart part)
    : part_(std::move(part)), elements_(part_.room_pages * kPageElements) {
  for (const BallastRange& range : part_.ranges) page_count_ += range.page_count;
  ForEachPage(part_.ranges, elements_.data(), [](uint64_t index, uint64_t* page) {
    const uint64_t filling = Mix(index);
    for (size_t k = 2; k < kPageElements; ++k) page[k] = filling + k;
  });
  Stamp(0);
}

void Ballast::Stamp(uint64_t step) {
  ForEachPage(part_.ranges, elements_.data(), [step](uint64_t index, uint64_t* page) {
    page[0] = step;
    page[1] = index;
  });
}

absl::Status Ballast::Verify(uint64_t step) const {
  uint64_t wrong_count = 0;
  uint64_t first_wrong = 0;
  const uint64_t* first_page = nullptr;
  ForEachPage(part_.ranges, elements_.data(), [&](uint64_t index, const uint64_t* page) {
    const uint64_t filling = Mix(index);
    uint64_t difference = (page[0] ^ step) | (page[1] ^ index);
    for (size_t k = 2; k < kPageElements; ++k) difference |= page[k] ^ (filling + k);
    if (difference == 0 || wrong_count++ != 0) return;
    first_wrong = index;
    first_page = page;
  });
  if (wrong_count == 0) return absl::OkStatus();
  return absl::DataLossError(absl::StrFormat(
      "ballast: %d of %d pages are wrong; the first is %d: expected stamp (%d, %d), found (%d, %d)",
      wrong_count, page_count_, first_wrong, step, first_wrong, first_page[0], first_page[1]));
}

}  // namespace tiny_lm
