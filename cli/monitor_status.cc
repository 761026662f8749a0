// holdfast monitor status: jobs, how much of them is seen, communicators, open findings.

#include <CLI/CLI.hpp>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "cli/monitor_verbs.h"
#include "cli/output.h"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;

// Nodes that are late are named, so many at most.
constexpr int kLateNodesMax = 8;
constexpr double kLateSeconds = 4;
constexpr size_t kCommunicatorsMax = 12;

const char* LightText(const std::string& light) {
  if (light == "red") return "RED: there is a verdict";
  if (light == "yellow") return "YELLOW: something is suspected";
  if (light == "green") return "green: nothing found, and everything is seen";
  return "GREY: nothing found, but not everything is seen";
}

void PrintTopology(const ordered_json& job) {
  const ordered_json topology = job.value("topology", ordered_json::object());
  if (!topology.value("given", false)) {
    std::printf("  no topology file is given: NICs, rails and switches are unknown\n");
    return;
  }
  const int placed = topology.value("ranks_placed", 0);
  const int all = job["sight"].value("ranks", 0);
  if (placed == all) {
    std::printf("  the topology file has the NICs of all ranks\n");
  } else {
    std::printf(
        "  the topology file has the NICs of %d of %d ranks; the first that it has not, or that "
        "has "
        "not said its local rank: %d\n",
        placed, all,
        topology["first_left_out"].is_number() ? topology.value("first_left_out", 0) : 0);
  }
}

void PrintSight(const ordered_json& job) {
  const ordered_json& sight = job["sight"];
  std::printf(
      "  seen: %d of %d ranks report, %d of them with plugin or hook events; %llu records "
      "lost; the oldest report is %s old\n",
      sight.value("ranks_reporting", 0), sight.value("ranks", 0),
      sight.value("ranks_with_telemetry", 0),
      static_cast<unsigned long long>(sight.value("drops", uint64_t{0})),
      SecondsText(sight.value("oldest_report_seconds", 0.0)).c_str());
  int late = 0;
  for (const ordered_json& node : job["nodes"]) {
    const double age = node.value("last_report_seconds", 0.0);
    if (age < kLateSeconds) continue;
    if (++late > kLateNodesMax) continue;
    std::printf("  node %s has said nothing for %s\n",
                Printable(node.value("node", std::string())).c_str(), SecondsText(age).c_str());
  }
  if (late > kLateNodesMax) std::printf("  and %d more nodes\n", late - kLateNodesMax);
  if (!job.value("roles_known", false)) {
    std::printf(
        "  no layout with stages or tensor positions is registered: all ranks are compared "
        "with each other\n");
  }
  PrintTopology(job);
  if (job.value("reports_refused", 0) > 0) {
    std::printf("  %d reports could not be read (the last: %s)\n", job.value("reports_refused", 0),
                Printable(job.value("refused_because", std::string())).c_str());
  }
}

// Who could not be heard when it was asked; each source once.
void PrintUnheard(const ordered_json& job) {
  std::string last;
  for (const ordered_json& one : job.value("witnesses", ordered_json::array())) {
    const std::string source = one.value("source", std::string());
    if (one.value("heard", false) || source == last) continue;
    std::printf("  %s was not heard on %s: %s\n", Printable(source).c_str(),
                Printable(one.value("node", std::string())).c_str(),
                Printable(one.value("why", std::string())).c_str());
    last = source;
  }
}

void PrintCommunicators(const ordered_json& job) {
  const ordered_json& all = job["communicators"];
  size_t shown = 0;
  for (const ordered_json& one : all) {
    if (shown++ == kCommunicatorsMax) break;
    const int inside = one.value("ranks_inside", 0);
    std::printf("  communicator %s: %d ranks (%d seen), %llu operations finished",
                one.value("id", std::string()).c_str(), one.value("size", 0),
                one.value("ranks_seen", 0),
                static_cast<unsigned long long>(one.value("finished", uint64_t{0})));
    if (inside > 0) {
      std::printf("; %d ranks are inside one, without progress for up to %s", inside,
                  SecondsText(one.value("standing_seconds", 0.0)).c_str());
    }
    std::printf("\n");
  }
  const size_t more = all.size() - std::min(all.size(), kCommunicatorsMax) +
                      job.value("communicators_left_out", size_t{0});
  if (more > 0) std::printf("  and %zu more communicators (--json)\n", more);
}

void Print(const ordered_json& answer) {
  if (answer["jobs"].empty()) std::printf("No job reports to this agent.\n");
  for (const ordered_json& job : answer["jobs"]) {
    const std::string light = job.value("light", std::string());
    std::printf("%s  %s%s\n", JobText(job).c_str(), LightText(light),
                job.value("state", "") == "ended" ? "; the job has ended" : "");
    if (const int unseen = job.value("ranks_ended_unseen", 0); unseen > 0) {
      std::printf("  %d ranks are gone, and nobody has told how they ended\n", unseen);
    }
    for (const ordered_json& finding : job["findings"]) {
      std::printf("  %s %s: %s\n", finding.value("grade", std::string()).c_str(),
                  finding.value("id", std::string()).c_str(),
                  Printable(finding.value("sentence", std::string())).c_str());
    }
    for (const ordered_json& note : job["notes"]) {
      std::printf("  note: %s\n", Printable(note.value("sentence", std::string())).c_str());
    }
    PrintSight(job);
    PrintUnheard(job);
    PrintCommunicators(job);
  }
  const ordered_json& agent = answer["agent"];
  const auto count = [&](const char* key) { return agent.value(key, 0); };
  if (count("reports_dropped") > 0) {
    std::printf("agent: %d reports dropped (too many at once, or beyond the limits)\n",
                count("reports_dropped"));
  }
  if (count("store_failures") > 0) {
    std::printf("agent: findings could not be stored %d times: see its log\n",
                count("store_failures"));
  }
  if (count("subscribers_lost") > 0) {
    std::printf("agent: %d events lost by clients that were too slow\n", count("subscribers_lost"));
  }
  if (count("on_verdict_failures") + count("on_verdict_dropped") > 0) {
    std::printf("agent: on_verdict failed %d times and was not run %d times: see its log\n",
                count("on_verdict_failures"), count("on_verdict_dropped"));
  }
}

}  // namespace

void AddMonitorStatus(CLI::App& monitor, Invocation& invocation) {
  CLI::App* verb =
      monitor.add_subcommand("status", "Jobs, how much of them is seen, and what is found");
  auto options = AddMonitorOptions(*verb);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      const absl::StatusOr<ordered_json> answer =
          AskMonitor(options->socket, {abi::MonitorQueryKind::kStatus, options->job, "", 0});
      if (!answer.ok()) return Report(answer.status());
      if (invocation.json) {
        std::printf("%s\n", JsonText(*answer).c_str());
      } else {
        Print(*answer);
      }
      return kExitOk;
    };
  });
}

}  // namespace holdfast::cli
