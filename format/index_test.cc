#include "format/index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"
#include "format/layout.h"
#include "tests/support/allocation_meter.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr char kUuid[] = "01234567-89ab-cdef-0123-456789abcdef";
constexpr uint64_t kBlockBytes = 4096;

// Two ranks; every kind of record, every optional thing present and absent.
Index Example() {
  Index index;
  index.job = "llm.7b";
  index.job_uuid = kUuid;
  index.checkpoint = {Attempt{4}, Step{1000}};
  index.world_size = 2;
  index.layouts = {"{\"holdfast_layout\": 1}"};
  index.images = {
      {"rank-00000.h5", Rank{0}, 0, 3 * kBlockBytes, kBlockBytes, {0x11111111, 2, 0xFFFFFFFF}},
      {"rank-00001.r1.h5", Rank{1}, 0, 2 * kBlockBytes, kBlockBytes, {4, 5}}};
  index.tensor_states = {
      {"a", "exp_avg", Dtype::kFloat32, {6, 10}},
      {"a", "param", Dtype::kBfloat16, {6, 10}},
      {"a/b", "param", Dtype::kFloat64, {}},
      {"empty", "param", Dtype::kInt8, {4, 0}},
      {std::string(300, 'n'), "param", Dtype::kBool, {5}},
      {std::string(300, 'n'), "state", Dtype::kBool, {5}},
  };
  index.facts.resize(6);
  index.facts[0].fingerprint.emplace(absl::MakeUint128(0x25A5A5A5A5A5A5A5, 0x0123456789ABCDEF));
  index.facts[1].non_finite_count = 0;
  index.facts[2].marks = 0x8000000000000001;
  index.facts[4] = index.facts[0];
  index.facts[5].undefined_fingerprint.emplace().fill(std::byte{0xA5});
  const uint64_t lo[] = {2, 5};
  const uint64_t size[] = {3, 5};
  const uint32_t box = index.boxes.Add(lo, size);
  index.pieces = {
      {{0, kWholeTensor, 0, 30}, 0, 8192}, {{0, kWholeTensor, 30, 60}, 1, 4096},
      {{1, box, 0, 15}, 0, 8320},          {{1, box, 4, 9}, 1, 4224},
      {{2, kWholeTensor, 0, 1}, 1, 4288},  {{4, kWholeTensor, 0, 5}, 0, 12283},
      {{5, kWholeTensor, 0, 5}, 0, 12283},  // the same bytes as the one before
  };
  index.blobs = {{BlobScope::kGlobal, Rank{0}, "args", 0, 8400, 100},
                 {BlobScope::kRank, Rank{0}, "rng", 0, 8512, 16},
                 {BlobScope::kRank, Rank{1}, "rng", 1, 8192, 0}};
  return index;
}

// Every field, for comparison.
std::string Show(const Index& index) {
  std::string text = absl::StrFormat("%s %s %d/%d %d\n", index.job, index.job_uuid,
                                     Value(index.checkpoint.attempt), Value(index.checkpoint.step),
                                     index.world_size);
  for (const std::string& layout : index.layouts) absl::StrAppend(&text, "layout ", layout, "\n");
  for (const IndexImage& image : index.images) {
    absl::StrAppendFormat(&text, "image %s %d %d %d/%d", image.file, Value(image.rank),
                          image.layout, image.bytes, image.block_bytes);
    for (const uint32_t crc : image.block_crc32c) absl::StrAppend(&text, " ", crc);
    text += "\n";
  }
  for (size_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& s = index.tensor_states[i];
    const TensorFacts& facts = index.facts[i];
    absl::StrAppendFormat(&text, "state %s %s %s", s.tensor, s.state, DtypeName(s.dtype));
    for (const uint64_t extent : s.shape) absl::StrAppend(&text, " ", extent);
    if (facts.fingerprint.has_value()) absl::StrAppend(&text, " ", facts.fingerprint->Hex());
    if (facts.undefined_fingerprint.has_value()) {
      text += " undefined";
      for (const std::byte b : *facts.undefined_fingerprint) {
        absl::StrAppend(&text, " ", std::to_integer<int>(b));
      }
    }
    absl::StrAppend(&text, " nf ", facts.non_finite_count.value_or(77), " marks ",
                    facts.marks.value_or(77), "\n");
  }
  for (uint32_t i = 0; i < index.boxes.size(); ++i) {
    for (const uint64_t lo : index.boxes[i].lo) absl::StrAppend(&text, lo, " ");
    for (const uint64_t size : index.boxes[i].size) absl::StrAppend(&text, size, " ");
    text += "\n";
  }
  for (const IndexPiece& p : index.pieces) {
    absl::StrAppend(&text, p.piece.tensor_state, " ", p.piece.box, " ", p.piece.begin, " ",
                    p.piece.end, " ", p.image, " ", p.offset_bytes, "\n");
  }
  for (const IndexBlob& b : index.blobs) {
    absl::StrAppend(&text, static_cast<int>(b.scope), " ", Value(b.rank), " ", b.name, " ", b.image,
                    " ", b.offset_bytes, " ", b.bytes, "\n");
  }
  return text;
}

