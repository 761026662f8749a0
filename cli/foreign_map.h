// The options by which a conversion maps one framework's tensors to another's: --map and --set; and
// the verb that shows the built-in mappings.
#ifndef HOLDFAST_CLI_FOREIGN_MAP_H_
#define HOLDFAST_CLI_FOREIGN_MAP_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/foreign.h"
#include "cli/verb.h"
#include "converter/selection.h"

namespace holdfast::cli {

struct MapOptions {
  std::vector<std::string> maps;  // families or files, in this order
  std::vector<std::string> set;   // NAME=NUMBER
};
void AddMapOptions(CLI::App& verb, MapOptions& options);

void AddMapping(CLI::App& app, Invocation& invocation);

struct MapTarget {
  std::string_view format;  // --format
  std::string_view to;      // --to, which was parsed already
  std::string_view model;   // --model, or empty
};

// config.json of `model` (--model, or empty), else of the checkpoint's own folder; empty if there
// is none. Errors: those of reading.
absl::StatusOr<std::string> ConfigOf(FileSystem& file_system, std::string_view model,
                                     const converter::ForeignFolder& folder);

// What the options ask for; empty if nothing. Files are read now. Errors: kInvalidArgument,
// those of reading. Lifetime: `source` and the FileSystem outlive it; the source is open when it is
// called.
absl::StatusOr<converter::SelectionRequest::Mapping> MappingOf(
    FileSystem& file_system, const MapOptions& options, const MapTarget& target,
    const converter::ForeignSource& source);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_FOREIGN_MAP_H_
