// Traffic besides that of the model, which is tiny: every step reduces and exchanges so many bytes
// over all ranks, as the gradients and experts of a larger model would. Every result is checked.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_TRAFFIC_H_
#define HOLDFAST_EXAMPLES_TINY_LM_TRAFFIC_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "examples/collectives/collectives.h"

namespace tiny_lm {

// Threads: one at a time.
// Lifetime: the communicator must outlive it, and be destroyed before it after an error.
class Traffic {
 public:
  // Bytes of one rank, of all its blocks; rounded up to whole elements. 0: none.
  Traffic(collectives::Communicator& ranks, uint64_t all_reduce_bytes, uint64_t all_to_all_bytes);

  // All ranks call it for every step. Errors: those of the collectives; kDataLoss (a result is
  // wrong: step and element are named).
  absl::Status Run(uint64_t step);

 private:
  absl::Status CheckReduced(uint64_t step) const;
  absl::Status CheckExchanged(uint64_t step) const;

  collectives::Communicator& ranks_;
  std::vector<int64_t> reduced_;
  std::vector<int64_t> sent_;
  std::vector<int64_t> received_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_TRAFFIC_H_
