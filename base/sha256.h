// Message authentication by HMAC-SHA256 (RFC 2104, FIPS 180-4), as libcrypto does it. The one place
// where libcrypto stands.
#ifndef HOLDFAST_BASE_SHA256_H_
#define HOLDFAST_BASE_SHA256_H_

#include <array>
#include <cstddef>
#include <span>

namespace holdfast {

inline constexpr size_t kSha256Bytes = 32;
using Sha256Digest = std::array<std::byte, kSha256Bytes>;

// The authentication code of `message` under `key`; both of any length.
// Threads: any.
Sha256Digest HmacSha256(std::span<const std::byte> key, std::span<const std::byte> message);

// Whether the two are equal, in a time that does not depend on where they differ: for codes that
// somebody may be guessing.
bool EqualInConstantTime(const Sha256Digest& a, const Sha256Digest& b);

}  // namespace holdfast

#endif  // HOLDFAST_BASE_SHA256_H_
