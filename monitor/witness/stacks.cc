#include "monitor/witness/stacks.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace holdfast::monitor {
namespace {

constexpr absl::string_view kInCollective = "(in a collective)";

// Parts of frames that belong to a communication library. Python files first, then functions and
// modules of native code.
constexpr absl::string_view kCollectiveParts[] = {
    "torch/distributed/",
    "torch.distributed",
    "distributed_c10d.py",
    "c10d::",
    "gloo::",
    "libgloo",
    "libnccl",
    "ncclAllReduce",
    "ncclGroupEnd",
    "ncclComm",
    "nccl::",
    "libmpi",
    "MPI_",
    "collectives::",
};

bool IsCollective(absl::string_view frame) {
  return std::any_of(std::begin(kCollectiveParts), std::end(kCollectiveParts),
                     [&](absl::string_view part) { return absl::StrContains(frame, part); });
}

std::string CutFrame(absl::string_view frame) {
  std::string text(frame.substr(0, kFrameBytesMax));
  for (char& c : text) {
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) c = '?';
  }
  return text;
}

absl::string_view Absl(std::string_view text) { return {text.data(), text.size()}; }

void AddFrame(ThreadStack& thread, absl::string_view frame) {
  if (thread.frames.size() < kStackFramesMax) thread.frames.push_back(CutFrame(frame));
}

// `  File "/a/b/c.py", line 12 in f` -> "f (b/c.py:12)": the last two parts of the path tell files
// apart, and are the same on all nodes.
std::string PythonFrame(absl::string_view line) {
  const size_t open = line.find('"'), close = line.rfind('"');
  if (close == absl::string_view::npos || close == open) return std::string(line);
  absl::string_view file = line.substr(open + 1, close - open - 1);
  const size_t last = file.rfind('/');
  if (last != absl::string_view::npos && last > 0 &&
      !absl::StrContains(file, "torch/distributed/")) {
    const size_t before = file.rfind('/', last - 1);
    if (before != absl::string_view::npos) file.remove_prefix(before + 1);
  }
  absl::string_view rest = line.substr(close + 1);
  absl::ConsumePrefix(&rest, ", line ");
  const size_t in = rest.find(" in ");
  if (in == absl::string_view::npos) return absl::StrCat("? (", file, ":", rest, ")");
  return absl::StrCat(rest.substr(in + 4), " (", file, ":", rest.substr(0, in), ")");
}

std::string RanksText(const std::vector<Rank>& ranks) {
  std::vector<uint32_t> numbers;
  for (const Rank rank : ranks) numbers.push_back(Value(rank));
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", absl::StrJoin(numbers, ", "));
}

// Where a stack leaves the other one: the outermost frame that differs, and the innermost one.
std::string PlaceOf(const std::string& signature, const std::string& other) {
  const std::vector<std::string> own = absl::StrSplit(signature, '\n');
  const std::vector<std::string> others = absl::StrSplit(other, '\n');
  const auto differs = static_cast<size_t>(
      std::mismatch(own.begin(), own.end(), others.begin(), others.end()).first - own.begin());
  size_t at = std::min(differs, own.size() - 1);
  // That somebody is in a collective says less than who called it.
  if (own[at] == kInCollective && at > 0) --at;
  if (at + 1 == own.size()) return own[at];
  if (own.back() == kInCollective) return absl::StrCat(own[at], " ", kInCollective);
  return absl::StrCat(own[at], ", at ", own.back());
}

}  // namespace

std::vector<ThreadStack> ParsePythonStacks(std::string_view text) {
  std::vector<ThreadStack> threads;
  uint64_t main_thread = 0;
  bool taken = false;  // the frames that follow belong to threads.back()
  for (absl::string_view line : absl::StrSplit(Absl(text.substr(0, kStackBytesMax)), '\n')) {
    absl::string_view rest = line;
    if (absl::ConsumePrefix(&rest, "holdfast main thread 0x")) {
      if (!absl::SimpleHexAtoi(rest, &main_thread)) main_thread = 0;
      continue;
    }
    if (absl::ConsumePrefix(&rest, "Thread 0x")) {
      ThreadStack thread;
      taken = threads.size() < kStackThreadsMax &&
              absl::SimpleHexAtoi(rest.substr(0, rest.find(' ')), &thread.thread);
      if (taken) threads.push_back(std::move(thread));
      continue;
    }
    if (absl::StartsWith(line, "Current thread 0x")) {
      taken = false;
      continue;
    }
    rest = absl::StripLeadingAsciiWhitespace(line);
    if (taken && absl::ConsumePrefix(&rest, "File ")) AddFrame(threads.back(), PythonFrame(rest));
  }
  for (ThreadStack& thread : threads) {
    thread.main = main_thread != 0 && thread.thread == main_thread;
  }
  return threads;
}

