#include "converter/foreign_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class ForeignFolderTest : public testing::Test {
 protected:
  void Write(const std::string& name, const std::string& text) {
    const std::filesystem::path path(directory_.path() + "/ckpt/" + name);
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
  }
  void LinkTo(const std::string& target, const std::string& name) {
    std::filesystem::create_symlink(target, directory_.path() + "/ckpt/" + name);
  }
  std::unique_ptr<ForeignFolder> Open() {
    auto folder = ForeignFolder::Open(*file_system_, directory_.path() + "/ckpt");
    EXPECT_THAT(folder, IsOk());
    return *std::move(folder);
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  const TemporaryDirectory directory_;
};

TEST_F(ForeignFolderTest, ListsByPathAndFindsWhatIsThere) {
  for (const char* name : {"b", "a/y", "a/x", "a.b", "a/d/z"}) Write(name, name);
  const auto folder = Open();
  std::vector<std::string> paths;
  for (const FolderFile& file : folder->files()) paths.push_back(file.path);
  EXPECT_THAT(paths, ElementsAre("a.b", "a/d/z", "a/x", "a/y", "b"));
  EXPECT_THAT(std::vector(folder->directories().begin(), folder->directories().end()),
              ElementsAre("a", "a/d"));
  EXPECT_THAT(folder->FilesIn(""), ElementsAre(0, 4));
  EXPECT_THAT(folder->FilesIn("a"), ElementsAre(2, 3));
  for (uint32_t i = 0; i < paths.size(); ++i) {
    EXPECT_EQ(folder->Find(paths[i]), i);
    EXPECT_THAT(folder->ReadAll(i, 100), IsOkAndHolds(paths[i]));
  }
  EXPECT_EQ(folder->Find("a"), std::nullopt);
  EXPECT_THAT(folder->ReadAll(1, 4),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("a/d/z")));
  std::byte byte;
  EXPECT_THAT(folder->ReadAt(4, 1, {&byte, 1}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("b")));
}

TEST_F(ForeignFolderTest, NoNameLeadsOut) {
  Write("a/shard", "inside");
  Write("../secret", "outside");
  const auto folder = Open();
  EXPECT_THAT(folder->Resolve("", "a/shard", "index"), IsOkAndHolds(0));
  EXPECT_THAT(folder->Resolve("a", "./shard", "index"), IsOkAndHolds(0));
  EXPECT_THAT(folder->Resolve("", "a//shard", "index"), IsOkAndHolds(0));
  for (const std::string& name :
       {std::string("../secret"), std::string("a/../../secret"), std::string("a/../a/shard"),
        directory_.path() + "/secret", std::string("a/shard\0x", 9), std::string(5000, 'x')}) {
    EXPECT_THAT(folder->Resolve("", name, "index"),
                StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("index names the file")));
  }
  EXPECT_THAT(folder->Resolve("", "b", "index"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("\"b\"")));
}

TEST_F(ForeignFolderTest, LinksAreFollowedInsideOnly) {
  Write("real", "inside");
  Write("../secret", "outside");
  Write("../ckpt2/other", "beside");
  LinkTo("real", "to_real");
  LinkTo("../secret", "to_secret");
  LinkTo("../ckpt2/other", "to_other");  // a neighbour whose name begins alike
  LinkTo("nothing", "to_nothing");
  LinkTo("to_itself", "to_itself");
  LinkTo("..", "to_directory");
  const auto folder = Open();
  std::vector<std::string> paths;
  for (const FolderFile& file : folder->files()) paths.push_back(file.path);
  EXPECT_THAT(paths, ElementsAre("real", "to_real"));
  EXPECT_THAT(folder->ReadAll(1, 100), IsOkAndHolds("inside"));
  EXPECT_EQ(folder->refused().size(), 5u);
  EXPECT_THAT(folder->Resolve("", "to_secret", "index"),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("out of the folder")));
  // A link that was good when it was listed and leads outside when it is read.
  const auto late = Open();
  std::filesystem::remove(directory_.path() + "/ckpt/to_real");
  LinkTo("../secret", "to_real");
  EXPECT_THAT(late->ReadAll(1, 100),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("to_real")));
}

TEST_F(ForeignFolderTest, AFileAloneIsTheOnlyOne) {
  Write("one", "1");
  Write("two", "2");
  ASSERT_OK_AND_ASSIGN(const auto folder,
                       ForeignFolder::Open(*file_system_, directory_.path() + "/ckpt/two"));
  EXPECT_TRUE(folder->single_file());
  ASSERT_EQ(folder->files().size(), 1u);
  EXPECT_THAT(folder->ReadHead(0, 10), IsOkAndHolds("2"));
  EXPECT_THAT(ForeignFolder::Open(*file_system_, directory_.path() + "/nothing"),
              StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(ForeignFolderTest, MoreFilesThanMayBeOpenAreRead) {
  for (int i = 0; i < 200; ++i) Write("f" + std::to_string(1000 + i), std::to_string(1000 + i));
  const auto folder = Open();
  for (int round = 0; round < 2; ++round) {
    for (uint32_t i = 0; i < 200; ++i) {
      EXPECT_THAT(folder->ReadAll(i, 10), IsOkAndHolds(std::to_string(1000 + i)));
    }
  }
}

TEST_F(ForeignFolderTest, DirectoriesInOneAnotherHaveALimit) {
  std::string name = "f";
  for (size_t i = 0; i <= kFolderDepthMax; ++i) name = "d/" + name;
  Write(name, "");
  EXPECT_THAT(ForeignFolder::Open(*file_system_, directory_.path() + "/ckpt"),
              StatusIs(absl::StatusCode::kResourceExhausted));
}

}  // namespace
}  // namespace holdfast::converter
