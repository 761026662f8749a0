#include "base/crc32c.h"

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

std::span<const std::byte> Bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// The oracle: the definition, one bit at a time (RFC 3720, appendix B.4).
uint32_t SlowCrc32c(std::span<const std::byte> data) {
  uint32_t crc = ~0u;
  for (const std::byte b : data) {
    crc ^= static_cast<uint32_t>(b);
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82F63B78u : crc >> 1;
  }
  return ~crc;
}

TEST(Crc32c, EqualsThePublishedVectors) {
  EXPECT_EQ(Crc32c({}), 0u);
  EXPECT_EQ(Crc32c(Bytes("123456789")), 0xE3069283u);
  EXPECT_EQ(Crc32c(Bytes(std::string(32, '\0'))), 0x8A9136AAu);    // RFC 3720
  EXPECT_EQ(Crc32c(Bytes(std::string(32, '\xff'))), 0x62A8AB43u);  // RFC 3720
}

TEST(Crc32c, EqualsTheDefinitionAndCombinesAtEverySplit) {
  std::mt19937 random(1);
  std::vector<std::byte> data(600);
  for (std::byte& b : data) b = static_cast<std::byte>(random());
  for (size_t size : {0, 1, 7, 8, 63, 64, 65, 255, 600}) {
    const std::span<const std::byte> all = std::span<const std::byte>(data).first(size);
    const uint32_t whole = SlowCrc32c(all);
    EXPECT_EQ(Crc32c(all), whole) << size;
    for (size_t split = 0; split <= size; ++split) {
      const auto a = all.first(split);
      const auto b = all.subspan(split);
      EXPECT_EQ(ExtendCrc32c(Crc32c(a), b), whole) << size << " at " << split;
      EXPECT_EQ(CombineCrc32c(Crc32c(a), Crc32c(b), b.size()), whole) << size << " at " << split;
    }
  }
}

TEST(Crc32c, CombinesAcrossFourGibibytes) {
  // (A, zeros) where the zeros are never materialised: combine twice 4 GiB + 3 against 8 GiB + 6.
  const uint32_t a = Crc32c(Bytes("head"));
  uint32_t zeros_crc = 0;  // of 2^k zero bytes, by doubling
  zeros_crc = Crc32c(Bytes(std::string(1, '\0')));
  uint64_t zeros_bytes = 1;
  while (zeros_bytes < (uint64_t{1} << 33)) {
    zeros_crc = CombineCrc32c(zeros_crc, zeros_crc, zeros_bytes);
    zeros_bytes *= 2;
    if (zeros_bytes == 1024) {
      EXPECT_EQ(zeros_crc, Crc32c(Bytes(std::string(1024, '\0'))));
    }
  }
  const uint32_t half = CombineCrc32c(a, zeros_crc, zeros_bytes);
  EXPECT_EQ(CombineCrc32c(half, zeros_crc, zeros_bytes),
            CombineCrc32c(a, CombineCrc32c(zeros_crc, zeros_crc, zeros_bytes), 2 * zeros_bytes));
}

}  // namespace
}  // namespace holdfast
