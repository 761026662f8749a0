// Which configuration file is read, by the agent and by `holdfast run`.
#ifndef HOLDFAST_AGENT_CONFIG_FILE_H_
#define HOLDFAST_AGENT_CONFIG_FILE_H_

#include <cstdint>
#include <functional>
#include <string>

namespace holdfast {

// As getenv(3): null if not set.
using Environment = std::function<const char*(const char*)>;

// An XDG base directory; `in_home` ("/.config") is appended to $HOME without it. Relative ones are
// invalid by its specification, and ignored.
std::string XdgDirectory(const Environment& environment, const char* variable, const char* in_home);

// What `state_directory` is if nobody says it.
std::string DefaultStateDirectory(uint32_t user_id, const Environment& environment);

// The first of: `flag`, $HOLDFAST_CONFIG, $XDG_CONFIG_HOME/holdfast/holdfast.toml,
// /etc/holdfast/holdfast.toml. The last two count if they exist, the first two if they are not
// empty. Empty: there is none.
std::string FindConfigFile(const std::string& flag, const Environment& environment);

// Tables of the file that are not the agent's own: `holdfast run` hands them over with a job.
inline constexpr const char* kRunTables[] = {"recovery", "elastic"};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_CONFIG_FILE_H_
