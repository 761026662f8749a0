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

struct Sha256::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~State() { EVP_MD_CTX_free(context); }
};

// These fail only where libcrypto has no SHA-256 or no memory.
Sha256::Sha256() : state_(std::make_unique<State>()) {
  CHECK(state_->context != nullptr);
  CHECK(EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr) == 1);
}

Sha256::~Sha256() = default;

void Sha256::Add(std::span<const std::byte> part) {
  CHECK(EVP_DigestUpdate(state_->context, part.data(), part.size()) == 1);
}

Sha256Digest Sha256::Finish() {
  Sha256Digest digest;
  unsigned int bytes = 0;
  CHECK(EVP_DigestFinal_ex(state_->context, reinterpret_cast<unsigned char*>(digest.data()),
                           &bytes) == 1);
  CHECK(bytes == digest.size());
  return digest;
}

std::string Hex(const Sha256Digest& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte byte : digest) {
    text += kDigits[std::to_integer<unsigned>(byte) >> 4];
    text += kDigits[std::to_integer<unsigned>(byte) & 15];
  }
  return text;
}

bool EqualInConstantTime(const Sha256Digest& a, const Sha256Digest& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace holdfast
