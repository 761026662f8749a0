#include "io/staged_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using Existing = StagedDirectory::Existing;

std::string Text(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

size_t EntriesIn(const std::string& path) {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path)) ++count;
  return count;
}

TEST(StagedDirectory, AppearsWholeOrNotAtAll) {
  const TemporaryDirectory directory;
  const std::string out = directory.Join("out");
  for (const bool publishes : {false, true}) {
    ASSERT_OK_AND_ASSIGN(const auto staged, StagedDirectory::Create(out, "a", Existing::kRefuse));
    std::ofstream(staged->path() + "/file") << "text";
    EXPECT_FALSE(std::filesystem::exists(out));
    if (publishes) {
      EXPECT_THAT(staged->Publish(), IsOk());
    }
  }
  EXPECT_EQ(Text(out + "/file"), "text");
  EXPECT_EQ(EntriesIn(directory.path()), 1u);
}

TEST(StagedDirectory, WhatIsThereIsReplacedOnlyIfAsked) {
  const TemporaryDirectory directory;
  const std::string out = directory.Join("out") + "/";
  std::filesystem::create_directory(out);
  std::ofstream(out + "old") << "old";
  EXPECT_THAT(StagedDirectory::Create(out, "a", Existing::kRefuse),
              StatusIs(absl::StatusCode::kAlreadyExists));
  {
    ASSERT_OK_AND_ASSIGN(const auto staged, StagedDirectory::Create(out, "a", Existing::kReplace));
    std::ofstream(staged->path() + "/new") << "new";
    EXPECT_EQ(Text(out + "old"), "old");
    EXPECT_THAT(staged->Publish(), IsOk());
  }
  EXPECT_EQ(Text(out + "new"), "new");
  EXPECT_EQ(EntriesIn(out), 1u);
  EXPECT_EQ(EntriesIn(directory.path()), 1u);
  // It appears meanwhile.
  const std::string other = directory.Join("other");
  ASSERT_OK_AND_ASSIGN(const auto late, StagedDirectory::Create(other, "a", Existing::kRefuse));
  std::filesystem::create_directory(other);
  EXPECT_THAT(late->Publish(), StatusIs(absl::StatusCode::kAlreadyExists));
  std::ofstream(directory.Join("file")) << "";
  EXPECT_THAT(StagedDirectory::Create(directory.Join("file"), "a", Existing::kReplace),
              StatusIs(absl::StatusCode::kAlreadyExists));
}

TEST(StagedDirectory, AFileAppearsAndIsReplaced) {
  const TemporaryDirectory directory;
  const std::string out = directory.Join("model.pt");
  for (const std::string text : {"first", "second"}) {
    ASSERT_OK_AND_ASSIGN(
        const auto staged,
        StagedDirectory::Create(out, "a", Existing::kReplace, StagedDirectory::Result::kFile));
    std::ofstream(staged->path() + "/model.pt") << text;
    EXPECT_EQ(std::filesystem::exists(out), text == "second");
    EXPECT_THAT(staged->Publish(), IsOk());
    EXPECT_EQ(Text(out), text);
  }
  EXPECT_EQ(EntriesIn(directory.path()), 1u);
  EXPECT_THAT(StagedDirectory::Create(out, "a", Existing::kRefuse, StagedDirectory::Result::kFile),
              StatusIs(absl::StatusCode::kAlreadyExists));
  // A directory is not replaced by a file, nor a file by a directory.
  EXPECT_THAT(StagedDirectory::Create(out, "a", Existing::kReplace),
              StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(StagedDirectory::Create(directory.path(), "a", Existing::kReplace,
                                      StagedDirectory::Result::kFile),
              StatusIs(absl::StatusCode::kAlreadyExists));
}

}  // namespace
}  // namespace holdfast
