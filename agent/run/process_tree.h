// All processes below one, whatever sessions and groups they have made for themselves.
//
// A process that is a child subreaper (PR_SET_CHILD_SUBREAPER) gets every orphan below it as its
// own child, so nothing that it has ever started, nor what that has started, leaves its tree while
// it lives. Std only: holdfast-shim uses it.
#ifndef HOLDFAST_AGENT_RUN_PROCESS_TREE_H_
#define HOLDFAST_AGENT_RUN_PROCESS_TREE_H_

#include <sys/types.h>

#include <cstddef>
#include <string>

namespace holdfast {

// Sends `signal_number` to every process below `root`, not to `root`, and returns to how many.
// Zombies are none. One pass over /proc: what is forked meanwhile is found by the next one, so that
// who wants an end of all repeats it until there is nobody left. By pidfd, after a second look at
// who the parent is: a number that was given to a stranger meanwhile is not signalled.
size_t SignalDescendants(pid_t root, int signal_number);

// Sends it to every process of this user that was started with `variable` ("NAME=value"), but to
// this one, and returns to how many: where there is no root of the tree any more.
size_t SignalByVariable(const std::string& variable, int signal_number);

// Whether `process` lives below `root`, by its parents now.
bool IsDescendant(pid_t process, pid_t root);

// The state letter of /proc/PID/stat ('R', 'S', 'D', 'T', 't', 'Z', ...); 0 if there is no such
// process.
char ProcessState(pid_t process);

// Its parent; 0 if there is no such process.
pid_t ParentOf(pid_t process);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_PROCESS_TREE_H_
