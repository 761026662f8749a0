// What NVML says of the GPUs of this node, as JSON. The library comes with the driver and is opened
// at run time; what this file declares of it is declared by hand, from NVIDIA's nvml.h (version
// 13).
//
// A driver in trouble may hang in any of these calls for ever: so this runs in the program
// holdfast-witness, which its caller ends.
#ifndef HOLDFAST_AGENT_WITNESS_NVML_H_
#define HOLDFAST_AGENT_WITNESS_NVML_H_

#include <string>

#include "absl/status/statusor.h"

namespace holdfast {

// {"driver": "...", "gpus": [{"index": 0, "pci_address": ..., ...}]}, the members of
// monitor::GpuReading; what a GPU does not tell is left out.
// Errors: kNotFound (no library: no driver here), kUnavailable (it does not answer; the reason).
absl::StatusOr<std::string> NvmlReadings();

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_NVML_H_
