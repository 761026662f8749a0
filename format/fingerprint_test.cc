// The fingerprint against its formula (format/fingerprint_oracle.h), and the properties for which
// it was chosen. The test vectors of docs/FORMAT.md are compared in format_doc_test.cc and, with an
// implementation that shares nothing with this one, in fingerprint_test.py.
#include "format/fingerprint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "format/fingerprint_field.h"
#include "format/fingerprint_oracle.h"

namespace holdfast {
namespace {

using fingerprint_field::kPrime;
using testing::Each;

using Bytes = std::vector<std::byte>;
using Random = std::mt19937_64;

std::vector<Fingerprinter::Kernel> Kernels() {
  std::vector<Fingerprinter::Kernel> kernels = {Fingerprinter::Kernel::kPortable};
  if (Fingerprinter::Supports(Fingerprinter::Kernel::kAvx2)) {
    kernels.push_back(Fingerprinter::Kernel::kAvx2);
  }
  return kernels;
}

// Random, with stretches of zeros and of ones, which are the extremes of every sum.
Bytes RandomBytes(Random& random, size_t count) {
  Bytes bytes(count);
  for (size_t at = 0; at < count;) {
    const size_t end = std::min<size_t>(count, at + 1 + random() % 500);
    const uint64_t kind = random() % 4;
    for (; at < end; ++at) {
      bytes[at] = static_cast<std::byte>(kind == 0 ? 0 : kind == 1 ? 0xFF : random());
    }
  }
  return bytes;
}

Dtype RandomDtype(Random& random) {
  return *DtypeFromNumber(static_cast<uint8_t>(1 + random() % DtypeNames().size()));
}

// 0 to 5 dimensions, at most `elements_max` elements; sizes 0 and 1 are frequent.
TensorState RandomState(Random& random, uint64_t elements_max) {
  TensorState state{"t", "param", RandomDtype(random), {}};
  for (uint64_t dims = random() % 6; dims > 0; --dims) {
    const uint64_t left = elements_max / std::max<uint64_t>(1, state.ElementCount());
    const uint64_t size = random() % 4 == 0 ? 1 : 1 + random() % std::max<uint64_t>(1, left);
    state.shape.push_back(random() % 100 == 0 ? 0 : std::min(size, left));
  }
  std::shuffle(state.shape.begin(), state.shape.end(), random);
  return state;
}

Fingerprint Whole(const TensorState& state, const Bytes& bytes) {
  return FingerprintOfShape(state) + Fingerprinter().OfRun(state, 0, bytes);
}

std::string Show(const TensorState& state) {
  std::string text(DtypeName(state.dtype));
  for (const uint64_t size : state.shape) absl::StrAppend(&text, " ", size);
  return text;
}

TEST(ChaCha20Test, GivesTheKeyStreamOfRfc8439) {
  // Section 2.3.2.
  ChaChaKey key;
  for (uint32_t i = 0; i < 8; ++i) key[i] = 0x03020100 + 0x04040404 * i;
  const ChaChaBlock expected = {0xe4e7f110, 0x15593bd1, 0x1fdd0f50, 0xc47120a3,
                                0xc7f4d1c7, 0x0368c033, 0x9aaa2204, 0x4e6cd4c3,
                                0x466482d2, 0x09aa9f07, 0x05d7c214, 0xa2028bd9,
                                0xd19c12b5, 0xb94e16de, 0xe883d0cb, 0x4e3c50a2};
  EXPECT_EQ(ChaCha20(key, 1, {0x09000000, 0x4a000000, 0}), expected);
}

TEST(ChaCha20Test, EightBlocksAtOnceAreThoseOneByOne) {
  if (!Fingerprinter::Supports(Fingerprinter::Kernel::kAvx2)) GTEST_SKIP() << "no AVX2";
  const ChaChaKey key = {1, 2, 3, 4, 5, 6, 7, 8};
  for (const uint32_t counter : {0u, 8u, 0xFFFFFFF8u, 0xFFFFFFFCu}) {
    std::array<ChaChaBlock, kChaChaBlocksAtOnce> blocks;
    ChaCha20Avx2(key, counter, {7, 8, 9}, blocks);
    for (uint32_t b = 0; b < blocks.size(); ++b) {
      EXPECT_EQ(blocks[b], ChaCha20(key, counter + b, {7, 8, 9})) << counter << " + " << b;
    }
  }
}

TEST(FingerprintFieldTest, MultipliesAtTheEdges) {
  const absl::uint128 p = kPrime;
  using fingerprint_field::Add;
  using fingerprint_field::Multiply;
  using fingerprint_field::Reduce;
  EXPECT_EQ(Reduce(p), 0);
  EXPECT_EQ(Reduce(absl::Uint128Max()), 1);
  EXPECT_EQ(Add(p - 1, p - 1), p - 2);
  EXPECT_EQ(Add(p - 1, 1), 0);
  EXPECT_EQ(Multiply(p - 1, p - 1), 1);
  EXPECT_EQ(Multiply(p - 1, 2), p - 2);
  EXPECT_EQ(Multiply(absl::uint128{1} << 126, 4), 2);
  EXPECT_EQ(Multiply(0, p - 1), 0);
  // (a + b)(a - b) = a a - b b, for many a and b, and against division.
  Random random(1);
  for (int i = 0; i < 10'000; ++i) {
    const absl::uint128 a = Reduce(absl::MakeUint128(random(), random()));
    const absl::uint128 b = Reduce(absl::MakeUint128(random(), random()));
    const absl::uint128 minus_b = b == 0 ? b : p - b;
    const absl::uint128 minus_bb = Multiply(minus_b, b);
    ASSERT_EQ(Multiply(Add(a, b), Add(a, minus_b)), Add(Multiply(a, a), minus_bb));
    const uint64_t c = random();
    ASSERT_EQ(Multiply(c, a >> 64), (absl::uint128{c} * (a >> 64)) % p);
  }
}

TEST(FingerprintTest, BytesAndDigits) {
  const Fingerprint value(absl::MakeUint128(0x0123456789abcdef, 0x00fedcba98765432));
  EXPECT_EQ(value.Hex(), "0123456789abcdef00fedcba98765432");
  EXPECT_EQ(value.Bytes()[0], std::byte{0x32});
  EXPECT_EQ(value.Bytes()[15], std::byte{0x01});
  EXPECT_EQ(Fingerprint::FromBytes(value.Bytes()), value);
  EXPECT_EQ(Fingerprint(kPrime - 1) + Fingerprint(3), Fingerprint(2));
  std::array<std::byte, 16> prime;
  prime.fill(std::byte{0xFF});
  EXPECT_EQ(Fingerprint::FromBytes(prime), std::nullopt);
  prime[15] = std::byte{0x7F};
  EXPECT_EQ(Fingerprint::FromBytes(prime), std::nullopt);
  prime[0] = std::byte{0xFE};
  EXPECT_EQ(Fingerprint::FromBytes(prime), Fingerprint(kPrime - 1));
}

// The proof in docs/FORMAT.md is for random coefficients; of the published ones this much can be
// said for certain: no word is ignored, and no two words of a block are treated alike.
TEST(FingerprintTest, InnerCoefficientsAreNotZeroAndDiffer) {
  const fingerprint_kernel::InnerCoefficients& inner = fingerprint_kernel::Inner();
  std::set<std::array<uint32_t, 4>> seen;
  for (size_t j = 0; j < fingerprint_kernel::kBlockWords; ++j) {
    const std::array<uint32_t, 4> t = {inner.t[0][j], inner.t[1][j], inner.t[2][j], inner.t[3][j]};
    EXPECT_THAT(t, Each(testing::Ne(0u)));
    seen.insert(t);
  }
  EXPECT_EQ(seen.size(), fingerprint_kernel::kBlockWords);
}

TEST(FingerprintTest, IsWhatTheFormulaSays) {
  constexpr uint32_t kSeed = 11;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  Random random(kSeed);
  size_t empty = 0;
  size_t several_groups = 0;
  for (int round = 0; round < 60; ++round) {
    const TensorState state = round == 0 ? TensorState{"t", "param", Dtype::kFloat64, {3, 1500}}
                                         : RandomState(random, 600);
    SCOPED_TRACE(absl::StrCat("round ", round, ": ", Show(state)));
    const Bytes bytes = RandomBytes(random, state.Bytes());
    empty += bytes.empty() ? 1 : 0;
    several_groups += bytes.size() > 32'768 ? 1 : 0;
    const Fingerprint expected = OracleFingerprint(state, bytes);
    for (const Fingerprinter::Kernel kernel : Kernels()) {
      Fingerprinter fingerprinter(kernel);
      EXPECT_EQ(FingerprintOfShape(state) + fingerprinter.OfRun(state, 0, bytes), expected);
    }
  }
  EXPECT_GT(empty, 0u);
  EXPECT_GT(several_groups, 0u);
}

TEST(FingerprintTest, IsDefinedFarBeyondFourBillionElements) {
  Random random(3);
  for (const Dtype dtype :
       {Dtype::kInt8, Dtype::kBfloat16, Dtype::kFloat32, Dtype::kFloat64, Dtype::kComplex128}) {
    const uint64_t elements = kTensorBytesMax / ElementBytes(dtype);
    const TensorState state{"t", "param", dtype, {elements >> 20, uint64_t{1} << 20}};
    const Bytes bytes = RandomBytes(random, 3000 * ElementBytes(dtype));
    std::set<std::string> seen;
    // Around the place where the number of the block leaves 32 bits.
    const uint64_t far = (uint64_t{1} << 44) / ElementBytes(dtype) - 1500;
    for (const uint64_t first : {uint64_t{0}, (uint64_t{1} << 32) + 1, far, elements - 3000}) {
      const Fingerprint expected = OracleSum(dtype, first, bytes);
      EXPECT_TRUE(seen.insert(expected.Hex()).second);
      for (const Fingerprinter::Kernel kernel : Kernels()) {
        EXPECT_EQ(Fingerprinter(kernel).OfRun(state, first * ElementBytes(dtype), bytes), expected)
            << DtypeName(dtype) << " from " << first;
      }
    }
  }
}

// The bytes of [begin, end) of the row-major order of a box of a tensor, found element by element.
Bytes BytesOfPiece(const TensorState& state, const Bytes& whole, BoxView box, uint64_t begin,
                   uint64_t end) {
  const uint64_t s = ElementBytes(state.dtype);
  Bytes bytes;
  for (uint64_t e = begin; e < end; ++e) {
    uint64_t rest = e;
    uint64_t element = 0;
    uint64_t stride = 1;
    for (size_t d = state.shape.size(); d-- > 0;) {
      element += (box.lo[d] + rest % box.size[d]) * stride;
      rest /= box.size[d];
      stride *= state.shape[d];
    }
    bytes.insert(bytes.end(), whole.begin() + static_cast<std::ptrdiff_t>(element * s),
                 whole.begin() + static_cast<std::ptrdiff_t>((element + 1) * s));
  }
  return bytes;
}

struct Cut {
  BoxTable boxes;
  std::vector<Piece> pieces;
};

// Cuts a box into boxes by random planes, and each of these into ranges.
void CutAtRandom(Random& random, std::vector<uint64_t> lo, std::vector<uint64_t> size, int depth,
                 Cut& cut) {
  if (depth > 0 && !size.empty()) {
    const size_t d = random() % size.size();
    const uint64_t at = random() % (size[d] + 1);
    std::vector<uint64_t> first = size;
    first[d] = at;
    CutAtRandom(random, lo, first, depth - 1, cut);
    lo[d] += at;
    size[d] -= at;
    CutAtRandom(random, lo, size, depth - 1, cut);
    return;
  }
  const uint32_t box = cut.boxes.Add(lo, size);
  const uint64_t elements =
      std::accumulate(size.begin(), size.end(), uint64_t{1}, std::multiplies<>());
  for (uint64_t begin = 0; begin < elements;) {
    const uint64_t end = random() % 2 == 0 ? elements : begin + 1 + random() % (elements - begin);
    cut.pieces.push_back({0, box, begin, end});
    begin = end;
  }
}

TEST(FingerprintTest, AnyCutIntoPiecesSumsToTheWhole) {
  constexpr uint32_t kSeed = 21;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  Random random(kSeed);
  size_t pieces = 0;
  for (int round = 0; round < 2000; ++round) {
    const TensorState state = RandomState(random, round % 100 == 0 ? 20'000 : 300);
    SCOPED_TRACE(absl::StrCat("round ", round, ": ", Show(state)));
    const Bytes whole = RandomBytes(random, state.Bytes());
    Cut cut;
    if (random() % 4 == 0) {
      const uint64_t elements = state.ElementCount();
      const uint64_t at = random() % (elements + 1);
      cut.pieces = {{0, kWholeTensor, at, elements}, {0, kWholeTensor, 0, at}};
    } else {
      CutAtRandom(random, std::vector<uint64_t>(state.shape.size(), 0), state.shape,
                  static_cast<int>(random() % 4), cut);
    }
    Fingerprinter fingerprinter(Kernels()[random() % Kernels().size()]);
    Fingerprint sum = FingerprintOfShape(state);
    const std::vector<uint64_t> zeros(state.shape.size(), 0);
    for (const Piece& piece : cut.pieces) {
      const BoxView box =
          piece.box == kWholeTensor ? BoxView{zeros, state.shape} : cut.boxes[piece.box];
      const Bytes bytes = BytesOfPiece(state, whole, box, piece.begin, piece.end);
      // As blocks of an image cut it once more, within an element even.
      const uint64_t skip = random() % (bytes.size() + 1);
      const std::span<const std::byte> span(bytes);
      sum += fingerprinter.OfPiece(state, piece, cut.boxes, 0, span.first(skip));
      sum += fingerprinter.OfPiece(state, piece, cut.boxes, skip, span.subspan(skip));
      ++pieces;
    }
    ASSERT_EQ(sum, Whole(state, whole));
  }
  EXPECT_GT(pieces, 4000u);
}

TEST(FingerprintTest, DoesNotDependOnTheAddress) {
  Random random(4);
  const TensorState state{"t", "param", Dtype::kInt8, {5001}};
  const Bytes bytes = RandomBytes(random, 5001);
  const Fingerprint expected = Whole(state, bytes);
  for (size_t shift = 0; shift < 64; ++shift) {
    Bytes moved(shift + bytes.size());
    std::copy(bytes.begin(), bytes.end(), moved.begin() + static_cast<std::ptrdiff_t>(shift));
    EXPECT_EQ(FingerprintOfShape(state) +
                  Fingerprinter().OfRun(state, 0, std::span(moved).subspan(shift)),
              expected);
  }
}

TEST(FingerprintTest, EveryFlippedBitAndEverySwapOfUnequalElementsChangesIt) {
  constexpr uint32_t kSeed = 31;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  Random random(kSeed);
  size_t swaps = 0;
  for (int round = 0; round < 40; ++round) {
    const TensorState state{"t", "param", RandomDtype(random), {1 + random() % 3000}};
    SCOPED_TRACE(absl::StrCat("round ", round, ": ", Show(state)));
    const uint64_t s = ElementBytes(state.dtype);
    Bytes bytes = RandomBytes(random, state.Bytes());
    const Fingerprint before = Whole(state, bytes);
    std::set<std::string> seen = {before.Hex()};
    for (int flip = 0; flip < 200; ++flip) {
      const size_t bit = random() % (8 * bytes.size());
      const std::byte mask = std::byte{1} << (bit % 8);
      bytes[bit / 8] ^= mask;
      const Fingerprint after = Whole(state, bytes);
      ASSERT_NE(after, before) << "bit " << bit;
      seen.insert(after.Hex());
      bytes[bit / 8] ^= mask;
    }
    if (bytes.size() > 1000) {
      EXPECT_GT(seen.size(), 150u);  // not only different from the first
    }
    for (int swap = 0; swap < 100; ++swap) {
      const auto at = [&](uint64_t element) {
        return bytes.begin() + static_cast<std::ptrdiff_t>(element * s);
      };
      const uint64_t a = random() % state.ElementCount();
      const uint64_t b = random() % state.ElementCount();
      if (std::equal(at(a), at(a + 1), at(b))) continue;
      std::swap_ranges(at(a), at(a + 1), at(b));
      ASSERT_NE(Whole(state, bytes), before) << "elements " << a << " and " << b;
      std::swap_ranges(at(a), at(a + 1), at(b));
      ++swaps;
    }
  }
  EXPECT_GT(swaps, 1000u);
}

// What goes wrong in practice: whole blocks, rows or shards exchanged, shifted, doubled, zeroed.
TEST(FingerprintTest, RearrangedTensorsDiffer) {
  Random random(6);
  const TensorState state{"t", "param", Dtype::kFloat32, {16, 4096}};
  const size_t row = 4 * 4096;
  Bytes bytes = RandomBytes(random, state.Bytes());
  std::set<std::string> seen = {Whole(state, bytes).Hex()};
  size_t made = 1;
  const auto add = [&](const Bytes& changed) {
    ++made;
    seen.insert(Whole(state, changed).Hex());
  };
  for (size_t a = 0; a < 16; ++a) {
    for (size_t b = 0; b < 16; ++b) {
      Bytes changed = bytes;
      const auto from = bytes.begin() + static_cast<std::ptrdiff_t>(a * row);
      const auto to = changed.begin() + static_cast<std::ptrdiff_t>(b * row);
      if (a < b) {
        std::swap_ranges(to, to + row, changed.begin() + static_cast<std::ptrdiff_t>(a * row));
        add(changed);
      } else if (a > b) {
        std::copy(from, from + row, to);
        add(changed);
      } else {
        std::fill(to, to + row, std::byte{0});
        add(changed);
      }
    }
    Bytes rotated = bytes;
    std::rotate(rotated.begin(), rotated.begin() + static_cast<std::ptrdiff_t>(4 * (a + 1)),
                rotated.end());
    add(rotated);
  }
  EXPECT_EQ(seen.size(), made);
}

TEST(FingerprintTest, EqualBytesOfAnotherDtypeOrShapeDiffer) {
  const Bytes zeros(128);
  Random random(9);
  for (const Bytes& bytes : {zeros, RandomBytes(random, 128)}) {
    std::set<std::string> seen;
    size_t made = 0;
    for (uint8_t number = 1; number <= DtypeNames().size(); ++number) {
      const Dtype dtype = *DtypeFromNumber(number);
      const uint64_t n = 128 / ElementBytes(dtype);
      for (const std::vector<uint64_t>& shape : std::vector<std::vector<uint64_t>>{
               {n}, {1, n}, {n, 1}, {2, n / 2}, {n / 2, 2}, {1, 1, n}}) {
        ++made;
        seen.insert(Whole({"t", "param", dtype, shape}, bytes).Hex());
      }
      for (const std::vector<uint64_t>& shape : std::vector<std::vector<uint64_t>>{
               {0}, {0, 0}, {0, 1}, {1, 0}, {0, uint64_t{1} << 32}}) {
        ++made;
        seen.insert(Whole({"t", "param", dtype, shape}, {}).Hex());
      }
    }
    // [2, n / 2] and [n / 2, 2] of n = 4 would be one; there is no such n.
    EXPECT_EQ(seen.size(), made);
  }
}

TEST(FingerprintTest, NamesAreNotInIt) {
  EXPECT_EQ(FingerprintOfShape({"a", "param", Dtype::kInt8, {3}}),
            FingerprintOfShape({"b", "exp_avg", Dtype::kInt8, {3}}));
}

}  // namespace
}  // namespace holdfast
