#include "agent/config.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <iterator>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/config_file.h"
#include "agent/config_values.h"
#include "agent/default_socket.h"
#include "agent/http_server.h"
#include "agent/process.h"
#include "agent/recovery/settings.h"
#include "agent/witness/ras_client.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "io/errno_status.h"
#include "io/unique_fd.h"
#include "monitor/topology.h"
#include "nlohmann/json.hpp"

#define TOML_EXCEPTIONS 0
#include "toml++/toml.h"

namespace holdfast {
namespace {

constexpr size_t kFileBytesMax = 1 << 20;
// The directory may be of any length; a longer name would not fit behind it into a sockaddr_un,
// which holds 107 bytes (runtime_directory.cc).
constexpr size_t kSocketNameBytesMax = 64;
constexpr uint64_t kStepsMax = 1'000'000'000'000;

using Values = std::map<std::string, ConfigValue>;

std::optional<std::string> Variable(const ConfigSources& sources, const char* name) {
  const char* const value = sources.environment ? sources.environment(name) : nullptr;
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

// `what`: for the message of an error.
absl::StatusOr<std::string> ReadFile(const char* what, const std::string& path, size_t bytes_max) {
  const UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return ErrnoStatus(errno, absl::StrCat("open ", what), path);
  return ReadAll(file.get(), bytes_max);
}

// One value of the file as text; a list of one path counts as the path.
absl::StatusOr<std::string> TextOf(const std::string& key, const toml::node& node) {
  if (key == "roots") {
    if (const toml::array* list = node.as_array(); list != nullptr) {
      if (list->size() != 1) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "roots: expected exactly one path, found %d: one root holds all checkpoints, several "
            "tiers are not offered",
            list->size()));
      }
      return TextOf("", *list->get(0));
    }
  }
  if (const auto text = node.value_exact<std::string>()) return *text;
  if (const auto number = node.value_exact<int64_t>()) return absl::StrCat(*number);
  std::string kind = toml::impl::node_type_friendly_names[static_cast<size_t>(node.type())].data();
  return absl::InvalidArgumentError(
      absl::StrCat(key, ": expected a string or a whole number, found ", kind));
}

absl::Status AddFile(const std::string& path, AgentConfig& config) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile("configuration", path, kFileBytesMax));
  const toml::parse_result parsed = toml::parse(text, path);
  if (!parsed) {
    return absl::InvalidArgumentError(absl::StrFormat("%s line %d: %s", path,
                                                      parsed.error().source().begin.line,
                                                      std::string(parsed.error().description())));
  }
  // What a job may choose about its recovery is read by who runs one; a slip in it is told here,
  // too.
  RETURN_IF_ERROR(recovery::ParseSettings(text, path).status());
  config.recovery_toml = text;
  std::vector<std::string_view> known;
  for (const ConfigKey& key : ConfigKeys()) known.emplace_back(key.name);
  for (const auto& [key_node, node] : parsed.table()) {
    const std::string key(key_node.str());
    if (node.is_table() && std::count(std::begin(kRunTables), std::end(kRunTables), key) > 0) {
      continue;
    }
    const std::string where = absl::StrFormat("%s line %d: ", path, key_node.source().begin.line);
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, "unknown key \"", key, "\"", DidYouMean(key, known)));
    }
    absl::StatusOr<std::string> value = TextOf(key, node);
    if (!value.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(where, std::string(value.status().message())));
    }
    config.values[key] = {*std::move(value), path};
  }
  return absl::OkStatus();
}

// The defaults that depend on who runs the agent.
void SetPathDefaults(const ConfigSources& sources, Values& values) {
  if (values["state_directory"].origin == "default") {
    values["state_directory"].text = DefaultStateDirectory(sources.user_id, sources.environment);
  }
  if (values["roots"].origin == "default") {
    values["roots"].text = absl::StrCat(values["state_directory"].text, "/checkpoints");
  }
  if (values["http_token_file"].origin == "default") {
    values["http_token_file"].text = absl::StrCat(values["state_directory"].text, "/http-token");
  }
  if (values["socket"].origin == "default") {
    values["socket"].text =
        DefaultSocket(sources.user_id, Variable(sources, "XDG_RUNTIME_DIR").value_or("").c_str());
  }
}

