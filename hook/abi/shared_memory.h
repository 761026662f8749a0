// The memory that a training process and the agent share, besides the image blocks themselves:
//
//   RankPage             one per session (process of a rank); made at kOpen
//   RegistrationMemory   one per registration; made at kRegister
//
// Both sides map both for reading and writing. The agent keeps its own copy of everything that it
// relies on and validates what it reads here: garbage in this memory may void an image of the rank
// that wrote it, nothing else.
//
// Life of an image slot. Each state is stored with release by the side named and read with acquire
// by the other:
//
//   kEmpty      agent's. No blocks.
//   kGranted    agent -> trainer: block_table of the slot is filled in and the blocks are free. The
//               agent takes it back, unless it is claimed, by a compare-and-swap to kEmpty.
//   kClaimed    trainer's, by a compare-and-swap: hf_save writes the blobs. It goes on to
//   kCapturing,
//               or back to kGranted if it fails.
//   kCapturing  trainer -> agent: hf_save has set step, blob_bytes and save_ns. Copier threads fill
//               blocks, set block_done[i] (release) behind the last byte of block i, and ring the
//               doorbell (an eventfd) now and then.
//   kCaptured   trainer -> agent: every block is done. The memory is the agent's to read; the
//               trainer does not write it any more. A trainer that compares with the source
//               (check_source) stores it at the end of hf_wait_captured, so that nothing is
//               committed before it was compared; until then captured_ns != 0 says that the blocks
//               are complete. If the trainer dies in kCapturing with captured_ns != 0 and every
//               block_done set, the agent may take the image as captured, unless must_compare is
//               set (check_source = all): then nobody is left to compare it, and it is void.
//   kVoid       trainer -> agent: given up; void_code and void_text say why.
//   kAbandoned  trainer -> agent: as kVoid, but a device may still write the blocks. It becomes
//   kVoid
//               when that is over; if nobody can tell (the device's context has failed) it stays,
//               and the blocks are recycled when the process is gone.
//   The agent takes kCaptured and kVoid slots back to kEmpty when it has recycled the blocks.
//
// When it sees kCapturing the agent itself writes every byte of the image that neither a CaptureOp
// nor a blob given at this step covers: the head, the gaps between datasets, the rest of a blob's
// area and the padding at the end (zeros). The trainer writes exactly the other bytes.
//
// Waiting: whoever waits for the other side sleeps in futex(2) (shared, not FUTEX_PRIVATE) on the
// word named; whoever changes what it guards increments the word (release) and wakes.
#ifndef HOLDFAST_HOOK_ABI_SHARED_MEMORY_H_
#define HOLDFAST_HOOK_ABI_SHARED_MEMORY_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "hook/abi/messages.h"

namespace holdfast::abi {

static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(std::atomic<uint64_t>::is_always_lock_free);
static_assert(sizeof(std::atomic<uint32_t>) == 4 && sizeof(std::atomic<uint64_t>) == 8);

inline constexpr uint32_t kRankPageMagic = 0x31504648;            // "HFP1"
inline constexpr uint32_t kRegistrationMemoryMagic = 0x31524648;  // "HFR1"

inline constexpr size_t kReportCount = 16;
inline constexpr size_t kSectionDepthMax = 8;
inline constexpr size_t kSectionNameBytes = 32;  // with the NUL

// What became of a save, written by the agent. Readers use `sequence` as a seqlock: odd while being
// written; equal before and after a consistent read.
struct SaveReport {
  std::atomic<uint32_t> sequence;
  std::atomic<uint32_t> state;  // hf_save_state
  std::atomic<uint64_t> step;   // kNoStep: unused entry
  std::atomic<uint64_t> block_count;
  std::atomic<uint64_t> blocks_captured;
  std::atomic<uint64_t> blocks_flushed;
  std::atomic<int64_t> capture_ns;  // as in hf_save_report
  std::atomic<int64_t> flush_ns;
  std::atomic<int64_t> commit_ns;
  std::atomic<int32_t> code;  // of the failure; 0: none
  uint32_t reserved;
  char text[440];  // of the failure, NUL-terminated; read under the seqlock
};
static_assert(sizeof(SaveReport) == 512);

struct RankPage {
  // Constant after the agent has made the page.
  uint32_t magic;
  uint32_t version;
  uint64_t session_id;
  // How often a save is due, in steps: due if step > 0 and step % due_every_steps == 0; 0: never.
  uint64_t due_every_steps;
  uint8_t reserved0[40];

  // Written by the agent.
  std::atomic<uint32_t> agent_events;  // futex word: any change of this group or of `reports`, or
                                       // a slot granted
  std::atomic<uint32_t> fenced_by;     // attempt that fenced this one; 0: none; kJobReplaced
  std::atomic<uint64_t> committed_process_step;  // newest of this attempt; kNoStep: none
  std::atomic<uint64_t> committed_power_step;
  std::atomic<uint32_t> next_report_index;  // where the agent will write the next save's report
  uint32_t reserved1;
  // Besides, a save is due at the first step that is asked for and not below this one; 0: none is
  // wanted. The same for all ranks: see `due_asked_step`.
  std::atomic<uint64_t> due_step;
  uint8_t reserved2[24];

