// Where the private agent of a job listens: the hook library starts one there, and `holdfast run`
// too. Std only.
#ifndef HOLDFAST_HOOK_ABI_PRIVATE_AGENT_PATH_H_
#define HOLDFAST_HOOK_ABI_PRIVATE_AGENT_PATH_H_

#include <cstdint>
#include <cstdio>
#include <string>

namespace holdfast::abi {

// The directory of all private agents of this user: $HOLDFAST_RUNTIME_DIR, else
// $XDG_RUNTIME_DIR/holdfast, else /tmp/holdfast-<uid>. The variables' values; empty: not set.
inline std::string RuntimeDirectory(const std::string& holdfast_runtime_dir,
                                    const std::string& xdg_runtime_dir, uint32_t user_id) {
  if (!holdfast_runtime_dir.empty()) return holdfast_runtime_dir;
  if (!xdg_runtime_dir.empty()) return xdg_runtime_dir + "/holdfast";
  return "/tmp/holdfast-" + std::to_string(user_id);
}

// The name of a job's directory in it: 16 hexadecimal digits, FNV-1a-64 of the job's name. (A
// socket's path must be short, a job's name need not be.)
inline std::string JobDirectoryName(const std::string& job) {
  uint64_t hash = 0xcbf29ce484222325U;
  for (const char c : job) {
    hash ^= static_cast<unsigned char>(c);
    hash *= 0x100000001b3U;
  }
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

inline constexpr char kAgentSocketName[] = "agent.sock";

}  // namespace holdfast::abi

#endif  // HOLDFAST_HOOK_ABI_PRIVATE_AGENT_PATH_H_
