#include "base/sha256.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <climits>

#include "base/check.h"

namespace holdfast {

Sha256Digest HmacSha256(std::span<const std::byte> key, std::span<const std::byte> message) {
  CHECK(key.size() <= INT_MAX);
  Sha256Digest digest;
  unsigned int digest_bytes = 0;
  // An empty key is given as a pointer to something: HMAC() takes nullptr for "the key of before".
  static constexpr unsigned char kNothing = 0;
  const void* key_data = key.empty() ? static_cast<const void*>(&kNothing) : key.data();
  // Fails only where libcrypto has no SHA-256 or no memory.
  CHECK(HMAC(EVP_sha256(), key_data, static_cast<int>(key.size()),
             reinterpret_cast<const unsigned char*>(message.data()), message.size(),
             reinterpret_cast<unsigned char*>(digest.data()), &digest_bytes) != nullptr);
  CHECK(digest_bytes == digest.size());
  return digest;
}

bool EqualInConstantTime(const Sha256Digest& a, const Sha256Digest& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace holdfast
