// First screens of incidents: recorded ones (tests/faults/recordings, real jobs with real faults;
// tests/data/incidents, a false alarm) through the analysis and the policy, one of them also as if
// the monitor were off; and states that were made for it. The texts are in screens/;
// HOLDFAST_WRITE_SCREENS=1 writes them anew, for a person to read.
//
// Model of the supervisor: it tells what the recording shows (exits of processes, operations
// finished as steps) and what the analysis finds; a checkpoint is committed after five seconds.
#include "agent/recovery/screen.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <span>
#include <sstream>

#include "absl/strings/str_join.h"
#include "agent/recovery/incident.h"
#include "agent/recovery/policy_testing.h"
#include "monitor/finding_log.h"
#include "monitor/job_analysis.h"
#include "monitor/recording.h"
#include "monitor/summary.h"
#include "tests/support/status_matchers.h"

namespace holdfast::recovery {
namespace {

using testing::HasSubstr;

const char kScreens[] = HOLDFAST_SOURCE_DIR "/agent/recovery/screens/";
const char kFaults[] = HOLDFAST_SOURCE_DIR "/tests/faults/recordings/";
const char kIncidents[] = HOLDFAST_SOURCE_DIR "/tests/data/incidents/";

std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<Gpu> SlotsOf(uint32_t count) {
  std::vector<Gpu> gpus;
  for (uint32_t i = 0; i < count; ++i) gpus.push_back({"n1", i, ""});
  return gpus;
}

// With closed eyes the monitor is off: only exits and steps are told, and ranks that make none.
enum class Eyes { kOpen, kClosed };
constexpr absl::Duration kStepTimeout = absl::Seconds(10);

// A recording, second by second, until something is done or asked about an incident, or to its end.
class Replayed {
 public:
  explicit Replayed(const std::string& name, Eyes eyes = Eyes::kOpen,
                    const std::string& directory = kFaults)
      : eyes_(eyes),
        analysis_(monitor::Thresholds{}, "llama"),
        bytes_(ReadText(absl::StrCat(directory, name, ".hfmr"))) {
    auto reader = monitor::RecordingReader::Create(bytes_);
    CHECK_OK(reader.status());
    while (history_.state == State::kIdle || history_.state == State::kStarting ||
           history_.state == State::kRunning || history_.state == State::kSuspected) {
      auto recorded = (*reader)->Next();
      CHECK_OK(recorded.status());
      if (!recorded->has_value()) break;
      if (auto* const step = std::get_if<monitor::RecordedStep>(&**recorded)) {
        Take(std::move(step->step));
      }
      if (history_.state == State::kSuspected && suspected_.empty()) suspected_ = Shown();
    }
  }

  const History& history() const { return history_; }
  std::vector<std::string> Shown() const { return Screen(settings_, history_, now_); }
  // When it was suspected first; empty: never.
  const std::vector<std::string>& suspected() const { return suspected_; }

