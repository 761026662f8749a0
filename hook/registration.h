// What is captured: the document that the trainer gave, and the memory and plan that the agent gave
// for it, checked and prepared so that hf_save and the copier threads only look things up.
//
// Memory and plan come from the agent, which the trainer trusts, but a fault there must not become
// a fault here: everything that is used as an offset into the trainer's memory is checked once, in
// Registration::Make.
#ifndef HOLDFAST_HOOK_REGISTRATION_H_
#define HOLDFAST_HOOK_REGISTRATION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hook/abi/messages.h"
#include "hook/abi/shared_memory.h"
#include "hook/device_contexts.h"
#include "hook/device_pins.h"
#include "hook/error.h"
#include "hook/os.h"

namespace holdfast::hook {

inline constexpr uint32_t kGroupCount = 64;
// Of a buffer: host memory.
inline constexpr int32_t kHostPlace = -1;

// The trainer's registration, copied. Immutable.
class Document {
 public:
  struct Buffer {
    std::string name;
    void* data;
    uint64_t bytes;
    uint32_t group;
    int32_t place;  // kHostPlace, or the index of a context in devices()
  };
  struct Blob {
    std::string name;
    hf_blob_scope scope;
    uint64_t capacity_bytes;
  };

  // Copies and checks what can be checked without the layout: names, groups, pointers. The CUDA
  // driver, if this process has loaded it, says which buffers lie in device memory. Errors:
  // HF_INVALID_ARGUMENT, HF_RESOURCE_EXHAUSTED; the driver's, with the buffer's name.
  static Result<std::shared_ptr<const Document>> Make(const char* layout_json,
                                                      std::span<const hf_buffer> buffers,
                                                      std::span<const hf_blob_slot> blobs,
                                                      abi::Copies copies = abi::Copies::kOnce);

  const std::vector<Buffer>& buffers() const { return buffers_; }
  const std::vector<Blob>& blobs() const { return blobs_; }
  // The contexts in which buffers lie; nullptr: all buffers are in host memory.
  const std::shared_ptr<const DeviceTable>& devices() const { return devices_; }
  // The index in blobs(), or -1.
  int64_t FindBlob(std::string_view name) const;

  // As hook/abi describes it, sealed.
  int fd() const { return memory_.get(); }
  uint64_t bytes() const { return bytes_; }

 private:
  Error FindPlaces();

  std::vector<Buffer> buffers_;
  std::vector<Blob> blobs_;
  std::vector<uint32_t> blobs_by_name_;  // indices of blobs_, sorted by name
  std::shared_ptr<const DeviceTable> devices_;
  UniqueFd memory_;
  uint64_t bytes_ = 0;
};

// Threads: immutable after Make, except the shared memory and the members that say otherwise.
// Lifetime: held by shared_ptr by whoever uses it; the last one unmaps.
class Registration {
 public:
  // `fds`: rank memory, registration memory, capture plan, as in kRegisterReply. Errors:
  // HF_INTERNAL (the agent's answer contradicts itself or the document), HF_RESOURCE_EXHAUSTED.
  static Result<std::shared_ptr<Registration>> Make(std::shared_ptr<const Document> document,
                                                    const abi::RegisterReply& reply,
                                                    std::span<const UniqueFd> fds);

  const Document& document() const { return *document_; }
  const std::shared_ptr<const Document>& shared_document() const { return document_; }
  uint64_t id() const { return id_; }
  uint64_t image_bytes() const { return image_bytes_; }  // of the file
  uint64_t block_bytes() const { return block_bytes_; }
  // Of a slot: of the image, and of the extra copies behind it.
  uint32_t block_count() const { return block_count_; }
  const Mapping& memory() const { return memory_; }

  std::span<const abi::CaptureOp> ops() const { return ops_; }
  std::span<const abi::BlobArea> blob_areas() const { return blob_areas_; }
  // The first operation that puts bytes into the block; only of copied_blocks().
  uint32_t first_op(uint32_t block) const { return first_op_[block]; }

