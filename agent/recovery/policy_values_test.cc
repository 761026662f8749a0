// The values around the policy: history, lemon list, settings, interval, layouts, texts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <random>
#include <sstream>

#include "agent/recovery/elastic.h"
#include "agent/recovery/interval.h"
#include "agent/recovery/policy_testing.h"
#include "agent/recovery/text.h"
#include "base/byte_codec.h"
#include "tests/support/status_matchers.h"

namespace holdfast::recovery {
namespace {

using absl::StatusCode;
using testing::AnyOf;
using testing::HasSubstr;
using testing::SizeIs;

std::span<const std::byte> BytesOf(const std::string& text) {
  return std::as_bytes(std::span(text));
}

// ---- History.

std::string FullHistory() {
  Settings settings;
  settings.mode = Mode::kAsk;
  TestJob job(settings);
  LemonList lemons;
  lemons.Mark(GpusOf(4)[0], {job.wall(), "other", "comm hang", false});
  job.Begin(4, 5, lemons, {CheckpointAt(10)});
  job.ComeUp(11);
  job.Commit(20);
  job.Tell(SightChanged{Sight::kPartial});
  job.Tell(Hold{absl::Hours(1), "a reason"});
  job.Tell(FindingOf(job.history(), monitor::FaultClass::kGpuHang,
                     monitor::Syndrome::kCommunicationHang, {2}));
  job.Tell(XidSeen{GpusOf(5)[1], 79});
  job.Dies(3, {monitor::ExitKind::kError, -5});
  return Encode(job.history());
}

// Where a history of version 1 has two numbers that nothing uses any more.
TEST(HistoryCodec, WhatIsNotUsedAnyMoreMayHaveAnyValue) {
  std::string bytes = Encode(History());
  const size_t lemons_bytes = History().lemons.Encode().size();
  ASSERT_LT(lemons_bytes, 128);
  // Behind them: failures, three times, the length of the lemon list and that, the checksum.
  bytes.resize(bytes.size() - 4);
  const size_t at = bytes.size() - lemons_bytes - 1 - 4 - 2;
  EXPECT_EQ(bytes.substr(at, 2), std::string(2, '\0'));
  bytes[at] = 7;
  bytes[at + 1] = 9;
  SealEnvelope({"history", "HFRH", 1, History::kBytesMax}, bytes);
  EXPECT_THAT(DecodeHistory(BytesOf(bytes)), IsOkAndHolds(History()));
}

TEST(HistoryCodec, EveryByteThatIsChangedOrMissingIsNoticed) {
  const std::string bytes = FullHistory();
  ASSERT_OK_AND_ASSIGN(const History history, DecodeHistory(BytesOf(bytes)));
  EXPECT_EQ(Encode(history), bytes);
  for (size_t i = 0; i < bytes.size(); ++i) {
    std::string other = bytes;
    other[i] = static_cast<char>(other[i] ^ 1);
    EXPECT_FALSE(DecodeHistory(BytesOf(other)).ok()) << i;
    EXPECT_FALSE(DecodeHistory(BytesOf(bytes.substr(0, i))).ok()) << i;
  }
  EXPECT_FALSE(DecodeHistory(BytesOf(bytes + "x")).ok());
}

TEST(HistoryCodec, WhatThePolicyTakesForGrantedIsChecked) {
  ASSERT_OK_AND_ASSIGN(const History good, DecodeHistory(BytesOf(FullHistory())));
  History other = good;
  other.ranks.pop_back();
  EXPECT_THAT(DecodeHistory(BytesOf(Encode(other))),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("expected as many as GPUs")));
  other = good;
  std::swap(other.checkpoints[0], other.checkpoints[1]);
  EXPECT_THAT(DecodeHistory(BytesOf(Encode(other))),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("ascending")));
}

// ---- Lemons.

