// holdfast monitor record and replay: the reports of jobs in a file, and what the analysis says of
// them, anywhere.

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "cli/monitor_replay.h"
#include "cli/monitor_verbs.h"
#include "cli/number_range.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "io/unique_fd.h"
#include "monitor/finding_record.h"
#include "monitor/recording.h"
#include "monitor/topology.h"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;

// A worker that was restarted is back by then; an agent that has ended is not.
constexpr absl::Duration kAgentBackWithin = absl::Seconds(15);
constexpr absl::Duration kAgentLook = absl::Milliseconds(200);
// A recording ends here, while there is room for a last step.
constexpr uint64_t kFileBytes = monitor::kRecordingBytesMax - 2 * monitor::kRecordBytesMax;

struct RecordOptions {
  std::shared_ptr<MonitorOptions> agent;
  std::string path;
  double seconds = 0;  // 0: until interrupted
};

// SIGINT and SIGTERM end a recording; they are taken from a descriptor.
UniqueFd TakeSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  CHECK(sigprocmask(SIG_BLOCK, &signals, nullptr) == 0);
  UniqueFd fd(signalfd(-1, &signals, SFD_CLOEXEC));
  CHECK(fd);
  return fd;
}

class Recorder {
 public:
  Recorder(const RecordOptions& options, FileSystem& file_system)
      : options_(options), file_system_(file_system), signals_(TakeSignals()) {}

  absl::Status Run() {
    RETURN_IF_ERROR(Connect());
    // Only now: whoever waits for the file knows that nothing is missed from here on.
    ASSIGN_OR_RETURN(file_, file_system_.CreateNew(options_.path));
    RETURN_IF_ERROR(Write(writer_.Begin()));
    std::fprintf(stderr, "holdfast: recording to %s\n", options_.path.c_str());
    end_ = options_.seconds > 0 ? RealClock().Elapsed() + absl::Seconds(options_.seconds)
                                : absl::InfiniteDuration();
    const absl::Status outcome = Loop();
    // After a failed write nothing more can be: what is there can be replayed all the same.
    if (file_ == nullptr) return outcome;
    RETURN_IF_ERROR(Write(writer_.End()));
    RETURN_IF_ERROR(file_->Sync());
    std::fprintf(stderr, "holdfast: %llu steps in %s%s\n", static_cast<unsigned long long>(steps_),
                 HumanBytes(bytes_).c_str(),
                 lost_ == 0 ? "" : absl::StrFormat("; %d steps lost", lost_).c_str());
    return outcome;
  }

 private:
  absl::Status Connect() {
    ASSIGN_OR_RETURN(events_,
                     AgentEvents::Open(options_.agent->socket,
                                       {abi::MonitorQueryKind::kRecord, options_.agent->job, "", 0},
                                       kMonitorTimeout));
    return absl::OkStatus();
  }

  // The agent's worker may have been restarted: what is missed meanwhile is noted as a loss.
  absl::Status Reconnect() {
    const absl::Duration give_up = RealClock().Elapsed() + kAgentBackWithin;
    for (;;) {
      const absl::Status connected = Connect();
      if (connected.ok()) return Lose(1);
      if (RealClock().Elapsed() >= give_up) return connected;
      if (Interrupted(kAgentLook)) return absl::CancelledError();
    }
  }

  bool Interrupted(absl::Duration within) const {
    pollfd entry{signals_.get(), POLLIN, 0};
    return poll(&entry, 1, static_cast<int>(absl::ToInt64Milliseconds(within))) > 0;
  }

  absl::Status Loop() {
    for (;;) {
      const absl::Duration left = end_ - RealClock().Elapsed();
      if (left <= absl::ZeroDuration()) return absl::OkStatus();
      pollfd entries[] = {{signals_.get(), POLLIN, 0}, {events_->fd(), POLLIN, 0}};
      const absl::Duration wait = std::min(left, absl::Seconds(60));
      poll(entries, 2, static_cast<int>(absl::ToInt64Milliseconds(wait)) + 1);
      if ((entries[0].revents & POLLIN) != 0) return absl::OkStatus();
      if (entries[1].revents == 0) continue;
      absl::StatusOr<std::optional<AgentEvents::Event>> event = events_->Receive();
      if (!event.ok() || !event->has_value()) {
        const absl::Status back = Reconnect();
        if (back.code() == absl::StatusCode::kCancelled) return absl::OkStatus();
        RETURN_IF_ERROR(back);
        continue;
      }
      if ((*event)->lost > 0) RETURN_IF_ERROR(Lose((*event)->lost));
      ++steps_;
      RETURN_IF_ERROR(Write(writer_.Append((*event)->text)));
      if (bytes_ > kFileBytes) {
        return absl::ResourceExhaustedError(
            absl::StrFormat("%s: ended, as a replay reads at most %d bytes", options_.path,
                            monitor::kRecordingBytesMax));
      }
    }
  }

