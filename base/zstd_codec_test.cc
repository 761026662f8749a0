#include "base/zstd_codec.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

namespace holdfast {
namespace {

// All that can be read, in pieces of `piece_bytes`.
absl::Status ReadAll(ZstdDecompressor& decompressor, size_t piece_bytes, std::string* text) {
  std::string piece(piece_bytes, '\0');
  for (size_t count = piece_bytes; count == piece_bytes;) {
    if (absl::Status status = decompressor.Read(piece, &count); !status.ok()) return status;
    text->append(piece, 0, count);
  }
  return absl::OkStatus();
}

TEST(ZstdCodecTest, WhatWasFlushedCanBeReadWhateverComesAfter) {
  constexpr uint32_t kSeed = 7;
  std::mt19937 random(kSeed);
  std::vector<std::string> pieces = {"", "a", std::string(300'000, 'x')};
  for (int i = 0; i < 20; ++i) {
    std::string piece(random() % 5000, '\0');
    for (char& c : piece) c = static_cast<char>(random() % 7);
    pieces.push_back(piece);
  }
  ZstdCompressor compressor;
  std::string bytes;
  std::string text;
  for (const std::string& piece : pieces) {
    compressor.Compress(piece, bytes);
    text += piece;
    for (const size_t piece_bytes : {size_t{1000}, size_t{1} << 20}) {
      ZstdDecompressor decompressor(bytes);
      std::string read;
      ASSERT_TRUE(ReadAll(decompressor, piece_bytes, &read).ok()) << "seed " << kSeed;
      EXPECT_EQ(read, text);
      EXPECT_FALSE(decompressor.ended());
    }
  }
  EXPECT_LT(bytes.size(), text.size() / 2);
  compressor.Finish(bytes);
  ZstdDecompressor decompressor(bytes);
  std::string read;
  ASSERT_TRUE(ReadAll(decompressor, 4096, &read).ok());
  EXPECT_EQ(read, text);
  EXPECT_TRUE(decompressor.ended());
  // Bytes behind the end are not ours.
  bytes += "more";
  ZstdDecompressor longer(bytes);
  std::string again;
  ASSERT_TRUE(ReadAll(longer, 4096, &again).ok());
  EXPECT_FALSE(longer.ended());
}

TEST(ZstdCodecTest, BytesMayComeInPieces) {
  std::string text;
  for (int i = 0; i < 100'000; ++i) text += std::to_string(i % 977);
  ZstdCompressor compressor;
  std::string bytes;
  compressor.Compress(text, bytes);
  compressor.Finish(bytes);
  for (const size_t each : {size_t{1}, size_t{1000}, bytes.size()}) {
    std::string_view left = bytes;
    ZstdDecompressor decompressor([&]() -> absl::StatusOr<std::string_view> {
      const std::string_view next = left.substr(0, each);
      left.remove_prefix(next.size());
      return next;
    });
    std::string read;
    ASSERT_TRUE(ReadAll(decompressor, 4096, &read).ok());
    EXPECT_EQ(read, text);
    EXPECT_TRUE(decompressor.ended());
  }
  ZstdDecompressor broken(
      []() -> absl::StatusOr<std::string_view> { return absl::UnavailableError("no more"); });
  std::string read;
  EXPECT_EQ(ReadAll(broken, 10, &read).code(), absl::StatusCode::kUnavailable);
}

TEST(ZstdCodecTest, OtherBytesAreRefused) {
  std::string read;
  ZstdDecompressor decompressor("these are no bytes of zstd");
  EXPECT_EQ(ReadAll(decompressor, 100, &read).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace holdfast
