// Random histories and every order of two events, against a model of the world that knows nothing
// of the policy: which processes live, who is fenced, what was said and taken back, and what a
// person asked for. The invariants are those of policy.h.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <random>

#include "agent/recovery/policy_testing.h"
#include "agent/recovery/screen.h"

namespace holdfast::recovery {
namespace {

using monitor::ExitKind;
using monitor::FaultClass;
using monitor::Grade;
using monitor::Syndrome;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
#else
constexpr bool kSanitized = false;
#endif
constexpr uint64_t kHistories = kSanitized ? 5'000 : 100'000;

class World {
 public:
  World(Settings settings, uint64_t seed) : settings_(std::move(settings)), random_(seed) {}

  // ---- Events.

  void Tell(decltype(Event::what) what) {
    Note(what);
    const Event event{now_, wall_ + now_, std::move(what)};
    if (Chance(40)) {
      const std::string bytes = Encode(history_);
      absl::StatusOr<History> decoded = DecodeHistory(std::as_bytes(std::span(bytes)));
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      ASSERT_EQ(*decoded, history_);
      // The decoded one goes on identically.
      std::vector<Action> again = Decide(settings_, event, *decoded);
      const std::vector<Action> actions = Decide(settings_, event, history_);
      ASSERT_EQ(Text(again), Text(actions));
      ASSERT_EQ(*decoded, history_);
      return Carry(actions);
    }
    Carry(Decide(settings_, event, history_));
  }

  void Begin() {
    ranks_wanted_ = 1 + Below(4);
    gpus_ = GpusOf(ranks_wanted_ + Below(3));
    if (Chance(3)) {
      for (Gpu& gpu : gpus_) gpu.uuid.clear();
    }
    std::vector<CheckpointFacts> checkpoints;
    if (Chance(2)) checkpoints.push_back(NewCheckpoint(Attempt{1}, 1000));
    // A run begins when no rank of an earlier one lives: RunBegun says so.
    for (auto& [key, lives] : processes_) lives = false;
    Tell(RunBegun{"llama", ranks_wanted_, "", gpus_, {}, checkpoints});
  }

