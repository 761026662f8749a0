// Starting a private agent: one for all ranks, in a clean process, and every way in which it fails.
//
// This program is its own daemon: started with --private it behaves as $HOLDFAST_TEST_DAEMON says.
#include "hook/private_agent.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "hook/socket.h"

namespace holdfast::hook {
namespace {

constexpr int64_t kPatienceNs = 120 * kNsPerSecond;

// ---- The daemon

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string StatusLine(const char* key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(key, 0) == 0) return line.substr(line.find_last_of(" \t") + 1);
  }
  return "?";
}

// What the test wants to know of how it was started.
void WriteRecord(const std::string& directory, int argc, char** argv) {
  std::ofstream record(directory + "/record");
  for (int i = 1; i < argc; ++i) record << argv[i] << "\n";
  record << "fds";
  for (int fd = 0; fd < 1024; ++fd) {
    if (fcntl(fd, F_GETFD) >= 0) record << " " << fd;
  }
  record << "\nleader " << (getsid(0) == getpid()) << "\nblocked "
         << StatusLine("SigBlk:")
         // Without the two signals that glibc keeps for itself.
         << "\nignored " << (std::stoull(StatusLine("SigIgn:"), nullptr, 16) & ~0x1'8000'0000u)
         << "\n";
}

// Listens, and lives until the test closes its last connection after "quit", or for a minute.
int Serve(const std::string& path) {
  const int listener = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  // Its directory may be too deep for an address: from inside it the name is short.
  if (chdir(path.substr(0, path.rfind('/')).c_str()) != 0) return 20;
  unlink("agent.sock");
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::snprintf(address.sun_path, sizeof(address.sun_path), "agent.sock");
  if (bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) return 21;
  if (listen(listener, 64) != 0) return 22;
  const pid_t background = fork();
  if (background != 0) return background > 0 ? 0 : 23;
  alarm(60);
  close(2);
  for (;;) {
    const int connection = accept(listener, nullptr, nullptr);
    char bytes[64];
    const ssize_t got = connection >= 0 ? recv(connection, bytes, sizeof(bytes), 0) : -1;
    if (got == 4) _exit(0);
    close(connection);
  }
}

int DaemonMain(int argc, char** argv) {
  const std::string path = argc > 3 ? argv[3] : "";
  const std::string directory = path.substr(0, path.rfind('/'));
  std::ofstream(directory + "/starts", std::ios::app) << "x";
  WriteRecord(directory, argc, argv);
  const char* behaviour = getenv("HOLDFAST_TEST_DAEMON");
  const std::string what = behaviour != nullptr ? behaviour : "serve";
  if (what == "fail") {
    (void)!write(2, "the root is read-only\nand more\n", 31);
    return 3;
  }
  if (what == "crash") {
    signal(SIGSEGV, SIG_DFL);
    raise(SIGKILL);
  }
  if (what == "hang") {
    alarm(60);
    pause();
  }
  if (what == "lie") return 0;
  return Serve(path);
}

// ---- The tests

class PrivateAgentTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/holdfast-private-test-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    base_ = name;
    settings_.job = "a.job";
    UseDirectory(base_ + "/runtime");
    settings_.private_agent = true;
    settings_.daemon_path = std::filesystem::read_symlink("/proc/self/exe");
    setenv("HOLDFAST_TEST_DAEMON", "serve", 1);
  }
  void TearDown() override {
    // Ends the daemon, if there is one.
    Result<UniqueFd> connection = ConnectToAgent(settings_.socket_path, Deadline::After(0));
    if (connection.ok()) (void)send(connection.value().get(), "quit", 4, MSG_NOSIGNAL);
    std::filesystem::remove_all(base_);
  }
  void UseDirectory(const std::string& parent) {
    settings_.runtime_directory = parent + "/" + JobDirectoryName(settings_.job);
    settings_.socket_path = settings_.runtime_directory + "/agent.sock";
  }
  Error Connect(int64_t deadline_ns = kPatienceNs) {
    Result<UniqueFd> connection = ConnectOrStartAgent(settings_, Deadline::After(deadline_ns));
    return connection.ok() ? Error() : connection.error();
  }
  size_t Starts() const { return ReadFile(settings_.runtime_directory + "/starts").size(); }

  std::string base_;
  Settings settings_;
};

