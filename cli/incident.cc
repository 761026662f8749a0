// The folders that `holdfast run` leaves of what went wrong, one of them as
// one file, and what such a file says on another machine. All of it works on files: neither the job
// nor its agent need be there any more.
#include "cli/incident.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "agent/config_file.h"
#include "agent/run/incident_archive.h"
#include "base/status_macros.h"
#include "cli/monitor_replay.h"
#include "cli/monitor_verbs.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "monitor/finding_record.h"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;

constexpr size_t kJobsMax = 4096;
constexpr size_t kFileBytesMax = size_t{128} << 20;
constexpr size_t kTextBytesMax = size_t{1} << 20;
// Of JSON that comes from elsewhere; ours has six. What is deeper is left out.
constexpr int kDepthMax = 16;

struct SaveOptions {
  std::string path;
  uint64_t number = 0;  // 0: the newest
  std::string job;
  std::string state_directory;
};

std::string DefaultStateDirectory() {
  const auto variable = [](const char* name) -> const char* { return std::getenv(name); };
  const char* const xdg = std::getenv("XDG_STATE_HOME");
  if (geteuid() == 0 && (xdg == nullptr || *xdg == '\0')) return "/var/lib/holdfast";
  return XdgDirectory(variable, "XDG_STATE_HOME", "/.local/state") + "/holdfast";
}

// Numbers that name a directory in `directory`, ascending.
absl::StatusOr<std::vector<uint64_t>> NumbersIn(FileSystem& file_system,
                                                const std::string& directory) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, file_system.List(directory, kJobsMax));
  std::vector<uint64_t> numbers;
  for (const std::string& name : names) {
    uint64_t number = 0;
    if (absl::SimpleAtoi(name, &number)) numbers.push_back(number);
  }
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

// The directory of the incidents that are meant. kNotFound: names what there is.
absl::StatusOr<std::string> IncidentsOf(FileSystem& file_system, const SaveOptions& options) {
  const std::string jobs = options.state_directory + "/jobs";
  if (!options.job.empty()) return absl::StrCat(jobs, "/", options.job, "/incidents");
  absl::StatusOr<std::vector<std::string>> names = file_system.List(jobs, kJobsMax);
  if (!names.ok() && !absl::IsNotFound(names.status())) return names.status();
  std::vector<std::string> found;
  for (const std::string& name : names.ok() ? *names : std::vector<std::string>()) {
    const auto numbers = NumbersIn(file_system, absl::StrCat(jobs, "/", name, "/incidents"));
    if (numbers.ok() && !numbers->empty()) found.push_back(name);
  }
  if (found.size() == 1) return absl::StrCat(jobs, "/", found[0], "/incidents");
  return absl::NotFoundError(
      found.empty() ? absl::StrCat(jobs, ": no job has had an incident")
                    : absl::StrCat("--job: expected one of ", absl::StrJoin(found, ", ")));
}

absl::StatusOr<uint64_t> Save(FileSystem& file_system, const SaveOptions& options,
                              std::string& directory) {
  ASSIGN_OR_RETURN(const std::string incidents, IncidentsOf(file_system, options));
  uint64_t number = options.number;
  if (number == 0) {
    ASSIGN_OR_RETURN(const std::vector<uint64_t> numbers, NumbersIn(file_system, incidents));
    if (numbers.empty()) return absl::NotFoundError(absl::StrCat(incidents, ": no incident"));
    number = numbers.back();
  }
  directory = absl::StrCat(incidents, "/", number);
  ASSIGN_OR_RETURN(const std::vector<std::string> names,
                   file_system.List(directory, kIncidentFilesMax));
  std::vector<IncidentFile> files;
  for (const std::string& name : names) {
    const std::string path = absl::StrCat(directory, "/", name);
    ASSIGN_OR_RETURN(const FileInfo info, file_system.Stat(path));
    // What is being written just now has a name of its own.
    if (info.kind != FileInfo::Kind::kFile || name.ends_with(".partial")) continue;
    ASSIGN_OR_RETURN(std::string contents, file_system.ReadSmallFile(path, kFileBytesMax));
    files.push_back({name, std::move(contents)});
  }
  ASSIGN_OR_RETURN(const std::string archive, PackIncident(std::move(files)));
  ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, file_system.CreateNew(options.path));
  RETURN_IF_ERROR(file->Append(std::as_bytes(std::span(archive))));
  RETURN_IF_ERROR(file->Sync());
  return archive.size();
}

