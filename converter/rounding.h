// Floating-point numbers in another floating-point type, as frameworks make a model's weights from
// their masters: to nearest, ties to even (IEEE 754), NaN stays NaN, what is too large becomes
// infinite.
#ifndef HOLDFAST_CONVERTER_ROUNDING_H_
#define HOLDFAST_CONVERTER_ROUNDING_H_

#include <cstddef>
#include <span>

#include "format/dtype.h"

namespace holdfast::converter {

// From kFloat32 to kBfloat16 or kFloat16, or a type to itself.
bool CanRound(Dtype from, Dtype to);
// `in` and `out` hold the same number of elements, little-endian. CHECKs CanRound.
void RoundElements(Dtype from, Dtype to, std::span<const std::byte> in, std::span<std::byte> out);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_ROUNDING_H_
