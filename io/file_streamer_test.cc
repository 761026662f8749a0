// Goal: what was appended is in the files, whatever the sizes; the first error is told.
#include "io/file_streamer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

std::span<const std::byte> Bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

class FileStreamerTest : public testing::Test {
 protected:
  std::string Path(size_t number) { return scratch_.path() + "/" + std::to_string(number); }

  TemporaryDirectory scratch_;
  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
};

// Sizes around a block, a buffer and several of them, in pieces of any size.
TEST_F(FileStreamerTest, FilesHaveWhatWasAppended) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  constexpr size_t kBuffer = size_t{4} << 20;
  const std::vector<size_t> sizes = {
      0, 1, 4095, 4096, 4097, kBuffer - 1, kBuffer, kBuffer + 1, 2 * kBuffer, 3 * kBuffer + 5000};
  std::string all(3 * kBuffer + 5000, '\0');
  for (char& byte : all) byte = static_cast<char>(random());
  FileStreamer streamer(*file_system_);
  for (const size_t size : sizes) {
    ASSERT_OK(streamer.Open(Path(size)));
    for (size_t begin = 0; begin < size;) {
      const size_t count = std::min<size_t>(size - begin, 1 + random() % (size / 3 + 1));
      ASSERT_OK(streamer.Append(Bytes(all.substr(begin, count))));
      begin += count;
    }
    ASSERT_OK(streamer.Close());
  }
  ASSERT_OK(streamer.Finish());
  for (const size_t size : sizes) {
    EXPECT_THAT(file_system_->ReadSmallFile(Path(size), all.size()),
                IsOkAndHolds(all.substr(0, size)))
        << size;
  }
}

TEST_F(FileStreamerTest, AFileThatIsThereIsNotTouched) {
  FileStreamer streamer(*file_system_);
  ASSERT_OK(streamer.Open(Path(1)));
  ASSERT_OK(streamer.Append(Bytes("first")));
  ASSERT_OK(streamer.Close());
  EXPECT_THAT(streamer.Open(Path(1)), StatusIs(absl::StatusCode::kAlreadyExists));
  ASSERT_OK(streamer.Finish());
  EXPECT_THAT(file_system_->ReadSmallFile(Path(1), 10), IsOkAndHolds("first"));
}

TEST_F(FileStreamerTest, TheFirstErrorIsToldWithItsFile) {
  // Larger files are refused (EFBIG), and the signal that comes with it is not ours.
  struct rlimit old {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  struct rlimit small = old;
  small.rlim_cur = size_t{1} << 20;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  FileStreamer streamer(*file_system_);
  EXPECT_OK(streamer.Open(Path(1)));
  const std::string bytes(size_t{1} << 20, 'x');
  absl::Status status;
  // Every buffer that is asked for may be the one that tells it; there are only two.
  for (int i = 0; i < 20 && status.ok(); ++i) status = streamer.Append(Bytes(bytes));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr(Path(1))));
  EXPECT_FALSE(streamer.Close().ok());
  EXPECT_EQ(streamer.Finish(), status);
  EXPECT_OK(streamer.Open(Path(2)));
  EXPECT_EQ(streamer.Append(Bytes("x")), status);
  EXPECT_EQ(streamer.Close(), status);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, handler);
}

TEST_F(FileStreamerTest, WhatIsNotClosedIsNoTrouble) {
  FileStreamer streamer(*file_system_);
  ASSERT_OK(streamer.Open(Path(1)));
  ASSERT_OK(streamer.Append(Bytes(std::string(size_t{9} << 20, 'x'))));
}

}  // namespace
}  // namespace holdfast
