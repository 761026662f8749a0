// holdfast reshard: writes a checkpoint anew in another layout.

#include "checkpoint/reshard.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/clock.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "checkpoint/verify.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "cli/process.h"
#include "cli/progress.h"
#include "cli/size_value.h"
#include "cli/verb.h"
#include "format/layout_rules.h"
#include "io/mount_probe.h"

namespace holdfast::cli {
namespace {

constexpr uint64_t kLayoutFileBytesMax = uint64_t{512} << 20;
constexpr uint64_t kMemoryBytesDefault = uint64_t{256} << 20;
// For stacks, lists of copies, and tables about the buffers; what grows with the checkpoint is
// counted (LeastMemory).
constexpr uint64_t kReserveBytes = uint64_t{8} << 20;
// More do not help: they wait for the same device and the same cores.
constexpr uint32_t kThreadsMax = 6;
constexpr size_t kRanksShownMax = 16;
// The resident size of two runs differs by pages of the program's files that are there or not.
constexpr uint64_t kLeastMemoryMargin = uint64_t{1} << 20;

struct Options {
  std::string path;
  std::string root;
  std::string to;
  std::string layout_file;
  std::string job;
  uint64_t memory_bytes = kMemoryBytesDefault;
  bool dry_run = false;
};

struct Source {
  CatalogEntry entry;
  Index index;
  // Of the process, before and after INDEX was read.
  ProcessMemory memory_before;
  ProcessMemory memory_after;
};

// How the target's mount is written to.
struct Mount {
  Caching caching = Caching::kBuffered;
  uint64_t alignment_bytes = 4096;
};

absl::StatusOr<Source> OpenSource(FileSystem& file_system, const std::string& path) {
  ASSIGN_OR_RETURN(CatalogEntry entry, Locate(file_system, path));
  ASSIGN_OR_RETURN(const ProcessMemory before, LookAtProcessMemory(file_system));
  ASSIGN_OR_RETURN(Index index, LoadCommittedIndex(file_system, entry));
  ASSIGN_OR_RETURN(const ProcessMemory after, LookAtProcessMemory(file_system));
  if (!entry.bad_marks.empty()) {
    return absl::FailedPreconditionError(
        absl::StrFormat("%s is marked bad, and a copy would not be: %s", entry.directory,
                        entry.bad_marks.front().reason));
  }
  return Source{std::move(entry), std::move(index), before, after};
}

// `status` of what was made of a layout; what is said of a file says of which.
absl::Status OfLayout(const absl::Status& status, const Options& options) {
  if (options.layout_file.empty() || !absl::IsInvalidArgument(status)) return status;
  return absl::InvalidArgumentError(
      absl::StrCat(options.layout_file, ": ", std::string(status.message())));
}

absl::StatusOr<std::string> TargetLayout(FileSystem& file_system, const Options& options,
                                         const Index& index) {
  if (!options.layout_file.empty()) {
    ASSIGN_OR_RETURN(std::string text,
                     file_system.ReadSmallFile(options.layout_file, kLayoutFileBytesMax));
    if (!IsLayoutRules(text)) return text;
    absl::StatusOr<std::string> document = ExpandLayoutRules(text, index.tensor_states);
    if (!document.ok()) return OfLayout(document.status(), options);
    return document;
  }
  if (index.layouts.size() != 1) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--to: expected a checkpoint with one layout document, found %d; use --layout",
        index.layouts.size()));
  }
  return ResizeLayout(index.layouts.front(), options.to);
}

// Absolute and without links; its last component need not exist.
absl::StatusOr<std::string> ResolveRoot(const std::string& root) {
  std::error_code not_there;
  const std::filesystem::path whole = std::filesystem::canonical(root, not_there);
  if (!not_there) return whole.string();
  std::filesystem::path path = root;
  if (!path.has_filename()) path = path.parent_path();  // a slash at the end
  ASSIGN_OR_RETURN(const std::string directory, DirectoryOf(path.string()));
  return (std::filesystem::path(directory) / path.filename()).string();
}