absl::StatusOr<std::string> ParsePath(const std::string& text) {
  if (text.empty() || text.front() != '/') {
    return absl::InvalidArgumentError(
        absl::StrCat("expected an absolute path, found \"", text, "\""));
  }
  std::string path = std::filesystem::path(text).lexically_normal().string();
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

// The index of `text` among `choices`.
absl::StatusOr<size_t> ParseChoice(const std::string& text,
                                   std::initializer_list<std::string_view> choices) {
  const auto found = std::find(choices.begin(), choices.end(), text);
  if (found != choices.end()) return static_cast<size_t>(found - choices.begin());
  return absl::InvalidArgumentError(absl::StrCat(
      "expected one of ",
      absl::StrJoin(choices, ", ",
                    [](std::string* out, std::string_view choice) { out->append(choice); }),
      ", found \"", text, "\"", DidYouMean(text, {choices.begin(), choices.size()})));
}

uint32_t AutoThreads() { return std::clamp(std::thread::hardware_concurrency(), 1u, 4u); }

// Fills the field of one key from its text.
absl::Status SetField(const std::string& key, const std::string& text, AgentConfig& config) {
  if (key == "roots") {
    ASSIGN_OR_RETURN(config.root, ParsePath(text));
  } else if (key == "socket") {
    ASSIGN_OR_RETURN(config.socket, ParsePath(text));
    const std::string name = std::filesystem::path(config.socket).filename().string();
    if (name.empty() || name.size() > kSocketNameBytesMax) {
      return absl::InvalidArgumentError(
          absl::StrFormat("expected a file name of 1 to %d bytes, found %d: \"%s\"",
                          kSocketNameBytesMax, name.size(), config.socket));
    }
  } else if (key == "state_directory") {
    ASSIGN_OR_RETURN(config.state_directory, ParsePath(text));
  } else if (key == "log_file") {
    if (text.empty()) return absl::OkStatus();
    ASSIGN_OR_RETURN(config.log_file, ParsePath(text));
  } else if (key == "log_level") {
    RETURN_IF_ERROR(ParseChoice(text, {"debug", "info", "warning", "error"}).status());
    config.log_level = text;
  } else if (key == "host_memory") {
    ASSIGN_OR_RETURN(config.host_memory_bytes, ParseMemoryShare(text, config.memory_bytes));
  } else if (key == "every") {
    config.every_is_auto = text == "auto";
    if (config.every_is_auto) return absl::OkStatus();
    const absl::StatusOr<uint64_t> steps = ParseCount(text, 0, kStepsMax);
    if (!steps.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(std::string(steps.status().message()), "; or auto"));
    }
    config.due_every_steps = *steps;
  } else if (key == "images_in_memory") {
    ASSIGN_OR_RETURN(config.images_in_memory, ParseCount(text, 1, 4));
  } else if (key == "block_bytes") {
    ASSIGN_OR_RETURN(config.block_bytes, ParseByteCount(text));
    const uint64_t bytes = config.block_bytes;
    if (bytes < 4096 || bytes > uint64_t{64} << 20 || (bytes & (bytes - 1)) != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("expected a power of two from 4KiB to 64MiB, found \"", text, "\""));
    }
  } else if (key == "flush_writes") {
    ASSIGN_OR_RETURN(config.flush_writes_in_flight, ParseCount(text, 1, 256));
  } else if (key == "threads") {
    const std::string number = text == "auto" ? absl::StrCat(AutoThreads()) : text;
    ASSIGN_OR_RETURN(config.threads, ParseCount(number, 1, 256));
  } else if (key == "ring") {
    ASSIGN_OR_RETURN(const size_t choice, ParseChoice(text, {"auto", "io_uring", "threads"}));
    constexpr RingOptions::Kind kKinds[] = {RingOptions::Kind::kBest, RingOptions::Kind::kUring,
                                            RingOptions::Kind::kThreads};
    config.ring = kKinds[choice];
  } else if (key == "direct") {
    ASSIGN_OR_RETURN(const size_t choice, ParseChoice(text, {"auto", "on", "off"}));
    constexpr DirectIo kChoices[] = {DirectIo::kAuto, DirectIo::kOn, DirectIo::kOff};
    config.direct = kChoices[choice];
  } else if (key == "linger") {
    ASSIGN_OR_RETURN(config.linger, ParseDuration(text));
  } else if (key == "drain_deadline") {
    ASSIGN_OR_RETURN(config.drain_deadline, ParseDuration(text));
  } else if (key == "on_verdict") {
    config.on_verdict = text;
  } else if (key == "verdicts_keep") {
    ASSIGN_OR_RETURN(config.verdicts_keep, ParseDuration(text));
  } else if (key == "ras_address") {
    if (text == "off") return absl::OkStatus();
    RETURN_IF_ERROR(ParseRasAddress(text).status());
    config.ras_address = text;
  } else if (key == "kernel_log") {
    if (text == "off") return absl::OkStatus();
    ASSIGN_OR_RETURN(config.kernel_log, ParsePath(text));
  } else if (key == "http") {
    if (text == "off") return absl::OkStatus();
    ASSIGN_OR_RETURN(config.http, ParseHttpAddress(text));
  } else if (key == "http_token_file") {
    if (text == "off") return absl::OkStatus();
    ASSIGN_OR_RETURN(config.http_token_file, ParsePath(text));
  } else if (key == "topology") {
    if (text.empty()) return absl::OkStatus();
    ASSIGN_OR_RETURN(config.topology, ParsePath(text));
  } else if (key == "sidecar") {
    ASSIGN_OR_RETURN(const size_t choice, ParseChoice(text, {"off", "observe", "act"}));
    constexpr SidecarMode kChoices[] = {SidecarMode::kOff, SidecarMode::kObserve,
                                        SidecarMode::kAct};
    config.sidecar = kChoices[choice];
  } else {
    return absl::InternalError(absl::StrCat("no field for the key ", key));
  }
  return absl::OkStatus();
}

