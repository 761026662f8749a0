#include "format/chacha20.h"

#include <immintrin.h>

#include <bit>

namespace holdfast {
namespace {

// "expand 32-byte k"
constexpr std::array<uint32_t, 4> kConstants = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
constexpr int kDoubleRounds = 10;

ChaChaBlock InitialState(const ChaChaKey& key, uint32_t counter, const ChaChaNonce& nonce) {
  return {kConstants[0], kConstants[1], kConstants[2], kConstants[3], key[0], key[1],
          key[2],        key[3],        key[4],        key[5],        key[6], key[7],
          counter,       nonce[0],      nonce[1],      nonce[2]};
}

void QuarterRound(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  a += b;
  d = std::rotl(d ^ a, 16);
  c += d;
  b = std::rotl(b ^ c, 12);
  a += b;
  d = std::rotl(d ^ a, 8);
  c += d;
  b = std::rotl(b ^ c, 7);
}

template <int kBits>
[[gnu::target("avx2"), gnu::always_inline]] inline __m256i RotateLeft(__m256i words) {
  return _mm256_or_si256(_mm256_slli_epi32(words, kBits), _mm256_srli_epi32(words, 32 - kBits));
}

[[gnu::target("avx2"), gnu::always_inline]] inline void QuarterRoundAvx2(__m256i& a, __m256i& b,
                                                                         __m256i& c, __m256i& d) {
  a = _mm256_add_epi32(a, b);
  d = RotateLeft<16>(_mm256_xor_si256(d, a));
  c = _mm256_add_epi32(c, d);
  b = RotateLeft<12>(_mm256_xor_si256(b, c));
  a = _mm256_add_epi32(a, b);
  d = RotateLeft<8>(_mm256_xor_si256(d, a));
  c = _mm256_add_epi32(c, d);
  b = RotateLeft<7>(_mm256_xor_si256(b, c));
}

}  // namespace

ChaChaBlock ChaCha20(const ChaChaKey& key, uint32_t counter, const ChaChaNonce& nonce) {
  const ChaChaBlock initial = InitialState(key, counter, nonce);
  ChaChaBlock x = initial;
  for (int i = 0; i < kDoubleRounds; ++i) {
    QuarterRound(x[0], x[4], x[8], x[12]);
    QuarterRound(x[1], x[5], x[9], x[13]);
    QuarterRound(x[2], x[6], x[10], x[14]);
    QuarterRound(x[3], x[7], x[11], x[15]);
    QuarterRound(x[0], x[5], x[10], x[15]);
    QuarterRound(x[1], x[6], x[11], x[12]);
    QuarterRound(x[2], x[7], x[8], x[13]);
    QuarterRound(x[3], x[4], x[9], x[14]);
  }
  for (size_t i = 0; i < x.size(); ++i) x[i] += initial[i];
  return x;
}

// Lane b of every vector is block b.
[[gnu::target("avx2")]] void ChaCha20Avx2(const ChaChaKey& key, uint32_t counter,
                                          const ChaChaNonce& nonce,
                                          std::array<ChaChaBlock, kChaChaBlocksAtOnce>& blocks) {
  const ChaChaBlock state = InitialState(key, counter, nonce);
  __m256i initial[16];
  __m256i x[16];
  for (size_t i = 0; i < 16; ++i) initial[i] = _mm256_set1_epi32(static_cast<int>(state[i]));
  initial[12] = _mm256_add_epi32(initial[12], _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  for (size_t i = 0; i < 16; ++i) x[i] = initial[i];
  for (int i = 0; i < kDoubleRounds; ++i) {
    QuarterRoundAvx2(x[0], x[4], x[8], x[12]);
    QuarterRoundAvx2(x[1], x[5], x[9], x[13]);
    QuarterRoundAvx2(x[2], x[6], x[10], x[14]);
    QuarterRoundAvx2(x[3], x[7], x[11], x[15]);
    QuarterRoundAvx2(x[0], x[5], x[10], x[15]);
    QuarterRoundAvx2(x[1], x[6], x[11], x[12]);
    QuarterRoundAvx2(x[2], x[7], x[8], x[13]);
    QuarterRoundAvx2(x[3], x[4], x[9], x[14]);
  }
  for (size_t i = 0; i < 16; ++i) {
    alignas(32) uint32_t lanes[kChaChaBlocksAtOnce];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(x[i], initial[i]));
    for (size_t b = 0; b < kChaChaBlocksAtOnce; ++b) blocks[b][i] = lanes[b];
  }
}

}  // namespace holdfast
