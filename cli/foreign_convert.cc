// holdfast convert and holdfast export: a checkpoint of another framework, written in another
// format. The output is a new directory that appears whole at the end.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "checkpoint/single_image.h"
#include "cli/foreign.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "cli/size_value.h"
#include "converter/dcp_writer.h"
#include "converter/extent_reader.h"
#include "converter/safetensors_writer.h"
#include "converter/whole_tensor_reader.h"
#include "io/staged_directory.h"

namespace holdfast::cli {
namespace {

constexpr std::array<std::string_view, 3> kFormats = {"holdfast", "safetensors", "dcp"};
constexpr uint64_t kBlobBytesMax = uint64_t{256} << 20;
// What a folder of Hugging Face's has besides weights, as far as it is data.
constexpr std::array<std::string_view, 11> kCompanions = {
    "config.json",     "generation_config.json",   "tokenizer.json",     "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json",  "added_tokens.json",  "vocab.json",
    "merges.txt",      "preprocessor_config.json", "chat_template.jinja"};
constexpr uint64_t kCompanionBytesMax = uint64_t{256} << 20;

struct Options {
  std::string path;
  std::string out;
  std::string format = "safetensors";
  std::vector<std::string> drop;
  uint64_t shard_bytes = 5'000'000'000;
  bool force = false;
  bool dry_run = false;
  bool weights_only = false;  // export: what is no weights is left out without being asked for
  ForeignOptions foreign;
};

absl::Status CheckFormat(const Options& options) {
  for (const std::string_view format : kFormats) {
    if (options.format == format) return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrFormat("--format: expected holdfast, safetensors or dcp, found \"%s\"%s",
                      options.format, DidYouMean(options.format, kFormats)));
}

// Names and contents of what stands beside the weights.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Companions(
    FileSystem& file_system, const Options& options, const converter::ForeignSource& source) {
  std::vector<std::pair<std::string, std::string>> found;
  std::string directory = options.foreign.model;
  if (directory.empty() && source.index.format == "hf") directory = source.folder->root();
  if (directory.empty()) return found;
  for (const std::string_view name : kCompanions) {
    absl::StatusOr<std::string> text =
        file_system.ReadSmallFile(absl::StrFormat("%s/%s", directory, name), kCompanionBytesMax);
    if (absl::IsNotFound(text.status())) continue;
    RETURN_IF_ERROR(text.status());
    found.emplace_back(name, *std::move(text));
  }
  return found;
}

absl::Status WriteSmall(FileSystem& file_system, const std::string& path, const std::string& text) {
  ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, file_system.CreateNew(path));
  RETURN_IF_ERROR(file->Append(std::as_bytes(std::span(text))));
  return file->Sync();
}

// What was written, or would be.
struct Outcome {
  struct File {
    std::string name;
    uint64_t bytes = 0;
  };
  std::vector<File> files;
  uint64_t tensor_count = 0;
  uint64_t bytes = 0;
  std::vector<std::string> left_out;
};

absl::Status CheckRoom(FileSystem& file_system, const std::string& directory, uint64_t bytes) {
  ASSIGN_OR_RETURN(const Space space, file_system.SpaceOf(directory));
  if (space.available_bytes >= bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrFormat("%s: expected %d free bytes for the output, found %d", directory, bytes,
                      space.available_bytes));
}

// One conversion: what all formats need.
class Conversion {
 public:
  Conversion(Invocation& invocation, const Options& options)
      : file_system_(invocation.file_system),
        options_(options),
        progress_(
            "convert",
            invocation.no_progress ? Progress::Display::kNever : Progress::Display::kAutomatic,
            RealClock()) {}

  absl::StatusOr<Outcome> Run(Invocation& invocation) {
    RETURN_IF_ERROR(CheckFormat(options_));
    ASSIGN_OR_RETURN(parent_, DirectoryOf(options_.out));
    ASSIGN_OR_RETURN(source_, OpenAny(invocation, options_.path, options_.foreign));
    ASSIGN_OR_RETURN(staged_,
                     StagedDirectory::Create(options_.out, absl::StrFormat("%016x", RandomBits()),
                                             options_.force ? StagedDirectory::Existing::kReplace
                                                            : StagedDirectory::Existing::kRefuse));
    RETURN_IF_ERROR(options_.format == "holdfast" ? ToHoldfast()
                    : options_.format == "dcp"    ? ToDcp()
                                                  : ToSafetensors());
    if (!options_.dry_run) RETURN_IF_ERROR(staged_->Publish());
    return std::move(outcome_);
  }

 private:
  bool Advance(uint64_t done, uint64_t total) {
    progress_.Update(done, total);
    return !interrupt_.requested();
  }

  bool Drops(std::string_view kind) const {
    return std::find(options_.drop.begin(), options_.drop.end(), kind) != options_.drop.end();
  }

