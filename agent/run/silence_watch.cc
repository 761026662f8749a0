#include "agent/run/silence_watch.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/monitor/sections.h"
#include "agent/recovery/text.h"

namespace holdfast {
namespace {

bool IsPause(const std::string& section) {
  const monitor::SectionKind kind = SectionKindOf(section);
  return kind != monitor::SectionKind::kCompute && kind != monitor::SectionKind::kData;
}

}  // namespace

void SilenceWatch::Learned::Add(absl::Duration silence) {
  longest = std::max(longest, silence);
  ++seen;
}

// As if it had not passed.
void SilenceWatch::Forgive(absl::Duration passed) {
  for (auto& [rank, state] : ranks_) {
    state.since += passed;
    for (Section& section : state.sections) section.since += passed;
  }
}

// Whether a pause has ended.
bool SilenceWatch::TakeSections(State& state, const Rank& rank, absl::Duration now) {
  bool has_ended = false;
  size_t same = 0;
  while (same < state.sections.size() && same < rank.sections.size() &&
         state.sections[same].name == rank.sections[same]) {
    ++same;
  }
  for (size_t level = same; level < state.sections.size(); ++level) {
    const Section& over = state.sections[level];
    if (!IsPause(over.name)) continue;
    has_ended = true;
    if (pauses_.size() < kNamesMax || pauses_.contains(over.name)) {
      pauses_[over.name].Add(now - over.since);
    }
  }
  state.sections.resize(same);
  for (size_t level = same; level < rank.sections.size(); ++level) {
    state.sections.push_back({rank.sections[level], now});
  }
  return has_ended;
}

SilenceWatch::Timeout SilenceWatch::TimeoutOf(const std::string& section,
                                              const Learned& learned) const {
  const absl::Duration beyond =
      std::min(thresholds_.section_timeout, learned.longest * thresholds_.busy_factor);
  return {section, std::max(configured_, beyond) + patience_, learned.longest, learned.seen,
          beyond > configured_};
}

SilenceWatch::Timeout SilenceWatch::OfHeartbeat() const { return TimeoutOf("", heartbeats_); }

SilenceWatch::Timeout SilenceWatch::OfPause(const std::string& name) const {
  if (const auto known = pauses_.find(name); known != pauses_.end()) {
    return TimeoutOf(name, known->second);
  }
  return {name, std::max(configured_, thresholds_.section_timeout) + patience_,
          absl::ZeroDuration(), 0, false};
}

std::vector<SilenceWatch::Said> SilenceWatch::Look(absl::Duration now,
                                                   const std::vector<Rank>& ranks, Engine engine,
                                                   Monitor monitor) {
  patience_ = monitor == Monitor::kSees ? kMonitorFirst : absl::ZeroDuration();
  const absl::Duration passed = now - looked_.value_or(now);
  looked_ = now;
  if (engine == Engine::kWorks || passed > thresholds_.receiver_gap_max) Forgive(passed);
  std::vector<Said> said;
  for (const Rank& rank : ranks) {
    if (TakeSigns(rank, now)) said.push_back({rank.rank, false, "", {}, {}});
  }
  if (!said.empty()) ForgiveFollowers(ranks, now, said);
  // Once all that they have said is known.
  for (const Rank& rank : ranks) {
    State& state = ranks_.at(rank.rank);
    std::optional<Said> late = LatenessOf(rank.rank, state, now);
    if (!late.has_value()) continue;
    state.is_late = true;
    for (const Rank& other : ranks) {
      State& its = ranks_.at(other.rank);
      if (its.is_late || now - its.last_sign() < late->silent / 2) continue;
      its.is_late = true;
      late->with.push_back(other.rank);
    }
    said.push_back(*std::move(late));
  }
  return said;
}

// Whoever was late only with one that is there again is not late by itself.
void SilenceWatch::ForgiveFollowers(const std::vector<Rank>& ranks, absl::Duration now,
                                    std::vector<Said>& said) {
  for (const Rank& rank : ranks) {
    State& state = ranks_.at(rank.rank);
    if (!std::exchange(state.is_late, false)) continue;
    state.is_late = LatenessOf(rank.rank, state, now).has_value();
    if (!state.is_late) said.push_back({rank.rank, false, "", {}, {}});
  }
}

// Whether one that was late is there again.
bool SilenceWatch::TakeSigns(const Rank& rank, absl::Duration now) {
  const auto [at, is_new] = ranks_.try_emplace(rank.rank);
  State& state = at->second;
  if (is_new) {
    state.heartbeat_count = rank.heartbeat_count;
    state.since = now;
  }
  bool has_come = false;
  if (TakeSections(state, rank, now)) {
    state.since = now;
    has_come = true;
  }
  const bool pauses = PauseOf(state) != nullptr;
  if (rank.heartbeat_count != state.heartbeat_count) {
    // How long the first step takes says nothing of the others.
    const bool counts = state.is_clean && !pauses && state.heartbeat_count >= 2;
    if (counts) heartbeats_.Add(now - state.since);
    state.heartbeat_count = rank.heartbeat_count;
    state.since = now;
    state.is_clean = true;
    has_come = true;
  }
  if (pauses) state.is_clean = false;
  return has_come && std::exchange(state.is_late, false);
}

std::optional<SilenceWatch::Said> SilenceWatch::LatenessOf(uint32_t rank, const State& state,
                                                           absl::Duration now) const {
  if (state.heartbeat_count < 2 || state.is_late) return std::nullopt;
  const Section* const pause = PauseOf(state);
  const absl::Duration since = pause != nullptr ? std::max(pause->since, state.since) : state.since;
  const Timeout timeout = pause != nullptr ? OfPause(pause->name) : OfHeartbeat();
  if (now - since < timeout.timeout) return std::nullopt;
  return Said{rank, true, timeout.section, now - since, timeout.timeout};
}

// The outermost; null: none.
const SilenceWatch::Section* SilenceWatch::PauseOf(const State& state) {
  const auto pause = std::find_if(state.sections.begin(), state.sections.end(),
                                  [](const Section& section) { return IsPause(section.name); });
  return pause == state.sections.end() ? nullptr : &*pause;
}

absl::Duration SilenceWatch::State::last_sign() const {
  return sections.empty() ? since : std::max(since, sections.back().since);
}

std::vector<SilenceWatch::Timeout> SilenceWatch::timeouts() const {
  std::vector<Timeout> all = {OfHeartbeat()};
  for (const auto& [name, learned] : pauses_) all.push_back(OfPause(name));
  return all;
}

std::vector<SilenceWatch::Rank> OpenRanks(const std::vector<Engine::RankProgress>& ranks) {
  std::vector<SilenceWatch::Rank> open;
  for (const Engine::RankProgress& rank : ranks) {
    if (rank.is_open) open.push_back({Value(rank.rank), rank.heartbeat_count, rank.sections});
  }
  return open;
}

std::string SentenceOf(const SilenceWatch::Said& said) {
  if (!said.is_late) return absl::StrFormat("rank %d is there again", said.rank);
  std::string others;
  if (!said.with.empty()) {
    constexpr size_t kNamedMax = 8;
    const size_t named = std::min(said.with.size(), kNamedMax);
    others = absl::StrFormat(
        ", and as long rank%s %s%s", said.with.size() == 1 ? "" : "s",
        absl::StrJoin(said.with.begin(), said.with.begin() + static_cast<ptrdiff_t>(named), ", "),
        named < said.with.size() ? ", ..." : "");
  }
  return absl::StrFormat(
      "rank %d has been silent for %s%s, beyond the time-out of %s%s", said.rank,
      recovery::DurationText(said.silent),
      said.section.empty() ? "" : absl::StrCat(" in section \"", said.section, "\""),
      recovery::DurationText(said.timeout), others);
}

}  // namespace holdfast
