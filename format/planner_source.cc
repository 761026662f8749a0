#include "format/planner_source.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

constexpr size_t kImagesNamedMax = 8;
// Of one tensor state: boxes times their dimensions and one. A range of a tensor of many dimensions
// is many boxes. Takes 300 MB; a tensor with more is refused.
constexpr size_t kBoxSizesMax = size_t{1} << 23;

std::string ImagesOf(const SourcePiece& piece, std::span<const StoredPiece> stored) {
  std::string text = piece.replicas.size() == 1 ? "image " : "images ";
  for (size_t i = 0; i < piece.replicas.size(); ++i) {
    if (i == kImagesNamedMax) return absl::StrCat(text, ", ...");
    absl::StrAppend(&text, i ? ", " : "", stored[piece.replicas[i]].image);
  }
  return text;
}

}  // namespace

absl::StatusOr<StateSource> StateSource::Create(const SourceView& source, uint32_t tensor_state,
                                                std::span<const uint32_t> pieces, Asked asked) {
  StateSource state(source, tensor_state);
  RETURN_IF_ERROR(state.AddDistinct(pieces));
  const auto first_box =
      std::find_if(state.pieces_.begin(), state.pieces_.end(),
                   [](const SourcePiece& piece) { return piece.piece.box != kWholeTensor; });
  state.range_count_ = static_cast<uint32_t>(first_box - state.pieces_.begin());
  if (asked == Asked::kBoxes || state.range_count_ < state.pieces_.size()) {
    const size_t dims = state.tensor_state_->shape.size();
    state.index_ = std::make_unique<BoxIndex>(dims);
    for (uint32_t i = 0; i < state.pieces_.size(); ++i) {
      for (const ElementBox& box : state.BoxesOf(state.pieces_[i].piece, source.boxes)) {
        state.index_->Add(box, i);
      }
      if (state.index_->size() * (dims + 1) > kBoxSizesMax) {
        return absl::ResourceExhaustedError(absl::StrFormat(
            "%s: expected pieces that are at most %d boxes of %d dimensions, found more",
            Describe(*state.tensor_state_), kBoxSizesMax / (dims + 1), dims));
      }
    }
    state.index_->Build();
  }
  RETURN_IF_ERROR(state.CheckDisjoint());
  return state;
}

absl::Status StateSource::AddDistinct(std::span<const uint32_t> pieces) {
  std::vector<SourcePiece> all;
  all.reserve(pieces.size());
  for (uint32_t index : pieces) {
    Piece piece = source_->pieces[index].piece;
    if (absl::Status inside = CheckPiece(piece, source_->tensor_states, source_->boxes);
        !inside.ok()) {
      return absl::DataLossError(absl::StrFormat("%s (image %d)", std::string(inside.message()),
                                                 source_->pieces[index].image));
    }
    if (piece.begin == piece.end) continue;
    if (source_->pieces[index].image_offset_bytes > kTensorBytesMax) {
      return absl::DataLossError(absl::StrFormat(
          "%s: expected an offset of at most 2^62 in image %d, found %d", Describe(*tensor_state_),
          source_->pieces[index].image, source_->pieces[index].image_offset_bytes));
    }
    piece = AsRange(piece, *tensor_state_, source_->boxes);
    all.push_back({piece, {index}});
  }
  std::sort(all.begin(), all.end(), [this](const SourcePiece& a, const SourcePiece& b) {
    const int order = ComparePieces(a.piece, b.piece, source_->boxes);
    if (order != 0) return order < 0;
    const auto key = [this](const SourcePiece& piece) {
      return std::pair(source_->pieces[piece.replicas[0]].image, piece.replicas[0]);
    };
    return key(a) < key(b);
  });
  for (SourcePiece& piece : all) {
    if (!pieces_.empty() && ComparePieces(pieces_.back().piece, piece.piece, source_->boxes) == 0) {
      pieces_.back().replicas.push_back(piece.replicas[0]);
    } else {
      pieces_.push_back(std::move(piece));
    }
  }
  return absl::OkStatus();
}

absl::Status StateSource::Overlap(uint32_t a, uint32_t b) const {
  return absl::DataLossError(absl::StrFormat(
      "%s: expected every element once, found %s (%s) and %s (%s) overlapping",
      Describe(*tensor_state_), Describe(pieces_[a].piece, source_->boxes),
      ImagesOf(pieces_[a], source_->pieces), Describe(pieces_[b].piece, source_->boxes),
      ImagesOf(pieces_[b], source_->pieces)));
}

