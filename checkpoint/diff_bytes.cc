// Threads hand blocks to each other through the counters of a schedule, all under one mutex:
// - a reader takes the next load of the list, waits until the windows that use what was in its slot
//   are done, reads without the mutex, and marks the load as there;
// - a comparer takes the next window of the list, waits until its loads are there, compares without
//   the mutex, and counts down the uses of each.
// Nobody waits in a circle: a load waits for windows that come before the first window that needs
// it, and those need only loads before it, all of which have been taken.
#include "checkpoint/diff_bytes.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/copy_bytes.h"
#include "base/mutex.h"

namespace holdfast {
namespace {

constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kReadersMax = 6;  // reads in flight; a device wants a few

// The slots of one checkpoint.
struct SlotMemory {
  BlockMemory bytes;
  uint64_t slot_bytes = 0;
};

absl::StatusOr<SlotMemory> AllocateSlots(const Index& index, size_t count) {
  SlotMemory memory;
  memory.slot_bytes = kBlockBytesMin;
  for (const IndexImage& image : index.images) {
    memory.slot_bytes = std::max(memory.slot_bytes, image.block_bytes);
  }
  memory.bytes = AllocateBlockMemory(count * memory.slot_bytes);
  if (memory.bytes != nullptr) return memory;
  return absl::ResourceExhaustedError(
      absl::StrFormat("no memory for %d blocks of %d bytes", count, memory.slot_bytes));
}

class Comparison {
 public:
  Comparison(const DiffPlan& plan, size_t common_count,
             const std::array<const BlockReader*, 2>& readers, const DiffThreads& threads,
             const std::function<bool(uint64_t)>& progress, std::array<SlotMemory, 2> memory)
      : plan_(plan),
        schedule_(plan.schedule()),
        readers_(readers),
        threads_(threads),
        progress_(progress),
        memory_(std::move(memory)),
        previous_in_slot_(schedule_.loads.size(), kNone),
        is_there_(schedule_.loads.size(), false),
        uses_left_(schedule_.loads.size(), 0),
        results_(common_count) {
    std::array<std::vector<uint32_t>, 2> last;
    for (size_t i = 0; i < 2; ++i) last[i].assign(schedule_.slot_count[i], kNone);
    for (uint32_t i = 0; i < schedule_.loads.size(); ++i) {
      const BlockLoad& load = schedule_.loads[i];
      previous_in_slot_[i] = last[load.checkpoint][load.slot];
      last[load.checkpoint][load.slot] = i;
      uses_left_[i] = load.use_count;
    }
  }

  absl::StatusOr<std::vector<StateComparison>> Run() {
    {
      std::vector<std::jthread> threads;
      StartThreads(threads);
      CompareWindows(Reports::kProgress);
    }
    MutexLock lock(mutex_);
    if (!status_.ok()) return status_;
    return std::move(results_);
  }

 private:
  enum class Reports { kNothing, kProgress };

  // Where one cannot be started, those that were end at once.
  void StartThreads(std::vector<std::jthread>& threads) {
    const size_t readers = std::min(kReadersMax, schedule_.loads.size());
    const size_t comparers =
        std::clamp(std::thread::hardware_concurrency(), 1u, std::max(threads_.comparers_max, 1u));
    const size_t count = readers + comparers - 1;
    threads.reserve(count);
    try {
      while (threads.size() < readers) threads.push_back(Start([this] { ReadBlocks(); }));
      while (threads.size() < count) {
        threads.push_back(Start([this] { CompareWindows(Reports::kNothing); }));
      }
    } catch (const std::system_error& error) {
      MutexLock lock(mutex_);
      Stop(absl::ResourceExhaustedError(
          absl::StrFormat("start thread %d of %d: %s", threads.size() + 1, count, error.what())));
    }
  }

  std::jthread Start(std::function<void()> body) const {
    return threads_.start ? threads_.start(std::move(body)) : std::jthread(std::move(body));
  }

  // What a comparer needs for itself.
  struct Comparer {
    Fingerprinter fingerprinter;
    std::array<std::vector<std::byte>, 2> gathered;  // of checkpoint 0 and 1
    std::vector<CopyOp> ops;
  };

  const Index& IndexOf(uint32_t checkpoint) const {
    return checkpoint == plan_.lead() ? plan_.lead_index() : plan_.other_index();
  }
  std::span<std::byte> Block(const BlockLoad& load) const {
    const SlotMemory& memory = memory_[load.checkpoint];
    return {memory.bytes.get() + load.slot * memory.slot_bytes,
            IndexOf(load.checkpoint).images[load.image].block_bytes};
  }

