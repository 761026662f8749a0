// Event streams of NCCL's own host code (fixtures/nccl), turned into what a board would show at an
// instant and given to the analysis: it must name the rank whose kernel stands, and nobody else.
//
// The reader is a second implementation of the board's rules, for tests: of the open steps of a
// connection the oldest counts; an operation has finished when all its visible parts have.
// Snapshots are taken every 250 ms (the agent's own state has 100 ms): the stalls last 4 s, and a
// suspicion needs 3 s of silence in reports that came after the accuser's.
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/json_reader.h"
#include "monitor/analyzer.h"
#include "tests/support/status_matchers.h"

namespace holdfast::monitor {
namespace {

constexpr uint64_t kTickUs = 250'000;

struct Event {
  double us = 0;
  std::string call, type;
  std::map<std::string, int64_t> numbers;
  int64_t Get(const char* name) const {
    const auto found = numbers.find(name);
    return found == numbers.end() ? 0 : found->second;
  }
};

struct OpenStep {
  WaitState state = WaitState::kBetweenSteps;
};

struct Transfer {
  uint64_t collective = 0;
  std::pair<uint32_t, std::pair<uint32_t, Direction>> slot;  // channel, peer, direction
};

struct Slot {
  uint64_t operation = 0;
  bool open = false;
  uint32_t done = 0, total = 0;
  std::map<int64_t, OpenStep> steps;  // by step number
  WaitState shown = WaitState::kNone;
  double since_us = 0;
  uint64_t bytes = 0;
  double wire_us = 0;
};

struct Collective {
  uint32_t open_parts = 0;
  bool started = false;
  bool counted = false;  // as finished
};

WaitState StateOf(int64_t nccl) {
  switch (nccl) {
    case 8:
      return WaitState::kSendGpuWait;
    case 20:
      return WaitState::kSendPeerWait;
    case 9:
      return WaitState::kSendWait;
    case 10:
      return WaitState::kReceiveWait;
    case 11:
      return WaitState::kReceiveFlushWait;
    case 12:
      return WaitState::kReceiveGpuWait;
    default:
      return WaitState::kBetweenSteps;
  }
}

class RankReplay {
 public:
  explicit RankReplay(std::vector<Event> events) : events_(std::move(events)) {}

  double end_us() const { return events_.empty() ? 0 : events_.back().us; }

  void RunTo(double us) {
    for (; next_ < events_.size() && events_[next_].us <= us; ++next_) Take(events_[next_]);
  }

  CommunicatorReport Report(double now_us) const {
    CommunicatorReport report;
    report.id = 1;
    report.size = size_;
    report.index = rank_;
    report.counts[static_cast<size_t>(OperationKind::kAllReduce)] = counts_;
    report.last_kind = OperationKind::kAllReduce;
    report.last_bytes = last_bytes_;
    report.last_sequence = counts_.enqueued;
    for (const auto& [key, slot] : slots_) {
      ConnectionReport c;
      c.channel = static_cast<uint16_t>(key.first);
      c.peer = key.second.first;
      c.direction = key.second.second;
      c.state = slot.shown;
      c.operation = slot.operation;
      c.steps_done = slot.done;
      c.steps_total = slot.total;
      c.waiting_us = static_cast<uint64_t>(now_us - slot.since_us);
      c.bytes = slot.bytes;
      c.wire_wait_us = static_cast<uint64_t>(slot.wire_us);
      report.connections.push_back(c);
    }
    return report;
  }
  bool joined() const { return size_ > 0; }

 private:
  void Take(const Event& event) {
    const int64_t handle = event.Get("handle");
    if (event.call == "init") {
      rank_ = static_cast<uint32_t>(event.Get("rank"));
      size_ = static_cast<uint32_t>(event.Get("nranks"));
    } else if (event.type == "Coll" && event.call == "start") {
      collective_of_[handle] = ++counts_.enqueued;
      last_bytes_ = static_cast<uint64_t>(event.Get("count")) * 4;
    } else if (event.type == "ProxyOp" || event.type == "KernelCh") {
      TakePart(event, handle);
    } else if (event.type == "ProxyStep") {
      TakeStep(event, handle);
    }
  }

