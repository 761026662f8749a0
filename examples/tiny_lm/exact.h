// Sums that do not depend on order: fixed point in int64.
//
// Floating-point addition is not associative, so a sum over ranks would depend on how many there
// are. Here every sum that a layout could cut (over samples, and over the blocks of a contraction
// that tensor parallelism cuts) is taken over blocks of a FIXED size: each block is summed in
// floating point by one rank, rounded once to a multiple of 2^-40, and added in int64. Any grouping
// of the blocks over ranks then gives the same bits.
//
// Files that compute are compiled with -ffp-contract=off and without -ffast-math: the bits must not
// depend on what the compiler fuses or reorders.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_EXACT_H_
#define HOLDFAST_EXAMPLES_TINY_LM_EXACT_H_

#include <bit>
#include <cmath>
#include <cstdint>

namespace tiny_lm {

inline constexpr double kFixedPointScale = 1099511627776.0;  // 2^40
// A block at or above this, or one that is not a number, cannot be represented.
inline constexpr double kFixedPointMax = 4194304.0;  // 2^22; a sum may be 2^23

// Counts what could not be represented; it counts as 0 in the sum, and the trainer reports it.
inline int64_t ToFixedPoint(double value, int64_t& overflow_count) {
  if (!(std::fabs(value) < kFixedPointMax)) {
    ++overflow_count;
    return 0;
  }
  return std::llrint(value * kFixedPointScale);
}
inline double FromFixedPoint(int64_t fixed) {
  return static_cast<double>(fixed) / kFixedPointScale;
}

// A number's bits, to be summed over ranks of which all but one give 0: a way to pass on a value
// that one rank has, exactly, with the sum that is there anyway.
template <typename Real>
int64_t ToBits(Real value) {
  if constexpr (sizeof(Real) == sizeof(int64_t)) return std::bit_cast<int64_t>(value);
  return std::bit_cast<int32_t>(static_cast<float>(value));
}
template <typename Real>
Real FromBits(int64_t bits) {
  if constexpr (sizeof(Real) == sizeof(int64_t)) return std::bit_cast<Real>(bits);
  return std::bit_cast<float>(static_cast<int32_t>(bits));
}

// bfloat16, rounded to nearest even. Not for NaN.
inline uint16_t ToBfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float FromBfloat16(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_EXACT_H_
