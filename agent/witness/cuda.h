// What the CUDA driver grants a process on this node, as JSON: its version, its devices, and
// whether it registers (pins) host memory with each, which is found by trial. The library comes
// with the driver and is opened at run time; what this file declares of it is declared by hand,
// from NVIDIA's cuda.h (version 13).
//
// A driver in trouble may hang in any of these calls for ever: so this runs in the program
// holdfast-witness, which its caller ends. It makes a context on each device and ends it again:
// half a second and some hundred MiB of device memory meanwhile.
#ifndef HOLDFAST_AGENT_WITNESS_CUDA_H_
#define HOLDFAST_AGENT_WITNESS_CUDA_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace holdfast {

// What is registered for the trial.
inline constexpr uint64_t kPinTrialBytes = uint64_t{64} << 20;

// {"version": 13000, "devices": [{"index": 0, "name": "..."}, ...]}; a device of which the trial
// has failed has "trouble" besides: the end of a sentence that begins with the device. Errors:
// kNotFound (no library, or no device: no GPU here), kUnavailable (the driver does not answer; the
// reason).
absl::StatusOr<std::string> CudaReadings();

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_CUDA_H_
