// holdfast monitor: what the agent's monitor sees of the jobs on this node. Its verbs stand in
// files of their own.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdlib>

#include "agent/default_socket.h"
#include "cli/monitor_verbs.h"
#include "cli/verb.h"

namespace holdfast::cli {

std::shared_ptr<MonitorOptions> AddMonitorOptions(CLI::App& verb) {
  auto options = std::make_shared<MonitorOptions>();
  options->socket = DefaultSocket(geteuid(), std::getenv("XDG_RUNTIME_DIR"));
  verb.add_option("--socket", options->socket, "The agent's socket")
      ->envname("HOLDFAST_SOCKET")
      ->capture_default_str();
  verb.add_option("--job", options->job, "Only this job");
  verb.footer(kExitCodesHelp);
  return options;
}

void AddMonitor(CLI::App& app, Invocation& invocation) {
  CLI::App* monitor = app.add_subcommand("monitor", "What the monitor sees of running jobs");
  monitor->require_subcommand(1);
  monitor->fallthrough();
  monitor->footer(kExitCodesHelp);
  AddMonitorStatus(*monitor, invocation);
  AddMonitorTop(*monitor, invocation);
  AddMonitorMatrix(*monitor, invocation);
  AddMonitorVerdicts(*monitor, invocation);
  AddMonitorExplain(*monitor, invocation);
  AddMonitorRecord(*monitor, invocation);
  AddMonitorReplay(*monitor, invocation);
  AddMonitorWindow(*monitor, invocation);
  AddMonitorWitnesses(*monitor, invocation);
}

}  // namespace holdfast::cli
