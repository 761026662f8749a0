// Where an agent listens, and `holdfast status` looks for it, if nobody says where.
#ifndef HOLDFAST_AGENT_DEFAULT_SOCKET_H_
#define HOLDFAST_AGENT_DEFAULT_SOCKET_H_

#include <cstdint>
#include <string>

namespace holdfast {

// `runtime_directory`: $XDG_RUNTIME_DIR; null or empty: not set. Root's agent serves the node, and
// so lies in /run whatever the session of the person who starts it.
inline std::string DefaultSocket(uint32_t user_id, const char* runtime_directory) {
  if (user_id == 0) return "/run/holdfast/agent.sock";
  if (runtime_directory != nullptr && *runtime_directory != '\0') {
    return std::string(runtime_directory) + "/holdfast/agent.sock";
  }
  return "/tmp/holdfast-" + std::to_string(user_id) + "/agent.sock";
}

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_DEFAULT_SOCKET_H_
