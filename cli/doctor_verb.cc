// holdfast doctor: what this node sees, what is missing, and what would mend it.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "agent/default_socket.h"
#include "agent/witness/helper.h"
#include "cli/doctor.h"
#include "cli/output.h"
#include "cli/verb.h"

namespace holdfast::cli {
namespace {

std::string Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

ExitCode Print(const DoctorOptions& options, bool as_json) {
  const std::vector<Check> checks = Examine(options);
  const bool bad = std::any_of(checks.begin(), checks.end(),
                               [](const Check& check) { return check.health == Health::kBad; });
  if (as_json) {
    nlohmann::ordered_json report = {{"schema_version", 1},
                                     {"checks", nlohmann::ordered_json::array()}};
    for (const Check& check : checks) {
      report["checks"].push_back({{"name", check.name},
                                  {"health", Name(check.health)},
                                  {"found", check.found},
                                  {"fix", check.fix}});
    }
    std::printf("%s\n", JsonText(report).c_str());
  } else {
    for (const Check& check : checks) {
      std::printf("%-8s %-11s %s\n", Name(check.health), check.name.c_str(),
                  Printable(check.found).c_str());
      if (!check.fix.empty()) std::printf("%20s-> %s\n", "", Printable(check.fix).c_str());
    }
  }
  return bad ? kExitFailure : kExitOk;
}

}  // namespace

void AddDoctor(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand(
      "doctor", "Say what this node sees, what is missing, and what would mend it");
  auto options = std::make_shared<DoctorOptions>();
  options->socket = DefaultSocket(geteuid(), std::getenv("XDG_RUNTIME_DIR"));
  options->helper = HelperPath();
  options->ras = "localhost:28028";
  options->variable = Variable;
  verb->add_option("--socket", options->socket, "The agent's socket")
      ->envname("HOLDFAST_SOCKET")
      ->capture_default_str();
  verb->add_option("--ras", options->ras, "NCCL's RAS port")
      ->envname("NCCL_RAS_ADDR")
      ->capture_default_str();
  verb->add_option("--kernel-log", options->kernel_log, "The kernel's log")->capture_default_str();
  verb->footer(
      "good: as it should be; absent: not there, which is no fault; limited: works with less; bad: "
      "does not work.\nExit codes: 0 nothing is bad, 1 something is, 2 usage.");
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return Print(*options, invocation.json); };
  });
}

}  // namespace holdfast::cli
