// holdfast convert and holdfast export: a checkpoint of another framework, written in another
// format. The output is a new directory that appears whole at the end.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "checkpoint/single_image.h"
#include "cli/foreign.h"
#include "cli/foreign_map.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "cli/process.h"
#include "cli/progress.h"
#include "cli/size_value.h"
#include "converter/conversion_source.h"
#include "converter/dcp_writer.h"
#include "converter/deepspeed_writer.h"
#include "converter/fsdp_writer.h"
#include "converter/mapping_checks.h"
#include "converter/megatron_dist_writer.h"
#include "converter/megatron_legacy_writer.h"
#include "converter/safetensors_writer.h"
#include "converter/selection.h"
#include "converter/torch_output.h"
#include "converter/torch_writer.h"
#include "converter/ucp_writer.h"
#include "format/layout_rules.h"
#include "io/staged_directory.h"

namespace holdfast::cli {
namespace {

// What each format is written by is Conversion::Write.
constexpr std::array<std::string_view, 8> kFormats = {
    "holdfast", "safetensors", "dcp", "torch", "deepspeed", "ucp", "fsdp", "megatron"};
constexpr uint64_t kBlobBytesMax = uint64_t{256} << 20;
constexpr uint64_t kRenameFileBytesMax = uint64_t{16} << 20;
// Of --memory: stacks, lists of files and what the allocator keeps.
constexpr uint64_t kReserveBytes = uint64_t{12} << 20;
constexpr uint64_t kEntryBytes = 600;  // of a torch file, in the list and in the directory
constexpr uint64_t kDecoderBytes = uint64_t{64} << 20;  // ExtentReader's
constexpr uint64_t kWindowsMax = 4;                     // ConversionSource's
constexpr uint64_t kWindowBytesMin = uint64_t{256} << 10;
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
  std::string to;
  std::string rename_file;
  converter::SelectionRequest selection;
  MapOptions map;
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
      absl::StrFormat("--format: expected holdfast, safetensors, dcp, torch, deepspeed, ucp, fsdp "
                      "or megatron, found \"%s\"%s",
                      options.format, DidYouMean(options.format, kFormats)));
}

// The axes of `--to`, of which a format may have fewer.
struct Target {
  uint64_t zero = 1;
  uint64_t dp = 1;
  converter::MegatronDegrees megatron;  // tp, pp and ep: of DeepSpeed too
  bool says_tp = false;
  bool says_pp = false;
};

// Where the size of one of Megatron's axes goes; none: it is no size of a degree.
uint64_t* DegreeOf(std::string_view axis, converter::MegatronDegrees& degrees) {
  if (axis == "tp") return &degrees.tensor;
  if (axis == "pp") return &degrees.pipeline;
  if (axis == "vpp") return &degrees.virtual_stages;
  if (axis == "ep") return &degrees.expert;
  if (axis == "etp") return &degrees.expert_tensor.emplace();
  if (axis == "first") return &degrees.first_layers.emplace();
  if (axis == "last") return &degrees.last_layers.emplace();
  return nullptr;
}

