// holdfast-witness, which the agent and `holdfast doctor` start and end: it looks at what may hang
// or crash whoever looks. Prints what it saw on standard output; on an error one line on standard
// error, and an exit code: 2 usage, 3 not permitted, 5 not there, 75 not now.
//
//   holdfast-witness stacks PROCESS    the native stacks of its threads
//   holdfast-witness gpus              what NVML says
//   holdfast-witness devices           what the CUDA driver grants
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <cstdio>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "agent/witness/cuda.h"
#include "agent/witness/native_stacks.h"
#include "agent/witness/nvml.h"

namespace holdfast {
namespace {

constexpr int kExitUsage = 2;
constexpr int kExitNotPermitted = 3;
constexpr int kExitNotFound = 5;
constexpr int kExitRetry = 75;

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kPermissionDenied:
      return kExitNotPermitted;
    case absl::StatusCode::kNotFound:
      return kExitNotFound;
    default:
      return kExitRetry;
  }
}

int Main(int argc, char** argv) {
  // It ends with whoever started it, and its crash is no core dump of somebody's memory.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const rlimit no_core = {0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  const std::string_view verb = argc > 1 ? argv[1] : "";
  absl::StatusOr<std::string> text = absl::InvalidArgumentError("");
  pid_t process = 0;
  if (verb == "stacks" && argc == 3 && absl::SimpleAtoi(argv[2], &process) && process > 0) {
    text = NativeStacks(process);
  } else if (verb == "gpus" && argc == 2) {
    text = NvmlReadings();
  } else if (verb == "devices" && argc == 2) {
    text = CudaReadings();
  } else {
    std::fprintf(stderr, "usage: holdfast-witness stacks PROCESS | gpus | devices\n");
    return kExitUsage;
  }
  if (!text.ok()) {
    std::fprintf(stderr, "%s\n", std::string(text.status().message()).c_str());
    return ExitCodeOf(text.status());
  }
  return std::fwrite(text->data(), 1, text->size(), stdout) == text->size() ? 0 : kExitRetry;
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) { return holdfast::Main(argc, argv); }
