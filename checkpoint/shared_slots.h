// The RegistrationMemory as the agent sees it: writes grants, reads what the trainer claims. Sizes
// and offsets are the agent's own; what stands in the header is for the trainer only. Everything
// read here may be garbage: it is data to be judged by the caller, never an index.
#ifndef HOLDFAST_CHECKPOINT_SHARED_SLOTS_H_
#define HOLDFAST_CHECKPOINT_SHARED_SLOTS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/shared_mapping.h"
#include "hook/abi/shared_memory.h"

namespace holdfast {

struct SlotSizes {
  uint64_t registration_id = 0;
  uint32_t slot_count = 0;
  uint32_t block_count = 0;
  uint32_t blob_count = 0;
  uint64_t block_bytes = 0;
};

// Threads: the event loop's.
class SharedSlots {
 public:
  // How large the memory of these sizes is.
  static uint64_t MemoryBytes(const SlotSizes& sizes);

  // Writes the header (anew, after a restart). CHECKs the size of `memory`.
  SharedSlots(std::shared_ptr<SharedMapping> memory, const SlotSizes& sizes);

  // Hands blocks to the trainer: everything of the slot is set, kGranted last.
  void PublishGrant(uint32_t slot, uint64_t generation, std::span<const uint32_t> block_table);
  // Takes back a grant that the trainer has not claimed; false if it has.
  [[nodiscard]] bool TakeBack(uint32_t slot);
  void SetEmpty(uint32_t slot);

  // Any 32-bit number may come back.
  abi::SlotState state(uint32_t slot) const;
  uint64_t generation(uint32_t slot) const;
  uint64_t step(uint32_t slot) const;
  int64_t save_ns(uint32_t slot) const;
  int64_t captured_ns(uint32_t slot) const;
  bool must_compare(uint32_t slot) const;
  uint8_t block_done(uint32_t slot, uint32_t block) const;
  uint64_t blob_bytes(uint32_t slot, uint32_t blob) const;
  // Why the trainer gave up: never OK, printable.
  absl::Status VoidReason(uint32_t slot) const;

  abi::RegistrationMemory& memory() const;
  const std::shared_ptr<SharedMapping>& mapping() const { return mapping_; }

 private:
  struct Offsets {
    uint64_t block_table;
    uint64_t block_done;
    uint64_t blob_bytes;
    uint64_t end;
  };
  static Offsets OffsetsOf(const SlotSizes& sizes);
  abi::ImageSlot& Slot(uint32_t slot) const;
  std::atomic<uint8_t>* DoneBytes(uint32_t slot) const;
  std::atomic<uint64_t>* BlobWords(uint32_t slot) const;

  std::shared_ptr<SharedMapping> mapping_;
  const SlotSizes sizes_;
  const Offsets offsets_;
};

// Bytes that came from a trainer as text for people: up to the first NUL; control characters and
// what is no UTF-8 replaced by '?'.
std::string PrintableText(std::span<const char> bytes);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SHARED_SLOTS_H_
