#include "converter/rounding.h"

#include <cstdint>
#include <cstring>

#include "base/check.h"

namespace holdfast::converter {
namespace {

uint16_t ToBfloat16(uint32_t bits) {
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // torch: every NaN is this one
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

uint16_t ToFloat16(uint32_t bits) {
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7E00;
  if (magnitude >= 0x47800000) return sign | 0x7C00;  // 2^16 and more
  uint32_t mantissa = magnitude;
  uint32_t dropped_bits = 13;
  if (magnitude < 0x38800000) {  // below 2^-14: subnormal, in units of 2^-24
    const uint32_t exponent = magnitude >> 23;
    if (exponent < 102) return sign;  // below half of the smallest one
    mantissa = (magnitude & 0x7FFFFF) | 0x800000;
    dropped_bits = 126 - exponent;
  } else {
    mantissa = magnitude - 0x38000000;  // the exponent's bias: 127 - 15
  }
  const uint32_t kept = mantissa >> dropped_bits;
  const uint32_t half = uint32_t{1} << (dropped_bits - 1);
  const uint32_t rest = mantissa & ((half << 1) - 1);
  const uint32_t up = rest > half || (rest == half && (kept & 1) != 0) ? 1 : 0;
  return sign | static_cast<uint16_t>(kept + up);  // may carry into the exponent, up to infinity
}

}  // namespace

bool CanRound(Dtype from, Dtype to) {
  return from == to ||
         (from == Dtype::kFloat32 && (to == Dtype::kBfloat16 || to == Dtype::kFloat16));
}

void RoundElements(Dtype from, Dtype to, std::span<const std::byte> in, std::span<std::byte> out) {
  CHECK(CanRound(from, to));
  CHECK(in.size() / ElementBytes(from) == out.size() / ElementBytes(to));
  if (from == to) {
    if (!in.empty()) std::memcpy(out.data(), in.data(), in.size());
    return;
  }
  const size_t count = in.size() / sizeof(uint32_t);
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, in.data() + i * sizeof(bits), sizeof(bits));
    const uint16_t rounded = to == Dtype::kBfloat16 ? ToBfloat16(bits) : ToFloat16(bits);
    std::memcpy(out.data() + i * sizeof(rounded), &rounded, sizeof(rounded));
  }
}

}  // namespace holdfast::converter
