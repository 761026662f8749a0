// Each job of this node on one screen. What stands there is the agents' (agent/job_snapshots.h);
// here it is only put in order.
#include "cli/jobs.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/recovery/text.h"
#include "cli/agent_client.h"
#include "cli/agents.h"
#include "cli/output.h"
#include "nlohmann/json.hpp"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;

constexpr absl::Duration kTimeout = absl::Seconds(10);
constexpr absl::Duration kRefresh = absl::Seconds(1);
// Runs that are over and whose agents are gone: so many are shown, if they are no older.
constexpr size_t kPastShownMax = 3;
constexpr absl::Duration kPastAge = absl::Hours(24 * 7);

struct JobsOptions {
  JobChoice choice;
  bool watch = false;
};

// Members that are not there, or are something else, are empty: an agent may be of another version.
std::string TextOf(const ordered_json& object, const char* member) {
  const auto found = object.find(member);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

bool IsOver(const ordered_json& job) {
  const std::string state = TextOf(job, "state");
  return state == "done" || state == "given up" || state == "not running";
}

// Those first that a person should do something about, last those that are over.
int OrderOf(const ordered_json& job) {
  if (TextOf(job, "you") != "nothing") return 0;
  if (IsOver(job)) return 2;
  return TextOf(job, "state") == "running" ? 1 : 0;
}

// All that agents and disk say. Errors: only of an agent that was named.
absl::StatusOr<ordered_json> Gather(const JobChoice& choice) {
  ordered_json all = {{"schema_version", 1},
                      {"agents", 0},
                      {"jobs", ordered_json::array()},
                      {"past", ordered_json::array()}};
  std::vector<ordered_json> jobs;
  int agents = 0;
  for (const std::string& socket : AgentSockets(choice)) {
    const absl::StatusOr<std::string> text = QueryStatus(socket, kTimeout);
    if (!text.ok()) {
      if (!choice.socket.empty()) return text.status();
      // Nobody listens, or somebody who cannot say: the others can.
      if (!absl::IsUnavailable(text.status())) Report(text.status());
      continue;
    }
    ++agents;
    const ordered_json answer = ordered_json::parse(*text, nullptr, false);
    const auto listed = answer.find("screens");
    if (!answer.is_object() || listed == answer.end() || !listed->is_array()) continue;
    for (ordered_json job : *listed) {
      if (!job.is_object() || (!choice.job.empty() && TextOf(job, "job") != choice.job)) continue;
      job["agent"] = socket;
      jobs.push_back(std::move(job));
    }
  }
  std::stable_sort(jobs.begin(), jobs.end(), [](const ordered_json& a, const ordered_json& b) {
    return OrderOf(a) < OrderOf(b);
  });
  for (const PastJob& past : PastJobs(choice)) {
    if (all["past"].size() == kPastShownMax || past.age > kPastAge) break;
    const bool is_known = std::any_of(jobs.begin(), jobs.end(), [&](const ordered_json& job) {
      return TextOf(job, "job") == past.job;
    });
    if (is_known || past.history.phase == recovery::Phase::kIdle) continue;
    all["past"].push_back({{"job", past.job},
                           {"state", std::string(recovery::Name(past.history.state))},
                           {"exit_code", past.history.exit_code},
                           {"age_seconds", absl::ToDoubleSeconds(past.age)},
                           {"screen", ordered_json::array({FirstLineOf(past)})}});
  }
  all["agents"] = agents;
  for (ordered_json& job : jobs) all["jobs"].push_back(std::move(job));
  return all;
}

std::string ScreenText(const ordered_json& all) {
  std::string text;
  const ordered_json& jobs = all["jobs"];
  for (const ordered_json& job : jobs) {
    const std::string name = Printable(TextOf(job, "job"));
    if (jobs.size() > 1) absl::StrAppend(&text, text.empty() ? "" : "\n", "job ", name, "\n");
    const auto lines = job.find("screen");
    for (const ordered_json& line :
         lines != job.end() && lines->is_array() ? *lines : ordered_json::array()) {
      if (!line.is_string()) continue;
      absl::StrAppend(&text, Printable(line.get<std::string>()), "\n");
      if (IsOver(job) && jobs.size() > 1) break;
    }
    if (jobs.size() == 1) absl::StrAppend(&text, "Job ", name, ".\n");
  }
  if (jobs.empty()) {
    const int agents = all["agents"].get<int>();
    text =
        agents == 0
            ? std::string("NO JOB. No agent of this user answers on this machine. You: nothing.\n")
            : absl::StrFormat("NO JOB. %s and no job. You: nothing.\n",
                              agents == 1 ? std::string("There is an agent,")
                                          : absl::StrFormat("There are %d agents,", agents));
  }
  for (const ordered_json& past : all["past"]) {
    absl::StrAppendFormat(&text, "\njob %s, %s ago\n%s\n", Printable(TextOf(past, "job")),
                          recovery::DurationText(absl::Seconds(past["age_seconds"].get<double>())),
                          Printable(past["screen"][0].get<std::string>()));
  }
  return text;
}

ExitCode Show(const JobsOptions& options, bool as_json, const char* before) {
  const absl::StatusOr<ordered_json> all = Gather(options.choice);
  if (!all.ok()) return Report(all.status());
  const std::string text =
      as_json ? absl::StrCat(options.watch
                                 ? all->dump(-1, ' ', false, ordered_json::error_handler_t::replace)
                                 : JsonText(*all),
                             "\n")
              : ScreenText(*all);
  std::fputs(absl::StrCat(before, text).c_str(), stdout);
  return std::fflush(stdout) == 0 ? kExitOk : kExitFailure;
}

// Until somebody ends it, or nobody reads any more.
ExitCode Watch(const JobsOptions& options, bool as_json) {
  const bool redraws = !as_json && isatty(STDOUT_FILENO) == 1;
  const char* before = redraws ? "\033[H\033[2J" : "";
  for (;;) {
    if (const ExitCode code = Show(options, as_json, before); code != kExitOk) return code;
    if (!redraws && !as_json) before = "\n";
    poll(nullptr, 0, static_cast<int>(absl::ToInt64Milliseconds(kRefresh)));
  }
}

}  // namespace

void AddJobs(CLI::App& app, Invocation& invocation) {
  CLI::App* const verb =
      app.add_subcommand(kJobsVerb, "Each job of this node on one screen (also `holdfast` alone)");
  auto options = std::make_shared<JobsOptions>();
  AddJobChoice(*verb, options->choice);
  verb->add_flag("--watch", options->watch, "Once a second, until it is ended");
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options]() -> ExitCode {
      return options->watch ? Watch(*options, invocation.json)
                            : Show(*options, invocation.json, "");
    };
  });
}

}  // namespace holdfast::cli
