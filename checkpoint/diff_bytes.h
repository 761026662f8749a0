// Carries out a DiffPlan: reads the blocks, compares window by window. Inside of checkpoint/diff*.
#ifndef HOLDFAST_CHECKPOINT_DIFF_BYTES_H_
#define HOLDFAST_CHECKPOINT_DIFF_BYTES_H_

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/block_reader.h"
#include "checkpoint/diff.h"
#include "checkpoint/diff_plan.h"
#include "format/element_difference.h"
#include "format/fingerprint.h"

namespace holdfast {

// Of a CommonState.
struct StateComparison {
  ElementDifferences differences;          // elements counted in the whole tensor
  std::array<Fingerprint, 2> element_sum;  // of checkpoint 0 and 1, without the term of the shape
};

// Blocks are read by some threads and compared by others, the calling one among these.
// `progress` is called on the calling thread with the bytes read; false stops: kCancelled.
// Errors: the first of BlockReader::Read; kResourceExhausted (memory for the slots, or a thread
// that cannot be started).
absl::StatusOr<std::vector<StateComparison>> CompareBytes(
    const DiffPlan& plan, size_t common_count, const std::array<const BlockReader*, 2>& readers,
    const DiffThreads& threads, const std::function<bool(uint64_t bytes_done)>& progress);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_DIFF_BYTES_H_
