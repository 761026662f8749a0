// The kernel's word on processes: real ones, in every state that can be made here.
#include "agent/monitor/process_witness.h"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/process.h"
#include "base/clock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using monitor::ProcessState;

constexpr char kLine[] =
    "4242 (a) S (b) T 1 4242 4242 0 -1 4194304 100 0 0 0 150 50 0 0 20 0 3 0 12345 1000 200";

TEST(ParseStatTest, StateAndTimeLieBehindTheLastBracket) {
  const auto testimony = ParseStat(kLine, 100);
  ASSERT_TRUE(testimony.has_value());
  EXPECT_EQ(testimony->state, ProcessState::kStopped);
  EXPECT_EQ(testimony->cpu_us, 2'000'000u);
  const std::string line = kLine;
  const size_t at = line.find("T 1 4242");
  const std::pair<char, ProcessState> states[] = {
      {'R', ProcessState::kRunning}, {'S', ProcessState::kSleeping}, {'D', ProcessState::kBlocked},
      {'t', ProcessState::kStopped}, {'Z', ProcessState::kGone},     {'I', ProcessState::kSleeping},
      {'X', ProcessState::kGone},    {'?', ProcessState::kUnknown}};
  for (const auto& [letter, state] : states) {
    std::string changed = line;
    changed[at] = letter;
    EXPECT_EQ(ParseStat(changed, 100)->state, state) << letter;
  }
  // What is no such line, cut off anywhere before its times.
  for (size_t length = 0; length < line.find(" 0 0 20 0 3"); ++length) {
    const auto cut = ParseStat(line.substr(0, length), 100);
    EXPECT_TRUE(!cut.has_value() || cut->cpu_us < 2'000'000u) << length;
  }
  EXPECT_FALSE(ParseStat("4242 (a)", 100).has_value());
  EXPECT_FALSE(ParseStat("1 (a) S 1 2 3 4 5 6 7 8 9 10 x y", 100).has_value());
}

TEST(ParseRunDelayTest, TheSecondNumberIsIt) {
  EXPECT_EQ(ParseRunDelayNs("11 2222 33\n"), 2222u);
  EXPECT_EQ(ParseRunDelayNs("0 0 0\n"), 0u);
  for (const char* line : {"", "1", "1 2", "1 2 3 4", "a b c", "1 -2 3"}) {
    EXPECT_FALSE(ParseRunDelayNs(line).has_value()) << line;
  }
}

// A forked process, killed at the end.
class Child {
 public:
  explicit Child(const std::function<void()>& body) : pid_(fork()) {
    if (pid_ == 0) {
      body();
      _exit(0);
    }
    pidfd_ = *OpenPidfd(pid_);
  }
  ~Child() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  pid_t pid() const { return pid_; }
  int pidfd() const { return pidfd_.get(); }

 private:
  pid_t pid_;
  UniqueFd pidfd_;
};

bool WaitUntil(const std::function<bool()>& holds) {
  const absl::Duration end = RealClock().Elapsed() + absl::Seconds(60);
  while (!holds()) {
    if (RealClock().Elapsed() > end) return false;
    poll(nullptr, 0, 2);
  }
  return true;
}

cpu_set_t FirstProcessor() {
  cpu_set_t all;
  EXPECT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
  cpu_set_t first;
  CPU_ZERO(&first);
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &all) != 0 && CPU_COUNT(&first) == 0) CPU_SET(i, &first);
  }
  return first;
}

void Spin() {
  for (std::atomic<uint64_t> turns{0};;) turns.fetch_add(1);
}

TEST(ProcessWitnessTest, StatesOfAProcessAreSeen) {
  Child child([] {
    for (;;) pause();
  });
  ProcessWitness witness(child.pidfd(), static_cast<uint32_t>(child.pid()));
  const auto state = [&] { return witness.Look({}, absl::ZeroDuration()).state; };
  EXPECT_TRUE(WaitUntil([&] { return state() == ProcessState::kSleeping; }));
  kill(child.pid(), SIGSTOP);
  EXPECT_TRUE(WaitUntil([&] { return state() == ProcessState::kStopped; }));
  kill(child.pid(), SIGCONT);
  EXPECT_TRUE(WaitUntil([&] { return state() == ProcessState::kSleeping; }));
  kill(child.pid(), SIGKILL);
  EXPECT_TRUE(WaitUntil([&] { return state() == ProcessState::kGone; }));
  waitpid(child.pid(), nullptr, 0);
  EXPECT_EQ(state(), ProcessState::kGone) << "its number is free now";
}

