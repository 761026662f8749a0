#include "base/crc32c.h"

#include <isa-l.h>

#include <algorithm>

namespace holdfast {
namespace {

// The polynomial without its x^32 term, bit-reversed: bit 31 is the coefficient of x^0.
constexpr uint32_t kReversedPolynomial = 0x82F63B78u;
constexpr uint32_t kOne = 0x80000000u;  // x^0

// a * b modulo the polynomial, both bit-reversed.
constexpr uint32_t MultiplyModulo(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = (b & 1) != 0 ? (b >> 1) ^ kReversedPolynomial : b >> 1;  // b *= x
  }
  return product;
}

}  // namespace

uint32_t ExtendCrc32c(uint32_t crc, std::span<const std::byte> data) {
  // crc32_iscsi takes an int length and neither inverts before nor after.
  constexpr size_t kPieceBytesMax = size_t{1} << 30;
  uint32_t state = ~crc;
  while (!data.empty()) {
    const std::span<const std::byte> piece = data.first(std::min(data.size(), kPieceBytesMax));
    // ISA-L's signature lacks const; it only reads.
    auto* bytes = const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(piece.data()));
    state = crc32_iscsi(bytes, static_cast<int>(piece.size()), state);
    data = data.subspan(piece.size());
  }
  return ~state;
}

uint32_t Crc32c(std::span<const std::byte> data) { return ExtendCrc32c(0, data); }

uint32_t CombineCrc32c(uint32_t crc_a, uint32_t crc_b, uint64_t b_bytes) {
  uint32_t shift = kOne;       // becomes x^(8 * b_bytes)
  uint32_t power = kOne >> 8;  // x^8, then x^16, x^32, ...
  for (uint64_t n = b_bytes; n != 0; n >>= 1) {
    if ((n & 1) != 0) shift = MultiplyModulo(power, shift);
    power = MultiplyModulo(power, power);
  }
  return MultiplyModulo(shift, crc_a) ^ crc_b;
}

}  // namespace holdfast
