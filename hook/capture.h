// Capture: copier threads that copy buffers to their places in the image, behind the training loop.
//
// One capture at a time. Begin (in hf_save) only sets it up and wakes the threads; they claim
// blocks in the registration's order, copy every operation's bytes of the block, set block_done
// and, once the head start is over, ring the doorbell. During the head start the agent does not
// know of the capture: its checksums would take the memory bandwidth (measured on 2 cores: 7
// instead of 12 GB/s), and the trainer may soon wait for the capture, while nobody waits for the
// flush. The last one stores captured_ns. Whether the image is then kCaptured or void is decided by
// the trainer's thread (Seal, or Cancel and Void), which may still compare with the source; without
// comparison the last copier seals.
//
// Invariant: a copier touches buffers, image and what belongs to the capture only while it holds a
// claim. A claim is a compare-and-swap of the word (generation, blocks left to claim); what it
// claims is in the members that Begin wrote before it stored the word, and they stay until every
// claim is finished. A thread that overslept a capture finds nothing left, or another generation.
// Cancel leaves nothing to claim and waits for the claims held; after it nothing of the trainer's
// is read any more. No lock is shared between Begin and the copiers: hf_save makes two system
// calls.
//
// Device memory. A copier first waits until the caller's streams have come to the save (the event
// that hf_save recorded), then enqueues a block's copies and goes on with the next block, so that
// up to kBytesInFlightMax bytes are in flight; a block is done when the device says so. A block in
// flight is a claim held. The comparison of device memory with its image (check_source) belongs to
// the capture: a group counts as captured only when its bytes were compared.
// A device may stop. Then Cancel returns after kDrainNs all the same, and the image is kAbandoned:
// void, with blocks that may still be written. It becomes kVoid when its last copy is over; if
// nobody can tell (the context has failed), never.
#ifndef HOLDFAST_HOOK_CAPTURE_H_
#define HOLDFAST_HOOK_CAPTURE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "hook/annotations.h"
#include "hook/check_source.h"
#include "hook/device_queue.h"
#include "hook/error.h"
#include "hook/os.h"
#include "hook/registration.h"
#include "hook/source_reader.h"

namespace holdfast::hook {

inline constexpr uint32_t kCopyThreadsMax = 16;
// A copier looks for a cancellation at least once per so many bytes.
inline constexpr uint64_t kCopyPieceBytes = uint64_t{1} << 20;
// The doorbell rings once per so many bytes captured after the head start, and at the end.
inline constexpr uint64_t kDoorbellBytes = uint64_t{1} << 20;
// Pages of granted blocks are mapped ahead in pieces of at most so many bytes, so that a capture
// does not wait for long behind it.
inline constexpr uint64_t kPopulateBytes = uint64_t{4} << 20;

// How long a cancellation waits for copies that a device has begun.
inline constexpr int64_t kDrainNs = kNsPerSecond;

// By how much a paced copy may be late and still be made up for.
inline constexpr int64_t kPaceLateNs = 2'000'000;

enum class SealBy {
  kCopier,   // as soon as the last block is done
  kTrainer,  // Seal() is called
};

// Threads: the trainer's one (all public functions but Populate, which any may call), and its own.
// Lifetime: `reader` must outlive it.
class Capture {
 public:
  struct Options {
    uint32_t thread_count = 1;
    int doorbell_fd = -1;       // stays open as long as the capture lives
    int64_t head_start_ns = 0;  // from Begin on; 0: the agent follows at once
    // Of what lies in device memory; the rest is the caller's to compare.
    CheckSource check_source = CheckSource::kNone;
    uint64_t check_seed = 0;
    uint64_t device_bytes_per_second_max = 0;  // 0: as fast as the device can
  };
  // Errors: HF_RESOURCE_EXHAUSTED.
  static Result<std::unique_ptr<Capture>> Start(const Options& options, SourceReader* reader);
  // Cancels and voids what is unfinished; joins the threads, which waits for copies in flight.
  ~Capture();

  // The same until the deadline. False: a thread waits for a device still, and the object, with all
  // that it was given, must not be destroyed.
  bool Stop(Deadline deadline);

  // Captures into `slot`, which the agent has granted, from registration.pointers(). Sets the
  // slot's state to kCapturing and wakes the threads and, without a head start, the agent: at most
  // two system calls, no allocation. The slot's step, save_ns and blob_bytes have been set, blobs
  // written, and the gates of the registration's devices recorded. Only if !running() and
  // !draining().
  void Begin(std::shared_ptr<Registration> registration, uint32_t slot, SealBy seal_by);

  // True from Begin until the image is sealed or void.
  bool running() const { return running_; }
  // Blocks done so far of the capture that runs, or of the last one.
  // Their bytes have been read.
  uint64_t blocks_done() const { return blocks_done_.load(std::memory_order_acquire); }

  // True while copies of a capture that was given up may still be in flight.
  bool draining() const { return abandoned_.load() != nullptr; }

  // What devices have copied for the capture that runs, or the last one.
  struct DeviceCopies {
    uint64_t bytes = 0;
    uint64_t unpinned_bytes = 0;  // of them: to memory that is not registered with the driver
    int64_t begun_ns = 0;         // when the caller's streams had come to the save; 0: not yet
    int64_t ended_ns = 0;         // when the last of these bytes had been copied
  };
  DeviceCopies device_copies() const;

  // True if all bytes of the groups in `groups` (bit mask), and with `all_blocks` every block, have
  // been captured; waits for that until the deadline, or until the capture fails.
  bool WaitDone(uint64_t groups, bool all_blocks, Deadline deadline);
  // Why the capture that runs cannot be finished; OK: nothing is known.
  Error failure() const HOOK_EXCLUDES(failure_mutex_);

