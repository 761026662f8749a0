// The native stacks of a running process, with libdw (elfutils).
//
// Each thread is held for the time of one unwinding, a fraction of a millisecond, or some on a busy
// machine: everything that
// takes long (reading the modules' unwind tables before, finding names afterwards) happens while it
// runs. PTRACE_SEIZE, not ATTACH: if this process is killed meanwhile, the kernel lets the thread
// go on, and no SIGSTOP is left behind. Debug information is never looked for: names come from the
// symbol tables of what is loaded.
//
// What is read is another process's memory, and may be anything: so this runs in the program
// holdfast-witness, which may crash.
#ifndef HOLDFAST_AGENT_WITNESS_NATIVE_STACKS_H_
#define HOLDFAST_AGENT_WITNESS_NATIVE_STACKS_H_

#include <sys/types.h>

#include <string>

#include "absl/status/statusor.h"

namespace holdfast {

// In the form that monitor/witness/stacks.h reads, and behind it a line "# held N us at most".
// Threads that do not stop within 200 ms (in the kernel, for example) are named without frames.
// Errors: kNotFound (no such process), kPermissionDenied (with what would permit it),
// kUnavailable (its modules cannot be read).
absl::StatusOr<std::string> NativeStacks(pid_t process);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_NATIVE_STACKS_H_
