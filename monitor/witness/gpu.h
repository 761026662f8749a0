// What NVML says of a GPU, and what follows for the ranks that use it: lasting reasons why it is
// held back, and errors that were counted. A GPU that idles clocks down, and is not held back.
#ifndef HOLDFAST_MONITOR_WITNESS_GPU_H_
#define HOLDFAST_MONITOR_WITNESS_GPU_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/ids.h"
#include "monitor/testimony.h"

namespace holdfast::monitor {

inline constexpr size_t kGpusMax = 64;
inline constexpr size_t kGpuTextBytesMax = size_t{1} << 20;

// What NVML does not tell is nothing.
struct GpuReading {
  uint32_t index = 0;
  std::string pci_address;  // as Xid::pci_address
  std::string trouble;      // why nothing is known of it; "GPU is lost" is such a text
  bool lost = false;        // the driver has lost it
  std::optional<uint64_t> throttle_reasons;  // nvmlClocksThrottleReason*
  std::optional<uint64_t> ecc_uncorrected;   // since the driver was loaded
  std::optional<uint64_t> ecc_corrected;
  std::optional<uint32_t> pcie_width, pcie_width_max;
  std::optional<uint32_t> pcie_generation, pcie_generation_max;
  std::vector<int64_t> processes;  // that compute on it
};

// Of nvml.h: those that hold a working GPU back. Power capping at the limit that was set is how a
// busy GPU runs, and is not among them.
inline constexpr uint64_t kThrottleHardwareSlowdown = 0x8;
inline constexpr uint64_t kThrottleSoftwareThermal = 0x20;
inline constexpr uint64_t kThrottleHardwareThermal = 0x40;
inline constexpr uint64_t kThrottlePowerBrake = 0x80;

// What `holdfast-witness gpus` prints. Errors: kInvalidArgument.
absl::StatusOr<std::vector<GpuReading>> ParseGpuReadings(std::string text);

// The ranks of this node that use a GPU.
using RanksOfGpu = std::function<std::vector<Rank>(const GpuReading&)>;

// One testimony per GPU that is held back or lost. A narrow link counts only if it is narrower than
// that of most GPUs of the node: some slots are narrow by design. The generation does not count: it
// falls when the GPU idles.
std::vector<Testimony> TestifyGpus(std::span<const GpuReading> gpus, const RanksOfGpu& ranks_of);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_WITNESS_GPU_H_