std::vector<std::byte> Encode(const Index& index) {
  absl::StatusOr<std::vector<std::byte>> bytes = EncodeIndex(index);
  EXPECT_OK(bytes.status());
  return *std::move(bytes);
}

void Store(std::vector<std::byte>& bytes, size_t at, uint64_t value, size_t count) {
  for (size_t i = 0; i < count; ++i) bytes[at + i] = static_cast<std::byte>(value >> (8 * i));
}

// Makes the checksum fit again, as somebody would who wants to hurt us.
void Reseal(std::vector<std::byte>& bytes) {
  const uint32_t crc = Crc32c(std::span(bytes).first(bytes.size() - 8));
  Store(bytes, bytes.size() - 8, uint64_t{~crc} << 32 | crc, 8);
}

TEST(IndexTest, ReadsBackWhatWasWritten) {
  ASSERT_OK_AND_ASSIGN(const Index read, DecodeIndex(Encode(Example())));
  EXPECT_EQ(Show(read), Show(Example()));
  EXPECT_EQ(Encode(read), Encode(Example()));
}

TEST(IndexTest, BlobsOfAnotherWorldReadBack) {
  Index index = Example();
  index.blob_world_size = 1000;
  index.blobs[2].rank = Rank{999};
  ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> bytes, EncodeIndex(index));
  ASSERT_OK_AND_ASSIGN(const Index found, DecodeIndex(bytes));
  EXPECT_EQ(found.blob_world_size, 1000u);
  EXPECT_EQ(found.BlobWorldSize(), 1000u);
  EXPECT_EQ(found.blobs, index.blobs);
  EXPECT_EQ(Example().BlobWorldSize(), 2u);
}

TEST(IndexTest, AnIndexWithoutTensorsReadsBack) {
  Index index = Example();
  index.tensor_states.clear();
  index.facts.clear();
  index.pieces.clear();
  index.boxes = BoxTable();
  index.blobs.clear();
  ASSERT_OK_AND_ASSIGN(const Index read, DecodeIndex(Encode(index)));
  EXPECT_EQ(Show(read), Show(index));
}

TEST(IndexTest, EveryTruncationAndEveryFlippedBitIsFound) {
  const std::vector<std::byte> bytes = Encode(Example());
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_THAT(DecodeIndex(std::span(bytes).first(size)).status(),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected")))
        << size;
  }
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    std::vector<std::byte> flipped = bytes;
    flipped[bit / 8] ^= std::byte{1} << bit % 8;
    EXPECT_THAT(
        DecodeIndex(flipped).status(),
        StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr("INDEX: "), HasSubstr("expected"))))
        << bit;
  }
  std::vector<std::byte> longer = bytes;
  longer.resize(bytes.size() + 8);
  EXPECT_THAT(DecodeIndex(longer).status(), StatusIs(absl::StatusCode::kDataLoss));
}

// The CRC32C of bytes that end in their own CRC32C is a constant: the manifest could not tell one
// INDEX from another.
TEST(IndexTest, TheChecksumOfTheWholeFileDependsOnItsContents) {
  Index other = Example();
  other.pieces[0].offset_bytes += 64;
  EXPECT_NE(Crc32c(Encode(other)), Crc32c(Encode(Example())));
}

