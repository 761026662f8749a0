#include "format/fingerprint_kernel.h"

#include <immintrin.h>

#include <cstring>

#include "format/fingerprint_field.h"

namespace holdfast::fingerprint_kernel {
namespace {

// The 32 characters "holdfast fingerprint function 01".
constexpr ChaChaKey kKey = {0x646c6f68, 0x74736166, 0x6e696620, 0x70726567,
                            0x746e6972, 0x6e756620, 0x6f697463, 0x3130206e};

ChaChaNonce NonceOf(Purpose purpose, uint64_t number) {
  return {static_cast<uint32_t>(number >> 32), static_cast<uint32_t>(purpose), 0};
}

InnerCoefficients MakeInner() {
  InnerCoefficients inner = {};
  for (size_t j = 0; j < kBlockWords; ++j) {
    const ChaChaBlock block = KeyStream(Purpose::kInner, j / 4);
    for (size_t k = 0; k < kSumCount; ++k) inner.t[k][j] = block[4 * (j % 4) + k];
  }
  return inner;
}

void ToOuter(const ChaChaBlock& block, std::array<absl::uint128, kSumCount>& u) {
  for (size_t k = 0; k < kSumCount; ++k) u[k] = FieldElement(block, k);
}

// The sum of at most 2^20 products below 2^64, out of their sum modulo 2^64 and that of their upper
// halves: the sum of the lower halves is below 2^52, and is what is left of the former.
struct ModularSums {
  uint64_t all = 0;
  uint64_t high = 0;

  void Add(uint64_t product) {
    all += product;
    high += product >> 32;
  }
  absl::uint128 Sum() const { return (absl::uint128{high} << 32) + (all - (high << 32)); }
};

uint32_t Load32(const std::byte* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

[[gnu::target("avx2"), gnu::always_inline]] inline __m256i Load256(const void* bytes) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
}

// Modulo 2^64.
[[gnu::target("avx2"), gnu::always_inline]] inline uint64_t SumOfLanes(__m256i lanes) {
  alignas(32) uint64_t values[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(values), lanes);
  return values[0] + values[1] + values[2] + values[3];
}

}  // namespace

ChaChaBlock KeyStream(Purpose purpose, uint64_t number) {
  return ChaCha20(kKey, static_cast<uint32_t>(number), NonceOf(purpose, number));
}

absl::uint128 FieldElement(const ChaChaBlock& block, size_t i) {
  const uint64_t low = uint64_t{block[4 * i + 1]} << 32 | block[4 * i];
  const uint64_t high = uint64_t{block[4 * i + 3]} << 32 | block[4 * i + 2];
  return fingerprint_field::Reduce(absl::MakeUint128(high, low));
}

const InnerCoefficients& Inner() {
  static const InnerCoefficients inner = MakeInner();
  return inner;
}

void AddWordsPortable(const InnerCoefficients& inner, size_t first_word, const std::byte* words,
                      size_t word_count, InnerSums& sums) {
  // Two k at a time: their sums stay in registers.
  for (size_t k = 0; k < kSumCount; k += 2) {
    const uint32_t* t0 = &inner.t[k][first_word];
    const uint32_t* t1 = &inner.t[k + 1][first_word];
    ModularSums sum0;
    ModularSums sum1;
    for (size_t i = 0; i < word_count; ++i) {
      const uint64_t word = Load32(words + 4 * i);
      sum0.Add(word * t0[i]);
      sum1.Add(word * t1[i]);
    }
    sums.sum[k] += sum0.Sum();
    sums.sum[k + 1] += sum1.Sum();
  }
}

// Lanes are 64 bits: the even words of eight, then the odd ones. `all` and `high` as in
// ModularSums.
[[gnu::target("avx2")]] void AddWordsAvx2(const InnerCoefficients& inner, size_t first_word,
                                          const std::byte* words, size_t word_count,
                                          InnerSums& sums) {
  __m256i all[kSumCount];
  __m256i high[kSumCount];
#pragma GCC unroll 4
  for (size_t k = 0; k < kSumCount; ++k) all[k] = high[k] = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + 8 <= word_count; i += 8) {
    const __m256i even_words = Load256(words + 4 * i);
    const __m256i odd_words = _mm256_srli_epi64(even_words, 32);
#pragma GCC unroll 4  // so that the sums stay in registers
    for (size_t k = 0; k < kSumCount; ++k) {
      const uint32_t* t = &inner.t[k][first_word + i];
      const __m256i even = _mm256_mul_epu32(even_words, Load256(t));
      const __m256i odd = _mm256_mul_epu32(odd_words, Load256(t + 1));
      all[k] = _mm256_add_epi64(all[k], _mm256_add_epi64(even, odd));
      high[k] = _mm256_add_epi64(
          high[k], _mm256_add_epi64(_mm256_srli_epi64(even, 32), _mm256_srli_epi64(odd, 32)));
    }
  }
#pragma GCC unroll 4
  for (size_t k = 0; k < kSumCount; ++k) {
    sums.sum[k] += ModularSums{SumOfLanes(all[k]), SumOfLanes(high[k])}.Sum();
  }
  for (; i < word_count; ++i) sums.AddWord(Load32(words + 4 * i), first_word + i, inner);
}

void MakeOuterPortable(uint64_t group, OuterGroup& u) {
  for (size_t b = 0; b < kOuterGroupBlocks; ++b) {
    ToOuter(KeyStream(Purpose::kOuter, group * kOuterGroupBlocks + b), u[b]);
  }
}

void MakeOuterAvx2(uint64_t group, OuterGroup& u) {
  const uint64_t first = group * kOuterGroupBlocks;
  std::array<ChaChaBlock, kOuterGroupBlocks> blocks;
  ChaCha20Avx2(kKey, static_cast<uint32_t>(first), NonceOf(Purpose::kOuter, first), blocks);
  for (size_t b = 0; b < kOuterGroupBlocks; ++b) ToOuter(blocks[b], u[b]);
}

}  // namespace holdfast::fingerprint_kernel
