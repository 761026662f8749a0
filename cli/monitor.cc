// holdfast monitor: what the agent's monitor sees of the jobs on this node. Its verbs stand in
// files of their own.

#include <CLI/CLI.hpp>

#include "cli/verb.h"

namespace holdfast::cli {

void AddMonitor(CLI::App& app, Invocation& invocation) {
  CLI::App* monitor = app.add_subcommand("monitor", "What the monitor sees of running jobs");
  monitor->require_subcommand(1);
  monitor->fallthrough();
  monitor->footer(kExitCodesHelp);
  AddMonitorWindow(*monitor, invocation);
}

}  // namespace holdfast::cli