// Flags, function and value of a fingerprint have one spelling each.
TEST(IndexTest, AFingerprintOfNoKnownFunctionOrValueIsRefused) {
  Index index = Example();
  index.facts.assign(6, {});
  const std::vector<std::byte> without = Encode(index);
  index.facts[0].fingerprint.emplace(1);
  const std::vector<std::byte> with = Encode(index);
  // The flags of tensor state 0, its function, and its fingerprint.
  const auto flags = static_cast<size_t>(
      std::mismatch(without.begin(), without.end() - 8, with.begin()).first - without.begin());
  const size_t value = flags + 3;
  ASSERT_EQ(with[flags + 1], std::byte{1});
  ASSERT_EQ(with[value], std::byte{1});
  const auto error = [](std::vector<std::byte> bytes, size_t at, uint64_t number, size_t count) {
    Store(bytes, at, number, count);
    Reseal(bytes);
    return DecodeIndex(bytes).status();
  };
  const auto refused = [](const char* text) {
    return StatusIs(absl::StatusCode::kDataLoss, HasSubstr(text));
  };
  EXPECT_THAT(error(with, flags + 1, 2, 1), refused("expected 0 or 1, found 2"));
  EXPECT_THAT(error(with, flags + 2, 1, 1), refused("reserved"));
  EXPECT_THAT(error(without, flags + 1, 1, 1), refused("no fingerprint: expected 0, found 1"));
  EXPECT_THAT(error(without, value, 1, 1), refused("expected zeros"));
  std::vector<std::byte> prime = with;
  Store(prime, value, UINT64_MAX, 8);
  EXPECT_THAT(error(prime, value + 8, INT64_MAX, 8), refused("less than 2^127 - 1"));
  EXPECT_OK(error(prime, value + 8, INT64_MAX - 1, 8));
}

// What a decoder may do with bytes of a good checksum: refuse them, or read something that could
// have been written. What it allocates is compared with the promise in
// index.h.
absl::Status DecodeHostile(const std::vector<std::byte>& bytes) {
  const auto decode = [&bytes] {
    const AllocationMeter meter;
    absl::StatusOr<Index> index = DecodeIndex(bytes);
    EXPECT_LE(meter.GrowthPeak(), 20 * bytes.size() + 8192);
    return index;
  };
  const absl::StatusOr<Index> index = decode();
  if (index.ok()) {
    EXPECT_OK(CheckIndex(*index));
    const absl::StatusOr<Index> again = DecodeIndex(Encode(*index));
    EXPECT_OK(again.status());
    EXPECT_TRUE(!again.ok() || Show(*again) == Show(*index));
  } else {
    EXPECT_EQ(index.status().code(), absl::StatusCode::kDataLoss) << index.status();
  }
  return index.status();
}

TEST(IndexTest, EveryFieldWithAHostileValueIsRefusedOrRead) {
  const std::vector<std::byte> good = Encode(Example());
  const uint64_t values[] = {0,
                             1,
                             2,
                             7,
                             8,
                             good.size(),
                             0xFF,
                             0xFFFF,
                             0x7FFFFFFF,
                             0xFFFFFFFF,
                             uint64_t{1} << 32,
                             uint64_t{1} << 60,
                             INT64_MAX,
                             UINT64_MAX,
                             UINT64_MAX - 7};
  size_t refused = 0;
  size_t read = 0;
  for (size_t at = 0; at + 8 < good.size(); at += 4) {
    for (const uint64_t value : values) {
      for (const size_t count : {1, 4, 8}) {
        if (at + count > good.size() - 8) continue;
        std::vector<std::byte> bytes = good;
        Store(bytes, at, value, count);
        if (bytes == good) continue;
        Reseal(bytes);
        (DecodeHostile(bytes).ok() ? read : refused) += 1;
      }
    }
  }
  // E.g. another step, another checksum of a block, another letter of a name.
  EXPECT_GT(read, 100u);
  EXPECT_GT(refused, 10'000u);
}

TEST(IndexTest, EveryFlippedBitUnderAGoodChecksumIsRefusedOrRead) {
  const std::vector<std::byte> good = Encode(Example());
  size_t refused = 0;
  size_t read = 0;
  for (size_t bit = 0; bit < 8 * (good.size() - 8); ++bit) {
    std::vector<std::byte> bytes = good;
    bytes[bit / 8] ^= std::byte{1} << bit % 8;
    Reseal(bytes);
    (DecodeHostile(bytes).ok() ? read : refused) += 1;
  }
  EXPECT_GT(read, 500u);  // most of all: bits of checksums, layout text, names and facts
  EXPECT_GT(refused, 5000u);
}

TEST(IndexTest, RandomRecordsAreRefusedOrRead) {
  constexpr uint32_t kSeed = 99;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  std::mt19937 random(kSeed);
  const std::vector<std::byte> good = Encode(Example());
  size_t refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    // A good frame with random contents, cut and grown at random: the frame is repaired, so that
    // the records are reached.
    std::vector<std::byte> bytes = good;
    for (uint32_t edits = random() % 20; edits > 0; --edits) {
      const size_t at = 64 + random() % (bytes.size() - 72);
      Store(bytes, at, random() % 4 == 0 ? random() : random() % 300, 1);
    }
    if (random() % 3 == 0) bytes.resize(std::max<size_t>(312, random() % 4096 / 8 * 8));
    Store(bytes, 16, bytes.size(), 8);
    Reseal(bytes);
    refused += DecodeHostile(bytes).ok() ? 0 : 1;
  }
  EXPECT_GT(refused, 15'000u);
}

// A small file whose records all name the same long name would grow to many times its size.
TEST(IndexTest, NamesThatAreUsedTooOftenAreRefused) {
  Index index = Example();
  index.blobs.clear();
  for (uint32_t i = 0; i < 2000; ++i) {
    index.blobs.push_back({BlobScope::kRank, Rank{0}, absl::StrFormat("blob %011d", i), 0, 0, 0});
  }
  std::vector<std::byte> bytes = Encode(index);
  ASSERT_OK(DecodeIndex(bytes).status());
  // All names become the same 4 KiB.
  const auto section = [&bytes](size_t i) {
    uint64_t offset = 0;
    for (size_t k = 8; k-- > 0;) {
      offset = offset << 8 | std::to_integer<uint64_t>(bytes[64 + 24 * i + 8 + k]);
    }
    return offset;
  };
  for (size_t i = 0; i < 2000; ++i) Store(bytes, section(9) + 40 * i, 100 << 16 | 4096, 8);
  Reseal(bytes);
  EXPECT_THAT(DecodeHostile(bytes),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("names: expected at most")));
}

