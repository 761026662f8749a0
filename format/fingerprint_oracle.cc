#include "format/fingerprint_oracle.h"

#include <utility>

#include "base/check.h"

namespace holdfast {
namespace {

using absl::uint128;

constexpr uint128 kP = (uint128{1} << 127) - 1;
constexpr char kKey[] = "holdfast fingerprint function 01";

// For a, b < p, bit by bit.
uint128 TimesModP(uint128 a, uint128 b) {
  if (b > a) std::swap(a, b);
  uint128 product = 0;
  for (; b != 0; b >>= 1) {
    if ((b & 1) != 0) product = (product + a) % kP;
    a = (a + a) % kP;
  }
  return product;
}

// The 128-bit value number i of the key stream of a purpose.
uint128 KeyValue(uint32_t purpose, uint64_t i) {
  ChaChaKey key = {};
  for (size_t at = 0; at < 32; ++at) {
    key[at / 4] |= uint32_t{static_cast<unsigned char>(kKey[at])} << 8 * (at % 4);
  }
  const uint64_t block_number = i / 4;
  const ChaChaBlock block = ChaCha20(key, static_cast<uint32_t>(block_number),
                                     {static_cast<uint32_t>(block_number >> 32), purpose, 0});
  uint128 value = 0;
  for (size_t word = 4; word-- > 0;) value = (value << 32) + block[4 * (i % 4) + word];
  return value;
}

// K[w]
uint128 Coefficient(uint64_t w) {
  const uint64_t b = w / 1024;
  const uint64_t j = w % 1024;
  const uint128 t = KeyValue(0, j);
  uint128 sum = 0;
  for (uint64_t k = 0; k < 4; ++k) {
    const uint128 t_k = (t >> static_cast<int>(32 * k)) & 0xFFFFFFFF;
    sum = (sum + TimesModP(t_k, KeyValue(1, 4 * b + k) % kP)) % kP;
  }
  return sum;
}

}  // namespace

Fingerprint OracleSum(Dtype dtype, uint64_t first_element, std::span<const std::byte> bytes) {
  const uint64_t s = ElementBytes(dtype);
  CHECK(bytes.size() % s == 0);
  uint128 sum = 0;
  for (uint64_t n = 0; n < bytes.size() / s; ++n) {
    const uint64_t i = first_element + n;
    uint128 x = 0;
    for (uint64_t at = s; at-- > 0;) x = x * 256 + std::to_integer<uint8_t>(bytes[n * s + at]);
    if (s >= 4) {
      for (uint64_t word = 0; word < s / 4; ++word) {
        sum = (sum + TimesModP((x >> static_cast<int>(32 * word)) & 0xFFFFFFFF,
                               Coefficient(s / 4 * i + word))) %
              kP;
      }
    } else {
      const uint128 shifted = x << static_cast<int>(8 * (s * i % 4));
      sum = (sum + TimesModP(shifted, Coefficient(s * i / 4))) % kP;
    }
  }
  return Fingerprint(sum);
}

Fingerprint OracleFingerprint(const TensorState& tensor_state, std::span<const std::byte> bytes) {
  CHECK(bytes.size() == tensor_state.Bytes());
  // dtype and number of dimensions, then every size, lower half first.
  uint128 sum =
      TimesModP(static_cast<uint64_t>(tensor_state.dtype) + 256 * tensor_state.shape.size(),
                KeyValue(2, 0) % kP);
  for (uint64_t d = 0; d < tensor_state.shape.size(); ++d) {
    const uint64_t size = tensor_state.shape[d];
    sum = (sum + TimesModP(size & 0xFFFFFFFF, KeyValue(2, 1 + 2 * d) % kP)) % kP;
    sum = (sum + TimesModP(size >> 32, KeyValue(2, 2 + 2 * d) % kP)) % kP;
  }
  return Fingerprint(sum) + OracleSum(tensor_state.dtype, 0, bytes);
}

}  // namespace holdfast
