// One loop per dtype, over a decoder that gives the value as a float (exact for all small floating
// types), a double or an integer. Where all elements differ, as between two steps of a training,
// this loop is what a comparison takes longest for: it divides only where a maximum grows.
#include "format/element_difference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "base/check.h"

namespace holdfast {
namespace {

// Decoders: Bits, Value, and Decode.
struct Float64 {
  using Bits = uint64_t;
  static double Decode(Bits bits) { return std::bit_cast<double>(bits); }
};
struct Float32 {
  using Bits = uint32_t;
  static float Decode(Bits bits) { return std::bit_cast<float>(bits); }
};
struct Bfloat16 {
  using Bits = uint16_t;
  static float Decode(Bits bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

// `bits`: exponent and mantissa of a float with a smaller exponent, at the place where a float has
// them. Multiplying by the power of two between the biases also makes subnormals right.
float Rebias(uint32_t bits, uint32_t sign, float power) {
  const float magnitude = std::bit_cast<float>(bits) * power;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

struct Float16 {
  using Bits = uint16_t;
  static float Decode(Bits bits) {
    const uint32_t sign = (uint32_t{bits} & 0x8000) << 16;
    const uint32_t rest = (uint32_t{bits} & 0x7FFF) << 13;
    if (rest >= 0x0F800000) return std::bit_cast<float>(sign | rest | 0x7F800000);  // inf, NaN
    return Rebias(rest, sign, 0x1p112F);
  }
};
// As float16 with the upper two bits of its mantissa.
struct Float8E5m2 {
  using Bits = uint8_t;
  static float Decode(Bits bits) {
    return Float16::Decode(static_cast<uint16_t>(uint32_t{bits} << 8));
  }
};
// No infinity; NaN is all ones.
struct Float8E4m3fn {
  using Bits = uint8_t;
  static float Decode(Bits bits) {
    const uint32_t rest = uint32_t{bits} & 0x7F;
    if (rest == 0x7F) return std::numeric_limits<float>::quiet_NaN();
    return Rebias(rest << 20, (uint32_t{bits} & 0x80) << 24, 0x1p120F);
  }
};
// NaN is what would be the negative zero, and nothing is infinite. Their biases are one above those
// of their namesakes.
template <unsigned kMantissaShift>
struct Float8Fnuz {
  using Bits = uint8_t;
  static constexpr float kPower = kMantissaShift == 20 ? 0x1p119F : 0x1p111F;
  static float Decode(Bits bits) {
    if (bits == 0x80) return std::numeric_limits<float>::quiet_NaN();
    return Rebias((uint32_t{bits} & 0x7F) << kMantissaShift, (uint32_t{bits} & 0x80) << 24, kPower);
  }
};
using Float8E4m3fnuz = Float8Fnuz<20>;
using Float8E5m2fnuz = Float8Fnuz<21>;
// A power of two from 2^-127 on; all ones are NaN.
struct Float8E8m0fnu {
  using Bits = uint8_t;
  static float Decode(Bits bits) {
    if (bits == 0xFF) return std::numeric_limits<float>::quiet_NaN();
    return std::bit_cast<float>(bits == 0 ? uint32_t{1} << 22 : uint32_t{bits} << 23);
  }
};
template <typename Integer>
struct IntegerOf {
  using Bits = std::make_unsigned_t<Integer>;
  static Integer Decode(Bits bits) { return static_cast<Integer>(bits); }
};

void AddDistance(double a, double b, ElementDifferences& found) {
  const double larger = std::max(std::fabs(a), std::fabs(b));
  double distance = std::fabs(a - b);
  if (distance > found.max_relative * larger) {
    // Two large doubles of opposite signs are further apart than a double can say.
    found.max_relative = std::isfinite(distance) ? distance / larger : a / larger - b / larger;
    found.max_relative = std::fabs(found.max_relative);
  }
  distance = std::min(distance, std::numeric_limits<double>::max());
  if (distance > found.max_absolute) found.max_absolute = distance;
}

template <typename Kind>
ElementDifferences Compare(std::span<const std::byte> a, std::span<const std::byte> b,
                           uint64_t first_element) {
  using Bits = typename Kind::Bits;
  ElementDifferences found;
  const size_t elements = a.size() / sizeof(Bits);
  for (size_t i = 0; i < elements; ++i) {
    Bits x;
    Bits y;
    std::memcpy(&x, a.data() + i * sizeof(Bits), sizeof(Bits));
    std::memcpy(&y, b.data() + i * sizeof(Bits), sizeof(Bits));
    if (x == y) continue;
    if (found.count++ == 0) found.first = first_element + i;
    const auto p = Kind::Decode(x);
    const auto q = Kind::Decode(y);
    if constexpr (std::is_floating_point_v<std::remove_const_t<decltype(p)>>) {
      if (std::isfinite(p) && std::isfinite(q)) {
        AddDistance(double{p}, double{q}, found);
      } else {
        ++found.non_finite_count;
      }
    } else {
      const uint64_t distance = p > q ? static_cast<uint64_t>(p) - static_cast<uint64_t>(q)
                                      : static_cast<uint64_t>(q) - static_cast<uint64_t>(p);
      found.max_absolute = std::max(found.max_absolute, static_cast<double>(distance));
    }
  }
  return found;
}

// Two components of `Kind` are an element; the maxima are over components.
template <typename Kind>
ElementDifferences CompareComplex(std::span<const std::byte> a, std::span<const std::byte> b,
                                  uint64_t first_element) {
  constexpr size_t kElement = 2 * sizeof(typename Kind::Bits);
  ElementDifferences found;
  for (size_t at = 0; at < a.size(); at += kElement) {
    const ElementDifferences parts =
        Compare<Kind>(a.subspan(at, kElement), b.subspan(at, kElement), 0);
    if (parts.count == 0) continue;
    if (found.count++ == 0) found.first = first_element + at / kElement;
    found.non_finite_count += parts.non_finite_count > 0 ? 1 : 0;
    found.max_absolute = std::max(found.max_absolute, parts.max_absolute);
    found.max_relative = std::max(found.max_relative, parts.max_relative);
  }
  return found;
}

}  // namespace

ElementDifferences& ElementDifferences::operator+=(const ElementDifferences& other) {
  count += other.count;
  first = std::min(first, other.first);
  non_finite_count += other.non_finite_count;
  max_absolute = std::max(max_absolute, other.max_absolute);
  max_relative = std::max(max_relative, other.max_relative);
  return *this;
}

ElementDifferences CompareElements(Dtype dtype, std::span<const std::byte> a,
                                   std::span<const std::byte> b, uint64_t first_element) {
  CHECK(a.size() == b.size() && a.size() % ElementBytes(dtype) == 0);
  switch (dtype) {
    case Dtype::kBool:
    case Dtype::kUint8:
    case Dtype::kFloat4E2m1fnX2:  // two numbers in one byte: only whether they differ means much
    case Dtype::kBits8:
    case Dtype::kBits1x8:
    case Dtype::kBits2x4:
    case Dtype::kBits4x2:
      return Compare<IntegerOf<uint8_t>>(a, b, first_element);
    case Dtype::kInt8:
      return Compare<IntegerOf<int8_t>>(a, b, first_element);
    case Dtype::kUint16:
    case Dtype::kBits16:
      return Compare<IntegerOf<uint16_t>>(a, b, first_element);
    case Dtype::kInt16:
      return Compare<IntegerOf<int16_t>>(a, b, first_element);
    case Dtype::kUint32:
      return Compare<IntegerOf<uint32_t>>(a, b, first_element);
    case Dtype::kInt32:
      return Compare<IntegerOf<int32_t>>(a, b, first_element);
    case Dtype::kUint64:
      return Compare<IntegerOf<uint64_t>>(a, b, first_element);
    case Dtype::kInt64:
      return Compare<IntegerOf<int64_t>>(a, b, first_element);
    case Dtype::kFloat16:
      return Compare<Float16>(a, b, first_element);
    case Dtype::kBfloat16:
      return Compare<Bfloat16>(a, b, first_element);
    case Dtype::kFloat32:
      return Compare<Float32>(a, b, first_element);
    case Dtype::kFloat64:
      return Compare<Float64>(a, b, first_element);
    case Dtype::kFloat8E4m3fn:
      return Compare<Float8E4m3fn>(a, b, first_element);
    case Dtype::kFloat8E5m2:
      return Compare<Float8E5m2>(a, b, first_element);
    case Dtype::kFloat8E4m3fnuz:
      return Compare<Float8E4m3fnuz>(a, b, first_element);
    case Dtype::kFloat8E5m2fnuz:
      return Compare<Float8E5m2fnuz>(a, b, first_element);
    case Dtype::kFloat8E8m0fnu:
      return Compare<Float8E8m0fnu>(a, b, first_element);
    case Dtype::kComplex32:
      return CompareComplex<Float16>(a, b, first_element);
    case Dtype::kComplex64:
      return CompareComplex<Float32>(a, b, first_element);
    case Dtype::kComplex128:
      return CompareComplex<Float64>(a, b, first_element);
  }
  CHECK(false);  // every dtype is above
  return {};
}

}  // namespace holdfast
