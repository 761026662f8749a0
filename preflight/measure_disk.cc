#include "preflight/measure_disk.h"

#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "io/io_ring.h"
#include "io/mount_probe.h"
#include "io/open_ring.h"
#include "preflight/clocks.h"

namespace holdfast::preflight {
namespace {

constexpr int64_t kNsPerSecond = 1'000'000'000;

double SecondsSince(int64_t begun_ns) {
  return static_cast<double>(MonotonicNs() - begun_ns) / kNsPerSecond;
}

// What all of the measuring shares. The members' order is that of their lives: transfers in flight
// use file and memory, and the ring waits for them.
class Disk {
 public:
  static absl::StatusOr<std::unique_ptr<Disk>> Create(FileSystem& file_system,
                                                      const std::string& directory);
  ~Disk() {
    ring_.reset();
    if (memory_ != MAP_FAILED) munmap(memory_, kMemoryBytes);
  }

  // Both: bytes per second of transfers of kDiskTransferBytes, for `seconds`, at least one.
  absl::StatusOr<double> Write(double seconds);
  absl::StatusOr<double> Read(double seconds);
  // Median seconds of a small write and a sync, for `seconds`, at least one.
  absl::StatusOr<double> WriteAndSync(double seconds);
  std::string Describe() const;

 private:
  static constexpr size_t kMemoryBytes = kDiskTransferBytes * kDiskTransfersInFlight;

  Disk() = default;
  std::span<std::byte> Slot(uint32_t slot) const {
    return {static_cast<std::byte*>(memory_) + slot * kDiskTransferBytes, kDiskTransferBytes};
  }
  // Waits until at most `count` operations are in flight, or one has failed.
  absl::Status Drain(size_t count);
  // Submits transfers with `submit` for `seconds`; how many.
  using Submit = std::function<void(uint64_t transfer, std::span<std::byte> memory, IoRing::Done)>;
  absl::StatusOr<uint64_t> Stream(double seconds, const Submit& submit);
  absl::Status SyncAndWait();

  MountFacts facts_;
  void* memory_ = MAP_FAILED;
  uint64_t file_bytes_ = 0;
  uint64_t written_bytes_ = 0;  // from the beginning of the file
  std::unique_ptr<IoFile> file_;
  std::unique_ptr<IoRing> ring_;
  absl::Status failure_;  // the first one of an operation
};

absl::StatusOr<std::unique_ptr<Disk>> Disk::Create(FileSystem& file_system,
                                                   const std::string& directory) {
  std::unique_ptr<Disk> disk(new Disk());
  ASSIGN_OR_RETURN(disk->facts_, MountProbe(file_system, "").Probe(directory));
  ASSIGN_OR_RETURN(const Space space, file_system.SpaceOf(directory));
  disk->file_bytes_ = std::min(kDiskFileBytes, space.available_bytes / 4);
  disk->file_bytes_ -= disk->file_bytes_ % kDiskTransferBytes;
  if (disk->file_bytes_ < kDiskFileBytesMin) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%s: %d bytes are free; a quarter of that must be at least %d", directory,
                        space.available_bytes, kDiskFileBytesMin));
  }
  disk->memory_ =
      mmap(nullptr, kMemoryBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (disk->memory_ == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrFormat("%d bytes of memory", kMemoryBytes));
  }
  // Random: some storage compresses, and zeros would be free.
  std::mt19937_64 random(RandomBits());
  const std::span<uint64_t> words(static_cast<uint64_t*>(disk->memory_),
                                  kMemoryBytes / sizeof(uint64_t));
  std::generate(words.begin(), words.end(), std::ref(random));

  const std::string path = absl::StrCat(directory, "/.holdfast-preflight.", RandomUuid());
  ASSIGN_OR_RETURN(disk->file_,
                   file_system.CreateSized(path, disk->file_bytes_,
                                           disk->facts_.DirectRefusal(kDiskTransferBytes).empty()
                                               ? Caching::kDirect
                                               : Caching::kBuffered));
  RETURN_IF_ERROR(file_system.Unlink(path));
  ASSIGN_OR_RETURN(disk->ring_, OpenRing());
  return disk;
}

