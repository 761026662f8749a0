// The real sandbox of this system. What the kernel does not grant here is said, and its tests are
// skipped.
#include "converter/sandbox.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ResultOf;

bool Lacks(const SandboxReport& report, const std::string& layer) {
  return std::find(report.missing.begin(), report.missing.end(), layer) != report.missing.end();
}

class SandboxTest : public testing::Test {
 protected:
  absl::StatusOr<std::string> Run(const std::function<absl::StatusOr<std::string>()>& work,
                                  const SandboxLimits& limits = {}) {
    return RunSandboxed(directory_.path() + "/in", limits, work, &report_);
  }
  void SetUp() override {
    std::filesystem::create_directory(directory_.path() + "/in");
    std::ofstream(directory_.path() + "/in/file") << "inside";
    std::ofstream(directory_.path() + "/secret") << "outside";
  }
  std::string ReadFile(const std::string& name, int flags = O_RDONLY) const {
    const int fd = open((directory_.path() + name).c_str(), flags, 0600);
    if (fd < 0) return std::strerror(errno);
    char text[100] = {};
    const ssize_t count = read(fd, text, sizeof(text));
    close(fd);
    return std::string(text, count < 0 ? 0 : static_cast<size_t>(count));
  }

  const TemporaryDirectory directory_;
  SandboxReport report_;
};

TEST_F(SandboxTest, GivesBackTheResultAndTheError) {
  EXPECT_THAT(Run([] { return std::string("a\0b", 3); }), IsOkAndHolds(std::string("a\0b", 3)));
  EXPECT_THAT(Run([] { return std::string(10 << 20, 'x'); }),
              IsOkAndHolds(std::string(10 << 20, 'x')));
  EXPECT_THAT(
      Run([]() -> absl::StatusOr<std::string> { return absl::PermissionDeniedError("os.system"); }),
      StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("os.system")));
  EXPECT_THAT(Run([] { return std::string(100, 'x'); }, {.result_bytes = 99}),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("99")));
  EXPECT_THAT(Run([this] { return ReadFile("/in/file"); }), IsOkAndHolds("inside"));
}

TEST_F(SandboxTest, TooLittleMemoryIsSaidAndAnExceptionEndsTheChildAlone) {
  EXPECT_THAT(
      Run([]() -> absl::StatusOr<std::string> { throw std::bad_alloc(); },
          {.memory_bytes = 64 << 20}),
      AllOf(StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("67108864 bytes of memory")),
            ResultOf([](const auto& result) { return IsOutOfMemory(result.status()); }, true)));
  // Another limit is not that of memory.
  EXPECT_THAT(
      Run([]() -> absl::StatusOr<std::string> {
        return absl::ResourceExhaustedError("too many groups");
      }),
      AllOf(StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("groups")),
            ResultOf([](const auto& result) { return IsOutOfMemory(result.status()); }, false)));
  const pid_t parent = getpid();
  EXPECT_THAT(Run([]() -> absl::StatusOr<std::string> {
                signal(SIGABRT, SIG_DFL);
                throw std::out_of_range("of an array");
              }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("ended by signal 6")));
  EXPECT_EQ(getpid(), parent);  // or the child would have gone on with the test
}

TEST_F(SandboxTest, ReadsNothingElse) {
  const auto found = Run([this] { return ReadFile("/secret"); });
  if (Lacks(report_, "Landlock")) GTEST_SKIP() << "no Landlock here";
  EXPECT_THAT(found, IsOkAndHolds("Permission denied"));
}

TEST_F(SandboxTest, WritesNothingAndReachesNobody) {
  const auto found = Run([this] {
    std::string text;
    for (const char* name : {"/in/new", "/in/file"}) {
      text += ReadFile(name, O_WRONLY | O_CREAT) + ";";
      text += ReadFile(name, O_RDWR | O_TRUNC) + ";";
    }
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    text += fd < 0 ? std::strerror(errno) : "a socket";
    text += fork() < 0 ? std::string(";") + std::strerror(errno) : std::string(";a process");
    text += unlink((directory_.path() + "/in/file").c_str()) == 0 ? ";gone" : ";kept";
    text += kill(getppid(), 0) == 0 ? ";signalled" : ";not signalled";
    return text;
  });
  if (Lacks(report_, "seccomp")) GTEST_SKIP() << "no seccomp here";
  const std::string no = std::strerror(EPERM);
  EXPECT_THAT(found, IsOkAndHolds(no + ";" + no + ";" + no + ";" + no + ";" + no + ";" + no +
                                  ";kept;not signalled"));
  EXPECT_FALSE(std::filesystem::exists(directory_.path() + "/in/new"));
}

TEST_F(SandboxTest, AChildThatDiesIsAnErrorOfTheInput) {
  EXPECT_THAT(Run([]() -> absl::StatusOr<std::string> { _exit(7); }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("ended with 7")));
  EXPECT_THAT(Run([]() -> absl::StatusOr<std::string> {
                signal(SIGABRT, SIG_DFL);
                abort();
              }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("ended by signal 6")));
  // An end without a result.
  EXPECT_THAT(Run([]() -> absl::StatusOr<std::string> { _exit(0); }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("did not seal")));
}

TEST_F(SandboxTest, AnEndlessLoopEnds) {
  const auto found = Run(
      []() -> absl::StatusOr<std::string> {
        std::atomic<uint64_t> count{0};
        while (count.fetch_add(1) != UINT64_MAX) {
        }
        return std::string("an end");
      },
      {.cpu_seconds = 1});
  if (Lacks(report_, "resource limits")) GTEST_SKIP() << "no resource limits here";
  EXPECT_THAT(found, StatusIs(absl::StatusCode::kDataLoss, HasSubstr("ended by signal")));
}

}  // namespace
}  // namespace holdfast::converter
