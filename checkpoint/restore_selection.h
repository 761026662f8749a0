// What a partial restore fills: the tensor states whose names fit patterns. Everything else stays
// in the rank's buffers as it is, and need not be in the checkpoint.
#ifndef HOLDFAST_CHECKPOINT_RESTORE_SELECTION_H_
#define HOLDFAST_CHECKPOINT_RESTORE_SELECTION_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "format/name_pattern.h"
#include "format/tensor_piece.h"

namespace holdfast {

// More are refused: every name is compared with every pattern.
inline constexpr size_t kSelectionPatternsMax = 1'000;
inline constexpr uint64_t kSelectionBytesMax = uint64_t{5} << 20;  // so many, of 4 KiB each

// Patterns as format/name_pattern.h has them. A tensor state is chosen if its tensor's name fits
// one of `tensors` and its state's name one of `states`; no pattern at all: every name fits.
struct RestoreSelection {
  std::vector<std::string> tensors;
  std::vector<std::string> states;
  bool is_everything() const { return tensors.empty() && states.empty(); }
};

// The bytes of abi::RestoreSelection. kInvalidArgument: what was expected and found.
absl::StatusOr<RestoreSelection> DecodeSelection(std::string_view bytes);

// Whether each of `tensor_states`, those of the whole layout, is chosen. kInvalidArgument: a
// pattern that is none, or that fits nothing, named, with the nearest name.
absl::StatusOr<std::vector<bool>> ChooseStates(const RestoreSelection& selection,
                                               const std::vector<TensorState>& tensor_states);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RESTORE_SELECTION_H_
