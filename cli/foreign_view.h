// holdfast view of another framework's checkpoint.
#ifndef HOLDFAST_CLI_FOREIGN_VIEW_H_
#define HOLDFAST_CLI_FOREIGN_VIEW_H_

#include <string>

#include "checkpoint/checkpoint_view.h"
#include "cli/foreign.h"

namespace holdfast::cli {

// `view`: as it was named; `request`: where it shall lie.
ExitCode ViewForeign(Invocation& invocation, const std::string& path, const std::string& view,
                     const ViewRequest& request, const ForeignOptions& options);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_FOREIGN_VIEW_H_