  void TakePart(const Event& event, int64_t handle) {
    const bool transfer = event.type == "ProxyOp";
    if (event.call == "start") {
      const uint64_t number = collective_of_[event.Get("parent")];
      Collective& collective = collectives_[number];
      ++collective.open_parts;
      if (!std::exchange(collective.started, true)) ++counts_.started;
      if (std::exchange(collective.counted, false)) --counts_.finished;
      Transfer& t = transfers_[handle];
      t.collective = number;
      if (!transfer) return;
      t.slot = {static_cast<uint32_t>(event.Get("channelId")),
                {static_cast<uint32_t>(event.Get("peer")),
                 event.Get("isSend") == 1 ? Direction::kSend : Direction::kReceive}};
      Slot& slot = slots_[t.slot];
      slot.operation = number;
      slot.open = true;
      slot.done = 0;
      slot.total = static_cast<uint32_t>(event.Get("nSteps"));
      Show(slot, event.us);
    } else if (event.call == "stop") {
      const Transfer& t = transfers_[handle];
      if (transfer) {
        slots_[t.slot].open = false;
        slots_[t.slot].steps.clear();
        Show(slots_[t.slot], event.us);
      }
      Collective& collective = collectives_[t.collective];
      if (--collective.open_parts == 0) {
        ++counts_.finished;
        collective.counted = true;
      }
    }
  }

  void TakeStep(const Event& event, int64_t handle) {
    if (event.call == "start") step_of_[handle] = {event.Get("parent"), event.Get("step")};
    const auto [parent, step] = step_of_[handle];
    Slot& slot = slots_[transfers_[parent].slot];
    if (event.call == "start") {
      slot.steps[step] = {};
    } else if (event.call == "state") {
      slot.steps[step].state = StateOf(event.Get("state"));
      step_bytes_[handle] = event.Get("transSize");
    } else {
      slot.steps.erase(step);
      ++slot.done;
      slot.bytes += static_cast<uint64_t>(step_bytes_[handle]);
    }
    Show(slot, event.us);
  }

  static void Show(Slot& slot, double us) {
    const WaitState state = !slot.open           ? WaitState::kNone
                            : slot.steps.empty() ? WaitState::kBetweenSteps
                                                 : slot.steps.begin()->second.state;
    if (slot.shown == WaitState::kSendWait || slot.shown == WaitState::kReceiveWait) {
      slot.wire_us += us - slot.since_us;
    }
    slot.shown = state;
    slot.since_us = us;
  }

