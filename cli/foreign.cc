#include "cli/foreign.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <system_error>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "checkpoint/verify.h"
#include "cli/output.h"
#include "cli/process.h"
#include "cli/progress.h"
#include "converter/layout_file.h"
#include "converter/megatron_layout.h"
#include "converter/megatron_state.h"
#include "converter/parallel_rules.h"
#include "format/checkpoint_names.h"

namespace holdfast::cli {
namespace {

constexpr uint64_t kModelFileBytesMax = uint64_t{16} << 20;
constexpr uint64_t kForeignFactsBytesMax = uint64_t{64} << 20;

// Empty if there is none.
absl::StatusOr<std::string> ReadIfThere(FileSystem& file_system, const std::string& path) {
  absl::StatusOr<std::string> text = file_system.ReadSmallFile(path, kModelFileBytesMax);
  if (absl::IsNotFound(text.status())) return std::string();
  return text;
}

absl::Status VerifyOurs(Invocation& invocation, const CatalogEntry& entry) {
  Progress progress(
      "verify", invocation.no_progress ? Progress::Display::kNever : Progress::Display::kAutomatic,
      RealClock());
  ASSIGN_OR_RETURN(const VerifyReport report,
                   VerifyCheckpoint(invocation.file_system, PlainReadAt(), entry,
                                    {.progress = [&progress](uint64_t done, uint64_t total) {
                                      progress.Update(done, total);
                                      return true;
                                    }}));
  if (report.verdict == Verdict::kGood || report.verdict == Verdict::kDamagedUnread) {
    return absl::OkStatus();
  }
  return absl::DataLossError(
      absl::StrFormat("%s is damaged: %s", entry.directory,
                      report.findings.empty() ? "see verify" : report.findings.front().text));
}

// What an import has kept beside the tensors (`convert --format holdfast`): scalars, among them the
// optimizer's groups, so that they are there when it is written in another format.
absl::Status TakeForeignFacts(const converter::ForeignFolder& folder, const IndexBlob& blob,
                              converter::ForeignIndex& index) {
  if (blob.bytes > kForeignFactsBytesMax) return absl::OkStatus();
  std::string text(blob.bytes, '\0');
  RETURN_IF_ERROR(folder.ReadAt(index.extents[blob.image].file, blob.offset_bytes,
                                std::as_writable_bytes(std::span(text))));
  const auto json = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto scalars = json.find("scalars");
  if (!json.is_object() || scalars == json.end() || !scalars->is_object()) return absl::OkStatus();
  for (const auto& [name, value] : scalars->items()) {
    index.scalars.push_back(
        {name, value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace)});
  }
  return absl::OkStatus();
}

absl::StatusOr<converter::ForeignSource> OpenOurs(Invocation& invocation, const std::string& path) {
  ASSIGN_OR_RETURN(const CatalogEntry entry, Locate(invocation.file_system, path));
  ASSIGN_OR_RETURN(const Index index, LoadCommittedIndex(invocation.file_system, entry));
  RETURN_IF_ERROR(VerifyOurs(invocation, entry));
  converter::ForeignSource source;
  ASSIGN_OR_RETURN(source.folder,
                   converter::ForeignFolder::Open(invocation.file_system, entry.directory));
  converter::ForeignIndex& ours = source.index;
  ours.format = "holdfast";
  ours.has_step = true;
  ours.step = Value(index.checkpoint.step);
  ours.files.assign(source.folder->files().begin(), source.folder->files().end());
  ours.tensor_states = index.tensor_states;
  ours.boxes = index.boxes;
  for (const IndexImage& image : index.images) {
    ASSIGN_OR_RETURN(const uint32_t file, source.folder->Resolve("", image.file, "INDEX"));
    ours.AddRaw(file, 0, image.bytes);  // the extents have the numbers of the images
  }
  for (const IndexPiece& stored : index.pieces) {
    converter::ForeignPiece piece;
    piece.piece = stored.piece;
    piece.extent = stored.image;
    piece.offset_bytes = stored.offset_bytes;
    ours.pieces.push_back(piece);
  }
  for (const IndexBlob& blob : index.blobs) {
    if (blob.scope != BlobScope::kGlobal) continue;
    if (blob.name == kForeignFactsBlob) {
      RETURN_IF_ERROR(TakeForeignFacts(*source.folder, blob, ours));
      continue;
    }
    // Those that a writer has a place for.
    if (!converter::IsMegatronStateBlob(blob.name) &&
        !converter::ParseMegatronObject(blob.name).has_value()) {
      continue;
    }
    const uint32_t extent =
        ours.AddRaw(ours.extents[blob.image].file, blob.offset_bytes, blob.bytes);
    ours.blobs.push_back({blob.name, extent});
  }
  RETURN_IF_ERROR(converter::Finish(ours));
  return source;
}

}  // namespace

void AddForeignOptions(CLI::App& verb, ForeignOptions& options) {
  verb.add_option("--tag", options.tag,
                  "Of a folder that holds several checkpoints: which (default: the newest)");
  verb.add_option("--model", options.model,
                  "Directory of what the files do not hold: config.json, ds_config.json");
  verb.add_option("--names", options.names, "File of the names that the files do not hold");
  verb.add_option(
      "--preset", options.preset,
      "How a model family cuts its parameters, where the files do not say: gpt2, llama, "
      "mixtral");
  verb.add_option(
      "--layout-file", options.layout,
      "File that says how tensor-parallel ranks cut parameters, where the files do not");
}