TEST(Lemons, TheFileIsWhatWasWrittenAndNothingElse) {
  LemonList list;
  const absl::Time at = absl::FromUnixSeconds(1'764'150'000);
  list.Mark({"n1", 3, "GPU-a"}, {at, "llama", "comm hang in \"dp\"\n", false});
  list.Exclude({"n1", 3, "GPU-a"}, {at, at + absl::Hours(1), "Xid 79"});
  list.Mark({"n2", 0, ""}, {at, "llama", std::string(1000, 'x'), true});
  const std::string bytes = list.Encode();
  EXPECT_THAT(LemonList::Decode(bytes, "F"), IsOkAndHolds(list));
  for (size_t i = 0; i < bytes.size(); ++i) {
    std::string other = bytes;
    other[i] = static_cast<char>(other[i] ^ 4);
    EXPECT_THAT(LemonList::Decode(other, "F"), StatusIs(StatusCode::kDataLoss)) << i;
  }
  EXPECT_THAT(LemonList::Decode(LemonList().Encode(), "F"), IsOkAndHolds(LemonList()));
}

TEST(Lemons, AGpuIsKnownByItsUuidWhereThereIsOne) {
  EXPECT_TRUE(IsSame({"n1", 3, "A"}, {"n2", 4, "A"}));
  EXPECT_FALSE(IsSame({"n1", 3, "A"}, {"n1", 3, "B"}));
  EXPECT_TRUE(IsSame({"n1", 3, ""}, {"n1", 3, "B"}));
  EXPECT_FALSE(IsSame({"n1", 3, ""}, {"n1", 4, ""}));
  EXPECT_FALSE(IsSame({"n1", 3, ""}, {"n2", 3, ""}));
}

TEST(Lemons, MarksAreCountedOnceAndForgotten) {
  LemonList list;
  const Gpu gpu{"n1", 3, ""};
  const absl::Time at = absl::FromUnixSeconds(1'764'150'000);
  list.Mark(gpu, {at, "j", "hang", false});
  list.Mark(gpu, {at, "j", "hang", false});
  EXPECT_EQ(list.MarksSince(gpu, at), 1);
  list.Mark(gpu, {at + absl::Hours(1), "j", "hang", false});
  EXPECT_EQ(list.MarksSince(gpu, at + absl::Seconds(1)), 1);
  list.Exclude(gpu, {at, at + absl::Hours(2), "r"});
  EXPECT_NE(list.ExclusionOf(gpu, at + absl::Hours(2) - absl::Seconds(1)), nullptr);
  EXPECT_EQ(list.ExclusionOf(gpu, at + absl::Hours(2)), nullptr);
  list.Forget(at + absl::Hours(2), absl::Hours(1));
  ASSERT_THAT(list.lemons(), SizeIs(1));
  EXPECT_THAT(list.lemons()[0].marks, SizeIs(1));
  list.Forget(at + absl::Hours(3), absl::Hours(1));
  EXPECT_THAT(list.lemons(), SizeIs(0));
}

TEST(Lemons, TheListHasALimitAndForgetsTheOldest) {
  LemonList list;
  for (uint32_t i = 0; i < LemonList::kLemonsMax + 5; ++i) {
    list.Mark({"n1", i, ""}, {absl::FromUnixSeconds(1000 + i), "j", "r", false});
  }
  EXPECT_THAT(list.lemons(), SizeIs(LemonList::kLemonsMax));
  EXPECT_EQ(list.Find({"n1", 4, ""}), nullptr);
  EXPECT_NE(list.Find({"n1", 5, ""}), nullptr);
  EXPECT_THAT(LemonList::Decode(list.Encode(), "F"), IsOkAndHolds(list));
}

// ---- Settings.

TEST(RecoverySettings, TheTableOfTheDocumentIsThatOfTheCode) {
  std::ifstream file(HOLDFAST_SOURCE_DIR "/docs/CONFIGURATION.md");
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_THAT(text.str(), HasSubstr(SettingsTable()));
}

TEST(RecoverySettings, EveryKeyIsReadAndItsDefaultIsTheDefault) {
  const Settings defaults;
  std::string all = "[recovery]\n";
  for (const SettingsKey& key : SettingsKeys()) {
    const std::string name = key.name;
    if (name.substr(0, 9) != "recovery.") continue;
    const bool list = *key.default_text == '[';
    absl::StrAppend(&all, name.substr(9), " = ", list ? "" : "\"", key.default_text,
                    list ? "" : "\"", "\n");
  }
  ASSERT_OK_AND_ASSIGN(const Settings parsed, ParseSettings(all, "F"));
  EXPECT_EQ(parsed.mode, defaults.mode);
  EXPECT_EQ(parsed.max_restarts, defaults.max_restarts);
  EXPECT_EQ(parsed.restarts_in_window, defaults.restarts_in_window);
  EXPECT_EQ(parsed.restart_window, defaults.restart_window);
  EXPECT_EQ(parsed.pause_first, defaults.pause_first);
  EXPECT_EQ(parsed.pause_max, defaults.pause_max);
  EXPECT_EQ(parsed.healthy_after, defaults.healthy_after);
  EXPECT_EQ(parsed.hang_timeout, defaults.hang_timeout);
  EXPECT_EQ(parsed.start_wait, defaults.start_wait);
  EXPECT_EQ(parsed.evidence_wait, defaults.evidence_wait);
  EXPECT_EQ(parsed.save_wait, defaults.save_wait);
  EXPECT_EQ(parsed.stop_wait, defaults.stop_wait);
  EXPECT_EQ(parsed.kill_wait, defaults.kill_wait);
  EXPECT_EQ(parsed.approval_wait, defaults.approval_wait);
  EXPECT_EQ(parsed.capacity_wait, defaults.capacity_wait);
  EXPECT_EQ(parsed.lemons, defaults.lemons);
  EXPECT_EQ(parsed.hangs_to_exclude, defaults.hangs_to_exclude);
  EXPECT_EQ(parsed.lemon_memory, defaults.lemon_memory);
  EXPECT_EQ(parsed.exclude_for, defaults.exclude_for);
  EXPECT_EQ(parsed.exclusions_max, defaults.exclusions_max);
  EXPECT_EQ(parsed.checkpoint_tries, defaults.checkpoint_tries);
  EXPECT_EQ(parsed.no_restart_codes, defaults.no_restart_codes);
  EXPECT_EQ(parsed.slow, defaults.slow);
  EXPECT_EQ(parsed.slow_horizon, defaults.slow_horizon);
  EXPECT_EQ(parsed.failure_prior, defaults.failure_prior);
}

TEST(RecoverySettings, ValuesReachTheSettings) {
  ASSERT_OK_AND_ASSIGN(const Settings s, ParseSettings(R"(
every = 500
[recovery]
mode = "ask"
max_restarts = 9
stop_wait = "1m30s"
lemons = "ask"
slow = "replace-at-checkpoint"
no_restart_codes = [3]
[elastic]
layouts = { 3 = "dp=3", 2 = "dp=2,tp=1" }
rank_bytes_max = "80GiB"
)",
                                                       "F"));
  EXPECT_EQ(s.mode, Mode::kAsk);
  EXPECT_EQ(s.max_restarts, 9);
  EXPECT_EQ(s.stop_wait, absl::Seconds(90));
  EXPECT_EQ(s.lemons, LemonPolicy::kAsk);
  EXPECT_EQ(s.slow, SlowPolicy::kReplaceAtCheckpoint);
  EXPECT_EQ(s.no_restart_codes, std::vector<int32_t>{3});
  ASSERT_THAT(s.layouts, SizeIs(2));
  EXPECT_EQ(s.layouts[0].world_size, 2);
  EXPECT_EQ(s.layouts[0].layout, "dp=2,tp=1");
  EXPECT_EQ(s.layouts[1].layout, "dp=3");
  EXPECT_EQ(s.rank_bytes_max, uint64_t{80} << 30);
}

TEST(RecoverySettings, WhatIsWrongIsNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {"[recovery]\nmodes = \"act\"", "F line 2: unknown key \"recovery.modes\"; did you mean"},
      {"[recovery]\nmode = \"maybe\"", "recovery.mode: expected one of observe, ask, act"},
      {"[recovery]\nstop_wait = \"-1s\"", "recovery.stop_wait: "},
      {"[recovery]\nstop_wait = 1.5", "expected a string or a whole number"},
      {"[recovery]\nno_restart_codes = [0]", "from 1 to 255"},
      {"[recovery]\nno_restart_codes = 2", "expected a list"},
      {"[elastic]\nlayouts = { 0 = \"dp=3\" }", "elastic.layouts: "},
      {"[elastic]\nlayouts = { 3 = 3 }", "expected a layout as a string"},
      {"[elastic]\nlayouts = { 3 = \"a\", 03 = \"b\" }", "elastic.layouts: "},
      {"recovery = 3", "recovery: expected a table"},
      {"[recovery", "F line 1: "},
  };
  for (const auto& [text, error] : cases) {
    EXPECT_THAT(ParseSettings(text, "F"), StatusIs(StatusCode::kInvalidArgument, HasSubstr(error)))
        << text;
  }
}

