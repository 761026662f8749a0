// The leaves of a torch file's tree, with the keys on the way to them.
#ifndef HOLDFAST_CONVERTER_TORCH_LEAVES_H_
#define HOLDFAST_CONVERTER_TORCH_LEAVES_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

inline constexpr size_t kTorchLeavesMax = 2'000'000;

// Calls `visit` with each value below the root that is no container, and with containers that hold
// nothing but numbers, text and None, or nothing at all; `path` has the keys (those that are no
// text as Python prints integers, else `?`) and positions. Stops at the first error of `visit`.
// Errors:
// kResourceExhausted (more leaves, or deeper than kTorchNestingMax: also of what holds itself).
absl::Status VisitTorchLeaves(
    TorchValue root,
    absl::FunctionRef<absl::Status(const std::vector<std::string>& path, TorchValue leaf)> visit);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_LEAVES_H_
