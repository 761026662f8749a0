#include "monitor/witness/ras.h"

#include <algorithm>
#include <memory>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/json_reader.h"
#include "base/status_macros.h"

namespace holdfast::monitor {
namespace {

constexpr size_t kHostBytesMax = 64;

absl::StatusOr<uint64_t> HashIn(absl::string_view text) {
  absl::ConsumePrefix(&text, "0x");
  uint64_t hash = 0;
  if (!absl::SimpleHexAtoi(text, &hash)) {
    return absl::InvalidArgumentError(
        absl::StrCat("RAS: expected a hash, found \"", text.substr(0, 40), "\""));
  }
  return hash;
}

// ---- JSON

absl::StatusOr<RasRank> ReadRank(const JsonValue& value) {
  RasRank rank;
  ASSIGN_OR_RETURN(const JsonValue index, value.Get("rank"));
  ASSIGN_OR_RETURN(const uint64_t number, index.Uint64());
  rank.index = static_cast<uint32_t>(std::min<uint64_t>(number, UINT32_MAX));
  rank.process = value.Find("pid").Int64().value_or(-1);
  rank.host = std::string(value.Find("host").String().value_or("")).substr(0, kHostBytesMax);
  const JsonValue status = value.Find("status");
  rank.async_error = status.Find("async_error").Int64().value_or(0);
  rank.dead = status.Find("considered_dead").Bool().value_or(false);
  if (const JsonValue counts = value.Find("collective_counts"); counts.present()) {
    ASSIGN_OR_RETURN(const auto names, counts.Keys());
    for (const std::string_view name : names) {
      ASSIGN_OR_RETURN(rank.launched[std::string(name.substr(0, kHostBytesMax))],
                       counts.Find(name).Uint64());
    }
  }
  return rank;
}

absl::Status ReadRanks(const JsonValue& list, bool missing, std::vector<RasRank>& ranks) {
  if (!list.present()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(RasRank rank, ReadRank(list[i]));
    // One that answers, but is not in this communicator, is no silent one.
    rank.missing =
        missing && (rank.dead || list[i].Find("status").Find("unresponsive").Bool().value_or(true));
    ranks.push_back(std::move(rank));
  }
  return absl::OkStatus();
}

absl::StatusOr<RasReport> ReadJson(const JsonValue& root) {
  RasReport report;
  ASSIGN_OR_RETURN(const JsonValue list, root.Get("communicators"));
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  for (size_t i = 0; i < count; ++i) {
    RasCommunicator communicator;
    ASSIGN_OR_RETURN(const JsonValue hash, list[i].Get("hash"));
    ASSIGN_OR_RETURN(const std::string_view text, hash.String());
    ASSIGN_OR_RETURN(communicator.hash, HashIn(absl::string_view(text.data(), text.size())));
    ASSIGN_OR_RETURN(const JsonValue size, list[i].Get("size"));
    ASSIGN_OR_RETURN(const uint64_t number, size.Uint64());
    communicator.size = static_cast<uint32_t>(std::min<uint64_t>(number, UINT32_MAX));
    RETURN_IF_ERROR(ReadRanks(list[i].Find("ranks"), false, communicator.ranks));
    RETURN_IF_ERROR(ReadRanks(list[i].Find("missing_ranks"), true, communicator.ranks));
    report.communicators.push_back(std::move(communicator));
  }
  return report;
}

// ---- Text. Of every line only the forms below are read; all others are for people.

// Takes an unsigned number from the front.
bool ConsumeNumber(absl::string_view* text, uint64_t* number) {
  size_t digits = 0;
  while (digits < text->size() && (*text)[digits] >= '0' && (*text)[digits] <= '9') ++digits;
  if (digits == 0 || !absl::SimpleAtoi(text->substr(0, digits), number)) return false;
  text->remove_prefix(digits);
  return true;
}

// "... process 4711 on node 10.0.0.1": what follows "process".
void ReadProcess(absl::string_view line, RasRank& rank) {
  const size_t at = line.find("process ");
  if (at == absl::string_view::npos) return;
  line.remove_prefix(at + 8);
  uint64_t process = 0;
  if (!ConsumeNumber(&line, &process)) return;
  rank.process = static_cast<int64_t>(process);
  if (absl::ConsumePrefix(&line, " on node ")) {
    rank.host = std::string(line.substr(0, std::min(line.find(' '), kHostBytesMax)));
  }
}

class TextReader {
 public:
  explicit TextReader(const std::string& answer) : answer_(answer) {}

  absl::StatusOr<RasReport> Read() {
    bool known = false;
    for (absl::string_view line : absl::StrSplit(answer_, '\n')) {
      known |= absl::StartsWith(line, "Job summary") || absl::StartsWith(line, "Communicators") ||
               absl::StartsWith(line, "Warnings") || absl::StartsWith(line, "NCCL version");
      RETURN_IF_ERROR(ReadLine(absl::StripTrailingAsciiWhitespace(line)));
    }
    if (!known) {
      return absl::InvalidArgumentError(
          absl::StrFormat("RAS: expected a status report, found \"%s\"", answer_.substr(0, 80)));
    }
    for (auto& [hash, communicator] : by_hash_) {
      report_.communicators.push_back(std::move(communicator));
    }
    return std::move(report_);
  }

