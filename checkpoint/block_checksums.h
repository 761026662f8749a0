// Computes checksums of blocks on the pool: two queues, and a few jobs that take what has gathered.
//
// The first look at a block is on the way to "captured"; where replicas are to be compared, it
// takes their sums. A second look, which takes the sums of fingerprints, is not: first looks go
// before it, and it never holds the last job.
#ifndef HOLDFAST_CHECKPOINT_BLOCK_CHECKSUMS_H_
#define HOLDFAST_CHECKPOINT_BLOCK_CHECKSUMS_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "base/executor.h"
#include "checkpoint/registration.h"
#include "checkpoint/shared_mapping.h"
#include "format/image_fingerprints.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: completions of jobs in flight are dropped when it is
//   destroyed; jobs keep the memory.
class BlockChecksums {
 public:
  struct Request {
    uint32_t slot = 0;          // whose, for pending() and Cancel()
    uint32_t block = 0;         // of the slot
    uint32_t memory_block = 0;  // where it lies
    enum class Look : uint8_t { kFirst, kSecond } look = Look::kFirst;
    uint32_t try_number = 0;  // for the caller
  };
  struct Found {
    uint32_t crc32c = 0;
    // Of the very bytes that have this checksum, whoever writes them meanwhile. kFirst: of the
    // registration's replica_sums(). kSecond: of its fingerprints().
    std::vector<FingerprintPart> parts;
  };
  using Done = std::function<void(const Request& request, const Found& found)>;
  using Idle = std::function<void(uint32_t slot)>;

  // On the loop, `done` is called for every request that was not cancelled, `idle` when the last
  // one of a slot, cancelled or not, is over. The memory has blocks of registration->block_bytes().
  BlockChecksums(std::shared_ptr<SharedMapping> memory,
                 std::shared_ptr<const Registration> registration, uint32_t slot_count,
                 WorkPool& pool, Done done, Idle idle);

  void Add(const Request& request);
  // Takes back the slot's requests that are not in a job yet; what is in one is dropped when it
  // ends (see pending()).
  void Cancel(uint32_t slot);
  // Requests of this slot that may still read its blocks.
  uint32_t pending(uint32_t slot) const { return pending_[slot]; }

 private:
  struct Job;
  void StartJobs();
  void StartJob(std::deque<Request>& queue);
  void Finish(const Job& job);

  const std::shared_ptr<SharedMapping> memory_;
  const std::shared_ptr<const Registration> registration_;
  WorkPool& pool_;
  const Done done_;
  const Idle idle_;
  std::deque<Request> first_looks_;
  std::deque<Request> second_looks_;
  std::vector<uint32_t> pending_;
  std::vector<uint64_t> epoch_;  // of each slot; a cancelled request is of an older one
  uint32_t jobs_in_flight_ = 0;
  uint32_t second_jobs_in_flight_ = 0;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_BLOCK_CHECKSUMS_H_
