// One file per verb: each adds its subcommand, options and help to the command line, and leaves
// what to run in Invocation. Verbs on files need no agent and link none of it.
#ifndef HOLDFAST_CLI_VERB_H_
#define HOLDFAST_CLI_VERB_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "checkpoint/catalog.h"
#include "cli/exit_code.h"
#include "io/file_system.h"

namespace CLI {
class App;
}

namespace holdfast::cli {

// What the command line asked for.
struct Invocation {
  FileSystem& file_system;
  bool json = false;         // --json: one object on standard output, stable, with schema_version
  bool no_progress = false;  // --no-progress
  // Of a failure that has no code of its own: diff has another meaning for 1.
  ExitCode failure = kExitFailure;
  std::vector<std::string> command;  // of `run`: "--" and what stands behind it
  std::function<ExitCode()> run;     // of the verb that was named
};

void AddLs(CLI::App& app, Invocation& invocation);
void AddInspect(CLI::App& app, Invocation& invocation);
void AddVerify(CLI::App& app, Invocation& invocation);
void AddDiff(CLI::App& app, Invocation& invocation);
void AddLayout(CLI::App& app, Invocation& invocation);
void AddView(CLI::App& app, Invocation& invocation);
void AddReshard(CLI::App& app, Invocation& invocation);
void AddPreflight(CLI::App& app, Invocation& invocation);
void AddRun(CLI::App& app, Invocation& invocation);
// `holdfast why`, `stop`, `save`, `approve`, `veto`, `hold`, `readmit`.
void AddJobVerbs(CLI::App& app, Invocation& invocation);
void AddStatus(CLI::App& app, Invocation& invocation);
void AddDoctor(CLI::App& app, Invocation& invocation);
// `holdfast monitor`, and its own verbs (monitor_verbs.h).
void AddMonitor(CLI::App& app, Invocation& invocation);
void AddMonitorWindow(CLI::App& monitor, Invocation& invocation);

// Prints `status` on standard error ("holdfast: ...") and returns its exit code.
ExitCode Report(const absl::Status& status);

// A checkpoint named on the command line: its directory, or ROOT/JOB for the newest on the current
// branch. Errors: kNotFound, or those of ReadCatalog.
absl::StatusOr<CatalogEntry> Locate(FileSystem& file_system, const std::string& path);

// The directory in which `path`, which need not exist, lies: absolute, links resolved. kNotFound.
absl::StatusOr<std::string> DirectoryOf(const std::string& path);

// A job's directory, split into the root and the job's name. Symbolic links in `path` are resolved.
struct JobPath {
  std::string root;
  std::string job;
};
absl::StatusOr<JobPath> SplitJobPath(const std::string& path);

// "committed", "incomplete", "fenced", "damaged"; with " (bad)" or " (abandoned)" behind it.
std::string StateText(const CatalogEntry& entry);

// Bytes of all files in a directory, without following links.
absl::StatusOr<uint64_t> DirectoryBytes(FileSystem& file_system, const std::string& directory);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_VERB_H_
