// holdfast monitor window: the events of one rank for a while, as JSON lines.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "agent/default_socket.h"
#include "cli/agent_client.h"
#include "cli/number_range.h"
#include "cli/verb.h"
#include "hook/abi/monitor.h"

namespace holdfast::cli {

void AddMonitorWindow(CLI::App& monitor, Invocation& invocation) {
  struct Options {
    std::string socket;
    std::string job;
    uint32_t rank = 0;
    double seconds = 1.0;
  };
  CLI::App* verb = monitor.add_subcommand(
      "window", "Has a rank record its events for a while, and prints them as JSON lines");
  auto options = std::make_shared<Options>();
  options->socket = DefaultSocket(geteuid(), std::getenv("XDG_RUNTIME_DIR"));
  verb->add_option("--job", options->job, "The job")->required();
  verb->add_option("--rank", options->rank, "The global rank")->required();
  verb->add_option("--seconds", options->seconds, "For how long")
      ->check(NumberRange(0.001, static_cast<double>(abi::kWindowSecondsMax)))
      ->capture_default_str();
  verb->add_option("--socket", options->socket, "The agent's socket")
      ->envname("HOLDFAST_SOCKET")
      ->capture_default_str();
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [options] {
      const absl::StatusOr<std::string> lines =
          QueryMonitorWindow(options->socket, options->job, options->rank,
                             absl::Seconds(options->seconds), absl::Seconds(10));
      if (!lines.ok()) return Report(lines.status());
      std::fputs(lines->c_str(), stdout);
      if (absl::StrContains(*lines, "\"opened\":false")) {
        std::fprintf(stderr,
                     "holdfast: no record: the rank enqueued no operation in this time, and a "
                     "window opens with one\n");
      }
      return kExitOk;
    };
  });
}

}  // namespace holdfast::cli
