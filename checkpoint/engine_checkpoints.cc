// EngineImpl: what a job has to begin from, and what the next attempt is told to.
#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/catalog.h"
#include "checkpoint/engine_impl.h"
#include "checkpoint/job.h"

namespace holdfast {

void EngineImpl::SetRestoreOrder(const std::string& job, std::optional<RestoreOrder> order) {
  if (const auto known = jobs_.find(job); known != jobs_.end()) {
    known->second->SetRestoreOrder(order);
  }
  // For a Job that is made later.
  if (order.has_value()) {
    restore_orders_[job] = *std::move(order);
  } else {
    restore_orders_.erase(job);
  }
}

void EngineImpl::ReadCheckpoints(
    const std::string& job,
    std::function<void(absl::StatusOr<std::vector<KnownCheckpoint>>)> done) {
  auto catalog = std::make_shared<absl::StatusOr<Catalog>>(absl::UnknownError("not read"));
  world_.pool.Run(
      [catalog, file_system = &world_.file_system, root = options_.root, job] {
        *catalog = ReadCatalog(*file_system, root, job);
      },
      [this, alive = std::weak_ptr<bool>(alive_), catalog, job, done = std::move(done)] {
        if (alive.expired()) return;
        if (!catalog->ok() && catalog->status().code() != absl::StatusCode::kNotFound) {
          done(catalog->status());
          return;
        }
        done(KnownCheckpoints(job, catalog->ok() ? **catalog : Catalog()));
      });
}

std::vector<Engine::KnownCheckpoint> EngineImpl::KnownCheckpoints(const std::string& name,
                                                                  const Catalog& catalog) const {
  std::map<CheckpointId, KnownCheckpoint> known;
  for (const CatalogEntry& entry : catalog.entries) {
    if (entry.state != CatalogEntry::State::kCommitted || entry.branch != Branch::kCurrent)
      continue;
    known[entry.id] = {.id = entry.id, .on_storage = true, .marked_bad = !entry.bad_marks.empty()};
  }
  if (const auto job = jobs_.find(name); job != jobs_.end()) {
    for (const auto& [id, group] : job->second->groups().groups()) {
      if (!group.sealed) continue;
      const CatalogEntry* const entry = catalog.Find(id);
      KnownCheckpoint& one = known[id];
      one.id = id;
      one.in_memory = true;
      one.marked_bad = entry != nullptr && !entry->bad_marks.empty();
    }
    // Committed while the catalog was read: its directory was not there yet, or had no manifest.
    // Others that are not there any more were removed.
    for (const CheckpointId id : job->second->committed()) {
      const CatalogEntry* const entry = catalog.Find(id);
      const bool is_new = entry == nullptr
                              ? !catalog.entries.empty() && catalog.entries.back().id < id
                              : entry->state == CatalogEntry::State::kIncomplete;
      if (!is_new) continue;
      known[id].id = id;
      known[id].on_storage = true;
    }
  }
  std::vector<KnownCheckpoint> newest;
  for (const auto& [id, one] : known) newest.push_back(one);
  const size_t more = newest.size() - std::min(newest.size(), kKnownCheckpointsMax);
  newest.erase(newest.begin(), newest.begin() + static_cast<std::ptrdiff_t>(more));
  return newest;
}

}  // namespace holdfast
