#include "monitor/testimony.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/crc32c.h"
#include "tests/support/status_matchers.h"

namespace holdfast::monitor {
namespace {

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

Testimony Full() {
  Testimony t;
  t.source = Source::kRas;
  t.claim = Claim::kBehind;
  t.ranks = {Rank{3}, Rank{70'000}};
  t.node = "n1";
  t.communicator = 0xfeed'face'1234'5678;
  t.group = "dp";
  t.operation = 12;
  t.code = -9;
  t.age = absl::Milliseconds(1500);
  t.standing = absl::Hours(50);
  t.normal = absl::Microseconds(7);
  t.certainty = 0.875;
  t.sentence = "rank 3 is behind";
  return t;
}

TEST(TestimonyTest, WhatIsWrittenReadsTheSame) {
  Testimony plain;
  const std::vector<Testimony> batch = {Full(), plain};
  const std::string bytes = EncodeTestimonies(batch);
  const auto read = DecodeTestimonies(Bytes(bytes));
  ASSERT_TRUE(read.ok()) << read.status().ToString();
  EXPECT_EQ(*read, batch);
}

// Whoever keeps the other limits keeps that of the whole.
TEST(TestimonyTest, TheFullestBatchFits) {
  Testimony full = Full();
  full.ranks.assign(kTestimonyRanksMax, Rank{UINT32_MAX});
  full.node = full.group = full.sentence = std::string(kTestimonyTextBytesMax, 'x');
  full.communicator = full.operation = UINT64_MAX;
  full.code = INT32_MIN;
  full.age = full.standing = absl::Hours(24 * 366);
  full.normal = full.age;
  const std::vector<Testimony> batch(kTestimoniesMax, full);
  const std::string bytes = EncodeTestimonies(batch);
  EXPECT_LE(bytes.size(), kTestimonyBytesMax);
  const auto read = DecodeTestimonies(Bytes(bytes));
  ASSERT_TRUE(read.ok()) << read.status().ToString();
  EXPECT_EQ(*read, batch);
}

TEST(TestimonyTest, AStateKeepsTheLimits) {
  const std::string endless(2 * kTestimonyTextBytesMax, 'x');
  const Testimony said = ToTestimony({Source::kRas, endless, /*heard=*/false, endless});
  EXPECT_EQ(said.claim, Claim::kUnheard);
  const auto read = DecodeTestimonies(Bytes(EncodeTestimonies(std::vector<Testimony>{said})));
  ASSERT_TRUE(read.ok()) << read.status().ToString();
  EXPECT_EQ(read->front(), said);
}

TEST(TestimonyTest, EveryCutAndEveryFlippedBitIsRefused) {
  const std::string bytes = EncodeTestimonies(std::vector<Testimony>{Full()});
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(DecodeTestimonies(Bytes(bytes).first(size)).ok()) << size;
  }
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string changed = bytes;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << bit % 8));
    EXPECT_FALSE(DecodeTestimonies(Bytes(changed)).ok()) << bit;
  }
}

// Behind a checksum that is right, too, every byte may be any.
TEST(TestimonyTest, HostileFieldsAreRefusedOrReadableAgain) {
  const std::string good = EncodeTestimonies(std::vector<Testimony>{Full()});
  std::mt19937 random(5);
  int read_count = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string bytes = good.substr(0, good.size() - 4);
    for (uint32_t i = 0; i <= random() % 3; ++i) {
      bytes[5 + random() % (bytes.size() - 5)] = static_cast<char>(random());
    }
    const uint32_t checksum = Crc32c(Bytes(bytes));
    for (size_t i = 0; i < 4; ++i) bytes += static_cast<char>(checksum >> (8 * i) & 0xFF);
    const auto read = DecodeTestimonies(Bytes(bytes));
    if (!read.ok()) continue;
    ++read_count;
    const auto again = DecodeTestimonies(Bytes(EncodeTestimonies(*read)));
    ASSERT_TRUE(again.ok());
    EXPECT_EQ(*again, *read);
  }
  EXPECT_GT(read_count, 100);  // texts and numbers may be others
}

TEST(TestimonyTest, NamesAreDistinct) {
  std::set<std::string_view> names;
  for (size_t i = 0; i < kSources; ++i) names.insert(Name(static_cast<Source>(i)));
  EXPECT_EQ(names.size(), kSources);
  for (size_t i = 0; i < kClaims; ++i) names.insert(Name(static_cast<Claim>(i)));
  EXPECT_EQ(names.size(), kSources + kClaims);
}

TEST(TestimonyTest, TextsAreCutBetweenCharacters) {
  for (size_t ahead = kTestimonyTextBytesMax - 5; ahead <= kTestimonyTextBytesMax; ++ahead) {
    const std::string cut = CutText(std::string(ahead, 'a') + "\U0001F600\u00e9");
    EXPECT_LE(cut.size(), kTestimonyTextBytesMax);
    EXPECT_GE(cut.size(), kTestimonyTextBytesMax - 4);
    const std::string tail = cut.substr(ahead);
    EXPECT_TRUE(tail.empty() || tail == "\U0001F600" || tail == "\U0001F600\u00e9") << ahead;
  }
  EXPECT_EQ(CutText("short"), "short");
}

}  // namespace
}  // namespace holdfast::monitor
