// holdfast inspect: what one checkpoint holds; of ours from MANIFEST.json and INDEX alone. It reads
// no image: whether the bytes are good is `holdfast verify`'s to say. Of other frameworks'
// checkpoints: foreign_inspect.cc.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "checkpoint/verify.h"
#include "cli/foreign.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "cli/verb.h"
#include "format/layout_explain.h"

namespace holdfast::cli {
namespace {

struct Options {
  std::string path;
  bool tensors = false;
  bool blobs = false;
  bool layout = false;
  bool sha256 = false;
  ForeignOptions foreign;
};

std::string ShapeText(const TensorState& state) {
  return "[" + absl::StrJoin(state.shape, ", ") + "]";
}

std::string FingerprintText(const TensorFacts& facts) {
  return facts.fingerprint.has_value() ? facts.fingerprint->Hex() : "not computed";
}

nlohmann::ordered_json PiecesJson(const Index& index, uint32_t tensor_state) {
  nlohmann::ordered_json pieces = nlohmann::ordered_json::array();
  const auto [first, last] = index.PiecesOf(tensor_state);
  for (size_t i = first; i < last; ++i) {
    const IndexPiece& piece = index.pieces[i];
    nlohmann::ordered_json item = {{"file", index.images[piece.image].file},
                                   {"offset", piece.offset_bytes},
                                   {"begin", piece.piece.begin},
                                   {"end", piece.piece.end}};
    if (piece.piece.box != kWholeTensor) {
      const BoxView box = index.boxes[piece.piece.box];
      item["box_lo"] = std::vector<uint64_t>(box.lo.begin(), box.lo.end());
      item["box_size"] = std::vector<uint64_t>(box.size.begin(), box.size.end());
    }
    pieces.push_back(std::move(item));
  }
  return pieces;
}

nlohmann::ordered_json ToJson(const CatalogEntry& entry, const Index& index,
                              const Options& options) {
  const Manifest& manifest = *entry.manifest;
  nlohmann::ordered_json json = {
      {"schema_version", 1},
      {"format", "holdfast"},
      {"directory", entry.directory},
      {"job", manifest.job},
      {"job_uuid", manifest.job_uuid},
      {"step", Value(manifest.checkpoint.step)},
      {"attempt", Value(manifest.checkpoint.attempt)},
      {"parent", nullptr},
      {"state", StateText(entry)},
      {"survives", Describe(manifest.survives)},
      {"world_size", manifest.world_size},
      {"created_by", manifest.created_by},
      {"created_at", absl::FormatTime(absl::RFC3339_sec, manifest.created_at, absl::UTCTimeZone())},
      {"images", nlohmann::ordered_json::array()},
      {"states", nlohmann::ordered_json::object()}};
  if (manifest.parent.has_value()) {
    json["parent"] = {{"step", Value(manifest.parent->step)},
                      {"attempt", Value(manifest.parent->attempt)}};
  }
  for (const IndexImage& image : index.images) {
    json["images"].push_back({{"file", image.file},
                              {"rank", Value(image.rank)},
                              {"bytes", image.bytes},
                              {"block_bytes", image.block_bytes}});
  }
  for (const auto& [state, sum] : TotalsByState(index.tensor_states)) {
    json["states"][state] = {{"tensors", sum.tensor_count}, {"bytes", sum.bytes}};
  }
  if (options.tensors) {
    json["tensors"] = nlohmann::ordered_json::array();
    for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
      const TensorState& state = index.tensor_states[i];
      const std::optional<Fingerprint>& fingerprint = index.facts[i].fingerprint;
      json["tensors"].push_back({{"name", state.tensor},
                                 {"state", state.state},
                                 {"dtype", DtypeName(state.dtype)},
                                 {"shape", state.shape},
                                 {"fingerprint", nullptr},
                                 {"pieces", PiecesJson(index, i)}});
      if (fingerprint.has_value()) json["tensors"].back()["fingerprint"] = fingerprint->Hex();
    }
  }
  if (options.blobs) {
    json["blobs"] = nlohmann::ordered_json::array();
    for (const IndexBlob& blob : index.blobs) {
      json["blobs"].push_back({{"name", blob.name},
                               {"scope", blob.scope == BlobScope::kGlobal ? "global" : "rank"},
                               {"rank", Value(blob.rank)},
                               {"bytes", blob.bytes}});
    }
  }
  if (options.layout) json["layouts"] = index.layouts;
  return json;
}

void PrintText(const CatalogEntry& entry, const Index& index, const Options& options) {
  const Manifest& manifest = *entry.manifest;
  uint64_t bytes = 0;
  for (const IndexImage& image : index.images) bytes += image.bytes;
  std::printf("%s\n", Printable(entry.directory).c_str());
  std::printf("  job        %s (%s)\n", manifest.job.c_str(), manifest.job_uuid.c_str());
  std::printf("  checkpoint %s, %s, survives: %s\n",
              absl::StrFormat("step %d of attempt %d", Value(manifest.checkpoint.step),
                              Value(manifest.checkpoint.attempt))
                  .c_str(),
              StateText(entry).c_str(), Describe(manifest.survives).c_str());
  if (manifest.parent.has_value()) {
    std::printf("  parent     step %llu of attempt %u\n",
                static_cast<unsigned long long>(Value(manifest.parent->step)),
                Value(manifest.parent->attempt));
  }
  std::printf("  images     %zu of %u ranks, %s\n", index.images.size(), manifest.world_size,
              HumanBytes(bytes).c_str());
  for (const auto& [state, sum] : TotalsByState(index.tensor_states)) {
    std::printf("  state      %-16s %llu tensors, %s\n", Printable(state).c_str(),
                static_cast<unsigned long long>(sum.tensor_count), HumanBytes(sum.bytes).c_str());
  }
  std::printf("  blobs      %zu\n", index.blobs.size());
  if (options.tensors) {
    std::printf("\n");
    for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
      const TensorState& state = index.tensor_states[i];
      const auto [first, last] = index.PiecesOf(i);
      std::printf("  %s %s %s %s in %zu pieces, fingerprint %s\n", Printable(state.tensor).c_str(),
                  Printable(state.state).c_str(), std::string(DtypeName(state.dtype)).c_str(),
                  ShapeText(state).c_str(), last - first, FingerprintText(index.facts[i]).c_str());
    }
  }
  if (options.blobs) {
    std::printf("\n");
    for (const IndexBlob& blob : index.blobs) {
      std::printf("  blob %s of rank %u: %s\n", Printable(blob.name).c_str(), Value(blob.rank),
                  HumanBytes(blob.bytes).c_str());
    }
  }
  if (options.layout) {
    for (const std::string& layout : index.layouts) {
      std::printf("\n");
      const std::vector<std::string> lines = absl::StrSplit(layout, '\n');
      for (const std::string& line : lines) {
        std::printf("%s\n", Printable(line).c_str());
      }
    }
  }
}

