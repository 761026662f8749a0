// A training process as a script: does to the shared memory what the hook library does, one step at
// a time, when the test says so. Written from hook/abi alone, so that it is a second opinion on the
// contract; what it can reach, a test can also fill with garbage.
//
// Model: one capture at a time per slot; blocks are copied in order. Not modelled: copier threads,
// pacing, check_source (call Finish() later), the socket.
#ifndef HOLDFAST_TESTS_SUPPORT_SCRIPTED_TRAINER_H_
#define HOLDFAST_TESTS_SUPPORT_SCRIPTED_TRAINER_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "hook/abi/messages.h"
#include "hook/abi/shared_memory.h"
#include "io/unique_fd.h"

namespace holdfast {

struct TrainerBuffer {
  std::string name;
  uint64_t bytes = 0;
  uint32_t group = 0;
};

struct TrainerBlob {
  std::string name;
  uint32_t scope = 0;  // 0 global, 1 rank
  uint64_t capacity_bytes = 0;
};

// The bytes of a registration document, as hf_register sends it.
std::string EncodeDocument(const std::string& layout_json,
                           const std::vector<TrainerBuffer>& buffers,
                           const std::vector<TrainerBlob>& blobs,
                           abi::Copies copies = abi::Copies::kOnce);
// A memfd with these bytes, sealed as hf_register seals it.
UniqueFd SealedDocument(const std::string& document);

// Threads: one. Lifetime: maps the descriptors for itself; they may be closed afterwards.
class ScriptedTrainer {
 public:
  struct Descriptors {
    int rank_page = -1;
    int memory = -1;
    int registration_memory = -1;
    int capture_plan = -1;
  };
  ScriptedTrainer(const Descriptors& descriptors, const std::vector<TrainerBuffer>& buffers);
  ~ScriptedTrainer();
  ScriptedTrainer(const ScriptedTrainer&) = delete;
  ScriptedTrainer& operator=(const ScriptedTrainer&) = delete;

  // The tensors after `step`: bytes that differ by step, buffer and place.
  static std::byte PatternByte(uint64_t step, uint32_t buffer, uint64_t offset);
  void FillBuffers(uint64_t step);
  std::vector<std::vector<std::byte>>& buffers() { return buffers_; }

  // hf_save: takes a granted slot, writes the blobs (one entry per registered blob; empty: not
  // given) and begins. Nothing if no slot is granted.
  std::optional<uint32_t> BeginSave(uint64_t step,
                                    const std::vector<std::optional<std::string>>& blobs);
  // The copier: at most `count_max` more blocks. True if all are done, and captured_ns is set.
  bool CopyBlocks(uint32_t slot, uint32_t count_max = UINT32_MAX);
  void Finish(uint32_t slot);  // kCaptured
  // kAbandoned: a device may still write the blocks.
  void GiveUp(uint32_t slot, int32_t code, const std::string& text,
              abi::SlotState state = abi::SlotState::kVoid);
  // All of it; the slot, or nothing if none is granted.
  std::optional<uint32_t> Save(uint64_t step, const std::vector<std::optional<std::string>>& blobs);

  // What the agent says.
  bool HasGrant() const;
  struct Report {
    uint32_t state = 0;
    uint64_t block_count = 0;
    uint64_t blocks_captured = 0;
    uint64_t blocks_flushed = 0;
    int64_t capture_ns = 0;
    int64_t flush_ns = 0;
    int64_t commit_ns = 0;
    int32_t code = 0;
    std::string text;
  };
  std::optional<Report> ReportOf(uint64_t step) const;

  // The bytes that the trainer of this capture plan writes at `step`, by slot offset: the oracle's
  // half of an image, and extra copies.
  std::map<uint64_t, std::string> TrainerBytes(
      uint64_t step, const std::vector<std::optional<std::string>>& blobs) const;

  abi::RankPage& page() const;
  abi::RegistrationMemory& registration() const;
  std::span<std::byte> page_bytes() const { return page_; }
  std::span<std::byte> memory_bytes() const { return memory_; }
  std::span<std::byte> registration_bytes() const { return registration_; }
  uint32_t block_count() const { return block_count_; }  // of a slot
  // Block `block` of the image in `slot`, as the slot's table says.
  std::span<std::byte> Block(uint32_t slot, uint32_t block) const;
  std::atomic<uint8_t>& BlockDone(uint32_t slot, uint32_t block) const;
  std::span<const abi::CaptureOp> ops() const { return ops_; }
  std::span<const abi::BlobArea> blob_areas() const { return areas_; }
  uint64_t image_bytes() const { return image_bytes_; }

 private:
  void WriteImage(uint32_t slot, uint64_t image_offset, std::span<const std::byte> bytes);
  void CopyBlock(uint32_t slot, uint32_t block);
  uint64_t* BlobBytes(uint32_t slot) const;

  std::span<std::byte> page_;
  std::span<std::byte> memory_;
  std::span<std::byte> registration_;
  // As the header said at the beginning; it may become garbage.
  const uint64_t block_bytes_;
  const uint32_t block_count_;
  const uint32_t blob_count_;
  const uint64_t block_table_offset_;
  const uint64_t block_done_offset_;
  const uint64_t blob_bytes_offset_;
  std::vector<abi::CaptureOp> ops_;
  std::vector<abi::BlobArea> areas_;
  uint64_t image_bytes_ = 0;
  std::vector<std::vector<std::byte>> buffers_;
  std::vector<uint32_t> next_block_;  // of each slot's capture
};

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_SUPPORT_SCRIPTED_TRAINER_H_
