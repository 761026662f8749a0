#include "checkpoint/block_checksums.h"

#include <algorithm>
#include <utility>

#include "base/crc32c.h"

namespace holdfast {
namespace {

// Two keep a core each busy at the speed of memory; more would only take cores from the trainer.
constexpr uint32_t kJobsInFlightMax = 2;
// What one job takes at most: about a millisecond of work.
constexpr uint64_t kJobBytesMax = uint64_t{16} << 20;
constexpr size_t kJobRequestsMax = 1024;

}  // namespace

struct BlockChecksums::Job {
  std::vector<Request> requests;
  std::vector<uint64_t> epochs;
  std::vector<uint32_t> crc32c;
};

BlockChecksums::BlockChecksums(std::shared_ptr<SharedMapping> memory, uint64_t block_bytes,
                               uint32_t slot_count, WorkPool& pool, Done done, Idle idle)
    : memory_(std::move(memory)),
      block_bytes_(block_bytes),
      pool_(pool),
      done_(std::move(done)),
      idle_(std::move(idle)),
      pending_(slot_count),
      epoch_(slot_count) {}

void BlockChecksums::Add(const Request& request) {
  queue_.push_back(request);
  ++pending_[request.slot];
  StartJobs();
}

void BlockChecksums::Cancel(uint32_t slot) {
  const size_t taken_back =
      std::erase_if(queue_, [slot](const Request& request) { return request.slot == slot; });
  pending_[slot] -= static_cast<uint32_t>(taken_back);
  ++epoch_[slot];
}

void BlockChecksums::StartJobs() {
  while (jobs_in_flight_ < kJobsInFlightMax && !queue_.empty()) {
    const size_t count = std::min<size_t>(
        {queue_.size(), std::max<size_t>(1, kJobBytesMax / block_bytes_), kJobRequestsMax});
    auto job = std::make_shared<Job>();
    for (size_t i = 0; i < count; ++i) {
      job->requests.push_back(queue_.front());
      job->epochs.push_back(epoch_[queue_.front().slot]);
      queue_.pop_front();
    }
    ++jobs_in_flight_;
    pool_.Run(
        [memory = memory_, block_bytes = block_bytes_, job] {
          for (const Request& request : job->requests) {
            job->crc32c.push_back(
                Crc32c(memory->bytes().subspan(request.memory_block * block_bytes, block_bytes)));
          }
        },
        [this, alive = std::weak_ptr<bool>(alive_), job] {
          if (!alive.expired()) Finish(*job);
        });
  }
}

void BlockChecksums::Finish(const Job& job) {
  --jobs_in_flight_;
  for (const Request& request : job.requests) --pending_[request.slot];
  const std::weak_ptr<bool> alive = alive_;
  for (size_t i = 0; i < job.requests.size(); ++i) {
    const Request& request = job.requests[i];
    if (job.epochs[i] == epoch_[request.slot]) done_(request, job.crc32c[i]);
    if (alive.expired()) return;
  }
  // Also for a slot of which nothing is left but what was cancelled: somebody may wait for it.
  for (const Request& request : job.requests) {
    if (pending_[request.slot] == 0) idle_(request.slot);
    if (alive.expired()) return;
  }
  StartJobs();
}

}  // namespace holdfast