  void Stop(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (status_.ok()) status_ = std::move(status);
    slot_free_.SignalAll();
    block_there_.SignalAll();
  }

  // ---- Reading ----

  void ReadBlocks() {
    while (true) {
      uint32_t number = 0;
      {
        MutexLock lock(mutex_);
        if (!status_.ok() || next_load_ == schedule_.loads.size()) return;
        number = next_load_++;
        const uint32_t previous = previous_in_slot_[number];
        while (status_.ok() && previous != kNone && uses_left_[previous] > 0) {
          slot_free_.Wait(mutex_);
        }
        if (!status_.ok()) return;
      }
      const BlockLoad& load = schedule_.loads[number];
      const std::span<std::byte> block = Block(load);
      absl::Status read = readers_[load.checkpoint]->Read(load.image, load.block, block);
      MutexLock lock(mutex_);
      if (read.ok()) {
        is_there_[number] = true;
        bytes_read_ += block.size();
        block_there_.SignalAll();
      } else {
        Stop(std::move(read));
      }
    }
  }

  // ---- Comparing ----

  bool AllThere(const DiffWindow& window) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const uint32_t load : UsesOf(window)) {
      if (!is_there_[load]) return false;
    }
    return true;
  }
  std::span<const uint32_t> UsesOf(const DiffWindow& window) const {
    return std::span(schedule_.uses)
        .subspan(window.first_use, size_t{window.lead_uses} + window.other_uses);
  }

  void CompareWindows(Reports reports) {
    Comparer comparer;
    while (true) {
      const DiffWindow* window = nullptr;
      {
        MutexLock lock(mutex_);
        if (!status_.ok() || next_window_ == schedule_.windows.size()) return;
        window = &schedule_.windows[next_window_++];
        while (status_.ok() && !AllThere(*window)) block_there_.Wait(mutex_);
        if (!status_.ok()) return;
      }
      const StateComparison found = Compare(*window, comparer);
      uint64_t bytes_read = 0;
      {
        MutexLock lock(mutex_);
        StateComparison& result = results_[plan_.pieces()[window->piece].common];
        result.differences += found.differences;
        for (size_t i = 0; i < 2; ++i) result.element_sum[i] += found.element_sum[i];
        bool frees_slots = false;
        for (const uint32_t load : UsesOf(*window)) frees_slots |= --uses_left_[load] == 0;
        if (frees_slots) slot_free_.SignalAll();
        bytes_read = bytes_read_;
      }
      if (reports == Reports::kProgress && !progress_(bytes_read)) {
        MutexLock lock(mutex_);
        Stop(absl::CancelledError("the comparison was stopped"));
      }
    }
  }

  StateComparison Compare(const DiffWindow& window, Comparer& comparer) const {
    const LeadPiece& piece = plan_.pieces()[window.piece];
    const TensorState& state = plan_.lead_index().tensor_states[piece.piece.tensor_state];
    const uint64_t bytes = window.end_bytes - window.begin_bytes;
    const uint32_t lead = plan_.lead();

    comparer.ops.clear();
    CopyOp whole;
    whole.image_offset_bytes = window.begin_bytes;
    whole.buffer = piece.image;
    whole.buffer_offset_bytes = piece.offset_bytes + window.begin_bytes;
    whole.run_bytes = bytes;
    comparer.ops.push_back(whole);
    const std::span<const uint32_t> uses = UsesOf(window);
    const std::span<const std::byte> ours =
        Gather(comparer.ops, window, uses.first(window.lead_uses), comparer.gathered[lead]);

    comparer.ops.clear();
    plan_.AppendOther(window.piece, window.begin_bytes, window.end_bytes, comparer.ops);
    const std::span<const std::byte> theirs =
        Gather(comparer.ops, window, uses.subspan(window.lead_uses), comparer.gathered[1 - lead]);

    StateComparison found;
    const auto sum = [&](std::span<const std::byte> elements) {
      return comparer.fingerprinter.OfPiece(state, piece.piece, plan_.lead_index().boxes,
                                            window.begin_bytes, elements);
    };
    found.element_sum[lead] = sum(ours);
    if (std::memcmp(ours.data(), theirs.data(), bytes) == 0) {
      found.element_sum[1 - lead] = found.element_sum[lead];
      return found;
    }
    found.element_sum[1 - lead] = sum(theirs);
    found.differences =
        CompareElements(state.dtype, ours, theirs,
                        piece.piece.begin + window.begin_bytes / ElementBytes(state.dtype));
    // Elements of a piece ascend in the tensor, so the first of the window is the first there too.
    found.differences.first =
        ElementInTensor(piece.piece, plan_.lead_index().boxes, state, found.differences.first);
    return found;
  }