// Fills every field from `config.values`.
absl::Status SetFields(AgentConfig& config) {
  for (const auto& [key, value] : config.values) {
    if (absl::Status set = SetField(key, value.text, config); !set.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(key, " (", value.origin, "): ", std::string(set.message())));
    }
  }
  if (config.http.has_value() && !config.http->is_loopback() && config.http_token_file.empty()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "http_token_file (%s): expected a file, because http = %s can be reached from other "
        "machines, found off",
        config.values.at("http_token_file").origin, config.http->ToString()));
  }
  return absl::OkStatus();
}

// A TOML string that needs no thought about what is in it.
std::string Quoted(const std::string& text) { return nlohmann::json(text).dump(); }

}  // namespace

absl::StatusOr<AgentConfig> ResolveConfig(const ConfigSources& sources) {
  AgentConfig config;
  config.memory_bytes = sources.memory_bytes;
  for (const ConfigKey& key : ConfigKeys()) config.values[key.name] = {key.default_text, "default"};
  const std::string path = FindConfigFile(sources.config_flag, sources.environment);
  if (!path.empty()) RETURN_IF_ERROR(AddFile(path, config));
  for (const ConfigKey& key : ConfigKeys()) {
    if (const auto text = Variable(sources, key.variable)) {
      config.values[key.name] = {*text, absl::StrCat("$", key.variable)};
    }
    if (const auto flag = sources.flags.find(key.name); flag != sources.flags.end()) {
      config.values[key.name] = {flag->second, absl::StrCat("flag ", key.flag)};
    }
  }
  SetPathDefaults(sources, config.values);
  RETURN_IF_ERROR(SetFields(config));
  return config;
}

