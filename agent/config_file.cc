#include "agent/config_file.h"

#include <sys/stat.h>

namespace holdfast {
namespace {

// Empty: not set.
std::string Variable(const Environment& environment, const char* name) {
  const char* const value = environment ? environment(name) : nullptr;
  return value == nullptr ? "" : value;
}

}  // namespace

std::string XdgDirectory(const Environment& environment, const char* variable,
                         const char* in_home) {
  const std::string value = Variable(environment, variable);
  if (value.starts_with('/')) return value;
  const std::string home = Variable(environment, "HOME");
  return (home.empty() ? "/nonexistent" : home) + in_home;
}

std::string DefaultStateDirectory(uint32_t user_id, const Environment& environment) {
  if (user_id == 0 && Variable(environment, "XDG_STATE_HOME").empty()) return "/var/lib/holdfast";
  return XdgDirectory(environment, "XDG_STATE_HOME", "/.local/state") + "/holdfast";
}

std::string FindConfigFile(const std::string& flag, const Environment& environment) {
  if (!flag.empty()) return flag;
  if (std::string named = Variable(environment, "HOLDFAST_CONFIG"); !named.empty()) return named;
  for (const std::string& path :
       {XdgDirectory(environment, "XDG_CONFIG_HOME", "/.config") + "/holdfast/holdfast.toml",
        std::string("/etc/holdfast/holdfast.toml")}) {
    struct stat info {};
    if (stat(path.c_str(), &info) == 0) return path;
  }
  return "";
}

}  // namespace holdfast
