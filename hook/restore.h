// Restore: copies what the agent delivers through the RestoreRing to the registered buffers.
//
// The agent verifies; here everything that is used as an offset is checked against the registered
// buffers and the mapped memories, whatever the agent says. If the agent's worker dies in between,
// the restore begins anew with the next one: every piece is written again, so nothing of the first
// try remains. One that ends here for any other reason than the agent's end of it is cancelled
// there.
#ifndef HOLDFAST_HOOK_RESTORE_H_
#define HOLDFAST_HOOK_RESTORE_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "hook/error.h"
#include "hook/link.h"
#include "hook/os.h"
#include "hook/selection.h"

namespace holdfast::hook {

// The blobs of the checkpoint that was restored.
//
// Lifetime: the bytes stay as long as the object.
class RestoredBlobSet {
 public:
  RestoredBlobSet() = default;
  // Errors: HF_INTERNAL (an entry does not lie in the memory).
  static Result<RestoredBlobSet> Make(Mapping memory, uint32_t world_size);

  // `rank` as in hf_restored_blob; `own_rank` and `world_size` are the caller's.
  Result<std::span<const std::byte>> Find(std::string_view name, int64_t rank, uint32_t own_rank,
                                          uint32_t world_size) const;

 private:
  std::string_view NameOf(const abi::RestoredBlob& blob) const;
  std::span<const std::byte> DataOf(const abi::RestoredBlob& blob) const;

  Mapping memory_;
  std::span<const abi::RestoredBlob> blobs_;
  uint32_t saved_world_size_ = 0;
};

struct RestoreOutcome {
  uint64_t step;
  uint32_t attempt;
  uint32_t world_size;
  uint64_t bytes;
  uint64_t bytes_from_memory;
  uint64_t tensor_states;
  uint64_t tensor_states_left_out;
  hf_restore_from restore_from;
  RestoredBlobSet blobs;
};

// Fills the buffers of the link's registration, or what `selection` (nullptr: everything) chooses
// of them; those in device memory behind the work of `streams` (hf_restore_options). Errors: those
// of hf_restore_partial.
Result<RestoreOutcome> RestoreBuffers(Link& link, const std::shared_ptr<const Selection>& selection,
                                      std::span<void* const> streams, Deadline deadline);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_RESTORE_H_
