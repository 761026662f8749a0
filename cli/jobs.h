// `holdfast jobs`, which is what `holdfast` without a verb means.
#ifndef HOLDFAST_CLI_JOBS_H_
#define HOLDFAST_CLI_JOBS_H_

#include "cli/verb.h"

namespace holdfast::cli {

inline constexpr char kJobsVerb[] = "jobs";
void AddJobs(CLI::App& app, Invocation& invocation);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_JOBS_H_
