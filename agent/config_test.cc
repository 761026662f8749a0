#include "agent/config.h"

#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "agent/config_values.h"
#include "agent/host_memory.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

class ConfigTest : public ::testing::Test {
 protected:
  ConfigTest() {
    sources_.environment = [this](const char* variable) -> const char* {
      const auto found = environment_.find(variable);
      return found == environment_.end() ? nullptr : found->second.c_str();
    };
    sources_.user_id = 1000;
    sources_.memory_bytes = uint64_t{1} << 40;
    environment_["HOME"] = directory_;
  }

  std::string WriteFile(const std::string& name, const std::string& text) {
    const std::string path = absl::StrCat(directory_, "/", name);
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    std::ofstream(path) << text;
    return path;
  }

  std::string ErrorOf(const std::string& text) {
    sources_.config_flag = WriteFile("bad.toml", text);
    const absl::StatusOr<AgentConfig> config = ResolveConfig(sources_);
    return config.ok() ? "no error" : std::string(config.status().message());
  }

  const TemporaryDirectory scratch_;
  const std::string directory_ = scratch_.path();
  std::map<std::string, std::string> environment_;
  ConfigSources sources_;
};

// A good value of every key, other than its default, as text.
const std::map<std::string, std::vector<std::string>>& GoodValues() {
  static const std::map<std::string, std::vector<std::string>> values = {
      {"roots", {"/r1", "/r2", "/r3"}},
      {"socket", {"/s1", "/s2", "/s3"}},
      {"state_directory", {"/d1", "/d2", "/d3"}},
      {"host_memory", {"1GiB", "2GiB", "3GiB"}},
      {"every", {"1", "auto", "3"}},
      {"images_in_memory", {"1", "3", "4"}},
      {"block_bytes", {"4096", "8KiB", "16KiB"}},
      {"flush_writes", {"1", "2", "3"}},
      {"threads", {"1", "2", "3"}},
      {"ring", {"threads", "io_uring", "auto"}},
      {"direct", {"on", "off", "auto"}},
      {"linger", {"1s", "2", "3m"}},
      {"drain_deadline", {"1s", "2", "3m"}},
      {"on_verdict", {"true", "false", "page --now"}},
      {"verdicts_keep", {"1h", "60", "720h"}},
      {"ras_address", {"off", "10.0.0.1:1", "[::1]:2"}},
      {"kernel_log", {"off", "/k1", "/k2"}},
      {"http", {"127.0.0.1:0", "[::1]:2", "10.0.0.1:9470"}},
      {"http_token_file", {"/t1", "off", "/t2"}},
      {"topology", {"/t1", "/t2", "/t3"}},
      {"sidecar", {"observe", "act", "off"}},
      {"log_file", {"/l1", "/l2", "/l3"}},
      {"log_level", {"debug", "warning", "error"}},
  };
  return values;
}

// Every key, every pair of neighbours in the order of precedence.
TEST_F(ConfigTest, FlagsWinOverEnvironmentOverFileOverDefaultForEveryKey) {
  size_t checked = 0;
  for (const ConfigKey& key : ConfigKeys()) {
    SCOPED_TRACE(key.name);
    ASSERT_TRUE(GoodValues().contains(key.name)) << "a new key needs values here";
    const std::vector<std::string>& texts = GoodValues().at(key.name);
    const auto value = [&] {
      const absl::StatusOr<AgentConfig> config = ResolveConfig(sources_);
      EXPECT_TRUE(config.ok()) << config.status();
      return config.ok() ? config->values.at(key.name) : ConfigValue{};
    };
    sources_.config_flag.clear();
    EXPECT_EQ(value().origin, "default");
    const std::string path =
        WriteFile("one.toml", absl::StrCat(key.name, " = \"", texts[0], "\"\n"));
    sources_.config_flag = path;
    EXPECT_EQ(value().text, texts[0]);
    EXPECT_EQ(value().origin, path);
    environment_[key.variable] = texts[1];
    EXPECT_EQ(value().text, texts[1]);
    EXPECT_EQ(value().origin, absl::StrCat("$", key.variable));
    sources_.flags[key.name] = texts[2];
    EXPECT_EQ(value().text, texts[2]);
    EXPECT_EQ(value().origin, absl::StrCat("flag ", key.flag));
    environment_.erase(key.variable);
    EXPECT_EQ(value().text, texts[2]);
    sources_.flags.clear();
    ++checked;
  }
  EXPECT_EQ(checked, GoodValues().size());
}

