#include "base/inflate.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace holdfast {
namespace {

// Blocks of deflate by the specification, stored (RFC 1951, 3.2.4).
std::string Stored(std::string_view text, bool last) {
  std::string block(1, last ? '\1' : '\0');
  const auto size = static_cast<uint16_t>(text.size());
  for (const uint16_t each : {size, static_cast<uint16_t>(~size)}) {
    block += static_cast<char>(each & 0xFF);
    block += static_cast<char>(each >> 8);
  }
  return block.append(text);
}

// What Python's zlib.compressobj(9, zlib.DEFLATED, -15) makes of "abc" * 1000: codes of its own,
// and matches that overlap what they copy.
constexpr unsigned char kRepeated[] = {0xed, 0xc2, 0x41, 0x11, 0x00, 0x00, 0x0c, 0x02,
                                       0xa0, 0xac, 0x6a, 0xff, 0x0e, 0xab, 0xb1, 0x07,
                                       0x1c, 0xe9, 0xa2, 0xaa, 0xaa, 0xfe, 0x7e};

absl::Status InflateAll(std::string_view bytes, size_t input_bytes, size_t output_bytes,
                        std::string* text, bool* ended) {
  Inflater inflater([&]() -> absl::StatusOr<std::string_view> {
    const std::string_view next = bytes.substr(0, input_bytes);
    bytes.remove_prefix(next.size());
    return next;
  });
  std::string piece(output_bytes, '\0');
  for (size_t count = output_bytes; count == output_bytes;) {
    if (absl::Status status = inflater.Read(piece, &count); !status.ok()) return status;
    text->append(piece, 0, count);
  }
  *ended = inflater.ended();
  return absl::OkStatus();
}

TEST(InflateTest, IsTheTextHoweverItIsCut) {
  constexpr uint32_t kSeed = 3;
  std::mt19937 random(kSeed);
  std::string text;
  std::string bytes;
  for (int i = 0; i < 5; ++i) {
    std::string part(random() % 3000, '\0');
    for (char& c : part) c = static_cast<char>(random());
    bytes += Stored(part, false);
    text += part;
  }
  bytes.append(reinterpret_cast<const char*>(kRepeated), sizeof(kRepeated));
  for (int i = 0; i < 1000; ++i) text += "abc";
  for (const size_t input : {size_t{1}, size_t{7}, bytes.size()}) {
    for (const size_t output : {size_t{1}, size_t{100}, text.size() + 1}) {
      std::string found;
      bool ended = false;
      ASSERT_TRUE(InflateAll(bytes, input, output, &found, &ended).ok()) << "seed " << kSeed;
      EXPECT_EQ(found, text);
      EXPECT_TRUE(ended);
    }
  }
  // Whatever is cut off is missing, and is no end.
  for (size_t cut = 0; cut < bytes.size(); cut += 97) {
    std::string found;
    bool ended = true;
    ASSERT_TRUE(InflateAll(std::string_view(bytes).substr(0, cut), 50, 64, &found, &ended).ok());
    EXPECT_LE(found.size(), text.size());
    EXPECT_FALSE(ended) << cut;
  }
}

TEST(InflateTest, OtherBytesAreRefused) {
  std::string found;
  bool ended = false;
  // Block type 3 is reserved; lengths that do not agree.
  EXPECT_EQ(InflateAll("\x07", 1, 8, &found, &ended).code(), absl::StatusCode::kDataLoss);
  std::string wrong = Stored("text", true);
  wrong[3] ^= 1;
  EXPECT_EQ(InflateAll(wrong, 100, 8, &found, &ended).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace holdfast