// A trial in the target, or in its parent if it is to be made.
absl::StatusOr<Mount> ProbeTarget(FileSystem& file_system, const std::string& root,
                                  uint64_t block_bytes) {
  const bool is_there = file_system.Stat(root).ok();
  MountProbe probe(file_system, "");
  ASSIGN_OR_RETURN(
      const MountFacts facts,
      probe.Probe(is_there ? root : std::filesystem::path(root).parent_path().string()));
  if (!facts.DirectRefusal(block_bytes).empty()) return Mount{};
  return Mount{Caching::kDirect, std::max<uint64_t>(facts.alignment_bytes, 4096)};
}

absl::Status MakeRoot(FileSystem& file_system, const std::string& root) {
  if (file_system.Stat(root).ok()) return absl::OkStatus();
  RETURN_IF_ERROR(file_system.CreateDirectory(root));
  return file_system.SyncDirectory(std::filesystem::path(root).parent_path());
}

// The least for which all phases keep to it: planning, which is over; building the heads once more
// on top of the plan; copying with the least buffers; the commit, which makes the target's INDEX,
// and reads it back.
uint64_t LeastMemory(const Source& source, const ReshardPlan& plan, const ProcessMemory& now) {
  const uint64_t heads = now.peak_resident_bytes - source.memory_after.resident_bytes;
  uint64_t pieces = 0;
  for (const ReshardImage& image : plan.images()) pieces += image.pieces.size();
  const uint64_t source_pieces = std::max<uint64_t>(source.index.pieces.size(), 1);
  const uint64_t growth = (pieces + source_pieces - 1) / source_pieces;
  const uint64_t decoded =
      source.memory_after.resident_bytes -
      std::min(source.memory_after.resident_bytes, source.memory_before.resident_bytes);
  const uint64_t commit = 2 * growth * (decoded + source.entry.manifest->index_bytes);
  return now.resident_bytes + kReserveBytes + plan.writer_bytes(kThreadsMax) +
         std::max({heads, commit, plan.memory_bytes_min()});
}

// `least` in whole MiB, rounded up, as --memory takes it: what is asked for suffices.
absl::Status TooLittleMemory(uint64_t least, uint64_t found) {
  const uint64_t mebibytes = (least + kLeastMemoryMargin + (uint64_t{1} << 20) - 1) >> 20;
  return absl::InvalidArgumentError(
      absl::StrFormat("--memory: expected at least %dM for the plan of this checkpoint and the "
                      "least buffers, found %s",
                      mebibytes, HumanBytes(found)));
}

absl::StatusOr<ReshardSchedule> MakeSchedule(FileSystem& file_system, const Options& options,
                                             const Source& source, const ReshardPlan& plan) {
  ASSIGN_OR_RETURN(const ProcessMemory memory, LookAtProcessMemory(file_system));
  const uint64_t least = LeastMemory(source, plan, memory);
  if (options.memory_bytes < least) return TooLittleMemory(least, options.memory_bytes);
  const uint64_t free_bytes =
      options.memory_bytes - memory.resident_bytes - kReserveBytes - plan.writer_bytes(kThreadsMax);
  ASSIGN_OR_RETURN(ReshardSchedule schedule, plan.Schedule(free_bytes, kThreadsMax, free_bytes));
  // What was counted before, measured: with the schedule, and what making it has left behind.
  ASSIGN_OR_RETURN(const ProcessMemory scheduled, LookAtProcessMemory(file_system));
  const uint64_t heads = memory.peak_resident_bytes - source.memory_after.resident_bytes;
  const uint64_t needed = std::max(scheduled.peak_resident_bytes,
                                   scheduled.resident_bytes + plan.writer_bytes(kThreadsMax) +
                                       std::max(heads, schedule.buffer_bytes()));
  if (options.memory_bytes < needed) return TooLittleMemory(needed, options.memory_bytes);
  return schedule;
}

std::string MeshText(const Layout& layout) {
  std::vector<std::string> axes;
  for (const MeshAxis& axis : layout.mesh()) {
    axes.push_back(absl::StrFormat("%s=%d", axis.name, axis.size));
  }
  return absl::StrJoin(axes, ",");
}

