// Whether two checkpoints of any formats hold the same tensors, whatever their layouts, by reading
// every element of both.
#ifndef HOLDFAST_CONVERTER_COMPARE_H_
#define HOLDFAST_CONVERTER_COMPARE_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "format/element_difference.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {

struct Comparison {
  enum class Kind {
    kOnlyInA,
    kOnlyInB,
    kOtherKind,  // both have it, with another dtype or shape
    kContents,
  };
  struct Difference {
    Kind kind = Kind::kContents;
    std::optional<TensorState> a;  // empty: only in B
    std::optional<TensorState> b;
    ElementDifferences elements;  // of kContents
  };
  static constexpr size_t kDifferencesMax = 10'000;  // what comes after is counted only

  uint64_t equal_count = 0;
  uint64_t different_count = 0;
  std::vector<Difference> differences;  // by (tensor, state)
  // In words: what one of the two holds and nobody here can read, or has lost in part or whole; and
  // what only the other has, where it may be among that.
  std::vector<std::string> not_compared;
  bool different() const { return different_count > 0; }
  bool equal() const { return !different() && not_compared.empty(); }
};

struct CompareSide {
  const ForeignFolder& folder;
  const ForeignIndex& index;
};

// Tensor states are the same by tensor and state; the states param, buffer, tensor, other, rng and
// ema count as one, because not every format says which of them a tensor is. If one side has
// two of those for a name, they count as they are written. Equal: dtype, shape and all bits. What a
// side does not have is no difference if that side has lost something, or holds something that
// cannot be read and may be it.
// `progress`: bytes read and to read; false stops: kCancelled. A tensor of which an element is
// missing, or a file damaged, is not compared. Errors: those of reading.
absl::StatusOr<Comparison> Compare(const CompareSide& a, const CompareSide& b,
                                   const std::function<bool(uint64_t, uint64_t)>& progress);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_COMPARE_H_