TEST(IndexTest, WhatBreaksARuleIsNamedAndNeverWritten) {
  const auto error = [](const std::function<void(Index&)>& change) {
    Index index = Example();
    change(index);
    EXPECT_THAT(EncodeIndex(index).status(), StatusIs(absl::StatusCode::kInvalidArgument));
    return CheckIndex(index);
  };
  const auto wrong = [](const char* a, const char* b) {
    return StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr(a), HasSubstr(b)));
  };
  using I = Index&;
  EXPECT_THAT(error([](I i) { i.job = ".x"; }), wrong("job", ".x"));
  EXPECT_THAT(error([](I i) { i.job_uuid = "x"; }), wrong("uuid", "x"));
  EXPECT_THAT(error([](I i) { i.world_size = 0; }), wrong("world size", "0"));
  EXPECT_THAT(error([](I i) { i.world_size = 3; }), wrong("images", "3"));
  EXPECT_THAT(error([](I i) { i.layouts.push_back(i.layouts[0]); }), wrong("layouts[1]", "equal"));
  EXPECT_THAT(error([](I i) { i.layouts[0] += "\xff"; }), wrong("layouts[0]", "UTF-8"));
  EXPECT_THAT(error([](I i) { i.layouts.clear(); }), wrong("images[0]", "layout"));
  EXPECT_THAT(error([](I i) { i.images[1].rank = Rank{0}; }), wrong("images[1]", "rank 1"));
  EXPECT_THAT(error([](I i) { i.images[1].file = "../x"; }), wrong("images[1]", "../x"));
  EXPECT_THAT(error([](I i) { i.images[1].file = i.images[0].file; }),
              wrong("images[1]", "another"));
  EXPECT_THAT(error([](I i) { i.images[0].block_bytes = 100; }), wrong("images[0]", "100"));
  EXPECT_THAT(error([](I i) { i.images[0].bytes += 1; }), wrong("images[0]", "12289"));
  EXPECT_THAT(error([](I i) { i.images[0].block_crc32c.pop_back(); }),
              wrong("images[0]", "2 blocks"));
  EXPECT_THAT(error([](I i) { i.facts.pop_back(); }), wrong("facts", "5"));
  EXPECT_THAT(error([](I i) { i.facts[0].undefined_fingerprint.emplace(); }),
              wrong("facts[0]", "one fingerprint"));
  EXPECT_THAT(error([](I i) { i.tensor_states[0].tensor = ""; }),
              wrong("tensor_states[0]", "tensor"));
  EXPECT_THAT(error([](I i) { std::swap(i.tensor_states[0], i.tensor_states[1]); }),
              wrong("tensor_states[1]", "greater"));
  EXPECT_THAT(error([](I i) { i.tensor_states[1] = i.tensor_states[0]; }),
              wrong("tensor_states[1]", "greater"));
  EXPECT_THAT(error([](I i) { i.pieces[6].piece.tensor_state = 6; }), wrong("pieces[6]", "6"));
  EXPECT_THAT(error([](I i) { i.pieces[1].piece.end = 61; }), wrong("pieces[1]", "61"));
  EXPECT_THAT(error([](I i) { i.pieces[2].piece.box = 1; }), wrong("pieces[2]", "1"));
  EXPECT_THAT(error([](I i) { i.pieces[6].image = 2; }), wrong("pieces[6]", "2"));
  EXPECT_THAT(error([](I i) { i.pieces[6].offset_bytes = 12284; }), wrong("pieces[6]", "12284"));
  EXPECT_THAT(error([](I i) { i.pieces[6].offset_bytes = UINT64_MAX; }),
              wrong("pieces[6]", "12288"));
  EXPECT_THAT(error([](I i) { std::swap(i.pieces[0], i.pieces[1]); }), wrong("pieces[1]", "order"));
  EXPECT_THAT(error([](I i) { i.blobs[0].name = ""; }), wrong("blobs[0]", "blob"));
  EXPECT_THAT(error([](I i) { i.blobs[0].image = 9; }), wrong("blobs[0]", "9"));
  EXPECT_THAT(error([](I i) { i.blobs[0].bytes = 3889; }), wrong("blobs[0]", "3889"));
  EXPECT_THAT(error([](I i) { i.blobs[2].rank = Rank{2}; }), wrong("blobs[2]", "rank"));
  EXPECT_THAT(error([](I i) { i.blob_world_size = 2; }), wrong("world size of the blobs", "2"));
  EXPECT_THAT(error([](I i) { i.blob_world_size = kWorldSizeMax + 1; }),
              wrong("world size of the blobs", "1048577"));
  EXPECT_THAT(error([](I i) { i.blob_world_size = 1; }), wrong("blobs[2]", "less than 1"));
  EXPECT_THAT(error([](I i) { std::swap(i.blobs[1], i.blobs[2]); }), wrong("blobs[2]", "greater"));
  EXPECT_THAT(error([](I i) { i.blobs[1].scope = BlobScope{2}; }), wrong("blobs[1]", "scope"));
}

