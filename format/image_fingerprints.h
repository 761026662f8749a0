// The fingerprints of what an image holds, from any part of its bytes: which pieces lie there, and
// their sums (format/fingerprint.h).
#ifndef HOLDFAST_FORMAT_IMAGE_FINGERPRINTS_H_
#define HOLDFAST_FORMAT_IMAGE_FINGERPRINTS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "format/fingerprint.h"
#include "format/tensor_piece.h"

namespace holdfast {

// A piece of a tensor state in an image: its elements lie one behind the other from the offset on.
struct PlacedPiece {
  Piece piece;
  uint64_t image_offset_bytes = 0;
};

// What a part of an image adds to the fingerprint of a tensor state.
struct FingerprintPart {
  uint32_t tensor_state = 0;
  uint32_t piece = 0;  // index into the pieces
  uint64_t bytes = 0;  // of the tensor state that are in the sum
  Fingerprint sum;
};

// Threads: any; immutable. Lifetime: what is given must outlive it.
class ImageFingerprints {
 public:
  // What it has of each piece.
  static constexpr uint64_t kBytesPerPiece = sizeof(uint32_t) + sizeof(uint64_t);

  // CheckPiece holds for all pieces. Pieces may share bytes (tied tensors), and be empty.
  ImageFingerprints(std::span<const TensorState> tensor_states, const BoxTable& boxes,
                    std::span<const PlacedPiece> pieces);

  // Appends a part for every piece with bytes in the range of the image that begins at
  // offset_bytes, of which `bytes` are the contents. The parts of ranges that make up an image add
  // up, however it was cut.
  void AppendParts(uint64_t offset_bytes, std::span<const std::byte> bytes,
                   std::vector<FingerprintPart>& parts) const;

 private:
  uint64_t EndOf(const PlacedPiece& piece) const;

  const std::span<const TensorState> tensor_states_;
  const BoxTable& boxes_;
  const std::span<const PlacedPiece> pieces_;
  std::vector<uint32_t> order_;  // of the pieces that are not empty, by offset
  std::vector<uint64_t> reach_;  // the greatest end of a piece up to here in that order
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_IMAGE_FINGERPRINTS_H_
