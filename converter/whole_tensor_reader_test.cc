// Random tensors, cut, strided, swapped, negated and compressed at random into a file; read back
// whole, and compared with what they were made of.
#include "converter/whole_tensor_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/zstd_codec.h"
#include "converter/prove.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

using testing::HasSubstr;
using Random = std::mt19937_64;
using Bytes = std::vector<std::byte>;

// Row-major number of the element at `at` in a box of these sizes.
uint64_t NumberOf(const std::vector<uint64_t>& at, const std::vector<uint64_t>& size) {
  uint64_t number = 0;
  for (size_t d = 0; d < size.size(); ++d) number = number * size[d] + at[d];
  return number;
}

bool Next(std::vector<uint64_t>& at, const std::vector<uint64_t>& size) {
  for (size_t d = size.size(); d-- > 0;) {
    if (++at[d] < size[d]) return true;
    at[d] = 0;
  }
  return false;
}

// A checkpoint of one file that is being made.
class Maker {
 public:
  explicit Maker(Random& random) : random_(random) {}

  // Cuts the tensor into a grid of boxes, and stores each in a way of its own.
  void Add(const TensorState& state, const Bytes& whole) {
    const uint32_t number = index.AddState(state);
    std::vector<std::vector<uint64_t>> cuts;  // of every dimension: 0, ..., its size
    for (uint64_t size : state.shape) {
      std::vector<uint64_t> each = {0, size};
      if (size > 1 && random_() % 2 == 0) each.insert(each.begin() + 1, 1 + random_() % (size - 1));
      cuts.push_back(each);
    }
    std::vector<uint64_t> cell(cuts.size(), 0);
    std::vector<uint64_t> cells;
    for (const auto& each : cuts) cells.push_back(each.size() - 1);
    do {
      std::vector<uint64_t> lo;
      std::vector<uint64_t> size;
      for (size_t d = 0; d < cuts.size(); ++d) {
        lo.push_back(cuts[d][cell[d]]);
        size.push_back(cuts[d][cell[d] + 1] - lo.back());
      }
      AddBox(number, whole, lo, size);
      if (random_() % 3 == 0) AddBox(number, whole, lo, size);  // a replica
    } while (Next(cell, cells));
  }

  void Write(const std::string& path) const {
    std::ofstream(path, std::ios::binary).write(file.data(), static_cast<long>(file.size()));
  }

  ForeignIndex index;
  std::string file = "some bytes in front";
  int strided = 0;
  int compressed = 0;
  int swapped = 0;

 private:
  void AddBox(uint32_t number, const Bytes& whole, const std::vector<uint64_t>& lo,
              const std::vector<uint64_t>& size) {
    const TensorState& state = index.tensor_states[number];
    const size_t element_bytes = ElementBytes(state.dtype);
    uint64_t volume = 1;
    for (uint64_t each : size) volume *= each;
    ForeignPiece piece;
    piece.piece = {number, kWholeTensor, 0, volume};
    if (size != state.shape || random_() % 2 == 0) piece.piece.box = index.boxes.Add(lo, size);
    // Strides: dimensions in any order, with gaps.
    std::vector<size_t> order(size.size());
    std::iota(order.begin(), order.end(), 0);
    const bool in_order = random_() % 2 == 0 || size.empty();
    std::vector<uint64_t> strides(size.size(), 1);
    if (!in_order) std::shuffle(order.begin(), order.end(), random_);
    uint64_t stride = in_order ? 1 : 1 + random_() % 3;
    for (size_t i = order.size(); i-- > 0;) {
      strides[order[i]] = stride;
      stride = stride * size[order[i]] + (in_order ? 0 : random_() % 3);
    }
    if (!in_order) {
      ++strided;
      piece.strides = static_cast<uint32_t>(index.strides.size());
      index.strides.push_back(strides);
    }
    piece.byte_order = random_() % 3 == 0 ? ByteOrder::kBig : ByteOrder::kLittle;
    const bool is_complex = state.dtype == Dtype::kComplex64;
    const bool is_real = state.dtype == Dtype::kFloat32 || state.dtype == Dtype::kBfloat16;
    piece.conjugate = is_complex && random_() % 2 == 0;
    piece.negate = (is_complex || is_real) && random_() % 2 == 0;
    swapped += piece.byte_order == ByteOrder::kBig ? 1 : 0;

    uint64_t elements = volume == 0 ? 0 : 1;
    for (size_t d = 0; d < size.size() && volume > 0; ++d) elements += (size[d] - 1) * strides[d];
    std::string stored(elements * element_bytes, '\x5A');
    std::vector<uint64_t> at(size.size(), 0);
    do {
      if (volume == 0) break;
      std::vector<uint64_t> in_tensor = at;
      uint64_t place = 0;
      for (size_t d = 0; d < size.size(); ++d) {
        in_tensor[d] += lo[d];
        place += at[d] * strides[d];
      }
      Bytes element(
          whole.begin() + static_cast<long>(NumberOf(in_tensor, state.shape) * element_bytes),
          whole.begin() +
              static_cast<long>((NumberOf(in_tensor, state.shape) + 1) * element_bytes));
      const size_t number_bytes = is_complex ? element_bytes / 2 : element_bytes;
      for (size_t part = 0; part < element_bytes; part += number_bytes) {
        const bool flips = piece.negate != (piece.conjugate && part > 0);
        if (flips) element[part + number_bytes - 1] ^= std::byte{0x80};
        if (piece.byte_order == ByteOrder::kBig) {
          std::reverse(element.begin() + static_cast<long>(part),
                       element.begin() + static_cast<long>(part + number_bytes));
        }
      }
      for (size_t i = 0; i < element_bytes; ++i) {
        stored[place * element_bytes + i] = static_cast<char>(element[i]);
      }
    } while (Next(at, size));
    Store(piece, stored);
  }

