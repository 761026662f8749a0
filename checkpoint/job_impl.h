// What job.cc, job_restore.cc and job_commit.cc share.
#ifndef HOLDFAST_CHECKPOINT_JOB_IMPL_H_
#define HOLDFAST_CHECKPOINT_JOB_IMPL_H_

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "checkpoint/job.h"

namespace holdfast {

// What the store and the root know of the job.
struct Job::Loaded {
  std::string uuid;
  std::optional<AttemptRecord> newest;
  std::optional<RestorePoint> restore_point;  // of the newest
  Catalog catalog;
};

// kFailedPrecondition: `root` holds another job of this name than the one of `uuid`, or none.
absl::Status CheckSameJob(FileSystem& file_system, const std::string& root, const std::string& job,
                          const std::string& uuid);

template <typename T>
void Job::OnPool(std::function<T()> work, std::function<void(T)> then) {
  const auto result = std::make_shared<std::optional<T>>();
  world_.pool.Run([work = std::move(work), result] { result->emplace(work()); },
                  [alive = std::weak_ptr<bool>(alive_), result, then = std::move(then)] {
                    if (!alive.expired()) then(*std::move(*result));
                  });
}

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_JOB_IMPL_H_
