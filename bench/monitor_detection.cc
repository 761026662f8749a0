// What the analysis finds in simulated jobs, class by class, and what baselines find on the same
// telemetry (our re-implementations: monitor_baselines.h).
//
//   bench_monitor_detection [RUNS [HOURS]]    runs of each class (20), simulated hours of clean
//   worlds (5)
//
// Every run has a seed, a culprit and a topology of its own, 1% of summaries lost and 1% late. A
// method names right if its first alarm after the onset has the culprit as its first suspect (a
// link: either end), wrong if it has somebody else. For the analysis alarms are verdicts. Prints a
// table and, as the last line, JSON.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "bench/monitor_baselines.h"
#include "monitor/analyzer.h"
#include "monitor/sim/catalogue.h"
#include "monitor/sim/world.h"

namespace holdfast::monitor {
namespace {

using sim::Fault;
using sim::FaultKind;
using sim::Traffic;
using sim::WorldOptions;

constexpr absl::Duration kLength = absl::Seconds(120);

struct FaultRow {
  const char* name;
  FaultKind kind;
  double factor;
  bool link = false;  // needs traffic in which a pair shows, and half of the rate costs
};

constexpr FaultRow kRows[] = {
    {"GPU hang", FaultKind::kGpuHang, 0},
    {"never enters", FaultKind::kNeverEnters, 0},
    {"killed, others hang", FaultKind::kKilled, 0},
    {"killed, others fail", FaultKind::kKilled, 2},
    {"stopped", FaultKind::kStopped, 0},
    {"node dies", FaultKind::kNodeDies, 0},
    {"wrong size", FaultKind::kWrongSize, 0},
    {"proxy starved", FaultKind::kStarvedProxy, 0},
    {"link cut", FaultKind::kLink, 0, true},
    {"sender cut", FaultKind::kSender, 0, true},
    {"link slow (rate x 0.5)", FaultKind::kLink, 0.5, true},
    {"sender slow (rate x 0.66)", FaultKind::kSender, 0.66, true},
    {"receiver slow (rate x 0.66)", FaultKind::kReceiver, 0.66, true},
    {"GPU slow (time x 1.5)", FaultKind::kSlowGpu, 1.5},
    {"data slow (half a step)", FaultKind::kSlowData, 0.5},
    {"proxy late (5 ms)", FaultKind::kStarvedProxy, 5, true},
};

struct Score {
  int runs = 0, right = 0, wrong = 0, unnamed = 0;
  std::vector<double> seconds;  // from onset to alarm, of the right and the unnamed ones
};

// Wilson's interval at 95%, in percent.
std::pair<double, double> Interval(int right, int runs) {
  constexpr double z = 1.96;
  if (runs == 0) return {0, 100};
  const double n = runs, p = right / n;
  const double middle = (p + z * z / (2 * n)) / (1 + z * z / n);
  const double half = z * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n);
  return {100 * std::max(0.0, middle - half), 100 * std::min(1.0, middle + half)};
}

double Quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
}

WorldOptions Topology(const FaultRow& row, uint32_t run) {
  WorldOptions options;
  options.seed = 50'000 + run;
  options.loss = 0.01;
  options.lateness = 0.01;
  options.clock_drift = 1e-4;
  options.compute_noise = 0.01 + 0.01 * (run % 5);
  // Where the class is about the wire: traffic whose bottleneck is the wire.
  constexpr Traffic kTraffic[] = {Traffic::kRing, Traffic::kTwoRings, Traffic::kAllToAll};
  options.traffic = row.link && row.factor > 0 && row.kind == FaultKind::kLink ? Traffic::kRing
                                                                               : kTraffic[run % 3];
  if (row.kind == FaultKind::kWrongSize)
    options.traffic = run % 2 == 0 ? Traffic::kRing : Traffic::kTwoRings;
  if (!row.link && run % 4 == 3) {
    options.traffic = Traffic::kRing;
    options.data_parallel = 4;
    options.stages = 3;
  }
  return options;
}