 private:
  enum class Part { kOther, kDead, kIncomplete, kError, kMismatch };

  absl::Status ReadLine(absl::string_view line) {
    if (line.empty()) return absl::OkStatus();
    if (line.front() == '#') return ReadHeading(line);
    if (line.front() != ' ') {
      part_ = line == "DEAD" ? Part::kDead : Part::kOther;
      return absl::OkStatus();
    }
    line = absl::StripLeadingAsciiWhitespace(line);
    if (part_ == Part::kDead) {
      if (absl::StartsWith(line, "Process ")) {
        RasRank rank;
        rank.missing = rank.dead = true;
        ReadProcess(absl::StrCat("process ", line.substr(8)), rank);
        report_.dead.push_back(std::move(rank));
      }
      return absl::OkStatus();
    }
    if (part_ != Part::kOther) ReadDetail(line);
    return absl::OkStatus();
  }

  // "#0-1 (00a1b2c3d4e5f607) MISMATCH"
  absl::Status ReadHeading(absl::string_view line) {
    const size_t open = line.find('('), close = line.find(')');
    part_ = Part::kOther;
    if (open == absl::string_view::npos || close == absl::string_view::npos || close < open) {
      return absl::OkStatus();
    }
    ASSIGN_OR_RETURN(const uint64_t hash, HashIn(line.substr(open + 1, close - open - 1)));
    communicator_ = &by_hash_[hash];
    communicator_->hash = hash;
    const absl::string_view what = absl::StripLeadingAsciiWhitespace(line.substr(close + 1));
    if (what == "INCOMPLETE") part_ = Part::kIncomplete;
    if (what == "ERROR") part_ = Part::kError;
    if (what == "MISMATCH") part_ = Part::kMismatch;
    collective_.clear();
    return absl::OkStatus();
  }

  void ReadDetail(absl::string_view line) {
    if (absl::ConsumePrefix(&line, "Communicator ranks have different ")) {
      const size_t end = line.find(" operation counts");
      collective_ = end == absl::string_view::npos
                        ? ""
                        : std::string(line.substr(0, std::min(end, kHostBytesMax)));
      most_ranks_ = 0;
      count_.reset();
      return;
    }
    uint64_t number = 0;
    if (absl::ConsumePrefix(&line, "Rank ")) {
      if (!ConsumeNumber(&line, &number)) return;
      RasRank& rank = Member(static_cast<uint32_t>(std::min<uint64_t>(number, UINT32_MAX)));
      ReadProcess(line, rank);
      if (part_ == Part::kIncomplete) rank.missing = true;
      if (part_ == Part::kError) rank.async_error = 1;
      if (part_ != Part::kMismatch || collective_.empty()) return;
      if (const std::optional<uint64_t> own = LaunchedIn(line); own.has_value()) {
        rank.launched[collective_] = *own;
      } else if (count_.has_value()) {
        rank.launched[collective_] = *count_;  // of the group that was named before
      }
      return;
    }
    if (part_ != Part::kMismatch || collective_.empty() || !ConsumeNumber(&line, &number)) return;
    if (!absl::StartsWith(line, " ranks have ")) return;
    count_ = LaunchedIn(line);
    if (count_.has_value() && number > most_ranks_) {
      most_ranks_ = number;
      communicator_->most_launched[collective_] = *count_;
    }
  }

  static std::optional<uint64_t> LaunchedIn(absl::string_view line) {
    if (absl::StrContains(line, "not launched any operations")) return 0;
    constexpr absl::string_view kUpTo = "launched up to operation ";
    const size_t at = line.find(kUpTo);
    uint64_t count = 0;
    if (at == absl::string_view::npos) return std::nullopt;
    line.remove_prefix(at + kUpTo.size());
    if (!ConsumeNumber(&line, &count)) return std::nullopt;
    return count;
  }

  RasRank& Member(uint32_t index) {
    for (RasRank& rank : communicator_->ranks) {
      if (rank.index == index) return rank;
    }
    RasRank rank;
    rank.index = index;
    communicator_->ranks.push_back(std::move(rank));
    return communicator_->ranks.back();
  }