 private:
  template <typename What>
  void Tell(What what) {
    Decide(settings_, Event{now_, absl::FromUnixSeconds(1'764'150'000) + now_, std::move(what)},
           history_);
  }

  void Take(monitor::JobStep step) {
    now_ = absl::Seconds(1000) + step.elapsed;
    const std::vector<monitor::NodeReport> reports = step.reports;
    const monitor::FindingLog::When when{step.elapsed, std::nullopt};
    const monitor::JobAnalysis::Result result = analysis_.Step(std::move(step));
    if (history_.state == State::kIdle && !reports.empty()) {
      const uint32_t ranks = reports.front().world_size;
      Tell(RunBegun{"llama", ranks, "", SlotsOf(ranks), {}, {}});
      Tell(SightChanged{eyes_ == Eyes::kOpen ? Sight::kWhole : Sight::kBlind});
      begun_ = now_;
    }
    for (const monitor::NodeReport& report : reports) {
      auto summary = monitor::DecodeSummary(std::as_bytes(std::span(report.summary)));
      CHECK_OK(summary.status());
      for (const monitor::RankReport& rank : summary->ranks) Take(rank);
    }
    if (!committed_ && history_.running_since.has_value() && now_ > begun_ + absl::Seconds(5)) {
      committed_ = true;
      Tell(CheckpointCommitted{Launch{1}, CheckpointAt(step_), now_});
    }
    if (eyes_ == Eyes::kClosed) return TellLateRanks();
    for (const auto& told : log_.Take(analysis_, result, when)) {
      if (told.record->state != monitor::FindingState::kOpen) {
        Tell(FindingWithdrawn{told.record->finding.id});
        continue;
      }
      FindingTold finding{Launch{1}, told.record->finding, "dp", {}, std::nullopt, 0};
      finding.standing = when.elapsed - told.record->finding.since;
      Tell(finding);
    }
    Tell(Tick{});
  }

  void TellLateRanks() {
    for (const auto& [rank, at] : progressed_at_) {
      const absl::Duration silent = now_ - at;
      if (silent > kStepTimeout) {
        Tell(RankTimedOut{Launch{1}, rank, "step", silent, kStepTimeout});
      }
    }
    Tell(Tick{});
  }

  void Take(const monitor::RankReport& report) {
    if (report.communicators.empty()) return;
    Tell(RankStarted{Launch{1}, report.rank});
    Tell(RankOpened{Launch{1}, report.rank, Attempt{3}});
    const uint64_t finished = monitor::Total(report.communicators.front()).finished;
    uint64_t& last = finished_[report.rank];
    if (finished > last) {
      last = finished;
      progressed_at_[report.rank] = now_;
      step_ = std::max(step_, finished);
      Tell(StepDone{Launch{1}, report.rank, Step{finished}});
    }
    if (report.exit != monitor::ExitKind::kNone && exited_.insert(report.rank).second) {
      Tell(RankExited{Launch{1}, report.rank, {report.exit, report.exit_value}});
    }
  }

  const Settings settings_ = {};
  const Eyes eyes_;
  std::vector<std::string> suspected_;
  monitor::JobAnalysis analysis_;
  monitor::FindingLog log_;
  const std::string bytes_;
  History history_;
  absl::Duration now_;
  absl::Duration begun_;
  bool committed_ = false;
  uint64_t step_ = 0;
  std::map<Rank, uint64_t> finished_;
  std::map<Rank, absl::Duration> progressed_at_;
  std::set<Rank> exited_;
};

struct Read {
  std::string state, suspect, action, human;
};

// What a person in a hurry finds, in the first five lines.
Read ReadScreen(const std::vector<std::string>& lines) {
  Read read;
  const std::string first = lines.at(0);
  std::smatch match;
  if (std::regex_search(first, match, std::regex("^([A-Z]+( [A-Z]+)*)( |\\.)")))
    read.state = match[1];
  if (std::regex_search(first, match, std::regex("Suspect (ranks? [0-9]+)|(Nobody is named)"))) {
    read.suspect = match[1].matched ? match[1] : match[2];
  }
  const std::regex action(
      "\\. (Restarting [a-z0-9A-Z ,-]*|Nothing is done[^.]*|Waiting for [^.]*|Step "
      "[0-9,]+[^.]*|Held[^.]*)");
  if (std::regex_search(first, match, action)) read.action = match[1];
  if (std::regex_search(first, match, std::regex("You: (nothing|holdfast [a-z0-9 -]+)\\.$"))) {
    read.human = match[1];
  }
  return read;
}

// Returns the text, too.
std::string ExpectText(const std::string& name, const std::vector<std::string>& lines) {
  const std::string path = absl::StrCat(kScreens, name, ".txt");
  const std::string text = absl::StrJoin(lines, "\n") + "\n";
  if (std::getenv("HOLDFAST_WRITE_SCREENS") != nullptr) std::ofstream(path) << text;
  EXPECT_EQ(ReadText(path), text);
  EXPECT_LE(lines.size(), 8);
  return text;
}

// Of a job that is not well.
void ExpectScreen(const std::string& name, const std::vector<std::string>& lines) {
  const std::string text = ExpectText(name, lines);
  ASSERT_FALSE(lines.empty());
  const Read read = ReadScreen(lines);
  EXPECT_NE(read.state, "") << text;
  EXPECT_NE(read.suspect, "") << text;
  EXPECT_NE(read.action, "") << text;
  EXPECT_NE(read.human, "") << text;
}

TEST(Screens, RecordedIncidents) {
  struct Case {
    const char* recording;
    const char* state;
    const char* suspect;
    const char* action;
  };
  for (const Case& c :
       {Case{"stopped", "COLLECTING EVIDENCE", "rank 0", "Restarting in place"},
        Case{"killed-others-fail", "COLLECTING EVIDENCE", "rank 6", "Restarting in place"},
        Case{"wrong-size", "COLLECTING EVIDENCE", "rank 7", "Restarting in place"},
        Case{"endless-loop", "COLLECTING EVIDENCE", "rank 1", "Restarting in place"}}) {
    SCOPED_TRACE(c.recording);
    const Replayed replayed(c.recording);
    ExpectScreen(c.recording, replayed.Shown());
    const Read read = ReadScreen(replayed.Shown());
    EXPECT_EQ(read.state, c.state);
    EXPECT_EQ(read.suspect, c.suspect);
    EXPECT_THAT(read.action, HasSubstr(c.action));
    EXPECT_EQ(read.human, "nothing");
  }
}

// The same as "stopped" above, of a job whose monitor is off.
TEST(Screens, ARecordedHangThatNobodySees) {
  const Replayed replayed("stopped", Eyes::kClosed);
  ExpectScreen("stopped-blind", replayed.Shown());
  const Read read = ReadScreen(replayed.Shown());
  EXPECT_EQ(read.state, "COLLECTING EVIDENCE");
  EXPECT_EQ(read.suspect, "Nobody is named");
  EXPECT_THAT(read.action, HasSubstr("Restarting in place"));
  EXPECT_THAT(absl::StrJoin(replayed.Shown(), "\n"), HasSubstr("The monitor is blind"));
}

// Rank 3 pauses for 7 s, which nobody has told: an alarm, and nothing is wrong.
TEST(Screens, ARecordedFalseAlarmIsShownAndPasses) {
  const Replayed replayed("pauses-untold", Eyes::kOpen, kIncidents);
  ExpectScreen("false-alarm-before", replayed.suspected());
  const Read read = ReadScreen(replayed.suspected());
  EXPECT_EQ(read.state, "SUSPECTED");
  EXPECT_EQ(read.suspect, "rank 3");
  EXPECT_THAT(read.action, HasSubstr("nothing is stopped on a suspicion"));
  EXPECT_EQ(read.human, "nothing");
  // In the end it is as if nothing had been.
  ExpectText("false-alarm", replayed.Shown());
  EXPECT_EQ(ReadScreen(replayed.Shown()).state, "RUNNING");
  EXPECT_EQ(replayed.history().incident_count, 0);
  EXPECT_EQ(replayed.history().restart_count, 0);
}

TEST(Screens, ARecordedJobThatIsWellIsNeverTouched) {
  for (const char* const name : {"agent-starved", "evaluates"}) {
    const Replayed replayed(name);
    EXPECT_EQ(replayed.history().incident_count, 0) << name;
    EXPECT_EQ(ReadScreen(replayed.Shown()).human, "nothing");
  }
}

TEST(Screens, RecordedSlownessIsReported) {
  for (const char* const name : {"computes-x-1.5", "loads-slowly", "sender-slow-two-rings"}) {
    const Replayed replayed(name);
    EXPECT_EQ(replayed.history().incident_count, 0) << name;
    EXPECT_EQ(replayed.history().findings.empty(), false) << name;
  }
}

// A hang that was seen, and passes before anything was stopped.
TEST(Screens, AHangThatPasses) {
  TestJob job;
  job.Begin(4, 4);
  job.ComeUp(1);
  job.Commit(1);
  job.Train(41'900, absl::Minutes(10));
  job.Tell(SightChanged{Sight::kWhole});
  FindingTold told = FindingOf(job.history(), monitor::FaultClass::kLink,
                               monitor::Syndrome::kCommunicationHang, {2});
  told.finding.evidence.resize(1);
  told.timeout = absl::Seconds(90);
  job.Tell(told);
  job.Evidence();
  ExpectScreen("hang-that-passes-before", Screen(job.settings(), job.history(), job.now()));
  job.After(absl::Seconds(20));
  job.Tell(FindingWithdrawn{told.finding.id});
  job.Tell(StepDone{Launch{1}, Rank{2}, Step{41'901}});
  const auto lines = Screen(job.settings(), job.history(), job.now());
  ExpectText("hang-that-passes", lines);
  EXPECT_EQ(ReadScreen(lines).state, "RUNNING");
  EXPECT_THAT(lines.back(), HasSubstr("withdrawn"));
}

TEST(Screens, ABlindJob) {
  Settings settings;
  settings.mode = Mode::kAsk;
  TestJob job(settings);
  job.Begin(8, 8);
  job.ComeUp(1);
  job.Train(41'900, absl::Minutes(10));
  job.Commit(41'900);
  job.Train(41'990, absl::Minutes(2));
  job.Tell(SightChanged{Sight::kBlind});
  for (uint32_t r = 0; r < 8; ++r) {
    job.Tell(RankTimedOut{Launch{1}, Rank{r}, "step", absl::Minutes(4), absl::Minutes(4)});
  }
  job.Evidence();
  job.After(absl::Seconds(12));
  const auto lines = Screen(job.settings(), job.history(), job.now());
  ExpectScreen("blind", lines);
  EXPECT_EQ(ReadScreen(lines).suspect, "Nobody is named");
  EXPECT_EQ(ReadScreen(lines).human, "holdfast approve p1 --job llama");
}

// Goal: in whatever state, the last field is `nothing` or one command that there is.
TEST(Screens, TheHumanStepIsNothingOrOneCommandInEveryState) {
  std::set<State> states;
  // Before a run has begun the job has no name.
  const std::regex step(
      "nothing|holdfast (approve p[0-9]+|readmit [0-9]+|hold 0|stop|why) --job llama");
  const auto look = [&](TestJob& job) {
    states.insert(job.state());
    EXPECT_TRUE(std::regex_match(HumanStep(job.settings(), job.history()), step))
        << HumanStep(job.settings(), job.history());
    const std::string first = FirstLine(job.settings(), job.history(), job.now());
    EXPECT_TRUE(std::regex_search(first, std::regex("You: (nothing|holdfast [a-z0-9 -]+)\\.$")))
        << first;
    EXPECT_EQ(first.find('\n'), std::string::npos);
    EXPECT_GE(Screen(job.settings(), job.history(), job.now()).size(), 3);
  };
  for (const Mode mode : {Mode::kAct, Mode::kAsk, Mode::kObserve}) {
    for (const bool hold : {false, true}) {
      for (const bool xid : {false, true}) {
        Settings settings;
        settings.mode = mode;
        settings.max_restarts = 1;
        TestJob job(settings);
        look(job);
        job.Begin();
        look(job);
        job.ComeUp(1);
        look(job);
        FindingTold told =
            FindingOf(job.history(), monitor::FaultClass::kLink,
                      monitor::Syndrome::kCommunicationHang, {2}, monitor::Grade::kSuspicion);
        told.finding.evidence.resize(1);
        job.Tell(told);
        look(job);
        told.finding.grade = monitor::Grade::kVerdict;
        job.Tell(told);
        look(job);
        if (hold) job.Tell(Hold{absl::Hours(1), "x"});
        if (xid) job.Tell(XidSeen{GpusOf(4)[1], 79});
        for (int i = 0; i < 3; ++i) {
          job.Dies(2);
          look(job);
          job.Evidence();
          look(job);
          if (job.history().proposal.has_value()) job.Tell(Approve{job.history().proposal->id});
          look(job);
          job.AllDie();
          look(job);
          job.Wait(absl::Minutes(2));
          look(job);
          job.ComeUp(2);
          look(job);
        }
        job.Tell(SignalCame{EndSignal::kTerminate});
        look(job);
        job.AllDie({monitor::ExitKind::kClean, 0});
        look(job);
      }
    }
  }
  TestJob job;
  job.Begin();
  job.ComeUp(1);
  for (int i = 0; i < 2; ++i) {
    job.Dies(2);
    job.Evidence();
    job.AllDie();
    look(job);  // the second time there is a pause
    job.Wait(absl::Minutes(1));
    job.ComeUp(2);
  }
  job.Tell(SignalCame{EndSignal::kTerminate});
  look(job);
  job.AllDie({monitor::ExitKind::kClean, 0});
  look(job);
  for (size_t state = 0; state < kStates; ++state) {
    EXPECT_TRUE(states.contains(static_cast<State>(state)))
        << std::string(Name(static_cast<State>(state))) << " was not looked at";
  }
}

// ---- Jobs of other launchers.

TEST(WatchedScreens, SayThatNothingIsDoneAndWhatAPersonMayLookAt) {
  WatchedJob job;
  job.job = "llama";
  job.newest = CheckpointId{Attempt{2}, Step{41'200}};
  const absl::Duration now = absl::Seconds(1000);
  EXPECT_EQ(absl::StrJoin(Screen(job, now), "\n"),
            "NOT RUNNING. No rank is open. You: nothing.\n"
            "Attempt -, 0 of 0 ranks open here; newest checkpoint: step 41,200.");
  job.attempt = Attempt{3};
  job.world_size = 4;
  job.open_ranks = 4;
  job.step = 41'990;
  EXPECT_EQ(absl::StrJoin(Screen(job, now), "\n"),
            "RUNNING. Step 41,990. Its own launcher restarts it. You: nothing.\n"
            "Attempt 3, 4 of 4 ranks open here; newest checkpoint: step 41,200.\n"
            "The monitor is blind: no rank has telemetry (holdfast doctor).");
  job.watched_ranks = 4;
  job.finding = FindingOf(History(), monitor::FaultClass::kGpuHang,
                          monitor::Syndrome::kCommunicationHang, {2})
                    .finding;
  job.finding->since = now - absl::Seconds(252);
  EXPECT_EQ(absl::StrJoin(Screen(job, now), "\n"),
            "SUSPECTED 4m12s. Suspect rank 2, communication-hang (gpu-hang), confidence 0.93. Step "
            "41,990. Its own launcher restarts it. You: holdfast monitor explain 1f3a5c7d.\n"
            "Why: Rank 2 does nothing, and 3 ranks wait for it.\n"
            "Attempt 3, 4 of 4 ranks open here; newest checkpoint: step 41,200.\n"
            "The monitor sees 4 ranks.");
  job.finding->grade = monitor::Grade::kSuspicion;
  EXPECT_EQ(HumanStep(job), "nothing");
}

TEST(WatchedScreens, SayWhatTheSidecarDoes) {
  WatchedJob job;
  job.job = "llama";
  job.attempt = Attempt{3};
  job.world_size = job.open_ranks = job.watched_ranks = 4;
  job.step = 41'990;
  job.next = "A rank will be killed, so that its launcher restarts it";
  // The silence of heartbeats, which the monitor says nothing of.
  job.trouble = "No sign of life from ranks 0, 1 within the time-out.";
  job.is_handled = true;
  const absl::Duration now = absl::Seconds(1000);
  EXPECT_EQ(absl::StrJoin(Screen(job, now), "\n"),
            "STALLED. Step 41,990. A rank will be killed, so that its launcher restarts it. You: "
            "nothing.\n"
            "Why: No sign of life from ranks 0, 1 within the time-out.\n"
            "Attempt 3, 4 of 4 ranks open here; newest checkpoint: none yet.\n"
            "The monitor sees 4 ranks.");
  job.finding = FindingOf(History(), monitor::FaultClass::kGpuHang,
                          monitor::Syndrome::kCommunicationHang, {2})
                    .finding;
  EXPECT_EQ(HumanStep(job), "nothing");
  job.is_handled = false;
  EXPECT_EQ(HumanStep(job), "holdfast monitor explain 1f3a5c7d");
}

// ---- The downtime table.

TEST(Downtime, ThePhasesAddUpToTheTimeFromTheOnsetToTheFirstNewStep) {
  TestJob job;
  job.Begin();
  job.ComeUp(1);
  job.Train(100, absl::Minutes(1));
  job.Commit(100);
  job.Train(150, absl::Seconds(30));
  FindingTold told = FindingOf(job.history(), monitor::FaultClass::kGpuHang,
                               monitor::Syndrome::kCommunicationHang, {2});
  job.Tell(told);  // stands for 7 s
  job.After(absl::Seconds(2));
  job.Evidence();
  job.After(absl::Seconds(3));
  job.AllDie();
  job.ComeUp(101, absl::Seconds(4));
  const Incident& incident = job.history().past.back();
  const Phases phases = PhasesOf(incident);
  EXPECT_EQ(phases.detect, absl::Seconds(7));
  EXPECT_EQ(phases.diagnose, absl::Seconds(2));
  EXPECT_EQ(phases.wait, absl::ZeroDuration());
  EXPECT_EQ(phases.stop, absl::Seconds(3));
  EXPECT_EQ(phases.start, absl::Seconds(8));
  EXPECT_EQ(phases.load, absl::Seconds(4));
  EXPECT_EQ(phases.step, absl::Seconds(4));
  EXPECT_EQ(phases.lost, absl::Seconds(23));  // 30 s, of which it stood for 7
  EXPECT_EQ(*phases.total, *phases.detect + *phases.diagnose + *phases.wait + *phases.stop +
                               *phases.start + *phases.load + *phases.step + *phases.lost);
  const auto table = DowntimeTable(job.history().past, "n1");
  ASSERT_EQ(table.size(), 3);
  EXPECT_EQ(table[0],
            "#    attempt  cause                    detect diagnose     wait     stop    start     "
            "load     step     lost    total  what");
  EXPECT_EQ(table[1],
            "1    1        hang, culprit named      7.00 s   2.00 s   0.00 s   3.00 s   8.00 s   "
            "4.00 s   4.00 s     23 s     51 s  comm hang in dp, rank 2 (GPU 2); restart in place");
  EXPECT_EQ(table[2],
            "              all                      7.00 s   2.00 s   0.00 s   3.00 s   8.00 s   "
            "4.00 s   4.00 s     23 s     51 s");
}

TEST(Downtime, WhatNobodySawOfAnIncidentThatIsOverIsUnknown) {
  Incident incident;
  incident.number = 1;
  incident.cause = Cause::kHang;
  incident.what = "all ranks silent";
  incident.onset = absl::Seconds(1);
  incident.detected = incident.diagnosed = incident.stopping = absl::Seconds(3);
  incident.stopped = absl::Seconds(4);
  incident.opened = absl::Seconds(9);
  const auto row = [&] { return DowntimeTable(std::span(&incident, 1), "n1").at(1); };
  EXPECT_EQ(row(),
            "1    -        hang                     2.00 s   0.00 s   0.00 s   1.00 s        "
            "-        -        -        -        -  all ranks silent; open");
  incident.resumed = absl::Seconds(11);
  incident.outcome = Outcome::kResumed;
  EXPECT_EQ(row(),
            "1    -        hang                     2.00 s   0.00 s  unknown   1.00 s  unknow"
            "n  unknown   2.00 s  unknown     10 s  all ranks silent");
  incident.starting = absl::Seconds(6);
  EXPECT_EQ(row(),
            "1    -        hang                     2.00 s   0.00 s   2.00 s   1.00 s   3.00 "
            "s  unknown   2.00 s  unknown     10 s  all ranks silent");
}

TEST(Downtime, WhatWasNeverReachedIsAbsent) {
  Incident incident;
  incident.onset = incident.detected = absl::Seconds(1);
  const Phases phases = PhasesOf(incident);
  EXPECT_EQ(phases.detect, absl::ZeroDuration());
  EXPECT_FALSE(phases.diagnose.has_value());
  EXPECT_FALSE(phases.stop.has_value());
  EXPECT_FALSE(phases.total.has_value());
}

}  // namespace
}  // namespace holdfast::recovery