// ---- Interval.

// The share of time lost with saves every t seconds: Daly's own model, summed by brute force.
double LostShare(double t, double d, double m) {
  // Expected time to get a segment of t and its save of d done, with failures at the rate 1/m and
  // no cost of restarting: m (e^((t + d) / m) - 1).
  return m * std::expm1((t + d) / m) / t - 1;
}

TEST(Interval, ItIsWithinAFewPercentOfTheBestThatASearchFinds) {
  for (const double d : {0.01, 0.4, 5.0, 36.0, 300.0}) {
    for (const double m : {600.0, 7.9 * 3600, 100.0 * 3600}) {
      IntervalInput input;
      input.stall = absl::Seconds(d);
      input.failure_prior = absl::Seconds(m);
      const IntervalChoice choice = ChooseInterval(input);
      double best = 1e9;
      for (double t = 1; t < 3 * m; t *= 1.01) best = std::min(best, LostShare(t, d, m));
      const double chosen = LostShare(absl::ToDoubleSeconds(choice.interval), d, m);
      EXPECT_LT(chosen, best * 1.02 + 1e-6) << d << " " << m;
    }
  }
}

TEST(Interval, TheReferencesExampleComesOut) {
  IntervalInput input;
  input.stall = absl::Seconds(36);
  input.failures = 1;
  input.time_alive = absl::Hours(7.9);
  input.failure_prior = absl::Hours(7.9);
  input.restart = absl::Minutes(18);
  input.step = absl::Seconds(2);
  const IntervalChoice choice = ChooseInterval(input);
  EXPECT_EQ(choice.between_failures, absl::Hours(7.9));
  // sqrt(2 d M) is 23.9 minutes; Daly's form is a little less.
  EXPECT_NEAR(absl::ToDoubleMinutes(choice.interval), 23.5, 0.3);
  EXPECT_NEAR(choice.overhead, 0.088, 0.002);
  EXPECT_EQ(choice.steps, std::llround(absl::ToDoubleSeconds(choice.interval) / 2));
  EXPECT_EQ(choice.sentence,
            "every = auto: a save every " + CountText(choice.steps) + " steps (" +
                DurationText(choice.interval) +
                "): a save takes 36 s from training, and a failure is expected every 7h54m (1 in "
                "7h54m, and one in 7h54m assumed); together they take 8.8% of the time.");
}