  const std::vector<Event> events_;
  size_t next_ = 0;
  uint32_t rank_ = 0, size_ = 0;
  OperationCounts counts_;
  uint64_t last_bytes_ = 0;
  std::map<int64_t, uint64_t> collective_of_;  // by handle
  std::map<uint64_t, Collective> collectives_;
  std::map<int64_t, Transfer> transfers_;
  std::map<std::pair<uint32_t, std::pair<uint32_t, Direction>>, Slot> slots_;
  std::map<int64_t, std::pair<int64_t, int64_t>> step_of_;
  std::map<int64_t, int64_t> step_bytes_;
};

std::filesystem::path Fixtures() {
  return std::filesystem::path(HOLDFAST_SOURCE_DIR).parent_path() / "shared" / "fixtures" / "nccl";
}

void Load(const std::string& job, std::vector<RankReplay>& ranks) {
  for (uint32_t r = 0;; ++r) {
    std::ifstream file(Fixtures() / job / ("rank-" + std::to_string(r) + ".jsonl"));
    if (!file) break;
    std::vector<Event> events;
    for (std::string line; std::getline(file, line);) {
      ASSERT_OK_AND_ASSIGN(const auto document, JsonDocument::Parse(line));
      const JsonValue root = document->root();
      Event event;
      ASSERT_OK_AND_ASSIGN(event.us, root.Find("us").Double());
      ASSERT_OK_AND_ASSIGN(const std::vector<std::string_view> keys, root.Keys());
      for (const std::string_view key : keys) {
        const JsonValue value = root.Find(key);
        if (key == "call") event.call = *value.String();
        if (key == "type") event.type = *value.String();
        if (const auto number = value.Int64(); number.ok())
          event.numbers[std::string(key)] = *number;
      }
      events.push_back(std::move(event));
    }
    ranks.emplace_back(std::move(events));
  }
}

struct Result {
  std::set<std::string> suspicions, verdicts;  // "gpu-hang 2"
  uint64_t operations = 0;                     // that rank 0 finished
};

// Plays the job until `end_us` (0: as long as all streams last). From `killed_us` on `killed` is
// gone.
void Play(const std::string& job, double end_us, double killed_us, uint32_t killed,
          Result* result) {
  std::vector<RankReplay> ranks;
  ASSERT_NO_FATAL_FAILURE(Load(job, ranks));
  ASSERT_FALSE(ranks.empty());
  if (end_us == 0) {
    end_us = 1e12;
    for (const RankReplay& rank : ranks) end_us = std::min(end_us, rank.end_us());
  }
  JobShape shape;
  for (uint32_t r = 0; r < ranks.size(); ++r) shape.ranks.push_back({.node = r});
  Analyzer analyzer(Thresholds{}, shape);
  for (uint64_t tick = 1; static_cast<double>(tick * kTickUs) <= end_us; ++tick) {
    const auto now_us = static_cast<double>(tick * kTickUs);
    Snapshot snapshot;
    snapshot.elapsed = absl::Microseconds(static_cast<int64_t>(tick * kTickUs));
    for (uint32_t r = 0; r < ranks.size(); ++r) {
      const bool gone = killed_us > 0 && now_us >= killed_us && r == killed;
      ranks[r].RunTo(now_us);
      NodeSummary summary;
      summary.node = r;
      summary.sequence = tick;
      summary.clock_us = tick * kTickUs + r * 1'000'003;
      RankReport report;
      report.rank = Rank{r};
      report.process = gone ? ProcessState::kGone : ProcessState::kUnknown;
      report.exit = gone ? ExitKind::kKilled : ExitKind::kNone;
      report.exit_value = gone ? 9 : 0;
      report.level = TelemetryLevel::kFull;
      if (ranks[r].joined()) report.communicators = {ranks[r].Report(now_us)};
      summary.ranks = {report};
      snapshot.arrived.push_back(summary);
    }
    for (const Finding& finding : analyzer.Step(snapshot).findings) {
      std::string text(Name(finding.fault));
      for (const Suspect& suspect : finding.suspects) {
        text += " " + std::to_string(Value(suspect.rank));
      }
      (finding.grade == Grade::kVerdict ? result->verdicts : result->suspicions).insert(text);
    }
  }
  result->operations =
      ranks[0].Report(end_us).counts[static_cast<size_t>(OperationKind::kAllReduce)].finished;
}

class NcclReplayTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(Fixtures())) GTEST_SKIP() << Fixtures() << " is not there";
  }
};

using Texts = std::set<std::string>;

TEST_F(NcclReplayTest, CleanJobsRaiseNothing) {
  for (const char* job : {"allreduce-2", "allreduce-4"}) {
    Result result;
    ASSERT_NO_FATAL_FAILURE(Play(job, 0, 0, 0, &result)) << job;
    EXPECT_EQ(result.suspicions, Texts{}) << job;
    EXPECT_EQ(result.verdicts, Texts{}) << job;
    EXPECT_GE(result.operations, 2u) << job;
  }
}

TEST_F(NcclReplayTest, TheStalledKernelIsRankTwos) {
  Result result;
  ASSERT_NO_FATAL_FAILURE(Play("stall-4", 0, 0, 0, &result));
  EXPECT_EQ(result.suspicions, Texts{"gpu-hang 2"});
  EXPECT_EQ(result.operations, 3u);
  EXPECT_EQ(result.verdicts, Texts{}) << "there is no baseline yet, and it ends";
}

TEST_F(NcclReplayTest, TheBoardsAloneNameRankOneBeforeItIsKilled) {
  Result result;
  ASSERT_NO_FATAL_FAILURE(Play("killed-4", 6e6, 0, 0, &result));
  EXPECT_EQ(result.suspicions, Texts{"gpu-hang 1"});
  EXPECT_EQ(result.operations, 1u) << "the kernel stands in the second operation";
}

TEST_F(NcclReplayTest, TheKilledRankIsRankOne) {
  Result result;
  ASSERT_NO_FATAL_FAILURE(Play("killed-4", 12e6, 3e6, 1, &result));
  EXPECT_EQ(result.suspicions, Texts{"dead 1"});
  EXPECT_EQ(result.verdicts, Texts{"dead 1"});
}

}  // namespace
}  // namespace holdfast::monitor
