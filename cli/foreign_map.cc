#include "cli/foreign_map.h"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/model_families.h"
#include "converter/model_numbers.h"
#include "format/layout_rules.h"

namespace holdfast::cli {
namespace {

constexpr uint64_t kMapFileBytesMax = uint64_t{16} << 20;
constexpr uint64_t kConfigBytesMax = uint64_t{16} << 20;
constexpr char kConfigName[] = "config.json";

// Tensor-parallel ranks of what is written.
uint64_t TensorRanks(std::string_view to) {
  if (to.empty()) return 1;
  const absl::StatusOr<std::vector<AxisSize>> sizes = ParseAxisSizes(std::string(to));
  if (!sizes.ok()) return 1;  // refused before
  for (const AxisSize& size : *sizes) {
    if (size.mesh.empty() && size.axis == "tp") return size.size;
  }
  return 1;
}

// The table of FAMILY:NAMES, as a file for --map; or which there are.
ExitCode ShowMapping(const std::string& text) {
  if (!text.empty()) {
    const absl::Status status = converter::CheckMap({.text = text});
    if (!status.ok()) return Report(status);
  }
  const size_t colon = text.find(':');
  if (colon != std::string::npos) {
    std::printf("%s",
                converter::FamilyTable(text.substr(0, colon), text.substr(colon + 1)).c_str());
    return kExitOk;
  }
  for (const std::string_view family : converter::FamilyNames()) {
    if (!text.empty() && text != family) continue;
    for (const std::string_view naming : converter::NamingsOf(family)) {
      std::printf("%s:%s\n", std::string(family).c_str(), std::string(naming).c_str());
    }
  }
  return kExitOk;
}

}  // namespace

absl::StatusOr<std::string> ConfigOf(FileSystem& file_system, std::string_view model,
                                     const converter::ForeignFolder& folder) {
  if (!model.empty()) {
    absl::StatusOr<std::string> text =
        file_system.ReadSmallFile(absl::StrFormat("%s/%s", model, kConfigName), kConfigBytesMax);
    if (!absl::IsNotFound(text.status())) return text;
  }
  const std::optional<uint32_t> file = folder.Find(kConfigName);
  if (!file.has_value()) return std::string();
  return folder.ReadAll(*file, kConfigBytesMax);
}

void AddMapping(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand(
      "mapping", "Show the equations of a built-in --map, as a file that --map takes");
  auto text = std::make_shared<std::string>();
  verb->add_option("mapping", *text, "FAMILY:NAMES, or nothing: which there are");
  verb->callback([&invocation, text] { invocation.run = [text] { return ShowMapping(*text); }; });
}

void AddMapOptions(CLI::App& verb, MapOptions& options) {
  verb.add_option("--map", options.maps,
                  "To another framework's tensors: FAMILY or FAMILY:NAMES (gpt2, llama, mixtral; "
                  "names hf, megatron, ...), or a file of equations")
      ->allow_extra_args(false);
  verb.add_option("--set", options.set,
                  "NAME=NUMBER: what a mapping asks for: heads, groups, vocab, padded_vocab")
      ->allow_extra_args(false);
}

absl::StatusOr<converter::SelectionRequest::Mapping> MappingOf(
    FileSystem& file_system, const MapOptions& options, const MapTarget& target,
    const converter::ForeignSource& source) {
  if (options.maps.empty()) {
    if (options.set.empty()) return converter::SelectionRequest::Mapping();
    return absl::InvalidArgumentError("--set: expected --map, found none");
  }
  std::vector<converter::MapOption> maps;
  for (const std::string& text : options.maps) {
    converter::MapOption map{.text = text};
    if (!converter::NamesFamily(text)) {
      absl::StatusOr<std::string> contents = file_system.ReadSmallFile(text, kMapFileBytesMax);
      if (contents.ok()) {
        map.contents = *std::move(contents);
      } else if (!absl::IsNotFound(contents.status())) {
        return contents.status();
      }
    }
    RETURN_IF_ERROR(converter::CheckMap(map));
    maps.push_back(std::move(map));
  }
  const uint64_t tensor_ranks = TensorRanks(target.to);
  const std::string naming = target.format == "megatron" ? "megatron" : "hf";
  return [&file_system, &source, maps = std::move(maps), set = options.set,
          model = std::string(target.model), naming,
          tensor_ranks](converter::ForeignIndex& index, converter::Unmapped unmapped,
                        std::vector<std::string>& left_out) -> absl::Status {
    converter::ModelNumbers::Request request{.set = set, .tensor_ranks = tensor_ranks};
    for (const converter::Fact& fact : index.scalars) {
      if (fact.name == "args") request.arguments = fact.json;
    }
    ASSIGN_OR_RETURN(request.config, ConfigOf(file_system, model, *source.folder));
    ASSIGN_OR_RETURN(converter::ModelNumbers numbers, converter::ModelNumbers::Create(request));
    return converter::MapIndex(maps, naming, *source.folder, numbers, unmapped, index, left_out);
  };
}

}  // namespace holdfast::cli
