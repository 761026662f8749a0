// Goal: what the command says arrives as it was said; a rank finds torchrun's variables and nobody
// else's; no bytes that a client sends do more than be refused.
#include "agent/run/run_spec.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/unique_fd.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

RunSpec Spec() {
  RunSpec spec;
  spec.run_id = "20261126-120000-0badcafe";
  spec.job = "llama.7b";
  spec.rdzv_id = "any text = at all";
  spec.command = {"python3", "-u", "train.py", "", "--name=a b"};
  spec.environment = {"PATH=/bin", "ODD=\xff\n=", "RANK=9", "TORCHELASTIC_RUN_ID=outer"};
  spec.working_directory = "/work";
  spec.umask = 027;
  spec.limits = {{7, 1024}, {3, UINT64_MAX}};
  spec.ranks = 3;
  spec.role = "trainer";
  spec.log_directory = "/logs/x";
  spec.recovery_toml = "[recovery]\nmode = \"ask\"\n";
  spec.max_restarts = 4;
  spec.stop_wait_seconds = 0;
  spec.run_number = UINT32_MAX;
  return spec;
}

TEST(RunSpecTest, ComesBackAsItWas) {
  RunSpec spec = Spec();
  for (int i = 0; i < 3; ++i) {
    if (i == 1) spec.max_restarts.reset();
    if (i == 1) spec.stop_wait_seconds.reset();
    if (i == 2) spec.gpus = {"4", "GPU-aa", "6", "7"};
    const std::string bytes = EncodeRunSpec(spec);
    const absl::StatusOr<RunSpec> back = DecodeRunSpec(bytes);
    ASSERT_OK(back.status());
    EXPECT_EQ(EncodeRunSpec(*back), bytes);
    EXPECT_EQ(back->command, spec.command);
    EXPECT_EQ(back->environment, spec.environment);
    EXPECT_EQ(back->max_restarts, spec.max_restarts);
    EXPECT_EQ(back->stop_wait_seconds, spec.stop_wait_seconds);
    EXPECT_EQ(back->gpus, spec.gpus);
    EXPECT_EQ(back->run_number, spec.run_number);
    EXPECT_EQ(back->limits[1].soft, UINT64_MAX);
  }
}

TEST(RunSpecTest, WhatIsNoRunIsRefusedByName) {
  const auto refused = [](const char* field, auto change) {
    RunSpec spec = Spec();
    change(spec);
    const absl::Status status = DecodeRunSpec(EncodeRunSpec(spec)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_THAT(std::string(status.message()), HasSubstr(field));
  };
  refused("job", [](RunSpec& spec) { spec.job = "../../etc"; });
  refused("job", [](RunSpec& spec) { spec.job = std::string(129, 'j'); });
  refused("run_id", [](RunSpec& spec) { spec.run_id = ".hidden"; });
  refused("run_id", [](RunSpec& spec) { spec.run_id = "a/b"; });
  refused("command", [](RunSpec& spec) { spec.command.clear(); });
  refused("ranks", [](RunSpec& spec) { spec.ranks = 0; });
  refused("ranks", [](RunSpec& spec) { spec.ranks = RunSpec::kRanksMax + 1; });
  refused("gpu", [](RunSpec& spec) { spec.gpus = {"0", "1"}; });
  refused("working_directory", [](RunSpec& spec) { spec.working_directory = "here"; });
  refused("log_directory", [](RunSpec& spec) { spec.log_directory = "logs"; });
  refused("umask", [](RunSpec& spec) { spec.umask = 01000; });
  refused("log_bytes_max", [](RunSpec& spec) { spec.log_bytes_max = 1; });
  refused("recovery_toml", [](RunSpec& spec) { spec.recovery_toml.assign(2 << 20, ' '); });
}

TEST(RunSpecTest, NoBytesDoMoreThanBeRefused) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  const std::string good = EncodeRunSpec(Spec());
  for (size_t length = 0; length < good.size(); ++length) {
    // Cut between two fields it may be a shorter run, never what it is not.
    const absl::StatusOr<RunSpec> cut = DecodeRunSpec(good.substr(0, length));
    EXPECT_TRUE(!cut.ok() || !cut->command.empty());
  }
  for (int i = 0; i < 3'000; ++i) {
    std::string bytes = good;
    for (uint32_t changes = random() % 4 + 1; changes > 0; --changes) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    const absl::StatusOr<RunSpec> spec = DecodeRunSpec(bytes);
    if (!spec.ok()) continue;
    EXPECT_GE(spec->ranks, 1u);
    EXPECT_LE(spec->ranks, RunSpec::kRanksMax);
    EXPECT_EQ(spec->job.find('/'), std::string::npos);
  }
}

