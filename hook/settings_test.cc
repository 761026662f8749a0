// Options, environment and defaults of hf_open.
#include "hook/settings.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

namespace holdfast::hook {
namespace {

constexpr const char* kVariables[] = {"HOLDFAST_JOB",
                                      "RANK",
                                      "WORLD_SIZE",
                                      "LOCAL_RANK",
                                      "HOLDFAST_ATTEMPT_KEY",
                                      "TORCHELASTIC_RUN_ID",
                                      "TORCHELASTIC_RESTART_COUNT",
                                      "HOLDFAST_ROOT",
                                      "HOLDFAST_RESTORE_FROM",
                                      "HOLDFAST_SOCKET",
                                      "HOLDFAST_PRIVATE",
                                      "HOLDFAST_CHECK_SOURCE",
                                      "HOLDFAST_COPY_THREADS",
                                      "HOLDFAST_COPIES",
                                      "HOLDFAST_CAPTURE_HEAD_START_MS",
                                      "HOLDFAST_DEVICE_COPY_MIB_PER_SECOND",
                                      "HOLDFAST_RUNTIME_DIR",
                                      "XDG_RUNTIME_DIR",
                                      "HOLDFASTD"};

class SettingsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char* variable : kVariables) unsetenv(variable);
  }
  void TearDown() override { SetUp(); }

  static hf_open_options Minimal() {
    hf_open_options options = HF_OPEN_OPTIONS_INIT;
    options.job = "j";
    options.rank = 1;
    options.world_size = 2;
    return options;
  }
  static Settings Read(const hf_open_options& options) {
    Result<Settings> settings = ReadSettings(options);
    EXPECT_TRUE(settings.ok()) << settings.error().text();
    return settings.ok() ? settings.value() : Settings();
  }
  // The error's text must name what is wrong.
  static void ExpectRefused(const hf_open_options& options, const char* named) {
    Result<Settings> settings = ReadSettings(options);
    ASSERT_FALSE(settings.ok()) << named;
    EXPECT_EQ(settings.error().code(), HF_INVALID_ARGUMENT);
    EXPECT_NE(std::string(settings.error().text()).find(named), std::string::npos)
        << settings.error().text();
  }
};