nlohmann::ordered_json ToJson(const Source& source, const ReshardPlan& plan,
                              const ReshardSchedule& schedule, const std::string& directory) {
  nlohmann::ordered_json images = nlohmann::ordered_json::array();
  for (const ReshardImage& image : plan.images()) images.push_back(image.image_bytes);
  return {{"schema_version", 1},
          {"source",
           {{"directory", source.entry.directory},
            {"job", source.index.job},
            {"job_uuid", source.index.job_uuid},
            {"step", Value(source.index.checkpoint.step)},
            {"attempt", Value(source.index.checkpoint.attempt)},
            {"world_size", source.index.world_size}}},
          {"target",
           {{"directory", directory},
            {"job", plan.target().job},
            {"job_uuid", plan.target().job_uuid},
            {"step", Value(source.index.checkpoint.step)},
            {"attempt", 0},
            {"world_size", plan.layout().world_size()},
            {"mesh", MeshText(plan.layout())},
            {"image_bytes", images}}},
          {"plan",
           {{"bytes_to_read", schedule.read_bytes},
            {"bytes_to_read_once", schedule.distinct_read_bytes},
            {"bytes_to_write", plan.image_bytes()},
            {"threads", schedule.thread_count},
            {"unit_bytes", schedule.unit_bytes},
            {"source_blocks_kept", schedule.slot_count},
            {"buffer_bytes", schedule.buffer_bytes()}}}};
}

void PrintPlan(const Source& source, const ReshardPlan& plan, const ReshardSchedule& schedule,
               const std::string& directory) {
  std::printf("from %s: step %llu of attempt %u, %u ranks\n",
              Printable(source.entry.directory).c_str(),
              static_cast<unsigned long long>(Value(source.index.checkpoint.step)),
              Value(source.index.checkpoint.attempt), source.index.world_size);
  std::printf("to   %s: %s, %u ranks\n", Printable(directory).c_str(),
              Printable(MeshText(plan.layout())).c_str(), plan.layout().world_size());
  for (size_t rank = 0; rank < plan.images().size(); ++rank) {
    if (rank == kRanksShownMax) {
      std::printf("  and %zu more ranks\n", plan.images().size() - rank);
      break;
    }
    std::printf("  rank %zu: %s\n", rank, HumanBytes(plan.images()[rank].image_bytes).c_str());
  }
  std::printf("  to read %s (%s of them again), to write %s\n",
              HumanBytes(schedule.read_bytes).c_str(),
              HumanBytes(schedule.read_bytes - schedule.distinct_read_bytes).c_str(),
              HumanBytes(plan.image_bytes()).c_str());
  std::printf("  %s of buffers: %u threads with a unit of %s each, %u blocks of the source\n",
              HumanBytes(schedule.buffer_bytes()).c_str(), schedule.thread_count,
              HumanBytes(schedule.unit_bytes).c_str(), schedule.slot_count);
}

absl::StatusOr<ReshardReport> Carry(Invocation& invocation, const ReshardRequest& request,
                                    std::unique_ptr<const ReshardPlan> plan,
                                    ReshardSchedule schedule, const Mount& mount) {
  // So that what was written goes again: gigabytes, which the next run would ask to be removed.
  const InterruptFlag interrupt;
  RETURN_IF_ERROR(MakeRoot(invocation.file_system, request.root));
  RaiseOpenFilesLimit();
  Progress progress(
      "reshard", invocation.no_progress ? Progress::Display::kNever : Progress::Display::kAutomatic,
      RealClock());
  return RunReshard(RealReshardStorage(invocation.file_system), request, std::move(plan),
                    std::move(schedule),
                    {.source_caching = Caching::kDirect,
                     .target_caching = mount.caching,
                     .progress = [&](uint64_t done, uint64_t total) {
                       progress.Update(done, total);
                       return !interrupt.requested();
                     }});
}

