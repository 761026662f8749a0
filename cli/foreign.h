// What the verbs share that also take checkpoints of other frameworks (converter/).
#ifndef HOLDFAST_CLI_FOREIGN_H_
#define HOLDFAST_CLI_FOREIGN_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/exit_code.h"
#include "cli/verb.h"
#include "converter/foreign_source.h"

namespace holdfast::cli {

// The options by which a user supplies what the files do not hold.
struct ForeignOptions {
  std::string tag;
  bool tag_is_of_one = false;  // of two checkpoints: the other one may have none
  std::string model;           // a directory
  std::string names;           // a file
  std::string preset;
  std::string layout;             // a layout file (converter/layout_file.h)
  bool layout_of_output = false;  // it may speak of what is written
  // Of this command and the process that reads, together; 0: no bound but the sandbox's own.
  uint64_t memory_bytes = 0;
};
void AddForeignOptions(CLI::App& verb, ForeignOptions& options);

// The blob of an imported checkpoint that has what its source said beside tensors: a JSON object
// with "format", "variant", "layout" and "scalars".
inline constexpr char kForeignFactsBlob[] = "foreign.json";

// The verbs that take nothing else.
void AddConvert(CLI::App& app, Invocation& invocation);
void AddExport(CLI::App& app, Invocation& invocation);

// Whether `path` is Holdfast's own: a checkpoint's directory, or a job's. What is not there is
// taken as ours, whose errors say so.
bool IsOurs(const std::string& path);

// The contents of a layout file (converter/layout_file.h), which are one: here, where its mistakes
// are not the checkpoint's.
absl::StatusOr<std::string> ReadLayoutFile(FileSystem& file_system, const std::string& path);

// Says on standard error if the sandbox was not whole. What no reader knows is kNotFound.
absl::StatusOr<converter::ForeignSource> OpenForeign(Invocation& invocation,
                                                     const std::string& path,
                                                     const ForeignOptions& options);

// The same, of which `recognized` says whether a reader knows it.
absl::StatusOr<converter::ForeignSource> LookAtForeign(Invocation& invocation,
                                                       const std::string& path,
                                                       const ForeignOptions& options);
// As OpenForeign, of any checkpoint: of ours, which is read back and verified first, the index in
// this form.
absl::StatusOr<converter::ForeignSource> OpenAny(Invocation& invocation, const std::string& path,
                                                 const ForeignOptions& options);

// As Report, but unsafe content has an exit code of its own.
ExitCode ReportForeign(const absl::Status& status);

struct InspectForeignOptions {
  std::string path;
  bool tensors = false;
  bool sha256 = false;
  ForeignOptions foreign;
};
ExitCode InspectForeign(Invocation& invocation, const InspectForeignOptions& options);

// Two checkpoints, at least one of which is another framework's.
ExitCode DiffForeign(Invocation& invocation, const std::string& a, const std::string& b,
                     const ForeignOptions& options);

ExitCode VerifyForeign(Invocation& invocation, const std::string& path,
                       const ForeignOptions& options);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_FOREIGN_H_