TEST_F(PrivateAgentTest, OneIsStartedForAllRanks) {
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < 8; ++rank) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      const Error error = Connect();
      if (!error.ok()) std::fprintf(stderr, "%s\n", error.text());
      _exit(error.ok() ? 0 : 1);
    }
    ranks.push_back(child);
  }
  for (const pid_t rank : ranks) {
    int status = 0;
    ASSERT_EQ(waitpid(rank, &status, 0), rank);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  }
  EXPECT_EQ(Starts(), 1u);
  EXPECT_TRUE(Connect().ok());
  EXPECT_EQ(Starts(), 1u);
}

TEST_F(PrivateAgentTest, ItRunsInASessionOfItsOwnWithNothingOfTheTrainers) {
  settings_.root = "/some/root";
  const UniqueFd kept(open("/dev/null", O_RDONLY));  // not close-on-exec, like a user's file
  sigset_t blocked;
  sigset_t before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);
  const auto old_handler = signal(SIGPIPE, SIG_IGN);
  const Error error = Connect();
  signal(SIGPIPE, old_handler);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ASSERT_TRUE(error.ok()) << error.text();
  const std::string record = ReadFile(settings_.runtime_directory + "/record");
  // 3 is the record itself.
  EXPECT_EQ(record, "--private\n--socket\n" + settings_.socket_path +
                        "\n--job\na.job\n--root\n/some/root\nfds 0 1 2 3\nleader 1\n"
                        "blocked 0000000000000000\nignored 0\n");
}

TEST_F(PrivateAgentTest, ItsLineIsInTheErrorAndTheNextTryIsFree) {
  setenv("HOLDFAST_TEST_DAEMON", "fail", 1);
  const Error failed = Connect();
  EXPECT_EQ(failed.code(), HF_UNAVAILABLE);
  const std::string text = failed.text();
  EXPECT_NE(text.find("exited with 3: the root is read-only"), std::string::npos) << text;
  EXPECT_EQ(text.find("and more"), std::string::npos) << text;
  setenv("HOLDFAST_TEST_DAEMON", "crash", 1);
  const Error crashed = Connect();
  EXPECT_EQ(crashed.code(), HF_UNAVAILABLE);
  EXPECT_NE(std::string(crashed.text()).find("signal 9"), std::string::npos) << crashed.text();
  setenv("HOLDFAST_TEST_DAEMON", "lie", 1);
  EXPECT_EQ(Connect().code(), HF_UNAVAILABLE);
  setenv("HOLDFAST_TEST_DAEMON", "serve", 1);
  EXPECT_TRUE(Connect().ok());
  EXPECT_EQ(Starts(), 4u);
}

TEST_F(PrivateAgentTest, ADaemonThatHangsIsLeftAtTheDeadline) {
  setenv("HOLDFAST_TEST_DAEMON", "hang", 1);
  EXPECT_EQ(Connect(50 * kNsPerMs).code(), HF_DEADLINE_EXCEEDED);
  // It was ended and reaped, and the lock is free.
  int status = 0;
  EXPECT_EQ(waitpid(-1, &status, WNOHANG), -1);
  setenv("HOLDFAST_TEST_DAEMON", "serve", 1);
  EXPECT_TRUE(Connect().ok());
}

TEST_F(PrivateAgentTest, TheTrainersOwnChildrenAndSigchldAreLeftAlone) {
  const pid_t own = fork();
  ASSERT_GE(own, 0);
  if (own == 0) _exit(7);
  EXPECT_TRUE(Connect().ok());
  int status = 0;
  EXPECT_EQ(waitpid(own, &status, 0), own);
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_EQ(waitpid(-1, &status, WNOHANG), -1) << "the daemon's foreground process was not reaped";
}

