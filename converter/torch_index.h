// What all readers of torch files share: from the tensors of a TorchFile to the pieces of a
// ForeignIndex, and from its other values to what is shown of them.
#ifndef HOLDFAST_CONVERTER_TORCH_INDEX_H_
#define HOLDFAST_CONVERTER_TORCH_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/torch_file.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {

// Adds pieces that lie in one torch file; each storage becomes at most one extent.
//
// Threads: one. Lifetime: index and file outlive it.
class TorchPieces {
 public:
  // `file`: number of the folder's file; `begin_bytes`: where in it the TorchFile's source begins.
  TorchPieces(ForeignIndex& index, uint32_t file, uint64_t begin_bytes,
              const TorchFile& torch_file);

  // The tensor holds the elements of the piece: its whole box, in this shape or any other with the
  // same elements in row-major order, unless it has strides; or, if it is 1-d and contiguous, a
  // range. Errors: kDataLoss (another number of elements, a storage without bytes), kUnimplemented
  // (strided, in another shape than the box).
  absl::Status Add(const Piece& piece, const TorchTensor& tensor);
  // The elements of the piece, a range, are those from `first_element` on of a contiguous tensor.
  absl::Status AddRange(const Piece& piece, const TorchTensor& tensor, uint64_t first_element);
  // A new tensor state of the tensor's shape and dtype, all of it from the tensor: its number.
  absl::StatusOr<uint32_t> AddWhole(std::string name, std::string state, const TorchTensor& tensor);

 private:
  uint32_t ExtentOf(const TorchTensor& tensor);
  ForeignPiece PieceOf(const Piece& piece, const TorchTensor& tensor);

  ForeignIndex& index_;
  const uint32_t file_;
  const uint64_t begin_bytes_;
  const TorchFile& torch_file_;
  std::vector<uint32_t> extents_;  // by storage; UINT32_MAX: none yet
};

// Text of a pickle as it is, but for surrogates that stand alone: their bytes become \xNN.
std::string TorchText(std::string_view text);

// A key of a dict as part of a name: text (TorchText), and what Python would print of the others
// (`7`, `True`, `(1, 't')`).
std::string TorchKeyText(const TorchValue& key);

// The value as JSON text of at most about bytes_max: what is deeper than eight levels or longer is
// cut ("..."); tensors, opaque objects and what holds itself are strings that describe them.
std::string TorchJson(const TorchValue& value, size_t bytes_max);

// Counts the classes of the file's opaque nodes into index.opaque_classes, which stays sorted by
// name, and takes its warnings as notes.
void AddTorchDescription(const TorchFile& torch_file, ForeignIndex& index);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_INDEX_H_