TEST(Interval, NothingMeasuredAndSlowStorageGiveASaneInterval) {
  IntervalInput input;
  const IntervalChoice nothing = ChooseInterval(input);
  EXPECT_GE(nothing.interval, absl::Seconds(1));
  EXPECT_THAT(nothing.sentence, HasSubstr("is assumed to take"));
  input.stall = absl::ZeroDuration();
  input.failure_prior = absl::Hours(24);
  input.step = absl::Seconds(10);
  input.commit = absl::Minutes(5);
  EXPECT_EQ(ChooseInterval(input).steps, 30);
  EXPECT_THAT(ChooseInterval(input).sentence, HasSubstr("as fast as the storage commits"));
  input.step = absl::Hours(100);
  EXPECT_EQ(ChooseInterval(input).steps, 1);
}

TEST(Interval, FailuresMakeItShorter) {
  Settings settings;
  TestJob job(settings);
  job.Begin();
  job.ComeUp(1);
  job.Train(10, absl::Hours(1));
  job.Commit(10);
  const auto interval = [&] {
    IntervalInput input =
        IntervalInputOf(settings, job.history(), job.now(), absl::Seconds(1), absl::ZeroDuration());
    input.stall = absl::Milliseconds(400);
    return ChooseInterval(input);
  };
  const IntervalChoice before = interval();
  EXPECT_THAT(before.sentence, HasSubstr("a save takes 0.40 s from training"));
  EXPECT_THAT(before.sentence, HasSubstr("(0 in 1h00m"));
  job.Dies(0);
  job.Recover(11);
  EXPECT_LT(interval().interval, before.interval);
}

// ---- Layouts.

constexpr char kDocument[] = R"({"holdfast_layout": 1, "mesh": [{"axis": "dp", "size": 4}],
  "tensors": [{"name": "w", "shape": [12, 8], "states": [{"state": "param", "dtype": "float32",
               "place": [{"op": "shard", "dim": 0, "axis": "dp", "rule": "even"}]}]}]})";

