// The contract of FileSystem, the same tests for the real one (on a disk and on a tmpfs) and for
// the simulated disk.
#include "io/file_system.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/check.h"
#include "io/errno_status.h"
#include "io/posix_file_system.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using absl::StatusCode;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

// A file system and an empty directory in it.
class World {
 public:
  virtual ~World() = default;
  virtual FileSystem& file_system() = 0;
  virtual std::string directory() = 0;
};

class PosixWorld final : public World {
 public:
  explicit PosixWorld(const std::string& parent) : directory_(parent) {}
  FileSystem& file_system() override { return *file_system_; }
  std::string directory() override { return directory_.path(); }

 private:
  std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  TemporaryDirectory directory_;
};

class SimWorld final : public World {
 public:
  SimWorld() { CHECK_OK(disk_.CreateDirectory("/test")); }
  FileSystem& file_system() override { return disk_; }
  std::string directory() override { return "/test"; }

 private:
  SimDisk disk_;
};

struct WorldKind {
  const char* name;
  std::unique_ptr<World> (*make)();
};

class FileSystemContract : public testing::TestWithParam<WorldKind> {
 protected:
  std::string Path(const std::string& name) { return directory_ + "/" + name; }
  void Put(const std::string& name, const std::string& text) {
    ASSERT_OK_AND_ASSIGN(const auto file, fs_.CreateNew(Path(name)));
    ASSERT_OK(file->Append(Bytes(text)));
  }

  std::unique_ptr<World> world_ = GetParam().make();
  FileSystem& fs_ = world_->file_system();
  std::string directory_ = world_->directory();
};

INSTANTIATE_TEST_SUITE_P(
    , FileSystemContract,
    testing::Values(WorldKind{"Disk", [] { return std::unique_ptr<World>(new PosixWorld(".")); }},
                    WorldKind{"Tmpfs",
                              [] { return std::unique_ptr<World>(new PosixWorld("/dev/shm")); }},
                    WorldKind{"Simulated", [] { return std::unique_ptr<World>(new SimWorld()); }}),
    [](const testing::TestParamInfo<WorldKind>& kind) { return std::string(kind.param.name); });

TEST_P(FileSystemContract, AppendedBytesAreVisibleInOrder) {
  ASSERT_OK_AND_ASSIGN(const auto file, fs_.CreateNew(Path("a")));
  EXPECT_THAT(fs_.ReadSmallFile(Path("a"), 0), IsOkAndHolds(std::string()));
  ASSERT_OK(file->Append(Bytes("one")));
  ASSERT_OK(file->Append(Bytes("")));
  ASSERT_OK(file->Append(Bytes("two")));
  EXPECT_THAT(fs_.ReadSmallFile(Path("a"), 6), IsOkAndHolds(std::string("onetwo")));
  ASSERT_OK(file->Sync());
  ASSERT_OK(file->Append(Bytes("3")));
  EXPECT_THAT(fs_.ReadSmallFile(Path("a"), 7), IsOkAndHolds(std::string("onetwo3")));
}

TEST_P(FileSystemContract, NothingIsCreatedOverAnExistingName) {
  Put("a", "old");
  ASSERT_OK(fs_.CreateDirectory(Path("d")));
  for (const char* name : {"a", "d"}) {
    const auto exists =
        StatusIs(StatusCode::kAlreadyExists, AllOf(HasSubstr(Path(name)), HasSubstr("EEXIST")));
    EXPECT_THAT(fs_.CreateNew(Path(name)), exists);
    EXPECT_THAT(fs_.CreateSized(Path(name), 4096, Caching::kBuffered), exists);
    EXPECT_THAT(fs_.CreateDirectory(Path(name)), exists);
    EXPECT_THAT(fs_.Link(Path("a"), Path(name)), exists);
  }
  EXPECT_THAT(fs_.ReadSmallFile(Path("a"), 10), IsOkAndHolds(std::string("old")));
}

