// The words in which layouts, INDEX and planner speak of tensors: which elements of which tensor.
//
// A piece is a contiguous range of the row-major order of a box of its tensor. That one form says
// it all: a replicated tensor, a shard of dimension 0 and a ZeRO partition are ranges of the whole
// tensor (no box is stored, so a million of them are cheap); a tensor-parallel row shard is the
// whole of a box; a ZeRO partition inside a tensor-parallel shard is a range of a box.
#ifndef HOLDFAST_FORMAT_TENSOR_PIECE_H_
#define HOLDFAST_FORMAT_TENSOR_PIECE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "format/dtype.h"

namespace holdfast {

inline constexpr size_t kTensorDimsMax = 32;
inline constexpr size_t kNameBytesMax = 4096;  // of tensors, states, buffers, axes, packs
// Bytes of one tensor, buffer or pack: sums of two of them do not overflow uint64_t.
inline constexpr uint64_t kTensorBytesMax = uint64_t{1} << 62;

// One state ("param", "exp_avg", ...) of one global tensor.
struct TensorState {
  std::string tensor;
  std::string state;
  Dtype dtype = Dtype::kFloat32;
  std::vector<uint64_t> shape;  // of the global tensor; empty: 0-d, one element

  // Never overflow for a state that passed CheckTensorState.
  uint64_t ElementCount() const;
  uint64_t Bytes() const { return ElementCount() * ElementBytes(dtype); }
};

// `tensor "wte", state "param"`, for errors. Long names are cut.
std::string Describe(const TensorState& tensor_state);

// kInvalidArgument with expected and found if names are empty, too long or no UTF-8, or contain a
// NUL; if there are more than kTensorDimsMax dimensions; or more than kTensorBytesMax bytes.
absl::Status CheckTensorState(const TensorState& tensor_state);
// The part of it that concerns a name; `what` begins the text ("axis").
absl::Status CheckName(const std::string& what, const std::string& name);

struct BoxView {
  std::span<const uint64_t> lo;    // first element in every dimension
  std::span<const uint64_t> size;  // elements in every dimension
};

// Piece::box of a piece that is a range of its whole tensor.
inline constexpr uint32_t kWholeTensor = UINT32_MAX;

// Boxes by number, in one flat array.
//
// Threads: as std::vector. Lifetime: a view is valid until the next Add.
class BoxTable {
 public:
  // CHECKs lo.size() == size.size() <= kTensorDimsMax. Does not look for equal boxes.
  uint32_t Add(std::span<const uint64_t> lo, std::span<const uint64_t> size);
  BoxView operator[](uint32_t index) const;  // CHECKs index < size()
  uint32_t size() const { return static_cast<uint32_t>(begins_.size()); }

 private:
  std::vector<size_t> begins_;
  std::vector<uint64_t> values_;  // of each box its lo, then its size
};

// Elements [begin, end) of the row-major order of a box of a tensor state.
struct Piece {
  uint32_t tensor_state = 0;    // index into the table that goes with it
  uint32_t box = kWholeTensor;  // index into the BoxTable that goes with it
  uint64_t begin = 0;
  uint64_t end = 0;

  uint64_t ElementCount() const { return end - begin; }
};

// The element of a tensor of this shape at which the box begins, if the box's elements lie one
// behind the other in the tensor; else nothing. The box lies in the tensor and is not empty.
std::optional<uint64_t> ContiguousStart(BoxView box, std::span<const uint64_t> shape);

// A piece that is a box whose elements lie one behind the other in the tensor, as the range of the
// whole tensor that it is; any other piece as it is. CheckPiece holds for it, and it is not empty.
Piece AsRange(Piece piece, const TensorState& tensor_state, const BoxTable& boxes);

// -1, 0 or 1: an order of pieces of one tensor state in which those with equal begin, end and box
// contents are equal; ranges of the whole tensor come first.
int ComparePieces(const Piece& a, const Piece& b, const BoxTable& boxes);

// The number in the row-major order of the whole tensor of element number `element` of the
// row-major order of the piece's box.
uint64_t ElementInTensor(const Piece& piece, const BoxTable& boxes, const TensorState& tensor_state,
                         uint64_t element);

// kInvalidArgument if the piece does not lie in its tensor: tensor_state or box out of range, other
// number of dimensions, box or range outside. For pieces read from storage.
absl::Status CheckPiece(const Piece& piece, std::span<const TensorState> tensor_states,
                        const BoxTable& boxes);

// `elements [5, 9)` or `elements [0, 6) of the box [0:4, 2:4]`, for errors.
std::string Describe(const Piece& piece, const BoxTable& boxes);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_TENSOR_PIECE_H_