bool IsOurs(const std::string& path) {
  std::error_code error;
  const std::filesystem::path whole = std::filesystem::canonical(path, error);
  if (error) return true;
  if (!std::filesystem::is_directory(whole, error)) return false;
  return ParseCheckpointDirectoryName(whole.filename().string()).has_value() ||
         std::filesystem::exists(whole / "JOB.json", error) ||
         std::filesystem::exists(whole / "MANIFEST.json", error);
}

absl::StatusOr<std::string> ReadLayoutFile(FileSystem& file_system, const std::string& path) {
  ASSIGN_OR_RETURN(std::string text, file_system.ReadSmallFile(path, kModelFileBytesMax));
  if (text.empty()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--layout-file %s: expected JSON, found an empty file", path));
  }
  if (const auto layout = converter::ParseLayoutFile(text); !layout.ok()) {
    return absl::Status(layout.status().code(),
                        absl::StrFormat("--layout-file %s: %s", path, layout.status().message()));
  }
  return text;
}

absl::StatusOr<converter::ForeignSource> LookAtForeign(Invocation& invocation,
                                                       const std::string& path,
                                                       const ForeignOptions& options) {
  converter::ReadOptions read;
  read.tag = options.tag;
  read.preset = options.preset;
  if (!options.preset.empty()) {
    RETURN_IF_ERROR(converter::ParallelPreset(options.preset).status());
  }
  if (!options.model.empty()) {
    ASSIGN_OR_RETURN(read.model_config,
                     ReadIfThere(invocation.file_system, options.model + "/config.json"));
    ASSIGN_OR_RETURN(read.model_arguments,
                     ReadIfThere(invocation.file_system, options.model + "/ds_config.json"));
    if (read.model_config.empty() && read.model_arguments.empty()) {
      return absl::NotFoundError(
          absl::StrFormat("--model %s: expected config.json or ds_config.json there, found neither",
                          options.model));
    }
  }
  if (!options.names.empty()) {
    ASSIGN_OR_RETURN(read.names,
                     invocation.file_system.ReadSmallFile(options.names, kModelFileBytesMax));
  }
  if (!options.layout.empty()) {
    ASSIGN_OR_RETURN(read.layout, ReadLayoutFile(invocation.file_system, options.layout));
  }
  converter::SandboxLimits limits;
  if (options.memory_bytes > 0) {
    ASSIGN_OR_RETURN(const ProcessMemory memory, LookAtProcessMemory(invocation.file_system));
    if (options.memory_bytes <= memory.resident_bytes) {
      return absl::InvalidArgumentError(
          absl::StrFormat("--memory: expected more than the %d bytes of the command itself, found "
                          "%d",
                          memory.resident_bytes, options.memory_bytes));
    }
    limits.memory_bytes =
        std::min(limits.memory_bytes, options.memory_bytes - memory.resident_bytes);
  }
  absl::StatusOr<converter::ForeignSource> source =
      converter::OpenForeignSource(invocation.file_system, path, read, limits);
  if (source.ok() && source->recognized && !options.tag.empty() && !options.tag_is_of_one) {
    const std::vector<converter::Fact>& layout = source->index.layout;
    const bool chosen = std::any_of(layout.begin(), layout.end(), [](const converter::Fact& fact) {
      return fact.name == "tag";  // what a reader has chosen
    });
    if (!chosen) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "--tag %s: expected a folder of several checkpoints, found %s, one of the format %s",
          options.tag, path, source->index.format));
    }
  }
  if (options.memory_bytes > 0 && converter::IsOutOfMemory(source.status())) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--memory: expected more than %d bytes to read this checkpoint with: %s",
                        options.memory_bytes, source.status().message()));
  }
  if (source.ok() && source->recognized && !options.layout.empty() && !options.layout_of_output &&
      source->index.format != "deepspeed" && source->index.format != "ucp") {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--layout-file is for checkpoints of DeepSpeed (deepspeed, ucp), and for --format ucp, and "
        "deepspeed with tp or pp: %s is of the format %s",
        path, source->index.format));
  }
  if (source.ok() && !source->sandbox.missing.empty()) {
    std::fprintf(stderr,
                 "holdfast: note: it was read without %s, which this system does not grant\n",
                 absl::StrJoin(source->sandbox.missing, ", ").c_str());
  }
  return source;
}

absl::StatusOr<converter::ForeignSource> OpenForeign(Invocation& invocation,
                                                     const std::string& path,
                                                     const ForeignOptions& options) {
  ASSIGN_OR_RETURN(converter::ForeignSource source, LookAtForeign(invocation, path, options));
  if (!source.recognized) return converter::NotRecognized(path, source);
  return source;
}

absl::StatusOr<converter::ForeignSource> OpenAny(Invocation& invocation, const std::string& path,
                                                 const ForeignOptions& options) {
  return IsOurs(path) ? OpenOurs(invocation, path) : OpenForeign(invocation, path, options);
}

ExitCode ReportForeign(const absl::Status& status) {
  const ExitCode code = Report(status);
  return absl::IsPermissionDenied(status) ? kExitUnsafe : code;
}

}  // namespace holdfast::cli