TEST_P(FileSystemContract, WhatIsNotThereIsNotFound) {
  Put("file", "x");
  for (const char* name : {"absent", "absent/below", "file/below"}) {
    const std::string path = Path(name);
    EXPECT_THAT(fs_.OpenForRead(path, Caching::kBuffered), IsNotFound());
    EXPECT_THAT(fs_.ReadSmallFile(path, 1), IsNotFound());
    EXPECT_THAT(fs_.Link(path, Path("to")), IsNotFound());
    EXPECT_THAT(fs_.Unlink(path), IsNotFound());
    EXPECT_THAT(fs_.SyncDirectory(path), IsNotFound());
    EXPECT_THAT(fs_.List(path, 1), IsNotFound());
    EXPECT_THAT(fs_.Stat(path), StatusIs(StatusCode::kNotFound, HasSubstr(path)));
  }
  EXPECT_THAT(fs_.CreateNew(Path("absent/below")), IsNotFound());
  EXPECT_THAT(fs_.CreateSized(Path("absent/below"), 1, Caching::kBuffered), IsNotFound());
  EXPECT_THAT(fs_.CreateDirectory(Path("absent/below")), IsNotFound());
  EXPECT_THAT(fs_.SyncDirectory(Path("file")), IsNotFound());
}

TEST_P(FileSystemContract, ADirectoryIsNoFile) {
  ASSERT_OK(fs_.CreateDirectory(Path("d")));
  const auto refused = StatusIs(StatusCode::kInvalidArgument);
  EXPECT_THAT(fs_.OpenForRead(Path("d"), Caching::kBuffered), refused);
  EXPECT_THAT(fs_.ReadSmallFile(Path("d"), 1), refused);
  EXPECT_THAT(fs_.Unlink(Path("d")), refused);
}

TEST_P(FileSystemContract, NamesAreAtMost255Bytes) {
  const std::string longest(255, 'n');
  EXPECT_OK(fs_.CreateNew(Path(longest)));
  EXPECT_THAT(fs_.CreateNew(Path(longest + "n")), StatusIs(StatusCode::kInvalidArgument));
}

TEST_P(FileSystemContract, CreateSizedHasItsSizeAndItsSpaceAtOnce) {
  for (const uint64_t size : {uint64_t{0}, uint64_t{1}, uint64_t{4096}, uint64_t{3} << 20}) {
    const std::string path = Path("sized-" + std::to_string(size));
    ASSERT_OK_AND_ASSIGN(const auto file, fs_.CreateSized(path, size, Caching::kBuffered));
    EXPECT_EQ(file->size_bytes(), size);
    ASSERT_OK_AND_ASSIGN(const FileInfo info, fs_.Stat(path));
    EXPECT_EQ(info.kind, FileInfo::Kind::kFile);
    EXPECT_EQ(info.size_bytes, size);
    EXPECT_GE(info.allocated_bytes, size);
  }
}

TEST_P(FileSystemContract, CreateSizedBeyondTheSpaceFailsAndLeavesNoName) {
  ASSERT_OK_AND_ASSIGN(const Space space, fs_.SpaceOf(directory_));
  EXPECT_GE(space.total_bytes, space.available_bytes);
  const uint64_t more = space.total_bytes + (uint64_t{1} << 30);
  EXPECT_THAT(fs_.CreateSized(Path("a"), more, Caching::kBuffered),
              StatusIs(StatusCode::kResourceExhausted));
  EXPECT_THAT(fs_.List(directory_, 10), IsOkAndHolds(IsEmpty()));
}

TEST_P(FileSystemContract, ReadSmallFileNamesBothNumbersOfATooLongOne) {
  Put("a", "12345");
  EXPECT_THAT(fs_.ReadSmallFile(Path("a"), 5), IsOkAndHolds(std::string("12345")));
  EXPECT_THAT(fs_.ReadSmallFile(Path("a"), 4),
              StatusIs(StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("5 bytes"), HasSubstr("at most 4"))));
}

TEST_P(FileSystemContract, ALinkIsAnotherNameOfTheSameFile) {
  ASSERT_OK_AND_ASSIGN(const auto file, fs_.CreateNew(Path("a")));
  ASSERT_OK(fs_.Link(Path("a"), Path("b")));
  ASSERT_OK(file->Append(Bytes("later")));
  ASSERT_OK(fs_.Unlink(Path("a")));
  EXPECT_THAT(fs_.ReadSmallFile(Path("b"), 10), IsOkAndHolds(std::string("later")));
  EXPECT_THAT(fs_.ReadSmallFile(Path("a"), 10), IsNotFound());
}