TEST_F(PrivateAgentTest, ATrainerThatIgnoresSigchldGetsItsAgentToo) {
  const auto before = signal(SIGCHLD, SIG_IGN);
  const Error error = Connect();
  signal(SIGCHLD, before);
  EXPECT_TRUE(error.ok()) << error.text();
}

TEST_F(PrivateAgentTest, AStaleSocketIsReplaced) {
  ASSERT_TRUE(PrepareRuntimeDirectory(settings_.runtime_directory).ok());
  const int dead = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::snprintf(address.sun_path, sizeof(address.sun_path), "%s", settings_.socket_path.c_str());
  ASSERT_EQ(bind(dead, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  close(dead);
  EXPECT_TRUE(Connect().ok());
  EXPECT_EQ(Starts(), 1u);
}

TEST_F(PrivateAgentTest, ADeepRuntimeDirectoryServes) {
  std::string deep = base_ + "/" + std::string(100, 'd');
  ASSERT_EQ(mkdir(deep.c_str(), 0700), 0);
  UseDirectory(deep + "/" + std::string(100, 'e'));
  EXPECT_TRUE(Connect().ok());
  EXPECT_EQ(Starts(), 1u);
}

TEST_F(PrivateAgentTest, WithoutPermissionOrProgramNothingIsStarted) {
  settings_.private_agent = false;
  const Error refused = Connect();
  EXPECT_EQ(refused.code(), HF_UNAVAILABLE);
  EXPECT_NE(std::string(refused.text()).find("must not be started"), std::string::npos);
  settings_.private_agent = true;
  settings_.daemon_path = base_ + "/nothing";
  const Error missing = Connect();
  EXPECT_EQ(missing.code(), HF_UNAVAILABLE);
  EXPECT_NE(std::string(missing.text()).find("$HOLDFASTD"), std::string::npos) << missing.text();
}

TEST_F(PrivateAgentTest, WithoutAVariableItIsFoundInThePath) {
  const std::string bin = base_ + "/bin";
  ASSERT_EQ(mkdir(bin.c_str(), 0700), 0);
  std::filesystem::create_symlink(settings_.daemon_path, bin + "/holdfastd");
  settings_.daemon_path.clear();
  settings_.search_path = "/nonexistent::" + bin;
  EXPECT_TRUE(Connect().ok());
  EXPECT_EQ(Starts(), 1u);
}

TEST_F(PrivateAgentTest, ADirectoryThatOthersMayUseIsRefused) {
  const std::string parent = base_ + "/runtime";
  ASSERT_TRUE(PrepareRuntimeDirectory(settings_.runtime_directory).ok());
  struct stat info;
  ASSERT_EQ(stat(settings_.runtime_directory.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  ASSERT_EQ(chmod(settings_.runtime_directory.c_str(), 0750), 0);
  EXPECT_EQ(Connect().code(), HF_PERMISSION_DENIED);
  ASSERT_EQ(chmod(settings_.runtime_directory.c_str(), 0700), 0);
  ASSERT_EQ(chmod(parent.c_str(), 0770), 0);
  EXPECT_EQ(Connect().code(), HF_PERMISSION_DENIED);
  ASSERT_EQ(chmod(parent.c_str(), 0700), 0);
  std::filesystem::rename(parent, base_ + "/elsewhere");
  std::filesystem::create_directory_symlink(base_ + "/elsewhere", parent);
  const Error link = Connect();
  EXPECT_EQ(link.code(), HF_PERMISSION_DENIED);
  EXPECT_NE(std::string(link.text()).find(parent), std::string::npos) << link.text();
  std::filesystem::remove(parent);
  std::ofstream(parent) << "a file";
  EXPECT_EQ(Connect().code(), HF_PERMISSION_DENIED);
  EXPECT_EQ(Starts(), 0u);
}

}  // namespace
}  // namespace holdfast::hook

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--private") {
    return holdfast::hook::DaemonMain(argc, argv);
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