absl::Status Disk::Drain(size_t count) {
  while (ring_->in_flight_count() > count) {
    pollfd entry{ring_->event_fd(), POLLIN, 0};
    // Without a deadline: the kernel cannot be told to forget a transfer.
    if (poll(&entry, 1, -1) < 0 && errno != EINTR) {
      return absl::UnavailableError(absl::StrFormat("poll: errno %d", errno));
    }
    ring_->RunCompletions();
    RETURN_IF_ERROR(failure_);
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> Disk::Stream(double seconds, const Submit& submit) {
  std::vector<uint32_t> free_slots(kDiskTransfersInFlight);
  std::iota(free_slots.begin(), free_slots.end(), 0U);
  const int64_t begun_ns = MonotonicNs();
  uint64_t transfer = 0;
  do {
    const uint32_t slot = free_slots.back();
    free_slots.pop_back();
    // `free_slots` is there for as long as completions run: in Drain() only.
    submit(transfer++, Slot(slot), [this, slot, &free_slots](absl::Status status) {
      failure_.Update(status);
      free_slots.push_back(slot);
    });
    RETURN_IF_ERROR(Drain(kDiskTransfersInFlight - 1));
  } while (SecondsSince(begun_ns) < seconds);
  RETURN_IF_ERROR(Drain(0));
  return transfer;
}

absl::StatusOr<double> Disk::Write(double seconds) {
  const int64_t begun_ns = MonotonicNs();
  ASSIGN_OR_RETURN(
      const uint64_t count, Stream(seconds, [this](uint64_t transfer, auto memory, auto done) {
        ring_->Write(*file_, transfer * kDiskTransferBytes % file_bytes_, memory, std::move(done));
      }));
  RETURN_IF_ERROR(SyncAndWait());
  written_bytes_ = std::min(count * kDiskTransferBytes, file_bytes_);
  return static_cast<double>(count * kDiskTransferBytes) / SecondsSince(begun_ns);
}

absl::StatusOr<double> Disk::Read(double seconds) {
  const int64_t begun_ns = MonotonicNs();
  ASSIGN_OR_RETURN(const uint64_t count,
                   Stream(seconds, [this](uint64_t transfer, auto memory, auto done) {
                     ring_->Read(*file_, transfer * kDiskTransferBytes % written_bytes_, memory,
                                 std::move(done));
                   }));
  return static_cast<double>(count * kDiskTransferBytes) / SecondsSince(begun_ns);
}

absl::StatusOr<double> Disk::WriteAndSync(double seconds) {
  const int64_t begun_ns = MonotonicNs();
  const uint64_t small_bytes = facts_.alignment_bytes;
  std::vector<double> times;
  do {
    const int64_t one_ns = MonotonicNs();
    ring_->Write(*file_, times.size() * small_bytes % file_bytes_, Slot(0).first(small_bytes),
                 [this](absl::Status status) { failure_.Update(status); });
    RETURN_IF_ERROR(Drain(0));
    RETURN_IF_ERROR(SyncAndWait());
    times.push_back(SecondsSince(one_ns));
  } while (SecondsSince(begun_ns) < seconds);
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

absl::Status Disk::SyncAndWait() {
  ring_->Sync(*file_, [this](absl::Status status) { failure_.Update(status); });
  return Drain(0);
}

std::string Disk::Describe() const {
  const std::string refusal = facts_.DirectRefusal(kDiskTransferBytes);
  return absl::StrCat(facts_.file_system, refusal.empty() ? ", O_DIRECT" : ", buffered", ", ",
                      ring_->Describe());
}

}  // namespace

absl::StatusOr<DiskSpeed> MeasureDisk(FileSystem& file_system, const std::string& directory,
                                      absl::Duration duration) {
  const double seconds = absl::ToDoubleSeconds(duration);
  ASSIGN_OR_RETURN(const std::unique_ptr<Disk> disk, Disk::Create(file_system, directory));
  DiskSpeed speed;
  ASSIGN_OR_RETURN(speed.write_bytes_per_second, disk->Write(0.4 * seconds));
  ASSIGN_OR_RETURN(speed.sync_seconds, disk->WriteAndSync(0.2 * seconds));
  ASSIGN_OR_RETURN(speed.read_bytes_per_second, disk->Read(0.4 * seconds));
  speed.description = disk->Describe();
  return speed;
}

}  // namespace holdfast::preflight
