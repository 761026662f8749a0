// holdfastd itself, as a person or the hook library starts it. Trainers are in tests/kill.
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "agent/log.h"
#include "agent/packet.h"
#include "agent/peer.h"
#include "agent/process.h"
#include "agent/runtime_directory.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/crc32c.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

constexpr absl::Duration kDeadline = absl::Seconds(120);

bool WaitUntil(const std::function<bool()>& holds) {
  const absl::Duration end = RealClock().Elapsed() + kDeadline;
  while (!holds()) {
    if (RealClock().Elapsed() > end) return false;
    poll(nullptr, 0, 2);
  }
  return true;
}

std::string ReadText(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

size_t DescriptorsOf(pid_t pid) {
  size_t count = 0;
  DIR* const directory = opendir(absl::StrCat("/proc/", pid, "/fd").c_str());
  if (directory == nullptr) return 0;
  while (readdir(directory) != nullptr) ++count;
  closedir(directory);
  return count;
}

// A started holdfastd: its process, and what it writes to standard output and error together.
struct Started {
  pid_t pid = -1;
  UniqueFd output;
};

class DaemonTest : public ::testing::Test {
 protected:
  DaemonTest() {
    std::string name = absl::StrCat(HOLDFAST_TEST_DIRECTORY, "/daemon-test-XXXXXX");
    CHECK(mkdtemp(name.data()) != nullptr);
    directory_ = std::filesystem::canonical(name).string();
    socket_ = absl::StrCat(directory_, "/run/agent.sock");
    environment_ = {{"HOME", directory_},
                    {"XDG_STATE_HOME", absl::StrCat(directory_, "/state")},
                    {"HOLDFAST_LINGER", "50ms"},
                    {"HOLDFAST_HOST_MEMORY", "16MiB"}};
  }
  ~DaemonTest() override {
    KillAgent();
    std::filesystem::remove_all(directory_);
  }

  // Keeper and worker start each other: both stand still before either is killed. Again and again,
  // as one of them may just have been replaced.
  void KillAgent() {
    WaitUntil([this] {
      const json status = Query();
      for (const int number : {SIGSTOP, SIGKILL}) {
        for (const char* key : {"keeper_pid", "worker_pid"}) {
          if (status.is_object() && status["agent"][key] > 0) {
            kill(status["agent"][key].get<pid_t>(), number);
          }
        }
      }
      return !AgentLives();
    });
  }

  Started Start(std::vector<std::string> arguments) {
    int ends[2];
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
      dup2(ends[1], STDOUT_FILENO);
      dup2(ends[1], STDERR_FILENO);
      for (const auto& [name, value] : environment_) setenv(name.c_str(), value.c_str(), 1);
      std::vector<char*> pointers = {const_cast<char*>("holdfastd")};
      for (std::string& argument : arguments) pointers.push_back(argument.data());
      pointers.push_back(nullptr);
      execv(HOLDFAST_TEST_DAEMON, pointers.data());
      _exit(127);
    }
    close(ends[1]);
    return {pid, UniqueFd(ends[0])};
  }

  struct Ended {
    int exit_code = -1;
    std::string output;
  };
  // Waits for the process that was started (not for an agent that it left behind).
  static Ended Finish(Started started) {
    Ended ended;
    int status = 0;
    CHECK(waitpid(started.pid, &status, 0) == started.pid);
    ended.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    fcntl(started.output.get(), F_SETFL, O_NONBLOCK);
    char bytes[4096];
    for (;;) {
      const ssize_t got = read(started.output.get(), bytes, sizeof(bytes));
      if (got <= 0) return ended;
      ended.output.append(bytes, static_cast<size_t>(got));
    }
  }
  Ended Run(std::vector<std::string> arguments) { return Finish(Start(std::move(arguments))); }

  std::vector<std::string> PrivateArguments() const {
    return {"--private",
            "--socket",
            socket_,
            "--job",
            "job",
            "--root",
            absl::StrCat(directory_, "/root")};
  }

  UniqueFd Connect() const {
    UniqueFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    // Through a descriptor, as the checkout may lie anywhere.
    const UniqueFd file(open(socket_.c_str(), O_PATH | O_CLOEXEC));
    if (!file) return UniqueFd();
    const std::string path = absl::StrCat("/proc/self/fd/", file.get());
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, path.size());
    if (connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
      return UniqueFd();
    }
    return socket;
  }

  // Waits for one reply.
  static Received Hear(const UniqueFd& socket) {
    pollfd entry{socket.get(), POLLIN, 0};
    poll(&entry, 1, static_cast<int>(absl::ToInt64Milliseconds(kDeadline)));
    return ReceivePacket(socket.get());
  }

  // The agent's status; null if it cannot be had now.
  json Query() const {
    const UniqueFd socket = Connect();
    const abi::QueryRequest request{abi::QueryKind::kStatus, 0};
    if (!socket ||
        SendPacket(socket.get(), Packet{abi::MessageType::kQuery, 1, BodyBytes(request), {}}) !=
            Sent::kYes) {
      return json();
    }
    const Received received = Hear(socket);
    if (received.kind != Received::Kind::kPacket || received.packet.fds.size() != 1) return json();
    const absl::StatusOr<std::string> text = ReadAll(received.packet.fds[0].get(), 1 << 20);
    return text.ok() ? json::parse(*text, nullptr, false) : json();
  }

  bool AgentLives() const {
    const UniqueFd lock(open(absl::StrCat(socket_, ".lock").c_str(), O_RDWR | O_CLOEXEC));
    return lock && flock(lock.get(), LOCK_EX | LOCK_NB) != 0;
  }

  std::string directory_;
  std::string socket_;
  std::map<std::string, std::string> environment_;
};

