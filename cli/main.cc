// The `holdfast` command. Each verb stands in a file of its own and holds no logic but of its
// output.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <memory>

#include "cli/foreign.h"
#include "cli/output.h"
#include "cli/verb.h"
#include "io/posix_file_system.h"

int main(int argc, char** argv) {
  using namespace holdfast::cli;
  const std::unique_ptr<holdfast::FileSystem> file_system = holdfast::NewPosixFileSystem();
  Invocation invocation{.file_system = *file_system, .run = nullptr};

  CLI::App app("Looks at checkpoints and agents of Holdfast.", "holdfast");
  app.require_subcommand(1);
  app.set_version_flag("--version", HOLDFAST_VERSION);
  app.add_flag("--json", invocation.json, "One JSON object on standard output");
  app.add_flag("--no-progress", invocation.no_progress, "No progress line on standard error");
  // Options of all verbs may also stand behind the verb.
  app.fallthrough();
  app.footer(kExitCodesHelp);
  AddLs(app, invocation);
  AddInspect(app, invocation);
  AddVerify(app, invocation);
  AddDiff(app, invocation);
  AddLayout(app, invocation);
  AddView(app, invocation);
  AddReshard(app, invocation);
  AddConvert(app, invocation);
  AddExport(app, invocation);
  AddPreflight(app, invocation);
  AddStatus(app, invocation);
  AddDoctor(app, invocation);
  AddMonitor(app, invocation);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  try {
    return invocation.run();
  } catch (const std::exception& error) {
    // None of ours throws; a library that does on some input must not end in a core dump.
    std::fprintf(stderr, "holdfast: internal error: %s\n", Printable(error.what()).c_str());
    return invocation.failure;
  }
}