  // Anything at all, likely or not.
  void RandomEvent() {
    now_ += absl::Milliseconds(Chance(5) ? Below(2'000'000) : Below(5'000));
    const Launch launch =
        Chance(12)
            ? Launch{Below(history_.launch_max == Launch{} ? 1 : Value(history_.launch_max)) + 1}
            : history_.launch;
    const Rank rank{Below(std::max<uint32_t>(
        1, static_cast<uint32_t>(history_.ranks.size()) + (Chance(20) ? 1 : 0)))};
    switch (Below(34)) {
      case 0:
      case 1:
        return ExitOf(launch, rank, RandomExit());
      case 2:
        return Tell(
            RankTimedOut{launch, rank, "step", absl::Seconds(Below(900)), absl::Minutes(1)});
      case 3:
        return Tell(RankBeats{launch, rank});
      case 4:
      case 5:
      case 6:
        return Tell(RandomFinding(launch));
      case 7:
      case 8:
        return Tell(FindingWithdrawn{absl::StrCat("f", Below(3))});
      case 9:
        return Tell(XidSeen{RandomGpu(), Chance(2) ? 79 : (Chance(2) ? 119 : 31)});
      case 10:
        return Chance(8) ? Tell(NodeGone{"n1"}) : Tell(NodeBack{"n1"});
      case 11:
      case 12:
        return Tell(EvidenceCollected{history_.incident_count});
      case 13:
      case 14:
      case 15:
        return Commit(launch);
      case 16:
        return Tell(SaveFailed{launch});
      case 17:
        return MarkOne();
      case 18:
        return Answer(!Chance(4));
      case 19:
        return Tell(Approve{absl::StrCat("p", Below(5))});
      case 20:
        return Tell(Hold{absl::Minutes(Below(60)), "why not"});
      case 21:
        return Tell(Readmit{RandomGpu()});
      case 22:
        return Tell(Save{});
      case 23:
        return Chance(6) ? Tell(SignalCame{static_cast<EndSignal>(Below(3))})
                         : (Chance(4) ? Tell(Stop{}) : Tell(Tick{}));
      case 24:
        return Restarted();
      case 25:
        return Tell(SightChanged{static_cast<Sight>(Below(3))});
      case 26:
        return Chance(3) ? ReadCatalog() : Tell(Tick{});
      case 27:
        if (history_.phase == Phase::kOver && Chance(2)) Begin();
        return;
      case 28:
      case 29:
        return Obey();
      default:
        return ComeOn();
    }
  }

  // The job as far as it comes without any new fault: processes obey, evidence comes, starts work,
  // holds end, and a person answers nothing.
  void Settle() {
    for (int round = 0; round < 400 && !testing::Test::HasFatalFailure(); ++round) {
      const bool waits_for_person = history_.state == State::kWaitingForApproval ||
                                    history_.state == State::kStalled ||
                                    history_.state == State::kWaitingForCapacity;
      if (history_.phase == Phase::kOver || history_.state == State::kRunning ||
          history_.state == State::kSuspected) {
        return;
      }
      if (waits_for_person && HumanStep(settings_, history_) != "nothing" &&
          history_.state != State::kWaitingForCapacity) {
        return;
      }
      Obey();
      if (history_.evidence == History::Evidence::kAsked) {
        Tell(EvidenceCollected{history_.incident_count});
      }
      ComeOn();
      now_ = std::max(now_ + absl::Milliseconds(1), history_.wake_at.value_or(now_));
      Tell(Tick{});
    }
    ADD_FAILURE() << "it comes to no rest: " << std::string(Name(history_.state)) << ", "
                  << FirstLine(settings_, history_, now_);
  }

  const History& history() const { return history_; }
  History& history() { return history_; }
  const Settings& settings() const { return settings_; }
  absl::Duration now() const { return now_; }
  void Pass(absl::Duration duration) { now_ += duration; }
  uint32_t Below(uint32_t limit) {
    return limit == 0 ? 0 : static_cast<uint32_t>(random_() % limit);
  }
  bool Chance(uint32_t in) { return random_() % in == 0; }
  const std::vector<StartRanks>& starts() const { return starts_; }

  // ---- What processes do.

  void ExitOf(Launch launch, Rank rank, Exit exit) {
    const auto found = processes_.find({Value(launch), Value(rank)});
    if (found != processes_.end()) found->second = false;
    Tell(RankExited{launch, rank, exit});
  }
  // Those that were told to end do.
  void Obey() {
    const std::set<uint32_t> told = std::move(told_);
    told_.clear();
    for (const uint32_t launch : told) {
      for (auto& [key, lives] : processes_) {
        if (key.first == launch && lives)
          ExitOf(Launch{launch}, Rank{key.second}, {ExitKind::kTerminated, 15});
      }
    }
  }
  // Those that live come on by a phase.
  void ComeOn() {
    const Launch launch = history_.launch;
    for (uint32_t r = 0; r < history_.ranks.size() && launch == history_.launch; ++r) {
      if (!Lives(launch, Rank{r})) continue;
      switch (history_.ranks[r].phase) {
        case RankPhase::kAsked:
          Tell(RankStarted{launch, Rank{r}});
          break;
        case RankPhase::kStarted:
          Tell(RankOpened{launch, Rank{r}, Attempt{Value(launch)}});
          break;
        case RankPhase::kOpened:
          Tell(RankRestored{launch, Rank{r}, restored_});
          break;
        case RankPhase::kRestored:
        case RankPhase::kStepping:
          Tell(StepDone{launch, Rank{r}, Step{++step_}});
          break;
        default:
          break;
      }
    }
  }
  void Commit(Launch launch) {
    const CheckpointFacts facts = NewCheckpoint(Attempt{Value(launch)}, 1000 + Below(40));
    Tell(CheckpointCommitted{launch, facts, now_ - absl::Milliseconds(Below(3000))});
  }
  void Answer(bool yes) {
    if (!history_.proposal.has_value()) return;
    if (yes) return Tell(Approve{history_.proposal->id});
    Tell(Veto{history_.proposal->id});
  }
  Gpu RandomGpu() {
    return gpus_.empty() ? Gpu{} : gpus_[Below(static_cast<uint32_t>(gpus_.size()))];
  }

  FindingTold RandomFinding(Launch launch) {
    FindingTold told = FindingOf(history_, static_cast<FaultClass>(Below(monitor::kFaultClasses)),
                                 static_cast<Syndrome>(Below(monitor::kSyndromes)), {Below(4)},
                                 Chance(2) ? Grade::kVerdict : Grade::kSuspicion);
    told.launch = launch;
    told.finding.id = absl::StrCat("f", Below(3));
    told.finding.evidence.resize(Below(3));
    if (Chance(3)) told.finding.scope = monitor::Scope::kRankLate;
    if (Chance(2)) told.finding.suspects.clear();
    told.standing = absl::Seconds(Below(300));
    if (Chance(2)) told.timeout = absl::Seconds(60 + Below(60));
    told.slow_permille = 800 + Below(3000);
    return told;
  }

 private:
  Exit RandomExit() {
    switch (Below(5)) {
      case 0:
        return {ExitKind::kClean, 0};
      case 1:
        return {ExitKind::kKilled, 9};
      case 2:
        return {ExitKind::kFault, 11};
      case 3:
        return {ExitKind::kError, Chance(4) ? 2 : 1};
      default:
        return {ExitKind::kTerminated, 15};
    }
  }

  CheckpointFacts NewCheckpoint(Attempt attempt, uint64_t step) {
    CheckpointFacts facts{{attempt, Step{step}}, Chance(10), Chance(10), Chance(10)};
    return facts;
  }

  void ReadCatalog() {
    std::vector<CheckpointFacts> facts;
    for (const CheckpointRecord& record : history_.checkpoints) {
      if (!Chance(4)) facts.push_back(record.facts);
    }
    Tell(CheckpointsRead{facts});
  }

  // A person marks one, or takes that back.
  void MarkOne() {
    std::vector<CheckpointFacts> facts;
    for (const CheckpointRecord& record : history_.checkpoints) facts.push_back(record.facts);
    if (facts.empty()) return;
    bool& marked_bad = facts[Below(facts.size())].marked_bad;
    marked_bad = !marked_bad;
    Tell(CheckpointsRead{facts});
  }

  void Restarted() {
    AgentRestarted restarted;
    restarted.same_clock = !Chance(4);
    if (!restarted.same_clock) {
      now_ = absl::Seconds(Below(100));
      processes_.clear();  // another boot: no process, no shim
      told_.clear();
    } else {
      for (const auto& [key, lives] : processes_) {
        restarted.ranks.push_back(
            {Launch{key.first}, Rank{key.second}, lives ? Exit{} : Exit{ExitKind::kUnknown, 0}});
      }
    }
    Tell(restarted);
  }

  bool Lives(Launch launch, Rank rank) const {
    const auto found = processes_.find({Value(launch), Value(rank)});
    return found != processes_.end() && found->second;
  }

  // What was said to the policy that can justify stopping.
  void Note(const decltype(Event::what)& what) {
    restarted_ = std::holds_alternative<AgentRestarted>(what);
    if (const auto* begun = std::get_if<RunBegun>(&what)) {
      ranks_wanted_ = begun->world_size;
      commanded_ = false;
      starts_of_run_ = charged_ = 0;
    } else if (const auto* told = std::get_if<FindingTold>(&what)) {
      if (told->launch == history_.launch) {
        verdicts_[told->finding.id] = told->finding.grade == Grade::kVerdict;
      }
    } else if (const auto* withdrawn = std::get_if<FindingWithdrawn>(&what)) {
      verdicts_.erase(withdrawn->id);
    } else if (const auto* exited = std::get_if<RankExited>(&what)) {
      if (exited->launch == history_.launch && exited->exit.kind != ExitKind::kClean)
        reason_ = true;
    } else if (const auto* restarted = std::get_if<AgentRestarted>(&what)) {
      for (const auto& rank : restarted->ranks) {
        reason_ = reason_ || (rank.launch == history_.launch && rank.exit.kind != ExitKind::kNone);
      }
      reason_ = reason_ || !restarted->same_clock;
    } else if (const auto* late = std::get_if<RankTimedOut>(&what)) {
      if (late->launch == history_.launch) late_.insert(Value(late->rank));
    } else if (const auto* beats = std::get_if<RankBeats>(&what)) {
      if (beats->launch == history_.launch) late_.erase(Value(beats->rank));
    } else if (const auto* done = std::get_if<StepDone>(&what)) {
      if (done->launch == history_.launch) late_.erase(Value(done->rank));
    } else if (const auto* xid = std::get_if<XidSeen>(&what)) {
      reason_ = reason_ || xid->code == 79;
    } else if (std::holds_alternative<NodeGone>(what)) {
      gone_ = true;
    } else if (std::holds_alternative<NodeBack>(what)) {
      gone_ = false;
      grow_ = true;
    } else if (std::holds_alternative<Readmit>(what)) {
      grow_ = true;
    } else if (std::holds_alternative<Stop>(what) || std::holds_alternative<SignalCame>(what)) {
      commanded_ = true;
    } else if (std::holds_alternative<Save>(what)) {
      save_commanded_ = true;
    } else if (const auto* approve = std::get_if<Approve>(&what)) {
      if (history_.proposal.has_value() && history_.proposal->id == approve->id) {
        approved_.insert(history_.proposal->key);
      }
    }
  }

  bool Justified() const {
    const bool verdict = std::any_of(verdicts_.begin(), verdicts_.end(),
                                     [](const auto& entry) { return entry.second; });
    return reason_ || verdict || !late_.empty() || gone_ || commanded_ || grow_ ||
           history_.incident.has_value();
  }

  void Carry(const std::vector<Action>& actions) {
    for (const Action& action : actions) {
      if (const auto* start = std::get_if<StartRanks>(&action)) Started(*start);
      if (const auto* stop = std::get_if<StopRanks>(&action)) {
        if (stop->launch == history_.launch && stop->why != "of a launch that is over") {
          EXPECT_TRUE(Justified()) << Describe(action);
          EXPECT_TRUE(commanded_ || settings_.mode != Mode::kObserve) << Describe(action);
          // What a finding is the reason for is not begun once that was withdrawn.
          const bool by_finding = history_.phase == Phase::kStopping && !restarted_ &&
                                  history_.incident.has_value() &&
                                  !history_.incident->finding.empty();
          if (by_finding && !commanded_ && stop->why != "its node is back") {
            EXPECT_TRUE(verdicts_[history_.incident->finding]) << Describe(action);
          }
        }
        told_.insert(Value(stop->launch));
      }
      if (std::holds_alternative<RequestSave>(action) && settings_.mode == Mode::kObserve) {
        EXPECT_TRUE(commanded_ || save_commanded_) << Describe(action);
      }
      if (const auto* exit = std::get_if<ExitJob>(&action)) {
        EXPECT_EQ(history_.phase, Phase::kOver);
        EXPECT_EQ(exit->code, history_.exit_code);
      }
      EXPECT_FALSE(std::holds_alternative<RecordLemon>(action) && settings_.mode == Mode::kObserve);
    }
    save_commanded_ = false;
    EXPECT_LE(history_.restarts_charged, settings_.max_restarts);
  }

  void Started(const StartRanks& start) {
    if (!starts_.empty() && start.launch == starts_.back().launch) {  // once more, after a restart
      EXPECT_EQ(Describe(start), Describe(starts_.back()));
    } else {
      NewStart(start);
    }
    for (uint32_t r = 0; r < start.placement.world_size(); ++r) {
      processes_.try_emplace({Value(start.launch), r}, true);
    }
  }

  void NewStart(const StartRanks& start) {
    if (!starts_.empty()) {
      EXPECT_GT(start.launch, starts_.back().launch);
      // Whoever is not dead now has been given up: it is fenced, and its GPU is not used.
      for (const auto& [key, lives] : processes_) {
        if (!lives || Launch{key.first} != starts_.back().launch) continue;
        const Gpu& gpu = starts_.back().placement.gpus[key.second];
        const bool stuck = std::any_of(
            history_.stuck_ranks.begin(), history_.stuck_ranks.end(), [&](const History::Stuck& s) {
              return Value(s.launch) == key.first && Value(s.rank) == key.second;
            });
        EXPECT_TRUE(stuck || gone_)
            << "rank " << key.second << " of launch " << key.first << " lives";
        if (!stuck) continue;
        for (const Gpu& used : start.placement.gpus) EXPECT_FALSE(IsSame(used, gpu));
      }
    }
    ++starts_of_run_;
    EXPECT_TRUE(starts_of_run_ == 1 || settings_.mode != Mode::kObserve);
    const bool healthy = history_.now - started_at_ >= settings_.healthy_after;
    if (starts_of_run_ > 1 && !healthy && !planned_possible()) ++charged_;
    EXPECT_LE(charged_, settings_.max_restarts);
    CheckRestore(start.restore);
    EXPECT_TRUE(start.placement.world_size() == ranks_wanted_ ||
                std::any_of(settings_.layouts.begin(), settings_.layouts.end(),
                            [&](const ElasticLayout& layout) {
                              return layout.world_size == start.placement.world_size();
                            }));
    for (size_t i = 0; i < start.placement.gpus.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        EXPECT_FALSE(IsSame(start.placement.gpus[i], start.placement.gpus[j]));
      }
    }
    starts_.push_back(start);
    started_at_ = history_.now;  // goes on over boots
    restored_ = start.restore.checkpoint;
    verdicts_.clear();
    late_.clear();
    approved_.clear();
    reason_ = grow_ = false;
  }

  bool planned_possible() const {
    return !history_.past.empty() && (history_.past.back().cause == Cause::kGrow ||
                                      history_.past.back().cause == Cause::kSlow);
  }

  void CheckRestore(const RestoreRule& rule) {
    if (rule.kind == RestoreRule::Kind::kNothing) {
      EXPECT_TRUE(approved_.contains("from-nothing"));
      return;
    }
    if (!rule.checkpoint.has_value()) return;
    for (const CheckpointRecord& record : history_.checkpoints) {
      if (rule.kind == RestoreRule::Kind::kNewest) {
        EXPECT_LE(record.facts.id, *rule.checkpoint) << "another one is the newest";
      }
      if (record.facts.id != *rule.checkpoint) continue;
      EXPECT_FALSE(record.facts.marked_bad);
      EXPECT_FALSE(record.facts.non_finite);
      EXPECT_LT(record.crashes, settings_.checkpoint_tries);
      const std::string key = absl::StrCat("checkpoint:", Value(rule.checkpoint->attempt), ".",
                                           Value(rule.checkpoint->step));
      EXPECT_TRUE(!record.facts.under_anomaly || approved_.contains(key));
    }
  }

  const Settings settings_;
  std::mt19937_64 random_;
  History history_;
  absl::Duration now_ = absl::Seconds(1000);
  const absl::Time wall_ = absl::FromUnixSeconds(1'764'150'000);
  std::vector<Gpu> gpus_;
  uint32_t ranks_wanted_ = 0;
  uint64_t step_ = 1000;

  std::map<std::pair<uint32_t, uint32_t>, bool> processes_;  // (launch, rank): lives
  std::set<uint32_t> told_;                                  // launches that were told to end
  std::vector<StartRanks> starts_;
  absl::Duration started_at_;
  std::optional<CheckpointId> restored_;
  uint32_t starts_of_run_ = 0;
  uint32_t charged_ = 0;
  std::map<std::string, bool> verdicts_;
  std::set<uint32_t> late_;
  std::set<std::string> approved_;
  bool reason_ = false;  // a death, an Xid
  bool gone_ = false;
  bool grow_ = false;
  bool commanded_ = false;
  bool save_commanded_ = false;
  bool restarted_ = false;  // the event is AgentRestarted
};

Settings RandomSettings(std::mt19937_64& random) {
  Settings settings;
  settings.mode = static_cast<Mode>(random() % 4 == 0 ? random() % 2 : 2);
  settings.max_restarts = static_cast<uint32_t>(random() % 6);
  settings.restarts_in_window = 1 + static_cast<uint32_t>(random() % 4);
  settings.hangs_to_exclude = 1 + static_cast<uint32_t>(random() % 2);
  settings.checkpoint_tries = 1 + static_cast<uint32_t>(random() % 2);
  settings.slow = static_cast<SlowPolicy>(random() % 2);
  if (random() % 2 == 0) settings.layouts = {{1, "dp=1", {}}, {3, "dp=3", {}}};
  settings.healthy_after = absl::Minutes(static_cast<int64_t>(1 + random() % 30));
  return settings;
}

TEST(PolicyRandom, TheInvariantsHoldInEveryHistoryAndEachComesToRest) {
  const char* const given = std::getenv("HOLDFAST_TEST_SEED");
  const uint64_t first = given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
  const uint64_t count = given != nullptr ? 1 : kHistories;
  std::map<State, uint64_t> ends;
  std::map<int32_t, uint64_t> codes;
  uint64_t starts = 0;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    std::mt19937_64 random(seed);
    World world(RandomSettings(random), seed);
    world.Begin();
    const uint32_t events = world.Below(50);
    for (uint32_t i = 0; i < events; ++i) world.RandomEvent();
    world.Settle();
    ++ends[world.history().state];
    if (world.history().phase == Phase::kOver) ++codes[world.history().exit_code];
    starts += world.starts().size();
    if (testing::Test::HasFailure()) {
      FAIL() << "HOLDFAST_TEST_SEED=" << seed << " runs this history alone";
    }
  }
  // Not vacuous: every way to end is there, and restarts are.
  if (given != nullptr) return;
  for (const State state : {State::kRunning, State::kSuspected, State::kWaitingForApproval,
                            State::kStalled, State::kDone, State::kGivenUp}) {
    EXPECT_GT(ends[state], kHistories / 1000) << std::string(Name(state));
  }
  for (const int32_t code : {0, 1, 75, 93}) EXPECT_GT(codes[code], kHistories / 1000) << code;
  EXPECT_GT(starts, kHistories * 3 / 2);
  RecordProperty("starts", absl::StrCat(starts));
}

// ---- Every order of two events.

struct Named {
  const char* name;
  std::function<void(World&)> happen;
};

std::vector<Named> Everything() {
  const auto tell = [](auto make) { return [make](World& w) { w.Tell(make(w.history())); }; };
  const auto finding = [](FaultClass fault, Syndrome syndrome, std::vector<uint32_t> suspects) {
    return [=](World& w) {
      FindingTold told = FindingOf(w.history(), fault, syndrome, suspects);
      told.finding.id = absl::StrCat("f", static_cast<int>(fault));
      told.slow_permille = 3000;
      w.Tell(told);
    };
  };
  return {
      {"death",
       [](World& w) {
         w.ExitOf(Launch{1}, Rank{2}, {ExitKind::kKilled, 9});
       }},
      {"error",
       [](World& w) {
         w.ExitOf(Launch{1}, Rank{1}, {ExitKind::kError, 1});
       }},
      {"usage",
       [](World& w) {
         w.ExitOf(Launch{1}, Rank{0}, {ExitKind::kError, 2});
       }},
      {"end",
       [](World& w) {
         w.ExitOf(Launch{1}, Rank{3}, {ExitKind::kClean, 0});
       }},
      {"xid", tell([](const History&) {
         return XidSeen{GpusOf(6)[2], 79};
       })},
      {"xid reset", tell([](const History&) {
         return XidSeen{GpusOf(6)[2], 119};
       })},
      {"hang", finding(FaultClass::kGpuHang, Syndrome::kCommunicationHang, {2})},
      {"unknown", finding(FaultClass::kUnknown, Syndrome::kCommunicationHang, {})},
      {"mismatch", finding(FaultClass::kMismatch, Syndrome::kCommunicationHang, {1})},
      {"slow", finding(FaultClass::kLink, Syndrome::kCommunicationSlow, {1})},
      {"withdrawn", tell([](const History&) {
         return FindingWithdrawn{absl::StrCat("f", static_cast<int>(FaultClass::kGpuHang))};
       })},
      {"late", tell([](const History&) {
         return RankTimedOut{Launch{1}, Rank{3}, "", absl::Minutes(1), absl::Minutes(1)};
       })},
      {"beats", tell([](const History&) {
         return RankBeats{Launch{1}, Rank{3}};
       })},
      {"evidence", tell([](const History& h) { return EvidenceCollected{h.incident_count}; })},
      {"commit",
       [](World& w) {
         w.Tell(CheckpointCommitted{Launch{1}, CheckpointAt(200), w.now()});
       }},
      {"mark bad", tell([](const History& h) {
         CheckpointsRead read;
         for (const CheckpointRecord& record : h.checkpoints) {
           read.checkpoints.push_back(record.facts);
           read.checkpoints.back().marked_bad |= record.facts.id.step == Step{100};
         }
         return read;
       })},
      {"readmit", tell([](const History&) { return Readmit{GpusOf(6)[2]}; })},
      {"hold", tell([](const History&) {
         return Hold{absl::Hours(1), "x"};
       })},
      {"stop", tell([](const History&) { return Stop{}; })},
      {"signal", tell([](const History&) { return SignalCame{EndSignal::kTerminate}; })},
      {"blind", tell([](const History&) { return SightChanged{Sight::kBlind}; })},
      {"tick", tell([](const History&) { return Tick{}; })},
  };
}

// What it comes to: how it ends, on which GPUs, from which checkpoint.
std::string Outcome2(const World& world) {
  const History& h = world.history();
  std::string gpus;
  for (const Gpu& gpu : h.placement.gpus) absl::StrAppend(&gpus, gpu.index, " ");
  return absl::StrCat(std::string(Name(h.state)), " code ", h.exit_code, " restarts ",
                      h.restart_count, " GPUs ", gpus, "from ",
                      h.restore_rule.checkpoint.has_value()
                          ? absl::StrCat(Value(h.restore_rule.checkpoint->step))
                          : "nothing");
}

World TrainingWorld(Mode mode) {
  Settings settings;
  settings.mode = mode;
  settings.slow = SlowPolicy::kReplaceAtCheckpoint;
  World world(settings, 7);
  world.Tell(RunBegun{"llama", 4, "", GpusOf(6), {}, {CheckpointAt(100)}});
  for (int i = 0; i < 5; ++i) {
    world.Pass(absl::Seconds(1));
    world.ComeOn();
  }
  EXPECT_EQ(world.history().state, State::kRunning);
  return world;
}

// Goal: what comes of two events does not depend on which was told first, unless there is a reason.
// Method: all ordered pairs at one moment, and then no other fault; the reasons are written down.
TEST(PolicyOrder, TheOrderOfTwoEventsMattersOnlyWhereItMust) {
  const auto reason = [](std::string_view a, std::string_view b) -> const char* {
    const auto is = [&](std::string_view x, std::string_view y) {
      return (a == x && b == y) || (a == y && b == x);
    };
    const auto one = [&](std::string_view x) { return a == x || b == x; };
    if (is("hang", "withdrawn")) return "a finding that is withdrawn before it is told is open";
    if (is("late", "beats")) return "a beat before the time-out is none after it";
    if (one("evidence")) return "evidence can be collected only of what has happened";
    if (is("xid", "readmit")) return "what is readmitted before the fault is excluded by it";
    if (is("xid reset", "readmit")) return "readmitting forgets the mark";
    return nullptr;
  };
  const std::vector<Named> all = Everything();
  size_t differ = 0;
  for (const Mode mode : {Mode::kAct, Mode::kAsk, Mode::kObserve}) {
    for (const Named& a : all) {
      for (const Named& b : all) {
        SCOPED_TRACE(absl::StrCat(std::string(Name(mode)), ": ", a.name, ", ", b.name));
        World one = TrainingWorld(mode), other = TrainingWorld(mode);
        a.happen(one);
        b.happen(one);
        b.happen(other);
        a.happen(other);
        one.Settle();
        other.Settle();
        if (Outcome2(one) == Outcome2(other)) continue;
        ++differ;
        EXPECT_NE(reason(a.name, b.name), nullptr) << Outcome2(one) << "\n" << Outcome2(other);
      }
    }
  }
  EXPECT_GT(differ, 0);
}

}  // namespace
}  // namespace holdfast::recovery
