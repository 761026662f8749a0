// Every value of every small floating type against zero and against its neighbours, by a second
// decoder written from the definition of the types; the edges of the large ones and of integers.
#include "format/element_difference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace holdfast {
namespace {

template <typename Bits>
ElementDifferences Compare(Dtype dtype, const std::vector<Bits>& a, const std::vector<Bits>& b,
                           uint64_t first_element = 0) {
  return CompareElements(dtype, std::as_bytes(std::span(a)), std::as_bytes(std::span(b)),
                         first_element);
}

struct Form {
  Dtype dtype;
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;
  bool is_fnuz = false;  // bias one above; NaN is the negative zero
};

// Sign, exponent and mantissa; empty: NaN or infinite.
std::optional<double> ValueOf(const Form& form, uint32_t bits) {
  const uint32_t exponent_max = (1u << form.exponent_bits) - 1;
  const uint32_t mantissa_max = (1u << form.mantissa_bits) - 1;
  const uint32_t exponent = (bits >> form.mantissa_bits) & exponent_max;
  const uint32_t mantissa = bits & mantissa_max;
  if (form.is_fnuz) {
    if (bits == 1u << (form.mantissa_bits + form.exponent_bits)) return {};
  } else if (exponent == exponent_max && (form.has_infinity || mantissa == mantissa_max)) {
    return {};
  }
  const double whole = mantissa + (exponent > 0 ? mantissa_max + 1.0 : 0.0);
  const int bias = (1 << (form.exponent_bits - 1)) - (form.is_fnuz ? 0 : 1);
  const double value = std::ldexp(
      whole, (exponent > 0 ? static_cast<int>(exponent) : 1) - bias - form.mantissa_bits);
  return (bits >> (form.mantissa_bits + form.exponent_bits)) & 1 ? -value : value;
}

template <typename Bits>
void CheckAllValues(const Form& form) {
  const uint32_t count = 1u << (8 * sizeof(Bits));
  uint32_t non_finite = 0;
  for (uint32_t bits = 0; bits < count; ++bits) {
    const std::optional<double> value = ValueOf(form, bits);
    non_finite += value.has_value() ? 0 : 1;
    for (const uint32_t other : {0u, (bits + 1) % count, bits}) {
      const ElementDifferences found =
          Compare<Bits>(form.dtype, {static_cast<Bits>(bits)}, {static_cast<Bits>(other)}, bits);
      ASSERT_EQ(found.count, bits == other ? 0u : 1u);
      ASSERT_EQ(found.first, bits == other ? ElementDifferences::kNone : bits);
      const std::optional<double> second = ValueOf(form, other);
      const bool finite = value.has_value() && second.has_value();
      ASSERT_EQ(found.non_finite_count, bits == other || finite ? 0u : 1u) << bits << " " << other;
      const double distance = finite ? std::fabs(*value - *second) : 0;
      ASSERT_EQ(found.max_absolute, distance) << bits << " " << other;
      const double larger = finite ? std::max(std::fabs(*value), std::fabs(*second)) : 0;
      ASSERT_EQ(found.max_relative, larger > 0 ? distance / larger : 0) << bits << " " << other;
    }
  }
  const uint32_t each = form.has_infinity ? 1u << form.mantissa_bits : 1;
  EXPECT_EQ(non_finite, form.is_fnuz ? 1 : 2 * each);
}

TEST(ElementDifference, EveryValueOfTheSmallFloatingTypesIsDecoded) {
  CheckAllValues<uint16_t>({Dtype::kFloat16, 5, 10, true});
  CheckAllValues<uint16_t>({Dtype::kBfloat16, 8, 7, true});
  CheckAllValues<uint8_t>({Dtype::kFloat8E5m2, 5, 2, true});
  CheckAllValues<uint8_t>({Dtype::kFloat8E4m3fn, 4, 3, false});
  CheckAllValues<uint8_t>({Dtype::kFloat8E4m3fnuz, 4, 3, false, true});
  CheckAllValues<uint8_t>({Dtype::kFloat8E5m2fnuz, 5, 2, false, true});
}

TEST(ElementDifference, EveryScaleIsAPowerOfTwo) {
  for (uint32_t bits = 0; bits < 255; ++bits) {
    const auto found = Compare<uint8_t>(Dtype::kFloat8E8m0fnu, {static_cast<uint8_t>(bits)},
                                        {static_cast<uint8_t>(bits == 127 ? 126 : 127)});
    const double other = bits == 127 ? 0.5 : 1.0;
    EXPECT_EQ(found.max_absolute, std::fabs(std::ldexp(1.0, static_cast<int>(bits) - 127) - other));
  }
  EXPECT_EQ(Compare<uint8_t>(Dtype::kFloat8E8m0fnu, {255}, {0}).non_finite_count, 1u);
}

TEST(ElementDifference, AComplexNumberIsOneElement) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const ElementDifferences found =
      Compare<float>(Dtype::kComplex64, {1, 2, 3, 4, 5, nan, 7, 8}, {1, 2, 5, 8, 6, 1, 7, 8.5}, 10);
  EXPECT_EQ(found.count, 3u);
  EXPECT_EQ(found.first, 11u);
  EXPECT_EQ(found.non_finite_count, 1u);
  EXPECT_EQ(found.max_absolute, 4);
  EXPECT_EQ(found.max_relative, 0.5);
  EXPECT_EQ(Compare<double>(Dtype::kComplex128, {1, 2}, {1, -2}).max_absolute, 4);
  // 1.0 and 2.0 as float16, beside zeros.
  EXPECT_EQ(Compare<uint16_t>(Dtype::kComplex32, {0x3C00, 0}, {0x4000, 0}).max_absolute, 1);
}