// Whoever takes its stack holds it for less than the time between two looks; a debugger for longer.
TEST(ProcessWitnessTest, WhoIsHeldByATracerIsStoppedFromTheSecondLookOn) {
  Child child([] {
    for (;;) pause();
  });
  ProcessWitness witness(child.pidfd(), static_cast<uint32_t>(child.pid()));
  const auto look = [&] { return witness.Look({}, absl::ZeroDuration()); };
  EXPECT_TRUE(WaitUntil([&] { return look().state == ProcessState::kSleeping; }));
  if (ptrace(PTRACE_SEIZE, child.pid(), nullptr, nullptr) != 0) {
    GTEST_SKIP() << "ptrace is not permitted here";
  }
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(ptrace(PTRACE_INTERRUPT, child.pid(), nullptr, nullptr), 0);
    ASSERT_EQ(waitpid(child.pid(), nullptr, __WALL), child.pid());
    const ProcessTestimony first = look();
    EXPECT_TRUE(first.is_traced);
    EXPECT_EQ(first.state, ProcessState::kSleeping);
    EXPECT_EQ(look().state, ProcessState::kStopped);
    EXPECT_EQ(look().state, ProcessState::kStopped);
    ASSERT_EQ(ptrace(PTRACE_CONT, child.pid(), nullptr, nullptr), 0);
    EXPECT_TRUE(WaitUntil([&] { return !look().is_traced; }));
  }
}

// Its stack is taken because it is stopped: it must not seem to run meanwhile.
TEST(ProcessWitnessTest, WhoWasStoppedBeforeATracerCameIsStoppedAllTheTime) {
  Child child([] {
    for (;;) pause();
  });
  ProcessWitness witness(child.pidfd(), static_cast<uint32_t>(child.pid()));
  const auto look = [&] { return witness.Look({}, absl::ZeroDuration()); };
  kill(child.pid(), SIGSTOP);
  EXPECT_TRUE(WaitUntil([&] { return look().state == ProcessState::kStopped; }));
  for (int i = 0; i < 2; ++i) {
    if (ptrace(PTRACE_SEIZE, child.pid(), nullptr, nullptr) != 0) {
      GTEST_SKIP() << "ptrace is not permitted here";
    }
    ASSERT_EQ(ptrace(PTRACE_INTERRUPT, child.pid(), nullptr, nullptr), 0);
    ASSERT_EQ(waitpid(child.pid(), nullptr, __WALL), child.pid());
    const ProcessTestimony first = look();
    EXPECT_TRUE(first.is_traced);
    EXPECT_EQ(first.state, ProcessState::kStopped);
    EXPECT_EQ(look().state, ProcessState::kStopped);
    ASSERT_EQ(ptrace(PTRACE_DETACH, child.pid(), nullptr, nullptr), 0);
    // It wakes up for an instant to stop again.
    EXPECT_TRUE(WaitUntil([&] {
      const ProcessTestimony free = look();
      return !free.is_traced && free.state == ProcessState::kStopped;
    }));
  }
  kill(child.pid(), SIGCONT);
  EXPECT_TRUE(WaitUntil([&] { return look().state == ProcessState::kSleeping; }));
}

