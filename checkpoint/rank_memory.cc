#include "checkpoint/rank_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

// One piece of work on the pool: long enough to be worth a job, short enough not to hold a thread.
constexpr uint64_t kPrefaultSliceBytes = uint64_t{64} << 20;

// What one call registers with the ring: a multiple of every block size.
constexpr uint64_t kRegisterSliceBytes = uint64_t{512} << 20;

// Beyond images: so many blocks at most, so that a restore can read ahead while images fill the
// memory.
constexpr uint32_t kStagingBlocksMax = 16;

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

// Makes the pages of `bytes` (in the mapping of `fd` at `offset`) present.
absl::Status Populate(int fd, uint64_t offset, std::span<std::byte> bytes) {
  int error = 0;
  do {
    error = madvise(bytes.data(), bytes.size(), MADV_POPULATE_WRITE) == 0 ? 0 : errno;
  } while (error == EINTR || error == EAGAIN);
  // Linux before 5.14 does not know it. Allocated pages are enough there.
  if (error == EINVAL) {
    do {
      error = fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes.size())) == 0
                  ? 0
                  : errno;
    } while (error == EINTR);
  }
  if (error == 0) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrFormat("pre-faulting %d bytes of rank memory: %s", bytes.size(), ErrnoName(error)));
}

}  // namespace

std::string MemoryName(MemoryId id) {
  return absl::StrFormat("memory/%016x", static_cast<uint64_t>(id));
}

RankMemory::RankMemory(MemoryId id, uint64_t block_bytes, std::shared_ptr<SharedMapping> mapping,
                       MemoryReservation reservation, const MemoryWorld& world)
    : id_(id),
      block_bytes_(block_bytes),
      world_(world),
      mapping_(std::move(mapping)),
      reservation_(std::move(reservation)),
      pool_(static_cast<uint32_t>(mapping_->bytes().size() / block_bytes)) {}

absl::StatusOr<std::shared_ptr<RankMemory>> RankMemory::Create(MemoryId id, uint64_t block_bytes,
                                                               uint32_t block_count,
                                                               const MemoryWorld& world) {
  CHECK(block_count > 0 && block_bytes > 0);
  const uint64_t bytes = block_count * block_bytes;
  ASSIGN_OR_RETURN(
      MemoryReservation reservation,
      world.budget.Reserve(bytes, absl::StrFormat("a rank memory of %d blocks", block_count)));
  ASSIGN_OR_RETURN(std::shared_ptr<SharedMapping> mapping,
                   SharedMapping::Create("holdfast-" + MemoryName(id), bytes));
  world.keeper.Keep(MemoryName(id), mapping->fd());
  return std::shared_ptr<RankMemory>(
      new RankMemory(id, block_bytes, std::move(mapping), std::move(reservation), world));
}

absl::StatusOr<std::shared_ptr<RankMemory>> RankMemory::Reopen(MemoryId id, UniqueFd fd,
                                                               uint64_t block_bytes,
                                                               const MemoryWorld& world) {
  ASSIGN_OR_RETURN(std::shared_ptr<SharedMapping> mapping,
                   SharedMapping::Reopen(MemoryName(id), std::move(fd), block_bytes));
  const uint64_t bytes = mapping->bytes().size();
  if (bytes % block_bytes != 0 || bytes / block_bytes > UINT32_MAX) {
    return absl::DataLossError(
        absl::StrFormat("%s: expected a multiple of the block size %d, found %d bytes",
                        MemoryName(id), block_bytes, bytes));
  }
  return std::shared_ptr<RankMemory>(new RankMemory(id, block_bytes, std::move(mapping),
                                                    world.budget.ReserveExisting(bytes), world));
}

RankMemory::~RankMemory() {
  // Who else holds the mapping has work or transfers in flight in it. The ring may then neither
  // forget the pages nor keep a registration of addresses that mean something else tomorrow.
  if (registered_bytes_ == 0) return;
  if (mapping_.use_count() == 1) {
    world_.ring.UnregisterMemory(mapping_->bytes().first(registered_bytes_));
  } else {
    mapping_->Leak();
  }
}

void RankMemory::Distrust(const absl::Status& why) {
  is_distrusted_ = true;
  prefault_status_ = why;
}

void RankMemory::RemoveUser() {
  CHECK(user_count_ > 0);
  if (--user_count_ == 0) world_.keeper.Drop(MemoryName(id_));
}

void RankMemory::DropIfUnused() {
  if (user_count_ == 0) world_.keeper.Drop(MemoryName(id_));
}

void RankMemory::Prefault() {
  if (prefault_running_ || is_distrusted_) return;
  prefault_running_ = true;
  prefault_status_ = absl::OkStatus();
  PrefaultNext(0);
}

