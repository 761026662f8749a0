// `holdfast incident save` and `show` (incident.cc).
#ifndef HOLDFAST_CLI_INCIDENT_H_
#define HOLDFAST_CLI_INCIDENT_H_

#include "cli/verb.h"

namespace holdfast::cli {

void AddIncident(CLI::App& app, Invocation& invocation);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_INCIDENT_H_