  absl::Status ToSafetensors() {
    converter::SafetensorsExportOptions request;
    request.shard_bytes = options_.shard_bytes;
    request.drop_states = options_.drop;
    request.drop_unreadable = Drops("unreadable");
    if (options_.weights_only) request.drop_states.push_back("*");
    ASSIGN_OR_RETURN(const converter::SafetensorsPlan plan,
                     converter::PlanSafetensors(source_.index, request));
    ASSIGN_OR_RETURN(const auto companions, Companions(file_system_, options_, source_));
    outcome_.left_out = plan.left_out;
    outcome_.bytes = plan.bytes;
    for (const converter::SafetensorsShard& shard : plan.shards) {
      outcome_.files.push_back({shard.name, shard.bytes});
      outcome_.tensor_count += shard.states.size();
    }
    if (!plan.index_json.empty()) {
      outcome_.files.push_back({converter::kSafetensorsIndexName, plan.index_json.size()});
    }
    for (const auto& [name, text] : companions) {
      outcome_.files.push_back({name, text.size()});
      outcome_.bytes += text.size();
    }
    RETURN_IF_ERROR(CheckRoom(file_system_, parent_, outcome_.bytes));
    if (options_.dry_run) return absl::OkStatus();
    RETURN_IF_ERROR(converter::WriteSafetensors(
        file_system_, staged_->path(), *source_.folder, source_.index, plan,
        [this](uint64_t done, uint64_t total) { return Advance(done, total); }));
    for (const auto& [name, text] : companions) {
      RETURN_IF_ERROR(WriteSmall(file_system_, staged_->path() + "/" + name, text));
    }
    return absl::OkStatus();
  }

  // A folder that torch.distributed.checkpoint loads.
  absl::Status ToDcp() {
    converter::DcpWriteOptions request;
    request.file_bytes = options_.shard_bytes;
    request.drop_states = options_.drop;
    request.drop_unreadable = Drops("unreadable");
    ASSIGN_OR_RETURN(const converter::DcpPlan plan, converter::PlanDcp(source_.index, request));
    outcome_.left_out = plan.left_out;
    outcome_.bytes = plan.bytes;
    for (const converter::DcpPlan::File& file : plan.files) {
      outcome_.files.push_back({file.name, file.bytes});
    }
    outcome_.files.push_back({".metadata", plan.metadata.size()});
    for (const converter::DcpPlannedItem& item : plan.items) {
      outcome_.tensor_count += item.object ? 0 : 1;
    }
    RETURN_IF_ERROR(CheckRoom(file_system_, parent_, outcome_.bytes));
    if (options_.dry_run) return absl::OkStatus();
    return converter::WriteDcp(
        file_system_, staged_->path(), *source_.folder, source_.index, plan,
        [this](uint64_t done, uint64_t total) { return Advance(done, total); });
  }

  // Everything: all states, and what is beside them as blobs. The job has the name of the output.
  absl::Status ToHoldfast() {
    const converter::ForeignIndex& index = source_.index;
    if (!index.unreadable.empty() && !Drops("unreadable")) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s %s; --drop unreadable leaves it and %d others out", index.unreadable.front().name,
          index.unreadable.front().reason, index.unreadable.size() - 1));
    }
    for (const converter::Unreadable& each : index.unreadable) {
      outcome_.left_out.push_back(absl::StrFormat("%s, which %s", each.name, each.reason));
    }
    TensorSource tensors;
    std::vector<uint32_t> numbers;
    uint64_t total = 0;
    for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
      const TensorState& state = index.tensor_states[i];
      if (Drops(state.state)) {
        outcome_.left_out.push_back(Describe(state));
        continue;
      }
      numbers.push_back(i);
      tensors.states.push_back(state);
      total += state.Bytes();
    }
    converter::WholeTensorReader reader(*source_.folder, index);
    uint64_t done = 0;
    tensors.read = [&](size_t number, const TensorSource::Sink& sink) {
      return reader.Read(numbers[number], [&](std::span<const std::byte> bytes) -> absl::Status {
        RETURN_IF_ERROR(sink(bytes));
        done += bytes.size();
        return Advance(done, total) ? absl::OkStatus()
                                    : absl::CancelledError("stopped; nothing was left behind");
      });
    };
    SingleImageRequest request;
    request.job_directory = staged_->path();
    request.job = std::filesystem::path(options_.out).lexically_normal().filename().string();
    request.job_uuid = RandomUuid();
    request.step = Step{index.has_step ? index.step : 0};
    request.writer = absl::StrFormat("%016x", RandomBits());
    request.scratch_directory = staged_->path();
    request.created_at = absl::Now();
    ASSIGN_OR_RETURN(request.blobs, Blobs());
    ASSIGN_OR_RETURN(outcome_.bytes, SingleImageBytes(tensors, request));
    outcome_.tensor_count = tensors.states.size();
    RETURN_IF_ERROR(CheckRoom(file_system_, parent_, outcome_.bytes));
    if (options_.dry_run) return absl::OkStatus();
    ASSIGN_OR_RETURN(const SingleImageReport report,
                     WriteSingleImage(file_system_, tensors, request));
    outcome_.files.push_back(
        {std::filesystem::path(report.directory).filename().string(), report.bytes_written});
    return absl::OkStatus();
  }

  // `foreign.json` has what inspect shows as layout and scalars; the rest is byte for byte.
  absl::StatusOr<std::vector<SingleImageBlob>> Blobs() {
    const converter::ForeignIndex& index = source_.index;
    std::string json =
        absl::StrFormat("{\"format\": %s, \"variant\": %s", converter::JsonQuote(index.format),
                        converter::JsonQuote(index.variant));
    for (const auto& [name, facts] :
         {std::pair{"layout", &index.layout}, {"scalars", &index.scalars}}) {
      absl::StrAppendFormat(&json, ", \"%s\": {", name);
      const char* separator = "";
      for (const converter::Fact& fact : *facts) {
        absl::StrAppendFormat(&json, "%s%s: %s", separator, converter::JsonQuote(fact.name),
                              fact.json);
        separator = ", ";
      }
      json += "}";
    }
    std::vector<SingleImageBlob> blobs = {{"foreign.json", json + "}\n"}};
    converter::ExtentReader extents(*source_.folder, index);
    uint64_t bytes = 0;
    for (const converter::ForeignBlob& blob : index.blobs) {
      const uint64_t size = index.extents[blob.extent].decoded_bytes;
      bytes += size;
      if (bytes > kBlobBytesMax) {
        return absl::ResourceExhaustedError(absl::StrFormat(
            "the blobs of the checkpoint: expected at most %d bytes, found more", kBlobBytesMax));
      }
      std::string text(size, '\0');
      RETURN_IF_ERROR(extents.Read(blob.extent, 0, std::as_writable_bytes(std::span(text))));
      blobs.push_back({blob.name, std::move(text)});
    }
    return blobs;
  }

  FileSystem& file_system_;
  const Options& options_;
  Progress progress_;
  const InterruptFlag interrupt_;
  std::string parent_;
  converter::ForeignSource source_;
  std::unique_ptr<StagedDirectory> staged_;
  Outcome outcome_;
};