void RankMemory::PrefaultNext(uint32_t first) {
  while (first < pool_.block_count() && pool_.state(first) != BlockState::kAbsent) ++first;
  if (first == pool_.block_count()) {
    prefault_running_ = false;
    NotifyBlocksFree();
    RegisterNext();
    return;
  }
  const uint32_t count_max =
      static_cast<uint32_t>(std::max<uint64_t>(1, kPrefaultSliceBytes / block_bytes_));
  uint32_t count = 1;
  while (count < count_max && first + count < pool_.block_count() &&
         pool_.state(first + count) == BlockState::kAbsent) {
    ++count;
  }
  auto status = std::make_shared<absl::Status>();
  const uint64_t offset = first * block_bytes_;
  const uint64_t length = count * block_bytes_;
  world_.pool.Run(
      [mapping = mapping_, populate = world_.populate, status, offset, length] {
        const std::span<std::byte> part = mapping->bytes().subspan(offset, length);
        *status = populate ? populate(mapping->fd(), offset, part)
                           : Populate(mapping->fd(), offset, part);
      },
      [this, alive = std::weak_ptr<bool>(alive_), status, first, count] {
        if (alive.expired()) return;
        if (!status->ok()) {
          prefault_status_ = *status;
          prefault_running_ = false;
          NotifyBlocksFree();
          return;
        }
        pool_.AddFree(first, count);
        NotifyBlocksFree();
        PrefaultNext(first + count);
      });
}

// Registering pins pages on the loop's thread: only pages that are there, and not too many at once.
void RankMemory::RegisterNext() {
  if (registration_ended_ || registered_bytes_ == bytes().size()) return;
  const uint64_t length = std::min(kRegisterSliceBytes, bytes().size() - registered_bytes_);
  // Refused: transfers work all the same.
  registration_ended_ = !world_.ring.RegisterMemory(bytes().subspan(registered_bytes_, length));
  if (registration_ended_) return;
  registered_bytes_ += length;
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_)] {
    if (!alive.expired()) RegisterNext();
  });
}

RankMemory::ListenerId RankMemory::AddListener(std::function<void()> blocks_free) {
  listeners_.emplace(next_listener_, std::move(blocks_free));
  return next_listener_++;
}

void RankMemory::RemoveListener(ListenerId id) { listeners_.erase(id); }

void RankMemory::NotifyBlocksFree() {
  if (notification_posted_) return;
  notification_posted_ = true;
  world_.loop.Post([this, alive = std::weak_ptr<bool>(alive_)] {
    if (alive.expired()) return;
    notification_posted_ = false;
    // A listener may remove itself or others.
    std::vector<ListenerId> ids;
    for (const auto& [id, listener] : listeners_) ids.push_back(id);
    for (const ListenerId id : ids) {
      if (const auto found = listeners_.find(id); found != listeners_.end()) {
        const std::function<void()> listener = found->second;
        listener();
        if (alive.expired()) return;
      }
    }
  });
}

void RankMemory::RemoveWriter() {
  CHECK(writer_count_ > 0);
  --writer_count_;
}

absl::StatusOr<UniqueFd> RankMemory::OpenReadOnly() const {
  const std::string path = absl::StrCat("/proc/self/fd/", mapping_->fd());
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoStatus(errno, "open", MemoryName(id_));
  return fd;
}

absl::StatusOr<std::shared_ptr<RankMemory>> RankMemories::Obtain(
    const std::string& job_uuid, Rank rank, uint64_t block_bytes, uint32_t image_blocks,
    uint32_t images_max, const RankMemory* own, uint32_t own_writer_count) {
  CHECK(image_blocks > 0 && images_max > 0);
  std::vector<std::weak_ptr<RankMemory>>& memories = by_rank_[{job_uuid, rank}];
  std::erase_if(memories, [](const auto& memory) { return memory.expired(); });
  // The newest first: it is the likeliest to have the right size.
  for (auto candidate = memories.rbegin(); candidate != memories.rend(); ++candidate) {
    std::shared_ptr<RankMemory> memory = candidate->lock();
    const uint32_t own_writers = memory.get() == own ? own_writer_count : 0;
    if (memory->user_count() > 0 && memory->writer_count() <= own_writers &&
        memory->block_bytes() == block_bytes && memory->pool().block_count() >= image_blocks &&
        memory->prefault_status().ok()) {
      return memory;
    }
  }

  const uint64_t image_bytes = image_blocks * block_bytes;
  const uint64_t images_affordable = world_.budget.free_bytes() / image_bytes;
  const uint64_t images = std::clamp<uint64_t>(images_affordable, 1, images_max);
  const uint64_t blocks_affordable =
      std::max<uint64_t>(world_.budget.free_bytes() / block_bytes, images * image_blocks);
  const uint64_t blocks = std::min<uint64_t>(
      blocks_affordable, images * image_blocks + std::min(kStagingBlocksMax, image_blocks));
  if (blocks > UINT32_MAX) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("a rank memory of %d blocks of %d bytes: at most %d blocks", blocks,
                        block_bytes, UINT32_MAX));
  }
  ASSIGN_OR_RETURN(
      std::shared_ptr<RankMemory> memory,
      RankMemory::Create(NextId(), block_bytes, static_cast<uint32_t>(blocks), world_));
  memories.push_back(memory);
  return memory;
}

void RankMemories::Adopt(const std::string& job_uuid, Rank rank,
                         const std::shared_ptr<RankMemory>& memory) {
  last_id_ = std::max(last_id_, static_cast<uint64_t>(memory->id()));
  by_rank_[{job_uuid, rank}].push_back(memory);
}

}  // namespace holdfast