TEST_F(SettingsTest, DefaultsWithoutAnyVariable) {
  const Settings settings = Read(Minimal());
  EXPECT_EQ(settings.local_rank, 0u);
  EXPECT_EQ(settings.attempt_key, "");
  EXPECT_EQ(settings.root, "");
  EXPECT_EQ(settings.restore_from, "");
  EXPECT_TRUE(settings.private_agent);
  EXPECT_EQ(settings.check_source, CheckSource::kSample);
  EXPECT_EQ(settings.copy_threads, 1u);
  EXPECT_EQ(settings.copies, abi::Copies::kOnce);
  EXPECT_EQ(settings.capture_head_start_ns, 200'000'000);
  EXPECT_EQ(settings.deadline_ns, 30'000'000'000);
  // (0xcbf29ce484222325 ^ 0x6a) * 0x100000001b3 modulo 2^64.
  EXPECT_EQ(JobDirectoryName("j"), "af63e74c8601ff3d");
  EXPECT_EQ(JobDirectoryName(""), "cbf29ce484222325");
  // Of the authors' test vectors.
  EXPECT_EQ(JobDirectoryName("foobar"), "85944171f73967e8");
  EXPECT_EQ(settings.socket_path, "/tmp/holdfast-" + std::to_string(getuid()) + "/" +
                                      JobDirectoryName("j") + "/agent.sock");
}

TEST_F(SettingsTest, VariablesFillWhatOptionsLeaveOpen) {
  setenv("HOLDFAST_JOB", "from-env", 1);
  setenv("RANK", "3", 1);
  setenv("WORLD_SIZE", "8", 1);
  setenv("LOCAL_RANK", "2", 1);
  setenv("HOLDFAST_ROOT", "/ckpt", 1);
  setenv("HOLDFAST_RESTORE_FROM", "other/job", 1);
  setenv("HOLDFAST_PRIVATE", "0", 1);
  setenv("HOLDFAST_CHECK_SOURCE", "all", 1);
  setenv("HOLDFAST_COPY_THREADS", "4", 1);
  setenv("HOLDFAST_CAPTURE_HEAD_START_MS", "0", 1);
  setenv("HOLDFAST_DEVICE_COPY_MIB_PER_SECOND", "3", 1);
  setenv("XDG_RUNTIME_DIR", "/run/user/1", 1);
  setenv("TORCHELASTIC_RUN_ID", "run", 1);
  setenv("TORCHELASTIC_RESTART_COUNT", "2", 1);
  hf_open_options options = HF_OPEN_OPTIONS_INIT;
  Settings settings = Read(options);
  EXPECT_EQ(settings.job, "from-env");
  EXPECT_EQ(settings.device_bytes_per_second_max, uint64_t{3} << 20);
  EXPECT_EQ(settings.rank, 3u);
  EXPECT_EQ(settings.world_size, 8u);
  EXPECT_EQ(settings.local_rank, 2u);
  EXPECT_EQ(settings.root, "/ckpt");
  char* const here = getcwd(nullptr, 0);
  EXPECT_EQ(settings.restore_from, std::string(here) + "/other/job");
  free(here);
  EXPECT_FALSE(settings.private_agent);
  EXPECT_EQ(settings.check_source, CheckSource::kAll);
  EXPECT_EQ(settings.copy_threads, 4u);
  EXPECT_EQ(settings.capture_head_start_ns, 0);
  EXPECT_EQ(settings.attempt_key, "run:2");
  EXPECT_EQ(settings.socket_path.rfind("/run/user/1/holdfast/", 0), 0u);
  setenv("HOLDFAST_RUNTIME_DIR", "/elsewhere", 1);
  setenv("HOLDFAST_ATTEMPT_KEY", "key", 1);
  settings = Read(options);
  EXPECT_EQ(settings.attempt_key, "key");
  EXPECT_EQ(settings.socket_path.rfind("/elsewhere/", 0), 0u);

  unsetenv("LOCAL_RANK");
  options = Minimal();
  options.attempt_key = "";
  options.private_agent = 1;
  options.check_source = 0;
  options.copy_threads = 2;
  options.root = "relative";
  options.restore_from = "";  // none, whatever the variable says
  options.deadline_ns = 5;
  settings = Read(options);
  EXPECT_EQ(settings.job, "j");
  EXPECT_EQ(settings.rank, 1u);
  EXPECT_EQ(settings.attempt_key, "");
  EXPECT_EQ(settings.restore_from, "");
  EXPECT_TRUE(settings.private_agent);
  EXPECT_EQ(settings.check_source, CheckSource::kNone);
  EXPECT_EQ(settings.copy_threads, 2u);
  EXPECT_EQ(settings.deadline_ns, 5);
  char* current = getcwd(nullptr, 0);
  EXPECT_EQ(settings.root, std::string(current) + "/relative");
  free(current);
}

TEST_F(SettingsTest, CopiesAreNamedInTheVariableAndNumberedInTheOption) {
  const abi::Copies values[] = {abi::Copies::kOnce, abi::Copies::kPerNode, abi::Copies::kAll};
  const char* const names[] = {"once", "per-node", "all"};
  const hf_copies numbers[] = {HF_COPIES_ONCE, HF_COPIES_PER_NODE, HF_COPIES_ALL};
  hf_open_options options = Minimal();
  for (int i = 0; i < 3; ++i) {
    unsetenv("HOLDFAST_COPIES");
    options.copies = numbers[i];
    EXPECT_EQ(Read(options).copies, values[i]);
    setenv("HOLDFAST_COPIES", names[i], 1);
    EXPECT_EQ(Read(Minimal()).copies, values[i]);
    // The option wins.
    options.copies = numbers[(i + 1) % 3];
    EXPECT_EQ(Read(options).copies, values[(i + 1) % 3]);
  }
  for (const int number : {-2, 3}) {
    options.copies = number;
    ExpectRefused(options, "copies: expected -1 to 2, found");
  }
  setenv("HOLDFAST_COPIES", "twice", 1);
  ExpectRefused(Minimal(), "$HOLDFAST_COPIES: expected once, per-node or all, found 'twice'");
}

TEST_F(SettingsTest, AGivenSocketIsSomebodysAgent) {
  hf_open_options options = Minimal();
  options.private_agent = 1;
  options.socket = "/run/holdfast/agent.sock";
  Settings settings = Read(options);
  EXPECT_EQ(settings.socket_path, "/run/holdfast/agent.sock");
  EXPECT_FALSE(settings.private_agent);
  options.socket = nullptr;
  setenv("HOLDFAST_SOCKET", "/other", 1);
  settings = Read(options);
  EXPECT_EQ(settings.socket_path, "/other");
  EXPECT_FALSE(settings.private_agent);
}

TEST_F(SettingsTest, WrongValuesAreNamed) {
  hf_open_options options = HF_OPEN_OPTIONS_INIT;
  ExpectRefused(options, "HOLDFAST_JOB");
  for (const std::string& job :
       {std::string(""), std::string(".hidden"), std::string("a/b"), std::string("a b"),
        std::string("\xc3\xa4"), std::string(129, 'x')}) {
    options = Minimal();
    options.job = job.c_str();
    ExpectRefused(options, "job");
  }
  options = Minimal();
  options.rank = 2;
  ExpectRefused(options, "rank: expected 0 to 1, found 2");
  options = Minimal();
  options.world_size = 0;
  ExpectRefused(options, "world_size");
  options = Minimal();
  options.rank = -1;
  ExpectRefused(options, "$RANK");
  setenv("RANK", "1x", 1);
  ExpectRefused(options, "$RANK: expected a number");
  setenv("RANK", "99999999999999999999", 1);
  ExpectRefused(options, "$RANK");
  options = Minimal();
  options.copy_threads = 17;
  ExpectRefused(options, "copy_threads");
  options = Minimal();
  options.check_source = 3;
  ExpectRefused(options, "check_source");
  setenv("HOLDFAST_CHECK_SOURCE", "some", 1);
  ExpectRefused(Minimal(), "expected none, sample or all, found 'some'");
  unsetenv("HOLDFAST_CHECK_SOURCE");
  setenv("HOLDFAST_PRIVATE", "yes", 1);
  ExpectRefused(Minimal(), "$HOLDFAST_PRIVATE");
  unsetenv("HOLDFAST_PRIVATE");
  const std::string long_key(256, 'k');
  options = Minimal();
  options.attempt_key = long_key.c_str();
  ExpectRefused(options, "attempt_key");
  const std::string long_root = "/" + std::string(1023, 'r');
  options = Minimal();
  options.root = long_root.c_str();
  ExpectRefused(options, "root");
  options = Minimal();
  options.restore_from = long_root.c_str();
  ExpectRefused(options, "restore_from: expected at most 1023");
}

}  // namespace
}  // namespace holdfast::hook
