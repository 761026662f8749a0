// JobSupervisor: what is observed of a job besides the ends of its ranks and what they tell the
// engine: silence, how much the monitor sees, faults of GPUs.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/text.h"
#include "agent/run/job_supervisor.h"
#include "agent/run/process_tree.h"

namespace holdfast {
namespace {

recovery::Sight SightOf(const monitor::Sight& sight) {
  if (sight.IsWhole()) return recovery::Sight::kWhole;
  return sight.ranks_reporting == 0 ? recovery::Sight::kBlind : recovery::Sight::kPartial;
}

}  // namespace

void JobSupervisor::LookForSilence(const std::vector<Engine::RankProgress>& ranks,
                                   absl::Duration now) {
  if (stops_) return;  // whoever was told to end need not go on
  const bool works = engine_pause_.Holds(
      world_.engine.ActivityOf(spec_.job, AttemptKeyOf(spec_, group_launch_)), now);
  const bool is_seen = sight_.has_value() && *sight_ != recovery::Sight::kBlind;
  std::vector<SilenceWatch::Rank> open;
  for (const Engine::RankProgress& rank : ranks) {
    if (rank.is_open) open.push_back({Value(rank.rank), rank.heartbeat_count, rank.sections});
  }
  for (const SilenceWatch::Said& said :
       silence_.Look(now, open, works ? SilenceWatch::Engine::kWorks : SilenceWatch::Engine::kIdle,
                     is_seen ? SilenceWatch::Monitor::kSees : SilenceWatch::Monitor::kBlind)) {
    if (!said.is_late) {
      Say(absl::StrFormat("rank %d is there again", said.rank));
      Take(recovery::RankBeats{group_launch_, Rank{said.rank}});
      continue;
    }
    Say(absl::StrFormat(
        "rank %d has been silent for %s%s, beyond the time-out of %s", said.rank,
        recovery::DurationText(said.silent),
        said.section.empty() ? "" : absl::StrCat(" in section \"", said.section, "\""),
        recovery::DurationText(said.timeout)));
    Take(recovery::RankTimedOut{group_launch_, Rank{said.rank}, said.section, said.silent,
                                said.timeout});
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
    for (const auto& [rank, known] : known_) {
      if (known.process_id == 0 || rank >= gpus.size()) continue;
      const auto process = static_cast<pid_t>(sighting.xid.process);
      if (process != known.process_id && !IsDescendant(process, known.process_id)) continue;
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