absl::Status StateSource::CheckDisjoint() const {
  for (uint32_t i = 1; i < range_count_; ++i) {
    if (pieces_[i].piece.begin < pieces_[i - 1].piece.end) return Overlap(i - 1, i);
  }
  if (index_ == nullptr) return absl::OkStatus();
  // Boxes of one piece are disjoint; ranges are disjoint among themselves.
  const absl::StatusOr<BoxIndex::Overlap> overlap = index_->FindOverlap(range_count_);
  if (!overlap.ok()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(Describe(*tensor_state_), ": ", std::string(overlap.status().message())));
  }
  if (!overlap->has_value()) return absl::OkStatus();
  const auto [a, b] = **overlap;
  return Overlap(std::min(a, b), std::max(a, b));
}

std::vector<ElementBox> StateSource::BoxesOf(const Piece& piece, const BoxTable& boxes) const {
  std::vector<ElementBox> out;
  if (piece.box != kWholeTensor) {
    CutIntoBoxes(boxes[piece.box], piece.begin, piece.end, out);
    return out;
  }
  const std::vector<uint64_t> zeros(tensor_state_->shape.size(), 0);
  CutIntoBoxes({zeros, tensor_state_->shape}, piece.begin, piece.end, out);
  return out;
}

absl::Status StateSource::Cover(const Piece& piece, const BoxTable& boxes,
                                const RangeVisitor& visit_range, const BoxVisitor& visit_box,
                                uint64_t& steps) const {
  const bool is_range = piece.box == kWholeTensor;
  uint64_t found = 0;
  if (is_range) {
    const auto ranges_end = pieces_.begin() + range_count_;
    auto at = std::upper_bound(
        pieces_.begin(), ranges_end, piece.begin,
        [](uint64_t begin, const SourcePiece& each) { return begin < each.piece.end; });
    uint64_t next = piece.begin;  // the first element not yet seen
    for (; at != ranges_end && at->piece.begin < piece.end; ++at) {
      const uint64_t begin = std::max(piece.begin, at->piece.begin);
      const uint64_t end = std::min(piece.end, at->piece.end);
      if (index_ == nullptr && begin > next) return Missing(next, begin);
      visit_range(static_cast<uint32_t>(at - pieces_.begin()), begin, end);
      found += end - begin;
      next = end;
    }
    if (index_ == nullptr && next < piece.end) return Missing(next, piece.end);
    if (found == piece.ElementCount()) return absl::OkStatus();
  }
  CHECK(index_ != nullptr);
  const std::vector<ElementBox> regions = BoxesOf(piece, boxes);
  for (const ElementBox& region : regions) {
    steps += index_->Visit(region, [&](uint32_t number, const ElementBox& both) {
      if (is_range && number < range_count_) return;  // visited above
      visit_box(number, both);
      found += both.Volume();
    });
  }
  if (found == piece.ElementCount()) return absl::OkStatus();
  for (const ElementBox& region : regions) RETURN_IF_ERROR(MissingIn(region));
  CHECK(false);  // a sum that is too small, and no element missing
  return absl::OkStatus();
}

absl::Status StateSource::Missing(uint64_t begin, uint64_t end) const {
  return absl::DataLossError(
      absl::StrFormat("%s: expected elements [%d, %d) of %d in an image, found them in none",
                      Describe(*tensor_state_), begin, end, tensor_state_->ElementCount()));
}

uint64_t StateSource::VolumeIn(const ElementBox& region) const {
  uint64_t volume = 0;
  index_->Visit(region, [&](uint32_t, const ElementBox& both) { volume += both.Volume(); });
  return volume;
}

absl::Status StateSource::MissingIn(ElementBox region) const {
  if (VolumeIn(region) == region.Volume()) return absl::OkStatus();
  // Bisection, outer dimensions first, lower halves first: the first missing element.
  for (size_t d = 0; d < region.dims; ++d) {
    while (region.size[d] > 1) {
      ElementBox lower = region;
      lower.size[d] = region.size[d] / 2;
      if (VolumeIn(lower) < lower.Volume()) {
        region = lower;
      } else {
        region.lo[d] += lower.size[d];
        region.size[d] -= lower.size[d];
      }
    }
  }
  uint64_t element = 0;
  std::string at;
  for (size_t d = 0; d < region.dims; ++d) {
    element = element * tensor_state_->shape[d] + region.lo[d];
    absl::StrAppend(&at, d ? ", " : "", region.lo[d]);
  }
  return absl::DataLossError(
      absl::StrFormat("%s: expected element %d (at [%s]) in an image, found it in none",
                      Describe(*tensor_state_), element, at));
}

}  // namespace holdfast
