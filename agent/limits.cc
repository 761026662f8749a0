#include "agent/limits.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/stat.h>

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

uint64_t OpenFilesLimit() {
  rlimit limit{};
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : 1024;
}

}  // namespace holdfast
