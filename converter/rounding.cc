#include "converter/rounding.h"

#include <bit>
#include <cmath>
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

// Exact.
float FromFloat16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1F;
  const uint32_t mantissa = bits & 0x3FF;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000 | mantissa << 13);
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  return sign != 0 ? -magnitude : magnitude;
}

// The nearest float towards zero, its last bit set if that is not the number itself ("round to
// odd"). Rounding it to nearest in a type of at least two bits less is rounding `value` itself.
float ToOdd(double value) {
  const auto near = static_cast<float>(value);
  if (std::isnan(value) || static_cast<double>(near) == value) return near;
  auto bits = std::bit_cast<uint32_t>(near);
  if (std::fabs(static_cast<double>(near)) > std::fabs(value)) --bits;
  return std::bit_cast<float>(bits | 1);
}

template <typename T>
T Load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
void Store(T value, std::byte* to) {
  std::memcpy(to, &value, sizeof(value));
}

// `load` gives a number as float, or as double, and `store` takes what it gives.
template <typename Read, typename Write>
uint64_t CastAll(size_t count, Read load, Write store) {
  uint64_t became_infinite = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto value = load(i);
    if (!store(i, value) && std::isfinite(value)) ++became_infinite;
  }
  return became_infinite;
}

// Stores numbers of the type of `value` in `to`: whether what is stored is finite.
template <typename Value>
bool StoreAs(Dtype to, Value value, std::byte* out) {
  switch (to) {
    case Dtype::kFloat64:
      Store(static_cast<double>(value), out);
      return std::isfinite(value);
    case Dtype::kFloat32: {
      const auto narrow = static_cast<float>(value);
      Store(narrow, out);
      return std::isfinite(narrow);
    }
    default: {
      float single = 0;
      if constexpr (sizeof(Value) == sizeof(double)) {
        single = ToOdd(value);
      } else {
        single = value;
      }
      const auto bits = std::bit_cast<uint32_t>(single);
      const uint16_t narrow = to == Dtype::kBfloat16 ? ToBfloat16(bits) : ToFloat16(bits);
      Store(narrow, out);
      const uint16_t exponent = to == Dtype::kBfloat16 ? 0x7F80 : 0x7C00;
      return (narrow & exponent) != exponent;
    }
  }
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

bool IsCastable(Dtype dtype) {
  return dtype == Dtype::kFloat16 || dtype == Dtype::kBfloat16 || dtype == Dtype::kFloat32 ||
         dtype == Dtype::kFloat64;
}

uint64_t CastElements(Dtype from, Dtype to, std::span<const std::byte> in,
                      std::span<std::byte> out) {
  CHECK(IsCastable(from) && IsCastable(to));
  const size_t from_bytes = ElementBytes(from);
  const size_t to_bytes = ElementBytes(to);
  const size_t count = in.size() / from_bytes;
  CHECK(count * from_bytes == in.size() && count * to_bytes == out.size());
  if (from == to) {
    if (!in.empty()) std::memcpy(out.data(), in.data(), in.size());
    return 0;
  }
  const auto store = [&](size_t i, auto value) {
    return StoreAs(to, value, out.data() + i * to_bytes);
  };
  switch (from) {
    case Dtype::kFloat64:
      return CastAll(
          count, [&](size_t i) { return Load<double>(in.data() + i * from_bytes); }, store);
    case Dtype::kFloat32:
      return CastAll(
          count, [&](size_t i) { return Load<float>(in.data() + i * from_bytes); }, store);
    case Dtype::kFloat16:
      return CastAll(
          count, [&](size_t i) { return FromFloat16(Load<uint16_t>(in.data() + i * from_bytes)); },
          store);
    default:
      return CastAll(
          count,
          [&](size_t i) {
            const auto bits = Load<uint16_t>(in.data() + i * from_bytes);
            return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
          },
          store);
  }
}

}  // namespace holdfast::converter