absl::Status Run(Invocation& invocation, const Options& options) {
  ASSIGN_OR_RETURN(const CatalogEntry entry, Locate(invocation.file_system, options.path));
  ASSIGN_OR_RETURN(const Index index, LoadCommittedIndex(invocation.file_system, entry));
  if (invocation.json) {
    std::printf("%s\n", JsonText(ToJson(entry, index, options)).c_str());
  } else {
    PrintText(entry, index, options);
  }
  return absl::OkStatus();
}

}  // namespace

void AddInspect(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand("inspect", "Say what one checkpoint holds");
  auto options = std::make_shared<Options>();
  verb->add_option(
          "checkpoint", options->path,
          "Its directory, or ROOT/JOB for the newest; or another framework's file or folder")
      ->required();
  verb->add_flag("--tensors", options->tensors, "List every tensor and state");
  verb->add_flag("--sha256", options->sha256,
                 "With --tensors, of another framework's: the SHA-256 of every whole tensor");
  verb->add_flag("--blobs", options->blobs, "List the blobs");
  verb->add_flag("--layout", options->layout, "Print the layout documents");
  AddForeignOptions(*verb, options->foreign);
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      if (IsOurs(options->path)) return Report(Run(invocation, *options));
      return InspectForeign(invocation, {.path = options->path,
                                         .tensors = options->tensors,
                                         .sha256 = options->sha256,
                                         .foreign = options->foreign});
    };
  });
}

}  // namespace holdfast::cli
