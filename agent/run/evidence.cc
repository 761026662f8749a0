#include "agent/run/evidence.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <string_view>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/run/rank_output.h"
#include "agent/run/run_spec.h"
#include "agent/run/small_files.h"
#include "agent/witness/helper.h"
#include "agent/witness/kernel_log.h"
#include "base/clock.h"
#include "checkpoint/shared_mapping.h"
#include "io/unique_fd.h"
#include "monitor/witness/flight_record.h"
#include "monitor/witness/stacks.h"

namespace holdfast {
namespace {

// Native stacks of one process are taken by one at a time: the monitor's witnesses may be at it.
constexpr int kStacksTries = 3;

// The last of a file; empty if it cannot be read.
std::string TailOf(const std::string& path, size_t bytes_max) {
  const UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info {};
  if (!file || fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode)) return "";
  const size_t count = std::min(bytes_max, static_cast<size_t>(info.st_size));
  std::string text(count, '\0');
  size_t done = 0;
  while (done < count) {
    const off_t at = info.st_size - static_cast<off_t>(count - done);
    const ssize_t got = pread(file.get(), text.data() + done, count - done, at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    done += static_cast<size_t>(got);
  }
  text.resize(done);
  return text;
}

// Writes files of a directory up to a number of bytes; remembers what is missing.
class Folder {
 public:
  explicit Folder(std::string path) : path_(std::move(path)) {}

  void Write(const std::string& name, std::string_view contents) {
    if (contents.size() > left_) {
      Miss(name, absl::StrFormat("%d bytes are more than what is left of %d", contents.size(),
                                 Evidence::kFilesBytesMax));
      return;
    }
    left_ -= contents.size();
    const absl::Status written = ReplaceFile(absl::StrCat(path_, "/", name), contents);
    if (!written.ok()) Miss(name, written.ToString());
  }
  void WriteOr(const std::string& name, const absl::StatusOr<std::string>& contents) {
    if (!contents.ok()) return Miss(name, std::string(contents.status().message()));
    Write(name, *contents);
  }
  void Miss(const std::string& name, const std::string& why) {
    missing_.push_back(absl::StrCat(name, ": ", why));
  }
  Missing Finish() { return std::move(missing_); }