  // The blocks that hold bytes of buffers, in the order of capture: by their lowest group, then by
  // their place in the image; and those that do not.
  std::span<const uint32_t> copied_blocks() const { return copied_blocks_; }
  std::span<const uint32_t> other_blocks() const { return other_blocks_; }
  // Bit g: the block holds bytes of group g.
  uint64_t groups_of_block(uint32_t block) const { return groups_of_block_[block]; }
  uint32_t blocks_of_group(uint32_t group) const { return blocks_of_group_[group]; }
  // Bit g: some buffer bytes of group g are captured.
  uint64_t groups() const { return groups_; }

  // Operations of a group, of buffers in host memory or of those in device memory, and how many
  // bytes lie in front of each within these, for drawing bytes at random.
  struct GroupOps {
    std::vector<uint32_t> ops;
    std::vector<uint64_t> bytes_before;
    uint64_t bytes = 0;
  };
  enum class Memory { kHost = 0, kDevice = 1 };
  const GroupOps& group_ops(Memory memory, uint32_t group) const {
    return group_ops_[static_cast<int>(memory)][group];
  }
  // Bit g: bytes of group g are captured from device memory.
  uint64_t device_groups() const { return device_groups_; }

  abi::RegistrationMemory& shared() const { return *shared_; }
  abi::ImageSlot& slot(uint32_t index) const { return shared_->slots[index]; }
  uint32_t slot_count() const { return slot_count_; }
  std::atomic<uint8_t>& block_done(uint32_t slot, uint32_t block) const;
  uint64_t& blob_bytes(uint32_t slot, uint32_t blob) const;
  // The memory of a block of the slot's image. nullptr if the agent's table names a block that is
  // not in the memory.
  std::byte* BlockData(uint32_t slot, uint32_t block) const;

  // Memory that devices copy to; nullptr: all buffers are in host memory.
  DevicePins* pins() const { return pins_.get(); }

  // The pointers of the capture that runs: one per buffer. Written by hf_save while no copier
  // runs; allocated here, so that it need not be there.
  std::vector<const void*>& pointers() { return pointers_; }
  const std::vector<const void*>& pointers() const { return pointers_; }

 private:
  Error CheckShared(const abi::RegisterReply& reply);
  Error CheckPlan();
  void Prepare();

  std::shared_ptr<const Document> document_;
  uint64_t id_ = 0;
  uint64_t image_bytes_ = 0;
  uint64_t block_bytes_ = 0;
  uint32_t block_count_ = 0;
  uint32_t slot_count_ = 0;
  uint64_t block_table_offset_ = 0;
  uint64_t block_done_offset_ = 0;
  uint64_t blob_bytes_offset_ = 0;
  Mapping memory_;
  std::unique_ptr<DevicePins> pins_;  // of memory_: behind it, so destroyed before it
  Mapping shared_memory_;
  Mapping plan_;
  abi::RegistrationMemory* shared_ = nullptr;
  std::span<const abi::CaptureOp> ops_;
  std::span<const abi::BlobArea> blob_areas_;
  std::vector<uint32_t> first_op_;
  std::vector<uint32_t> copied_blocks_;
  std::vector<uint32_t> other_blocks_;
  std::vector<uint64_t> groups_of_block_;
  uint32_t blocks_of_group_[kGroupCount] = {};
  uint64_t groups_ = 0;
  uint64_t device_groups_ = 0;
  GroupOps group_ops_[2][kGroupCount];
  std::vector<const void*> pointers_;
};

// The bytes that an operation moves. Registration::Make has refused products that overflow.
inline uint64_t OpBytes(const abi::CaptureOp& op) { return op.run_bytes * op.count; }

// True if `count` runs of `run_bytes`, `stride` apart, from `offset` on lie within [0, bytes), and
// their sum fits into 64 bits. Runs of nothing lie anywhere.
bool RunsFit(uint64_t offset, uint64_t run_bytes, uint64_t count, uint64_t stride, uint64_t bytes);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_REGISTRATION_H_
