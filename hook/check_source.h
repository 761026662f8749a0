// Comparing an image with its source once more, after the capture: a tensor that the training loop
// changed under capture (usually because hf_wait_captured is missing, or stands behind the
// optimizer) has left a mixture in the image, which must not be committed.
//
// What it finds: `all` finds every byte that differs at the time of the comparison. `sample` draws
// kSampleChunks chunks of kSampleChunkBytes, each starting at a byte drawn uniformly from all
// captured bytes of the groups compared. If a fraction f of these bytes differs, it misses that
// with probability (1 - f)^64 at most: an optimizer step changes nearly everything (f = 0.5:
// 5e-20), but of a change to 1% of the bytes, in one small tensor, it misses 53%. Neither finds a
// change that happened before the bytes were copied.
#ifndef HOLDFAST_HOOK_CHECK_SOURCE_H_
#define HOLDFAST_HOOK_CHECK_SOURCE_H_

#include <cstdint>

#include "hook/error.h"
#include "hook/registration.h"
#include "hook/source_reader.h"

namespace holdfast::hook {

enum class CheckSource { kNone = 0, kSample = 1, kAll = 2 };

inline constexpr uint32_t kSampleChunks = 64;
inline constexpr uint64_t kSampleChunkBytes = 4096;

// Threads: one at a time.
// Lifetime: `reader` must outlive it.
class SourceChecker {
 public:
  SourceChecker(CheckSource mode, uint64_t seed, SourceReader* reader)
      : mode_(mode), random_state_(seed), reader_(reader) {}

  CheckSource mode() const { return mode_; }

  // Compares the groups (bit mask) of the image captured in `slot` with registration.pointers().
  // HF_ABORTED: a buffer differs (named).
  Error Check(const Registration& registration, uint32_t slot, uint64_t groups);

 private:
  Error CheckAll(const Registration& registration, uint32_t slot, uint64_t groups) const;
  Error CheckOp(const Registration& registration, uint32_t slot, const abi::CaptureOp& op,
                uint64_t begin, uint64_t end) const;
  uint64_t Random();

  const CheckSource mode_;
  uint64_t random_state_;
  SourceReader* const reader_;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_CHECK_SOURCE_H_
