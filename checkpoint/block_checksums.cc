#include "checkpoint/block_checksums.h"

#include <algorithm>
#include <utility>

#include "base/crc32c.h"
#include "checkpoint/block_sums.h"

namespace holdfast {
namespace {

// Two keep a core each busy at the speed of memory; more would only take cores from the trainer.
constexpr uint32_t kJobsInFlightMax = 2;
constexpr uint32_t kSecondJobsInFlightMax = kJobsInFlightMax - 1;
// What one job takes at most: about a millisecond of work, three for second looks.
constexpr uint64_t kJobBytesMax = uint64_t{16} << 20;
constexpr size_t kJobRequestsMax = 1024;

}  // namespace

struct BlockChecksums::Job {
  std::vector<Request> requests;
  std::vector<uint64_t> epochs;
  std::vector<Found> found;
};

BlockChecksums::BlockChecksums(std::shared_ptr<SharedMapping> memory,
                               std::shared_ptr<const Registration> registration,
                               uint32_t slot_count, WorkPool& pool, Done done, Idle idle)
    : memory_(std::move(memory)),
      registration_(std::move(registration)),
      pool_(pool),
      done_(std::move(done)),
      idle_(std::move(idle)),
      pending_(slot_count),
      epoch_(slot_count) {}

void BlockChecksums::Add(const Request& request) {
  (request.look == Request::Look::kFirst ? first_looks_ : second_looks_).push_back(request);
  ++pending_[request.slot];
  StartJobs();
}

void BlockChecksums::Cancel(uint32_t slot) {
  const auto is_of_slot = [slot](const Request& request) { return request.slot == slot; };
  const size_t taken_back =
      std::erase_if(first_looks_, is_of_slot) + std::erase_if(second_looks_, is_of_slot);
  pending_[slot] -= static_cast<uint32_t>(taken_back);
  ++epoch_[slot];
}

void BlockChecksums::StartJobs() {
  while (jobs_in_flight_ < kJobsInFlightMax && !first_looks_.empty()) StartJob(first_looks_);
  while (jobs_in_flight_ < kJobsInFlightMax && second_jobs_in_flight_ < kSecondJobsInFlightMax &&
         !second_looks_.empty()) {
    ++second_jobs_in_flight_;
    StartJob(second_looks_);
  }
}

void BlockChecksums::StartJob(std::deque<Request>& queue) {
  const uint64_t block_bytes = registration_->block_bytes();
  const size_t count = std::min<size_t>(
      {queue.size(), std::max<size_t>(1, kJobBytesMax / block_bytes), kJobRequestsMax});
  auto job = std::make_shared<Job>();
  for (size_t i = 0; i < count; ++i) {
    job->requests.push_back(queue.front());
    job->epochs.push_back(epoch_[queue.front().slot]);
    queue.pop_front();
  }
  ++jobs_in_flight_;
  pool_.Run(
      [memory = memory_, registration = registration_, block_bytes, job] {
        for (const Request& request : job->requests) {
          const std::span<const std::byte> bytes =
              memory->bytes().subspan(request.memory_block * block_bytes, block_bytes);
          const uint64_t offset_bytes = request.block * block_bytes;
          Found& found = job->found.emplace_back();
          if (request.look == Request::Look::kSecond) {
            found.crc32c = SumBytes(registration->fingerprints(), offset_bytes, bytes, found.parts);
          } else if (registration->replicas().replicas.empty()) {
            found.crc32c = Crc32c(bytes);
          } else {
            found.crc32c = SumBytes(registration->replica_sums(), offset_bytes, bytes, found.parts);
          }
        }
      },
      [this, alive = std::weak_ptr<bool>(alive_), job] {
        if (!alive.expired()) Finish(*job);
      });
}

void BlockChecksums::Finish(const Job& job) {
  --jobs_in_flight_;
  if (job.requests.front().look == Request::Look::kSecond) --second_jobs_in_flight_;
  for (const Request& request : job.requests) --pending_[request.slot];
  const std::weak_ptr<bool> alive = alive_;
  for (size_t i = 0; i < job.requests.size(); ++i) {
    const Request& request = job.requests[i];
    if (job.epochs[i] == epoch_[request.slot]) done_(request, job.found[i]);
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