TEST(IndexTest, SortIndexOrdersWhatComesInAnyOrder) {
  constexpr uint32_t kSeed = 5;
  std::mt19937 random(kSeed);
  for (int round = 0; round < 100; ++round) {
    Index index = Example();
    std::vector<uint32_t> order = {0, 1, 2, 3, 4, 5};
    std::shuffle(order.begin(), order.end(), random);
    Index mixed = Example();
    for (uint32_t i = 0; i < 6; ++i) {
      mixed.tensor_states[order[i]] = index.tensor_states[i];
      mixed.facts[order[i]] = index.facts[i];
    }
    for (IndexPiece& piece : mixed.pieces) {
      piece.piece.tensor_state = order[piece.piece.tensor_state];
    }
    std::shuffle(mixed.pieces.begin(), mixed.pieces.end(), random);
    std::shuffle(mixed.blobs.begin(), mixed.blobs.end(), random);
    SortIndex(mixed);
    EXPECT_EQ(Show(mixed), Show(index)) << "round " << round << ", seed " << kSeed;
  }
}

TEST(IndexTest, FindsTensorStatesAndTheirPieces) {
  const Index index = Example();
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& s = index.tensor_states[i];
    EXPECT_EQ(index.FindTensorState(s.tensor, s.state), i);
    EXPECT_EQ(index.FindTensorState(s.tensor, s.state + "x"), std::nullopt);
    const auto [first, last] = index.PiecesOf(i);
    for (size_t k = 0; k < index.pieces.size(); ++k) {
      EXPECT_EQ(index.pieces[k].piece.tensor_state == i, first <= k && k < last);
    }
  }
}

