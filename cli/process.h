// What the command's own process takes, and may take, of the machine.
#ifndef HOLDFAST_CLI_PROCESS_H_
#define HOLDFAST_CLI_PROCESS_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "io/file_system.h"

namespace holdfast::cli {

struct ProcessMemory {
  uint64_t resident_bytes = 0;
  uint64_t peak_resident_bytes = 0;  // since the command began
};

// Gives back what is free, then looks: /proc/self/status.
absl::StatusOr<ProcessMemory> LookAtProcessMemory(FileSystem& file_system);

// Raises RLIMIT_NOFILE to its hard limit: a verb may have a file per rank open.
void RaiseOpenFilesLimit();

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_PROCESS_H_