void Add(Score& score, const std::optional<Alarm>& alarm, const Fault& fault) {
  ++score.runs;
  if (!alarm.has_value()) return;
  const double seconds = absl::ToDoubleSeconds(alarm->at - fault.onset);
  if (alarm->suspects.empty()) {
    ++score.unnamed;
    score.seconds.push_back(seconds);
    return;
  }
  const bool link = fault.kind == FaultKind::kLink;
  const Rank first = alarm->suspects.front();
  if (first == Rank{fault.rank} || (link && first == Rank{fault.peer})) {
    ++score.right;
    score.seconds.push_back(seconds);
  } else {
    ++score.wrong;
  }
}

// The first verdict, or the first suspicion.
struct Heard {
  std::optional<Alarm> suspicion, verdict;
  void Take(absl::Duration now, const Analysis& analysis) {
    for (const Finding& finding : analysis.findings) {
      Alarm alarm{now, {}};
      for (const Suspect& suspect : finding.suspects) alarm.suspects.push_back(suspect.rank);
      // A ring shows a sick receiver as a connection: either of its ends is as right as can be.
      if (finding.scope == Scope::kConnection) {
        alarm.suspects.push_back(finding.suspects[0].peer);
      }
      if (!suspicion.has_value()) suspicion = alarm;
      if (!verdict.has_value() && finding.grade == Grade::kVerdict) verdict = alarm;
    }
  }
};

// A connection accuses both ends.
void AddConnection(Score& score, std::optional<Alarm> alarm, const Fault& fault) {
  if (alarm.has_value() && alarm->suspects.size() == 2 && alarm->suspects[1] == Rank{fault.rank}) {
    std::swap(alarm->suspects[0], alarm->suspects[1]);
  }
  Add(score, alarm, fault);
}

void RunOnce(const FaultRow& row, uint32_t run, std::map<std::string, Score>& scores) {
  WorldOptions options = Topology(row, run);
  const uint32_t ranks = options.data_parallel * options.stages * options.tensor;
  const uint32_t rank = run * 5 % ranks;
  options.faults = {sim::FaultOf(row.kind, rank, row.factor, (rank + 1) % ranks)};
  sim::World world(options);
  Analyzer analyzer(Thresholds{}, world.shape());
  std::vector<std::unique_ptr<Baseline>> baselines = MakeBaselines(world.shape());
  Heard heard;
  for (int second = 0; second < absl::ToInt64Seconds(kLength); ++second) {
    const Snapshot snapshot = world.Tick();
    heard.Take(snapshot.elapsed, analyzer.Step(snapshot));
    for (auto& baseline : baselines) baseline->Step(snapshot);
  }
  const Fault& fault = options.faults[0];
  AddConnection(scores["0 suspicion"], heard.suspicion, fault);
  AddConnection(scores["1 verdict"], heard.verdict, fault);
  for (size_t i = 0; i < baselines.size(); ++i) {
    Add(scores[absl::StrCat(i + 2, " ", baselines[i]->name())], baselines[i]->First(fault.onset),
        fault);
  }
}

std::string ScoreText(const Score& score) {
  const auto [low, high] = Interval(score.right, score.runs);
  return absl::StrFormat("%3.0f%% (%3.0f-%3.0f) %3d wrong %3d unnamed  %5.0f %5.0f s",
                         100.0 * score.right / std::max(1, score.runs), low, high, score.wrong,
                         score.unnamed, Quantile(score.seconds, 0.5), Quantile(score.seconds, 0.9));
}

std::string ScoreJson(const std::string& fault, const std::string& method, const Score& score) {
  const auto [low, high] = Interval(score.right, score.runs);
  return absl::StrFormat(
      R"({"class": "%s", "method": "%s", "runs": %d, "right": %d, "wrong": %d, "unnamed": %d, )"
      R"("right_percent_low": %.1f, "right_percent_high": %.1f, "p50_s": %.1f, "p90_s": %.1f})",
      fault, method, score.runs, score.right, score.wrong, score.unnamed, low, high,
      Quantile(score.seconds, 0.5), Quantile(score.seconds, 0.9));
}