TEST_P(FileSystemContract, AnUnlinkedFileLivesWhileItIsOpen) {
  ASSERT_OK_AND_ASSIGN(const auto file, fs_.CreateNew(Path("a")));
  ASSERT_OK(fs_.Unlink(Path("a")));
  EXPECT_OK(file->Append(Bytes("x")));
  EXPECT_OK(file->Sync());
  EXPECT_OK(fs_.CreateNew(Path("a")));
}

TEST_P(FileSystemContract, ListIsSortedAndBounded) {
  EXPECT_THAT(fs_.List(directory_, 0), IsOkAndHolds(IsEmpty()));
  for (const char* name : {"c", ".hidden", "a", "B"}) Put(name, "");
  ASSERT_OK(fs_.CreateDirectory(Path("b")));
  EXPECT_THAT(fs_.List(directory_, 5), IsOkAndHolds(ElementsAre(".hidden", "B", "a", "b", "c")));
  EXPECT_THAT(fs_.List(directory_, 4), StatusIs(StatusCode::kResourceExhausted, HasSubstr("4")));
}

TEST_P(FileSystemContract, StatTellsKinds) {
  ASSERT_OK(fs_.CreateDirectory(Path("d")));
  Put("a", "123");
  ASSERT_OK_AND_ASSIGN(const FileInfo directory, fs_.Stat(Path("d")));
  EXPECT_EQ(directory.kind, FileInfo::Kind::kDirectory);
  ASSERT_OK_AND_ASSIGN(const FileInfo file, fs_.Stat(Path("a")));
  EXPECT_EQ(file.kind, FileInfo::Kind::kFile);
  EXPECT_EQ(file.size_bytes, 3u);
}

TEST_P(FileSystemContract, OpenForReadKnowsTheSize) {
  Put("a", "123");
  ASSERT_OK_AND_ASSIGN(const auto file, fs_.OpenForRead(Path("a"), Caching::kBuffered));
  EXPECT_EQ(file->size_bytes(), 3u);
}

TEST_P(FileSystemContract, SyncDirectoryOfADirectory) {
  ASSERT_OK(fs_.CreateDirectory(Path("d")));
  EXPECT_OK(fs_.SyncDirectory(Path("d")));
  EXPECT_OK(fs_.SyncDirectory(directory_));
}

// --- what only the real one can show ---

class PosixFileSystemTest : public testing::Test {
 protected:
  std::string Path(const std::string& name) { return directory_.Join(name); }
  std::unique_ptr<FileSystem> fs_ = NewPosixFileSystem();
  TemporaryDirectory directory_;
};

TEST_F(PosixFileSystemTest, FilesAreOnlyForTheirUser) {
  const mode_t before = umask(0);
  ASSERT_OK(fs_->CreateNew(Path("a")));
  ASSERT_OK(fs_->CreateSized(Path("b"), 1, Caching::kBuffered));
  ASSERT_OK(fs_->CreateDirectory(Path("d")));
  umask(before);
  const auto mode = [&](const char* name) {
    struct stat info {};
    EXPECT_EQ(stat(Path(name).c_str(), &info), 0);
    return info.st_mode & 07777;
  };
  EXPECT_EQ(mode("a"), 0600u);
  EXPECT_EQ(mode("b"), 0600u);
  EXPECT_EQ(mode("d"), 0700u);
}

TEST_F(PosixFileSystemTest, DescriptorsDoNotPassToNewPrograms) {
  ASSERT_OK_AND_ASSIGN(const auto sized, fs_->CreateSized(Path("b"), 1, Caching::kBuffered));
  ASSERT_OK_AND_ASSIGN(const auto opened, fs_->OpenForRead(Path("b"), Caching::kBuffered));
  for (const IoFile* file : {sized.get(), opened.get()}) {
    EXPECT_NE(fcntl(file->handle(), F_GETFD) & FD_CLOEXEC, 0);
    // io_uring would give up on a non-blocking file instead of waiting.
    EXPECT_EQ(fcntl(file->handle(), F_GETFL) & O_NONBLOCK, 0);
  }
}

