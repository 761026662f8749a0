// holdfast preflight: one process per node measures the nodes and the paths between them before a
// job, and rank 0 names the odd ones out (docs/PREFLIGHT.md).

#include "preflight/preflight.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "cli/number_range.h"
#include "cli/output.h"
#include "cli/process.h"
#include "cli/verb.h"
#include "preflight/odd.h"

namespace holdfast::cli {
namespace {

using preflight::NodeMeasurements;
using preflight::NodeMetric;
using preflight::PairMeasurements;
using preflight::PairMetric;

constexpr char kPreflightExitCodesHelp[] =
    "Exit codes, the same on every node: 0 nothing odd, 1 odd ones found, 75 could not be done (a\n"
    "node is missing, was lost or was turned away). 2 on a node alone: it was started wrongly.\n"
    "Variables: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (torchrun sets them; the first two "
    "also\n"
    "from srun), HOLDFAST_PREFLIGHT_TOKEN (a random text, the same on all nodes).";

struct Options {
  preflight::RunOptions run;
  double seconds = absl::ToDoubleSeconds(preflight::RunOptions().measure_for);
  double join_seconds = absl::ToDoubleSeconds(preflight::RunOptions().join_within);
};

const char* OutcomeText(preflight::Outcome outcome) {
  switch (outcome) {
    case preflight::Outcome::kFine:
      return "fine";
    case preflight::Outcome::kOdd:
      return "odd";
    case preflight::Outcome::kFailed:
      return "failed";
  }
  return "";
}

ExitCode OutcomeExitCode(preflight::Outcome outcome) {
  switch (outcome) {
    case preflight::Outcome::kFine:
      return kExitOk;
    case preflight::Outcome::kOdd:
      return kExitOdd;
    case preflight::Outcome::kFailed:
      return kExitRetry;
  }
  return kExitRetry;
}

// ---- For people ----

std::string Cell(const preflight::MetricRule& rule, const std::optional<double>& value) {
  return value.has_value() ? preflight::ValueText(rule.unit, *value) : "-";
}

void PrintNodes(const std::vector<NodeMeasurements>& nodes) {
  std::printf("%5s  %-20s %5s", "rank", "host", "CPUs");
  for (size_t metric = 0; metric < preflight::kNodeMetricCount; ++metric) {
    std::printf(" %13s", RuleOf(static_cast<NodeMetric>(metric)).text);
  }
  std::printf(" %22s\n", "clock off by");
  for (size_t rank = 0; rank < nodes.size(); ++rank) {
    const NodeMeasurements& node = nodes[rank];
    std::printf("%5zu  %-20s %5u", rank, Printable(node.host).c_str(), node.cpu_count);
    for (size_t metric = 0; metric < preflight::kNodeMetricCount; ++metric) {
      std::printf(" %13s",
                  Cell(RuleOf(static_cast<NodeMetric>(metric)), node.values[metric]).c_str());
    }
    std::printf(" %22s\n", absl::StrFormat("%+.6f s +-%.6f", node.clock_offset_seconds,
                                           node.clock_offset_error_seconds)
                               .c_str());
  }
}

void PrintPairs(const std::vector<PairMeasurements>& pairs) {
  if (pairs.empty()) return;
  const auto rate = [](double value) {
    return preflight::ValueText(preflight::Unit::kBytesPerSecond, value);
  };
  const auto time = [](double value) {
    return preflight::ValueText(preflight::Unit::kSeconds, value);
  };
  std::printf("\n%5s %5s %5s %12s %12s %12s %12s %11s %11s\n", "round", "a", "b", "a to b",
              "b to a", "a to b, both", "b to a, both", "round trip", "99%");
  for (const PairMeasurements& pair : pairs) {
    std::printf("%5u %5u %5u", pair.round + 1, pair.a, pair.b);
    if (!pair.error.empty()) {
      std::printf(" %s\n", Printable(pair.error).c_str());
      continue;
    }
    std::printf(" %12s %12s %12s %12s %11s %11s\n", rate(pair.one_way[0]).c_str(),
                rate(pair.one_way[1]).c_str(), rate(pair.both_ways[0]).c_str(),
                rate(pair.both_ways[1]).c_str(), time(pair.round_trip_seconds).c_str(),
                time(pair.round_trip_p99_seconds).c_str());
  }
}

void PrintText(const preflight::Report& report) {
  if (report.outcome != preflight::Outcome::kFailed) {
    PrintNodes(report.job.nodes);
    PrintPairs(report.job.pairs);
    std::printf("\n");
  }
  for (const preflight::Finding& finding : report.findings) {
    std::printf("%s\n", Printable(Sentence(finding, report.job)).c_str());
  }
  for (const preflight::Refusal& refusal : report.refusals) {
    std::printf("turned away: somebody at %s, %u times: %s\n", Printable(refusal.address).c_str(),
                refusal.count, Printable(refusal.reason).c_str());
  }
  const size_t node_count = report.job.nodes.size();
  if (report.outcome == preflight::Outcome::kFine) {
    std::printf("nothing odd among %zu nodes%s\n", node_count,
                node_count == 1 ? ": with one there is nothing to compare" : "");
  }
}

// ---- JSON ----

nlohmann::ordered_json ToJson(const preflight::Report& report) {
  nlohmann::ordered_json output = {{"schema_version", 1},
                                   {"outcome", OutcomeText(report.outcome)},
                                   {"failure", report.failure},
                                   {"missing_ranks", report.missing},
                                   {"findings", nlohmann::ordered_json::array()},
                                   {"nodes", nlohmann::ordered_json::array()},
                                   {"pairs", nlohmann::ordered_json::array()},
                                   {"turned_away_count", report.refusal_count},
                                   {"turned_away", nlohmann::ordered_json::array()}};
  for (const preflight::Finding& finding : report.findings) {
    nlohmann::ordered_json evidence = nlohmann::ordered_json::array();
    for (const preflight::Evidence& one : finding.evidence) {
      evidence.push_back({{"metric", one.metric}, {"text", one.text}});
    }
    output["findings"].push_back({{"subject", Name(finding.subject)},
                                  {"ranks", finding.ranks},
                                  {"text", Sentence(finding, report.job)},
                                  {"evidence", std::move(evidence)}});
  }
  for (size_t rank = 0; rank < report.job.nodes.size(); ++rank) {
    const NodeMeasurements& node = report.job.nodes[rank];
    nlohmann::ordered_json object = {{"rank", rank},
                                     {"host", node.host},
                                     {"address", node.address},
                                     {"cpu_count", node.cpu_count}};
    for (size_t metric = 0; metric < preflight::kNodeMetricCount; ++metric) {
      if (!node.values[metric].has_value()) continue;
      object[RuleOf(static_cast<NodeMetric>(metric)).name] = *node.values[metric];
    }
    object["disk"] = node.disk;
    object["disk_error"] = node.disk_error;
    object["clock_offset_seconds"] = node.clock_offset_seconds;
    object["clock_offset_error_seconds"] = node.clock_offset_error_seconds;
    object["clock_step_seconds"] = node.clock_step_seconds;
    output["nodes"].push_back(std::move(object));
  }
  for (const PairMeasurements& pair : report.job.pairs) {
    output["pairs"].push_back(
        {{"round", pair.round},
         {"ranks", {pair.a, pair.b}},
         {"error", pair.error},
         {RuleOf(PairMetric::kOneWay).name, pair.one_way},
         {RuleOf(PairMetric::kBothWays).name, pair.both_ways},
         {RuleOf(PairMetric::kRoundTrip).name, pair.round_trip_seconds},
         {RuleOf(PairMetric::kRoundTripP99).name, pair.round_trip_p99_seconds}});
  }
  for (const preflight::Refusal& refusal : report.refusals) {
    output["turned_away"].push_back(
        {{"address", refusal.address}, {"count", refusal.count}, {"reason", refusal.reason}});
  }
  return output;
}

ExitCode Run(Invocation& invocation, Options& options) {
  const absl::StatusOr<preflight::Place> place =
      preflight::ReadPlace([](const char* name) -> const char* { return std::getenv(name); });
  if (!place.ok()) return Report(place.status());
  RaiseOpenFilesLimit();  // rank 0 holds a connection to every node
  options.run.measure_for = absl::Seconds(options.seconds);
  options.run.join_within = absl::Seconds(options.join_seconds);
  if (!invocation.no_progress) {
    options.run.progress = [](const std::string& line) {
      std::fprintf(stderr, "preflight: %s\n", Printable(line).c_str());
    };
  }
  const absl::StatusOr<preflight::Result> result =
      preflight::RunPreflight(invocation.file_system, *place, options.run);
  if (!result.ok()) return Report(result.status());
  if (result->ending.outcome == preflight::Outcome::kFailed) {
    std::fprintf(stderr, "holdfast: preflight could not be done: %s\n",
                 Printable(result->ending.text).c_str());
  }
  if (result->report.has_value()) {
    if (invocation.json) {
      std::printf("%s\n", JsonText(ToJson(*result->report)).c_str());
    } else {
      PrintText(*result->report);
    }
  }
  return OutcomeExitCode(result->ending.outcome);
}

}  // namespace

void AddPreflight(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand(
      "preflight", "Measure nodes and the paths between them, name the odd ones");
  auto options = std::make_shared<Options>();
  verb->add_option("--directory", options->run.disk_directory,
                   "Where each node measures its disk; without it none is measured");
  verb->add_option("--seconds", options->seconds,
                   "Of all measuring together; rank 0 decides for all")
      ->capture_default_str()
      ->check(NumberRange(absl::ToDoubleSeconds(preflight::kMeasureForMin),
                          absl::ToDoubleSeconds(preflight::kMeasureForMax)));
  verb->add_option("--join-seconds", options->join_seconds, "How long to wait for all nodes")
      ->capture_default_str()
      ->check(NumberRange(1.0, 3600.0));
  verb->add_option("--slow-ratio", options->run.slow_ratio,
                   "Worse than the job's median by less than this is never odd")
      ->capture_default_str()
      ->check(CLI::Range(1.05, 1e6));
  verb->footer(kPreflightExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.failure = kExitRetry;
    invocation.run = [&invocation, options] { return Run(invocation, *options); };
  });
}

}  // namespace holdfast::cli
