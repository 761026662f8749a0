// holdfast status: what a running agent says of itself, as JSON.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "agent/default_socket.h"
#include "cli/agent_client.h"
#include "cli/verb.h"

namespace holdfast::cli {

void AddStatus(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand("status", "Print a running agent's status as JSON");
  auto socket =
      std::make_shared<std::string>(DefaultSocket(geteuid(), std::getenv("XDG_RUNTIME_DIR")));
  verb->add_option("--socket", *socket, "The agent's socket")
      ->envname("HOLDFAST_SOCKET")
      ->capture_default_str();
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, socket] {
    invocation.run = [socket] {
      const absl::StatusOr<std::string> text = QueryStatus(*socket, absl::Seconds(10));
      if (!text.ok()) return Report(text.status());
      std::printf("%s\n", text->c_str());
      return kExitOk;
    };
  });
}

}  // namespace holdfast::cli