TEST_F(PosixFileSystemTest, ASymbolicLinkIsNeverFollowed) {
  ASSERT_OK(fs_->CreateNew(Path("target")));
  std::filesystem::create_symlink(Path("target"), Path("link"));
  std::filesystem::create_symlink(Path("nowhere"), Path("dangling"));
  EXPECT_THAT(fs_->OpenForRead(Path("link"), Caching::kBuffered),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("symbolic link")));
  EXPECT_THAT(fs_->ReadSmallFile(Path("link"), 10), StatusIs(StatusCode::kInvalidArgument));
  EXPECT_THAT(fs_->CreateNew(Path("dangling")), StatusIs(StatusCode::kAlreadyExists));
  EXPECT_THAT(fs_->Stat(Path("nowhere")), IsNotFound());
  ASSERT_OK_AND_ASSIGN(const FileInfo info, fs_->Stat(Path("link")));
  EXPECT_EQ(info.kind, FileInfo::Kind::kOther);
}

TEST_F(PosixFileSystemTest, AFifoIsRefusedWithoutWaiting) {
  ASSERT_EQ(mkfifo(Path("fifo").c_str(), 0600), 0);
  EXPECT_THAT(fs_->OpenForRead(Path("fifo"), Caching::kBuffered),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("regular file")));
}

TEST_F(PosixFileSystemTest, AppendPastTheFileSizeLimitIsAnErrorAndFinal) {
  // RLIMIT_FSIZE makes the kernel write a part and then refuse, as a full disk does.
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto former_handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_OK_AND_ASSIGN(const auto file, fs_->CreateNew(Path("a")));
  rlimit small = before;
  small.rlim_cur = 1000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status appended = file->Append(Bytes(std::string(1500, 'x')));
  const absl::Status again = file->Append(Bytes("x"));
  const absl::Status synced = file->Sync();
  const auto sized = fs_->CreateSized(Path("b"), 1001, Caching::kBuffered);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, former_handler);
  EXPECT_THAT(appended, StatusIs(StatusCode::kResourceExhausted, HasSubstr("EFBIG")));
  EXPECT_THAT(again, StatusIs(StatusCode::kFailedPrecondition));
  EXPECT_THAT(synced, StatusIs(StatusCode::kFailedPrecondition));
  EXPECT_THAT(sized, StatusIs(StatusCode::kResourceExhausted, HasSubstr("EFBIG")));
  EXPECT_THAT(fs_->List(directory_.path(), 10), IsOkAndHolds(ElementsAre("a")));
}

TEST_F(PosixFileSystemTest, NoDescriptorsLeftIsResourceExhausted) {
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit none = before;
  none.rlim_cur = 0;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  const auto file = fs_->CreateNew(Path("a"));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_THAT(file, StatusIs(StatusCode::kResourceExhausted, HasSubstr("EMFILE")));
}

TEST_F(PosixFileSystemTest, AFileOfTheKernelIsReadThoughItSaysItHasNoBytes) {
  EXPECT_THAT(fs_->ReadSmallFile("/proc/self/stat", 4096), IsOkAndHolds(HasSubstr(" ")));
  EXPECT_THAT(fs_->ReadSmallFile("/proc/self/stat", 3), StatusIs(StatusCode::kResourceExhausted));
}

TEST(ErrnoStatus, SpaceTroublesHaveTextsOfTheirOwn) {
  EXPECT_THAT(
      ErrnoStatus(ENOSPC, "write", "/a"),
      StatusIs(StatusCode::kResourceExhausted, "write /a: no space left on the device (ENOSPC)"));
  EXPECT_THAT(ErrnoStatus(EDQUOT, "write", "/a"),
              StatusIs(StatusCode::kResourceExhausted, HasSubstr("quota is used up (EDQUOT)")));
  EXPECT_THAT(ErrnoStatus(EROFS, "write", "/a"),
              StatusIs(StatusCode::kPermissionDenied, HasSubstr("read-only (EROFS)")));
  EXPECT_THAT(ErrnoStatus(EIO, "write", "/a"), StatusIs(StatusCode::kDataLoss, HasSubstr("(EIO)")));
  EXPECT_THAT(ErrnoStatus(EBADF, "write", "/a"), StatusIs(StatusCode::kInternal));
  EXPECT_EQ(ErrnoName(9999), "errno 9999");
}

}  // namespace
}  // namespace holdfast