absl::StatusOr<Target> ParseTarget(const Options& options) {
  Target target;
  if (options.to.empty()) return target;
  std::vector<std::string_view> axes;
  if (options.format == "deepspeed") axes = {"zero", "dp", "tp", "pp", "ep"};
  if (options.format == "ucp") axes = {"zero"};
  if (options.format == "fsdp") axes = {"dp"};
  if (options.format == "megatron") axes = {"tp", "pp", "vpp", "ep", "etp", "first", "last"};
  if (axes.empty()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--to: expected a format with a layout (deepspeed, ucp, fsdp, megatron), found %s",
        options.format));
  }
  ASSIGN_OR_RETURN(const std::vector<AxisSize> sizes, ParseAxisSizes(options.to));
  for (const AxisSize& size : sizes) {
    const auto refuse = [&](const std::string& expected, const std::string& hint = "") {
      return absl::InvalidArgumentError(
          absl::StrFormat("--to, column %d: expected %s, found \"%s=%d\"%s", size.column, expected,
                          size.axis, size.size, hint));
    };
    if (!size.mesh.empty() || std::find(axes.begin(), axes.end(), size.axis) == axes.end()) {
      const std::vector<std::string> names(axes.begin(), axes.end());
      return refuse(
          absl::StrFormat("an axis of %s (%s)", options.format, absl::StrJoin(names, ", ")),
          DidYouMean(size.axis, axes));
    }
    if (size.axis == "zero") {
      if (size.size < 1 || size.size > 3) return refuse("a stage from 1 to 3");
      target.zero = size.size;
    } else {
      if (size.size < 1 || size.size > converter::kFsdpRanksMax) {
        return refuse(absl::StrFormat("1 to %d ranks", converter::kFsdpRanksMax));
      }
      uint64_t* const degree = DegreeOf(size.axis, target.megatron);
      (degree == nullptr ? target.dp : *degree) = size.size;
      if (size.axis == "tp") target.says_tp = true;
      if (size.axis == "pp") target.says_pp = true;
      const converter::MegatronDegrees& degrees = target.megatron;
      if (degrees.tensor * degrees.pipeline > converter::kMegatronRanksMax / degrees.expert) {
        return refuse(absl::StrFormat("at most %d ranks in all", converter::kMegatronRanksMax));
      }
    }
  }
  if (options.format == "deepspeed" && target.dp % target.megatron.expert != 0) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--to %s: expected ep to divide dp, because expert-parallel ranks are data-parallel ranks",
        options.to));
  }
  const uint64_t model_ranks = target.megatron.tensor * target.megatron.pipeline;
  if (options.format == "deepspeed" && target.dp > converter::kFsdpRanksMax / model_ranks) {
    return absl::InvalidArgumentError(absl::StrFormat("--to %s: expected at most %d ranks in all",
                                                      options.to, converter::kFsdpRanksMax));
  }
  if (options.format == "deepspeed" && target.says_pp && target.zero != 1) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--to %s: expected zero=1 with pp, because DeepSpeed's pipelines run with no other stage",
        options.to));
  }
  return target;
}