TEST_F(DaemonTest, SaysWhatItIsAndRefusesWhatItDoesNotKnow) {
  Ended ended = Run({"--version"});
  EXPECT_EQ(ended.exit_code, 0);
  EXPECT_EQ(ended.output, "holdfastd 0.1.0\n");
  ended = Run({"--help"});
  EXPECT_EQ(ended.exit_code, 0);
  EXPECT_THAT(ended.output, HasSubstr("75 try again later"));
  ended = Run({"--rooot", "/x"});
  EXPECT_EQ(ended.exit_code, 2);
  EXPECT_THAT(ended.output, HasSubstr("did you mean \"--root\"?"));
  ended = Run({"--worker", "--handover", "99"});
  EXPECT_EQ(ended.exit_code, 2);
  EXPECT_THAT(ended.output, HasSubstr("--handover is for holdfastd itself"));
  environment_["HOLDFAST_KILL_AT"] = "flush.sinced";
  ended = Run(PrivateArguments());
  EXPECT_EQ(ended.exit_code, 2);
  EXPECT_THAT(ended.output, HasSubstr("did you mean \"flush.synced\"?"));
}

TEST_F(DaemonTest, PrintsItsConfigurationWithOrigins) {
  environment_["HOLDFAST_EVERY"] = "50";
  const Ended ended = Run({"--print-config", "--socket", "/s"});
  EXPECT_EQ(ended.exit_code, 0);
  EXPECT_THAT(ended.output, ::testing::ContainsRegex("every = \"50\" +# \\$HOLDFAST_EVERY\n"));
  EXPECT_THAT(ended.output, ::testing::ContainsRegex("socket = \"/s\" +# flag --socket\n"));
}

TEST_F(DaemonTest, APrivateAgentThatCannotStartSaysWhyInOneLine) {
  std::vector<std::string> arguments = PrivateArguments();
  arguments.back() = absl::StrCat(directory_, "/none/deeper/root");
  Ended ended = Run(arguments);
  EXPECT_EQ(ended.exit_code, 1);
  EXPECT_THAT(ended.output, ::testing::MatchesRegex("holdfastd: cannot start: .*deeper/root.*\n"));
  EXPECT_TRUE(WaitUntil([this] { return !AgentLives(); }));
  environment_["HOLDFAST_HOST_MEMORY"] = "lots";
  ended = Run(PrivateArguments());
  EXPECT_EQ(ended.exit_code, 2);
  EXPECT_THAT(ended.output, HasSubstr("host_memory ($HOLDFAST_HOST_MEMORY): expected a size"));
}

TEST_F(DaemonTest, ADirectoryThatOthersMayWriteToIsRefused) {
  CHECK(mkdir(absl::StrCat(directory_, "/run").c_str(), 0777) == 0);
  CHECK(chmod(absl::StrCat(directory_, "/run").c_str(), 0777) == 0);
  const Ended ended = Run(PrivateArguments());
  EXPECT_EQ(ended.exit_code, 1);
  EXPECT_THAT(ended.output, HasSubstr("that nobody else may write to, found user"));
}