std::vector<ThreadStack> ParseNativeStacks(std::string_view text) {
  std::vector<ThreadStack> threads;
  bool taken = false;
  for (absl::string_view line : absl::StrSplit(Absl(text.substr(0, kStackBytesMax)), '\n')) {
    absl::string_view rest = line;
    if (absl::ConsumePrefix(&rest, "thread ")) {
      ThreadStack thread;
      thread.main = absl::ConsumeSuffix(&rest, " main");
      taken = threads.size() < kStackThreadsMax && absl::SimpleAtoi(rest, &thread.thread);
      if (taken) threads.push_back(std::move(thread));
    } else if (taken && absl::ConsumePrefix(&rest, "  ")) {
      AddFrame(threads.back(), rest);
    }
  }
  return threads;
}

std::string StackSignature(const RankStacks& stacks) {
  const auto main = std::find_if(stacks.threads.begin(), stacks.threads.end(),
                                 [](const ThreadStack& thread) { return thread.main; });
  if (main == stacks.threads.end()) return "";
  std::vector<std::string> compared;
  for (auto frame = main->frames.rbegin(); frame != main->frames.rend(); ++frame) {
    if (IsCollective(*frame)) {
      compared.emplace_back(kInCollective);
      break;
    }
    compared.push_back(*frame);
  }
  return absl::StrJoin(compared, "\n");
}

std::vector<StackCluster> ClusterStacks(std::span<const RankStacks> stacks, StackKind kind) {
  std::map<std::string, std::vector<Rank>> by_signature;
  for (const RankStacks& one : stacks) {
    if (one.kind != kind) continue;
    std::string signature = StackSignature(one);
    if (!signature.empty()) by_signature[std::move(signature)].push_back(one.rank);
  }
  std::vector<StackCluster> clusters;
  for (auto& [signature, ranks] : by_signature) {
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
    clusters.push_back({signature, std::move(ranks)});
  }
  std::sort(clusters.begin(), clusters.end(), [](const StackCluster& a, const StackCluster& b) {
    if (a.ranks.size() != b.ranks.size()) return a.ranks.size() > b.ranks.size();
    return a.ranks.front() < b.ranks.front();
  });
  return clusters;
}

std::vector<Testimony> TestifyStacks(std::span<const RankStacks> stacks) {
  std::set<Rank> python, native;
  for (const RankStacks& one : stacks) {
    if (!StackSignature(one).empty()) {
      (one.kind == StackKind::kPython ? python : native).insert(one.rank);
    }
  }
  // An interpreter's native stack is the same whatever it interprets.
  const StackKind kind =
      !python.empty() && python.size() >= native.size() ? StackKind::kPython : StackKind::kNative;
  const std::vector<StackCluster> clusters = ClusterStacks(stacks, kind);
  size_t total = 0;
  for (const StackCluster& cluster : clusters) total += cluster.ranks.size();
  if (clusters.size() < 2 || total < 3 || clusters.front().ranks.size() * 2 <= total) return {};
  std::vector<Testimony> said;
  for (size_t i = 1; i < clusters.size() && said.size() < kTestimoniesMax; ++i) {
    Testimony testimony;
    testimony.source = Source::kStacks;
    testimony.claim = Claim::kOddStack;
    testimony.ranks = clusters[i].ranks;
    if (testimony.ranks.size() > kTestimonyRanksMax) testimony.ranks.resize(kTestimonyRanksMax);
    testimony.certainty =
        clusters.size() == 2 ? 0.7 : 0.4;  // among many odd ones each is hardly special
    testimony.sentence = CutText(absl::StrFormat(
        "%s stands in %s, the %d others in %s", RanksText(testimony.ranks),
        PlaceOf(clusters[i].signature, clusters.front().signature), clusters.front().ranks.size(),
        PlaceOf(clusters.front().signature, clusters[i].signature)));
    said.push_back(std::move(testimony));
  }
  return said;
}

}  // namespace holdfast::monitor