// Names and contents of what stands beside the weights.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Companions(
    FileSystem& file_system, const Options& options, const std::string& format,
    const converter::ForeignFolder& folder) {
  std::vector<std::pair<std::string, std::string>> found;
  std::string directory = options.foreign.model;
  if (directory.empty() && format == "hf") directory = folder.root();
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
  std::vector<std::string> casts;
  std::vector<std::string> repairs;  // of the source, which the framework's tools do not make
  std::vector<std::string> notes;
  uint64_t became_infinite = 0;  // by casts
  std::string first_infinite;
  uint64_t peak_memory_bytes = 0;  // of this process
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
    ASSIGN_OR_RETURN(target_, ParseTarget(options_));
    if (options_.out.empty()) {
      return absl::InvalidArgumentError("OUT: expected the name of what is to be made, found none");
    }
    std::filesystem::path out = std::filesystem::path(options_.out).lexically_normal();
    // A new directory may be called "out/", a file may not.
    if (!out.has_filename() && out.has_relative_path() && options_.format != "torch") {
      out = out.parent_path();
    }
    out_ = out.string();
    ASSIGN_OR_RETURN(parent_, DirectoryOf(out_));
    out_name_ = out.filename().string();
    ASSIGN_OR_RETURN(converter::SelectionRequest request, Request());
    drops_objects_ = converter::DropsObjects(request);
    RETURN_IF_ERROR(CheckSourceIsNotInOut());
    ForeignOptions foreign = options_.foreign;
    foreign.layout_of_output = TakesCuts();
    ASSIGN_OR_RETURN(source_, OpenAny(invocation, options_.path, foreign));
    ASSIGN_OR_RETURN(converter::Selection selection,
                     converter::Select(std::move(source_.index), request));
    // Or a dry run would find nothing wrong, and a hole would be met after gigabytes.
    RETURN_IF_ERROR(converter::CheckCover(selection.index));
    outcome_.left_out = selection.left_out;
    outcome_.casts = selection.casts;
    outcome_.repairs = selection.index.repairs;
    input_.emplace(*source_.folder, std::move(selection));
    ASSIGN_OR_RETURN(
        staged_,
        StagedDirectory::Create(out_, absl::StrFormat("%016x", RandomBits()),
                                options_.force ? StagedDirectory::Existing::kReplace
                                               : StagedDirectory::Existing::kRefuse,
                                options_.format == "torch" ? StagedDirectory::Result::kFile
                                                           : StagedDirectory::Result::kDirectory));
    RETURN_IF_ERROR(Write());
    if (!options_.dry_run) RETURN_IF_ERROR(staged_->Publish());
    outcome_.became_infinite = input_->became_infinite();
    outcome_.first_infinite = input_->first_infinite();
    ASSIGN_OR_RETURN(const ProcessMemory memory, LookAtProcessMemory(file_system_));
    outcome_.peak_memory_bytes = memory.peak_resident_bytes;
    return std::move(outcome_);
  }

 private:
  const converter::ForeignIndex& index() const { return input_->index(); }

  // What --force replaces is removed with all that is in it: never what was read, and whatever else
  // lies around it. (CKPT itself may be replaced: it has been read by then.)
  absl::Status CheckSourceIsNotInOut() const {
    std::error_code error;
    const std::filesystem::path out = std::filesystem::canonical(options_.out, error);
    if (error) return absl::OkStatus();  // there is nothing to replace
    const std::filesystem::path source = std::filesystem::canonical(options_.path, error);
    if (error) return absl::OkStatus();  // who opens it says so
    const auto [out_end, source_end] =
        std::mismatch(out.begin(), out.end(), source.begin(), source.end());
    if (out_end != out.end() || source_end == source.end()) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrFormat("%s is there already, and %s is in it: choose another place for the output",
                        options_.out, options_.path));
  }

  absl::StatusOr<converter::SelectionRequest> Request() {
    converter::SelectionRequest request = options_.selection;
    if (options_.weights_only) request.drop.push_back(converter::kDropNoWeights);
    if (!options_.rename_file.empty()) {
      ASSIGN_OR_RETURN(request.rename,
                       file_system_.ReadSmallFile(options_.rename_file, kRenameFileBytesMax));
    }
    ASSIGN_OR_RETURN(
        request.map,
        MappingOf(file_system_, options_.map,
                  {.format = options_.format, .to = options_.to, .model = options_.foreign.model},
                  source_));
    return request;
  }

  absl::Status Write() {
    const std::string& format = options_.format;
    if (format == "holdfast") return ToHoldfast();
    if (format == "safetensors") return ToSafetensors();
    if (format == "dcp") return ToDcp();
    if (format == "megatron") return ToMegatron();
    if (format == "torch") return ToTorchFiles(converter::PlanTorch(index(), out_name_));
    if (format == "fsdp") return ToTorchFiles(converter::PlanFsdp(index(), target_.dp));
    if (target_.zero == 3) {
      RETURN_IF_ERROR(SetWindow(0));
      RETURN_IF_ERROR(converter::CheckWeightsAreMasters(*input_));
    }
    return ToDeepSpeed();
  }

  // A native checkpoint, or a universal folder.
  absl::Status ToDeepSpeed() {
    std::string preset, layout;
    if (TakesCuts()) {
      preset = options_.foreign.preset;
      if (!options_.foreign.layout.empty()) {
        ASSIGN_OR_RETURN(layout, ReadLayoutFile(file_system_, options_.foreign.layout));
      }
    }
    if (options_.format == "ucp") {
      return ToTorchFiles(converter::PlanUniversal(
          index(), {.stage = target_.zero, .preset = preset, .layout = layout}));
    }
    converter::DeepSpeedDegrees degrees{.preset = preset, .layout = layout};
    if (target_.says_tp) degrees.tensor = target_.megatron.tensor;
    if (target_.says_pp) degrees.pipeline = target_.megatron.pipeline;
    return ToTorchFiles(converter::PlanDeepSpeed(*input_, {.stage = target_.zero,
                                                           .dp = target_.dp,
                                                           .ep = target_.megatron.expert,
                                                           .degrees = std::move(degrees)}));
  }

  // Whether what is written is cut for ranks of model parallelism, or says how: --preset and
  // --layout-file speak of it too. A universal folder of other names than the source's is whole.
  bool TakesCuts() const {
    if (options_.format == "ucp") return options_.rename_file.empty() && options_.map.maps.empty();
    return options_.format == "deepspeed" && (target_.says_tp || target_.says_pp);
  }

  bool Advance(uint64_t done, uint64_t total) {
    progress_.Update(done, total);
    return !interrupt_.requested();
  }

  // To be called when all that is kept in memory is there: what remains of --memory is for the
  // buffers through which the tensors pass.
  absl::Status SetWindow(uint64_t further_bytes) {
    const uint64_t memory_max = options_.foreign.memory_bytes;
    if (memory_max == 0) return absl::OkStatus();
    ASSIGN_OR_RETURN(const ProcessMemory memory, LookAtProcessMemory(file_system_));
    uint64_t kept = memory.resident_bytes + kReserveBytes + further_bytes;
    const bool decodes =
        std::any_of(index().extents.begin(), index().extents.end(),
                    [](const converter::Extent& e) { return e.codec != converter::Codec::kRaw; });
    if (decodes) kept += kDecoderBytes;
    const uint64_t least =
        std::max(kept + kWindowsMax * kWindowBytesMin, memory.peak_resident_bytes);
    if (memory_max < least) {
      return absl::InvalidArgumentError(
          absl::StrFormat("--memory: expected at least %dM for the index of this checkpoint and "
                          "the plan of its conversion, found %d bytes",
                          (least >> 20) + 1, memory_max));
    }
    input_->set_window_bytes(std::min<uint64_t>((memory_max - kept) / kWindowsMax,
                                                converter::WholeTensorReader::kWindowBytes));
    return absl::OkStatus();
  }

  converter::ConversionProgress Watch() {
    return [this](uint64_t done, uint64_t total) { return Advance(done, total); };
  }

  // What a plan says, and whether there is room for it.
  absl::Status TakePlan(uint64_t bytes, uint64_t tensor_count,
                        const std::vector<std::string>& left_out, uint64_t writing_bytes = 0) {
    outcome_.bytes = bytes;
    outcome_.tensor_count = tensor_count;
    if (!left_out.empty() && !drops_objects_) {
      return absl::FailedPreconditionError(
          absl::StrFormat("--format %s has no place for %s; --drop %s leaves it out",
                          options_.format, absl::StrJoin(left_out, "; "), converter::kDropObjects));
    }
    outcome_.left_out.insert(outcome_.left_out.end(), left_out.begin(), left_out.end());
    RETURN_IF_ERROR(SetWindow(writing_bytes));
    return CheckRoom(file_system_, parent_, bytes);
  }

  // Memory that writing takes besides the plan: of one file its pickle again, and its entries.
  static uint64_t WritingBytes(const converter::TorchFilesPlan& plan) {
    uint64_t most = 0;
    for (const converter::PlannedFile& file : plan.files) {
      most = std::max(most, 2 * file.pickle.size() + kEntryBytes * file.storages.size());
    }
    return most;
  }

  absl::Status ToTorchFiles(const absl::StatusOr<converter::TorchFilesPlan>& plan) {
    RETURN_IF_ERROR(plan.status());
    outcome_.notes = plan->notes;
    for (const converter::PlannedFile& file : plan->files) {
      outcome_.files.push_back({file.path, file.bytes});
    }
    RETURN_IF_ERROR(TakePlan(plan->bytes, plan->tensor_count, plan->left_out, WritingBytes(*plan)));
    if (options_.dry_run) return absl::OkStatus();
    return converter::WriteTorchFiles(file_system_, staged_->path(), *input_, *plan, Watch());
  }

  absl::Status ToSafetensors() {
    ASSIGN_OR_RETURN(const converter::SafetensorsPlan plan,
                     converter::PlanSafetensors(index(), {.shard_bytes = options_.shard_bytes}));
    ASSIGN_OR_RETURN(const auto companions,
                     Companions(file_system_, options_, index().format, *source_.folder));
    uint64_t bytes = plan.bytes;
    uint64_t tensor_count = 0;
    for (const converter::SafetensorsShard& shard : plan.shards) {
      outcome_.files.push_back({shard.name, shard.bytes});
      tensor_count += shard.states.size();
    }
    if (!plan.index_json.empty()) {
      outcome_.files.push_back({converter::kSafetensorsIndexName, plan.index_json.size()});
    }
    for (const auto& [name, text] : companions) {
      outcome_.files.push_back({name, text.size()});
      bytes += text.size();
    }
    RETURN_IF_ERROR(TakePlan(bytes, tensor_count, plan.left_out));
    if (options_.dry_run) return absl::OkStatus();
    RETURN_IF_ERROR(
        converter::WriteSafetensors(file_system_, staged_->path(), *input_, plan, Watch()));
    for (const auto& [name, text] : companions) {
      RETURN_IF_ERROR(WriteSmall(file_system_, staged_->path() + "/" + name, text));
    }
    return absl::OkStatus();
  }

  // A folder that torch.distributed.checkpoint loads.
  absl::Status ToDcp() {
    ASSIGN_OR_RETURN(const converter::DcpPlan plan,
                     converter::PlanDcp(index(), {.file_bytes = options_.shard_bytes}));
    for (const converter::DcpPlan::File& file : plan.files) {
      outcome_.files.push_back({file.name, file.bytes});
    }
    outcome_.files.push_back({".metadata", plan.metadata.size()});
    RETURN_IF_ERROR(TakePlan(plan.bytes, index().tensor_states.size(), plan.left_out));
    if (options_.dry_run) return absl::OkStatus();
    return converter::WriteDcp(file_system_, staged_->path(), *input_, plan, Watch());
  }

  // Megatron's torch_dist; for chosen degrees its legacy files, which are those of ranks.
  absl::Status ToMegatron() {
    RETURN_IF_ERROR(SetWindow(0));
    ASSIGN_OR_RETURN(const std::string config,
                     ConfigOf(file_system_, options_.foreign.model, *source_.folder));
    if (!options_.to.empty()) {
      return ToTorchFiles(converter::PlanMegatronLegacy(*input_, target_.megatron, config));
    }
    ASSIGN_OR_RETURN(
        const converter::MegatronDistPlan plan,
        converter::PlanMegatronDist(*input_, {.file_bytes = options_.shard_bytes}, config));
    for (const converter::DcpPlan::File& file : plan.sharded.files) {
      outcome_.files.push_back({plan.prefix + file.name, file.bytes});
    }
    outcome_.files.push_back({plan.prefix + ".metadata", plan.sharded.metadata.size()});
    outcome_.notes = plan.others.notes;
    for (const converter::PlannedFile& file : plan.others.files) {
      outcome_.files.push_back({file.path, file.bytes});
    }
    RETURN_IF_ERROR(TakePlan(plan.bytes(), plan.tensor_count, plan.others.left_out));
    if (options_.dry_run) return absl::OkStatus();
    return converter::WriteMegatronDist(file_system_, staged_->path(), *input_, plan, Watch());
  }

  // Everything: all states, and what is beside them as blobs. The job has the name of the output.
  absl::Status ToHoldfast() {
    TensorSource tensors;
    tensors.states = index().tensor_states;
    uint64_t total = 0;
    for (const TensorState& state : tensors.states) total += state.Bytes();
    uint64_t done = 0;
    tensors.read = [&](size_t number, const TensorSource::Sink& sink) {
      return input_->Read(
          static_cast<uint32_t>(number), [&](std::span<const std::byte> bytes) -> absl::Status {
            RETURN_IF_ERROR(sink(bytes));
            done += bytes.size();
            return Advance(done, total) ? absl::OkStatus()
                                        : absl::CancelledError("stopped; nothing was left behind");
          });
    };
    SingleImageRequest request;
    request.job_directory = staged_->path();
    request.job = out_name_;
    request.job_uuid = RandomUuid();
    request.step = Step{index().has_step ? index().step : 0};
    request.writer = absl::StrFormat("%016x", RandomBits());
    request.scratch_directory = staged_->path();
    request.created_at = absl::Now();
    ASSIGN_OR_RETURN(request.blobs, Blobs());
    ASSIGN_OR_RETURN(SingleImagePlan plan, SingleImagePlan::Create(tensors, request));
    outcome_.bytes = plan.image_bytes();
    outcome_.tensor_count = tensors.states.size();
    RETURN_IF_ERROR(SetWindow(plan.write_memory_bytes()));
    RETURN_IF_ERROR(CheckRoom(file_system_, parent_, outcome_.bytes));
    if (options_.dry_run) return absl::OkStatus();
    ASSIGN_OR_RETURN(const SingleImageReport report,
                     WriteSingleImage(file_system_, tensors, request, std::move(plan)));
    outcome_.files.push_back(
        {std::filesystem::path(report.directory).filename().string(), report.bytes_written});
    return absl::OkStatus();
  }

  // kForeignFactsBlob has what inspect shows as layout and scalars; the rest is byte for byte.
  absl::StatusOr<std::vector<SingleImageBlob>> Blobs() {
    const converter::ForeignIndex& index = this->index();
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
    std::vector<SingleImageBlob> blobs = {{kForeignFactsBlob, json + "}\n"}};
    uint64_t bytes = 0;
    for (uint32_t number = 0; number < index.blobs.size(); ++number) {
      const converter::ForeignBlob& blob = index.blobs[number];
      bytes += index.extents[blob.extent].decoded_bytes;
      if (bytes > kBlobBytesMax) {
        return absl::ResourceExhaustedError(absl::StrFormat(
            "the blobs of the checkpoint: expected at most %d bytes, found more", kBlobBytesMax));
      }
      std::string text;
      RETURN_IF_ERROR(input_->ReadBlob(number, [&](std::span<const std::byte> read) {
        text.append(reinterpret_cast<const char*>(read.data()), read.size());
        return absl::OkStatus();
      }));
      blobs.push_back({blob.name, std::move(text)});
    }
    return blobs;
  }

  FileSystem& file_system_;
  const Options& options_;
  Progress progress_;
  const InterruptFlag interrupt_;
  Target target_;
  std::string out_;  // options_.out, without the slash behind a directory's name
  std::string parent_;
  std::string out_name_;
  converter::ForeignSource source_;  // its index is input_'s
  std::optional<converter::ConversionSource> input_;
  std::unique_ptr<StagedDirectory> staged_;
  bool drops_objects_ = false;
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
                                   {"left_out", outcome->left_out},
                                   {"cast", outcome->casts},
                                   {"repaired", outcome->repairs},
                                   {"notes", outcome->notes},
                                   {"became_infinite", outcome->became_infinite},
                                   {"peak_memory_bytes", outcome->peak_memory_bytes}};
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
  if (options.dry_run) {
    for (const Outcome::File& file : outcome->files) {
      std::printf("  %s, %s\n", Printable(file.name).c_str(), HumanBytes(file.bytes).c_str());
    }
  }
  const auto print = [](const char* what, const std::vector<std::string>& lines) {
    for (const std::string& each : lines) std::printf("  %s: %s\n", what, Printable(each).c_str());
  };
  print("cast", outcome->casts);
  if (outcome->became_infinite > 0) {
    std::printf("  cast: %llu finite numbers became infinite, the first in %s\n",
                static_cast<unsigned long long>(outcome->became_infinite),
                Printable(outcome->first_infinite).c_str());
  }
  print("repaired", outcome->repairs);
  print("left out", outcome->left_out);
  print("note", outcome->notes);
  return kExitOk;
}