absl::Status ReadTopology(AgentConfig& config) {
  if (config.topology.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(config.topology_document,
                   ReadFile("topology", config.topology, monitor::kTopologyBytesMax));
  const absl::Status parsed = monitor::Topology::Parse(config.topology_document).status();
  if (parsed.ok()) return parsed;
  return absl::InvalidArgumentError(
      absl::StrCat(config.topology, ": ", std::string(parsed.message())));
}

std::string AgentConfig::Print() const {
  std::string text;
  for (const ConfigKey& key : ConfigKeys()) {
    const ConfigValue& value = values.at(key.name);
    std::string line = absl::StrCat(key.name, " = ", Quoted(value.text));
    if (std::string_view(key.name) == "roots") {
      line = absl::StrCat(key.name, " = [", Quoted(value.text), "]");
    }
    absl::StrAppendFormat(&text, "%-50s # %s\n", line, value.origin);
  }
  return text;
}

std::string AgentConfig::Serialize() const {
  nlohmann::json object = {{"memory_bytes", memory_bytes},
                           {"is_private", is_private},
                           {"job", job},
                           {"notify_socket", unit.notify_socket},
                           {"descriptors_max", unit.descriptors_max},
                           {"watchdog_us", absl::ToInt64Microseconds(unit.watchdog)},
                           {"topology_document", topology_document},
                           {"recovery_toml", recovery_toml}};
  for (const auto& [key, value] : values) {
    object["values"][key] = {{"text", value.text}, {"origin", value.origin}};
  }
  return object.dump();
}

absl::StatusOr<AgentConfig> DeserializeConfig(const std::string& text) {
  const nlohmann::json object = nlohmann::json::parse(text, nullptr, false);
  if (!object.is_object()) return absl::InternalError("the configuration handed over is damaged");
  AgentConfig config;
  config.memory_bytes = object.value("memory_bytes", uint64_t{0});
  config.is_private = object.value("is_private", false);
  config.job = object.value("job", "");
  config.unit.notify_socket = object.value("notify_socket", "");
  config.unit.descriptors_max = object.value("descriptors_max", uint32_t{0});
  config.unit.watchdog = absl::Microseconds(object.value("watchdog_us", int64_t{0}));
  config.topology_document = object.value("topology_document", "");
  config.recovery_toml = object.value("recovery_toml", "");
  for (const auto& [key, value] : object["values"].items()) {
    config.values[key] = {value["text"], value["origin"]};
  }
  RETURN_IF_ERROR(SetFields(config));
  return config;
}

absl::StatusOr<std::vector<std::string>> BindToSessions(const std::string& serialized,
                                                        AgentConfig& config) {
  const nlohmann::json before = nlohmann::json::parse(serialized, nullptr, false);
  AgentConfig bound = config;
  std::vector<std::string> replaced;
  for (const std::string key : {"roots", "block_bytes"}) {
    const nlohmann::json::json_pointer place("/values/" + key + "/text");
    if (!before.is_object() || !before.contains(place) || !before.at(place).is_string()) {
      return absl::DataLossError(
          absl::StrFormat("the configuration that systemd has kept: expected a value of %s", key));
    }
    ConfigValue& value = bound.values.at(key);
    std::string text = before.at(place).get<std::string>();
    if (value.text == text) continue;
    replaced.push_back(absl::StrFormat("%s = %s (%s)", key, value.text, value.origin));
    value = {std::move(text), "of the sessions that systemd has kept"};
  }
  ASSIGN_OR_RETURN(config, DeserializeConfig(bound.Serialize()));
  return replaced;
}

}  // namespace holdfast
