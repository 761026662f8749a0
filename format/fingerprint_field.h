// Integers modulo the prime p = 2^127 - 1, in which fingerprints are summed. Inside of
// format/fingerprint*.
#ifndef HOLDFAST_FORMAT_FINGERPRINT_FIELD_H_
#define HOLDFAST_FORMAT_FINGERPRINT_FIELD_H_

#include <cstdint>

#include "absl/numeric/int128.h"

namespace holdfast::fingerprint_field {

inline constexpr absl::uint128 kPrime = (absl::uint128{1} << 127) - 1;

// `value` modulo p. 2^127 is 1.
inline absl::uint128 Reduce(absl::uint128 value) {
  const absl::uint128 folded = (value & kPrime) + (value >> 127);
  return folded >= kPrime ? folded - kPrime : folded;
}

// a, b < p.
inline absl::uint128 Add(absl::uint128 a, absl::uint128 b) { return Reduce(a + b); }

// a, b < p.
inline absl::uint128 Multiply(absl::uint128 a, absl::uint128 b) {
  const uint64_t a0 = absl::Uint128Low64(a);
  const uint64_t a1 = absl::Uint128High64(a);  // < 2^63
  const uint64_t b0 = absl::Uint128Low64(b);
  const uint64_t b1 = absl::Uint128High64(b);
  const absl::uint128 low = absl::uint128{a0} * b0;
  // At most 2 (2^64 - 1) (2^63 - 1) + 2^64 - 1: fits.
  const absl::uint128 middle =
      absl::uint128{a0} * b1 + absl::uint128{a1} * b0 + absl::Uint128High64(low);
  const absl::uint128 high = absl::uint128{a1} * b1 + absl::Uint128High64(middle);  // < 2^126
  const absl::uint128 bottom = (middle << 64) | absl::Uint128Low64(low);
  // The product is high * 2^128 + bottom, and 2^128 is 2.
  return Reduce((bottom & kPrime) + ((high << 1) | (bottom >> 127)));
}

}  // namespace holdfast::fingerprint_field

#endif  // HOLDFAST_FORMAT_FINGERPRINT_FIELD_H_