TEST_F(DaemonTest, ManyStartedAtOnceAreOneAgentAndAllSucceed) {
  environment_["HOLDFAST_LINGER"] = "60s";
  std::vector<Started> started;
  for (int i = 0; i < 8; ++i) started.push_back(Start(PrivateArguments()));
  for (Started& one : started) {
    const Ended ended = Finish(std::move(one));
    EXPECT_EQ(ended.exit_code, 0) << ended.output;
  }
  const json status = Query();
  ASSERT_TRUE(status.is_object());
  EXPECT_EQ(status["agent"]["mode"], "private");
  EXPECT_EQ(status["agent"]["job"], "job");
  const std::string log = ReadText(absl::StrCat(directory_, "/run/agent.log"));
  EXPECT_EQ(log.find("started worker "), log.rfind("started worker ")) << log;
  struct stat info {};
  ASSERT_EQ(stat(socket_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  ASSERT_EQ(stat(absl::StrCat(directory_, "/run").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
}

// A sockaddr_un holds 107 bytes of path: 107 and 108 are either side of that.
TEST_F(DaemonTest, ASocketServesWhateverTheLengthOfItsPath) {
  environment_["HOLDFAST_LINGER"] = "60s";
  std::vector<std::string> directories;
  for (const size_t bytes : {size_t{107}, size_t{108}, size_t{109}}) {
    const size_t other_bytes = directory_.size() + std::string("//agent.sock").size();
    if (bytes > other_bytes) directories.emplace_back(bytes - other_bytes, 'd');
  }
  directories.emplace_back(250, 'd');
  for (const std::string& name : directories) {
    socket_ = absl::StrCat(directory_, "/", name, "/agent.sock");
    SCOPED_TRACE(absl::StrCat(socket_.size(), " bytes"));
    // The second one finds the first, which needs its address as well.
    for (int i = 0; i < 2; ++i) {
      const Ended ended = Run(PrivateArguments());
      ASSERT_EQ(ended.exit_code, 0) << ended.output;
    }
    EXPECT_EQ(Query()["agent"]["mode"], "private");
    KillAgent();
    EXPECT_FALSE(AgentLives());
  }
}

TEST_F(DaemonTest, EndsByItselfAfterItsLastClientAndRemovesItsSocket) {
  ASSERT_EQ(Run(PrivateArguments()).exit_code, 0);
  UniqueFd client = Connect();
  ASSERT_TRUE(client);
  client.Reset();
  // It has had a client once it has answered one; then only the linger time counts.
  EXPECT_TRUE(WaitUntil([this] { return !AgentLives(); }));
  EXPECT_NE(access(socket_.c_str(), F_OK), 0);
}

// A process that only waits to be asked needs no agent, and keeps none alive.
TEST_F(DaemonTest, EndsByItselfThoughAProcessWaitsToBeAsked) {
  ASSERT_EQ(Run(PrivateArguments()).exit_code, 0);
  const UniqueFd client = Connect();
  ASSERT_TRUE(client);
  abi::WitnessWait wait{};
  wait.world_size = 1;
  ASSERT_EQ(SendPacket(client.get(), Packet{abi::MessageType::kWitness, 1, BodyBytes(wait), {}}),
            Sent::kYes);
  EXPECT_TRUE(WaitUntil([this] { return !AgentLives(); }));
}

// Somebody has removed the directory, and another agent listens under the same name.
TEST_F(DaemonTest, AnAgentThatEndsLeavesTheSocketOfItsSuccessor) {
  const std::filesystem::path directory = std::filesystem::path(directory_) / "replaced";
  socket_ = (directory / "agent.sock").string();
  std::filesystem::create_directory(directory);
  std::filesystem::permissions(directory, std::filesystem::perms::owner_all);
  Started started = Start({"--socket", socket_, "--root", absl::StrCat(directory_, "/root")});
  ASSERT_TRUE(WaitUntil([this] { return Query().is_object(); }));
  std::filesystem::remove_all(directory);
  std::filesystem::create_directory(directory);
  std::filesystem::permissions(directory, std::filesystem::perms::owner_all);
  Started successor = Start({"--socket", socket_, "--root", absl::StrCat(directory_, "/root")});
  ASSERT_TRUE(WaitUntil([this] { return Query().is_object(); }));
  kill(started.pid, SIGTERM);
  const Ended ended = Finish(std::move(started));
  EXPECT_THAT(ended.output, HasSubstr("the directory was replaced"));
  EXPECT_TRUE(Query().is_object());
  kill(successor.pid, SIGTERM);
  Finish(std::move(successor));
  EXPECT_NE(access(socket_.c_str(), F_OK), 0);
}

TEST_F(DaemonTest, ASidecarStaysInTheForegroundAndEndsAtTerm) {
  Started started = Start({"--socket", socket_, "--root", absl::StrCat(directory_, "/root")});
  ASSERT_TRUE(WaitUntil([this] { return Query().is_object(); }));
  const Ended second = Run({"--socket", socket_});
  EXPECT_EQ(second.exit_code, 75);
  EXPECT_THAT(second.output, HasSubstr("another agent has the socket"));
  kill(started.pid, SIGTERM);
  const Ended ended = Finish(std::move(started));
  EXPECT_EQ(ended.exit_code, 0);
  EXPECT_THAT(ended.output, HasSubstr("ending: nothing is left to be flushed"));
  EXPECT_FALSE(AgentLives());
}

// A device with sectors of 16 KiB, as the kernel would report it: the facts of the mount are
// planted where the agent keeps them.
TEST_F(DaemonTest, BlocksSmallerThanTheDevicesAlignmentGoThroughThePageCache) {
  environment_["HOLDFAST_BLOCK_BYTES"] = "4KiB";
  ASSERT_EQ(Run(PrivateArguments()).exit_code, 0);
  Query();  // its first client, so that it ends after its linger time
  ASSERT_TRUE(WaitUntil([this] { return !AgentLives(); }));
  std::string cache;
  for (const auto& entry :
       std::filesystem::directory_iterator(absl::StrCat(directory_, "/state/holdfast"))) {
    if (entry.path().filename().string().rfind("mount-", 0) == 0) cache = entry.path().string();
  }
  ASSERT_FALSE(cache.empty());
  std::string text;
  for (const absl::string_view line : absl::StrSplit(ReadText(cache), '\n', absl::SkipEmpty())) {
    const std::string name = std::string(line.substr(0, line.find('=')));
    if (name == "crc32c") continue;
    std::string kept(line);
    if (name == "direct_supported") kept = "direct_supported=1";
    if (name == "direct_refusal") kept = "direct_refusal=";
    if (name == "alignment_bytes") kept = "alignment_bytes=16384";
    absl::StrAppend(&text, kept, "\n");
  }
  absl::StrAppendFormat(&text, "crc32c=%08x\n", Crc32c(std::as_bytes(std::span(text))));
  std::ofstream(cache) << text;

  const auto caching = [&] {
    EXPECT_EQ(Run(PrivateArguments()).exit_code, 0);
    const json agent = Query()["agent"];
    EXPECT_TRUE(WaitUntil([this] { return !AgentLives(); }));
    return absl::StrCat(agent.value("flush", ""), " ", agent.value("restore", ""));
  };
  EXPECT_EQ(caching(), "buffered buffered");
  EXPECT_THAT(ReadText(absl::StrCat(directory_, "/run/agent.log")),
              HasSubstr("through the page cache: blocks of 4096 bytes: direct transfers there need "
                        "multiples of 16384 bytes"));
  environment_["HOLDFAST_DIRECT"] = "on";
  EXPECT_THAT(Run(PrivateArguments()).output, HasSubstr("multiples of 16384 bytes"));
  // Larger blocks do; what an earlier agent wrote in small ones is read all the same.
  environment_["HOLDFAST_BLOCK_BYTES"] = "64KiB";
  EXPECT_EQ(caching(), "direct buffered");
}

TEST_F(DaemonTest, ADeadWorkerIsReplacedAndTheSocketStaysTheSame) {
  environment_["HOLDFAST_LINGER"] = "60s";
  ASSERT_EQ(Run(PrivateArguments()).exit_code, 0);
  json status = Query();
  const pid_t worker = status["agent"]["worker_pid"];
  const pid_t keeper = status["agent"]["keeper_pid"];
  kill(worker, SIGKILL);
  // A client that comes in between waits in the queue of the socket and is answered.
  status = Query();
  ASSERT_TRUE(status.is_object());
  EXPECT_TRUE(WaitUntil([&] { return Query()["agent"]["worker_restarts"] == 1; }));
  kill(keeper, SIGKILL);
  EXPECT_TRUE(WaitUntil([&] {
    const json now = Query();
    return now.is_object() && now["agent"]["keeper_restarts"] == 1 &&
           now["agent"]["keeper_pid"] != keeper;
  }));
}

TEST_F(DaemonTest, AWorkerWhoseLogCannotBeOpenedWorksAllTheSame) {
  environment_["HOLDFAST_LINGER"] = "60s";
  ASSERT_EQ(Run(PrivateArguments()).exit_code, 0);
  const json before = Query();
  ASSERT_TRUE(before.is_object());
  const std::string log = absl::StrCat(directory_, "/run/agent.log");
  std::filesystem::rename(log, log + ".away");
  ASSERT_EQ(mkdir(log.c_str(), 0700), 0);
  kill(before["agent"]["worker_pid"].get<pid_t>(), SIGKILL);
  json after;
  ASSERT_TRUE(WaitUntil([&] {
    after = Query();
    return after.is_object();
  }));
  EXPECT_EQ(after["agent"]["worker_restarts"], 1);
  EXPECT_THAT(ReadText(log + ".away"), HasSubstr("going on with the old log: "));
}

TEST_F(DaemonTest, SessionsThatCameAndWentLeaveNoDescriptorBehind) {
  environment_["HOLDFAST_LINGER"] = "60s";
  ASSERT_EQ(Run(PrivateArguments()).exit_code, 0);
  json status = Query();
  const pid_t worker = status["agent"]["worker_pid"];
  const pid_t keeper = status["agent"]["keeper_pid"];
  size_t worker_before = 0;
  size_t keeper_before = 0;
  for (int round = 0; round < 20; ++round) {
    const pid_t trainer = fork();
    ASSERT_GE(trainer, 0);
    if (trainer == 0) {
      const UniqueFd socket = Connect();
      abi::OpenRequest request{};
      std::string("job").copy(request.job, sizeof(request.job) - 1);
      request.world_size = 1;
      Packet packet{abi::MessageType::kOpen, 1, BodyBytes(request), {}};
      packet.fds.emplace_back(eventfd(0, EFD_CLOEXEC));
      SendPacket(socket.get(), packet);
      const Received received = Hear(socket);
      _exit(received.kind == Received::Kind::kPacket && received.packet.fds.size() == 1 ? 0 : 1);
    }
    int end = 0;
    ASSERT_EQ(waitpid(trainer, &end, 0), trainer);
    ASSERT_EQ(end, 0);
    ASSERT_TRUE(WaitUntil([this] { return Query()["sessions"].empty(); })) << Query().dump(1);
    if (round == 0) {
      worker_before = DescriptorsOf(worker);
      keeper_before = DescriptorsOf(keeper);
    }
  }
  EXPECT_TRUE(WaitUntil([&] { return DescriptorsOf(worker) <= worker_before; }))
      << DescriptorsOf(worker) << " instead of " << worker_before;
  EXPECT_TRUE(WaitUntil([&] { return DescriptorsOf(keeper) <= keeper_before; }))
      << DescriptorsOf(keeper) << " instead of " << keeper_before;
}

TEST_F(DaemonTest, TheLogDoesNotGrowWithoutBoundAndKeepsWhatACrashWrites) {
  const std::string path = absl::StrCat(directory_, "/log");
  const pid_t child = fork();
  if (child == 0) {
    CHECK_OK(OpenLog({.process = "worker",
                      .path = path,
                      .bytes_max = 4096,
                      .rotation = LogOptions::Rotation::kRotate}));
    for (int i = 0; i < 1000; ++i) LogInfo(absl::StrCat("line ", i));
    CHECK(1 == 2);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  const std::string now = ReadText(path);
  const std::string before = ReadText(path + ".1");
  EXPECT_LT(now.size(), 8192u);
  EXPECT_LT(before.size(), 8192u);
  EXPECT_THAT(now, HasSubstr("CHECK(1 == 2) failed"));
  EXPECT_THAT(before + now, HasSubstr("line 998\n"));
}

TEST(Peer, ByNumberNeedsAPeerThatStillHoldsItsEnd) {
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  UniqueFd ours(ends[0]);
  UniqueFd theirs(ends[1]);
  const absl::StatusOr<UniqueFd> pidfd = PidfdByNumber(ours.get(), static_cast<uint32_t>(getpid()));
  ASSERT_TRUE(pidfd.ok()) << pidfd.status();
  EXPECT_EQ(PidOf(pidfd->get()), getpid());
  EXPECT_FALSE(PidfdByNumber(ours.get(), 0).ok());
  theirs.Reset();
  EXPECT_EQ(PidfdByNumber(ours.get(), static_cast<uint32_t>(getpid())).status().code(),
            absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace holdfast
