// Goal: no descriptor that Keep() has returned for is ever lost, whichever of keeper and worker is
// killed at whatever instant.
// Method: real processes. This program is also the worker and the keeper of the test (it starts
// itself, as holdfastd does). The test's process plays the world: it tells the worker over a
// control socket to keep and drop memfds, kills, and compares what the next worker was handed with
// a model.
#include "agent/keeper.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "agent/handover.h"
#include "agent/keeper_link.h"
#include "agent/log.h"
#include "agent/process.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/kill_point.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/epoll_loop.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

constexpr char kControlName[] = "agent/control";
constexpr int kAnswerMilliseconds = 120'000;

std::string Contents(const std::string& name) { return absl::StrCat("the bytes of ", name); }

// ---- The worker of the test -------------------------------------------------------------------

void Say(int control, const nlohmann::json& object) {
  const std::string text = object.dump();
  CHECK(send(control, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size()));
}

// Obeys "keep NAME", "drop NAME", "keeper", "finish CODE", "die"; says {"did": command} behind
// each.
class TestWorker {
 public:
  explicit TestWorker(Handover handover)
      : loop_(std::move(*EpollLoop::Create(RealClock()))),
        restart_count_(handover.restart_count),
        link_(std::move(handover), {.send_deadline = absl::Milliseconds(100)}, *loop_, RealClock()),
        control_(link_.Find(kControlName)) {}

  int Run() {
    KillPoint("worker.started");
    nlohmann::json held = nlohmann::json::object();
    for (const KeptDescriptor& kept : link_.EngineDescriptors()) {
      held[kept.name] = *ReadAll(kept.fd.get(), 4096);
    }
    Say(control_, {{"started", restart_count_},
                   {"pid", getpid()},
                   {"keeper", link_.keeper_pid()},
                   {"held", held},
                   {"open", OpenCount()}});
    loop_->Watch(control_, EventLoop::FdEvents::kReadable, [this] { Obey(); });
    loop_->Run();
    return 0;
  }

 private:
  static size_t OpenCount() {
    size_t count = 0;
    DIR* const directory = opendir("/proc/self/fd");
    while (readdir(directory) != nullptr) ++count;
    closedir(directory);
    return count - 3;  // ".", ".." and the directory's own
  }

  void Obey() {
    char text[256];
    const ssize_t length = recv(control_, text, sizeof(text), MSG_DONTWAIT);
    if (length <= 0) _exit(9);  // the test has gone
    const std::string command(text, static_cast<size_t>(length));
    const std::vector<std::string> words = absl::StrSplit(command, ' ');
    if (words[0] == "keep") {
      const UniqueFd memory = std::move(*SealedMemfd("test", Contents(words[1])));
      link_.Keep(words[1], memory.get());
    } else if (words[0] == "drop") {
      link_.Drop(words[1]);
    } else if (words[0] == "finish") {
      link_.Finish(std::atoi(words[1].c_str()));
      loop_->Stop();
      return;
    } else if (words[0] == "die") {
      _exit(3);
    }
    Say(control_, {{"did", command},
                   {"keeper", link_.keeper_pid()},
                   {"keeper_restarts", link_.keeper_restart_count()}});
  }

  std::unique_ptr<EpollLoop> loop_;
  uint32_t restart_count_;
  KeeperLink link_;
  int control_;
};

KeeperLimits TestLimits() {
  KeeperLimits limits;
  limits.backoff_min = absl::Milliseconds(1);
  limits.backoff_max = absl::Milliseconds(4);
  limits.quick_deaths_max = 1000;
  // A worker that is told to end, or to die, may have to wait for a processor.
  limits.healthy_after = absl::InfiniteDuration();
  limits.drain_deadline = absl::Milliseconds(50);
  limits.drain_margin = absl::Seconds(60);
  // Drills in the environment of the test.
  if (const char* text = std::getenv("KEEPER_TEST_QUICK_DEATHS"); text != nullptr) {
    limits.quick_deaths_max = static_cast<uint32_t>(std::atoi(text));
  }
  if (std::getenv("KEEPER_TEST_IMPATIENT") != nullptr) {
    limits.drain_margin = absl::Milliseconds(50);
  }
  return limits;
}

int RunRole(const std::string& role, int handover_fd) {
  CHECK_OK(OpenLog({.process = role.substr(2), .level = "error"}));
  Handover handover = std::move(*TakeHandover(handover_fd));
  if (!handover.kill_plan.empty()) ArmKillPoint(*ParseKillPlan(handover.kill_plan));
  if (role == "--worker") return TestWorker(std::move(handover)).Run();
  Keeper::Start start;
  start.descriptors = std::move(handover.descriptors);
  start.channel = std::move(handover.channel);
  start.worker_pidfd = std::move(handover.peer_pidfd);
  return Keeper(std::move(start), TestLimits(), RealClock()).Run();
}