TEST_F(ConfigTest, AnUnknownKeyIsRefusedWithTheNearestOne) {
  EXPECT_THAT(ErrorOf("every = 5\nhost_memry = \"1GiB\"\n"),
              ::testing::AllOf(HasSubstr("bad.toml line 2: unknown key \"host_memry\""),
                               HasSubstr("did you mean \"host_memory\"?")));
  EXPECT_THAT(ErrorOf("[agent]\nevery = 5\n"), HasSubstr("unknown key \"agent\""));
}

TEST_F(ConfigTest, BadFilesAndValuesAreNamedWithWhatWasExpected) {
  EXPECT_THAT(ErrorOf("every = \n"), HasSubstr("bad.toml line 1"));
  EXPECT_THAT(ErrorOf("roots = [\"/a\", \"/b\"]\n"), HasSubstr("exactly one path, found 2"));
  EXPECT_THAT(ErrorOf("roots = \"relative\"\n"), HasSubstr("an absolute path, found \"relative\""));
  EXPECT_THAT(ErrorOf("every = 1.5\n"), HasSubstr("a whole number, found floating-point"));
  EXPECT_THAT(ErrorOf("every = -1\n"), HasSubstr("a number from 0"));
  EXPECT_THAT(ErrorOf("every = \"often\"\n"), HasSubstr("; or auto"));
  for (const char* bad : {"9470", "127.0.0.1", "host:9470", "::1:9470", "127.0.0.1:65536", ":1"}) {
    EXPECT_THAT(ErrorOf(absl::StrCat("http = \"", bad, "\"\n")),
                HasSubstr("expected off, or ADDRESS:PORT"));
  }
  EXPECT_THAT(ErrorOf("http = \"10.0.0.1:9470\"\nhttp_token_file = \"off\"\n"),
              HasSubstr("http_token_file (" + directory_ + "/bad.toml): expected a file"));
  EXPECT_THAT(ErrorOf("block_bytes = 5000\n"), HasSubstr("a power of two"));
  EXPECT_THAT(ErrorOf("images_in_memory = 5\n"), HasSubstr("from 1 to 4"));
  EXPECT_THAT(ErrorOf("ring = \"iouring\"\n"), HasSubstr("did you mean \"io_uring\"?"));
  EXPECT_THAT(ErrorOf("host_memory = \"0%\"\n"), HasSubstr("more than 0%"));
  EXPECT_THAT(ErrorOf("linger = \"-1s\"\n"), HasSubstr("a duration"));
  EXPECT_THAT(ErrorOf(absl::StrCat("socket = \"/run/", std::string(65, 'x'), "\"\n")),
              HasSubstr("a file name of 1 to 64 bytes, found 65"));
  EXPECT_THAT(ErrorOf("socket = \"/\"\n"), HasSubstr("a file name of 1 to 64 bytes, found 0"));
  sources_.config_flag = absl::StrCat(directory_, "/none.toml");
  EXPECT_EQ(ResolveConfig(sources_).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ConfigTest, TheFileIsTheFirstOfThoseNamed) {
  const auto origin = [&] { return ResolveConfig(sources_)->values.at("every").origin; };
  EXPECT_EQ(origin(), "default");
  const std::string in_home = WriteFile(".config/holdfast/holdfast.toml", "every = 1\n");
  EXPECT_EQ(origin(), in_home);
  environment_["XDG_CONFIG_HOME"] = absl::StrCat(directory_, "/xdg");
  EXPECT_EQ(origin(), "default");
  const std::string in_xdg = WriteFile("xdg/holdfast/holdfast.toml", "every = 2\n");
  EXPECT_EQ(origin(), in_xdg);
  const std::string in_variable = WriteFile("variable.toml", "every = 3\n");
  environment_["HOLDFAST_CONFIG"] = in_variable;
  EXPECT_EQ(origin(), in_variable);
  sources_.config_flag = WriteFile("flag.toml", "every = 4\n");
  EXPECT_EQ(origin(), sources_.config_flag);
}

TEST_F(ConfigTest, DefaultPathsFollowTheUser) {
  AgentConfig config = *ResolveConfig(sources_);
  EXPECT_EQ(config.root, absl::StrCat(directory_, "/.local/state/holdfast/checkpoints"));
  EXPECT_EQ(config.socket, "/tmp/holdfast-1000/agent.sock");
  environment_["XDG_RUNTIME_DIR"] = "/run/user/1000";
  environment_["XDG_STATE_HOME"] = "/state";
  config = *ResolveConfig(sources_);
  EXPECT_EQ(config.root, "/state/holdfast/checkpoints");
  EXPECT_EQ(config.socket, "/run/user/1000/holdfast/agent.sock");
  environment_.erase("XDG_STATE_HOME");
  sources_.user_id = 0;
  config = *ResolveConfig(sources_);
  EXPECT_EQ(config.root, "/var/lib/holdfast/checkpoints");
  EXPECT_EQ(config.socket, "/run/holdfast/agent.sock");
  sources_.flags["state_directory"] = "/elsewhere/";
  config = *ResolveConfig(sources_);
  EXPECT_EQ(config.state_directory, "/elsewhere");
  EXPECT_EQ(config.root, "/elsewhere/checkpoints");
}

TEST_F(ConfigTest, SurvivesBeingHandedOverAndPrinted) {
  sources_.flags = {{"roots", "/with \"quotes\" and\nline"}, {"linger", "90"}, {"every", "7"}};
  const AgentConfig before = *ResolveConfig(sources_);
  const absl::StatusOr<AgentConfig> after = DeserializeConfig(before.Serialize());
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->Print(), before.Print());
  EXPECT_EQ(after->linger, absl::Seconds(90));
  EXPECT_EQ(after->host_memory_bytes, uint64_t{1} << 38);  // a quarter
  // What is printed is a file of the same meaning.
  ConfigSources from_file;
  from_file.memory_bytes = sources_.memory_bytes;
  from_file.config_flag = WriteFile("printed.toml", before.Print());
  const absl::StatusOr<AgentConfig> read = ResolveConfig(from_file);
  ASSERT_TRUE(read.ok()) << read.status();
  for (const ConfigKey& key : ConfigKeys()) {
    EXPECT_EQ(read->values.at(key.name).text, before.values.at(key.name).text) << key.name;
  }
}

