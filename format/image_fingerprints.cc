#include "format/image_fingerprints.h"

#include <algorithm>

namespace holdfast {

ImageFingerprints::ImageFingerprints(std::span<const TensorState> tensor_states,
                                     const BoxTable& boxes, std::span<const PlacedPiece> pieces)
    : tensor_states_(tensor_states), boxes_(boxes), pieces_(pieces) {
  for (uint32_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].piece.ElementCount() > 0) order_.push_back(i);
  }
  std::sort(order_.begin(), order_.end(), [&](uint32_t a, uint32_t b) {
    return pieces[a].image_offset_bytes < pieces[b].image_offset_bytes;
  });
  uint64_t reach = 0;
  for (const uint32_t i : order_) {
    reach = std::max(reach, EndOf(pieces[i]));
    reach_.push_back(reach);
  }
}

uint64_t ImageFingerprints::EndOf(const PlacedPiece& piece) const {
  return piece.image_offset_bytes +
         piece.piece.ElementCount() * ElementBytes(tensor_states_[piece.piece.tensor_state].dtype);
}

void ImageFingerprints::AppendParts(uint64_t offset_bytes, std::span<const std::byte> bytes,
                                    std::vector<FingerprintPart>& parts) const {
  const uint64_t end_bytes = offset_bytes + bytes.size();
  Fingerprinter fingerprinter;
  // No piece before this one reaches into the range.
  auto at = static_cast<size_t>(std::upper_bound(reach_.begin(), reach_.end(), offset_bytes) -
                                reach_.begin());
  for (; at < order_.size(); ++at) {
    const PlacedPiece& placed = pieces_[order_[at]];
    if (placed.image_offset_bytes >= end_bytes) break;
    const uint64_t begin = std::max(offset_bytes, placed.image_offset_bytes);
    const uint64_t end = std::min(end_bytes, EndOf(placed));
    if (begin >= end) continue;
    parts.push_back({placed.piece.tensor_state, order_[at], end - begin,
                     fingerprinter.OfPiece(tensor_states_[placed.piece.tensor_state], placed.piece,
                                           boxes_, begin - placed.image_offset_bytes,
                                           bytes.subspan(begin - offset_bytes, end - begin))});
  }
}

}  // namespace holdfast
