#include "agent/monitor/process_witness.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "agent/proc_stat.h"
#include "agent/process.h"

namespace holdfast {
namespace {

using monitor::ProcessState;

constexpr size_t kFileBytesMax = 4096;

ProcessState StateOf(char letter) {
  switch (letter) {
    case 'R':
    case 'W':
    case 'P':
      return ProcessState::kRunning;
    case 'S':
    case 'I':
      return ProcessState::kSleeping;
    case 'D':
      return ProcessState::kBlocked;
    case 'T':
    case 't':
      return ProcessState::kStopped;
    case 'Z':
    case 'X':
    case 'x':
      return ProcessState::kGone;
    default:
      return ProcessState::kUnknown;
  }
}

struct CloseListing {
  void operator()(DIR* listing) const { closedir(listing); }
};

// absl's string_view is not std's in Debian 12.
absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

bool Number(absl::string_view text, uint64_t* to) { return absl::SimpleAtoi(text, to); }

// The last number of a line of /proc/PID/status, as "NSpid:", where it is the one in the innermost
// namespace.
std::optional<uint32_t> LastNumber(const std::string& status, absl::string_view name) {
  for (const absl::string_view line : absl::StrSplit(status, '\n')) {
    if (line.substr(0, name.size()) != name) continue;
    uint32_t number = 0;
    const std::vector<absl::string_view> parts =
        absl::StrSplit(line, absl::ByAnyChar("\t "), absl::SkipEmpty());
    return absl::SimpleAtoi(parts.back(), &number) ? std::optional(number) : std::nullopt;
  }
  return std::nullopt;
}

// Empty: it cannot be read.
std::string ReadAt(int directory, const std::string& name) {
  const UniqueFd file(openat(directory, name.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return std::string();
  char text[kFileBytesMax];
  const ssize_t length = read(file.get(), text, sizeof(text));
  return length > 0 ? std::string(text, static_cast<size_t>(length)) : std::string();
}

}  // namespace

std::optional<ProcessTestimony> ParseStat(std::string_view line, uint64_t ticks_per_second) {
  if (ticks_per_second == 0) return std::nullopt;
  const std::vector<absl::string_view> fields = FieldsOfStat(line);
  constexpr size_t kUserTime = 11, kSystemTime = 12;  // fields 14 and 15 of the line
  uint64_t user = 0, system = 0;
  if (fields.size() <= kSystemTime || fields[0].size() != 1 || !Number(fields[kUserTime], &user) ||
      !Number(fields[kSystemTime], &system)) {
    return std::nullopt;
  }
  return ProcessTestimony{StateOf(fields[0][0]), (user + system) * (1'000'000 / ticks_per_second),
                          0, fields[0][0] == 't'};
}

std::optional<uint64_t> ParseRunDelayNs(std::string_view line) {
  const std::vector<absl::string_view> fields = absl::StrSplit(View(line), ' ');
  uint64_t delay_ns = 0;
  if (fields.size() != 3 || !Number(fields[1], &delay_ns)) return std::nullopt;
  return delay_ns;
}

ProcessWitness::ProcessWitness(int pidfd, uint32_t own_number) {
  const pid_t number = PidOf(pidfd);
  if (number <= 0) return;
  UniqueFd directory(
      open(absl::StrCat("/proc/", number).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  // It still has this number, so the directory is its own.
  if (!directory || IsDead(pidfd) || PidOf(pidfd) != number) return;
  directory_ = std::move(directory);
  same_numbers_ = own_number == static_cast<uint32_t>(number);
}

std::string ProcessWitness::Read(const std::string& name) const {
  return ReadAt(directory_.get(), name);
}

// The state was read before: whoever held the process then may have let it go meanwhile, and then
// it was held by nobody for long.
bool ProcessWitness::IsHeldByStranger() const {
  const std::optional<uint32_t> tracer = LastNumber(Read("status"), "TracerPid:");
  if (!tracer.has_value() || *tracer == 0) return false;
  const std::string status = ReadAt(AT_FDCWD, absl::StrCat("/proc/", *tracer, "/status"));
  if (LastNumber(status, "PPid:") == static_cast<uint32_t>(getpid())) return false;
  return LastNumber(Read("status"), "TracerPid:") == tracer;
}

ProcessTestimony ProcessWitness::Look(std::span<const uint32_t> proxy_threads, absl::Duration now) {
  if (!directory_) return {};
  const std::string line = Read("stat");
  if (line.empty()) return {ProcessState::kGone, 0, run_delay_ns_ / 1000, false};
  const long ticks_per_second = sysconf(_SC_CLK_TCK);
  std::optional<ProcessTestimony> testimony =
      ParseStat(line, static_cast<uint64_t>(std::max(ticks_per_second, 1L)));
  if (!testimony.has_value()) return {};
  if (!testimony->is_traced) {
    was_stopped_ = testimony->state == ProcessState::kStopped;
  } else if (!was_stopped_ && (!was_traced_ || !IsHeldByStranger())) {
    testimony->state = ProcessState::kSleeping;
  }
  was_traced_ = testimony->is_traced;
  std::erase_if(threads_, [&](const auto& thread) {
    return std::find(proxy_threads.begin(), proxy_threads.end(), thread.first) ==
           proxy_threads.end();
  });
  for (const uint32_t number : proxy_threads) {
    if (threads_.size() == kThreadsMax) break;
    threads_.try_emplace(number);
  }
  FindTasks(now);
  CountRunDelay();
  testimony->run_delay_us = run_delay_ns_ / 1000;
  return *testimony;
}

void ProcessWitness::FindTasks(absl::Duration now) {
  const bool missing = std::any_of(threads_.begin(), threads_.end(),
                                   [](const auto& thread) { return thread.second.task == 0; });
  if (!missing) return;
  if (same_numbers_) {
    for (auto& [number, thread] : threads_) thread.task = number;
    return;
  }
  if (now < next_search_) return;
  next_search_ = now + kSearchPause;
  const int tasks = openat(directory_.get(), "task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (tasks < 0) return;
  const std::unique_ptr<DIR, CloseListing> listing(fdopendir(tasks));
  if (listing == nullptr) {
    close(tasks);
    return;
  }
  for (size_t i = 0; i < kTasksMax; ++i) {
    const dirent* const entry = readdir(listing.get());
    if (entry == nullptr) return;
    uint32_t task = 0;
    if (!absl::SimpleAtoi(entry->d_name, &task)) continue;
    const std::optional<uint32_t> number =
        LastNumber(Read(absl::StrCat("task/", task, "/status")), "NSpid:");
    if (!number.has_value()) continue;
    const auto found = threads_.find(*number);
    if (found != threads_.end()) found->second.task = task;
  }
}

// One starved thread is enough to hold up what it moves, so the slowest counts, not the sum.
void ProcessWitness::CountRunDelay() {
  uint64_t most_ns = 0;
  for (auto& [number, thread] : threads_) {
    if (thread.task == 0) continue;
    const std::optional<uint64_t> delay_ns =
        ParseRunDelayNs(Read(absl::StrCat("task/", thread.task, "/schedstat")));
    if (!delay_ns.has_value()) {
      thread = {};  // it has ended; another one may have its number later
      continue;
    }
    if (thread.delay_ns.has_value() && *delay_ns > *thread.delay_ns) {
      most_ns = std::max(most_ns, *delay_ns - *thread.delay_ns);
    }
    thread.delay_ns = delay_ns;
  }
  run_delay_ns_ += most_ns;
}

}  // namespace holdfast