recovery::StartRanks Start(uint32_t ranks) {
  recovery::StartRanks start;
  start.launch = recovery::Launch{12};
  start.restart_count = 2;
  for (uint32_t i = 0; i < ranks; ++i) start.placement.gpus.push_back({"n1", i, ""});
  return start;
}

std::vector<std::string> ValuesOf(const std::vector<std::string>& environment,
                                  const std::string& name) {
  std::vector<std::string> values;
  for (const std::string& variable : environment) {
    if (variable.starts_with(name + "=")) values.push_back(variable.substr(name.size() + 1));
  }
  return values;
}

TEST(EnvironmentTest, IsTorchrunsAndNobodyElses) {
  const RunSpec spec = Spec();
  const recovery::StartRanks start = Start(3);
  const std::vector<std::string> environment = EnvironmentOf(
      {spec, start, /*rank=*/1, /*port=*/4711, "/run/agent.sock", /*max_restarts=*/4});
  const std::vector<std::pair<std::string, std::string>> expected = {
      {"RANK", "1"},
      {"LOCAL_RANK", "1"},
      {"ROLE_RANK", "1"},
      {"GROUP_RANK", "0"},
      {"WORLD_SIZE", "3"},
      {"LOCAL_WORLD_SIZE", "3"},
      {"ROLE_WORLD_SIZE", "3"},
      {"GROUP_WORLD_SIZE", "1"},
      {"ROLE_NAME", "trainer"},
      {"MASTER_ADDR", "127.0.0.1"},
      {"MASTER_PORT", "4711"},
      {"TORCHELASTIC_RESTART_COUNT", "2"},
      {"TORCHELASTIC_MAX_RESTARTS", "4"},
      {"TORCHELASTIC_RUN_ID", "any text = at all"},
      {"TORCHELASTIC_USE_AGENT_STORE", "False"},
      {"OMP_NUM_THREADS", "1"},
      {"TORCHELASTIC_ERROR_FILE", "/logs/x/attempt_2/1/error.json"},
      {"HOLDFAST_JOB", "llama.7b"},
      {"HOLDFAST_SOCKET", "/run/agent.sock"},
      {"HOLDFAST_ATTEMPT_KEY", "20261126-120000-0badcafe:12"},
      {"HOLDFAST_LAUNCH", "12"},
      {"PATH", "/bin"},
      {"ODD", "\xff\n="}};
  for (const auto& [name, value] : expected) {
    EXPECT_EQ(ValuesOf(environment, name), std::vector<std::string>{value}) << name;
  }
  EXPECT_THAT(environment, Not(Contains(StartsWith("CUDA_VISIBLE_DEVICES="))));
  EXPECT_THAT(environment, Not(Contains(StartsWith("HOLDFAST_LAYOUT="))));
}

TEST(EnvironmentTest, WhatTheUserHasChosenStays) {
  RunSpec spec = Spec();
  spec.environment = {"OMP_NUM_THREADS=8", "TORCH_NCCL_ASYNC_ERROR_HANDLING=3"};
  const std::vector<std::string> environment = EnvironmentOf({spec, Start(3), 0, 1, "/s", 0});
  EXPECT_EQ(ValuesOf(environment, "OMP_NUM_THREADS"), std::vector<std::string>{"8"});
  EXPECT_EQ(ValuesOf(environment, "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
            std::vector<std::string>{"3"});
}

TEST(EnvironmentTest, RanksSeeTheGpusOfTheirPlacement) {
  RunSpec spec = Spec();
  spec.environment = {"CUDA_VISIBLE_DEVICES=0,1,2,3"};
  spec.gpus = {"0", "1", "2", "3"};
  recovery::StartRanks start = Start(3);
  start.placement.gpus = {{"n1", 0, ""}, {"n1", 3, ""}, {"n1", 2, "GPU-ab"}};
  start.placement.layout = "tp2";
  const std::vector<std::string> environment = EnvironmentOf({spec, start, 2, 1, "/s", 0});
  EXPECT_EQ(ValuesOf(environment, "CUDA_VISIBLE_DEVICES"), std::vector<std::string>{"0,3,GPU-ab"});
  EXPECT_EQ(ValuesOf(environment, "HOLDFAST_LAYOUT"), std::vector<std::string>{"tp2"});
}

TEST(FindPortTest, GivesPortsOnWhichOneCanListen) {
  std::set<uint32_t> ports;
  for (int i = 0; i < 20; ++i) {
    const absl::StatusOr<uint32_t> port = FindPort("127.0.0.1");
    ASSERT_OK(port.status());
    EXPECT_GE(*port, 1024u);
    ports.insert(*port);
    const UniqueFd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(*port));
    EXPECT_EQ(bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  }
  EXPECT_GT(ports.size(), 10u);  // an attempt does not get the port of the one before
  EXPECT_OK(FindPort("::1").status());
  EXPECT_OK(FindPort("no.such.name").status());
}

}  // namespace
}  // namespace holdfast
