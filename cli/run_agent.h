// The agent of `holdfast run`: one that listens already, or a private one that is started.
#ifndef HOLDFAST_CLI_RUN_AGENT_H_
#define HOLDFAST_CLI_RUN_AGENT_H_

#include <string>

#include "absl/status/status.h"

namespace holdfast::cli {

struct RunAgent {
  std::string socket;
  bool may_start = false;  // a private one, if nobody listens
  std::string job;
  std::string config;  // a file for it; empty: none was named
  std::string every;   // its key of that name; empty: as the configuration says
};

// After OK somebody listens there. Errors: kUnavailable (nobody does, and none is to be started, or
// it did not start: with its own words), kInvalidArgument (its configuration), kNotFound (no
// holdfastd: $HOLDFASTD, beside this program, PATH), kPermissionDenied. Blocks until a started
// agent serves, two minutes at most.
absl::Status EnsureAgent(const RunAgent& agent);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_RUN_AGENT_H_
