#include "agent/run/run_spec.h"

#include <errno.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/run/fields.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "hook/abi/messages.h"
#include "io/errno_status.h"
#include "io/tcp.h"

namespace holdfast {
namespace {

constexpr char kNul = '\0';
constexpr uint32_t kSpecVersion = 1;
constexpr size_t kNameBytesMax = 200;  // of texts that become part of keys and paths
constexpr size_t kTomlBytesMax = size_t{1} << 20;
constexpr size_t kWordsMax = 65'536;

// Reads fields, and remembers the first that is not as it should be.
class Reader {
 public:
  explicit Reader(const Fields& fields) : fields_(fields) {}

  uint64_t Number(const char* name, uint64_t min, uint64_t max) {
    const auto value = fields_.Number(name, static_cast<int64_t>(min), static_cast<int64_t>(max));
    if (!value) Refuse(name, absl::StrFormat("a number from %d to %d", min, max));
    return static_cast<uint64_t>(value.value_or(0));
  }
  std::string Text(const char* name, size_t bytes_min, size_t bytes_max) {
    std::string text = fields_.Text(name).value_or("");
    if (text.size() < bytes_min || text.size() > bytes_max) {
      Refuse(name, absl::StrFormat("%d to %d bytes", bytes_min, bytes_max));
    }
    return text;
  }
  // Becomes part of a path: no separators in it, and not hidden.
  std::string Name(const char* name) {
    std::string text = Text(name, 1, kNameBytesMax);
    constexpr char kAllowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    if (text.empty() || text[0] == '.' || text.find_first_not_of(kAllowed) != std::string::npos) {
      Refuse(name, "of [A-Za-z0-9._-], without a leading dot");
    }
    return text;
  }
  std::string Path(const char* name) {
    std::string text = Text(name, 1, 4095);
    if (!text.starts_with('/')) Refuse(name, "an absolute path");
    return text;
  }
  std::vector<std::string> All(const char* name) {
    std::vector<std::string> texts = fields_.All(name);
    if (texts.size() > kWordsMax) Refuse(name, absl::StrFormat("at most %d", kWordsMax));
    return texts;
  }
  const absl::Status& status() const { return status_; }

  void Refuse(const char* name, const std::string& expected) {
    if (!status_.ok()) return;
    status_ = absl::InvalidArgumentError(
        absl::StrFormat("run: %s: expected %s, found '%s'", name, expected,
                        fields_.Text(name).value_or("nothing").substr(0, 80)));
  }

