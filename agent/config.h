// The agent's configuration: one table of keys (config_keys.cc), four places a value may come
// from, and where each one did come from.
//
//   flag  >  environment variable HOLDFAST_*  >  configuration file  >  default
//
// Only one file is read (config_file.h). A key that is not in the table is refused, with the
// nearest one that is; tables of jobs (kRunTables) are not the agent's and not looked at.
//
// Decided once, by the process that a person started; keeper and later workers get the result
// (Serialize), so that an agent does not change when a file does.
#ifndef HOLDFAST_AGENT_CONFIG_H_
#define HOLDFAST_AGENT_CONFIG_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/service_manager.h"
#include "io/open_ring.h"
#include "io/tcp.h"

namespace holdfast {

// One row of the table; docs/CONFIGURATION.md repeats it and a test compares the two.
struct ConfigKey {
  const char* name;          // in the file
  const char* flag;          // "--root"
  const char* variable;      // "HOLDFAST_ROOT"
  const char* default_text;  // as a person would write it; "auto" and paths: see the help
  const char* help;          // one sentence
};
std::span<const ConfigKey> ConfigKeys();
// The table in Markdown.
std::string ConfigTable();

struct ConfigValue {
  std::string text;
  std::string origin;  // "flag --root", "$HOLDFAST_ROOT", "/etc/holdfast/holdfast.toml", "default"
};

// Where values come from.
struct ConfigSources {
  std::map<std::string, std::string> flags;  // by name of the key
  std::string config_flag;                   // --config; empty: not given
  // Null if not set, as getenv(3). Read during the call only.
  std::function<const char*(const char*)> environment;
  uint32_t user_id = 0;  // root's defaults lie in /run and /var/lib, others' in XDG directories
  uint64_t memory_bytes = 0;  // of which host_memory may be a share; 0: unknown
};

enum class DirectIo { kAuto, kOn, kOff };
// Of jobs that another launcher has started (agent/run/sidecar.h).
enum class SidecarMode { kOff, kObserve, kAct };

struct AgentConfig {
  // Not keys: how the agent was started.
  bool is_private = false;  // --private: ends by itself (linger)
  std::string job;          // --job of a private agent, for people
  ServiceUnit unit;         // in which systemd runs it

  std::string root;    // absolute, no trailing slash
  std::string socket;  // absolute
  std::string state_directory;
  std::string log_file;  // empty: standard error (a private agent: beside its socket)
  std::string log_level;
  uint64_t host_memory_bytes = 0;
  uint64_t due_every_steps = 0;
  bool every_is_auto = false;  // then due_every_steps is 0
  uint32_t images_in_memory = 0;
  uint64_t block_bytes = 0;
  uint32_t flush_writes_in_flight = 0;
  uint32_t threads = 0;
  absl::Duration linger{};
  absl::Duration drain_deadline{};
  std::string on_verdict;  // empty: none
  absl::Duration verdicts_keep{};
  std::string ras_address;  // a RasAddress; empty: none
  std::string kernel_log;   // absolute; empty: none
  std::optional<Endpoint> http;
  std::string http_token_file;  // absolute; empty: no token is asked for
  std::string topology;         // absolute; empty: none
  SidecarMode sidecar = SidecarMode::kOff;
  RingOptions::Kind ring{};
  DirectIo direct{};

  // What the file `topology` holds (monitor/topology.h), once ReadTopology has read it.
  std::string topology_document;
  // The configuration file, for its [recovery]: what the sidecar goes by. It was parsed without an
  // error (recovery/settings.h). Empty: there is none.
  std::string recovery_toml;

  std::map<std::string, ConfigValue> values;  // every key
  uint64_t memory_bytes = 0;                  // as in ConfigSources

  // As a TOML file that would have the same effect, with the origin behind each value.
  std::string Print() const;
  // For DeserializeConfig in another process.
  std::string Serialize() const;
};

// Errors: kInvalidArgument: the file (line), the key or the value, with what was expected;
// kNotFound: the file that was named.
absl::StatusOr<AgentConfig> ResolveConfig(const ConfigSources& sources);

// Reads the file that `config.topology` names, if it names one, and checks it; later processes get
// what was in it (Serialize). Errors, which name the file: as open(2), ReadAll and Topology::Parse.
absl::Status ReadTopology(AgentConfig& config);

absl::StatusOr<AgentConfig> DeserializeConfig(const std::string& text);

// What sessions are bound to (their root, the size of their blocks) is in `config` from now on as
// in the configuration of the agent that began them: its Serialize(), of whatever version. Returns
// what was another value: "block_bytes = 4194304 (default)". Errors: kDataLoss: `serialized` is
// none. Then `config` is as it was.
absl::StatusOr<std::vector<std::string>> BindToSessions(const std::string& serialized,
                                                        AgentConfig& config);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_CONFIG_H_
