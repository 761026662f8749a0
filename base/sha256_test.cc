// SHA-256 against the published answers of FIPS 180-4, HMAC-SHA256 against those of RFC 4231.
#include "base/sha256.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace holdfast {
namespace {

std::string Hmac(std::string_view key, std::string_view message) {
  return Hex(HmacSha256(std::as_bytes(std::span(key)), std::as_bytes(std::span(message))));
}

TEST(Sha256Test, GivesTheAnswersOfFips180HoweverTheMessageIsCut) {
  const std::string_view message = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
  for (const size_t each : {size_t{1}, size_t{17}, message.size()}) {
    Sha256 sha256;
    for (std::string_view left = message; !left.empty();) {
      sha256.Add(std::as_bytes(std::span(left.substr(0, each))));
      left.remove_prefix(std::min(each, left.size()));
    }
    EXPECT_EQ(Hex(sha256.Finish()),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  }
  EXPECT_EQ(Hex(Sha256().Finish()),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

TEST(Sha256Test, GivesTheAnswersOfRfc4231) {
  EXPECT_EQ(Hmac(std::string(20, '\x0b'), "Hi There"),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  EXPECT_EQ(Hmac("Jefe", "what do ya want for nothing?"),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  EXPECT_EQ(Hmac(std::string(20, '\xaa'), std::string(50, '\xdd')),
            "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
  // A key longer than a block of SHA-256.
  EXPECT_EQ(
      Hmac(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First"),
      "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

TEST(Sha256Test, TakesAnEmptyKeyAndMessage) {
  EXPECT_EQ(Hmac("", ""), "b613679a0814d9ec772f95d778c35fc5ff1697c493715653c6c712144292c5ad");
}

TEST(Sha256Test, EveryBitCountsInAComparison) {
  const Sha256Digest digest = HmacSha256({}, {});
  EXPECT_TRUE(EqualInConstantTime(digest, digest));
  for (size_t bit = 0; bit < 8 * kSha256Bytes; ++bit) {
    Sha256Digest other = digest;
    other[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_FALSE(EqualInConstantTime(digest, other)) << bit;
  }
}

}  // namespace
}  // namespace holdfast
