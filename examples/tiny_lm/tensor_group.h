// The ranks between which tensor parallelism cuts a layer, as the model sees them: sums that do not
// depend on how many they are.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_TENSOR_GROUP_H_
#define HOLDFAST_EXAMPLES_TINY_LM_TENSOR_GROUP_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "examples/collectives/collectives.h"
#include "examples/collectives/status_macros.h"

namespace tiny_lm {

// Errors of all calls: those of the collectives; then the data are unspecified.
//
// Threads: one at a time.
// Lifetime: the communicator must outlive it.
class TensorGroup {
 public:
  // Null: this rank alone, and nothing to do.
  explicit TensorGroup(collectives::Communicator* ranks) : ranks_(ranks) {}

  // Adds fixed-point sums of all ranks, in place.
  absl::Status Sum(std::span<int64_t> sums) {
    return ranks_ == nullptr ? absl::OkStatus() : ranks_->AllReduce(sums).Wait();
  }

  // The greatest of all ranks, element by element, in place.
  template <typename Real>
  absl::Status Greatest(std::span<Real> values) {
    if (ranks_ == nullptr) return absl::OkStatus();
    std::vector<Real> all(values.size() * ranks_->size());
    std::copy(values.begin(), values.end(),
              all.begin() + static_cast<ptrdiff_t>(values.size() * ranks_->rank()));
    RETURN_IF_ERROR(ranks_->AllGather(std::span(all)).Wait());
    for (size_t i = 0; i < all.size(); ++i) {
      Real& value = values[i % values.size()];
      value = std::max(value, all[i]);
    }
    return absl::OkStatus();
  }

 private:
  collectives::Communicator* ranks_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_TENSOR_GROUP_H_