TEST(ElementDifference, NanInfinityAndTheTwoZerosAreCountedAsTheContractSays) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  float other_nan = nan;
  uint32_t bits = 0;
  std::memcpy(&bits, &other_nan, sizeof(bits));
  ++bits;
  std::memcpy(&other_nan, &bits, sizeof(bits));
  const std::vector<float> a{nan, nan, 1, infinity, infinity, 0.0F, 3};
  const std::vector<float> b{nan, other_nan, nan, 2, -infinity, -0.0F, 3};
  const ElementDifferences found = Compare(Dtype::kFloat32, a, b, 100);
  EXPECT_EQ(found.count, 5u);
  EXPECT_EQ(found.first, 101u);
  EXPECT_EQ(found.non_finite_count, 4u);
  EXPECT_EQ(found.max_absolute, 0);
  EXPECT_EQ(found.max_relative, 0);
}

TEST(ElementDifference, MaximaAreThoseOfDifferentElements) {
  const std::vector<double> a{1000, 1e-300, 5};
  const std::vector<double> b{1001, -1e-300, 5};
  const ElementDifferences found = Compare(Dtype::kFloat64, a, b);
  EXPECT_EQ(found.max_absolute, 1);
  EXPECT_EQ(found.max_relative, 2);
  // Further apart than a double can say.
  const double largest = std::numeric_limits<double>::max();
  const ElementDifferences far =
      Compare(Dtype::kFloat64, std::vector{largest}, std::vector{-largest});
  EXPECT_EQ(far.max_absolute, largest);
  EXPECT_EQ(far.max_relative, 2);
}

TEST(ElementDifference, IntegersAreComparedWithTheirSign) {
  EXPECT_EQ(Compare<int8_t>(Dtype::kInt8, {-128}, {127}).max_absolute, 255);
  EXPECT_EQ(Compare<uint8_t>(Dtype::kUint8, {128}, {127}).max_absolute, 1);
  EXPECT_EQ(Compare<uint8_t>(Dtype::kBool, {1}, {0}).max_absolute, 1);
  EXPECT_EQ(Compare<int16_t>(Dtype::kInt16, {-32768}, {32767}).max_absolute, 65535);
  EXPECT_EQ(Compare<uint16_t>(Dtype::kUint16, {0}, {65535}).max_absolute, 65535);
  EXPECT_EQ(Compare<int32_t>(Dtype::kInt32, {-1}, {1}).max_absolute, 2);
  EXPECT_EQ(Compare<uint32_t>(Dtype::kUint32, {0xFFFFFFFFu}, {0}).max_absolute, 4294967295.0);
  EXPECT_EQ(Compare<int64_t>(Dtype::kInt64, {INT64_MIN}, {INT64_MAX}).max_absolute, 0x1p64);
  EXPECT_EQ(Compare<uint64_t>(Dtype::kUint64, {UINT64_MAX}, {0}).max_absolute, 0x1p64);
  EXPECT_EQ(Compare<int64_t>(Dtype::kInt64, {7}, {4}).max_relative, 0);
}

TEST(ElementDifference, PartsAddUpAndLieAtAnyAddress) {
  std::vector<std::byte> a(1 + 64 * 16);
  std::vector<std::byte> b(1 + 64 * 16);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = static_cast<std::byte>(i * 7);
    b[i] = i % 24 == 9 ? static_cast<std::byte>(i) : a[i];
  }
  const std::span<const std::byte> x = std::span(a).subspan(1);
  const std::span<const std::byte> y = std::span(b).subspan(1);
  for (const std::string_view name : DtypeNames()) {
    const Dtype dtype = *DtypeFromName(name);
    const ElementDifferences whole = CompareElements(dtype, x, y, 0);
    EXPECT_GT(whole.count, 0u);
    for (size_t cut = 0; cut <= x.size(); cut += 16) {
      ElementDifferences sum =
          CompareElements(dtype, x.subspan(cut), y.subspan(cut), cut / ElementBytes(dtype));
      sum += CompareElements(dtype, x.first(cut), y.first(cut), 0);
      EXPECT_EQ(sum.count, whole.count);
      EXPECT_EQ(sum.first, whole.first);
      EXPECT_EQ(sum.non_finite_count, whole.non_finite_count);
      EXPECT_EQ(sum.max_absolute, whole.max_absolute);
      EXPECT_EQ(sum.max_relative, whole.max_relative);
    }
  }
}

}  // namespace
}  // namespace holdfast
