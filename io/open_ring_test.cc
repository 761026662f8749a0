// "Where registration or io_uring is denied, the next best serves, and says so." The denials are
// real: a resource limit as an unprivileged user, a seccomp filter; each in a child process,
// because neither can be taken back.
#include "io/open_ring.h"

#include <gmock/gmock.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "io/posix_file_system.h"
#include "io/uring_ring.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::AllOf;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr size_t kMemoryBytes = size_t{8} << 20;
constexpr rlim_t kSmallMemlockBytes = 64 << 10;
constexpr uid_t kNobody = 65534;

// What `report` returns in a child process.
std::string InChild(const std::function<std::string()>& report) {
  int pipe_fds[2];
  CHECK(pipe(pipe_fds) == 0);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    const std::string text = report();
    CHECK(write(pipe_fds[1], text.data(), text.size()) == static_cast<ssize_t>(text.size()));
    _exit(0);
  }
  close(pipe_fds[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n = 1; n > 0;) {
    n = read(pipe_fds[0], buffer, sizeof(buffer));
    if (n > 0) text.append(buffer, static_cast<size_t>(n));
  }
  close(pipe_fds[0]);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0
             ? text
             : absl::StrCat("the child ended with wait status ", status, ": ", text);
}

// From here on `system_call` fails with EPERM in this process, as in a container.
void Deny(long system_call) {
  const auto number = static_cast<uint32_t>(system_call);
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{std::size(program), program};
  CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0);
}

void BecomeUnprivileged() {
  if (getuid() != 0) return;  // it is already
  CHECK(setgroups(0, nullptr) == 0);
  CHECK(setgid(kNobody) == 0);
  CHECK(setuid(kNobody) == 0);
}

void Drain(IoRing& ring) {
  while (ring.in_flight_count() > 0) {
    pollfd waited{ring.event_fd(), POLLIN, 0};
    CHECK(poll(&waited, 1, -1) == 1);
    ring.RunCompletions();
  }
}

// Lives as long as the process, mostly a child.
std::span<std::byte> Map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED);
  return {static_cast<std::byte*>(memory), bytes};
}

// Writes, syncs and reads back 8 MiB, registered if that is granted: "moved" or what went wrong.
std::string Exercise(IoRing& ring, IoFile& file) {
  const std::span<std::byte> source = Map(kMemoryBytes);
  const std::span<std::byte> target = Map(kMemoryBytes);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 7 + i / 4096);
  const std::string registered = ring.RegisterMemory(source) ? "registered" : "unregistered";
  std::string trouble;
  const auto note = [&](const absl::Status& status) {
    if (!status.ok()) trouble = status.ToString();
  };
  ring.Write(file, 0, source, note);
  Drain(ring);
  ring.Sync(file, note);
  Drain(ring);
  ring.Read(file, 0, target, note);
  Drain(ring);
  if (!trouble.empty()) return trouble;
  const bool equal = std::memcmp(source.data(), target.data(), kMemoryBytes) == 0;
  return absl::StrCat(registered, equal ? ", moved; " : ", DIFFERENT; ", ring.Describe());
}

class OpenRingTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
    ASSERT_OK_AND_ASSIGN(
        file_, file_system->CreateSized(directory_.Join("a"), kMemoryBytes, Caching::kDirect));
  }
  // Opens a ring and uses it, here and now.
  std::string OpenAndExercise(const RingOptions& options) {
    const auto ring = OpenRing(options);
    return ring.ok() ? Exercise(**ring, *file_) : ring.status().ToString();
  }

  TemporaryDirectory directory_;
  std::unique_ptr<IoFile> file_;
};

TEST_F(OpenRingTest, GrantedEverythingItIsIoUringWithRegisteredBuffers) {
  // A process that may lock memory; as another user the limit decides, see below.
  EXPECT_THAT(OpenAndExercise({}),
              AllOf(HasSubstr("moved; io_uring, 64 entries, deferred task work"),
                    getuid() == 0 ? HasSubstr("registered, moved") : HasSubstr("registered")));
}

TEST_F(OpenRingTest, ASmallLockLimitOfAnUnprivilegedUserMeansUnregisteredAndIsSaid) {
  const std::string report = InChild([&] {
    const rlimit small{kSmallMemlockBytes, kSmallMemlockBytes};
    CHECK(setrlimit(RLIMIT_MEMLOCK, &small) == 0);
    BecomeUnprivileged();
    return OpenAndExercise({});
  });
  EXPECT_EQ(report,
            "unregistered, moved; io_uring, 64 entries, deferred task work, registration refused "
            "(ENOMEM, RLIMIT_MEMLOCK 65536 bytes)");
}

TEST_F(OpenRingTest, ARegistrationThatFailsHalfWayLeavesNothingLocked) {
  const std::string report = InChild([&]() -> std::string {
    const rlimit small{kSmallMemlockBytes, kSmallMemlockBytes};
    CHECK(setrlimit(RLIMIT_MEMLOCK, &small) == 0);
    BecomeUnprivileged();
    // Of 8 MiB in pieces of 16 KiB the limit takes the first few and no more.
    const auto ring = NewUringRing({.piece_bytes = 16 << 10});
    CHECK_OK(ring.status());
    const std::span<std::byte> memory = Map(kMemoryBytes);
    const std::span<std::byte> first = memory.first(48 << 10);
    const std::span<std::byte> second = memory.subspan(1 << 20, 48 << 10);
    std::string answers;
    const auto answer = [&](bool granted) { answers += granted ? "yes " : "no "; };
    for (int round = 0; round < 3; ++round) {
      answer((*ring)->RegisterMemory(memory));
      answer((*ring)->RegisterMemory(first));   // so nothing of `memory` was still locked
      answer((*ring)->RegisterMemory(second));  // and the limit is what we think
      (*ring)->UnregisterMemory(first);
    }
    return answers;
  });
  EXPECT_EQ(report, "no yes no no yes no no yes no ");
}

TEST_F(OpenRingTest, WhereIoUringIsDeniedThreadsServeAndSayWhy) {
  const std::string report = InChild([&] {
    Deny(SYS_io_uring_setup);
    return OpenAndExercise({});
  });
  EXPECT_THAT(report, AllOf(StartsWith("unregistered, moved; 8 threads ("),
                            HasSubstr("set up io_uring"), EndsWith("(EPERM))")));
}

TEST_F(OpenRingTest, IoUringThatWasAskedForAndIsDeniedIsAnError) {
  const std::string report = InChild([&] {
    Deny(SYS_io_uring_setup);
    return OpenAndExercise({.kind = RingOptions::Kind::kUring});
  });
  EXPECT_THAT(report, AllOf(StartsWith("PERMISSION_DENIED"), HasSubstr("EPERM")));
}

TEST_F(OpenRingTest, WhereIoUringIsThereButNotWhatWeNeedOfItThreadsServe) {
  const std::string report = InChild([&] {
    Deny(SYS_io_uring_register);  // the probe of operations goes through it too
    return OpenAndExercise({});
  });
  EXPECT_THAT(report, AllOf(StartsWith("unregistered, moved; 8 threads ("),
                            HasSubstr("this kernel lacks READ")));
}

TEST_F(OpenRingTest, ThreadsCanBeAskedFor) {
  EXPECT_EQ(OpenAndExercise({.kind = RingOptions::Kind::kThreads, .thread_count = 2}),
            "unregistered, moved; 2 threads (as asked)");
}

}  // namespace
}  // namespace holdfast
