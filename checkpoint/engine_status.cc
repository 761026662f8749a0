// Engine::StatusJson. Keys: docs/OPERATING.md.
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/engine_impl.h"
#include "checkpoint/save_groups.h"

namespace holdfast {
namespace {

using nlohmann::json;

// An id of 64 bits does not fit into every reader's numbers.
std::string SessionText(SessionId id) { return std::to_string(static_cast<uint64_t>(id)); }

json CheckpointJson(CheckpointId id) {
  return {{"attempt", Value(id.attempt)}, {"step", Value(id.step)}};
}

json RestorePointJson(const RestorePoint& point) {
  if (point.is_beginning()) return json();
  if (!point.foreign.has_value()) return CheckpointJson(*point.checkpoint);
  json value = CheckpointJson(point.foreign->checkpoint);
  value["job"] = point.foreign->job;
  value["uuid"] = point.foreign->job_uuid;
  value["directory"] = point.foreign->directory;
  return value;
}

json ImageJson(const RankImages::Counters& image) {
  json value = {{"slot", image.id.slot_index},
                {"generation", image.id.generation},
                {"state", image.state},
                {"blocks", image.block_count},
                {"blocks_captured", image.blocks_captured},
                {"blocks_checksummed", image.blocks_checksummed},
                {"blocks_flushed", image.blocks_flushed}};
  if (image.state != "granted") value["step"] = Value(image.checkpoint.step);
  if (!image.void_reason.empty()) value["void_reason"] = image.void_reason;
  return value;
}

json GroupJson(const SaveGroup& group) {
  size_t sealed = 0;
  size_t durable = 0;
  for (const auto& [rank, member] : group.members) {
    sealed += member.sealed.has_value() ? 1 : 0;
    durable += member.durable_path.empty() ? 0 : 1;
  }
  json value = CheckpointJson(group.id);
  value["state"] = PhaseName(group);
  value["ranks"] = group.world_size;
  value["ranks_begun"] = group.members.size();
  value["ranks_sealed"] = sealed;
  value["ranks_durable"] = durable;
  value["in_memory"] = group.sealed;
  value["readers"] = group.reader_count;
  if (!group.failure.ok()) value["failure"] = std::string(group.failure.message());
  return value;
}

json JobJson(const Job& job) {
  json attempts = json::array();
  for (const Job::AttemptView& view : job.attempts()) {
    json attempt = {{"attempt", Value(view.record.attempt)},
                    {"key", view.record.key},
                    {"world_size", view.record.world_size},
                    {"newest", view.newest}};
    if (view.restore_point.has_value()) {
      attempt["restore_point"] = RestorePointJson(*view.restore_point);
    }
    if (!view.record.restore_from.empty()) {
      attempt["restore_from"] = view.record.restore_from;
      if (view.restore_point.has_value()) {
        attempt["restore_from_used"] = view.restore_point->foreign.has_value();
      }
    }
    attempts.push_back(std::move(attempt));
  }
  json groups = json::array();
  for (const auto& [id, group] : job.groups().groups()) groups.push_back(GroupJson(group));
  json value = {
      {"job", job.name()},
      {"uuid", job.uuid()},
      {"attempts", std::move(attempts)},
      {"saves", std::move(groups)},
      {"warnings", std::vector<std::string>(job.warnings().begin(), job.warnings().end())}};
  value["newest_committed"] =
      job.committed().empty() ? json() : CheckpointJson(*job.committed().rbegin());
  return value;
}

}  // namespace

std::string EngineImpl::StatusJson() const {
  json jobs = json::array();
  for (const auto& [name, job] : jobs_) jobs.push_back(JobJson(*job));
  json sessions = json::array();
  // Memories are shared by the sessions of a rank: each counts once.
  std::set<const RankMemory*> memories;
  for (const auto& [id, entry] : sessions_) {
    const Session& session = *entry.session;
    const SessionIdentity& identity = session.identity();
    json images = json::array();
    for (const RankImages::Counters& image : session.counters()) images.push_back(ImageJson(image));
    sessions.push_back({{"session", SessionText(id)},
                        {"job", identity.job},
                        {"attempt", Value(identity.attempt)},
                        {"rank", Value(identity.rank)},
                        {"node", identity.node},
                        {"pid", identity.process_id},
                        {"registration", session.current_registration_id()},
                        {"open", session.is_open()},
                        {"closed", session.is_closed()},
                        {"dead", session.is_process_dead()},
                        {"fenced", session.is_fenced()},
                        {"restoring", !entry.restores.empty() && !entry.restores.back()->is_over()},
                        {"images", std::move(images)}});
    if (const RankMemory* memory = session.memory(session.current_registration_id())) {
      memories.insert(memory);
    }
  }
  json ranks = json::array();
  for (const RankMemory* memory : memories) {
    const BlockPool& pool = memory->pool();
    ranks.push_back({{"memory", MemoryName(memory->id())},
                     {"blocks", pool.block_count()},
                     {"absent", pool.count(BlockState::kAbsent)},
                     {"free", pool.count(BlockState::kFree)},
                     {"granted", pool.count(BlockState::kGranted)},
                     {"image", pool.count(BlockState::kImage)},
                     {"quarantined", pool.count(BlockState::kQuarantined)},
                     {"staging", pool.count(BlockState::kStaging)}});
  }
  const json status = {{"root", options_.root},
                       {"block_bytes", options_.block_bytes},
                       {"jobs", std::move(jobs)},
                       {"sessions", std::move(sessions)},
                       {"memory",
                        {{"limit_bytes", budget_.bytes_max()},
                         {"used_bytes", budget_.used_bytes()},
                         {"free_bytes", budget_.free_bytes()},
                         {"rank_memories", std::move(ranks)}}},
                       {"warnings", warnings_}};
  return status.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
}

}  // namespace holdfast
