#include "io/program_path.h"

#include <unistd.h>

#include <climits>

namespace holdfast {

std::string ProgramBeside(const std::string& name) {
  char self[PATH_MAX] = {};
  const ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
  const std::string path(self, length > 0 ? static_cast<size_t>(length) : 0);
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return name;
  const std::string beside = path.substr(0, slash + 1) + name;
  return access(beside.c_str(), X_OK) == 0 ? beside : name;
}

}  // namespace holdfast