 private:
  const std::string path_;
  size_t left_ = Evidence::kFilesBytesMax;
  Missing missing_;
};

// Directories in `directory` that are numbers, ascending.
std::vector<std::pair<uint32_t, std::filesystem::path>> IncidentsIn(
    const std::filesystem::path& directory) {
  std::vector<std::pair<uint32_t, std::filesystem::path>> incidents;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    uint32_t number = 0;
    if (absl::SimpleAtoi(entry.path().filename().string(), &number)) {
      incidents.emplace_back(number, entry.path());
    }
  }
  std::sort(incidents.begin(), incidents.end());
  return incidents;
}

// Those beside `directory`: all but the newest go.
void ForgetOldIncidents(const std::string& directory) {
  const std::filesystem::path own(directory);
  const auto incidents = IncidentsIn(own.parent_path());
  std::error_code error;
  for (size_t i = 0; i + Evidence::kIncidentsMax < incidents.size(); ++i) {
    if (incidents[i].second != own) std::filesystem::remove_all(incidents[i].second, error);
  }
}

void CollectStacks(const std::vector<Evidence::RankPlace>& ranks, Folder& folder) {
  std::vector<std::vector<std::string>> runs;
  std::vector<uint32_t> of_rank;
  for (const Evidence::RankPlace& place : ranks) {
    if (place.process == 0) continue;
    runs.push_back({"stacks", absl::StrCat(place.process)});
    of_rank.push_back(place.rank);
  }
  const std::string program = HelperPath();
  const absl::Duration end = RealClock().Elapsed() + Evidence::kWitnessDeadline;
  for (int tries = 1; !runs.empty(); ++tries) {
    const absl::Duration left = std::max(end - RealClock().Elapsed(), absl::ZeroDuration());
    const std::vector<absl::StatusOr<std::string>> stacks = RunHelpers(program, runs, {left, left});
    std::vector<std::vector<std::string>> again;
    std::vector<uint32_t> of_again;
    for (size_t i = 0; i < stacks.size(); ++i) {
      if (absl::IsPermissionDenied(stacks[i].status()) && tries < kStacksTries) {
        again.push_back(runs[i]);
        of_again.push_back(of_rank[i]);
        continue;
      }
      folder.WriteOr(absl::StrCat("rank-", of_rank[i], ".stacks"), stacks[i]);
    }
    runs = std::move(again);
    of_rank = std::move(of_again);
  }
}

std::string NameOf(const WaitingProcesses::Process& process) {
  return process.rank == UINT32_MAX ? absl::StrCat("process-", process.process_id)
                                    : absl::StrCat("rank-", process.rank);
}

std::string TextOf(const monitor::FlightRecord& record) {
  std::string text = "What this rank remembers of its collectives, by process group.\n";
  for (const monitor::FlightGroup& group : record.groups) {
    absl::StrAppendFormat(&text, "\ngroup %s (%s): %d enqueued, %d ended, of %d ranks\n",
                          group.name, group.description, group.enqueued, group.retired,
                          group.members.size());
    for (const monitor::FlightOperation& operation : group.operations) {
      absl::StrAppendFormat(&text, "  %d %s %s%s\n", operation.sequence, operation.call,
                            operation.shape, operation.retired ? "" : "  (has not ended)");
    }
  }
  return text;
}

bool IsAllowed(std::string_view name) {
  static constexpr std::string_view kPrefixes[] = {
      "NCCL_", "TORCH_",  "TORCHELASTIC_", "PYTORCH_", "CUDA_", "NVIDIA_VISIBLE", "OMP_",
      "GLOO_", "MASTER_", "SLURM_JOB_ID",  "UCX_",     "FI_",   "COLLECTIVES_"};
  // Of ours by name: HOLDFAST_ON_VERDICT is a command, which may hold anything.
  static constexpr std::string_view kNames[] = {
      "HOLDFAST_EVERY",   "HOLDFAST_HOST_MEMORY", "HOLDFAST_JOB",   "HOLDFAST_KERNEL_LOG",
      "HOLDFAST_MONITOR", "HOLDFAST_NODE",        "HOLDFAST_ROOT",  "HOLDFAST_SOCKET",
      "LD_LIBRARY_PATH",  "PYTHONFAULTHANDLER",   "SLURM_JOB_NAME", "SLURM_NODEID",
      "SLURM_PROCID",     "SLURM_JOB_NUM_NODES"};
  return std::any_of(std::begin(kPrefixes), std::end(kPrefixes),
                     [&](std::string_view prefix) { return name.starts_with(prefix); }) ||
         std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

}  // namespace

uint32_t NewestIncident(const std::string& directory) {
  const auto incidents = IncidentsIn(directory);
  return incidents.empty() ? 0 : incidents.back().first;
}

std::string AllowedVariables(const std::vector<std::string>& environment) {
  std::vector<std::string> shown;
  for (const std::string& variable : environment) {
    if (IsAllowed(std::string_view(variable).substr(0, variable.find('=')))) {
      shown.push_back(variable);
    }
  }
  std::sort(shown.begin(), shown.end());
  std::string text;
  for (const std::string& variable : shown) absl::StrAppend(&text, variable, "\n");
  absl::StrAppendFormat(&text, "# %d others are left out: they may hold secrets\n",
                        environment.size() - shown.size());
  return text;
}

Missing CollectFromNode(const Evidence& evidence) {
  Folder folder(evidence.directory);
  ForgetOldIncidents(evidence.directory);
  folder.Write(kSummaryFile, evidence.summary);
  folder.Write("status.json", evidence.status_json);
  folder.Write("environment.txt", AllowedVariables(evidence.environment));
  if (!evidence.kernel_log.empty()) {
    folder.WriteOr("kernel.log", LastOfKernelLog(evidence.kernel_log, Evidence::kLogTailBytes));
  }
  for (const Evidence::RankPlace& place : evidence.ranks) {
    const std::string name = absl::StrCat("rank-", place.rank);
    if (place.log_directory.empty()) continue;
    const auto last_of = [&](const char* file) {
      return TailOf(absl::StrCat(place.log_directory, "/", file), Evidence::kLogTailBytes);
    };
    folder.Write(name + ".stdout", last_of(kLogNames[0]));
    folder.Write(name + ".stderr", last_of(kLogNames[1]));
    if (const std::string error = last_of(kErrorFileName); !error.empty()) {
      folder.Write(absl::StrCat(name, ".", kErrorFileName), error);
    }
  }
  CollectStacks(evidence.ranks, folder);
  return folder.Finish();
}

Missing CollectAnswers(const std::string& directory, WaitingProcesses::Round round) {
  Folder folder(directory);
  // One after the other: their memory is the processes', and as large as they wish.
  for (WaitingProcesses::Answer& answer : round.answers) {
    const std::string name = NameOf(answer.process);
    if (!answer.trouble.empty()) folder.Miss(name, answer.trouble);
    if (answer.python_stacks.memory) {
      folder.WriteOr(name + ".python-stacks",
                     ReadSealedMemory("Python stacks", answer.python_stacks.memory.get(),
                                      answer.python_stacks.bytes, monitor::kStackBytesMax));
    }
    if (answer.flight_record.memory) {
      absl::StatusOr<std::string> dump =
          ReadSealedMemory("Flight Recorder", answer.flight_record.memory.get(),
                           answer.flight_record.bytes, Evidence::kFlightBytesMax);
      folder.WriteOr(name + ".flight", dump);
      if (dump.ok()) {
        const absl::StatusOr<monitor::FlightRecord> record =
            monitor::ParseFlightRecord(Rank{answer.process.rank}, *std::move(dump));
        folder.WriteOr(name + ".flight.txt", record.ok()
                                                 ? absl::StatusOr<std::string>(TextOf(*record))
                                                 : record.status());
      }
    }
    answer.flight_record.memory.Reset();
    answer.python_stacks.memory.Reset();
  }
  for (const WaitingProcesses::Process& process : round.silent) {
    folder.Miss(
        NameOf(process),
        absl::StrFormat("asked for its Flight Recorder and Python stacks, it gave no answer "
                        "within %s",
                        absl::FormatDuration(Evidence::kWitnessDeadline)));
  }
  return folder.Finish();
}

Missing CollectMonitor(const std::string& directory, const std::string& monitor_json,
                       const RunRecorder::Kept& recording) {
  Folder folder(directory);
  folder.Write(kMonitorFile, monitor_json);
  if (recording.steps.empty()) {
    folder.Miss(kRecordingFile, "the monitor has been told nothing of this job");
  } else {
    folder.Write(kRecordingFile, RunRecorder::FileOf(recording));
  }
  return folder.Finish();
}

absl::Status WriteSummary(const Evidence& evidence, const Missing& missing) {
  std::string summary = evidence.summary;
  if (!missing.empty()) absl::StrAppend(&summary, "\nWhat could not be had:\n");
  for (const std::string& line : missing) absl::StrAppend(&summary, "  ", line, "\n");
  return ReplaceFile(absl::StrCat(evidence.directory, "/", kSummaryFile), summary);
}

}  // namespace holdfast