// Findings, and alarms of the baselines, where nothing is wrong.
std::map<std::string, int> CleanHours(double hours, double* simulated) {
  const std::vector<sim::NamedWorld> worlds = sim::CleanWorlds(absl::Hours(hours));
  const absl::Duration each = absl::Hours(hours / static_cast<double>(worlds.size()));
  std::map<std::string, int> alarms = {{"0 suspicion", 0}, {"1 verdict", 0}};
  for (const sim::NamedWorld& world : sim::CleanWorlds(each)) {
    WorldOptions options = world.options;
    options.seed = 90'001;
    sim::World running(options);
    Analyzer analyzer(Thresholds{}, running.shape());
    std::vector<std::unique_ptr<Baseline>> baselines = MakeBaselines(running.shape());
    std::map<std::string, Grade> told;
    for (int second = 0; second < absl::ToInt64Seconds(each); ++second) {
      const Snapshot snapshot = running.Tick();
      for (const Finding& finding : analyzer.Step(snapshot).findings) {
        Grade& grade = told.try_emplace(finding.id, Grade::kSuspicion).first->second;
        grade = std::max(grade, finding.grade);
      }
      for (auto& baseline : baselines) baseline->Step(snapshot);
    }
    for (const auto& [id, grade] : told) {
      ++alarms["0 suspicion"];
      alarms["1 verdict"] += grade == Grade::kVerdict ? 1 : 0;
    }
    // A baseline counts once a world: how often it would repeat itself is not told.
    for (size_t i = 0; i < baselines.size(); ++i) {
      alarms[absl::StrCat(i + 2, " ", baselines[i]->name(), " (worlds)")] +=
          baselines[i]->First(absl::ZeroDuration()).has_value() ? 1 : 0;
    }
    *simulated += absl::ToDoubleHours(each);
  }
  return alarms;
}

// The mildest fault of which every run ends in a right verdict.
void PrintSmallest(const char* what, FaultKind kind, const std::vector<double>& factors, int runs) {
  for (const double factor : factors) {
    const FaultRow row{what, kind, factor, kind != FaultKind::kSlowGpu};
    std::map<std::string, Score> scores;
    for (int run = 0; run < runs; ++run) RunOnce(row, static_cast<uint32_t>(run), scores);
    const Score& verdict = scores["1 verdict"];
    if (verdict.right < verdict.runs) continue;
    std::printf("  %-20s x %.2f\n", what, factor);
    return;
  }
  std::printf("  %-20s none of those tried\n", what);
}

int Run(int runs, double hours) {
  std::string json;
  for (const FaultRow& row : kRows) {
    std::map<std::string, Score> scores;
    for (int run = 0; run < runs; ++run) RunOnce(row, static_cast<uint32_t>(run), scores);
    std::printf("%s\n", row.name);
    for (const auto& [method, score] : scores) {
      std::printf("  %-16s %s\n", method.c_str() + 2, ScoreText(score).c_str());
      absl::StrAppend(&json, json.empty() ? "" : ", ",
                      ScoreJson(row.name, method.substr(2), score));
    }
    std::fflush(stdout);
  }
  double simulated = 0;
  const std::map<std::string, int> alarms = CleanHours(hours, &simulated);
  std::printf("clean worlds, %.1f simulated hours\n", simulated);
  for (const auto& [method, count] : alarms) std::printf("  %-24s %d\n", method.c_str() + 2, count);
  std::printf("the mildest fault of which %d of %d runs end in a right verdict\n", runs, runs);
  PrintSmallest("GPU slow, time", FaultKind::kSlowGpu, {1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5},
                runs);
  PrintSmallest("sender slow, rate", FaultKind::kSender,
                {0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.66, 0.5}, runs);
  PrintSmallest("receiver slow, rate", FaultKind::kReceiver,
                {0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.66, 0.5}, runs);
  PrintSmallest("link slow, rate", FaultKind::kLink, {0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.66, 0.5},
                runs);
  std::printf(
      "{\"schema_version\": 1, \"clean_hours\": %.2f, \"false_suspicions\": %d, "
      "\"false_verdicts\": %d, \"rows\": [%s]}\n",
      simulated, alarms.at("0 suspicion"), alarms.at("1 verdict"), json.c_str());
  return 0;
}

}  // namespace
}  // namespace holdfast::monitor

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 20;
  const double hours = argc > 2 ? std::atof(argv[2]) : 5;
  if (runs < 1 || runs > 10'000 || hours <= 0 || hours > 10'000) {
    std::fprintf(stderr, "usage: bench_monitor_detection [RUNS 1..10000 [HOURS]]\n");
    return 2;
  }
  return holdfast::monitor::Run(runs, hours);
}
