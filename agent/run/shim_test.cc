// Goal: whatever dies, how a rank ended is known, its output is kept, and nothing of it goes on.
// Method: the real program with real ranks (mostly shells), started as the agent starts it; the
// test is the agent, or has one that it kills. Waits are for events, with a deadline.
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "agent/process.h"
#include "agent/run/fields.h"
#include "agent/run/process_tree.h"
#include "agent/run/shim_client.h"
#include "base/check.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(120);

std::string Contents(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// For what no descriptor tells: a file's contents, a stranger's end.
bool Eventually(const std::function<bool()>& condition) {
  const absl::Time end = absl::Now() + kPatience;
  while (!condition()) {
    if (absl::Now() > end) return false;
    poll(nullptr, 0, 5);
  }
  return true;
}

bool IsGone(pid_t process) {
  const char state = ProcessState(process);
  return state == 0 || state == 'Z';
}

// One rank under a shim.
class TestShim {
 public:
  TestShim() {
    spec_.rank = 3;
    spec_.directory = place_.Join("rank-3");
    spec_.log_directory = place_.Join("logs/deep/3");
    spec_.working_directory = place_.path();
    spec_.environment = {"PATH=/usr/bin:/bin", "PLACE=" + place_.path()};
    CHECK(mkdir(spec_.directory.c_str(), 0700) == 0);
  }
  ~TestShim() {
    if (!child_.pidfd) return;
    // Its ranks die with it. A rank that the shim has ended is gone by then anyway.
    SendSignal(child_.pidfd.get(), SIGKILL);
    WaitUntilDead(child_.pidfd.get(), kPatience);
    Reap(child_.pidfd.get());
  }

  void Start(const std::string& shell) {
    spec_.command = {"sh", "-c", shell};
    StartAsIs();
  }
  void StartAsIs() {
    absl::StatusOr<Child> child = StartShim(HOLDFAST_TEST_SHIM, spec_);
    ASSERT_OK(child.status());
    child_ = *std::move(child);
    Connect();
  }
  void Connect() {
    absl::StatusOr<UniqueFd> connection = ConnectToShim(spec_.directory);
    ASSERT_OK(connection.status());
    connection_ = *std::move(connection);
  }

  // The first state for which `wanted` holds; one with magic 0 if the shim ended before, or never
  // came to it.
  ShimState Await(const std::function<bool(const ShimState&)>& wanted) {
    const absl::Time end = absl::Now() + kPatience;
    while (absl::Now() < end) {
      const ShimMessage message = ReceiveFromShim(connection_.get());
      if (message.kind == ShimMessage::Kind::kEnd) return {};
      if (message.kind == ShimMessage::Kind::kState && wanted(message.state)) return message.state;
      pollfd entry{connection_.get(), POLLIN, 0};
      if (message.kind == ShimMessage::Kind::kNothing) poll(&entry, 1, 100);
    }
    return {};
  }
  ShimState AwaitStart() {
    return Await([](const ShimState& state) { return state.started_ns != 0; });
  }
  ShimState AwaitEnd() {
    return Await([](const ShimState& state) { return state.has_ended != 0; });
  }
  ShimState AwaitTreeEnd() {
    return Await([](const ShimState& state) { return state.tree_has_ended != 0; });
  }
  void Ask(ShimRequestType type, int signal_number = 0) {
    ASSERT_TRUE(SendToShim(connection_.get(), type, signal_number));
  }
  // A number that a process of the rank has written to a file of that name.
  pid_t PidIn(const std::string& name) {
    int pid = 0;
    EXPECT_TRUE(Eventually([&] {
      const std::string text = Contents(place_.Join(name));
      return !text.empty() && text.back() == '\n' && absl::SimpleAtoi(text, &pid);
    })) << name;
    return pid;
  }
  std::string Log(const char* name) const { return Contents(spec_.log_directory + "/" + name); }

  TemporaryDirectory place_;
  ShimSpec spec_;
  Child child_;
  UniqueFd connection_;
};

// ---- How it ended

TEST(ShimTest, TellsAndRecordsHowEveryRankEnded) {
  struct Case {
    const char* shell;
    int wait_status;
  };
  for (const Case& one : {Case{"exit 0", 0}, Case{"exit 7", 7 << 8}, Case{"exit 255", 255 << 8},
                          Case{"kill -KILL $$", SIGKILL}, Case{"kill -TERM $$", SIGTERM},
                          Case{"ulimit -c 0; kill -SEGV $$", SIGSEGV}}) {
    SCOPED_TRACE(one.shell);
    TestShim shim;
    shim.Start(one.shell);
    const ShimState state = shim.AwaitTreeEnd();
    EXPECT_EQ(state.wait_status, one.wait_status);
    EXPECT_EQ(state.rank, 3u);
    EXPECT_EQ(state.start_error, 0);
    EXPECT_LE(state.started_ns, state.ended_ns);
    const std::optional<ExitRecord> record = ReadExitRecord(shim.spec_.directory);
    ASSERT_TRUE(record.has_value());
    EXPECT_EQ(record->wait_status, one.wait_status);
    EXPECT_EQ(record->rank, 3u);
    EXPECT_EQ(record->rank_pid, state.rank_pid);
    EXPECT_EQ(record->ended_ns, state.ended_ns);
    // Nobody has taken it yet.
    EXPECT_FALSE(IsDead(shim.child_.pidfd.get()));
    shim.Ask(ShimRequestType::kRelease);
    EXPECT_TRUE(WaitUntilDead(shim.child_.pidfd.get(), kPatience));
    EXPECT_TRUE(ReadExitRecord(shim.spec_.directory).has_value());
    EXPECT_THAT(ConnectToShim(shim.spec_.directory).status(), testing::Not(IsOk()));
  }
}

TEST(ShimTest, ARankThatCannotBeStartedIsSaidToBeSo) {
  TestShim shim;
  shim.spec_.command = {"no-such-program-of-holdfast"};
  shim.StartAsIs();
  const ShimState state = shim.AwaitTreeEnd();
  EXPECT_EQ(state.start_error, ENOENT);
  EXPECT_EQ(state.wait_status, 127 << 8);
  EXPECT_EQ(state.rank_pid, 0);
  EXPECT_EQ(ReadExitRecord(shim.spec_.directory)->start_error, ENOENT);

  TestShim elsewhere;
  elsewhere.spec_.working_directory = "/no/such/directory";
  elsewhere.Start("exit 0");
  EXPECT_EQ(elsewhere.AwaitTreeEnd().start_error, ENOENT);
}

TEST(ShimTest, AnExitIsKnownAfterItsAgentWasKilled) {
  TestShim shim;
  shim.spec_.command = {"sh", "-c", "read line <$PLACE/go; echo after; exit 23"};
  ASSERT_EQ(mkfifo(shim.place_.Join("go").c_str(), 0600), 0);
  // An agent that starts the shim, and is no more.
  const pid_t agent = fork();
  ASSERT_GE(agent, 0);
  if (agent == 0) {
    const absl::StatusOr<Child> child = StartShim(HOLDFAST_TEST_SHIM, shim.spec_);
    kill(getpid(), child.ok() ? SIGKILL : SIGABRT);
  }
  int status = 0;
  ASSERT_EQ(waitpid(agent, &status, 0), agent);
  ASSERT_EQ(WTERMSIG(status), SIGKILL);
  shim.Connect();
  EXPECT_EQ(shim.AwaitStart().has_ended, 0);
  shim.connection_.Reset();
  // The rank writes, and ends, while there is nobody.
  ASSERT_EQ(system(absl::StrCat("echo >", shim.place_.Join("go")).c_str()), 0);
  ASSERT_TRUE(Eventually([&] { return ReadExitRecord(shim.spec_.directory).has_value(); }));
  EXPECT_EQ(ReadExitRecord(shim.spec_.directory)->wait_status, 23 << 8);
  EXPECT_EQ(shim.Log("stdout.log"), "after\n");
  shim.Connect();
  EXPECT_EQ(shim.AwaitEnd().wait_status, 23 << 8);
  shim.Ask(ShimRequestType::kRelease);
  EXPECT_EQ(shim.Await([](const ShimState&) { return false; }).magic, 0u);  // it has ended
}

TEST(ShimTest, AnExitThatCannotBeRecordedIsKeptByTheShim) {
  TestShim shim;
  shim.spec_.linger_seconds = 0;  // with a record it would end at once
  ASSERT_EQ(mkfifo(shim.place_.Join("go").c_str(), 0600), 0);
  shim.Start("read line <$PLACE/go; exit 9");
  ASSERT_NE(shim.AwaitStart().rank_pid, 0);
  std::filesystem::remove_all(shim.spec_.directory);
  ASSERT_EQ(system(absl::StrCat("echo >", shim.place_.Join("go")).c_str()), 0);
  const ShimState state = shim.AwaitEnd();
  EXPECT_EQ(state.wait_status, 9 << 8);
  EXPECT_EQ(state.is_recorded, 0);
  EXPECT_FALSE(IsDead(shim.child_.pidfd.get()));
  shim.Ask(ShimRequestType::kRelease);
  EXPECT_TRUE(WaitUntilDead(shim.child_.pidfd.get(), kPatience));
}

TEST(ShimTest, WithARecordOnDiskItWaitsForNobodyLongerThanItShould) {
  TestShim shim;
  shim.spec_.linger_seconds = 0;
  ASSERT_EQ(mkfifo(shim.place_.Join("go").c_str(), 0600), 0);
  shim.Start("read line <$PLACE/go; exit 4");  // not before we are connected
  ASSERT_EQ(system(absl::StrCat("echo >", shim.place_.Join("go")).c_str()), 0);
  EXPECT_TRUE(WaitUntilDead(shim.child_.pidfd.get(), kPatience));
  EXPECT_EQ(ReadExitRecord(shim.spec_.directory)->wait_status, 4 << 8);
}

// ---- Trees

// A rank with a child in a session of its own, whose child is an orphan and ignores TERM.
constexpr char kTree[] =
    "setsid sh -c 'trap \"\" TERM; (trap \"\" TERM; sh -c \"echo \\$PPID\" >$PLACE/orphan; "
    "while :; do read -t 1 x </dev/zero; done) & exit' ; trap '' TERM; echo $$ >$PLACE/rank; "
    "while :; do sleep 100; done";

TEST(ShimTest, AWholeTreeIsEnded) {
  TestShim shim;
  shim.Start(kTree);
  const pid_t rank = shim.PidIn("rank");
  const pid_t orphan = shim.PidIn("orphan");
  ASSERT_EQ(rank, shim.AwaitStart().rank_pid);
  ASSERT_FALSE(IsGone(orphan));
  shim.Ask(ShimRequestType::kSignal, SIGTERM);  // which it ignores
  EXPECT_FALSE(IsGone(rank));
  shim.Ask(ShimRequestType::kKillTree);
  const ShimState state = shim.AwaitTreeEnd();
  EXPECT_EQ(state.wait_status, SIGKILL);
  EXPECT_TRUE(IsGone(rank));
  EXPECT_TRUE(IsGone(orphan));
}

TEST(ShimTest, WhatARankLeavesBehindIsEndedWithItsRelease) {
  TestShim shim;
  shim.Start("(sh -c 'echo $PPID' >$PLACE/left; exec sleep 1000) & exit 5");
  const pid_t left = shim.PidIn("left");
  const ShimState state = shim.AwaitEnd();
  EXPECT_EQ(state.wait_status, 5 << 8);
  EXPECT_EQ(state.tree_has_ended, 0);
  EXPECT_FALSE(IsGone(left));
  shim.Ask(ShimRequestType::kRelease);
  EXPECT_TRUE(WaitUntilDead(shim.child_.pidfd.get(), kPatience));
  EXPECT_TRUE(IsGone(left));
}

TEST(ShimTest, AStoppedRankIsKilledAtOnceWhereATermCannotReachIt) {
  TestShim shim;
  shim.Start("trap 'exit 3' TERM; echo $$ >$PLACE/rank; while :; do sleep 0.01; done");
  const pid_t rank = shim.PidIn("rank");
  ASSERT_EQ(kill(rank, SIGSTOP), 0);
  ASSERT_TRUE(Eventually([&] { return ProcessState(rank) == 'T'; }));
  shim.Ask(ShimRequestType::kSignal, SIGTERM);
  EXPECT_EQ(shim.AwaitEnd().wait_status, SIGKILL);

  TestShim running;
  running.Start("trap 'exit 3' TERM; echo $$ >$PLACE/rank; while :; do sleep 0.01; done");
  running.PidIn("rank");
  running.Ask(ShimRequestType::kSignal, SIGTERM);
  EXPECT_EQ(running.AwaitEnd().wait_status, 3 << 8);
}

TEST(ShimTest, ARankDiesWithItsShimAndNothingElseKillsAShim) {
  TestShim shim;
  shim.Start("echo $$ >$PLACE/rank; exec sleep 1000");
  const pid_t rank = shim.PidIn("rank");
  for (const int number : {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGPIPE, SIGUSR1, SIGUSR2}) {
    SendSignal(shim.child_.pidfd.get(), number);
  }
  shim.Ask(ShimRequestType::kWatch);
  shim.connection_.Reset();
  shim.Connect();
  EXPECT_EQ(shim.AwaitStart().rank_pid, rank);
  SendSignal(shim.child_.pidfd.get(), SIGKILL);
  EXPECT_TRUE(Eventually([&] { return IsGone(rank); }));
}

// ---- Output

TEST(ShimTest, TheLastWordsOfAKilledRankAreInItsLogBeforeItsEndIsTold) {
  TestShim shim;
  shim.Start("echo one; echo two >&2; printf 'no newline'; kill -KILL $$");
  EXPECT_EQ(shim.AwaitEnd().wait_status, SIGKILL);
  EXPECT_EQ(shim.Log("stdout.log"), "one\nno newline");
  EXPECT_EQ(shim.Log("stderr.log"), "two\n");
}

TEST(ShimTest, NothingOfMuchOutputIsLostAndLogsAreBounded) {
  TestShim shim;
  shim.Start("seq 1 2000000; seq 1 1000 >&2");
  ShimState state = shim.AwaitTreeEnd();
  EXPECT_EQ(state.output_bytes_dropped, 0u);
  std::string expected;
  for (int i = 1; i <= 2'000'000; ++i) absl::StrAppend(&expected, i, "\n");
  EXPECT_TRUE(shim.Log("stdout.log") == expected);  // not printed: 15 MB

  TestShim bounded;
  bounded.spec_.log_bytes_max = 1 << 20;
  bounded.Start("seq 1 2000000");
  state = bounded.AwaitTreeEnd();
  EXPECT_EQ(state.output_bytes, expected.size());
  const std::string last = bounded.Log("stdout.log.1") + bounded.Log("stdout.log");
  EXPECT_LE(last.size(), 2u << 20);
  EXPECT_GT(last.size(), 1u << 20);
  EXPECT_TRUE(expected.ends_with(last));
}

TEST(ShimTest, ALogThatHangsHoldsUpNeitherTheRankNorItsEnd) {
  TestShim shim;
  std::filesystem::create_directories(shim.spec_.log_directory);
  // Whoever opens it for writing hangs, because nobody reads it.
  ASSERT_EQ(mkfifo((shim.spec_.log_directory + "/stdout.log").c_str(), 0600), 0);
  shim.Start("seq 1 4000000; echo done >$PLACE/done; exec sleep 1000");
  EXPECT_TRUE(Eventually([&] { return Contents(shim.place_.Join("done")) == "done\n"; }));
  shim.Ask(ShimRequestType::kKillTree);
  const ShimState state = shim.AwaitEnd();
  EXPECT_EQ(state.wait_status, SIGKILL);
  EXPECT_GT(state.output_bytes, 28u << 20);
  EXPECT_GT(state.output_bytes_dropped, 16u << 20);
  EXPECT_TRUE(ReadExitRecord(shim.spec_.directory).has_value());
}

// ---- What a rank finds

TEST(ShimTest, ARankFindsWhatItsSpecSaysAndNothingElse) {
  TestShim shim;
  // As the agent: its ranks are not.
  const sched_param no_priority{};
  ASSERT_EQ(sched_setscheduler(0, SCHED_BATCH, &no_priority), 0);
  shim.spec_.umask = 0027;
  shim.spec_.limits = {{7 /* RLIMIT_NOFILE */, 77}};
  shim.spec_.environment.push_back("ODD=a b\nc=\xff");
  shim.Start(
      "pwd; umask; ulimit -n; printf %s \"$ODD\" | od -An -c; readlink /proc/self/fd/0; "
      "ls /proc/self/fd | wc -l; env | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status | "
      // Without the two signals that glibc keeps for itself.
      "sed s/0000000[01][08]0000000/0000000000000000/; "
      "ps -o sid= -p $$ | grep -cw $$; ps -o cls= -p $$ | tr -d ' '");
  shim.AwaitTreeEnd();
  EXPECT_EQ(shim.Log("stdout.log"),
            absl::StrCat(shim.place_.path(),
                         "\n0027\n77\n   a       b  \\n   c   = 377\n/dev/null\n4\n5\n"
                         "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n1\nTS\n"))
      << shim.Log("stderr.log");
}

TEST(ShimTest, NobodysNonsenseEndsAShim) {
  TestShim shim;
  shim.Start("read line <$PLACE/go; exit 1");
  ASSERT_EQ(mkfifo(shim.place_.Join("go").c_str(), 0600), 0);
  ASSERT_NE(shim.AwaitStart().rank_pid, 0);
  std::vector<UniqueFd> others;
  for (int i = 0; i < 20; ++i) {
    absl::StatusOr<UniqueFd> other = ConnectToShim(shim.spec_.directory);
    ASSERT_OK(other.status());
    [[maybe_unused]] const ssize_t sent =
        write(other->get(), "nonsense that is too long for it", 7 + i);
    others.push_back(*std::move(other));
  }
  EXPECT_TRUE(Eventually([&] {
    shim.Connect();
    return shim.AwaitStart().rank_pid != 0;
  }));
}

// ---- What is written

TEST(ShimProtocolTest, ARecordThatIsNotWholeIsNone) {
  const ExitRecord record{2, 1234, 9, 0, 17, 99};
  const std::string text = EncodeExitRecord(record);
  EXPECT_EQ(DecodeExitRecord(text)->ended_ns, 99);
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_FALSE(DecodeExitRecord(text.substr(0, length)).has_value()) << length;
  }
}

TEST(ShimProtocolTest, ASpecComesBackAsItWas) {
  ShimSpec spec;
  spec.rank = 11;
  spec.listener = 5;
  spec.directory = "/run/a";
  spec.log_directory = "/log/=b";
  spec.working_directory = "/";
  spec.limits = {{7, UINT64_MAX}, {3, 0}};
  spec.command = {"a", "", "c d"};
  spec.environment = {"X=1=2", "Y="};
  const std::string bytes = EncodeShimSpec(spec);
  const std::optional<ShimSpec> back = DecodeShimSpec(bytes);
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(EncodeShimSpec(*back), bytes);
  EXPECT_EQ(back->command, spec.command);
  EXPECT_EQ(back->environment, spec.environment);
  EXPECT_EQ(back->limits[0].soft, UINT64_MAX);
  EXPECT_FALSE(DecodeShimSpec(bytes.substr(0, bytes.size() - 1)).has_value());
  spec.command.clear();
  EXPECT_FALSE(DecodeShimSpec(EncodeShimSpec(spec)).has_value());
}

}  // namespace
}  // namespace holdfast
