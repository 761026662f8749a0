#include "examples/tiny_lm/faults.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "examples/collectives/status_macros.h"

namespace tiny_lm {
namespace {

constexpr uint32_t kRanksMax = 65536;
constexpr double kSecondsMax = 1e6;
constexpr double kFactorMax = 1000;
constexpr size_t kSectionBytesMax = 31;  // what the monitor shows of it

struct KindRules {
  FaultKind kind;
  const char* name;
  std::set<std::string> keys;  // besides those that all have
  const char* needed;          // one of them, or null
  uint64_t steps;              // unless told
};

const std::vector<KindRules>& Kinds() {
  static const std::vector<KindRules> kinds = {
      {FaultKind::kSlowCompute, "slow-compute", {"factor"}, "factor", 0},
      {FaultKind::kGpuHang, "gpu-hang", {"seconds"}, nullptr, 1},
      {FaultKind::kFlushStall, "flush-stall", {"seconds"}, nullptr, 1},
      {FaultKind::kNeverEnter, "never-enter", {"seconds"}, nullptr, 1},
      {FaultKind::kEndlessLoop, "endless-loop", {"seconds"}, nullptr, 1},
      {FaultKind::kWrongSize, "wrong-size", {}, nullptr, 1},
      {FaultKind::kWrongKind, "wrong-kind", {}, nullptr, 1},
      {FaultKind::kSlowData, "slow-data", {"seconds"}, "seconds", 0},
      {FaultKind::kPause, "pause", {"seconds", "section", "busy"}, "seconds", 0},
      {FaultKind::kNan, "nan", {}, nullptr, 1},
      {FaultKind::kExit, "exit", {"status"}, nullptr, 1},
  };
  return kinds;
}

absl::Status Expected(const std::string& what, absl::string_view found) {
  return absl::InvalidArgumentError(absl::StrFormat("expected %s, found '%s'", what, found));
}

absl::StatusOr<uint64_t> Number(absl::string_view text, uint64_t min, uint64_t max) {
  uint64_t value = 0;
  if (!absl::SimpleAtoi(text, &value) || value < min || value > max) {
    return Expected(absl::StrFormat("a number from %d to %d", min, max), text);
  }
  return value;
}

absl::StatusOr<double> Real(absl::string_view text, double above, double max) {
  double value = 0;
  if (!absl::SimpleAtod(text, &value) || !(value > above && value <= max)) {
    return Expected(absl::StrFormat("a number above %g, up to %g", above, max), text);
  }
  return value;
}

absl::Status SetRanks(absl::string_view text, Fault& fault) {
  if (text == "all") return absl::OkStatus();
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    uint32_t rank = 0;
    if (!absl::SimpleAtoi(part, &rank) || rank >= kRanksMax) {
      return Expected("ranks as 3, 1,4 or all", text);
    }
    fault.ranks.push_back(rank);
  }
  return absl::OkStatus();
}

absl::Status SetKey(const std::string& key, absl::string_view value, Fault& fault) {
  constexpr uint64_t kStepMax = std::numeric_limits<uint32_t>::max();
  if (key == "rank") return SetRanks(value, fault);
  if (key == "from_step") {
    ASSIGN_OR_RETURN(fault.from_step, Number(value, 1, kStepMax));
  } else if (key == "steps") {
    ASSIGN_OR_RETURN(fault.steps, Number(value, 1, kStepMax));
  } else if (key == "every") {
    ASSIGN_OR_RETURN(fault.every, Number(value, 1, kStepMax));
  } else if (key == "factor") {
    ASSIGN_OR_RETURN(fault.factor, Real(value, 1, kFactorMax));
  } else if (key == "seconds") {
    ASSIGN_OR_RETURN(const double seconds, Real(value, 0, kSecondsMax));
    fault.duration = absl::Seconds(seconds);
  } else if (key == "section") {
    if (value.empty() || value.size() > kSectionBytesMax) {
      return Expected(absl::StrFormat("a name of 1 to %d bytes", kSectionBytesMax), value);
    }
    fault.section = std::string(value);
  } else if (key == "busy") {
    ASSIGN_OR_RETURN(const uint64_t busy, Number(value, 0, 1));
    fault.is_busy = busy == 1;
  } else if (key == "status") {
    ASSIGN_OR_RETURN(const uint64_t status, Number(value, 0, 255));
    fault.status = static_cast<int>(status);
  }
  return absl::OkStatus();
}

absl::StatusOr<Fault> ParseFault(const std::vector<absl::string_view>& words) {
  const auto rules = std::find_if(Kinds().begin(), Kinds().end(), [&](const KindRules& kind) {
    return words.front() == kind.name;
  });
  if (rules == Kinds().end()) return Expected("a kind of fault", words.front());
  std::set<std::string> known = rules->keys;
  known.insert({"rank", "from_step", "steps", "every"});
  Fault fault;
  fault.kind = rules->kind;
  fault.steps = rules->steps;
  std::set<std::string> given;
  for (size_t i = 1; i < words.size(); ++i) {
    const std::pair<std::string, absl::string_view> item =
        absl::StrSplit(words[i], absl::MaxSplits('=', 1));
    if (!known.contains(item.first)) {
      return Expected(absl::StrFormat("key=value with a key of %s", rules->name), words[i]);
    }
    if (!given.insert(item.first).second) return Expected("each key once", words[i]);
    if (const absl::Status status = SetKey(item.first, item.second, fault); !status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(item.first, ": ", std::string(status.message())));
    }
  }
  for (const char* const needed : {"rank", rules->needed}) {
    if (needed != nullptr && !given.contains(needed)) {
      return absl::InvalidArgumentError(absl::StrFormat("%s: expected %s=", rules->name, needed));
    }
  }
  return fault;
}

