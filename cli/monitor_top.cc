// holdfast monitor top and matrix: who waits for whom, and whose bytes take longer, right now.

#include <poll.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/monitor_verbs.h"
#include "cli/output.h"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;

constexpr absl::Duration kRefresh = absl::Seconds(1);

const char* ReasonText(const std::string& reason) {
  if (reason == "not-entered") return "has not entered the operation";
  if (reason == "no-data") return "sends no data";
  if (reason == "no-credit") return "takes no data";
  if (reason == "wire") return "posted, not completed";
  if (reason == "blind") return "has no plugin";
  return "all have entered, nothing more is shown";
}

// `rows_max` 0: no limit.
std::string TopText(const ordered_json& answer, size_t rows_max) {
  std::string text;
  if (answer["jobs"].empty()) text = "No job reports to this agent.\n";
  for (const ordered_json& job : answer["jobs"]) {
    absl::StrAppend(&text, JobText(job), "\n");
    if (job["waits"].empty()) {
      text += "  nobody waits\n";
      continue;
    }
    for (const ordered_json& sink : job["sinks"]) {
      absl::StrAppendFormat(&text, "  at the end of the chain: %s (%d ranks wait for it)\n",
                            EndText(sink), sink.value("waiters", 0));
    }
    for (const ordered_json& ring : job["deadlocks"]) {
      text += "  a ring of waits:";
      for (const ordered_json& end : ring) absl::StrAppend(&text, " ", EndText(end), ",");
      text.back() = '\n';
    }
    absl::StrAppendFormat(&text, "  %-14s %-24s %8s  %-32s %s\n", "who", "waits for", "since",
                          "because it", "communicator");
    size_t rows = 0;
    for (const ordered_json& wait : job["waits"]) {
      if (rows_max > 0 && rows++ == rows_max) break;
      absl::StrAppendFormat(&text, "  %-14s %-24s %8s  %-32s %s\n", EndText(wait["who"]),
                            EndText(wait["for"]), SecondsText(wait.value("seconds", 0.0)),
                            ReasonText(wait.value("reason", std::string())),
                            wait.value("communicator", std::string()));
    }
    const size_t more =
        job["waits"].size() -
        (rows_max == 0 ? job["waits"].size() : std::min(job["waits"].size(), rows_max)) +
        job.value("waits_left_out", size_t{0});
    if (more > 0) absl::StrAppendFormat(&text, "  and %d more\n", more);
  }
  return text;
}

absl::StatusOr<ordered_json> AskTop(const MonitorOptions& options) {
  return AskMonitor(options.socket, {abi::MonitorQueryKind::kWaits, options.job, "", 0});
}

// Until somebody ends it: the screen, once a second.
ExitCode RunLive(const MonitorOptions& options) {
  for (;;) {
    const absl::StatusOr<ordered_json> answer = AskTop(options);
    const int rows = SizeOfTerminal().rows;
    // Some lines of each job are not waits.
    const size_t rows_max = rows > 16 ? static_cast<size_t>(rows) - 8 : 8;
    const std::string text =
        answer.ok() ? TopText(*answer, rows_max)
                    : absl::StrCat(Printable(std::string(answer.status().message())), "\n");
    std::fputs(absl::StrCat("\033[H\033[2J", text).c_str(), stdout);
    if (std::fflush(stdout) != 0) return kExitFailure;
    poll(nullptr, 0, static_cast<int>(absl::ToInt64Milliseconds(kRefresh)));
  }
}

}  // namespace

void AddMonitorTop(CLI::App& monitor, Invocation& invocation) {
  CLI::App* verb = monitor.add_subcommand(
      "top", "Who waits for whom, the longest first; live on a terminal, else once");
  auto options = AddMonitorOptions(*verb);
  auto once = std::make_shared<bool>(false);
  verb->add_flag("--once", *once, "Once, also on a terminal");
  verb->callback([&invocation, options, once] {
    invocation.run = [&invocation, options, once] {
      if (!invocation.json && !*once && isatty(STDOUT_FILENO) == 1) return RunLive(*options);
      const absl::StatusOr<ordered_json> answer = AskTop(*options);
      if (!answer.ok()) return Report(answer.status());
      std::fputs(invocation.json ? absl::StrCat(JsonText(*answer), "\n").c_str()
                                 : TopText(*answer, 0).c_str(),
                 stdout);
      return kExitOk;
    };
  });
}

void AddMonitorMatrix(CLI::App& monitor, Invocation& invocation) {
  CLI::App* verb = monitor.add_subcommand(
      "matrix", "How long bytes take from each rank to each other one, as a heat map");
  auto options = AddMonitorOptions(*verb);
  auto communicator = std::make_shared<std::string>();
  verb->add_option("--communicator", *communicator, "Only this one, as `status` names it (hex)");
  verb->callback([&invocation, options, communicator] {
    invocation.run = [&invocation, options, communicator] {
      uint64_t id = 0;
      if (!communicator->empty() && (!absl::SimpleHexAtoi(*communicator, &id) || id == 0)) {
        return Report(absl::InvalidArgumentError(
            absl::StrFormat("--communicator: expected a hexadecimal number as `holdfast monitor "
                            "status` shows it, found \"%s\"",
                            *communicator)));
      }
      const absl::StatusOr<ordered_json> answer =
          AskMonitor(options->socket, {abi::MonitorQueryKind::kMatrix, options->job, "", id});
      if (!answer.ok()) return Report(answer.status());
      if (invocation.json) {
        std::printf("%s\n", JsonText(*answer).c_str());
        return kExitOk;
      }
      bool any = false;
      for (const ordered_json& job : (*answer)["jobs"]) {
        for (const ordered_json& one : job["communicators"]) {
          any = true;
          std::printf("%s, communicator %s of %d ranks\n%s\n", JobText(job).c_str(),
                      one.value("id", std::string()).c_str(), one.value("size", 0),
                      MatrixText(one, ColourOfTerminal(), SizeOfTerminal().columns).c_str());
        }
      }
      std::printf("%s", any ? ". as its peers   : 1.1 x   - 1.25 x   = 1.5 x   + 2 x   # 3 x and "
                              "more   ! slow for several windows\n"
                            : "No connection between nodes has been measured yet.\n");
      return kExitOk;
    };
  });
}

}  // namespace holdfast::cli