  void Store(ForeignPiece& piece, const std::string& stored) {
    piece.offset_bytes = random_() % 5;
    const std::string decoded = std::string(piece.offset_bytes, 'x') + stored;
    if (random_() % 8 == 0) {
      piece.extent = index.AddInline(decoded);
    } else if (random_() % 4 == 0) {
      ++compressed;
      std::string bytes;
      ZstdCompressor compressor;
      compressor.Compress(decoded, bytes);
      compressor.Finish(bytes);
      index.extents.push_back({0, file.size(), bytes.size(), Codec::kZstd, decoded.size()});
      piece.extent = static_cast<uint32_t>(index.extents.size() - 1);
      file += bytes;
    } else {
      piece.extent = index.AddRaw(0, file.size(), decoded.size());
      file += decoded;
    }
    index.pieces.push_back(piece);
  }

  Random& random_;
};

std::unique_ptr<ForeignFolder> MustOpen(FileSystem& file_system, const std::string& path) {
  auto folder = ForeignFolder::Open(file_system, path);
  EXPECT_THAT(folder, IsOk());
  return *std::move(folder);
}

Bytes RandomBytes(Random& random, size_t count) {
  Bytes bytes(count);
  // Exponents stay small, so that everything is finite.
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() & 0x3F);
  return bytes;
}

TEST(WholeTensorReader, GivesEveryTensorWholeHoweverItIsStored) {
  const uint64_t seed = 20261126;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  const auto file_system = NewPosixFileSystem();
  const TemporaryDirectory directory;
  int strided = 0;
  int compressed = 0;
  int swapped = 0;
  uint64_t replicas = 0;
  for (int round = 0; round < 120; ++round) {
    Random random(seed + static_cast<uint64_t>(round));
    Maker maker(random);
    std::vector<Bytes> truths;
    for (int i = 0; i < 3; ++i) {
      const Dtype dtypes[] = {Dtype::kUint8, Dtype::kBfloat16, Dtype::kFloat32, Dtype::kInt64,
                              Dtype::kComplex64};
      TensorState state{"t" + std::to_string(i), "param", dtypes[random() % 5], {}};
      const size_t dims = random() % 5;
      for (size_t d = 0; d < dims; ++d)
        state.shape.push_back(random() % 20 == 0 ? 0 : 1 + random() % 7);
      truths.push_back(RandomBytes(random, state.Bytes()));
      maker.Add(state, truths.back());
    }
    const std::string path = directory.path() + "/" + std::to_string(round);
    maker.Write(path);
    const auto folder = MustOpen(*file_system, path);
    maker.index.files.assign(folder->files().begin(), folder->files().end());
    maker.index.format = "test";
    ASSERT_THAT(Finish(maker.index), IsOk());
    ASSERT_OK_AND_ASSIGN(const std::string encoded, EncodeForeignIndex(maker.index));
    ASSERT_OK_AND_ASSIGN(ForeignIndex index, DecodeForeignIndex(std::as_bytes(std::span(encoded))));
    ASSERT_OK_AND_ASSIGN(const std::string again, EncodeForeignIndex(index));
    EXPECT_EQ(again, encoded);
    WholeTensorReader reader(*folder, index);
    for (uint32_t i = 0; i < 3; ++i) {
      Bytes found;
      ASSERT_THAT(reader.Read(i,
                              [&](std::span<const std::byte> bytes) {
                                found.insert(found.end(), bytes.begin(), bytes.end());
                                return absl::OkStatus();
                              }),
                  IsOk())
          << "round " << round;
      ASSERT_EQ(found, truths[i]) << "round " << round << " " << Describe(index.tensor_states[i]);
      // Any part of it.
      const uint64_t elements = index.tensor_states[i].ElementCount();
      const uint64_t begin = random() % (elements + 1);
      const uint64_t end = begin + random() % (elements - begin + 1);
      const size_t element_bytes = ElementBytes(index.tensor_states[i].dtype);
      Bytes part((end - begin) * element_bytes);
      ASSERT_THAT(reader.ReadRange(i, begin, end, part), IsOk());
      ASSERT_TRUE(std::equal(part.begin(), part.end(),
                             truths[i].begin() + static_cast<long>(begin * element_bytes)));
    }
    ASSERT_OK_AND_ASSIGN(const ProofReport report, Prove(*folder, index, {}));
    EXPECT_EQ(report.soundness, Soundness::kGood)
        << "round " << round << " " << (report.findings.empty() ? "" : report.findings[0].text);
    replicas += report.replicas_compared;
    strided += maker.strided;
    compressed += maker.compressed;
    swapped += maker.swapped;
  }
  EXPECT_GT(strided, 100);
  EXPECT_GT(compressed, 100);
  EXPECT_GT(swapped, 100);
  EXPECT_GT(replicas, 100u);
}

