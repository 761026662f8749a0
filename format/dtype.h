// Element types of tensors: names as layout documents spell them, and sizes.
#ifndef HOLDFAST_FORMAT_DTYPE_H_
#define HOLDFAST_FORMAT_DTYPE_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace holdfast {

// The numbers are stored in INDEX and never change.
enum class Dtype : uint8_t {
  kBool = 1,  // one byte, 0 or 1
  kUint8 = 2,
  kInt8 = 3,
  kUint16 = 4,
  kInt16 = 5,
  kUint32 = 6,
  kInt32 = 7,
  kUint64 = 8,
  kInt64 = 9,
  kFloat16 = 10,
  kBfloat16 = 11,
  kFloat32 = 12,
  kFloat64 = 13,
  kFloat8E4m3fn = 14,
  kFloat8E5m2 = 15,
  // Of foreign checkpoints.
  kFloat8E4m3fnuz = 16,
  kFloat8E5m2fnuz = 17,
  kFloat8E8m0fnu = 18,   // a power of two
  kFloat4E2m1fnX2 = 19,  // two numbers in a byte, the first in the lower bits
  kComplex32 = 20,       // real part, then imaginary part: two float16
  kComplex64 = 21,       // two float32
  kComplex128 = 22,      // two float64
  kBits8 = 23,           // torch's untyped bits
  kBits16 = 24,
  kBits1x8 = 25,
  kBits2x4 = 26,
  kBits4x2 = 27,
};

// In the order of their numbers: "bool", "uint8", ... "bits4x2".
std::span<const std::string_view> DtypeNames();

// Empty if no dtype has this name (names are case-sensitive).
std::optional<Dtype> DtypeFromName(std::string_view name);

// Empty if no dtype has this number: for bytes read from storage.
std::optional<Dtype> DtypeFromNumber(uint8_t number);

std::string_view DtypeName(Dtype dtype);

// 1, 2, 4, 8 or 16.
uint64_t ElementBytes(Dtype dtype);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_DTYPE_H_
