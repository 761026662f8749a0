// The exit codes of every verb (DESIGN section 12), and how a Status becomes one.
#ifndef HOLDFAST_CLI_EXIT_CODE_H_
#define HOLDFAST_CLI_EXIT_CODE_H_

#include "absl/status/status.h"

namespace holdfast::cli {

enum ExitCode : int {
  kExitOk = 0,
  kExitFailure = 1,
  kExitDiffers = 1,  // of `diff`, which gives it for nothing else
  kExitOdd = 1,      // of `preflight`, likewise
  kExitUsage = 2,
  kExitRecoverable = 3,  // damaged, but what is needed can be had from elsewhere
  kExitDamaged = 4,
  kExitNotFound = 5,
  kExitUnsafe = 6,  // unsafe content refused
  kExitRetry = 75,  // I/O trouble, no agent: a retry may help
};

// For `--help`, the same text in every verb.
inline constexpr char kExitCodesHelp[] =
    "Exit codes: 0 ok, 1 failure, 2 usage, 3 damaged but recoverable, 4 damaged, 5 not found,\n"
    "6 unsafe content refused, 75 temporary failure (retry).";

ExitCode ExitCodeOf(const absl::Status& status);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_EXIT_CODE_H_