// Reads in runs, in pieces of rows, and where one read has a gap of more than a span.
TEST(WholeTensorReader, TransposesLargeTensors) {
  const auto file_system = NewPosixFileSystem();
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/file";
  constexpr uint64_t kRows = 700;
  constexpr uint64_t kColumns = 1500;
  std::vector<uint32_t> stored(kRows * kColumns);  // column by column
  for (uint64_t r = 0; r < kRows; ++r) {
    for (uint64_t c = 0; c < kColumns; ++c) {
      stored[c * kRows + r] = static_cast<uint32_t>(r * kColumns + c);
    }
  }
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(stored.data()), static_cast<long>(stored.size() * 4));
  const auto folder = MustOpen(*file_system, path);
  ForeignIndex index;
  index.format = "test";
  index.files.assign(folder->files().begin(), folder->files().end());
  const uint32_t state = index.AddState({"t", "param", Dtype::kUint32, {kRows, kColumns}});
  index.AddWholePiece(state, index.AddRaw(0, 0, stored.size() * 4), 0);
  index.strides.push_back({1, kRows});
  index.pieces[0].strides = 0;
  ASSERT_THAT(Finish(index), IsOk());
  uint32_t next = 0;
  WholeTensorReader reader(*folder, index);
  ASSERT_THAT(reader.Read(state,
                          [&](std::span<const std::byte> bytes) {
                            for (size_t at = 0; at < bytes.size(); at += 4) {
                              uint32_t value = 0;
                              std::memcpy(&value, bytes.data() + at, 4);
                              EXPECT_EQ(value, next);
                              if (value != next++) return absl::InternalError("stop");
                            }
                            return absl::OkStatus();
                          }),
              IsOk());
  EXPECT_EQ(next, kRows * kColumns);
}

struct Two {
  std::unique_ptr<ForeignFolder> folder;
  ForeignIndex index;
};

// A tensor of four float32 in two halves, in a file that `words` fill.
Two Halves(FileSystem& file_system, const std::string& path, const std::vector<uint32_t>& words,
           std::string state = "param") {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(words.data()), static_cast<long>(words.size() * 4));
  Two two;
  two.folder = MustOpen(file_system, path);
  two.index.format = "test";
  two.index.files.assign(two.folder->files().begin(), two.folder->files().end());
  two.index.AddState({"t", std::move(state), Dtype::kFloat32, {4}});
  const uint32_t extent = two.index.AddRaw(0, 0, words.size() * 4);
  for (const uint64_t begin : {0, 2}) {
    ForeignPiece piece;
    piece.piece = {0, kWholeTensor, begin, begin + 2};
    piece.extent = extent;
    piece.offset_bytes = begin * 4;
    two.index.pieces.push_back(piece);
  }
  return two;
}

