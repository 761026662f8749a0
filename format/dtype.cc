#include "format/dtype.h"

#include <array>
#include <cstddef>

#include "base/check.h"

namespace holdfast {
namespace {

constexpr std::array<std::string_view, 27> kNames = {"bool",
                                                     "uint8",
                                                     "int8",
                                                     "uint16",
                                                     "int16",
                                                     "uint32",
                                                     "int32",
                                                     "uint64",
                                                     "int64",
                                                     "float16",
                                                     "bfloat16",
                                                     "float32",
                                                     "float64",
                                                     "float8_e4m3fn",
                                                     "float8_e5m2",
                                                     "float8_e4m3fnuz",
                                                     "float8_e5m2fnuz",
                                                     "float8_e8m0fnu",
                                                     "float4_e2m1fn_x2",
                                                     "complex32",
                                                     "complex64",
                                                     "complex128",
                                                     "bits8",
                                                     "bits16",
                                                     "bits1x8",
                                                     "bits2x4",
                                                     "bits4x2"};
constexpr std::array<uint64_t, 27> kBytes = {1, 1, 1, 2, 2, 4, 4, 8,  8, 2, 2, 4, 8, 1,
                                             1, 1, 1, 1, 1, 4, 8, 16, 1, 2, 1, 1, 1};

size_t IndexOf(Dtype dtype) {
  const size_t index = size_t{static_cast<uint8_t>(dtype)} - 1;
  CHECK(index < kNames.size());
  return index;
}

}  // namespace

std::span<const std::string_view> DtypeNames() { return kNames; }

std::optional<Dtype> DtypeFromName(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Dtype>(i + 1);
  }
  return std::nullopt;
}

std::optional<Dtype> DtypeFromNumber(uint8_t number) {
  if (number < 1 || number > kNames.size()) return std::nullopt;
  return static_cast<Dtype>(number);
}

std::string_view DtypeName(Dtype dtype) { return kNames[IndexOf(dtype)]; }

uint64_t ElementBytes(Dtype dtype) { return kBytes[IndexOf(dtype)]; }

}  // namespace holdfast