TEST_F(ConfigTest, RecoveryIsHandedOverForTheSidecar) {
  EXPECT_EQ(ResolveConfig(sources_)->recovery_toml, "");
  const std::string text = "every = 7\n[recovery]\nhang_timeout = \"2m\"\n";
  sources_.config_flag = WriteFile("f.toml", text);
  const AgentConfig config = *ResolveConfig(sources_);
  EXPECT_EQ(config.recovery_toml, text);
  EXPECT_EQ(DeserializeConfig(config.Serialize())->recovery_toml, text);
}

TEST_F(ConfigTest, TheTopologyIsReadOnceAndHandedOver) {
  const std::string good =
      R"({"schema_version": 1, "nodes": {"n\u0031": {"gpus": [{"nic": "mlx5_0"}]}}})";
  AgentConfig none = *ResolveConfig(sources_);
  EXPECT_TRUE(ReadTopology(none).ok());
  EXPECT_EQ(none.topology_document, "");
  sources_.flags["topology"] = WriteFile("topology.json", good);
  AgentConfig config = *ResolveConfig(sources_);
  ASSERT_TRUE(ReadTopology(config).ok());
  EXPECT_EQ(config.topology_document, good);
  // It may be gone by the time a later worker starts.
  WriteFile("topology.json", "broken");
  const absl::StatusOr<AgentConfig> after = DeserializeConfig(config.Serialize());
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->topology_document, good);
  // Its errors name the file and the place.
  const auto error_of = [&](const std::string& text) {
    WriteFile("topology.json", text);
    return std::string(ReadTopology(config).message());
  };
  EXPECT_THAT(error_of("{\n  \"nodes\": oops}"),
              ::testing::AllOf(HasSubstr("topology.json: "), HasSubstr("line 2")));
  EXPECT_THAT(error_of(R"({"schema_version": 1, "nodes": {"a": {"gpus": [{"rail": 1}]}}})"),
              HasSubstr("topology.json: nodes.a.gpus[0]: expected the key \"nic\""));
  config.topology = absl::StrCat(directory_, "/none.json");
  EXPECT_EQ(ReadTopology(config).code(), absl::StatusCode::kNotFound);
}

