// holdfast monitor witnesses: asks them all now, and prints what they say and who could not be
// heard.

#include <CLI/CLI.hpp>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "cli/monitor_verbs.h"
#include "cli/output.h"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;

// RAS is looked at twice, and a helper may take its time.
constexpr absl::Duration kTimeout = absl::Seconds(20);

void PrintJob(const ordered_json& job) {
  std::printf("job %s\n", Printable(job.value("job", "")).c_str());
  for (const ordered_json& witness : job.value("witnesses", ordered_json::array())) {
    std::printf("  %-16s %-6s %s\n", Printable(witness.value("source", "")).c_str(),
                witness.value("heard", false) ? "heard" : "absent",
                Printable(witness.value("why", "")).c_str());
  }
  for (const ordered_json& said : job.value("testimonies", ordered_json::array())) {
    std::printf("  %s: %s (certainty %.2f)\n", Printable(said.value("source", "")).c_str(),
                Printable(said.value("sentence", "")).c_str(), said.value("certainty", 0.0));
  }
}

}  // namespace

void AddMonitorWitnesses(CLI::App& monitor, Invocation& invocation) {
  CLI::App* verb = monitor.add_subcommand(
      "witnesses",
      "Ask Flight Recorder, stacks, RAS, NVML now; say what they say and who is absent");
  const std::shared_ptr<MonitorOptions> options = AddMonitorOptions(*verb);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      const absl::StatusOr<std::string> text = QueryWitnesses(options->socket, kTimeout);
      if (!text.ok()) return Report(text.status());
      const absl::StatusOr<ordered_json> answer = ParseAnswer(*text);
      if (!answer.ok()) return Report(answer.status());
      ordered_json jobs = ordered_json::array();
      for (const ordered_json& job : answer->value("jobs", ordered_json::array())) {
        if (options->job.empty() || job.value("job", "") == options->job) jobs.push_back(job);
      }
      if (!options->job.empty() && jobs.empty()) {
        return Report(absl::NotFoundError(
            absl::StrFormat("no process of job %s is known to the agent", options->job)));
      }
      if (invocation.json) {
        std::printf("%s\n", JsonText({{"schema_version", 1}, {"jobs", jobs}}).c_str());
        return kExitOk;
      }
      if (jobs.empty()) std::printf("no process of a job is known to the agent\n");
      for (const ordered_json& job : jobs) PrintJob(job);
      return kExitOk;
    };
  });
}

}  // namespace holdfast::cli
