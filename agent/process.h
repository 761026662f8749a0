// Processes as the agent handles them: by pidfd, never by number, so that a reused pid is never
// signalled; started again from /proc/self/exe, so that a deleted or upgraded file is no trouble.
#ifndef HOLDFAST_AGENT_PROCESS_H_
#define HOLDFAST_AGENT_PROCESS_H_

#include <sys/types.h>

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "io/unique_fd.h"

namespace holdfast {

// Errors: kNotFound if there is no such process (any more).
absl::StatusOr<UniqueFd> OpenPidfd(pid_t pid);

// A pidfd of a dead process (also one that nobody has reaped) is readable. Never waits.
bool IsDead(int pidfd);

// Waits until the process is dead; false at the deadline.
bool WaitUntilDead(int pidfd, absl::Duration deadline);

// A process that is dead already is no error.
void SendSignal(int pidfd, int signal_number);

// Takes a dead child's zombie away and says how it died: "signal 9", "exit code 1", or "not our
// child", of which nothing is known.
std::string Reap(int pidfd);

// The process's number in our pid namespace, from /proc/self/fdinfo; 0 or -1 if it has none or is
// dead.
pid_t PidOf(int pidfd);

// Whether it is a pidfd at all.
bool IsPidfd(int fd);

// From now on the death of the process that has started this one, of which `parent_pidfd` is, kills
// this one (SIGKILL); at once if it is dead already.
void DieWithParent(int parent_pidfd);

// A duplicate that is closed on exec. CHECKs `fd`; an invalid UniqueFd if descriptors have run out.
UniqueFd Duplicate(int fd);

// A memfd of `text`, sealed against every change, at offset 0.
absl::StatusOr<UniqueFd> SealedMemfd(const std::string& name, std::string_view text);

// All of a memfd or regular file, if it has at most `bytes_max` bytes.
absl::StatusOr<std::string> ReadAll(int fd, size_t bytes_max);

struct Child {
  pid_t pid = -1;
  UniqueFd pidfd;
};

// Starts this very program (/proc/self/exe) with `arguments` (the first is the process's name).
// `inherited` descriptors stay open in it under their numbers, and standard input, output and
// error; everything else must be close-on-exec. Signals have their default actions in it; SIGTERM
// and SIGINT are blocked, so that none is lost before it can take them by signalfd.
// Does not copy page tables (posix_spawn is CLONE_VFORK), however much memory is mapped.
absl::StatusOr<Child> SpawnSelf(const std::vector<std::string>& arguments,
                                std::span<const int> inherited);

// Starts `program` (a path, or a name to be found in PATH) in a session of its own, with standard
// streams from and to nowhere and no signal blocked or ignored. `inherited` as above.
absl::StatusOr<Child> SpawnDetached(const std::string& program,
                                    const std::vector<std::string>& arguments,
                                    std::span<const int> inherited);

// Starts `/bin/sh -c command` in a process group of its own, whose number is Child::pid, with no
// signal blocked or ignored. `variables` ("NAME=value") replace those of this process; standard
// output and error are this process's.
absl::StatusOr<Child> SpawnShell(const std::string& command,
                                 const std::vector<std::string>& variables, int standard_input);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_PROCESS_H_
