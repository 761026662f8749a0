#include "agent/witness/nvml.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

using nlohmann::json;

constexpr char kLibrary[] = "libnvidia-ml.so.1";

// nvml.h
using Result = int;
constexpr Result kSuccess = 0;
constexpr Result kInsufficientSize = 7;
constexpr Result kGpuIsLost = 15;
using Device = void*;
constexpr unsigned kUncorrected = 1, kCorrected = 0, kSinceDriverLoaded = 0;  // volatile counters

struct PciInfo {  // nvmlPciInfo_t, version 3
  char busIdLegacy[16];
  unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
  char busId[32];
};
static_assert(sizeof(PciInfo) == 68);

struct ProcessInfo {  // nvmlProcessInfo_t, version 2 and 3
  unsigned pid;
  unsigned long long usedGpuMemory;
  unsigned gpuInstanceId, computeInstanceId;
};
static_assert(sizeof(ProcessInfo) == 24);

class Library {
 public:
  explicit Library(void* handle) : handle_(handle) {}
  ~Library() { dlclose(handle_); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  // Null if this version of the library has no such function.
  template <typename Function>
  Function* Find(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(handle_, name));
  }
  std::string ErrorText(Result result) const {
    auto* const text = Find<const char*(Result)>("nvmlErrorString");
    return text == nullptr ? absl::StrCat("error ", result) : text(result);
  }

 private:
  void* const handle_;
};

// Puts a number under `key`, if the function is there and succeeds.
template <typename Number, typename... Arguments>
void Ask(const Library& library, const char* function, const char* key, json& out, Device device,
         Arguments... arguments) {
  auto* const call = library.Find<Result(Device, Arguments..., Number*)>(function);
  Number value = 0;
  if (call != nullptr && call(device, arguments..., &value) == kSuccess) out[key] = value;
}

void AskProcesses(const Library& library, json& out, Device device) {
  auto* call = library.Find<Result(Device, unsigned*, ProcessInfo*)>(
      "nvmlDeviceGetComputeRunningProcesses_v3");
  if (call == nullptr) {
    call = library.Find<Result(Device, unsigned*, ProcessInfo*)>(
        "nvmlDeviceGetComputeRunningProcesses_v2");
  }
  if (call == nullptr) return;
  constexpr unsigned kProcessesMax = 1024;
  std::vector<ProcessInfo> processes(kProcessesMax);
  unsigned count = kProcessesMax;
  const Result result = call(device, &count, processes.data());
  if (result != kSuccess && result != kInsufficientSize) return;
  out["processes"] = json::array();
  for (unsigned i = 0; i < std::min(count, kProcessesMax); ++i) {
    out["processes"].push_back(processes[i].pid);
  }
}

json ReadingOf(const Library& library, unsigned index) {
  json gpu = {{"index", index}};
  const auto fail = [&](Result result) {
    gpu["trouble"] = library.ErrorText(result);
    gpu["lost"] = result == kGpuIsLost;
  };
  auto* const handle_of = library.Find<Result(unsigned, Device*)>("nvmlDeviceGetHandleByIndex_v2");
  auto* const pci_of = library.Find<Result(Device, PciInfo*)>("nvmlDeviceGetPciInfo_v3");
  if (handle_of == nullptr || pci_of == nullptr) {
    gpu["trouble"] = "this version of NVML is not known";
    return gpu;
  }
  Device device = nullptr;
  if (const Result result = handle_of(index, &device); result != kSuccess) {
    fail(result);
    return gpu;
  }
  PciInfo pci = {};
  if (const Result result = pci_of(device, &pci); result != kSuccess) {
    fail(result);
  } else {
    gpu["pci_address"] = std::string(pci.busId, strnlen(pci.busId, sizeof(pci.busId)));
  }
  Ask<unsigned long long>(library, "nvmlDeviceGetCurrentClocksThrottleReasons", "throttle_reasons",
                          gpu, device);
  if (!gpu.contains("throttle_reasons")) {
    Ask<unsigned long long>(library, "nvmlDeviceGetCurrentClocksEventReasons", "throttle_reasons",
                            gpu, device);
  }
  Ask<unsigned long long>(library, "nvmlDeviceGetTotalEccErrors", "ecc_uncorrected", gpu, device,
                          kUncorrected, kSinceDriverLoaded);
  Ask<unsigned long long>(library, "nvmlDeviceGetTotalEccErrors", "ecc_corrected", gpu, device,
                          kCorrected, kSinceDriverLoaded);
  Ask<unsigned>(library, "nvmlDeviceGetCurrPcieLinkWidth", "pcie_width", gpu, device);
  Ask<unsigned>(library, "nvmlDeviceGetMaxPcieLinkWidth", "pcie_width_max", gpu, device);
  Ask<unsigned>(library, "nvmlDeviceGetCurrPcieLinkGeneration", "pcie_generation", gpu, device);
  Ask<unsigned>(library, "nvmlDeviceGetMaxPcieLinkGeneration", "pcie_generation_max", gpu, device);
  constexpr unsigned kClockSm = 1;
  Ask<unsigned>(library, "nvmlDeviceGetClockInfo", "sm_clock_mhz", gpu, device, kClockSm);
  Ask<unsigned>(library, "nvmlDeviceGetMaxClockInfo", "sm_clock_mhz_max", gpu, device, kClockSm);
  AskProcesses(library, gpu, device);
  return gpu;
}

}  // namespace

absl::StatusOr<std::string> NvmlReadings() {
  void* const handle = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return absl::NotFoundError(absl::StrCat("no NVIDIA driver: ", dlerror()));
  }
  const Library library(handle);
  auto* const init = library.Find<Result()>("nvmlInit_v2");
  auto* const count_of = library.Find<Result(unsigned*)>("nvmlDeviceGetCount_v2");
  if (init == nullptr || count_of == nullptr) {
    return absl::UnavailableError(absl::StrCat(kLibrary, ": its version is not known"));
  }
  if (const Result result = init(); result != kSuccess) {
    return absl::UnavailableError(absl::StrCat("NVML: ", library.ErrorText(result)));
  }
  json readings = {{"gpus", json::array()}};
  char version[96] = {};
  if (auto* const driver = library.Find<Result(char*, unsigned)>("nvmlSystemGetDriverVersion");
      driver != nullptr && driver(version, sizeof(version) - 1) == kSuccess) {
    readings["driver"] = version;
  }
  unsigned count = 0;
  if (const Result result = count_of(&count); result != kSuccess) {
    return absl::UnavailableError(absl::StrCat("NVML: ", library.ErrorText(result)));
  }
  for (unsigned i = 0; i < std::min(count, 64u); ++i) {
    readings["gpus"].push_back(ReadingOf(library, i));
  }
  if (auto* const shutdown = library.Find<Result()>("nvmlShutdown"); shutdown != nullptr) {
    shutdown();
  }
  return readings.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace holdfast
