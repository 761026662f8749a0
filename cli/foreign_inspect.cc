// holdfast inspect of a checkpoint of another framework, or of a folder of unrelated files, each of
// which is then looked at alone.

#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/sha256.h"
#include "base/status_macros.h"
#include "cli/foreign.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "converter/whole_tensor_reader.h"

namespace holdfast::cli {
namespace {

using converter::ForeignIndex;
using converter::ForeignSource;
using nlohmann::ordered_json;

// The text has passed a strict reader when the index was decoded.
ordered_json ToJson(const std::vector<converter::Fact>& facts) {
  ordered_json json = ordered_json::object();
  for (const converter::Fact& fact : facts) json[fact.name] = ordered_json::parse(fact.json);
  return json;
}

struct StateTotal {
  uint64_t tensor_count = 0;
  uint64_t bytes = 0;
};

std::map<std::string, StateTotal> Totals(const ForeignIndex& index) {
  std::map<std::string, StateTotal> totals;
  for (const TensorState& state : index.tensor_states) {
    StateTotal& total = totals[state.state];
    ++total.tensor_count;
    total.bytes += state.Bytes();
  }
  return totals;
}

using Digests = std::vector<std::string>;  // by tensor state; empty if not asked for

absl::StatusOr<Digests> DigestsOf(Invocation& invocation, const ForeignSource& source) {
  const ForeignIndex& index = source.index;
  uint64_t total = 0;
  for (const TensorState& state : index.tensor_states) total += state.Bytes();
  Progress progress(
      "sha256", invocation.no_progress ? Progress::Display::kNever : Progress::Display::kAutomatic,
      RealClock());
  converter::WholeTensorReader reader(*source.folder, index);
  Digests digests;
  digests.reserve(index.tensor_states.size());
  uint64_t done = 0;
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    Sha256 sha256;
    RETURN_IF_ERROR(reader.Read(i, [&](std::span<const std::byte> bytes) {
      sha256.Add(bytes);
      done += bytes.size();
      progress.Update(done, total);
      return absl::OkStatus();
    }));
    digests.push_back(Hex(sha256.Finish()));
  }
  return digests;
}

ordered_json TensorsJson(const ForeignIndex& index, const Digests& digests) {
  std::map<uint32_t, uint32_t> aliases;
  for (const converter::Alias& alias : index.aliases) aliases[alias.tensor_state] = alias.of;
  ordered_json tensors = ordered_json::array();
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& state = index.tensor_states[i];
    ordered_json record = {{"name", state.tensor},
                           {"state", state.state},
                           {"dtype", DtypeName(state.dtype)},
                           {"shape", state.shape}};
    if (i < digests.size()) record["sha256"] = digests[i];
    if (const auto alias = aliases.find(i); alias != aliases.end()) {
      record["alias_of"] = index.tensor_states[alias->second].tensor;
    }
    tensors.push_back(std::move(record));
  }
  return tensors;
}

ordered_json ToJson(const ForeignSource& source, const InspectForeignOptions& options,
                    const Digests& digests) {
  const ForeignIndex& index = source.index;
  ordered_json json = {{"format", index.format},
                       {"variant", index.variant},
                       {"step", nullptr},
                       {"layout", ToJson(index.layout)},
                       {"files", ordered_json::array()},
                       {"states", ordered_json::object()},
                       {"scalars", ToJson(index.scalars)},
                       {"blobs", ordered_json::array()},
                       {"opaque_classes", ordered_json::array()},
                       {"unreadable", ordered_json::array()},
                       {"notes", index.notes},
                       {"repairs", index.repairs},
                       {"losses", index.losses},
                       {"sandbox_missing", source.sandbox.missing}};
  if (index.has_step) json["step"] = index.step;
  for (const auto& file : index.files) {
    json["files"].push_back({{"file", file.path}, {"bytes", file.bytes}});
  }
  for (const auto& [state, total] : Totals(index)) {
    json["states"][state] = {{"tensors", total.tensor_count}, {"bytes", total.bytes}};
  }
  for (const auto& blob : index.blobs) {
    json["blobs"].push_back(
        {{"name", blob.name}, {"bytes", index.extents[blob.extent].decoded_bytes}});
  }
  for (const auto& opaque : index.opaque_classes) {
    json["opaque_classes"].push_back({{"class", opaque.name}, {"count", opaque.count}});
  }
  for (const auto& each : index.unreadable) {
    json["unreadable"].push_back({{"name", each.name}, {"reason", each.reason}});
  }
  if (options.tensors) json["tensors"] = TensorsJson(index, digests);
  return json;
}

void PrintLines(const char* title, const std::vector<std::string>& lines) {
  for (const std::string& line : lines) std::printf("  %-10s %s\n", title, Printable(line).c_str());
}

