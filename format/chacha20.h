// The ChaCha20 block function (RFC 8439, section 2.3): 64 bytes that nobody can tell from random
// ones for every (key, counter, nonce). Here a generator of published coefficients
// (format/fingerprint.h): nothing is hidden with it.
#ifndef HOLDFAST_FORMAT_CHACHA20_H_
#define HOLDFAST_FORMAT_CHACHA20_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace holdfast {

using ChaChaKey = std::array<uint32_t, 8>;     // its 32 bytes as little-endian words
using ChaChaNonce = std::array<uint32_t, 3>;   // its 12 bytes likewise
using ChaChaBlock = std::array<uint32_t, 16>;  // 64 bytes of the key stream likewise

ChaChaBlock ChaCha20(const ChaChaKey& key, uint32_t counter, const ChaChaNonce& nonce);

// The blocks of counter, counter + 1, ... (modulo 2^32), all at once. Only where the CPU has AVX2.
inline constexpr size_t kChaChaBlocksAtOnce = 8;
void ChaCha20Avx2(const ChaChaKey& key, uint32_t counter, const ChaChaNonce& nonce,
                  std::array<ChaChaBlock, kChaChaBlocksAtOnce>& blocks);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_CHACHA20_H_
