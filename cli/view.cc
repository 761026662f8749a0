// holdfast view: a file through which h5py and h5dump see every tensor of a checkpoint whole. The
// bytes stay where they are.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/str_format.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "checkpoint/checkpoint_view.h"
#include "cli/foreign_view.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "cli/verb.h"
#include "format/tensor_view.h"

namespace holdfast::cli {
namespace {

struct Options {
  std::string checkpoint;
  std::string view;
  bool relative = false;
  bool force = false;
  ForeignOptions foreign;
};

absl::StatusOr<ViewRequest> RequestOf(const Options& options) {
  const std::filesystem::path path(options.view);
  if (!path.has_filename() || path.filename() == "." || path.filename() == "..") {
    return absl::InvalidArgumentError(
        absl::StrFormat("view: expected the name of a new file, found \"%s\"", options.view));
  }
  ViewRequest request;
  ASSIGN_OR_RETURN(request.directory, DirectoryOf(options.view));
  request.name = path.filename().string();
  request.paths = options.relative ? ViewRequest::Paths::kRelative : ViewRequest::Paths::kAbsolute;
  if (options.force) request.existing = ViewRequest::Existing::kReplace;
  request.writer = absl::StrFormat("%016x", RandomBits());
  return request;
}

void Print(const CatalogEntry& entry, const ViewMade& made, const Options& options, bool json) {
  if (json) {
    const nlohmann::ordered_json output = {{"schema_version", 1},
                                           {"view", options.view},
                                           {"directory", entry.directory},
                                           {"step", Value(entry.id.step)},
                                           {"attempt", Value(entry.id.attempt)},
                                           {"paths", options.relative ? "relative" : "absolute"},
                                           {"tensors", made.tensor_count},
                                           {"bytes", made.bytes},
                                           {"images_of_one_tensor_max", made.files_of_one_max},
                                           {"tensors_in_parts", made.in_parts_count}};
    std::printf("%s\n", JsonText(output).c_str());
    return;
  }
  std::printf("%s: %llu tensors of step %llu of attempt %u, %s; it reads from %s\n",
              Printable(options.view).c_str(), static_cast<unsigned long long>(made.tensor_count),
              static_cast<unsigned long long>(Value(entry.id.step)), Value(entry.id.attempt),
              HumanBytes(made.bytes).c_str(), Printable(entry.directory).c_str());
  if (made.in_parts_count == 0) return;
  std::printf("  %llu tensors in parts: in more than %zu images, or with empty pieces%s\n",
              static_cast<unsigned long long>(made.in_parts_count), kViewFilesMax,
              options.relative ? "; readers need HDF5_EXTFILE_PREFIX='${ORIGIN}'" : "");
}

absl::Status Run(Invocation& invocation, const Options& options) {
  ASSIGN_OR_RETURN(const ViewRequest request, RequestOf(options));
  ASSIGN_OR_RETURN(const CatalogEntry entry, Locate(invocation.file_system, options.checkpoint));
  ASSIGN_OR_RETURN(const ViewMade made, MakeView(invocation.file_system, entry, request));
  Print(entry, made, options, invocation.json);
  return absl::OkStatus();
}

}  // namespace

void AddView(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand("view", "Make a file that shows every tensor whole to HDF5");
  auto options = std::make_shared<Options>();
  verb->add_option(
          "checkpoint", options->checkpoint,
          "Its directory, or ROOT/JOB for the newest, or another framework's file or folder")
      ->required();
  verb->add_option("view", options->view, "The HDF5 file to make")->required();
  verb->add_flag("--relative", options->relative,
                 "Name what it reads from relative to the view: both may be moved together");
  verb->add_flag("--force", options->force, "Replace the file that is there");
  AddForeignOptions(*verb, options->foreign);
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      if (IsOurs(options->checkpoint)) return Report(Run(invocation, *options));
      const absl::StatusOr<ViewRequest> request = RequestOf(*options);
      if (!request.ok()) return Report(request.status());
      return ViewForeign(invocation, options->checkpoint, options->view, *request,
                         options->foreign);
    };
  });
}

}  // namespace holdfast::cli