void PrintText(const ForeignSource& source, const InspectForeignOptions& options,
               const Digests& digests) {
  const ForeignIndex& index = source.index;
  uint64_t bytes = 0;
  for (const auto& file : index.files) bytes += file.bytes;
  std::printf("%s\n  format     %s%s%s\n", Printable(options.path).c_str(), index.format.c_str(),
              index.variant.empty() ? "" : ", ", Printable(index.variant).c_str());
  if (index.has_step) {
    std::printf("  step       %llu\n", static_cast<unsigned long long>(index.step));
  }
  std::printf("  files      %zu, %s\n", index.files.size(), HumanBytes(bytes).c_str());
  for (const converter::Fact& fact : index.layout) {
    std::printf("  %-10s %s\n", Printable(fact.name).c_str(), Printable(fact.json).c_str());
  }
  for (const auto& [state, total] : Totals(index)) {
    std::printf("  state      %-16s %llu tensors, %s\n", Printable(state).c_str(),
                static_cast<unsigned long long>(total.tensor_count),
                HumanBytes(total.bytes).c_str());
  }
  for (const converter::Alias& alias : index.aliases) {
    std::printf("  tied       %s = %s\n",
                Printable(index.tensor_states[alias.tensor_state].tensor).c_str(),
                Printable(index.tensor_states[alias.of].tensor).c_str());
  }
  if (!index.scalars.empty()) std::printf("  scalars    %zu\n", index.scalars.size());
  if (!index.blobs.empty()) std::printf("  blobs      %zu\n", index.blobs.size());
  for (const auto& opaque : index.opaque_classes) {
    std::printf("  opaque     %s, %llu times\n", Printable(opaque.name).c_str(),
                static_cast<unsigned long long>(opaque.count));
  }
  for (const auto& each : index.unreadable) {
    std::printf("  unreadable %s %s\n", Printable(each.name).c_str(),
                Printable(each.reason).c_str());
  }
  PrintLines("note", index.notes);
  PrintLines("repaired", index.repairs);
  PrintLines("lost", index.losses);
  if (!options.tensors) return;
  std::printf("\n");
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& state = index.tensor_states[i];
    std::printf("  %s %s %s [%s]%s%s\n", Printable(state.tensor).c_str(),
                Printable(state.state).c_str(), std::string(DtypeName(state.dtype)).c_str(),
                absl::StrJoin(state.shape, ", ").c_str(), digests.empty() ? "" : " ",
                digests.empty() ? "" : digests[i].c_str());
  }
}

// What one checkpoint holds, in the form that was asked for.
absl::StatusOr<ordered_json> Inspect(Invocation& invocation, const InspectForeignOptions& options,
                                     const ForeignSource& source) {
  if (!source.recognized) return converter::NotRecognized(options.path, source);
  Digests digests;
  if (options.tensors && options.sha256) {
    ASSIGN_OR_RETURN(digests, DigestsOf(invocation, source));
  }
  if (invocation.json) return ToJson(source, options, digests);
  PrintText(source, options, digests);
  return ordered_json();
}

absl::StatusOr<ordered_json> InspectFile(Invocation& invocation,
                                         const InspectForeignOptions& options) {
  ASSIGN_OR_RETURN(const ForeignSource source,
                   LookAtForeign(invocation, options.path, options.foreign));
  return Inspect(invocation, options, source);
}

// If not one of them is of a format that is known, the folder is no checkpoint at all.
ExitCode InspectFiles(Invocation& invocation, const ForeignSource& source,
                      const InspectForeignOptions& options) {
  const converter::ForeignFolder& folder = *source.folder;
  bool any = false;
  std::vector<std::string> unknown;
  ordered_json files = ordered_json::array();
  for (const converter::FolderFile& file : folder.files()) {
    InspectForeignOptions single = options;
    single.path = absl::StrFormat("%s/%s", folder.root(), file.path);
    absl::StatusOr<ordered_json> found = InspectFile(invocation, single);
    if (!found.ok()) {
      const std::string message(found.status().message());
      if (absl::IsNotFound(found.status())) {
        unknown.push_back(single.path);
      } else {
        any = true;
        if (!invocation.json) {
          std::printf("%s\n  %s\n", Printable(single.path).c_str(), Printable(message).c_str());
        }
      }
      found = ordered_json{{"error", message}};
    } else {
      any = true;
    }
    if (!invocation.json) continue;
    ordered_json record = {{"file", file.path}};
    record.update(*found);
    files.push_back(std::move(record));
  }
  if (!any) return ReportForeign(converter::NotRecognized(options.path, source));
  for (const std::string& path : unknown) {
    if (!invocation.json) std::printf("%s\n  no checkpoint\n", Printable(path).c_str());
  }
  for (const std::string& refused : folder.refused()) {
    files.push_back({{"file", refused}, {"error", "refused"}});
    if (!invocation.json) std::printf("%s\n  refused\n", Printable(refused).c_str());
  }
  if (invocation.json) {
    std::printf("%s\n", JsonText({{"schema_version", 1},
                                  {"format", "files"},
                                  {"path", options.path},
                                  {"files", std::move(files)}})
                            .c_str());
  }
  return kExitOk;
}

}  // namespace

ExitCode InspectForeign(Invocation& invocation, const InspectForeignOptions& options) {
  const absl::StatusOr<ForeignSource> source =
      LookAtForeign(invocation, options.path, options.foreign);
  if (!source.ok()) return ReportForeign(source.status());
  if (!source->recognized && !source->folder->single_file() && !source->folder->files().empty()) {
    return InspectFiles(invocation, *source, options);
  }
  const absl::StatusOr<ordered_json> found = Inspect(invocation, options, *source);
  if (!found.ok()) return ReportForeign(found.status());
  if (invocation.json) {
    ordered_json json = {{"schema_version", 1}, {"path", options.path}};
    json.update(*found);
    std::printf("%s\n", JsonText(json).c_str());
  }
  return kExitOk;
}

}  // namespace holdfast::cli