TEST(IndexTest, AManifestOfAnotherCheckpointIsNamed) {
  const Index index = Example();
  const std::vector<std::byte> bytes = Encode(index);
  Manifest good;
  good.job = index.job;
  good.job_uuid = index.job_uuid;
  good.checkpoint = index.checkpoint;
  good.world_size = 2;
  good.index_bytes = bytes.size();
  good.index_crc32c = Crc32c(bytes);
  for (const IndexImage& image : index.images) {
    good.images.push_back({image.file, image.bytes, ChecksumRoot(image.block_crc32c)});
  }
  EXPECT_OK(CheckConsistent(good, index));
  EXPECT_OK(CheckIndexBytes(good, bytes));

  const auto error = [&](const std::function<void(Manifest&)>& change) {
    Manifest manifest = good;
    change(manifest);
    const absl::Status of_bytes = CheckIndexBytes(manifest, bytes);
    return of_bytes.ok() ? CheckConsistent(manifest, index) : of_bytes;
  };
  const auto differs = [](const char* a, const char* b, const char* c) {
    return StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr(a), HasSubstr(b), HasSubstr(c)));
  };
  using M = Manifest&;
  EXPECT_THAT(error([](M m) { m.job = "other"; }), differs("job", "other", "llm.7b"));
  EXPECT_THAT(error([](M m) { m.job_uuid[0] = 'f'; }), differs("uuid", "f123", "0123"));
  EXPECT_THAT(error([](M m) { m.checkpoint.step = Step{9}; }), differs("step 9", "step 1000", ""));
  EXPECT_THAT(error([](M m) { m.checkpoint.attempt = Attempt{3}; }),
              differs("attempt 3", "attempt 4", ""));
  EXPECT_THAT(error([](M m) { m.world_size = 3; }), differs("world size", "3", "2"));
  EXPECT_THAT(error([](M m) { m.images.pop_back(); }), differs("images", "1", "2"));
  EXPECT_THAT(error([](M m) { m.images[1].file = "rank-00001.h5"; }),
              differs("image of rank 1", "rank-00001.h5", "rank-00001.r1.h5"));
  EXPECT_THAT(error([](M m) { m.images[1].bytes = 1; }), differs("rank 1", "1", "8192"));
  EXPECT_THAT(error([](M m) { m.images[0].checksum_root ^= 1; }), differs("rank 0", "root", ""));
  EXPECT_THAT(error([](M m) { m.index_bytes += 1; }), differs("INDEX", "bytes", ""));
  EXPECT_THAT(error([](M m) { m.index_crc32c ^= 1; }), differs("INDEX", "CRC32C", ""));
}

// DESIGN's sizes: times are printed, not judged.
TEST(IndexTest, AMillionPiecesReadBack) {
  Index index = Example();
  index.tensor_states.clear();
  index.facts.clear();
  index.boxes = BoxTable();
  index.pieces.clear();
  index.world_size = 8;
  index.images.clear();
  for (uint32_t rank = 0; rank < 8; ++rank) {
    index.images.push_back({ImageFileName(Rank{rank}), Rank{rank}, 0, uint64_t{1} << 30,
                            kBlockBytes, std::vector<uint32_t>(1 << 18, rank)});
  }
  for (uint32_t i = 0; i < 125'000; ++i) {
    index.tensor_states.push_back(
        {absl::StrFormat("model.layers.%06d.weight", i), "param", Dtype::kFloat32, {64, 32}});
    for (uint32_t rank = 0; rank < 8; ++rank) {
      index.pieces.push_back(
          {{i, kWholeTensor, 256 * rank, 256 * (rank + 1)}, rank, uint64_t{1024} * i});
    }
  }
  index.facts.resize(index.tensor_states.size());
  const auto t0 = std::chrono::steady_clock::now();
  const std::vector<std::byte> bytes = Encode(index);
  const auto t1 = std::chrono::steady_clock::now();
  ASSERT_OK_AND_ASSIGN(const Index read, DecodeIndex(bytes));
  const auto t2 = std::chrono::steady_clock::now();
  EXPECT_EQ(read.pieces.size(), 1'000'000u);
  EXPECT_EQ(read.PiecesOf(77).first, 77u * 8);
  const auto ms = [](auto a, auto b) {
    return std::chrono::duration<double, std::milli>(b - a).count();
  };
  std::printf("INDEX of 1,000,000 pieces: %.1f MB, encoded in %.0f ms, decoded in %.0f ms\n",
              static_cast<double>(bytes.size()) / 1e6, ms(t0, t1), ms(t1, t2));
}

}  // namespace
}  // namespace holdfast