// A child of the agent takes the stack, and the machine is slow.
TEST(ProcessWitnessTest, WhomAnOwnChildHoldsIsNotStopped) {
  Child child([] {
    for (;;) pause();
  });
  ProcessWitness witness(child.pidfd(), static_cast<uint32_t>(child.pid()));
  const auto look = [&] { return witness.Look({}, absl::ZeroDuration()); };
  EXPECT_TRUE(WaitUntil([&] { return look().state == ProcessState::kSleeping; }));
  int may_trace[2];
  ASSERT_EQ(pipe(may_trace), 0);
  Child tracer([&] {
    const bool traces = ptrace(PTRACE_SEIZE, child.pid(), nullptr, nullptr) == 0 &&
                        ptrace(PTRACE_INTERRUPT, child.pid(), nullptr, nullptr) == 0;
    if (write(may_trace[1], traces ? "y" : "n", 1) == 1) pause();
  });
  char answer = 0;
  ASSERT_EQ(read(may_trace[0], &answer, 1), 1);
  close(may_trace[0]);
  close(may_trace[1]);
  if (answer != 'y') GTEST_SKIP() << "ptrace is not permitted here";
  EXPECT_TRUE(WaitUntil([&] { return look().is_traced; }));
  for (int i = 0; i < 10; ++i) {
    const ProcessTestimony held = look();
    ASSERT_TRUE(held.is_traced);
    EXPECT_EQ(held.state, ProcessState::kSleeping);
  }
  kill(tracer.pid(), SIGKILL);
  EXPECT_TRUE(WaitUntil([&] {
    const ProcessTestimony free = look();
    EXPECT_NE(free.state, ProcessState::kStopped);
    return !free.is_traced && free.state == ProcessState::kSleeping;
  }));
}

TEST(ProcessWitnessTest, WhoIsDeadBeforeHasNoWitness) {
  Child child([] {});
  EXPECT_TRUE(WaitUntil([&] { return IsDead(child.pidfd()); }));
  ProcessWitness witness(child.pidfd(), static_cast<uint32_t>(child.pid()));
  EXPECT_EQ(witness.Look({}, absl::ZeroDuration()).state, ProcessState::kUnknown);
}

TEST(ProcessWitnessTest, CpuTimeOfABusyProcessMoves) {
  Child child(Spin);
  ProcessWitness witness(child.pidfd(), static_cast<uint32_t>(child.pid()));
  EXPECT_TRUE(WaitUntil([&] { return witness.Look({}, absl::ZeroDuration()).cpu_us >= 30'000; }));
}

// Two of one processor: the thread is ready to run for half of the time and does not.
TEST(ProcessWitnessTest, AThreadThatGetsNoProcessorIsSeen) {
  const cpu_set_t one = FirstProcessor();
  const auto spin_there = [&] {
    sched_setaffinity(0, sizeof(one), &one);
    Spin();
  };
  Child starved(spin_there);
  Child rival(spin_there);
  const std::vector<uint32_t> threads = {static_cast<uint32_t>(starved.pid())};
  ProcessWitness witness(starved.pidfd(), static_cast<uint32_t>(starved.pid()));
  EXPECT_EQ(witness.Look(threads, absl::ZeroDuration()).run_delay_us, 0u);
  EXPECT_TRUE(WaitUntil(
      [&] { return witness.Look(threads, absl::ZeroDuration()).run_delay_us >= 20'000; }));
  // By its number in another namespace: 1 there. (NSpid has one number only here: not found.)
  ProcessWitness elsewhere(starved.pidfd(), 1);
  const std::vector<uint32_t> unknown = {1};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(elsewhere.Look(unknown, absl::Seconds(20 * i)).run_delay_us, 0u);
  }
}

// In a pid namespace of its own the process is 1 to itself; its thread is found by NSpid.
TEST(ProcessWitnessTest, ThreadsOfAnotherPidNamespaceAreFound) {
  // clone3 without a stack of its own: as fork, in a new namespace.
  const pid_t pid = static_cast<pid_t>(
      syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, nullptr, nullptr, nullptr, nullptr));
  if (pid < 0) GTEST_SKIP() << "a new pid namespace needs root";
  if (pid == 0) Spin();
  {
    const UniqueFd pidfd = *OpenPidfd(pid);
    ProcessWitness witness(pidfd.get(), 1);
    const std::vector<uint32_t> threads = {1};
    EXPECT_EQ(witness.Look(threads, absl::Seconds(0)).state, ProcessState::kRunning);
    // It competes with another one for one processor.
    const cpu_set_t first = FirstProcessor();
    sched_setaffinity(pid, sizeof(first), &first);
    Child rival([&] {
      sched_setaffinity(0, sizeof(first), &first);
      Spin();
    });
    EXPECT_TRUE(
        WaitUntil([&] { return witness.Look(threads, absl::Seconds(0)).run_delay_us >= 20'000; }));
  }
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

}  // namespace
}  // namespace holdfast