void Judge(const Two& two, Soundness soundness, ProofFinding::Kind kind, const std::string& text) {
  ASSERT_OK_AND_ASSIGN(const ProofReport report, Prove(*two.folder, two.index, {}));
  EXPECT_EQ(report.soundness, soundness);
  ASSERT_EQ(report.findings.size(), 1u);
  EXPECT_EQ(report.findings[0].kind, kind);
  EXPECT_THAT(report.findings[0].text, HasSubstr(text));
}

TEST(Prove, NamesWhatIsWrong) {
  const auto file_system = NewPosixFileSystem();
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/file";
  {
    Two missing = Halves(*file_system, path, {1, 2, 3, 4});
    missing.index.pieces[1].piece.begin = 3;
    ASSERT_THAT(Finish(missing.index), IsOk());
    Judge(missing, Soundness::kLost, ProofFinding::Kind::kCover, "\"t\"");
  }
  {
    Two overlap = Halves(*file_system, path, {1, 2, 3, 4});
    overlap.index.pieces[1].piece.begin = 1;
    overlap.index.pieces[1].offset_bytes = 4;
    ASSERT_THAT(Finish(overlap.index), IsOk());
    Judge(overlap, Soundness::kLost, ProofFinding::Kind::kCover, "\"t\"");
  }
  {
    Two copies = Halves(*file_system, path, {1, 2, 3, 4, 3, 5});
    copies.index.pieces.push_back(copies.index.pieces[1]);
    copies.index.pieces[2].offset_bytes = 16;
    ASSERT_THAT(Finish(copies.index), IsOk());
    Judge(copies, Soundness::kLost, ProofFinding::Kind::kReplicas, "element 3");
  }
  for (const uint32_t bits : {0x7F800000U, 0xFFC00001U}) {  // infinite, NaN
    Two weights = Halves(*file_system, path, {1, 2, bits, 4});
    ASSERT_THAT(Finish(weights.index), IsOk());
    Judge(weights, Soundness::kLost, ProofFinding::Kind::kNonFinite, "element 2 of [4]");
    Two mask = Halves(*file_system, path, {1, 2, bits, 4}, "buffer");
    ASSERT_THAT(Finish(mask.index), IsOk());
    Judge(mask, Soundness::kGood, ProofFinding::Kind::kUnusual, "element 2 of [4]");
  }
  {
    Two padding = Halves(*file_system, path, {1, 2, 3, 4, 0x7F800000U});
    padding.index.losses = {"the first letter"};
    ASSERT_THAT(Finish(padding.index), IsOk());
    Judge(padding, Soundness::kLost, ProofFinding::Kind::kLost, "the first letter");
    padding.index.losses.clear();
    padding.index.repairs = {"round robin"};
    Judge(padding, Soundness::kRepairable, ProofFinding::Kind::kRepaired, "round robin");
  }
  {
    Two shorter = Halves(*file_system, path, {1, 2, 3, 4});
    ASSERT_THAT(Finish(shorter.index), IsOk());
    std::ofstream(path, std::ios::binary) << "short";
    Judge(shorter, Soundness::kLost, ProofFinding::Kind::kCover, "truncated");
  }
}

TEST(Prove, KnowsEveryFormOfNotFinite) {
  // The greatest finite value of each, and the first that is none.
  const auto first = [](Dtype dtype, std::vector<uint8_t> bytes) {
    return FirstNonFinite(dtype, std::as_bytes(std::span(bytes)));
  };
  EXPECT_EQ(first(Dtype::kFloat16, {0xFF, 0x7B, 0x00, 0x7C}), 1u);
  EXPECT_EQ(first(Dtype::kBfloat16, {0x7F, 0x7F, 0x80, 0xFF}), 1u);
  EXPECT_EQ(first(Dtype::kFloat8E4m3fn, {0x7E, 0xFE, 0xFF}), 2u);
  EXPECT_EQ(first(Dtype::kFloat8E5m2, {0x7B, 0x7C}), 1u);
  EXPECT_EQ(first(Dtype::kFloat8E4m3fnuz, {0x7F, 0xFF, 0x80}), 2u);
  EXPECT_EQ(first(Dtype::kFloat8E8m0fnu, {0xFE, 0xFF}), 1u);
  EXPECT_EQ(first(Dtype::kComplex32, {0, 0, 0, 0, 0, 0, 0, 0x7C}), 1u);
  EXPECT_EQ(first(Dtype::kFloat64, {0, 0, 0, 0, 0, 0, 0xF0, 0x7F}), 0u);
  EXPECT_EQ(first(Dtype::kInt8, {0xFF, 0x7F}), 2u);
}

}  // namespace
}  // namespace holdfast::converter
