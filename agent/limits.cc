#include "agent/limits.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <fstream>

namespace holdfast {
namespace {

void RaiseToHard(__rlimit_resource resource) {
  rlimit limit{};
  if (getrlimit(resource, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  // Dropped: a lower limit serves too.
  (void)setrlimit(resource, &limit);
}

}  // namespace

void RaiseLimits() {
  umask(077);
  // Waking this process never takes the core from the trainer that rings. Dropped: then it does.
  const sched_param no_priority{};
  (void)sched_setscheduler(0, SCHED_BATCH, &no_priority);
  RaiseToHard(RLIMIT_NOFILE);
  RaiseToHard(RLIMIT_MEMLOCK);
  // Not PR_SET_DUMPABLE: that would also take /proc/self/fd and debuggers from this user.
  const rlimit no_core{0, 0};
  (void)setrlimit(RLIMIT_CORE, &no_core);
}

std::string SharedPages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  std::string text;
  std::getline(file, text);
  const size_t begin = text.find('[');
  const size_t end = text.find(']');
  const std::string value =
      begin < end && end != std::string::npos ? text.substr(begin + 1, end - begin - 1) : "unknown";
  if (value == "always" || value == "within_size" || value == "advise" || value == "force") {
    return "huge pages on request";
  }
  return "4 KiB pages (shmem_enabled is " + value + ")";
}

uint64_t OpenFilesLimit() {
  rlimit limit{};
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : 1024;
}

}  // namespace holdfast
