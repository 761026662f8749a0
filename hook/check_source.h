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
#include <functional>

#include "hook/error.h"
#include "hook/registration.h"
#include "hook/source_reader.h"

namespace holdfast::hook {

enum class CheckSource { kNone = 0, kSample = 1, kAll = 2 };

inline constexpr uint32_t kSampleChunks = 64;
inline constexpr uint64_t kSampleChunkBytes = 4096;

// Host memory is compared by the trainer's thread in hf_wait_captured, device memory by a copier
// when the last byte of a group was copied: what the device changes behind that does not matter,
// and the trainer's thread must not wait for a device.
//
// Threads: one at a time.
class SourceChecker {
 public:
  SourceChecker(CheckSource mode, uint64_t seed) : mode_(mode), random_state_(seed) {}

  CheckSource mode() const { return mode_; }

  // Compares what lies in `memory` of the groups (bit mask) of the image captured in `slot` with
  // registration.pointers(). `comparer_of(place)` gives the SourceComparer for a buffer's place.
  // HF_ABORTED: a buffer differs (named). Else the comparer's errors, with the buffer's name.
  using ComparerOf = std::function<SourceComparer&(int32_t place)>;
  Error Check(const Registration& registration, uint32_t slot, Registration::Memory memory,
              uint64_t groups, const ComparerOf& comparer_of);

 private:
  struct Scope {
    const Registration& registration;
    const uint32_t slot;
    const Registration::Memory memory;
    const ComparerOf& comparer_of;
  };
  static Error CheckAll(const Scope& scope, uint64_t groups);
  static Error CheckOp(const Scope& scope, const abi::CaptureOp& op, uint64_t begin, uint64_t end);
  uint64_t Random();

  const CheckSource mode_;
  uint64_t random_state_;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_CHECK_SOURCE_H_
