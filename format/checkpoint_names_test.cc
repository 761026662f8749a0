#include "format/checkpoint_names.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::HasSubstr;

TEST(CheckpointNamesTest, DirectoryNamesReadBackAndSortByStep) {
  EXPECT_EQ(CheckpointDirectoryName({Attempt{4}, Step{1000}}), "s000000001000.a0004");
  EXPECT_EQ(CheckpointDirectoryName({Attempt{0}, Step{0}}), "s000000000000.a0000");
  EXPECT_EQ(CheckpointDirectoryName({Attempt{12345}, Step{1234567890123}}),
            "s1234567890123.a12345");
  for (const uint64_t step : {uint64_t{0}, uint64_t{7}, uint64_t{999'999'999'999},
                              uint64_t{1'000'000'000'000}, std::numeric_limits<uint64_t>::max()}) {
    for (const uint32_t attempt : {0u, 1u, 9999u, 10000u, UINT32_MAX}) {
      const CheckpointId id{Attempt{attempt}, Step{step}};
      EXPECT_EQ(ParseCheckpointDirectoryName(CheckpointDirectoryName(id)), id);
    }
  }
}

TEST(CheckpointNamesTest, OnlyExactDirectoryNamesAreRead) {
  for (const char* name : {"",
                           "s",
                           "s.a",
                           "s000000001000",
                           "s000000001000.",
                           "s000000001000.a",
                           "s000000001000.a004",
                           "s00000001000.a0004",
                           "s0000000001000.a0004",
                           "s000000001000.a00004",
                           "S000000001000.a0004",
                           "s000000001000.A0004",
                           "s000000001000.a0004 ",
                           " s000000001000.a0004",
                           "s00000000100x.a0004",
                           "s-00000001000.a0004",
                           "s+00000001000.a0004",
                           "s000000001000.a0004.partial",
                           "s000000001000.b0004",
                           "s18446744073709551616.a0001",
                           "s000000001000.a4294967296",
                           "s000000001000.a0004/"}) {
    EXPECT_EQ(ParseCheckpointDirectoryName(name), std::nullopt) << name;
  }
}

TEST(CheckpointNamesTest, ImageFileNamesReadBack) {
  EXPECT_EQ(ImageFileName(Rank{0}), "rank-00000.h5");
  EXPECT_EQ(ImageFileName(Rank{3}, 1), "rank-00003.r1.h5");
  for (const uint32_t rank : {0u, 99999u, 100000u, UINT32_MAX}) {
    for (const uint32_t retry : {0u, 1u, 12u, UINT32_MAX}) {
      const std::string name = ImageFileName(Rank{rank}, retry);
      const std::optional<ImageFile> file = ParseImageFileName(name);
      ASSERT_TRUE(file.has_value()) << name;
      EXPECT_EQ(Value(file->rank), rank);
      EXPECT_EQ(file->retry, retry);
      EXPECT_OK(CheckFileName(name));
    }
  }
  for (const char* name :
       {"", "rank-.h5", "rank-0.h5", "rank-000000.h5", "rank-00000.r0.h5", "rank-00000.r01.h5",
        "rank-00000.r.h5", "rank-00000.x1.h5", "rank-00000.h5x", "rank-00000.r1.r2.h5",
        "Rank-00000.h5", "rank-4294967296.h5"}) {
    EXPECT_FALSE(ParseImageFileName(name).has_value()) << name;
  }
}

TEST(CheckpointNamesTest, NumberedNamesBeginAtOne) {
  EXPECT_EQ(BadFileName(1), "BAD.1");
  EXPECT_EQ(HeadFileName(12), "HEAD.12");
  EXPECT_EQ(ParseNumberedName("HEAD", "HEAD.12"), 12u);
  EXPECT_EQ(ParseNumberedName("BAD", "BAD.4294967295"), UINT32_MAX);
  for (const char* name : {"HEAD", "HEAD.", "HEAD.0", "HEAD.01", "HEAD.1x", "HEAD.-1", "BAD.1",
                           "HEAD.4294967296", "HEAD.1.partial"}) {
    EXPECT_EQ(ParseNumberedName("HEAD", name), std::nullopt) << name;
  }
}

TEST(CheckpointNamesTest, JobNamesUuidsAndFilesAreChecked) {
  for (const std::string& job : {std::string("a"), std::string("A-Z_0.9"), std::string(128, 'x')}) {
    EXPECT_OK(CheckJobName(job));
  }
  for (const std::string& job :
       {std::string(), std::string(".a"), std::string("a/b"), std::string("a b"), std::string("ü"),
        std::string("a\0b", 3), std::string(129, 'x')}) {
    EXPECT_THAT(CheckJobName(job), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("job")));
  }
  EXPECT_OK(CheckJobUuid("01234567-89ab-cdef-0123-456789abcdef"));
  for (const char* uuid :
       {"", "01234567-89AB-cdef-0123-456789abcdef", "01234567089ab-cdef-0123-456789abcdef",
        "01234567-89ab-cdef-0123-456789abcde", "01234567-89ab-cdef-0123-456789abcdef0",
        "g1234567-89ab-cdef-0123-456789abcdef"}) {
    EXPECT_THAT(CheckJobUuid(uuid), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(uuid)));
  }
  EXPECT_OK(CheckFileName(std::string(255, 'x')));
  for (const std::string& file : {std::string(), std::string("."), std::string(".."),
                                  std::string(".h"), std::string("a/b"), std::string(256, 'x')}) {
    EXPECT_THAT(CheckFileName(file), StatusIs(absl::StatusCode::kInvalidArgument));
  }
}

}  // namespace
}  // namespace holdfast
