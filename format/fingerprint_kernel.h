// The two parts of a fingerprint that cost time: the sums of a block's words with their inner
// coefficients, and the outer coefficients of a block. Each in plain C++ and for AVX2. Inside of
// format/fingerprint*; what the names mean is said in format/fingerprint.h.
#ifndef HOLDFAST_FORMAT_FINGERPRINT_KERNEL_H_
#define HOLDFAST_FORMAT_FINGERPRINT_KERNEL_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/numeric/int128.h"
#include "format/chacha20.h"

namespace holdfast::fingerprint_kernel {

inline constexpr size_t kSumCount = 4;       // inner sums of a block
inline constexpr size_t kBlockWords = 1024;  // words of a block
inline constexpr size_t kOuterGroupBlocks = kChaChaBlocksAtOnce;

// What the coefficients are for: a word of the nonce.
enum class Purpose : uint32_t { kInner = 0, kOuter = 1, kShape = 2 };

// Block `number` of the key stream of a purpose; 128-bit value `i` of it, i < 4, modulo 2^127 - 1.
ChaChaBlock KeyStream(Purpose purpose, uint64_t number);
absl::uint128 FieldElement(const ChaChaBlock& block, size_t i);

// t[k][j]. Behind the last word some that are read and not used.
struct InnerCoefficients {
  alignas(64) std::array<std::array<uint32_t, kBlockWords + 8>, kSumCount> t;
};
const InnerCoefficients& Inner();

// Sums of products w * t[k][j], as integers: below 2^74.
struct InnerSums {
  std::array<absl::uint128, kSumCount> sum = {};

  void AddWord(uint32_t word, size_t j, const InnerCoefficients& inner) {
    for (size_t k = 0; k < kSumCount; ++k) sum[k] += uint64_t{word} * inner.t[k][j];
  }
};

// Adds the words (little-endian, 4 bytes each, at any address) that are number first_word,
// first_word + 1, ... of their block; first_word + word_count <= kBlockWords.
using AddWordsFunction = void (*)(const InnerCoefficients& inner, size_t first_word,
                                  const std::byte* words, size_t word_count, InnerSums& sums);
void AddWordsPortable(const InnerCoefficients& inner, size_t first_word, const std::byte* words,
                      size_t word_count, InnerSums& sums);
void AddWordsAvx2(const InnerCoefficients& inner, size_t first_word, const std::byte* words,
                  size_t word_count, InnerSums& sums);

// u[block % kOuterGroupBlocks][k] of the blocks from group * kOuterGroupBlocks on.
using OuterGroup = std::array<std::array<absl::uint128, kSumCount>, kOuterGroupBlocks>;
using MakeOuterFunction = void (*)(uint64_t group, OuterGroup& u);
void MakeOuterPortable(uint64_t group, OuterGroup& u);
void MakeOuterAvx2(uint64_t group, OuterGroup& u);

}  // namespace holdfast::fingerprint_kernel

#endif  // HOLDFAST_FORMAT_FINGERPRINT_KERNEL_H_
