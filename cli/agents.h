// The agents of this user on this machine, and the jobs that they had: where verbs look that name
// none.
#ifndef HOLDFAST_CLI_AGENTS_H_
#define HOLDFAST_CLI_AGENTS_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/recovery/history.h"

namespace CLI {
class App;
}

namespace holdfast::cli {

struct JobChoice {
  std::string socket;           // of an agent; empty: any
  std::string job;              // empty: any
  std::string state_directory;  // of agents that are gone; empty: the default one
};
// --socket, --job and --state-directory.
void AddJobChoice(CLI::App& verb, JobChoice& choice);

// Where an agent of this user may listen: the named socket, or the system agent's and the private
// ones (of the named job, or of any).
std::vector<std::string> AgentSockets(const JobChoice& choice);

// What is on disk of a run that is over, or whose agent is gone.
struct PastJob {
  std::string job;
  recovery::History history;
  absl::Duration age;  // since it was written last
};
// The newest first. What cannot be read is left out.
std::vector<PastJob> PastJobs(const JobChoice& choice);
// As recovery::FirstLine; of a run that is not over, that nobody answers for it.
std::string FirstLineOf(const PastJob& job);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_AGENTS_H_