// ---- What a file says

struct Shown {
  std::vector<IncidentFile> files;
  ordered_json incident;                           // null: damaged, or not there
  std::optional<monitor::FindingRecord> replayed;  // that the recording gives for its finding
  uint64_t steps = 0;                              // of the recording
  std::string recording_trouble;                   // why there is no replay
  ordered_json finding;                            // as the agent had it; null: it had none
  enum class Same { kNone, kSame, kDiffers } same = Same::kNone;
};

const std::string* Find(const Shown& shown, std::string_view name) {
  for (const IncidentFile& file : shown.files) {
    if (file.name == name) return &file.contents;
  }
  return nullptr;
}

ordered_json JsonOf(const Shown& shown, std::string_view name) {
  const std::string* const text = Find(shown, name);
  if (text == nullptr) return {};
  ordered_json json = ordered_json::parse(
      *text,
      [](int depth, ordered_json::parse_event_t, ordered_json&) { return depth < kDepthMax; },
      false);
  return json.is_object() ? json : ordered_json();
}

ordered_json Member(const ordered_json& json, const char* name) {
  const auto found = json.is_object() ? json.find(name) : json.end();
  return found == json.end() ? ordered_json() : *found;
}

std::string TextMember(const ordered_json& json, const char* name) {
  const ordered_json member = Member(json, name);
  return member.is_string() ? member.get<std::string>() : "";
}

// What makes two verdicts the same.
bool IsSame(const ordered_json& a, const ordered_json& b) {
  for (const char* const member : {"grade", "fault", "scope", "suspects"}) {
    if (Member(a, member) != Member(b, member)) return false;
  }
  return true;
}

absl::StatusOr<Shown> Open(FileSystem& file_system, const std::string& path) {
  Shown shown;
  {
    ASSIGN_OR_RETURN(const std::string archive,
                     file_system.ReadSmallFile(path, kIncidentArchiveBytesMax));
    ASSIGN_OR_RETURN(shown.files, UnpackIncident(archive));
  }
  shown.incident = JsonOf(shown, kIncidentFile);
  const std::string id = TextMember(shown.incident, "finding");
  const ordered_json findings = Member(Member(JsonOf(shown, kMonitorFile), "findings"), "findings");
  for (const ordered_json& finding : findings.is_array() ? findings : ordered_json::array()) {
    if (!id.empty() && TextMember(finding, "id") == id) shown.finding = finding;
  }
  const std::string* const recording = Find(shown, kRecordingFile);
  if (recording == nullptr) {
    shown.recording_trouble = absl::StrCat(kRecordingFile, " is not among its files");
    return shown;
  }
  absl::StatusOr<Replayed> replayed = Replay(*recording, "");
  if (!replayed.ok()) {
    shown.recording_trouble = std::string(replayed.status().message());
    return shown;
  }
  shown.steps = replayed->steps;
  if (!replayed->damage.ok()) shown.recording_trouble = std::string(replayed->damage.message());
  if (shown.finding.is_null()) return shown;
  shown.same = Shown::Same::kDiffers;
  // A recording that was begun within the job may give the same verdict another id.
  for (const monitor::FindingRecord* record : replayed->log.Records()) {
    if (!IsSame(monitor::FindingRecordObject(*record), shown.finding)) continue;
    shown.same = Shown::Same::kSame;
    shown.replayed = *record;
  }
  return shown;
}

ordered_json ToJson(const Shown& shown) {
  ordered_json files = ordered_json::array();
  for (const IncidentFile& file : shown.files) {
    files.push_back({{"name", file.name}, {"bytes", file.contents.size()}});
  }
  ordered_json replay = {
      {"steps", shown.steps}, {"trouble", nullptr}, {"same", nullptr}, {"finding", nullptr}};
  if (!shown.recording_trouble.empty()) replay["trouble"] = shown.recording_trouble;
  if (shown.same != Shown::Same::kNone) replay["same"] = shown.same == Shown::Same::kSame;
  if (shown.replayed.has_value()) {
    replay["finding"] = monitor::FindingRecordObject(*shown.replayed);
  }
  return {{"schema_version", 1},
          {"incident", shown.incident},
          {"files", std::move(files)},
          {"replay", std::move(replay)}};
}

