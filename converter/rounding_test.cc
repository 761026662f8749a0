// Goal: rounding to nearest, ties to even. Method: an oracle that searches the nearest of all 2^16
// numbers in exact arithmetic (doubles hold all of them, and all their midpoints), on every number
// of the target, every midpoint and its neighbours, and at random.
#include "converter/rounding.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace holdfast::converter {
namespace {

struct Format {
  Dtype dtype;
  int exponent_bits;
  int mantissa_bits;
};
constexpr Format kFormats[] = {{Dtype::kBfloat16, 8, 7}, {Dtype::kFloat16, 5, 10}};

// The value of the non-negative number with these bits; of the infinite one: as if the exponent
// range went on, which is what rounding compares with.
double Value(const Format& format, uint32_t bits) {
  const uint32_t mantissa = bits & ((1u << format.mantissa_bits) - 1);
  const uint32_t exponent = bits >> format.mantissa_bits;
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  if (exponent == 0) return std::ldexp(mantissa, 1 - bias - format.mantissa_bits);
  return std::ldexp(mantissa | (1u << format.mantissa_bits),
                    static_cast<int>(exponent) - bias - format.mantissa_bits);
}

uint16_t Oracle(const Format& format, double number) {
  const auto sign = static_cast<uint16_t>(std::signbit(number) ? 0x8000 : 0);
  const double magnitude = std::fabs(number);
  const uint32_t infinite = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
  uint32_t low = 0;
  uint32_t high = infinite;  // Value(low) <= magnitude, and the answer is low or low + 1
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (Value(format, middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - Value(format, low);
  const double above = Value(format, high) - magnitude;
  const bool up = above < below || (above == below && (low & 1) != 0);
  return sign | static_cast<uint16_t>(up ? high : low);
}

uint16_t Rounded(const Format& format, float number) {
  std::byte in[sizeof(number)];
  std::byte out[sizeof(uint16_t)];
  std::memcpy(in, &number, sizeof(number));
  RoundElements(Dtype::kFloat32, format.dtype, in, out);
  uint16_t bits = 0;
  std::memcpy(&bits, out, sizeof(bits));
  return bits;
}

TEST(RoundingTest, IsToNearestTiesToEven) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (const Format& format : kFormats) {
    const uint32_t infinite = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
    std::vector<float> numbers;
    for (uint32_t bits = 0; bits < infinite; ++bits) {
      const double exact = Value(format, bits);
      const double middle = (exact + Value(format, bits + 1)) / 2;
      for (double value : {exact, middle}) {
        const auto number = static_cast<float>(value);
        numbers.insert(numbers.end(),
                       {number, std::nextafterf(number, 0.0f), std::nextafterf(number, HUGE_VALF)});
      }
    }
    for (int i = 0; i < 100'000; ++i) {
      numbers.push_back(std::bit_cast<float>(static_cast<uint32_t>(random())));
    }
    for (float number : numbers) {
      if (!std::isfinite(number)) continue;
      ASSERT_EQ(Rounded(format, number), Oracle(format, number)) << number;
      ASSERT_EQ(Rounded(format, -number), Oracle(format, -number)) << -number;
    }
    EXPECT_EQ(Rounded(format, std::numeric_limits<float>::infinity()), infinite);
    EXPECT_EQ(Rounded(format, -std::numeric_limits<float>::infinity()), 0x8000 | infinite);
    EXPECT_GT(Rounded(format, std::numeric_limits<float>::quiet_NaN()) & 0x7FFF, infinite);
  }
}

template <typename To, typename From>
To Cast(Dtype from, Dtype to, From number, uint64_t* became_infinite = nullptr) {
  std::byte in[sizeof(From)];
  std::byte out[sizeof(To)];
  std::memcpy(in, &number, sizeof(in));
  const uint64_t infinite = CastElements(from, to, in, out);
  if (became_infinite != nullptr) *became_infinite = infinite;
  To result;
  std::memcpy(&result, out, sizeof(out));
  return result;
}

// From float64 in one step: by way of float32 a number just above a midpoint would be a tie.
TEST(CastElements, Float64IsRoundedOnce) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (const Format& format : kFormats) {
    const uint32_t infinite = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
    std::vector<double> numbers;
    for (uint32_t bits = 0; bits < infinite; ++bits) {
      const double exact = Value(format, bits);
      const double middle = (exact + Value(format, bits + 1)) / 2;
      for (double value : {exact, middle}) {
        numbers.insert(numbers.end(),
                       {value, std::nextafter(value, 0.0), std::nextafter(value, HUGE_VAL)});
      }
    }
    for (int i = 0; i < 100'000; ++i) numbers.push_back(std::bit_cast<double>(random()));
    for (double number : numbers) {
      if (!std::isfinite(number)) continue;
      uint64_t became_infinite = 0;
      const auto cast = Cast<uint16_t>(Dtype::kFloat64, format.dtype, number, &became_infinite);
      ASSERT_EQ(cast, Oracle(format, number)) << number;
      ASSERT_EQ(became_infinite, (cast & 0x7FFF) == infinite ? 1 : 0) << number;
      ASSERT_EQ(Cast<uint16_t>(Dtype::kFloat64, format.dtype, -number), Oracle(format, -number));
    }
    for (const double special : {HUGE_VAL, -HUGE_VAL}) {
      uint64_t became_infinite = 1;
      EXPECT_EQ(Cast<uint16_t>(Dtype::kFloat64, format.dtype, special, &became_infinite) & 0x7FFF,
                infinite);
      EXPECT_EQ(became_infinite, 0u);  // it was
    }
    EXPECT_GT(Cast<uint16_t>(Dtype::kFloat64, format.dtype, std::nan("")) & 0x7FFF, infinite);
  }
}

// All of float16 and bfloat16 into the wider types and back.
TEST(CastElements, WideningIsExact) {
  for (const Format& format : kFormats) {
    const uint32_t infinite = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
    for (uint32_t bits = 0; bits <= infinite; ++bits) {
      const auto narrow = static_cast<uint16_t>(bits);
      const auto negative = static_cast<uint16_t>(bits | 0x8000);
      const auto single = Cast<float>(format.dtype, Dtype::kFloat32, narrow);
      if (bits < infinite) {
        ASSERT_EQ(single, Value(format, bits)) << bits;
        ASSERT_EQ(Cast<double>(format.dtype, Dtype::kFloat64, negative), -Value(format, bits));
      } else {
        ASSERT_TRUE(std::isinf(single));
      }
      ASSERT_EQ(Cast<uint16_t>(Dtype::kFloat32, format.dtype, single), narrow);
      ASSERT_EQ(Cast<uint16_t>(format.dtype, format.dtype, negative), negative);
    }
  }
  EXPECT_EQ(Cast<float>(Dtype::kFloat64, Dtype::kFloat32, 1e300), HUGE_VALF);
}

}  // namespace
}  // namespace holdfast::converter
