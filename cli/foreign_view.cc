#include "cli/foreign_view.h"

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "converter/foreign_view.h"
#include "format/tensor_view.h"

namespace holdfast::cli {
namespace {

constexpr size_t kLeftOutLinesMax = 20;  // for people; JSON has all

void Print(const std::string& view, const converter::ForeignSource& source,
           const converter::ForeignView& made, const ViewRequest& request, bool json) {
  const bool relative = request.paths == ViewRequest::Paths::kRelative;
  const converter::ForeignIndex& index = source.index;
  if (json) {
    nlohmann::ordered_json output = {{"schema_version", 1},
                                     {"view", view},
                                     {"directory", source.folder->root()},
                                     {"format", index.format},
                                     {"step", nullptr},
                                     {"paths", relative ? "relative" : "absolute"},
                                     {"tensors", made.tensor_count},
                                     {"bytes", made.bytes.size()},
                                     {"tensors_in_parts", made.in_parts_count},
                                     {"copied_bytes", made.copied_bytes},
                                     {"left_out", nlohmann::ordered_json::array()},
                                     {"losses", index.losses}};
    if (index.has_step) output["step"] = index.step;
    for (const converter::ForeignView::LeftOut& each : made.left_out) {
      output["left_out"].push_back(
          {{"name", each.tensor}, {"state", each.state}, {"reason", each.reason}});
    }
    std::printf("%s\n", JsonText(output).c_str());
    return;
  }
  std::printf("%s: %llu tensors of format %s, %s; it reads from %s\n", Printable(view).c_str(),
              static_cast<unsigned long long>(made.tensor_count), index.format.c_str(),
              HumanBytes(made.bytes.size()).c_str(), Printable(source.folder->root()).c_str());
  for (size_t i = 0; i < made.left_out.size() && i < kLeftOutLinesMax; ++i) {
    const converter::ForeignView::LeftOut& each = made.left_out[i];
    std::printf("  left out   %s %s: it %s\n", Printable(each.tensor).c_str(),
                Printable(each.state).c_str(), Printable(each.reason).c_str());
  }
  if (made.left_out.size() > kLeftOutLinesMax) {
    std::printf("  left out   %zu more: --json names them\n",
                made.left_out.size() - kLeftOutLinesMax);
  }
  for (const std::string& loss : index.losses) {
    std::printf("  lost       %s\n", Printable(loss).c_str());
  }
  if (relative) std::printf("  readers need HDF5_EXTFILE_PREFIX='${ORIGIN}'\n");
}

absl::Status Run(Invocation& invocation, const std::string& path, const std::string& view,
                 const ViewRequest& request, const ForeignOptions& options) {
  ASSIGN_OR_RETURN(const converter::ForeignSource source, OpenForeign(invocation, path, options));
  const std::string& root = source.folder->root();
  const ViewPaths paths = request.paths == ViewRequest::Paths::kRelative
                              ? RelativeViewPaths(root, request.directory)
                              : AbsoluteViewPaths(root);
  converter::ForeignViewOptions wanted;
  wanted.source = source.folder->single_file()
                      ? absl::StrFormat("%s/%s", root, source.folder->files().front().path)
                      : root;
  wanted.prefix = paths.parts;
  RETURN_IF_ERROR(CheckViewReplacesNotItsSource(request, wanted.source));
  ASSIGN_OR_RETURN(const converter::ForeignView made,
                   converter::BuildForeignView(source.index, wanted));
  RETURN_IF_ERROR(PublishView(invocation.file_system, request, made.bytes));
  Print(view, source, made, request, invocation.json);
  return absl::OkStatus();
}

}  // namespace

ExitCode ViewForeign(Invocation& invocation, const std::string& path, const std::string& view,
                     const ViewRequest& request, const ForeignOptions& options) {
  return ReportForeign(Run(invocation, path, view, request, options));
}

}  // namespace holdfast::cli