 private:
  const Fields& fields_;
  absl::Status status_;
};

// Set by every launcher for its own ranks: here they would name another job's, if they stayed.
bool IsOfALauncher(std::string_view variable) {
  const std::string_view name = variable.substr(0, variable.find('='));
  static constexpr std::array<std::string_view, 19> kNames = {"RANK",
                                                              "LOCAL_RANK",
                                                              "GROUP_RANK",
                                                              "ROLE_RANK",
                                                              "ROLE_NAME",
                                                              "WORLD_SIZE",
                                                              "LOCAL_WORLD_SIZE",
                                                              "GROUP_WORLD_SIZE",
                                                              "ROLE_WORLD_SIZE",
                                                              "MASTER_ADDR",
                                                              "MASTER_PORT",
                                                              "HOLDFAST_JOB",
                                                              "HOLDFAST_SOCKET",
                                                              "HOLDFAST_ATTEMPT_KEY",
                                                              "HOLDFAST_LAYOUT",
                                                              "HOLDFAST_PRIVATE",
                                                              "HOLDFAST_RUN_ID",
                                                              "HOLDFAST_LAUNCH",
                                                              "HOLDFAST_KILL_AT"};
  return name.starts_with("TORCHELASTIC_") ||
         std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

bool HasVariable(const std::vector<std::string>& environment, std::string_view name) {
  return std::any_of(environment.begin(), environment.end(), [&](std::string_view variable) {
    return variable.size() > name.size() && variable.starts_with(name) &&
           variable[name.size()] == '=';
  });
}

// Below the ports that the kernel gives to whoever asks for any.
constexpr uint32_t kPortMin = 10'000;
uint32_t PortEnd() {
  std::ifstream file("/proc/sys/net/ipv4/ip_local_port_range");
  uint32_t first = 0;
  return file >> first && first > kPortMin + 1000 ? std::min(first, 65'536U) : 32'768U;
}

}  // namespace

std::string EncodeRunSpec(const RunSpec& spec) {
  Fields fields;
  fields.Add("version", kSpecVersion);
  fields.Add("run_id", spec.run_id);
  fields.Add("job", spec.job);
  fields.Add("rdzv_id", spec.rdzv_id);
  fields.Add("working_directory", spec.working_directory);
  fields.Add("umask", spec.umask);
  fields.Add("ranks", spec.ranks);
  fields.Add("role", spec.role);
  fields.Add("master_address", spec.master_address);
  fields.Add("master_port", spec.master_port);
  fields.Add("log_directory", spec.log_directory);
  fields.Add("log_bytes_max", static_cast<int64_t>(spec.log_bytes_max));
  fields.Add("recovery_toml", spec.recovery_toml);
  if (spec.max_restarts.has_value()) fields.Add("max_restarts", *spec.max_restarts);
  if (spec.stop_wait_seconds.has_value()) {
    fields.Add("stop_wait_seconds", *spec.stop_wait_seconds);
  }
  for (const std::string& gpu : spec.gpus) fields.Add("gpu", gpu);
  fields.Add("owner_pid", spec.owner_pid);
  fields.Add("boot_id", spec.boot_id);
  fields.Add("run_number", spec.run_number);
  for (const ShimSpec::Limit& limit : spec.limits) {
    fields.Add("limit_resource", limit.resource);
    fields.Add("limit_soft", std::to_string(limit.soft));
  }
  for (const std::string& word : spec.command) fields.Add("command", word);
  for (const std::string& variable : spec.environment) fields.Add("environment", variable);
  return fields.Encode(kNul);
}

absl::StatusOr<RunSpec> DecodeRunSpec(std::string_view bytes) {
  const std::optional<Fields> fields = Fields::Decode(bytes, kNul);
  if (!fields.has_value()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "run: expected fields of at most %d bytes, found something else", Fields::kBytesMax));
  }
  Reader reader(*fields);
  RunSpec spec;
  reader.Number("version", kSpecVersion, kSpecVersion);
  spec.run_id = reader.Name("run_id");
  spec.job = reader.Name("job");
  if (spec.job.size() > abi::kJobNameBytesMax) reader.Refuse("job", "at most 128 bytes");
  spec.rdzv_id = reader.Text("rdzv_id", 1, kNameBytesMax);
  spec.working_directory = reader.Path("working_directory");
  spec.umask = static_cast<uint32_t>(reader.Number("umask", 0, 0777));
  spec.ranks = static_cast<uint32_t>(reader.Number("ranks", 1, RunSpec::kRanksMax));
  spec.role = reader.Text("role", 1, kNameBytesMax);
  spec.master_address = reader.Text("master_address", 1, 255);
  spec.master_port = static_cast<uint32_t>(reader.Number("master_port", 0, 65'535));
  if (!reader.Text("log_directory", 0, 4095).empty()) {
    spec.log_directory = reader.Path("log_directory");
  }
  spec.log_bytes_max = reader.Number("log_bytes_max", 4096, int64_t{1} << 50);
  spec.recovery_toml = reader.Text("recovery_toml", 0, kTomlBytesMax);
  if (fields->Text("max_restarts").has_value()) {
    spec.max_restarts = static_cast<uint32_t>(reader.Number("max_restarts", 0, 1'000'000));
  }
  if (fields->Text("stop_wait_seconds").has_value()) {
    spec.stop_wait_seconds =
        static_cast<uint32_t>(reader.Number("stop_wait_seconds", 0, RunSpec::kStopWaitSecondsMax));
  }
  spec.gpus = reader.All("gpu");
  if (!spec.gpus.empty() && spec.gpus.size() < spec.ranks) {
    reader.Refuse("gpu", absl::StrFormat("none, or at least one for each of %d ranks", spec.ranks));
  }
  spec.owner_pid = static_cast<uint32_t>(reader.Number("owner_pid", 0, INT32_MAX));
  spec.boot_id = reader.Text("boot_id", 0, 64);
  spec.run_number = static_cast<uint32_t>(reader.Number("run_number", 0, UINT32_MAX));
  spec.command = reader.All("command");
  if (spec.command.empty()) reader.Refuse("command", "one");
  spec.environment = reader.All("environment");
  const std::vector<std::string> resources = reader.All("limit_resource");
  const std::vector<std::string> softs = reader.All("limit_soft");
  if (resources.size() != softs.size() || resources.size() > 64) {
    reader.Refuse("limit_resource", "at most 64, each with a limit_soft");
  }
  RETURN_IF_ERROR(reader.status());
  for (size_t i = 0; i < resources.size(); ++i) {
    ShimSpec::Limit limit;
    if (std::sscanf(resources[i].c_str(), "%u", &limit.resource) != 1 ||
        std::sscanf(softs[i].c_str(), "%lu", &limit.soft) != 1) {
      return absl::InvalidArgumentError("run: limits: expected numbers");
    }
    spec.limits.push_back(limit);
  }
  return spec;
}

std::string NodeOf(const RunSpec& spec) {
  constexpr std::string_view kName = "HOLDFAST_NODE=";
  for (const std::string_view variable : spec.environment) {
    if (variable.starts_with(kName) && variable.size() > kName.size()) {
      return std::string(variable.substr(kName.size()));
    }
  }
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "localhost";
}

std::string BootId() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  file >> id;
  return id;
}

std::string AttemptKeyOf(const RunSpec& spec, recovery::Launch launch) {
  return absl::StrCat(spec.run_id, ":", Value(launch));
}

std::string LogDirectoryOf(const RunSpec& spec, uint32_t restart_count, uint32_t rank) {
  return absl::StrCat(spec.log_directory, "/attempt_", restart_count, "/", rank);
}

std::vector<std::string> EnvironmentOf(const RankStart& start) {
  const RunSpec& spec = start.spec;
  std::vector<std::string> environment;
  for (const std::string& variable : spec.environment) {
    if (!IsOfALauncher(variable)) environment.push_back(variable);
  }
  const auto set = [&](const char* name, const auto& value) {
    environment.push_back(absl::StrCat(name, "=", value));
  };
  const uint32_t world_size = start.start.placement.world_size();
  // One node, one group, one role: the numbers agree.
  for (const char* name : {"RANK", "LOCAL_RANK", "ROLE_RANK"}) set(name, start.rank);
  for (const char* name : {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"}) {
    set(name, world_size);
  }
  set("GROUP_RANK", 0);
  set("GROUP_WORLD_SIZE", 1);
  set("ROLE_NAME", spec.role);
  set("MASTER_ADDR", spec.master_address);
  set("MASTER_PORT", start.port);
  set("TORCHELASTIC_RESTART_COUNT", start.start.restart_count);
  set("TORCHELASTIC_MAX_RESTARTS", start.max_restarts);
  set("TORCHELASTIC_RUN_ID", spec.rdzv_id);
  // Rank 0 hosts the TCPStore: it must end with its attempt.
  set("TORCHELASTIC_USE_AGENT_STORE", "False");
  set("TORCHELASTIC_ERROR_FILE",
      absl::StrCat(LogDirectoryOf(spec, start.start.restart_count, start.rank), "/",
                   kErrorFileName));
  if (!HasVariable(spec.environment, "TORCH_NCCL_ASYNC_ERROR_HANDLING")) {
    set("TORCH_NCCL_ASYNC_ERROR_HANDLING", 1);
  }
  if (world_size > 1 && !HasVariable(spec.environment, "OMP_NUM_THREADS")) {
    set("OMP_NUM_THREADS", 1);
  }
  set("HOLDFAST_JOB", spec.job);
  set("HOLDFAST_SOCKET", start.socket);
  set("HOLDFAST_ATTEMPT_KEY", AttemptKeyOf(spec, start.start.launch));
  set("HOLDFAST_RUN_ID", spec.run_id);
  set("HOLDFAST_LAUNCH", Value(start.start.launch));
  if (!start.start.placement.layout.empty()) set("HOLDFAST_LAYOUT", start.start.placement.layout);
  if (!spec.gpus.empty()) {
    std::erase_if(environment, [](const std::string& variable) {
      return variable.starts_with("CUDA_VISIBLE_DEVICES=");
    });
    std::string numbers;
    for (const recovery::Gpu& gpu : start.start.placement.gpus) {
      absl::StrAppend(&numbers, numbers.empty() ? "" : ",",
                      gpu.uuid.empty() ? absl::StrCat(gpu.index) : gpu.uuid);
    }
    set("CUDA_VISIBLE_DEVICES", numbers);
  }
  return environment;
}

absl::StatusOr<uint32_t> FindPort(const std::string& address) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  // A name is not asked for here, because that may take long: a port that is free for all addresses
  // is free for it.
  if (getaddrinfo(address.c_str(), "0", &hints, &found) != 0 &&
      getaddrinfo("0.0.0.0", "0", &hints, &found) != 0) {
    return absl::InternalError("getaddrinfo refuses 0.0.0.0");
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> places(found, &freeaddrinfo);
  sockaddr_storage address_found{};
  std::memcpy(&address_found, found->ai_addr, found->ai_addrlen);
  const Endpoint place(address_found);
  const uint32_t end = PortEnd();
  constexpr int kTries = 200;
  for (int i = 0; i < kTries; ++i) {
    const uint32_t port = kPortMin + static_cast<uint32_t>(RandomBits() % (end - kPortMin));
    if (ListenTcp(place.WithPort(static_cast<uint16_t>(port)), 1).ok()) return port;
  }
  return absl::ResourceExhaustedError(absl::StrFormat("no free port of %s among %d from %d to %d",
                                                      address, kTries, kPortMin, end - 1));
}

}  // namespace holdfast