  // The bytes of the window in one checkpoint: where they lie, if it is one run in one block, else
  // put together in `memory`. `ops` as DiffPlan::AppendOther gives them.
  std::span<const std::byte> Gather(std::span<const CopyOp> ops, const DiffWindow& window,
                                    std::span<const uint32_t> uses,
                                    std::vector<std::byte>& memory) const {
    const size_t bytes = window.end_bytes - window.begin_bytes;
    if (uses.size() == 1 && ops.size() == 1 && ops[0].count == 1) {
      const std::span<const std::byte> block = Block(schedule_.loads[uses[0]]);
      return block.subspan(ops[0].buffer_offset_bytes % block.size(), bytes);
    }
    memory.resize(kDiffWindowBytesMax);
    const BlockLoad* load = nullptr;
    for (const CopyOp& op : ops) {
      for (uint64_t run = 0; run < op.count; ++run) {
        uint64_t from = op.buffer_offset_bytes + run * op.buffer_stride_bytes;
        std::byte* to = memory.data() + (op.image_offset_bytes - window.begin_bytes) +
                        run * op.image_stride_bytes;
        for (uint64_t left = op.run_bytes; left > 0;) {
          load = LoadOf(op.buffer, from, uses, load);
          const std::span<const std::byte> block = Block(*load);
          const uint64_t in_block = from % block.size();
          const uint64_t part = std::min(left, block.size() - in_block);
          CopyBytes(to, block.data() + in_block, part);
          from += part;
          to += part;
          left -= part;
        }
      }
    }
    return std::span(memory).first(bytes);
  }

  // The load among `uses` that has the byte at this offset of the image; `last` may be it.
  const BlockLoad* LoadOf(uint32_t image, uint64_t offset_bytes, std::span<const uint32_t> uses,
                          const BlockLoad* last) const {
    const auto has = [&](const BlockLoad& load) {
      return load.image == image &&
             load.block == offset_bytes / IndexOf(load.checkpoint).images[image].block_bytes;
    };
    if (last != nullptr && has(*last)) return last;
    for (const uint32_t number : uses) {
      if (has(schedule_.loads[number])) return &schedule_.loads[number];
    }
    CHECK(false);  // the schedule has all blocks of a window among its uses
    return nullptr;
  }

  const DiffPlan& plan_;
  const DiffSchedule& schedule_;
  const std::array<const BlockReader*, 2> readers_;
  const DiffThreads& threads_;
  const std::function<bool(uint64_t)>& progress_;
  const std::array<SlotMemory, 2> memory_;
  std::vector<uint32_t> previous_in_slot_;  // of each load: the one before it in its slot

  Mutex mutex_;
  CondVar slot_free_;    // the uses of a load are down to 0, or everybody stops
  CondVar block_there_;  // a load is there, or everybody stops
  absl::Status status_ ABSL_GUARDED_BY(mutex_);  // the first error: everybody stops
  uint32_t next_load_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t next_window_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t bytes_read_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<bool> is_there_ ABSL_GUARDED_BY(mutex_);  // of each load
  std::vector<uint32_t> uses_left_ ABSL_GUARDED_BY(mutex_);
  std::vector<StateComparison> results_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::vector<StateComparison>> CompareBytes(
    const DiffPlan& plan, size_t common_count, const std::array<const BlockReader*, 2>& readers,
    const DiffThreads& threads, const std::function<bool(uint64_t bytes_done)>& progress) {
  std::array<SlotMemory, 2> memory;
  for (uint32_t i = 0; i < 2; ++i) {
    const Index& index = i == plan.lead() ? plan.lead_index() : plan.other_index();
    absl::StatusOr<SlotMemory> slots = AllocateSlots(index, plan.schedule().slot_count[i]);
    if (!slots.ok()) return slots.status();
    memory[i] = *std::move(slots);
  }
  return Comparison(plan, common_count, readers, threads, progress, std::move(memory)).Run();
}

}  // namespace holdfast
