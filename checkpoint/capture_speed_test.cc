// The whole path with the real world: memory, pool, io_uring, a real file. Proves that real parts
// work together, and prints how fast; asserts nothing about speed.
#include <sys/eventfd.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/clock.h"
#include "checkpoint/capture_harness.h"
#include "io/epoll_loop.h"
#include "io/open_ring.h"
#include "io/posix_file_system.h"
#include "io/thread_pool.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

constexpr uint64_t kTensorBytes = uint64_t{128} << 20;
constexpr uint64_t kBlockBytes = uint64_t{4} << 20;

double Seconds(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Flushes into `path` and stops the loop when all is over.
class OneImage final : public ImageObserver {
 public:
  OneImage(EpollLoop& loop, std::string path) : loop_(loop), path_(std::move(path)) {}
  RankImages* images = nullptr;
  std::optional<SealedImage> sealed;
  double sealed_seconds = 0;
  std::optional<std::string> durable_path;
  std::optional<absl::Status> void_status;
  std::chrono::steady_clock::time_point begin;

  void OnCaptureBegun(ImageId id, Rank, CheckpointId) override { images->StartFlush(id, path_); }
  void OnSealed(const SealedImage& image) override {
    sealed = image;
    sealed_seconds = Seconds(begin);
  }
  void OnDurable(ImageId, const std::string& path) override {
    durable_path = path;
    loop_.Stop();
  }
  void OnVoid(ImageId, Rank, CheckpointId, absl::Status why, Afterwards) override {
    void_status = std::move(why);
    loop_.Stop();
  }

 private:
  EpollLoop& loop_;
  const std::string path_;
};

TEST(CaptureSpeedTest, FromTensorsToADurableFile) {
  const TemporaryDirectory directory;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<EpollLoop> loop, EpollLoop::Create(RealClock()));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ThreadPool> pool, ThreadPool::Create(*loop, 2));
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<IoRing> ring, OpenRing());
  loop->Watch(ring->event_fd(), EventLoop::FdEvents::kReadable, [&] { ring->RunCompletions(); });
  FakeKeeper keeper;
  MemoryBudget budget(uint64_t{1} << 30);
  RankMemories memories({*ring, *loop, *pool, keeper, budget});
  ImageWorld image_world{*file_system, *ring, *loop, *pool, RealClock()};
  // Not every file system of a test machine can bypass its cache.
  image_world.flush_caching = Caching::kBuffered;
  SessionWorld world{image_world, keeper, memories, std::make_shared<LayoutCache>(),
                     directory.path()};
  world.block_bytes = kBlockBytes;

  const std::string layout = absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":1}],"tensors":[{"name":"w",
      "shape":[%d],"states":[{"state":"param","dtype":"uint8"}]}]})",
      kTensorBytes);
  const std::vector<TrainerBuffer> buffers = {{"param/w", kTensorBytes, 0}};
  const std::string document = EncodeDocument(layout, buffers, {});
  SessionIdentity identity;
  identity.session = SessionId{1};
  identity.job = "job";
  identity.job_uuid = kTestUuid;
  identity.attempt = Attempt{1};
  identity.world_size = 1;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Session> session,
                       Session::Create(identity, UniqueFd(eventfd(0, EFD_CLOEXEC)), world));
  OneImage observer(*loop, absl::StrCat(directory.path(), "/rank-00000.h5"));
  session->Start(observer);
  session->Prepare(SealedDocument(document), document.size(), [&](const auto& prepared) {
    EXPECT_OK(prepared.status());
    loop->Stop();
  });
  loop->Run();
  const auto register_begin = std::chrono::steady_clock::now();
  absl::StatusOr<RegisterResult> registered = absl::UnknownError("not called");
  session->Register([&](const absl::StatusOr<RegisterResult>& result) {
    registered = result;
    loop->Stop();
  });
  loop->Run();
  ASSERT_OK(registered);
  printf("%s; first image's memory after %.3f s\n", ring->Describe().c_str(),
         Seconds(register_begin));

  ScriptedTrainer trainer({session->reports().fd(), registered->memory_fd,
                           registered->registration_memory_fd, registered->capture_plan_fd},
                          buffers);
  observer.images = session->current_images();
  const std::optional<uint32_t> slot = trainer.BeginSave(1, {});
  ASSERT_TRUE(slot);
  observer.begin = std::chrono::steady_clock::now();
  const UniqueFd doorbell(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  loop->Watch(doorbell.get(), EventLoop::FdEvents::kReadable, [&] {
    eventfd_t count = 0;
    (void)eventfd_read(doorbell.get(), &count);
    session->Advance();
  });
  std::thread copier([&] {
    while (!trainer.CopyBlocks(*slot, 1)) (void)eventfd_write(doorbell.get(), 1);
    trainer.Finish(*slot);
    (void)eventfd_write(doorbell.get(), 1);
  });
  loop->Run();
  const double durable_seconds = Seconds(observer.begin);
  copier.join();
  loop->Unwatch(doorbell.get());
  ASSERT_TRUE(observer.durable_path)
      << (observer.void_status ? observer.void_status->ToString() : "");
  const double gigabytes =
      static_cast<double>(session->current_images()->counters()[0].block_count * kBlockBytes) / 1e9;
  printf("%.2f GB: captured and checksummed %.2f GB/s, durable %.2f GB/s\n", gigabytes,
         gigabytes / observer.sealed_seconds, gigabytes / durable_seconds);

  // And it is the right file.
  std::ifstream file(*observer.durable_path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  ASSERT_EQ(bytes.size(), observer.sealed->image_bytes);
  const uint64_t offset = trainer.ops()[0].image_offset;
  for (uint64_t i = 0; i < kTensorBytes; ++i) {
    ASSERT_EQ(static_cast<std::byte>(bytes[offset + i]), ScriptedTrainer::PatternByte(1, 0, i));
  }
}

}  // namespace
}  // namespace holdfast
