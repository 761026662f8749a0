// The contract of IoRing, the same tests for io_uring (both setups), threads and the simulated
// disk; and what each real one does where something is denied.
#include "io/io_ring.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/check.h"
#include "io/posix_file_system.h"
#include "io/thread_ring.h"
#include "io/uring_ring.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using absl::StatusCode;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr uint64_t kPage = 4096;

// Memory at a multiple of a page.
class Pages {
 public:
  explicit Pages(size_t page_count)
      : bytes_(page_count * kPage),
        memory_(static_cast<std::byte*>(
            mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    CHECK(memory_ != MAP_FAILED);
  }
  ~Pages() { munmap(memory_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  std::span<std::byte> all() const { return {memory_, bytes_}; }
  std::span<std::byte> page(size_t index) const { return all().subspan(index * kPage, kPage); }
  void Fill(std::mt19937_64& random) const {
    for (std::byte& byte : all()) byte = static_cast<std::byte>(random());
  }

 private:
  const size_t bytes_;
  std::byte* const memory_;
};

class World {
 public:
  virtual ~World() = default;
  virtual FileSystem& file_system() = 0;
  virtual IoRing& ring() = 0;
  virtual std::string directory() = 0;
};

class RealWorld final : public World {
 public:
  explicit RealWorld(absl::StatusOr<std::unique_ptr<IoRing>> ring) : ring_(*std::move(ring)) {}
  FileSystem& file_system() override { return *file_system_; }
  IoRing& ring() override { return *ring_; }
  std::string directory() override { return directory_.path(); }

 private:
  std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  TemporaryDirectory directory_;
  std::unique_ptr<IoRing> ring_;
};

class SimWorld final : public World {
 public:
  explicit SimWorld(uint64_t seed) : disk_({.seed = seed}) {
    CHECK_OK(disk_.CreateDirectory("/test"));
  }
  FileSystem& file_system() override { return disk_; }
  IoRing& ring() override { return disk_; }
  std::string directory() override { return "/test"; }

 private:
  SimDisk disk_;
};

struct WorldKind {
  const char* name;
  std::unique_ptr<World> (*make)();
};

const WorldKind kWorlds[] = {
    {"Uring",
     [] { return std::unique_ptr<World>(new RealWorld(NewUringRing({.entry_count = 8}))); }},
    {"UringOf256EntriesAndSmallPieces",
     [] {
       return std::unique_ptr<World>(
           new RealWorld(NewUringRing({.entry_count = 256, .piece_bytes = 3 * kPage})));
     }},
    {"UringPlain",
     [] {
       return std::unique_ptr<World>(
           new RealWorld(NewUringRing({.entry_count = 8, .defer_task_run = false})));
     }},
    {"UringOfOneEntry",
     [] { return std::unique_ptr<World>(new RealWorld(NewUringRing({.entry_count = 1}))); }},
    {"Threads",
     [] { return std::unique_ptr<World>(new RealWorld(NewThreadRing({.thread_count = 3}))); }},
    {"ThreadsInSmallPieces",
     [] {
       return std::unique_ptr<World>(
           new RealWorld(NewThreadRing({.thread_count = 1, .piece_bytes = 3 * kPage})));
     }},
    {"Simulated", [] { return std::unique_ptr<World>(new SimWorld(0)); }},
    {"SimulatedInAnyOrder", [] { return std::unique_ptr<World>(new SimWorld(7)); }},
};

class IoRingContract : public testing::TestWithParam<std::tuple<WorldKind, Caching>> {
 protected:
  std::string Path(const std::string& name) { return directory_ + "/" + name; }

  // Until nothing is in flight. Waits for the descriptor only, so a missing signal hangs the test.
  void Drain() {
    while (ring_.in_flight_count() > 0) {
      if (ring_.event_fd() >= 0) {
        pollfd waited{ring_.event_fd(), POLLIN, 0};
        ASSERT_EQ(poll(&waited, 1, -1), 1);
      }
      ring_.RunCompletions();
    }
  }
  absl::Status Write(IoFile& file, uint64_t offset, std::span<const std::byte> data) {
    absl::Status result = absl::UnknownError("not completed");
    ring_.Write(file, offset, data, [&](absl::Status status) { result = std::move(status); });
    EXPECT_EQ(result.message(), "not completed");
    Drain();
    return result;
  }
  absl::Status Read(IoFile& file, uint64_t offset, std::span<std::byte> data) {
    absl::Status result = absl::UnknownError("not completed");
    ring_.Read(file, offset, data, [&](absl::Status status) { result = std::move(status); });
    Drain();
    return result;
  }
  absl::Status Sync(IoFile& file) {
    absl::Status result = absl::UnknownError("not completed");
    ring_.Sync(file, [&](absl::Status status) { result = std::move(status); });
    Drain();
    return result;
  }
  std::unique_ptr<IoFile> Create(const std::string& name, uint64_t bytes) {
    auto file = fs_.CreateSized(Path(name), bytes, caching_);
    CHECK_OK(file.status());
    return *std::move(file);
  }
  std::unique_ptr<IoFile> Open(const std::string& name) {
    auto file = fs_.OpenForRead(Path(name), caching_);
    CHECK_OK(file.status());
    return *std::move(file);
  }

  const Caching caching_ = std::get<1>(GetParam());
  std::unique_ptr<World> world_ = std::get<0>(GetParam()).make();
  FileSystem& fs_ = world_->file_system();
  IoRing& ring_ = world_->ring();
  std::string directory_ = world_->directory();
};

INSTANTIATE_TEST_SUITE_P(, IoRingContract,
                         testing::Combine(testing::ValuesIn(kWorlds),
                                          testing::Values(Caching::kBuffered, Caching::kDirect)),
                         [](const testing::TestParamInfo<std::tuple<WorldKind, Caching>>& kind) {
                           return std::string(std::get<0>(kind.param).name) +
                                  (std::get<1>(kind.param) == Caching::kDirect ? "Direct"
                                                                               : "Buffered");
                         });

TEST_P(IoRingContract, WhatIsWrittenInAnyOrderIsReadBack) {
  constexpr size_t kPageCount = 300;
  constexpr uint64_t kSeed = 20261125;
  std::mt19937_64 random(kSeed);
  const Pages source(kPageCount);
  source.Fill(random);
  std::vector<size_t> order(kPageCount);
  for (size_t i = 0; i < kPageCount; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  const auto file = Create("a", kPageCount * kPage);
  size_t completed = 0;
  for (const size_t page : order) {
    ring_.Write(*file, page * kPage, source.page(page), [&](const absl::Status& status) {
      EXPECT_OK(status);
      ++completed;
    });
  }
  EXPECT_EQ(ring_.in_flight_count(), kPageCount);
  EXPECT_EQ(completed, 0u);
  Drain();
  EXPECT_EQ(completed, kPageCount);
  EXPECT_OK(Sync(*file));

  const Pages target(kPageCount);
  const auto reader = Open("a");
  for (const size_t page : order) {
    ring_.Read(*reader, page * kPage, target.page(page),
               [](const absl::Status& status) { EXPECT_OK(status); });
  }
  Drain();
  EXPECT_EQ(std::memcmp(source.all().data(), target.all().data(), kPageCount * kPage), 0)
      << "seed " << kSeed;
}

TEST_P(IoRingContract, AWholeFileIsMovedByOneTransfer) {
  constexpr size_t kPageCount = 3 * 256;  // 3 MiB
  std::mt19937_64 random(1);
  const Pages source(kPageCount);
  const Pages target(kPageCount);
  source.Fill(random);
  const auto file = Create("a", kPageCount * kPage);
  EXPECT_OK(Write(*file, 0, source.all()));
  EXPECT_OK(Read(*Open("a"), 0, target.all()));
  EXPECT_EQ(std::memcmp(source.all().data(), target.all().data(), kPageCount * kPage), 0);
}

TEST_P(IoRingContract, EmptyTransfersComplete) {
  const auto file = Create("a", kPage);
  EXPECT_OK(Write(*file, 0, {}));
  EXPECT_OK(Read(*file, 0, {}));
  EXPECT_OK(Read(*file, kPage, {}));
}

TEST_P(IoRingContract, ReadingBehindTheEndIsTruncated) {
  const Pages memory(4);
  const auto file = Create("a", 2 * kPage);
  ASSERT_OK(Write(*file, 0, memory.all().first(2 * kPage)));
  EXPECT_OK(Read(*file, kPage, memory.page(0)));
  EXPECT_THAT(Read(*file, 2 * kPage, memory.page(0)),
              StatusIs(StatusCode::kDataLoss,
                       AllOf(HasSubstr("truncated: expected 4096 bytes at offset 8192, found 0"),
                             HasSubstr(Path("a")))));
  EXPECT_THAT(
      Read(*file, 0, memory.all()),
      StatusIs(StatusCode::kDataLoss, HasSubstr("expected 16384 bytes at offset 0, found 8192")));
}

TEST_P(IoRingContract, AFileThatEndsWithinAPageIsTruncatedThere) {
  ASSERT_OK_AND_ASSIGN(const auto appended, fs_.CreateNew(Path("a")));
  const std::string text(5000, 'x');
  ASSERT_OK(appended->Append(std::as_bytes(std::span(text))));
  const Pages memory(2);
  const auto file = Open("a");
  EXPECT_EQ(file->size_bytes(), 5000u);
  EXPECT_OK(Read(*file, 0, memory.page(0)));
  EXPECT_THAT(Read(*file, 0, memory.all()),
              StatusIs(StatusCode::kDataLoss, HasSubstr("found 5000")));
}

TEST_P(IoRingContract, WritingToAFileOpenedForReadingFails) {
  const Pages memory(1);
  Create("a", kPage);
  const auto file = Open("a");
  EXPECT_THAT(Write(*file, 0, memory.page(0)),
              StatusIs(StatusCode::kInternal, AllOf(HasSubstr("EBADF"), HasSubstr(Path("a")))));
}

TEST_P(IoRingContract, UnalignedDirectTransfersAreRefusedAndBufferedOnesAreNot) {
  const Pages memory(1);
  const auto file = Create("a", kPage);
  const absl::Status status = Write(*file, 1, memory.page(0).first(10));
  if (caching_ == Caching::kDirect) {
    EXPECT_THAT(status, StatusIs(StatusCode::kInvalidArgument, HasSubstr("EINVAL")));
  } else {
    EXPECT_OK(status);
  }
}

TEST_P(IoRingContract, CompletionsMaySubmitMore) {
  const Pages memory(1);
  const auto file = Create("a", 100 * kPage);
  size_t written = 0;
  bool synced = false;
  std::function<void()> next = [&] {
    if (written == 100) {
      ring_.Sync(*file, [&](const absl::Status& status) { synced = status.ok(); });
      return;
    }
    ring_.Write(*file, written * kPage, memory.page(0), [&](const absl::Status& status) {
      EXPECT_OK(status);
      ++written;
      next();
    });
  };
  next();
  Drain();
  EXPECT_TRUE(synced);
}

TEST_P(IoRingContract, AnErrorIsOfItsOwnOperationOnly) {
  const Pages memory(3);
  const auto file = Create("a", kPage);
  std::vector<absl::StatusCode> codes(3, StatusCode::kUnknown);
  const auto record = [&codes](size_t index) {
    return [&codes, index](const absl::Status& status) { codes[index] = status.code(); };
  };
  ring_.Read(*file, 0, memory.page(0), record(0));
  ring_.Read(*file, 100 * kPage, memory.page(1), record(1));
  ring_.Read(*file, 0, memory.page(2), record(2));
  Drain();
  EXPECT_THAT(codes, testing::ElementsAre(StatusCode::kOk, StatusCode::kDataLoss, StatusCode::kOk));
}

TEST_P(IoRingContract, RunCompletionsWithNothingToDoReturns) {
  ring_.RunCompletions();
  EXPECT_EQ(ring_.in_flight_count(), 0u);
}

TEST_P(IoRingContract, RegisteredMemoryIsTransferredLikeAnyOther) {
  constexpr size_t kPageCount = 16;
  std::mt19937_64 random(2);
  const Pages source(kPageCount);
  const Pages target(kPageCount);
  source.Fill(random);
  const auto file = Create("a", kPageCount * kPage);
  for (int round = 0; round < 3; ++round) {  // registering again works
    const bool registered = ring_.RegisterMemory(source.all());
    const bool target_registered = ring_.RegisterMemory(target.all().first(4 * kPage));
    EXPECT_EQ(registered, target_registered);
    EXPECT_OK(Write(*file, 0, source.all()));
    std::ranges::fill(target.all(), std::byte{0});
    EXPECT_OK(Read(*file, 0, target.all().first(4 * kPage)));            // within
    EXPECT_OK(Read(*file, 3 * kPage, target.all().subspan(3 * kPage)));  // across the border
    EXPECT_EQ(std::memcmp(source.all().data(), target.all().data(), kPageCount * kPage), 0);
    if (registered) ring_.UnregisterMemory(source.all());
    if (target_registered) ring_.UnregisterMemory(target.all().first(4 * kPage));
  }
  EXPECT_OK(Write(*file, 0, source.all()));
}

TEST_P(IoRingContract, DestructionWaitsForWhatIsInFlightAndTellsNobody) {
  const auto memory = std::make_unique<Pages>(256);
  const auto file = Create("a", 256 * kPage);
  for (int i = 0; i < 50; ++i) {
    ring_.Write(*file, 0, memory->all(), [](const absl::Status&) { FAIL(); });
  }
  if (ring_.event_fd() < 0) {
    static_cast<SimDisk&>(ring_).AbandonInFlight(SimDisk::InFlight::kAll);
    return;  // the disk is ring and file system in one: the file goes first
  }
  world_.reset();  // the ring; then memory and file go: the sanitizers see a late access
}

}  // namespace
}  // namespace holdfast
