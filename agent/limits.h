// What the agent asks of the kernel for itself, once, before anything else runs.
#ifndef HOLDFAST_AGENT_LIMITS_H_
#define HOLDFAST_AGENT_LIMITS_H_

#include <cstdint>
#include <string>

namespace holdfast {

// RLIMIT_NOFILE and RLIMIT_MEMLOCK to their hard limits (the ring registers images with the
// kernel), no core dump (it would hold tensors; see docs/OPERATING.md), files and sockets for this
// user only (umask 077), the batch scheduling class. What is refused stays as it was.
void RaiseLimits();

// How the kernel gives memory that is shared with trainers, as shmem_enabled has it: "huge pages on
// request", "4 KiB pages (shmem_enabled is never)".
std::string SharedPages();

// The soft RLIMIT_NOFILE now.
uint64_t OpenFilesLimit();

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_LIMITS_H_
