// SHA-256 and message authentication by HMAC-SHA256 (FIPS 180-4, RFC 2104), as libcrypto does them.
// The one place where libcrypto stands.
#ifndef HOLDFAST_BASE_SHA256_H_
#define HOLDFAST_BASE_SHA256_H_

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace holdfast {

inline constexpr size_t kSha256Bytes = 32;
using Sha256Digest = std::array<std::byte, kSha256Bytes>;

// The digest of a message that comes in parts.
// Threads: one.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Add(std::span<const std::byte> part);
  Sha256Digest Finish();  // once; nothing may follow

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

// 64 small hexadecimal digits.
std::string Hex(const Sha256Digest& digest);

// The authentication code of `message` under `key`; both of any length.
// Threads: any.
Sha256Digest HmacSha256(std::span<const std::byte> key, std::span<const std::byte> message);

// Whether the two are equal, in a time that does not depend on where they differ: for codes that
// somebody may be guessing.
bool EqualInConstantTime(const Sha256Digest& a, const Sha256Digest& b);

}  // namespace holdfast

#endif  // HOLDFAST_BASE_SHA256_H_
