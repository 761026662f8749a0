// The `holdfast` command. Each verb stands in a file of its own and holds no logic but of its
// output.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/suggestion.h"
#include "cli/foreign.h"
#include "cli/foreign_map.h"
#include "cli/incident.h"
#include "cli/jobs.h"
#include "cli/output.h"
#include "cli/verb.h"
#include "io/posix_file_system.h"

namespace {

// Of `holdfast run ... -- CMD ...`: where the "--" stands; `argc` if it is another verb, or there
// is none. CLI11 2.1 would hand what is behind it to the wrong App.
int CommandMark(int argc, char** argv) {
  int verb = 1;
  while (verb < argc && argv[verb][0] == '-') ++verb;
  if (verb == argc || std::strcmp(argv[verb], "run") != 0) return argc;
  int mark = verb;
  while (mark < argc && std::strcmp(argv[mark], "--") != 0) ++mark;
  return mark;
}

// The first word that is no option of `holdfast` itself, nor the value of one; null: there is none.
const char* FirstWord(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "--socket" || word == "--job" || word == "--state-directory") {
      ++i;  // its value
    } else if (!word.starts_with("-") || word == "-h" || word == "--help" || word == "--version") {
      return argv[i];
    }
  }
  return nullptr;
}

// Whether the words name no verb and no help: `holdfast`, `holdfast --json`, `holdfast --job X`.
bool IsBare(int argc, char** argv) { return FirstWord(argc, argv) == nullptr; }

// The parser takes an unknown verb for a value that nobody wants, and says that there is no verb.
bool NamesUnknownVerb(const CLI::App& app, const char* word) {
  if (word == nullptr || word[0] == '-') return false;
  std::vector<std::string> names;
  for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (verb->check_name(word)) return false;
    names.push_back(verb->get_name());
  }
  const std::vector<std::string_view> known(names.begin(), names.end());
  std::fprintf(stderr, "holdfast: expected a verb, found \"%s\"%s\nRun with --help for the list.\n",
               holdfast::cli::Printable(word).c_str(), holdfast::DidYouMean(word, known).c_str());
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace holdfast::cli;
  const std::unique_ptr<holdfast::FileSystem> file_system = holdfast::NewPosixFileSystem();
  Invocation invocation{.file_system = *file_system, .command = {}, .run = nullptr};

  CLI::App app("Looks at jobs, checkpoints and agents of Holdfast.", "holdfast");
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
  AddMapping(app, invocation);
  AddPreflight(app, invocation);
  AddRun(app, invocation);
  AddJobs(app, invocation);
  AddJobVerbs(app, invocation);
  AddIncident(app, invocation);
  AddStatus(app, invocation);
  AddDoctor(app, invocation);
  AddMonitor(app, invocation);
  try {
    const int mark = CommandMark(argc, argv);
    invocation.command.assign(argv + mark, argv + argc);
    std::vector<const char*> words(argv, argv + mark);
    if (IsBare(argc, argv)) words.insert(words.begin() + 1, kJobsVerb);
    app.parse(static_cast<int>(words.size()), words.data());
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != 0 && NamesUnknownVerb(app, FirstWord(argc, argv))) {
      return kExitUsage;
    }
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