TEST(Elastic, BytesPerRankComeFromThePlanner) {
  Settings settings;
  settings.layouts = {{2, "dp=2", {}}, {3, "dp=3", {}}};
  ASSERT_THAT(MeasureLayouts(kDocument, settings), IsOk());
  EXPECT_EQ(settings.layouts[0].bytes_per_rank, 6 * 8 * 4);
  EXPECT_EQ(settings.layouts[1].bytes_per_rank, 4 * 8 * 4);
  settings.rank_bytes_max = 150;
  EXPECT_THAT(MeasureLayouts(kDocument, settings),
              StatusIs(StatusCode::kResourceExhausted, HasSubstr("2 = \"dp=2\"")));
  settings.layouts = {{3, "dp=2", {}}};
  EXPECT_THAT(MeasureLayouts(kDocument, settings),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("expected a layout of 3 ranks")));
  settings.layouts = {{3, "tp=3", {}}};
  EXPECT_THAT(MeasureLayouts(kDocument, settings),
              StatusIs(StatusCode::kInvalidArgument, HasSubstr("elastic.layouts: 3 = \"tp=3\"")));
}

// ---- Sources and texts.

TEST(Sources, EachWitnessCountsOnce) {
  monitor::Finding finding;
  EXPECT_EQ(IndependentSources(finding), 0);
  finding.evidence = {"3 ranks wait for it"};
  EXPECT_EQ(IndependentSources(finding), 1);
  finding.evidence.push_back("stacks: rank 2 stands at another place");
  finding.evidence.push_back("stacks: rank 2 stands at yet another place");
  EXPECT_EQ(IndependentSources(finding), 2);
  finding.evidence.push_back("against it, ras: rank 2 answers");
  EXPECT_EQ(IndependentSources(finding), 2);
  finding.evidence.push_back("ras: rank 2 is missing");
  EXPECT_EQ(IndependentSources(finding), 3);
}

TEST(Texts, DurationsAndCountsReadAsPeopleSayThem) {
  EXPECT_EQ(DurationText(absl::Milliseconds(430)), "0.43 s");
  EXPECT_EQ(DurationText(absl::Seconds(38)), "38 s");
  EXPECT_EQ(DurationText(absl::Seconds(130)), "2m10s");
  EXPECT_EQ(DurationText(absl::Minutes(185)), "3h05m");
  EXPECT_EQ(DurationText(absl::Hours(99)), "4d03h");
  EXPECT_EQ(DurationText(-absl::Hours(99)), "0.00 s");
  EXPECT_EQ(CountText(0), "0");
  EXPECT_EQ(CountText(999), "999");
  EXPECT_EQ(CountText(1000), "1,000");
  EXPECT_EQ(CountText(41'200'000), "41,200,000");
  EXPECT_EQ(CutText("a\x1b[31m\xff\xc3\xa9", 100), "a?[31m?\xc3\xa9");
  EXPECT_EQ(CutText("ab\xc3\xa9", 3), "ab");
}

// ---- Hostile events.

TEST(PolicyHostile, AnyTextTimeAndNumberIsTaken) {
  TestJob job;
  job.Tell(RunBegun{std::string(5000, '\xff'), 0, std::string(100000, 'x'), GpusOf(1), {}, {}});
  EXPECT_EQ(job.state(), State::kStarting);
  FindingTold told;
  told.launch = Launch{1};
  told.finding.id = std::string(1000, '\n');
  told.finding.sentence = std::string(100000, '\x01');
  told.finding.confidence = std::nan("");
  told.finding.suspects.assign(1000, {Rank{UINT32_MAX}, Rank{UINT32_MAX}});
  told.finding.grade = monitor::Grade::kVerdict;
  told.standing = absl::InfiniteDuration();
  told.timeout = -absl::InfiniteDuration();
  told.slow_permille = UINT32_MAX;
  job.Tell(told);
  job.Tell(RankTimedOut{Launch{1}, Rank{0}, "", absl::InfiniteDuration(), absl::ZeroDuration()});
  job.Tell(CheckpointCommitted{Launch{1}, CheckpointAt(1), -absl::InfiniteDuration()});
  job.Tell(Hold{absl::InfiniteDuration(), std::string(100000, '"')});
  job.After(absl::Hours(24 * 365 * 1000));
  job.Tell(Tick{});
  for (uint32_t i = 0; i < 300; ++i) {
    told.finding.id = absl::StrCat(i);
    job.Tell(told);
    job.Tell(CheckpointCommitted{Launch{1}, CheckpointAt(i + 2), job.now()});
    job.Tell(Approve{std::string(100000, 'x')});
    job.Tell(XidSeen{GpusOf(1)[0], static_cast<int32_t>(i)});
  }
  EXPECT_LE(job.history().findings.size(), History::kFindingsMax);
  EXPECT_LE(job.history().checkpoints.size(), History::kCheckpointsMax);
}

}  // namespace
}  // namespace holdfast::recovery
