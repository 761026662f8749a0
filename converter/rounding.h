// Floating-point numbers in another floating-point type: to nearest, ties to even (IEEE 754), NaN
// stays NaN, what is too large becomes infinite.
#ifndef HOLDFAST_CONVERTER_ROUNDING_H_
#define HOLDFAST_CONVERTER_ROUNDING_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "format/dtype.h"

namespace holdfast::converter {

// From kFloat32 to kBfloat16 or kFloat16, or a type to itself: how frameworks make a model's
// weights from their masters.
bool CanRound(Dtype from, Dtype to);
// `in` and `out` hold the same number of elements, little-endian. CHECKs CanRound.
void RoundElements(Dtype from, Dtype to, std::span<const std::byte> in, std::span<std::byte> out);

// kFloat16, kBfloat16, kFloat32, kFloat64: what a user may cast from and to.
bool IsCastable(Dtype dtype);
// As RoundElements, between any two of these, always rounded once (PyTorch makes bfloat16 of
// float64 by way of float32, and so rounds twice). Returns how many finite numbers became infinite.
// CHECKs IsCastable of both.
uint64_t CastElements(Dtype from, Dtype to, std::span<const std::byte> in,
                      std::span<std::byte> out);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_ROUNDING_H_