void AddVerb(CLI::App& app, Invocation& invocation, const char* name, const char* description,
             bool weights_only) {
  CLI::App* verb = app.add_subcommand(name, description);
  auto options = std::make_shared<Options>();
  options->weights_only = weights_only;
  verb->add_option("checkpoint", options->path, "Another framework's file or folder, or ours")
      ->required();
  verb->add_option("out", options->out, "The directory to make; of --format torch the file")
      ->required();
  if (!weights_only) {
    verb->add_option("--format", options->format,
                     "holdfast (OUT is ROOT/JOB), safetensors (a Hugging Face folder), dcp, torch, "
                     "deepspeed, ucp (a universal folder of DeepSpeed's), fsdp or megatron "
                     "(torch_dist, or with --to its legacy format)")
        ->required();
    verb->add_option("--to", options->to,
                     "AXIS=SIZE,...: zero=1 to 3, dp, tp, pp and ep of deepspeed, zero of ucp, dp "
                     "of fsdp; tp, pp, "
                     "vpp, ep, etp, first and last (layers of that stage) of megatron");
  } else {
    verb->add_option("--format", options->format, "safetensors or torch")
        ->check(CLI::IsMember({"safetensors", "torch"}))
        ->capture_default_str();
  }
  verb->add_option("--only", options->selection.only,
                   "Only tensors of which the name fits a pattern: * is anything, {n} a number")
      ->allow_extra_args(false);
  verb->add_option("--rename", options->rename_file,
                   "File of rules that give tensors other names: name, prefix, suffix, regex");
  AddMapOptions(*verb, options->map);
  verb->add_option("--drop", options->selection.drop,
                   "Leave out: a state (exp_avg), objects (what is no tensor), '*' for all that "
                   "are no weights, unreadable, unmapped, lost")
      ->allow_extra_args(false);
  verb->add_option("--dtype", options->selection.dtypes,
                   "DTYPE of floating weights and buffers, or STATE=DTYPE: float32, bfloat16, "
                   "float16, float64")
      ->allow_extra_args(false);
  verb->add_option("--shard-bytes", options->shard_bytes,
                   "Tensors of one file, at most (safetensors, dcp, megatron)")
      ->transform(SizeValue(SizeValue::Units::kDecimal))
      ->check(PositiveSize())
      ->capture_default_str();
  verb->add_option("--memory", options->foreign.memory_bytes,
                   "Most memory of all processes together, like 256M (default: as it comes)")
      ->transform(SizeValue(SizeValue::Units::kBinary))
      ->check(PositiveSize());
  verb->add_flag("--force", options->force, "Replace what is there");
  verb->add_flag("--dry-run", options->dry_run,
                 "Check everything, say what would be written, and write nothing");
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