ExitCode Run(Invocation& invocation, const Options& options) {
  const absl::StatusOr<Outcome> outcome = Conversion(invocation, options).Run(invocation);
  if (!outcome.ok()) return ReportForeign(outcome.status());
  if (invocation.json) {
    nlohmann::ordered_json json = {{"schema_version", 1},
                                   {"out", options.out},
                                   {"format", options.format},
                                   {"dry_run", options.dry_run},
                                   {"tensors", outcome->tensor_count},
                                   {"bytes", outcome->bytes},
                                   {"files", nlohmann::ordered_json::array()},
                                   {"left_out", outcome->left_out}};
    for (const Outcome::File& file : outcome->files) {
      json["files"].push_back({{"file", file.name}, {"bytes", file.bytes}});
    }
    std::printf("%s\n", JsonText(json).c_str());
    return kExitOk;
  }
  std::printf("%s: %s%llu tensors, %s\n", Printable(options.out).c_str(),
              options.dry_run ? "would have " : "",
              static_cast<unsigned long long>(outcome->tensor_count),
              HumanBytes(outcome->bytes).c_str());
  for (const std::string& each : outcome->left_out) {
    std::printf("  left out: %s\n", Printable(each).c_str());
  }
  return kExitOk;
}

void AddVerb(CLI::App& app, Invocation& invocation, const char* name, const char* description,
             bool weights_only) {
  CLI::App* verb = app.add_subcommand(name, description);
  auto options = std::make_shared<Options>();
  options->weights_only = weights_only;
  verb->add_option("checkpoint", options->path, "Another framework's file or folder, or ours")
      ->required();
  verb->add_option("out", options->out, "The directory to make")->required();
  if (!weights_only) {
    verb->add_option("--format", options->format,
                     "holdfast (OUT is ROOT/JOB), safetensors (a Hugging Face folder) or dcp")
        ->required();
  } else {
    verb->add_option("--format", options->format, "safetensors")
        ->check(CLI::IsMember({"safetensors"}))
        ->capture_default_str();
  }
  verb->add_option("--drop", options->drop,
                   "Leave out: a state (exp_avg), '*' for all that are no weights, unreadable");
  verb->add_option("--shard-bytes", options->shard_bytes, "Tensors of one file, at most")
      ->transform(SizeValue(SizeValue::Units::kDecimal))
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  verb->add_flag("--force", options->force, "Replace the directory if it is there");
  verb->add_flag("--dry-run", options->dry_run, "Check everything, and write nothing");
  AddForeignOptions(*verb, options->foreign);
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return Run(invocation, *options); };
  });
}

}  // namespace

void AddConvert(CLI::App& app, Invocation& invocation) {
  AddVerb(app, invocation, "convert", "Write another framework's checkpoint in another format",
          false);
}

void AddExport(CLI::App& app, Invocation& invocation) {
  AddVerb(app, invocation, "export", "Write the weights of a checkpoint as a Hugging Face folder",
          true);
}

}  // namespace holdfast::cli