TEST_F(ConfigTest, TheTablesOfRecoveryMayStandInTheFileAndAreChecked) {
  sources_.config_flag = WriteFile("f.toml", "every = 7\n[recovery]\nmode = \"ask\"\n");
  const absl::StatusOr<AgentConfig> config = ResolveConfig(sources_);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->due_every_steps, 7);
  EXPECT_THAT(ErrorOf("[recovery]\nmodes = \"ask\""),
              HasSubstr("line 2: unknown key \"recovery.modes\""));
  EXPECT_THAT(ErrorOf("[elastic]\nlayouts = 3"), HasSubstr("elastic.layouts: expected a table"));
  EXPECT_THAT(ErrorOf("recovery = 3"), HasSubstr("recovery: expected a table"));
}

TEST(ConfigTable, IsWhatTheDocumentSays) {
  std::ifstream file(HOLDFAST_SOURCE_DIR "/docs/CONFIGURATION.md");
  const std::string document(std::istreambuf_iterator<char>(file), {});
  EXPECT_THAT(document, HasSubstr(ConfigTable())) << "expected in docs/CONFIGURATION.md:\n"
                                                  << ConfigTable();
}

TEST(ConfigValues, ParsesSizesAndDurations) {
  EXPECT_EQ(*ParseByteCount("4096"), 4096u);
  EXPECT_EQ(*ParseByteCount("4KiB"), 4096u);
  EXPECT_EQ(*ParseByteCount("1.5 GiB"), uint64_t{3} << 29);
  EXPECT_EQ(*ParseByteCount("2gb"), 2'000'000'000u);
  for (const char* bad : {"", "x", "-1", "1e3", "1.2.3", "4XiB", "0.3", "99999999TiB", "nan"}) {
    EXPECT_FALSE(ParseByteCount(bad).ok()) << bad;
  }
  EXPECT_EQ(*ParseMemoryShare("25%", 400), 100u);
  EXPECT_EQ(*ParseMemoryShare("64", 400), 64u);
  EXPECT_FALSE(ParseMemoryShare("101%", 400).ok());
  EXPECT_EQ(*ParseDuration("60"), absl::Seconds(60));
  EXPECT_EQ(*ParseDuration("1m30s"), absl::Seconds(90));
  EXPECT_EQ(*ParseDuration("0"), absl::ZeroDuration());
  for (const char* bad : {"", "x", "-1", "inf", "1y"}) EXPECT_FALSE(ParseDuration(bad).ok()) << bad;
}

class HostMemoryTest : public ConfigTest {};

TEST_F(HostMemoryTest, TheLeastLimitOfAllGroupsAndParentsCounts) {
  EXPECT_EQ(ReadHostMemory(directory_).bytes, 0u);
  WriteFile("proc/meminfo", "MemTotal:       1048576 kB\nMemFree: 5 kB\n");
  EXPECT_EQ(ReadHostMemory(directory_).bytes, uint64_t{1} << 30);
  EXPECT_EQ(ReadHostMemory(directory_).limit, "machine");
  // Version 2: the parent's limit is tighter than the group's own.
  WriteFile("proc/self/cgroup", "0::/a/b\n");
  WriteFile("sys/fs/cgroup/a/b/memory.max", "max\n");
  EXPECT_EQ(ReadHostMemory(directory_).bytes, uint64_t{1} << 30);
  WriteFile("sys/fs/cgroup/a/b/memory.max", "536870912\n");
  EXPECT_EQ(ReadHostMemory(directory_).bytes, uint64_t{1} << 29);
  WriteFile("sys/fs/cgroup/a/memory.max", "268435456\n");
  EXPECT_EQ(ReadHostMemory(directory_).bytes, uint64_t{1} << 28);
  // In a container's own namespace the group is "/" and the limit lies at the mount.
  WriteFile("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(ReadHostMemory(directory_).bytes, uint64_t{1} << 30);
  WriteFile("sys/fs/cgroup/memory.max", "4096\n");
  EXPECT_EQ(ReadHostMemory(directory_).bytes, 4096u);
  // Version 1, "no limit" and a real one.
  WriteFile("proc/self/cgroup", "3:cpu,memory:/x\n2:pids:/y\n");
  WriteFile("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(ReadHostMemory(directory_).bytes, uint64_t{1} << 30);
  WriteFile("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "8192\n");
  EXPECT_EQ(ReadHostMemory(directory_).bytes, 8192u);
}

TEST_F(HostMemoryTest, TheRealMachineHasSome) {
  EXPECT_GT(ReadHostMemory().bytes, uint64_t{64} << 20);
}

}  // namespace
}  // namespace holdfast