// ---- The world of the test --------------------------------------------------------------------

class KeeperTest : public ::testing::Test {
 protected:
  ~KeeperTest() override {
    control_.Reset();
    // Either may just have started the next one of the other, of which nobody has told us yet:
    // until nobody is left. Whoever loses its parent becomes our child.
    for (;;) {
      std::ifstream children(absl::StrCat("/proc/self/task/", getpid(), "/children"));
      for (pid_t child = 0; children >> child;) kill(child, SIGKILL);
      if (waitpid(-1, nullptr, 0) < 0 && errno == ECHILD) return;
    }
  }

  // Starts a keeper in a child process, as main does.
  void StartAgent(std::deque<std::string> worker_plans = {}, const std::string& keeper_plan = "") {
    // Orphans come to us, so that the destructor can wait for all of them.
    ASSERT_EQ(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    control_.Reset(ends[0]);
    UniqueFd theirs(ends[1]);
    const pid_t keeper = fork();
    ASSERT_GE(keeper, 0);
    if (keeper == 0) {
      control_.Reset();
      CHECK_OK(OpenLog({.process = "keeper", .level = "error"}));
      if (!keeper_plan.empty()) ArmKillPoint(*ParseKillPlan(keeper_plan));
      Keeper::Start start;
      start.descriptors.push_back({kControlName, std::move(theirs)});
      start.worker_kill_plans = std::move(worker_plans);
      _exit(Keeper(std::move(start), TestLimits(), RealClock()).Run());
    }
    keeper_ = keeper;
  }

  // The next thing a worker says; a discarded value if it said nothing in time.
  nlohmann::json Hear() {
    pollfd entry{control_.get(), POLLIN, 0};
    if (poll(&entry, 1, kAnswerMilliseconds) <= 0)
      return nlohmann::json(nlohmann::json::value_t::discarded);
    std::string text(1 << 20, '\0');
    const ssize_t length = recv(control_.get(), text.data(), text.size(), 0);
    text.resize(length < 0 ? 0 : static_cast<size_t>(length));
    nlohmann::json said = nlohmann::json::parse(text, nullptr, false);
    if (said.is_object() && said.contains("pid")) worker_ = said["pid"];
    if (said.is_object() && said.contains("keeper")) keeper_ = said["keeper"];
    return said;
  }

  void Command(const std::string& command) {
    ASSERT_EQ(send(control_.get(), command.data(), command.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(command.size()));
  }

  // Hears until a worker reports its start, and returns the names it was handed; checks contents.
  std::set<std::string> HearStart() {
    for (;;) {
      const nlohmann::json said = Hear();
      if (!said.is_object()) {
        ADD_FAILURE() << "no worker started";
        return {"none"};
      }
      if (!said.contains("started")) continue;
      std::set<std::string> names;
      for (const auto& [name, contents] : said["held"].items()) {
        names.insert(name);
        EXPECT_EQ(contents, Contents(name));
      }
      open_at_start_ = said["open"];
      return names;
    }
  }

  // Hears what this worker still does of commands that its predecessor had not read, and applies it
  // to the names that it was handed.
  void HearRest(std::set<std::string>& held) {
    Command("nothing");
    for (;;) {
      const nlohmann::json said = Hear();
      if (!said.is_object() || !said.contains("did")) {
        ADD_FAILURE() << "the worker does not answer: " << said;
        return;
      }
      const std::string did = said["did"];
      if (did == "nothing") return;
      if (did.rfind("keep ", 0) == 0) held.insert(did.substr(5));
      if (did.rfind("drop ", 0) == 0) held.erase(did.substr(5));
    }
  }

  // Waits until the keeper that is known is another one than `before`.
  void HearNewKeeper(pid_t before) {
    while (keeper_ == before || keeper_ == 0) {
      Command("keeper");
      if (!Hear().is_object()) {
        ADD_FAILURE() << "no new keeper";
        return;
      }
    }
  }

  UniqueFd control_;
  pid_t keeper_ = -1;
  pid_t worker_ = -1;
  size_t open_at_start_ = 0;
};

TEST_F(KeeperTest, HandsOverWhatWasKeptWhenTheWorkerIsKilled) {
  StartAgent();
  EXPECT_TRUE(HearStart().empty());
  for (const char* command : {"keep a/1", "keep a/2", "keep b", "drop a/2"}) {
    Command(command);
    ASSERT_TRUE(Hear().is_object());
  }
  kill(worker_, SIGKILL);
  EXPECT_EQ(HearStart(), (std::set<std::string>{"a/1", "b"}));
}

TEST_F(KeeperTest, TheWorkerStartsANewKeeperThatHoldsEverything) {
  StartAgent();
  HearStart();
  Command("keep a");
  ASSERT_TRUE(Hear().is_object());
  const pid_t first = keeper_;
  kill(first, SIGKILL);
  HearNewKeeper(first);
  EXPECT_NE(keeper_, first);
  Command("keep b");
  ASSERT_TRUE(Hear().is_object());
  kill(worker_, SIGKILL);
  EXPECT_EQ(HearStart(), (std::set<std::string>{"a", "b"}));
}

TEST_F(KeeperTest, AStoppedKeeperIsReplacedInsteadOfWaitedFor) {
  StartAgent();
  HearStart();
  const pid_t first = keeper_;
  kill(first, SIGSTOP);
  // The channel takes hundreds of messages before the worker has to wait for its reader.
  std::set<std::string> kept;
  for (int i = 0; keeper_ == first && i < 5000; ++i) {
    const std::string name = absl::StrCat("k/", i);
    Command(absl::StrCat("keep ", name));
    ASSERT_TRUE(Hear().is_object());
    kept.insert(name);
  }
  EXPECT_NE(keeper_, first);
  kill(worker_, SIGKILL);
  EXPECT_EQ(HearStart(), kept);
}

TEST_F(KeeperTest, ReadsAllThatADeadWorkerHasSentHoweverMuchItIs) {
  StartAgent();
  HearStart();
  kill(keeper_, SIGSTOP);
  std::set<std::string> kept;
  for (int i = 0; i < 150; ++i) {  // more than the keeper reads in one turn
    const std::string name = absl::StrCat("k/", i);
    Command(absl::StrCat("keep ", name));
    ASSERT_TRUE(Hear().is_object());
    kept.insert(name);
  }
  const UniqueFd worker = std::move(*OpenPidfd(worker_));
  kill(worker_, SIGKILL);
  ASSERT_TRUE(WaitUntilDead(worker.get(), absl::Seconds(120)));
  kill(keeper_, SIGCONT);
  EXPECT_EQ(HearStart(), kept);
}

// Every instant of the protocol between the two, in either process, at the first and at later
// times.
TEST_F(KeeperTest, NothingKeptIsLostAtAnyKillPoint) {
  struct Case {
    const char* worker_plan;
    const char* keeper_plan;
  };
  const Case cases[] = {
      {"worker.started:1", ""},
      {"keep.sending:1", ""},
      {"keep.sending:3", ""},
      {"keep.sent:1", ""},
      {"keep.sent:4", ""},
      {"drop.sent:1", ""},
      {"drop.sent:2", ""},
      {"", "keeper.message_received:1"},
      {"", "keeper.message_received:3"},
      {"", "keeper.message_received:6"},
  };
  for (const Case& one : cases) {
    SCOPED_TRACE(absl::StrCat(one.worker_plan, " ", one.keeper_plan));
    StartAgent({one.worker_plan}, one.keeper_plan);
    const pid_t first_keeper = keeper_;
    std::set<std::string> held = HearStart();
    const pid_t first_worker = worker_;
    EXPECT_TRUE(held.empty());
    std::set<std::string> must;
    for (const std::string command :
         {"keep n1", "keep n2", "drop n1", "keep n3", "keep n4", "drop n2", "keep n1", "keep n5"}) {
      const std::string name = command.substr(5);
      const bool keeps = command[0] == 'k';
      if (!keeps) must.erase(name);
      Command(command);
      const nlohmann::json said = Hear();
      ASSERT_TRUE(said.is_object());
      if (said.contains("started")) {  // the worker was killed inside this command
        std::set<std::string> now;
        for (const auto& [kept, contents] : said["held"].items()) now.insert(kept);
        for (const std::string& kept : must) EXPECT_TRUE(now.contains(kept)) << kept;
        for (const std::string& kept : now) {
          EXPECT_TRUE(must.contains(kept) || kept == name) << kept;
        }
        // Goes on from what is there.
        if (keeps != now.contains(name)) {
          Command(command);
          ASSERT_TRUE(Hear().is_object());
        }
      }
      if (keeps) must.insert(name);
    }
    if (one.worker_plan[0] != '\0' && std::string(one.worker_plan) != "worker.started:1") {
      EXPECT_NE(worker_, first_worker) << "the plan missed";
    }
    if (one.keeper_plan[0] != '\0') HearNewKeeper(first_keeper);
    kill(worker_, SIGKILL);
    EXPECT_EQ(HearStart(), must);
    EXPECT_EQ(must, (std::set<std::string>{"n1", "n3", "n4", "n5"}));
    Command("finish 0");
    control_.Reset();
  }
}

// A keeper that dies between the death of one worker and the start of the next is two deaths at
// once; right after the start it is one.
TEST_F(KeeperTest, AKeeperKilledRightAfterItsWorkersStartIsReplaced) {
  StartAgent({}, "keeper.worker_started:2");
  HearStart();
  Command("keep a");
  ASSERT_TRUE(Hear().is_object());
  const pid_t first_keeper = keeper_;
  kill(worker_, SIGKILL);
  EXPECT_EQ(HearStart(), std::set<std::string>{"a"});
  HearNewKeeper(first_keeper);
  kill(worker_, SIGKILL);
  EXPECT_EQ(HearStart(), std::set<std::string>{"a"});
}

TEST_F(KeeperTest, SurvivesARandomSeriesOfKillsWithoutLeakingDescriptors) {
  const unsigned seed = std::random_device{}();
  std::mt19937 random(seed);
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  StartAgent();
  std::set<std::string> must = HearStart();
  const size_t open_at_first = open_at_start_;
  int worker_kills = 0;
  int keeper_kills = 0;
  int next_name = 0;
  constexpr int kInFlightMax = 3;
  for (int round = 0; round < 60; ++round) {
    // Some commands, of which the last few may be in flight when the kill comes.
    std::set<std::string> maybe;
    const int answered = static_cast<int>(random() % 5);
    const int in_flight = static_cast<int>(random() % (kInFlightMax + 1));
    for (int i = 0; i < answered + in_flight; ++i) {
      const bool drops = !must.empty() && random() % 3 == 0;
      const std::string name = drops ? *must.begin() : absl::StrCat("n/", next_name++);
      if (drops) must.erase(name);
      Command(absl::StrCat(drops ? "drop " : "keep ", name));
      if (i < answered) {
        ASSERT_TRUE(Hear().is_object());
        if (!drops) must.insert(name);
      } else {
        maybe.insert(name);
      }
    }
    if (random() % 2 == 0) {
      ++worker_kills;
    } else {
      ++keeper_kills;
      const pid_t before = keeper_;
      kill(before, SIGKILL);
      HearNewKeeper(before);
    }
    // Killing the worker shows what its successor is handed, in both cases.
    kill(worker_, SIGKILL);
    std::set<std::string> held = HearStart();
    for (const std::string& name : must) EXPECT_TRUE(held.contains(name)) << name;
    for (const std::string& name : held) {
      EXPECT_TRUE(must.contains(name) || maybe.contains(name)) << name;
    }
    HearRest(held);
    must = held;
    if (HasFatalFailure() || HasNonfatalFailure()) return;
  }
  EXPECT_GT(worker_kills, 10);
  EXPECT_GT(keeper_kills, 10);
  // What is dropped in the last moment may be counted and not be handed over any more; a leak of
  // one descriptor in ten rounds would be seen.
  EXPECT_LE(open_at_start_, open_at_first + must.size() + 2 + kInFlightMax);
}

TEST_F(KeeperTest, FinishEndsBothWithTheWorkersCode) {
  StartAgent();
  HearStart();
  const pid_t keeper = keeper_;
  Command("finish 7");
  int status = 0;
  ASSERT_EQ(waitpid(keeper, &status, 0), keeper);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 7);
}

TEST_F(KeeperTest, FinishWorksAfterTheKeeperWasReplaced) {
  StartAgent();
  HearStart();
  const pid_t first = keeper_;
  kill(first, SIGKILL);
  HearNewKeeper(first);
  const UniqueFd second = std::move(*OpenPidfd(keeper_));
  Command("finish 0");
  EXPECT_TRUE(WaitUntilDead(second.get(), absl::Seconds(120)));
}

TEST_F(KeeperTest, AWorkerThatDoesNotEndAfterTermIsKilledAtTheDeadline) {
  setenv("KEEPER_TEST_IMPATIENT", "1", 1);
  StartAgent();
  unsetenv("KEEPER_TEST_IMPATIENT");
  HearStart();
  const pid_t keeper = keeper_;
  kill(keeper, SIGTERM);  // the test's worker ignores it
  int status = 0;
  ASSERT_EQ(waitpid(keeper, &status, 0), keeper);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1);
}

TEST_F(KeeperTest, DropsWhatKillsEveryWorkerAndThenGivesUp) {
  setenv("KEEPER_TEST_QUICK_DEATHS", "4", 1);
  StartAgent({"", "worker.started", "worker.started", "worker.started"});
  unsetenv("KEEPER_TEST_QUICK_DEATHS");
  HearStart();
  Command("keep a");
  ASSERT_TRUE(Hear().is_object());
  kill(worker_, SIGKILL);
  EXPECT_TRUE(HearStart().empty());  // the fifth start, after four quick deaths
  int status = 0;
  for (int i = 0; i < 4; ++i) {
    if (i > 0) HearStart();
    Command("die");
  }
  ASSERT_EQ(waitpid(keeper_, &status, 0), keeper_);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1);
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[2]) == "--handover") {
    return holdfast::RunRole(argv[1], std::atoi(argv[3]));
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
