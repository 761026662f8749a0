// Goal: what was packed comes back, the same files give the same bytes, tar reads them, and nothing
// else is taken. Method: examples, every byte of a small archive changed, every length cut.
#include "agent/run/incident_archive.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/zstd_codec.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<IncidentFile> Files() {
  return {{"summary.txt", "rank 2 was killed\n"},
          {"incident.json", "{}"},
          {"rank-0.stderr", ""},
          {"rank-1.flight", std::string(512, '\0')},
          {"rank-2.flight", std::string(1000, 'x')}};
}

std::string TarOf(const std::string& archive) {
  ZstdDecompressor decompressor(archive);
  std::string tar(64 << 10, '\0');
  size_t count = 0;
  EXPECT_OK(decompressor.Read(tar, &count));
  tar.resize(count);
  return tar;
}

std::string Compressed(const std::string& bytes) {
  ZstdCompressor compressor;
  std::string out;
  compressor.Compress(bytes, out);
  compressor.Finish(out);
  return out;
}

TEST(IncidentArchiveTest, WhatWasPackedComesBackInTheOrderOfNames) {
  ASSERT_OK_AND_ASSIGN(const std::string archive, PackIncident(Files()));
  ASSERT_OK_AND_ASSIGN(const std::vector<IncidentFile> files, UnpackIncident(archive));
  EXPECT_THAT(files, ElementsAre(Files()[1], Files()[2], Files()[3], Files()[4], Files()[0]));
  std::vector<IncidentFile> reversed = Files();
  std::reverse(reversed.begin(), reversed.end());
  EXPECT_THAT(PackIncident(reversed), IsOkAndHolds(archive));
  ASSERT_OK_AND_ASSIGN(const std::string empty, PackIncident({}));
  EXPECT_THAT(UnpackIncident(empty), IsOkAndHolds(IsEmpty()));
}

TEST(IncidentArchiveTest, TarReadsIt) {
  const TemporaryDirectory place;
  ASSERT_OK_AND_ASSIGN(const std::string archive, PackIncident(Files()));
  std::ofstream(place.Join("i.tar"), std::ios::binary) << TarOf(archive);
  const std::string command = absl::StrCat("tar -C ", place.path(), " -xf ", place.Join("i.tar"));
  ASSERT_EQ(std::system(command.c_str()), 0);
  for (const IncidentFile& file : Files()) {
    std::ifstream read(place.Join(file.name), std::ios::binary);
    EXPECT_EQ(std::string(std::istreambuf_iterator<char>(read), {}), file.contents) << file.name;
  }
}

TEST(IncidentArchiveTest, OnlyPlainNamesOfTheirOwnAreTaken) {
  for (const std::string& name :
       {std::string(), std::string("../x"), std::string("a/b"), std::string(".hidden"),
        std::string(100, 'a'), std::string("a\nb"), std::string("a\0b", 3),
        std::string("\xC3\xA9")}) {
    EXPECT_THAT(PackIncident({{name, ""}}), StatusIs(absl::StatusCode::kInvalidArgument));
  }
  EXPECT_THAT(PackIncident({{"a", "1"}, {"b", ""}, {"a", "2"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"a\"")));
  EXPECT_OK(PackIncident({{std::string(99, 'a'), ""}}).status());
}

TEST(IncidentArchiveTest, EveryChangedByteOfATarIsContentsOrRefused) {
  ASSERT_OK_AND_ASSIGN(const std::string archive, PackIncident({{"a", "xyz"}, {"b", ""}}));
  const std::string tar = TarOf(archive);
  ASSERT_EQ(tar.size(), 5 * 512u);
  for (size_t i = 0; i < tar.size(); ++i) {
    for (const char flip : {'\x01', '\x20', '\x80'}) {
      std::string changed = tar;
      changed[i] = static_cast<char>(changed[i] ^ flip);
      const auto files = ReadIncidentTar(changed);
      const bool is_contents = i >= 512 && i < 515;
      EXPECT_EQ(files.ok(), is_contents) << i;
      EXPECT_TRUE(files.ok() || absl::IsDataLoss(files.status())) << i;
    }
  }
}

TEST(IncidentArchiveTest, EveryCutAndWhatIsAppendedIsRefused) {
  ASSERT_OK_AND_ASSIGN(const std::string archive, PackIncident({{"a", "xyz"}}));
  for (size_t bytes = 0; bytes < archive.size(); ++bytes) {
    EXPECT_THAT(UnpackIncident(archive.substr(0, bytes)), StatusIs(absl::StatusCode::kDataLoss))
        << bytes;
  }
  EXPECT_THAT(UnpackIncident(archive + "x"), StatusIs(absl::StatusCode::kDataLoss));
  const std::string tar = TarOf(archive);
  for (size_t bytes = 0; bytes < tar.size(); ++bytes) {
    EXPECT_THAT(ReadIncidentTar(tar.substr(0, bytes)), StatusIs(absl::StatusCode::kDataLoss))
        << bytes;
  }
  EXPECT_THAT(ReadIncidentTar(tar + std::string(512, '\0')), StatusIs(absl::StatusCode::kDataLoss));
}

// A few kilobytes that would be gigabytes.
TEST(IncidentArchiveTest, ABombIsRefused) {
  ZstdCompressor compressor;
  std::string bomb;
  const std::string zeros(16 << 20, '\0');
  for (int i = 0; i < 17; ++i) compressor.Compress(zeros, bomb);
  compressor.Finish(bomb);
  EXPECT_LT(bomb.size(), 1u << 20);
  EXPECT_THAT(UnpackIncident(bomb), StatusIs(absl::StatusCode::kResourceExhausted));
}

TEST(IncidentArchiveTest, WhatIsNoArchiveIsRefused) {
  EXPECT_THAT(UnpackIncident(""), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(UnpackIncident("no archive"), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(UnpackIncident(Compressed("")), StatusIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(UnpackIncident(Compressed(std::string(512, '\0'))),
              StatusIs(absl::StatusCode::kDataLoss));
}

}  // namespace
}  // namespace holdfast