absl::Status Run(Invocation& invocation, const Options& options) {
  FileSystem& file_system = invocation.file_system;
  ASSIGN_OR_RETURN(const Source source, OpenSource(file_system, options.path));
  ReshardRequest request;
  request.source_directory = source.entry.directory;
  ASSIGN_OR_RETURN(request.layout_json, TargetLayout(file_system, options, source.index));
  ASSIGN_OR_RETURN(request.root, ResolveRoot(options.root));
  request.job = options.job.empty() ? source.index.job : options.job;
  RETURN_IF_ERROR(CheckJobName(request.job));
  request.new_job_uuid = RandomUuid();
  request.writer = absl::StrFormat("%016x", RandomBits());
  std::error_code no_directory;
  request.scratch_directory = std::filesystem::temp_directory_path(no_directory);
  if (no_directory) return absl::NotFoundError("TMPDIR or /tmp: expected a directory");
  request.created_at = absl::FromUnixSeconds(absl::ToUnixSeconds(RealClock().WallTime()));
  Mount mount;
  if (!options.dry_run) {
    ASSIGN_OR_RETURN(
        mount, ProbeTarget(file_system, request.root, source.index.images.front().block_bytes));
    request.alignment_bytes = mount.alignment_bytes;
  }
  absl::StatusOr<std::unique_ptr<const ReshardPlan>> planned =
      PlanReshard(file_system, request, source.index);
  if (!planned.ok()) return OfLayout(planned.status(), options);
  std::unique_ptr<const ReshardPlan> plan = *std::move(planned);
  ASSIGN_OR_RETURN(ReshardSchedule schedule, MakeSchedule(file_system, options, source, *plan));
  const std::string directory =
      absl::StrFormat("%s/%s/%s", request.root, request.job,
                      CheckpointDirectoryName({Attempt{0}, source.index.checkpoint.step}));
  nlohmann::ordered_json output = ToJson(source, *plan, schedule, directory);
  output["dry_run"] = options.dry_run;
  if (!invocation.json) PrintPlan(source, *plan, schedule, directory);
  if (!options.dry_run) {
    ASSIGN_OR_RETURN(const ReshardReport report,
                     Carry(invocation, request, std::move(plan), std::move(schedule), mount));
    ASSIGN_OR_RETURN(const ProcessMemory memory, LookAtProcessMemory(file_system));
    output["result"] = {{"bytes_read", report.bytes_read},
                        {"bytes_written", report.bytes_written},
                        {"fingerprints",
                         {{"equal", report.fingerprints_equal},
                          {"not_computed", report.fingerprints_not_computed}}},
                        {"peak_memory_bytes", memory.peak_resident_bytes}};
    if (!invocation.json) {
      std::printf(
          "committed: %s read, %s written, peak memory %s; fingerprints: %llu equal to the "
          "source's, %llu not known there\n",
          HumanBytes(report.bytes_read).c_str(), HumanBytes(report.bytes_written).c_str(),
          HumanBytes(memory.peak_resident_bytes).c_str(),
          static_cast<unsigned long long>(report.fingerprints_equal),
          static_cast<unsigned long long>(report.fingerprints_not_computed));
    }
  }
  if (invocation.json) std::printf("%s\n", JsonText(output).c_str());
  return absl::OkStatus();
}

}  // namespace

void AddReshard(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand("reshard", "Write a checkpoint anew in another layout");
  auto options = std::make_shared<Options>();
  verb->add_option("checkpoint", options->path, "Its directory, or ROOT/JOB for the newest")
      ->required();
  verb->add_option("out", options->root, "Root that gets a job of its own (made if missing)")
      ->required();
  CLI::Option_group* layout = verb->add_option_group("Layout", "One of");
  layout->add_option("--to", options->to,
                     "AXIS=SIZE,... of the checkpoint's own layout, and zero=STAGE");
  layout->add_option("--layout", options->layout_file,
                     "File with a layout document, or with rules");
  layout->require_option(1);
  verb->add_option("--job", options->job, "Name of the new job (default: that of the source)");
  verb->add_option("--memory", options->memory_bytes,
                   "Most memory of the whole process, like 256M (the default)")
      ->transform(SizeValue(SizeValue::Units::kBinary));
  verb->add_flag("--dry-run", options->dry_run, "Print the plan and write nothing");
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return Report(Run(invocation, *options)); };
  });
}

}  // namespace holdfast::cli
