// The memory of one rank of one job: one memfd, sealed against resizing (a trainer that truncated
// it would kill the agent with SIGBUS), mapped here and in that rank's trainer, cut into blocks. It
// outlives sessions: images of an older attempt stay in it while a newer one captures into its free
// blocks.
//
// Its neighbour BlockPool says what each block is used for; RankMemories says which memory serves
// which rank, within the budget of the node.
#ifndef HOLDFAST_CHECKPOINT_RANK_MEMORY_H_
#define HOLDFAST_CHECKPOINT_RANK_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/executor.h"
#include "base/ids.h"
#include "checkpoint/block_pool.h"
#include "checkpoint/descriptor_keeper.h"
#include "checkpoint/memory_budget.h"
#include "checkpoint/populate_memory.h"
#include "checkpoint/shared_mapping.h"
#include "io/io_ring.h"
#include "io/unique_fd.h"

namespace holdfast {

// Numbers rank memories; never reused while one of that number lives.
enum class MemoryId : uint64_t {};

// "memory/000000000000002a", as it is called in the keeper.
std::string MemoryName(MemoryId id);

// What rank memories need of the world. All outlive them.
struct MemoryWorld {
  IoRing& ring;
  EventLoop& loop;
  WorkPool& pool;
  DescriptorKeeper& keeper;
  MemoryBudget& budget;
  PopulateMemory populate = nullptr;  // nullptr: the kernel's
};

// Threads: the event loop's, except that bytes() may be read on pool threads by whoever holds
//   mapping().
// Lifetime: shared by the sessions that have images in it. Jobs and transfers in flight hold
//   mapping(), which keeps the bytes mapped.
class RankMemory {
 public:
  // Makes the memfd, maps it and keeps it in the keeper. No page is there yet: see Prefault().
  // Errors: kResourceExhausted (budget, descriptors, memory).
  static absl::StatusOr<std::shared_ptr<RankMemory>> Create(MemoryId id, uint64_t block_bytes,
                                                            uint32_t block_count,
                                                            const MemoryWorld& world);
  // Takes over a memfd that a former worker made. All blocks are kAbsent: claim those of images,
  // then Prefault() frees the others. Errors: kDataLoss (seals or size are not what Create makes).
  static absl::StatusOr<std::shared_ptr<RankMemory>> Reopen(MemoryId id, UniqueFd fd,
                                                            uint64_t block_bytes,
                                                            const MemoryWorld& world);
  ~RankMemory();
  RankMemory(const RankMemory&) = delete;
  RankMemory& operator=(const RankMemory&) = delete;

  // Makes pages present on the pool, slice after slice, so that no first touch stalls a capture or
  // fails in the middle of one. After each slice its blocks are free and the listeners run. Goes on
  // by itself; an error (no memory) leaves the rest absent: prefault_status().
  void Prefault();
  const absl::Status& prefault_status() const { return prefault_status_; }
  bool prefault_running() const { return prefault_running_; }

  // Called from the loop after blocks have become free or pre-faulting has ended: waiting slots may
  // be granted.
  using ListenerId = uint64_t;
  ListenerId AddListener(std::function<void()> blocks_free);
  void RemoveListener(ListenerId id);
  void NotifyBlocksFree();

  // Processes that may write into it. A memory is reused for a new session only when there are
  // none.
  void AddWriter() { ++writer_count_; }
  void RemoveWriter();
  uint32_t writer_count() const { return writer_count_; }

  // Nothing of it is granted again: what was lost of the record may still be written.
  void Distrust(const absl::Status& why);

  // Registrations that use it. When the last one is gone it is dropped from the keeper.
  void AddUser() { ++user_count_; }
  void RemoveUser();
  // Drops it from the keeper if no registration came of it.
  void DropIfUnused();
  uint32_t user_count() const { return user_count_; }

  // A descriptor of the same memory through which nothing can be written or mapped writable.
  absl::StatusOr<UniqueFd> OpenReadOnly() const;

  MemoryId id() const { return id_; }
  int fd() const { return mapping_->fd(); }
  uint64_t block_bytes() const { return block_bytes_; }
  BlockPool& pool() { return pool_; }
  const BlockPool& pool() const { return pool_; }
  std::span<std::byte> bytes() const { return mapping_->bytes(); }
  std::span<std::byte> block(uint32_t index) const {
    return bytes().subspan(index * block_bytes_, block_bytes_);
  }
  const std::shared_ptr<SharedMapping>& mapping() const { return mapping_; }

 private:
  RankMemory(MemoryId id, uint64_t block_bytes, std::shared_ptr<SharedMapping> mapping,
             MemoryReservation reservation, const MemoryWorld& world);
  void PrefaultNext(uint32_t first);
  void RegisterNext();

  const MemoryId id_;
  const uint64_t block_bytes_;
  const MemoryWorld world_;
  std::shared_ptr<SharedMapping> mapping_;
  MemoryReservation reservation_;
  BlockPool pool_;
  absl::Status prefault_status_;
  bool prefault_running_ = false;
  bool is_distrusted_ = false;
  uint64_t registered_bytes_ = 0;  // with the ring: so many from the beginning
  bool registration_ended_ = false;
  bool notification_posted_ = false;
  std::map<ListenerId, std::function<void()>> listeners_;
  ListenerId next_listener_ = 1;
  uint32_t writer_count_ = 0;
  uint32_t user_count_ = 0;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // for completions that outlive us
};

// Finds or makes the memory of a rank.
//
// Threads: the event loop's. Lifetime: the world outlives it; memories may outlive it.
class RankMemories {
 public:
  explicit RankMemories(const MemoryWorld& world) : world_(world) {}

  // The rank's memory, if nobody writes into it any more (but the asking process: `own`, or
  // nullptr) and it can hold an image of `image_blocks`; else a new one for up to `images_max`
  // images and a few blocks for staging, fewer images where the budget is short, at least one.
  // Errors: kResourceExhausted, with asked, free and the limit: releasing durable images of ended
  // sessions and asking again may help.
  absl::StatusOr<std::shared_ptr<RankMemory>> Obtain(const std::string& job_uuid, Rank rank,
                                                     uint64_t block_bytes, uint32_t image_blocks,
                                                     uint32_t images_max, const RankMemory* own,
                                                     uint32_t own_writer_count);

  // After a restart: `memory` (RankMemory::Reopen) serves this rank.
  void Adopt(const std::string& job_uuid, Rank rank, const std::shared_ptr<RankMemory>& memory);

  const MemoryWorld& world() const { return world_; }

 private:
  MemoryId NextId() { return MemoryId{++last_id_}; }

  MemoryWorld world_;
  // All that live; the newest last.
  std::map<std::pair<std::string, Rank>, std::vector<std::weak_ptr<RankMemory>>> by_rank_;
  uint64_t last_id_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RANK_MEMORY_H_
