// holdfast monitor verdicts and explain: what was found, and why.

#include <poll.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "cli/monitor_verbs.h"
#include "cli/output.h"
#include "monitor/finding_record.h"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;

void PrintList(const ordered_json& answer) {
  if (answer["findings"].empty()) {
    std::printf("Nothing has been found.\n");
    return;
  }
  std::printf("%-10s %-9s %-9s %-19s %s\n", "id", "grade", "state", "since (UTC)", "job: what");
  for (const ordered_json& finding : answer["findings"]) {
    std::printf("%s\n", FindingLine(finding).c_str());
  }
}

absl::Status PrintEvent(const AgentEvents::Event& event, bool json) {
  if (event.lost > 0) {
    std::fprintf(stderr, "holdfast: %llu changes were lost: this command was too slow\n",
                 static_cast<unsigned long long>(event.lost));
  }
  const absl::StatusOr<ordered_json> parsed = ParseAnswer(event.text);
  if (!parsed.ok()) return parsed.status();
  if (json) {
    std::printf("%s\n", monitor::OneLine(*parsed).c_str());
  } else {
    std::printf("%-9s %s\n", Printable(parsed->value("change", std::string())).c_str(),
                FindingLine((*parsed)["finding"]).c_str());
  }
  // A pipe behind us shall see it now.
  if (std::fflush(stdout) != 0) return absl::UnavailableError("standard output is closed");
  return absl::OkStatus();
}

// First what is there, then every change; with --json one object a line.
absl::Status Follow(const MonitorOptions& options, bool json) {
  const auto events = AgentEvents::Open(
      options.socket, {abi::MonitorQueryKind::kFollow, options.job, "", 0}, kMonitorTimeout);
  if (!events.ok()) return events.status();
  const absl::StatusOr<ordered_json> first = ParseAnswer((*events)->first());
  if (!first.ok()) return first.status();
  if (json) {
    std::printf("%s\n", monitor::OneLine(*first).c_str());
  } else {
    PrintList(*first);
  }
  std::fflush(stdout);
  for (;;) {
    pollfd entry{(*events)->fd(), POLLIN, 0};
    if (poll(&entry, 1, /*timeout=*/-1) <= 0) continue;
    const absl::StatusOr<std::optional<AgentEvents::Event>> event = (*events)->Receive();
    if (!event.ok()) return event.status();
    if (!event->has_value()) return absl::UnavailableError("the agent has ended the connection");
    if (absl::Status printed = PrintEvent(**event, json); !printed.ok()) return printed;
  }
}

}  // namespace

void AddMonitorVerdicts(CLI::App& monitor, Invocation& invocation) {
  CLI::App* verb =
      monitor.add_subcommand("verdicts", "Suspicions and verdicts that are kept, the newest first");
  auto options = AddMonitorOptions(*verb);
  auto follow = std::make_shared<bool>(false);
  verb->add_flag("--follow", *follow, "Go on with every change; with --json one object a line");
  verb->callback([&invocation, options, follow] {
    invocation.run = [&invocation, options, follow] {
      if (*follow) return Report(Follow(*options, invocation.json));
      const absl::StatusOr<ordered_json> answer =
          AskMonitor(options->socket, {abi::MonitorQueryKind::kFindings, options->job, "", 0});
      if (!answer.ok()) return Report(answer.status());
      if (invocation.json) {
        std::printf("%s\n", JsonText(*answer).c_str());
      } else {
        PrintList(*answer);
      }
      return kExitOk;
    };
  });
}

void AddMonitorExplain(CLI::App& monitor, Invocation& invocation) {
  CLI::App* verb = monitor.add_subcommand(
      "explain", "One suspicion or verdict: evidence, scope, what would change our mind");
  auto options = AddMonitorOptions(*verb);
  auto id = std::make_shared<std::string>();
  verb->add_option("ID", *id, "As `verdicts` shows it")->required();
  verb->callback([&invocation, options, id] {
    invocation.run = [&invocation, options, id] {
      const absl::StatusOr<ordered_json> answer =
          AskMonitor(options->socket, {abi::MonitorQueryKind::kExplain, options->job, *id, 0});
      if (!answer.ok()) return Report(answer.status());
      if (invocation.json) {
        std::printf("%s\n", JsonText(*answer).c_str());
      } else {
        std::fputs(FindingText((*answer)["finding"]).c_str(), stdout);
      }
      return kExitOk;
    };
  });
}

}  // namespace holdfast::cli