  const std::string& answer_;
  RasReport report_;
  std::map<uint64_t, RasCommunicator> by_hash_;
  RasCommunicator* communicator_ = nullptr;
  Part part_ = Part::kOther;
  std::string collective_;
  std::optional<uint64_t> count_;
  uint64_t most_ranks_ = 0;
};

// ---- What it says

// What most ranks have launched of each collective: the most frequent count, of equals the greater.
std::map<std::string, uint64_t> MostLaunched(const RasCommunicator& communicator) {
  if (!communicator.most_launched.empty()) return communicator.most_launched;
  std::map<std::string, std::map<uint64_t, size_t>> frequency;
  for (const RasRank& rank : communicator.ranks) {
    for (const auto& [collective, count] : rank.launched) ++frequency[collective][count];
  }
  std::map<std::string, uint64_t> most;
  for (const auto& [collective, counts] : frequency) {
    size_t best = 0;
    for (const auto& [count, ranks] : counts) {
      if (ranks >= best) {
        best = ranks;
        most[collective] = count;
      }
    }
  }
  return most;
}

const RasRank* Same(const RasReport& report, uint64_t hash, const RasRank& rank) {
  for (const RasCommunicator& communicator : report.communicators) {
    if (communicator.hash != hash) continue;
    for (const RasRank& other : communicator.ranks) {
      if (other.index == rank.index) return &other;
    }
  }
  return nullptr;
}

std::string MemberText(const RasCommunicator& communicator, const RasRank& rank,
                       std::optional<Rank> known) {
  if (known.has_value()) return absl::StrCat("rank ", Value(*known));
  return absl::StrFormat("member %d of communicator %x (process %d on %s)", rank.index,
                         communicator.hash, rank.process, rank.host.empty() ? "?" : rank.host);
}

class RasWitness {
 public:
  RasWitness(absl::Duration apart, const RankOfMember& rank_of)
      : apart_(apart), rank_of_(rank_of) {}

  void Compare(const RasReport& first, const RasCommunicator& communicator) {
    const auto most = MostLaunched(communicator);
    for (const RasRank& rank : communicator.ranks) {
      const RasRank* const before = Same(first, communicator.hash, rank);
      if (rank.missing) {
        if (before != nullptr && before->missing) AddMissing(communicator, rank);
        continue;
      }
      // It moves: nothing is said of it.
      if (before == nullptr || before->launched != rank.launched) continue;
      std::vector<std::string> behind, ahead;
      for (const auto& [collective, count] : rank.launched) {
        const auto found = most.find(collective);
        if (found == most.end() || count == found->second) continue;
        (count < found->second ? behind : ahead)
            .push_back(
                absl::StrFormat("%d of %s where most have %d", count, collective, found->second));
      }
      if (behind.empty()) continue;
      // Behind in one and ahead in another: it called something else.
      const bool differs = !ahead.empty();
      behind.insert(behind.end(), ahead.begin(), ahead.end());
      Add(differs ? Claim::kDiffers : Claim::kBehind, communicator, rank, differs ? 0.8 : 0.85,
          absl::StrCat(" has launched ", absl::StrJoin(behind, ", ")));
    }
  }

  void AddMissing(const RasCommunicator& communicator, const RasRank& rank) {
    Add(Claim::kMissing, communicator, rank, rank.dead ? 0.9 : 0.7,
        rank.dead ? " is taken for dead by RAS" : " does not answer RAS");
  }

  std::vector<Testimony> TakeSaid() { return std::move(said_); }

 private:
  void Add(Claim claim, const RasCommunicator& communicator, const RasRank& rank, double certainty,
           const std::string& what) {
    if (said_.size() == kTestimoniesMax) return;
    const std::optional<Rank> known = rank_of_(communicator, rank);
    Testimony testimony;
    testimony.source = Source::kRas;
    testimony.claim = claim;
    if (known.has_value()) testimony.ranks = {*known};
    testimony.communicator = communicator.hash;
    testimony.group = absl::StrFormat("%x", communicator.hash);
    testimony.standing = apart_;
    testimony.certainty = certainty;
    testimony.sentence = CutText(absl::StrCat(MemberText(communicator, rank, known), what));
    said_.push_back(std::move(testimony));
  }

  const absl::Duration apart_;
  const RankOfMember& rank_of_;
  std::vector<Testimony> said_;
};

}  // namespace

absl::StatusOr<RasReport> ParseRasReport(std::string answer) {
  if (answer.size() > kRasAnswerBytesMax) {
    return absl::InvalidArgumentError(absl::StrFormat("RAS: expected at most %d bytes, found %d",
                                                      kRasAnswerBytesMax, answer.size()));
  }
  const size_t begin = answer.find_first_not_of(" \r\n");
  if (begin != std::string::npos && answer[begin] == '{') {
    ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                     JsonDocument::Parse(std::move(answer)));
    return ReadJson(document->root());
  }
  return TextReader(answer).Read();
}

std::vector<Testimony> TestifyRas(const RasReport& first, const RasReport& second,
                                  absl::Duration apart, const RankOfMember& rank_of) {
  RasWitness witness(apart, rank_of);
  std::set<int64_t> told;
  for (const RasCommunicator& communicator : second.communicators) {
    witness.Compare(first, communicator);
    for (const RasRank& rank : communicator.ranks) {
      if (rank.missing) told.insert(rank.process);
    }
  }
  for (const RasRank& rank : second.dead) {
    if (!told.contains(rank.process)) witness.AddMissing({}, rank);
  }
  return witness.TakeSaid();
}

}  // namespace holdfast::monitor