// OK and nullopt: there is no such file.
absl::StatusOr<std::optional<std::string>> ReadFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0 && errno == ENOENT) return std::nullopt;
  if (fd < 0) return absl::InvalidArgumentError(std::strerror(errno));
  std::string text(kFaultFileBytesMax + 1, '\0');
  size_t done = 0;
  ssize_t got = 1;
  while (got > 0 && done < text.size()) {
    got = read(fd, text.data() + done, text.size() - done);
    if (got > 0) done += static_cast<size_t>(got);
  }
  const int error = got < 0 ? errno : 0;
  close(fd);
  if (error != 0) return absl::InvalidArgumentError(std::strerror(error));
  if (done > kFaultFileBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("expected at most %d bytes, found more", kFaultFileBytesMax));
  }
  text.resize(done);
  return text;
}

}  // namespace

const char* Name(FaultKind kind) {
  for (const KindRules& rules : Kinds()) {
    if (rules.kind == kind) return rules.name;
  }
  return "unknown";
}

bool Fault::IsOf(uint32_t rank) const {
  return ranks.empty() || std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
}

absl::StatusOr<std::vector<Fault>> ParseFaults(const std::string& text) {
  std::vector<Fault> faults;
  size_t number = 0;
  for (const absl::string_view whole : absl::StrSplit(text, '\n')) {
    ++number;
    const absl::string_view line =
        absl::StripAsciiWhitespace(whole.substr(0, std::min(whole.find('#'), whole.size())));
    const std::vector<absl::string_view> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t\r\v\f"), absl::SkipEmpty());
    if (words.empty()) continue;
    absl::StatusOr<Fault> fault = ParseFault(words);
    if (!fault.ok()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("line %d: %s", number, std::string(fault.status().message())));
    }
    if (faults.size() == kFaultsMax) {
      return absl::InvalidArgumentError(
          absl::StrFormat("line %d: expected at most %d faults", number, kFaultsMax));
    }
    fault->line = std::string(line);
    faults.push_back(*std::move(fault));
  }
  return faults;
}

absl::Status FaultFile::Refresh(uint64_t step) {
  if (path_.empty()) return absl::OkStatus();
  struct stat found {};
  Version version;
  if (stat(path_.c_str(), &found) == 0) {
    version = {found.st_mtim.tv_sec * 1'000'000'000 + found.st_mtim.tv_nsec, found.st_ino,
               found.st_size};
  }
  if (version == version_) return absl::OkStatus();
  version_ = version;
  absl::StatusOr<std::optional<std::string>> text = ReadFile(path_);
  absl::StatusOr<std::vector<Fault>> faults =
      text.ok() ? ParseFaults(text->value_or("")) : text.status();
  if (!faults.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": ", std::string(faults.status().message())));
  }
  faults_ = *std::move(faults);
  std::map<std::string, uint64_t> seen;
  for (const Fault& fault : faults_) {
    const auto known = seen_.find(fault.line);
    seen[fault.line] = known == seen_.end() ? step : known->second;
  }
  seen_ = std::move(seen);
  return absl::OkStatus();
}

std::vector<Fault> FaultFile::ActingIn(uint64_t step) const {
  std::vector<Fault> acting;
  for (const Fault& fault : faults_) {
    const uint64_t from = fault.from_step.value_or(seen_.at(fault.line));
    const bool in_time = step >= from && (fault.steps == 0 || step - from < fault.steps);
    if (in_time && (step - from) % fault.every == 0 && fault.IsOf(rank_)) acting.push_back(fault);
  }
  return acting;
}

}  // namespace tiny_lm
