// JobSupervisor: what is observed of a job besides the ends of its ranks and what they tell the
// engine: silence, how much the monitor sees, faults of GPUs.
#include <string>
#include <vector>

#include "agent/run/job_supervisor.h"
#include "agent/run/monitor_told.h"
#include "agent/run/process_tree.h"

namespace holdfast {

void JobSupervisor::LookForSilence(const std::vector<Engine::RankProgress>& ranks,
                                   absl::Duration now) {
  if (stops_) return;  // whoever was told to end need not go on
  const bool works = engine_pause_.Holds(
      world_.engine.ActivityOf(spec_.job, AttemptKeyOf(spec_, group_launch_)), now);
  for (const SilenceWatch::Said& said : silence_.Look(
           now, OpenRanks(ranks),
           works ? SilenceWatch::Engine::kWorks : SilenceWatch::Engine::kIdle, MonitorOf(sight_))) {
    Say(SentenceOf(said));
    Take(ToldOf(said, group_launch_));
  }
}

void JobSupervisor::TakeSight(const monitor::Sight& sight) {
  const recovery::Sight seen = SightOf(sight);
  if (sight_ == seen) return;
  sight_ = seen;
  Take(recovery::SightChanged{seen});
}

void JobSupervisor::TakeXid(const XidSighting& sighting) {
  const std::vector<recovery::Gpu>& gpus = history_.placement.gpus;
  if (sighting.xid.process > 0) {
    for (const auto& [rank, started] : started_processes_) {
      const auto process = static_cast<pid_t>(sighting.xid.process);
      if (rank >= gpus.size() || (process != started && !IsDescendant(process, started))) continue;
      return Take(recovery::XidSeen{gpus[rank], sighting.xid.code});
    }
  }
  if (!sighting.gpu_index.has_value()) return;
  // By UUID the job's GPUs have no number that NVML knows.
  for (const recovery::Gpu& gpu : history_.gpus) {
    if (!spec_.gpus.empty() && gpu.uuid.empty() && gpu.node == node_ &&
        gpu.index == *sighting.gpu_index) {
      return Take(recovery::XidSeen{gpu, sighting.xid.code});
    }
  }
}

}  // namespace holdfast
