// Runs what parses untrusted bytes in a child process that can do next to nothing: it reads files
// below one directory and hands back one string, in a sealed memfd. A parser that a hostile file
// takes over can neither write a file, nor open a socket, nor start a program, nor read anything
// else of the user's.
//
// Layers, each of which the kernel or a container may refuse; SandboxReport says which held:
//   Landlock  no file access but reading below the directory (Linux 5.13)
//   seccomp   no system call but those of reading files, memory and ending
//   rlimits   memory, processor time, bytes written, open files
#ifndef HOLDFAST_CONVERTER_SANDBOX_H_
#define HOLDFAST_CONVERTER_SANDBOX_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast::converter {

struct SandboxLimits {
  uint64_t memory_bytes = uint64_t{8} << 30;  // besides what the process has when it begins
  uint64_t cpu_seconds = 600;
  size_t result_bytes = (size_t{1} << 30) + (size_t{64} << 10);
};

struct SandboxReport {
  std::vector<std::string> missing;  // layers that were not granted, with the reason
};

// Runs `work` in the child, with reading allowed below `readable_directory` (absolute). Returns its
// result: the string, or its error with code and text. Other errors: kDataLoss (the child was
// killed, or returned what is no result: then the input did it), kResourceExhausted (no process,
// no memory, or more than result_bytes). `report` is filled in any case.
// The caller has one thread. `work` starts none, and writes nowhere.
absl::StatusOr<std::string> RunSandboxed(const std::string& readable_directory,
                                         const SandboxLimits& limits,
                                         const std::function<absl::StatusOr<std::string>()>& work,
                                         SandboxReport* report);

// Whether an error of RunSandboxed says that the child wanted more than limits.memory_bytes, and
// not that some other limit was met.
bool IsOutOfMemory(const absl::Status& status);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_SANDBOX_H_