void Print(const Shown& shown) {
  if (const std::string* const summary = Find(shown, kSummaryFile); summary != nullptr) {
    for (const absl::string_view line :
         absl::StrSplit(absl::string_view(*summary).substr(0, kTextBytesMax), '\n')) {
      std::printf("%s\n", Printable(std::string(line)).c_str());
    }
  }
  if (!shown.incident.is_null()) {
    std::printf("What was done: %s; %s.\n", Printable(TextMember(shown.incident, "action")).c_str(),
                Printable(TextMember(shown.incident, "outcome")).c_str());
  }
  std::printf("%zu files:\n", shown.files.size());
  for (const IncidentFile& file : shown.files) {
    std::printf("  %-28s %s\n", file.name.c_str(), HumanBytes(file.contents.size()).c_str());
  }
  if (!shown.recording_trouble.empty()) {
    std::printf("\nNo whole replay: %s\n", Printable(shown.recording_trouble).c_str());
  }
  switch (shown.same) {
    case Shown::Same::kNone:
      std::printf("\nThe monitor had no part in it (%llu steps of it are recorded).\n",
                  static_cast<unsigned long long>(shown.steps));
      break;
    case Shown::Same::kSame:
      std::printf("\nReplayed here, %llu steps give the same verdict:\n%s",
                  static_cast<unsigned long long>(shown.steps),
                  FindingText(monitor::FindingRecordObject(*shown.replayed)).c_str());
      break;
    case Shown::Same::kDiffers:
      std::printf(
          "\nReplayed here, %llu steps do NOT give the verdict that recovery acted on:\n%s\n",
          static_cast<unsigned long long>(shown.steps),
          Printable(TextMember(shown.finding, "sentence")).c_str());
      break;
  }
}

void AddSave(CLI::App& incident, Invocation& invocation) {
  CLI::App* verb = incident.add_subcommand("save", "Makes one file of an incident (tar, zstd)");
  auto options = std::make_shared<SaveOptions>();
  options->state_directory = DefaultStateDirectory();
  verb->add_option("FILE", options->path, "Must not exist")->required();
  verb->add_option("NUMBER", options->number, "Which; default: the newest");
  verb->add_option("--job", options->job, "If there are several")->envname("HOLDFAST_JOB");
  verb->add_option("--state-directory", options->state_directory, "The agent's")
      ->envname("HOLDFAST_STATE_DIRECTORY")
      ->capture_default_str();
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options]() -> ExitCode {
      std::string directory;
      const absl::StatusOr<uint64_t> bytes = Save(invocation.file_system, *options, directory);
      if (!bytes.ok()) return Report(bytes.status());
      if (invocation.json) {
        std::printf("%s\n", JsonText({{"schema_version", 1},
                                      {"file", options->path},
                                      {"incident", directory},
                                      {"bytes", *bytes}})
                                .c_str());
      } else {
        std::printf("%s: %s of %s\n", Printable(options->path).c_str(), HumanBytes(*bytes).c_str(),
                    Printable(directory).c_str());
      }
      return kExitOk;
    };
  });
}

void AddShow(CLI::App& incident, Invocation& invocation) {
  CLI::App* verb = incident.add_subcommand(
      "show", "What such a file says, and what its recording replays to, on any machine");
  auto path = std::make_shared<std::string>();
  verb->add_option("FILE", *path, "Of `incident save`")->required();
  verb->footer("Exit code 1: the replay gives another verdict than recovery acted on.\n" +
               std::string(kExitCodesHelp));
  verb->callback([&invocation, path] {
    invocation.run = [&invocation, path]() -> ExitCode {
      const absl::StatusOr<Shown> shown = Open(invocation.file_system, *path);
      if (!shown.ok()) return Report(shown.status());
      if (invocation.json) {
        std::printf("%s\n", JsonText(ToJson(*shown)).c_str());
      } else {
        Print(*shown);
      }
      return shown->same == Shown::Same::kDiffers ? kExitFailure : kExitOk;
    };
  });
}

}  // namespace

void AddIncident(CLI::App& app, Invocation& invocation) {
  CLI::App* incident =
      app.add_subcommand("incident", "What is kept of what went wrong in a job of `holdfast run`");
  incident->require_subcommand(1);
  incident->fallthrough();
  incident->footer(kExitCodesHelp);
  AddSave(*incident, invocation);
  AddShow(*incident, invocation);
}

}  // namespace holdfast::cli