  // Written by the trainer.
  std::atomic<uint64_t> heartbeat_count;
  std::atomic<uint64_t> heartbeat_step;
  std::atomic<int64_t> heartbeat_ns;    // CLOCK_MONOTONIC
  std::atomic<uint32_t> section_depth;  // may exceed kSectionDepthMax; deeper names are not kept
  uint32_t reserved3;
  // The last step that was asked for; 0: none yet. Written before `due_step` is read, both
  // sequentially consistent, so that of an agent that writes `due_step` to all pages and then finds
  // a lower step here on each every rank will see it in time.
  std::atomic<uint64_t> due_asked_step;
  // Calls that hold up the training loop (registering, saving, restoring, waiting for either):
  // since when one is open, CLOCK_MONOTONIC, 0: none is; and for how long those lasted, in total,
  // that are over. Both are 0 until the first such call (and for good with a library that does not
  // know them). A call that ends takes the first back before it adds to the second.
  std::atomic<int64_t> held_since_ns;
  std::atomic<uint64_t> held_ns;
  uint8_t reserved4[8];
  char section_names[kSectionDepthMax][kSectionNameBytes];

  SaveReport reports[kReportCount];
};
static_assert(sizeof(RankPage) == 64 * 3 + 256 + 512 * kReportCount);

enum class SlotState : uint32_t {
  kEmpty = 0,
  kGranted = 1,
  kCapturing = 2,
  kCaptured = 3,
  kVoid = 4,
  kClaimed = 5,
  kAbandoned = 6  // to an agent that does not know it: an error of the trainer's, with the same end
};

inline constexpr uint32_t kSlotsMax = 4;

struct ImageSlot {
  std::atomic<SlotState> state;
  std::atomic<int32_t> void_code;      // hf_code, when kVoid or kAbandoned
  std::atomic<uint64_t> generation;    // of the grant; the agent increments it at each
  std::atomic<uint64_t> step;          // set before kCapturing
  std::atomic<int64_t> save_ns;        // CLOCK_MONOTONIC when hf_save was called
  std::atomic<int64_t> captured_ns;    // CLOCK_MONOTONIC when the last block was done; 0 before
  std::atomic<uint64_t> blocks_done;   // how many block_done are set; a hint, the bytes count
  std::atomic<uint32_t> must_compare;  // set before kCapturing; not 0: see kCaptured
  uint8_t reserved[12];
  char void_text[448];  // NUL-terminated, set before kVoid or kAbandoned
};
static_assert(sizeof(ImageSlot) == 512);

inline constexpr uint32_t kRestoreEntries = 64;

// One delivered piece of a restore: `bytes` verified bytes at `offset` of memory `map_id`, to which
// operations [first_op, first_op + op_count) apply.
struct RestoreEntry {
  uint64_t offset;
  uint64_t bytes;
  uint64_t first_op;
  uint64_t op_count;
  uint32_t map_id;
  uint32_t reserved[7];
};
static_assert(sizeof(RestoreEntry) == 64);

// Single producer (agent), single consumer (trainer). Entry i lies at entries[i % kRestoreEntries];
// the agent writes it before it increments `produced` (release); the piece's memory is the agent's
// again once `consumed` passes it. The trainer rings the doorbell whenever it has advanced. It
// leaves the ring alone from its kRestore to the kRestoreReply, before which the agent sets
// `produced` to `consumed`: a restore that was cut off by a crash begins anew. A trainer that
// leaves a restore before its kRestoreDone (its deadline, an error of its own) says kRestoreCancel.
// The agent also ends one when it sees a slot in kCapturing: who saves waits for no restore.
struct RestoreRing {
  std::atomic<uint32_t> produced;  // futex word of the trainer; also woken by kRestoreDone's sender
  uint8_t reserved0[60];
  std::atomic<uint32_t> consumed;
  uint8_t reserved1[60];
  RestoreEntry entries[kRestoreEntries];
};
static_assert(sizeof(RestoreRing) == 128 + 64 * kRestoreEntries);

// Followed, at the offsets given, by per-slot arrays: slot s has block_table[s * block_count + b]
// (uint32: index of a block in the rank memory, written by the agent before kGranted), block_done
// [s * block_count + b] (one atomic byte each, 0 or 1, zeroed by the agent before kGranted), and
// blob_bytes[s * blob_count + i] (uint64, UINT64_MAX: not given at this step).
struct RegistrationMemory {
  uint32_t magic;
  uint32_t version;
  uint64_t registration_id;
  uint32_t slot_count;   // 1 to kSlotsMax
  uint32_t block_count;  // of a slot: of an image and its extra copies
  uint32_t blob_count;
  uint32_t reserved0;
  uint64_t block_bytes;
  uint64_t block_table_offset;  // 64-aligned, as the next two
  uint64_t block_done_offset;
  uint64_t blob_bytes_offset;
  ImageSlot slots[kSlotsMax];
  RestoreRing restore;
};
static_assert(sizeof(RegistrationMemory) == 64 + 512 * kSlotsMax + sizeof(RestoreRing));

}  // namespace holdfast::abi

#endif  // HOLDFAST_HOOK_ABI_SHARED_MEMORY_H_