  // Stops copying. When it returns no thread reads buffers in host memory any more, nor does a
  // device read any, unless draining() is true after Void(); that takes as long as copying
  // kCopyPieceBytes, with devices kDrainNs at most. True if the image is incomplete; false if the
  // last block was done before.
  bool Cancel();

  // After WaitDone(..., all blocks): the image is kCaptured.
  void Seal();
  // The image is void, for this reason; kAbandoned while a device may write it. Only after Cancel,
  // and not if it returned false and the copiers seal.
  void Void(const Error& reason);

  // Maps the pages of the registration's granted blocks ahead, in the background.
  void Populate(std::shared_ptr<Registration> registration) HOOK_EXCLUDES(populate_mutex_);
  // Between these two it rests: who restores needs the cores.
  void PausePopulate();
  void ResumePopulate();
  // Lets go of registrations that are not being captured.
  void Release() HOOK_EXCLUDES(populate_mutex_);

 private:
  Capture(const Options& options, SourceReader* reader)
      : options_(options),
        reader_(reader),
        device_checker_(options.check_source, options.check_seed) {}
  static void Main(void* self);
  void Run();
  bool Claim(uint32_t* generation, uint32_t* block);
  void CopyBlocks();
  bool CopyBlock(uint32_t block, DeviceQueue& queue);
  Error CopyRange(const abi::CaptureOp& op, uint64_t begin, uint64_t end, uint64_t block_begin,
                  std::byte* data, DeviceQueue& queue);
  Error CheckPlace(uint32_t buffer_index);
  bool AwaitGates(const DeviceTable& devices);
  bool AwaitTurn(DeviceQueue& queue);
  void TakeComplete(DeviceQueue& queue);
  void Fail(const Error& why) HOOK_EXCLUDES(failure_mutex_);
  bool given_up() const;
  void Settle();
  bool CheckDeviceGroup(uint32_t group);
  void FinishBlock(uint32_t block);
  void FinishImage();
  void Leave();
  void NotifyProgress();
  void WakeCopiers();
  bool finished() const { return finished_.load(std::memory_order_acquire) == generation_; }
  bool NextToPopulate(std::byte** data, uint64_t* bytes) HOOK_REQUIRES(populate_mutex_);
  bool PopulateSome() HOOK_EXCLUDES(populate_mutex_);

  const Options options_;
  SourceReader* const reader_;
  std::vector<std::unique_ptr<Thread>> threads_;

  // The trainer's thread only.
  bool running_ = false;
  // Cancel saw nobody who holds a claim. (Who comes later finds nothing to claim, but is a
  // participant for a moment.)
  bool drained_ = true;

  // The capture: written by the trainer's thread while nothing can be claimed, read by it and by
  // who holds a claim.
  std::shared_ptr<Registration> registration_;
  uint32_t slot_ = 0;
  uint32_t generation_ = 0;
  SealBy seal_by_ = SealBy::kCopier;
  int64_t begun_ns_ = 0;
  uint64_t checked_groups_ = 0;  // whose bytes in device memory are compared
  bool has_moved_ = false;       // a pointer is not the one that was registered

  // Generation in the upper half, copied_blocks() left to claim in the lower.
  std::atomic<uint64_t> claim_{0};
  std::atomic<bool> cancelled_{false};
  // Threads that may hold a claim.
  std::atomic<uint32_t> participants_{0};
  // Blocks, and comparisons of groups, that are not done.
  std::atomic<uint32_t> blocks_left_{0};
  // Generation of the newest capture of which every block is done, behind captured_ns.
  std::atomic<uint32_t> finished_{0};
  std::atomic<uint32_t> group_blocks_left_[kGroupCount] = {};
  std::atomic<uint64_t> blocks_done_{0};
  std::atomic<uint64_t> bytes_since_ring_{0};
  std::atomic<uint64_t> device_bytes_{0};
  std::atomic<uint64_t> unpinned_bytes_{0};
  std::atomic<int64_t> device_begun_ns_{0};
  std::atomic<int64_t> device_ended_ns_{0};
  std::atomic<int64_t> next_copy_ns_{0};  // of the pacer
  // The slot is kAbandoned, and becomes kVoid when the last participant has left.
  std::atomic<abi::ImageSlot*> abandoned_{nullptr};
  // Copies of this capture may never be known to be over.
  std::atomic<bool> device_may_write_{false};
  std::atomic<bool> failed_{false};
  // Futex word: changes when there is work, or when the threads shall stop.
  std::atomic<uint32_t> work_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<uint32_t> threads_left_{0};
  // Futex word: changes when a group or the image is complete, or has failed, and when a thread has
  // left.
  std::atomic<uint32_t> progress_{0};

  mutable Mutex failure_mutex_;
  Error failure_ HOOK_GUARDED_BY(failure_mutex_);
  Mutex check_mutex_;
  SourceChecker device_checker_ HOOK_GUARDED_BY(check_mutex_);

  std::atomic<bool> populate_paused_{false};
  Mutex populate_mutex_;
  std::shared_ptr<Registration> to_populate_ HOOK_GUARDED_BY(populate_mutex_);
  // Per block of the rank memory of `populated_for_`.
  std::vector<bool> populated_ HOOK_GUARDED_BY(populate_mutex_);
  std::weak_ptr<Registration> populated_for_ HOOK_GUARDED_BY(populate_mutex_);
  uint64_t populate_cursor_ HOOK_GUARDED_BY(populate_mutex_) = 0;  // slot * block_count + block
  bool populating_ HOOK_GUARDED_BY(populate_mutex_) = false;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_CAPTURE_H_