  absl::Status Lose(uint64_t steps) {
    lost_ += steps;
    return Write(writer_.Append(monitor::EncodeRecorded(monitor::RecordedLoss{steps})));
  }

  absl::Status Write(const std::string& bytes) {
    bytes_ += bytes.size();
    absl::Status written = file_->Append(std::as_bytes(std::span(bytes)));
    if (!written.ok()) file_.reset();
    return written;
  }

  const RecordOptions& options_;
  FileSystem& file_system_;
  const UniqueFd signals_;
  std::unique_ptr<AgentEvents> events_;
  std::unique_ptr<WritableFile> file_;
  monitor::RecordingWriter writer_;
  absl::Duration end_;
  uint64_t steps_ = 0;
  uint64_t lost_ = 0;
  uint64_t bytes_ = 0;
};

ordered_json ToJson(const Replayed& replayed) {
  ordered_json json = {{"schema_version", 1},
                       {"recording",
                        {{"jobs", replayed.jobs},
                         {"steps", replayed.steps},
                         {"steps_lost", replayed.lost},
                         {"ended_on_purpose", replayed.ended},
                         {"damage", nullptr}}},
                       {"findings", ordered_json::array()}};
  if (!replayed.damage.ok()) {
    json["recording"]["damage"] = std::string(replayed.damage.message());
  }
  const auto records = replayed.log.Records();
  for (auto record = records.rbegin(); record != records.rend(); ++record) {
    json["findings"].push_back(monitor::FindingRecordObject(**record));
  }
  return json;
}

// Empty for no path. Errors name the file.
absl::StatusOr<std::string> ReadTopologyFile(FileSystem& file_system, const std::string& path) {
  if (path.empty()) return std::string();
  ASSIGN_OR_RETURN(std::string text, file_system.ReadSmallFile(path, monitor::kTopologyBytesMax));
  const absl::Status parsed = monitor::Topology::Parse(text).status();
  if (parsed.ok()) return text;
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", std::string(parsed.message())));
}

void Print(const Replayed& replayed) {
  std::printf("%llu steps of %zu jobs", static_cast<unsigned long long>(replayed.steps),
              replayed.jobs.size());
  if (replayed.lost > 0) {
    std::printf("; %llu were lost while recording", static_cast<unsigned long long>(replayed.lost));
  }
  if (!replayed.ended && replayed.damage.ok()) {
    std::printf("; the recording stops without its end: its recorder was killed, or it was cut");
  }
  std::printf("\n");
  if (replayed.log.size() == 0) std::printf("Nothing is found.\n");
  for (const monitor::FindingRecord* record : replayed.log.Records()) {
    std::printf("\n%s", FindingText(monitor::FindingRecordObject(*record)).c_str());
  }
}

}  // namespace

void AddMonitorRecord(CLI::App& monitor, Invocation& invocation) {
  CLI::App* verb = monitor.add_subcommand(
      "record", "Writes what nodes report to a file, until interrupted; see replay");
  auto options = std::make_shared<RecordOptions>();
  options->agent = AddMonitorOptions(*verb);
  verb->add_option("FILE", options->path, "The recording, which must not exist")->required();
  verb->add_option("--seconds", options->seconds, "End after so long; 0: when interrupted")
      ->check(NumberRange(0.0, 1e9));
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      return Report(Recorder(*options, invocation.file_system).Run());
    };
  });
}

void AddMonitorReplay(CLI::App& monitor, Invocation& invocation) {
  CLI::App* verb = monitor.add_subcommand(
      "replay", "Analyses a recording: the same findings on any machine, without an agent");
  struct Options {
    std::string path;
    std::string job;
    std::string topology;
  };
  auto options = std::make_shared<Options>();
  verb->add_option("FILE", options->path, "The recording")->required();
  verb->add_option("--job", options->job, "Only this job");
  verb->add_option("--topology", options->topology,
                   "A topology file (MONITOR.md), in the place of what was recorded");
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      const absl::StatusOr<std::string> file =
          invocation.file_system.ReadSmallFile(options->path, monitor::kRecordingBytesMax);
      if (!file.ok()) return Report(file.status());
      const absl::StatusOr<std::string> topology =
          ReadTopologyFile(invocation.file_system, options->topology);
      if (!topology.ok()) return Report(topology.status());
      const absl::StatusOr<Replayed> replayed = Replay(*file, options->job, *topology);
      if (!replayed.ok()) return Report(replayed.status());
      if (invocation.json) {
        std::printf("%s\n", JsonText(ToJson(*replayed)).c_str());
      } else {
        Print(*replayed);
      }
      if (replayed->damage.ok()) return kExitOk;
      Report(replayed->damage);
      return kExitDamaged;
    };
  });
}

}  // namespace holdfast::cli
