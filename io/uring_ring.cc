// How completions reach the loop. The kernel signals the registered eventfd when work for us is
// ready. With DEFER_TASKRUN that work (which makes the completion entries) is done only inside
// io_uring_get_events(), a bounded number of pieces per call, and the eventfd is not signalled
// again for the rest. So RunCompletions() goes round until the kernel's TASKRUN flag says that
// nothing is left, and if it stops earlier it signals the eventfd itself.
//
// Invariant: at most entry_count_ operations are in the kernel, so neither queue can overflow (the
// completion queue has twice as many entries).
#include "io/uring_ring.h"

#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "io/errno_status.h"
#include "io/transfer_errors.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

// The kernel's limit for one registered buffer; for one operation it is about 2 GiB.
constexpr uint64_t kPieceBytesMax = uint64_t{1} << 30;
// Registered pieces at once: 4 TiB of memory. Beyond, transfers go unregistered.
constexpr unsigned kRegisteredSlotCount = 4096;
// A transfer that the kernel puts off this often without progress is given up.
constexpr int kRetriesMax = 64;
// Rounds of RunCompletions(), of up to 64 completions each, so that other events of the loop get
// their turn.
constexpr int kRoundsMax = 2;

// The setup of a kernel since 6.1 and of an older one.
constexpr unsigned kDeferFlags =
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG;

struct Operation {
  enum class Kind { kWrite, kRead, kSync };
  Kind kind = Kind::kSync;
  int fd = -1;
  uint64_t offset_bytes = 0;
  // Of the memory to read from or to fill; kRead writes through it.
  std::byte* memory = nullptr;
  uint64_t length_bytes = 0;
  uint64_t done_bytes = 0;
  int retries = 0;
  IoRing::Done done = {};
};

const char* VerbOf(Operation::Kind kind) {
  switch (kind) {
    case Operation::Kind::kWrite:
      return "write";
    case Operation::Kind::kRead:
      return "read";
    case Operation::Kind::kSync:
      return "sync";
  }
  CHECK(false);
}

class UringRing final : public IoRing {
 public:
  UringRing(const UringOptions& options, UniqueFd event_fd)
      : entry_count_(options.entry_count),
        piece_bytes_(options.piece_bytes),
        event_fd_(std::move(event_fd)) {}
  ~UringRing() override;

  // Once, before anything else; after an error only the destructor may be called.
  absl::Status Start(bool defer_task_run);

  void Write(IoFile& file, uint64_t offset_bytes, std::span<const std::byte> data,
             Done done) override {
    Submit({.kind = Operation::Kind::kWrite,
            .fd = file.handle(),
            .offset_bytes = offset_bytes,
            .memory = const_cast<std::byte*>(data.data()),  // only read by the kernel
            .length_bytes = data.size(),
            .done = std::move(done)});
  }
  void Read(IoFile& file, uint64_t offset_bytes, std::span<std::byte> data, Done done) override {
    Submit({.kind = Operation::Kind::kRead,
            .fd = file.handle(),
            .offset_bytes = offset_bytes,
            .memory = data.data(),
            .length_bytes = data.size(),
            .done = std::move(done)});
  }
  void Sync(IoFile& file, Done done) override {
    Submit({.kind = Operation::Kind::kSync, .fd = file.handle(), .done = std::move(done)});
  }

  bool RegisterMemory(std::span<std::byte> memory) override;
  void UnregisterMemory(std::span<std::byte> memory) override;

  int event_fd() const override { return event_fd_.get(); }
  void RunCompletions() override;
  size_t in_flight_count() const override { return operations_.size(); }
  std::string Describe() const override;

 private:
  using OperationId = uint64_t;
  struct Registered {
    uint64_t length_bytes = 0;
    unsigned slot = 0;
  };

  void Submit(Operation operation);
  void FillKernelQueue();
  void Prepare(io_uring_sqe* entry, OperationId id, const Operation& operation) const;
  std::optional<unsigned> RegisteredSlot(const std::byte* memory, uint64_t length_bytes) const;
  bool UpdateSlot(unsigned slot, std::byte* memory, uint64_t length_bytes);
  bool TakeKernelCompletions();
  void HandleResult(OperationId id, int result);
  // Empty: it must go on.
  std::optional<absl::Status> Advance(Operation& operation, int result) const;
  void Finish(OperationId id, absl::Status status);
  void SignalSelf() const;

  const unsigned entry_count_;
  const uint64_t piece_bytes_;
  const UniqueFd event_fd_;
  io_uring ring_{};
  bool ring_is_open_ = false;
  unsigned setup_flags_ = 0;

  OperationId next_id_ = 1;
  std::unordered_map<OperationId, Operation> operations_;       // accepted and not completed
  std::deque<OperationId> waiting_;                             // of them, not yet in the kernel
  std::vector<std::pair<OperationId, absl::Status>> finished_;  // of them, only `done` is missing
  unsigned in_kernel_count_ = 0;
  bool running_completions_ = false;

  std::map<uintptr_t, Registered> registered_;  // by address
  std::vector<unsigned> free_slots_;
  std::string registration_refusal_;
};

absl::Status UringRing::Start(bool defer_task_run) {
  int result = -EINVAL;
  if (defer_task_run) {
    setup_flags_ = kDeferFlags;
    result = io_uring_queue_init(entry_count_, &ring_, setup_flags_);
  }
  if (result == -EINVAL) {  // an older kernel does not know the flags
    setup_flags_ = 0;
    result = io_uring_queue_init(entry_count_, &ring_, setup_flags_);
  }
  if (result < 0) return ErrnoStatus(-result, "set up", "io_uring");
  ring_is_open_ = true;

  io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
  bool complete = probe != nullptr;
  for (const int opcode : {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READ_FIXED,
                           IORING_OP_WRITE_FIXED, IORING_OP_FSYNC}) {
    complete = complete && io_uring_opcode_supported(probe, opcode) != 0;
  }
  if (probe != nullptr) io_uring_free_probe(probe);
  if (!complete) {
    return absl::UnimplementedError(
        "set up io_uring: this kernel lacks READ, WRITE, their FIXED forms or FSYNC");
  }
  result = io_uring_register_eventfd(&ring_, event_fd_.get());
  if (result < 0) return ErrnoStatus(-result, "register the eventfd of", "io_uring");

  result = io_uring_register_buffers_sparse(&ring_, kRegisteredSlotCount);
  if (result < 0) {
    registration_refusal_ = absl::StrFormat("no table: %s", ErrnoName(-result));
  } else {
    for (unsigned slot = kRegisteredSlotCount; slot > 0; --slot) free_slots_.push_back(slot - 1);
  }
  return absl::OkStatus();
}

UringRing::~UringRing() {
  if (!ring_is_open_) return;
  waiting_.clear();
  while (in_kernel_count_ > 0) {
    const int result = io_uring_submit_and_wait(&ring_, 1);
    CHECK(result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY);
    io_uring_cqe* completion = nullptr;
    while (io_uring_peek_cqe(&ring_, &completion) == 0) {
      io_uring_cqe_seen(&ring_, completion);
      --in_kernel_count_;
    }
  }
  io_uring_queue_exit(&ring_);
}

void UringRing::Submit(Operation operation) {
  const OperationId id = next_id_++;
  const bool empty = operation.length_bytes == 0 && operation.kind != Operation::Kind::kSync;
  operations_.emplace(id, std::move(operation));
  if (empty) {
    finished_.emplace_back(id, absl::OkStatus());
    SignalSelf();
    return;
  }
  waiting_.push_back(id);
  FillKernelQueue();
}

void UringRing::FillKernelQueue() {
  while (!waiting_.empty() && in_kernel_count_ < entry_count_) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    if (entry == nullptr) break;  // the kernel did not take what is there: see below
    Prepare(entry, waiting_.front(), operations_.at(waiting_.front()));
    waiting_.pop_front();
    ++in_kernel_count_;
  }
  if (io_uring_sq_ready(&ring_) == 0) return;
  const int result = io_uring_submit(&ring_);
  // Short of memory, interrupted, or some were not taken: they stay in the ring's queue and are
  // submitted at the next round, which we ask for, as nothing else may come.
  CHECK(result >= 0 || result == -EAGAIN || result == -EBUSY || result == -EINTR);
  if (io_uring_sq_ready(&ring_) > 0) SignalSelf();
}

void UringRing::Prepare(io_uring_sqe* entry, OperationId id, const Operation& operation) const {
  std::byte* memory = operation.memory + operation.done_bytes;
  const uint64_t offset = operation.offset_bytes + operation.done_bytes;
  const auto length =
      static_cast<unsigned>(std::min(operation.length_bytes - operation.done_bytes, piece_bytes_));
  const std::optional<unsigned> slot = RegisteredSlot(memory, length);
  switch (operation.kind) {
    case Operation::Kind::kWrite:
      if (slot.has_value()) {
        io_uring_prep_write_fixed(entry, operation.fd, memory, length, offset,
                                  static_cast<int>(*slot));
      } else {
        io_uring_prep_write(entry, operation.fd, memory, length, offset);
      }
      break;
    case Operation::Kind::kRead:
      if (slot.has_value()) {
        io_uring_prep_read_fixed(entry, operation.fd, memory, length, offset,
                                 static_cast<int>(*slot));
      } else {
        io_uring_prep_read(entry, operation.fd, memory, length, offset);
      }
      break;
    case Operation::Kind::kSync:
      io_uring_prep_fsync(entry, operation.fd, 0);
      break;
  }
  entry->user_data = id;
}

void UringRing::RunCompletions() {
  CHECK(!running_completions_);
  running_completions_ = true;
  uint64_t count;
  // Emptied before the completions are taken: what comes later makes it readable again.
  if (read(event_fd_.get(), &count, sizeof(count)) < 0) CHECK(errno == EAGAIN || errno == EINTR);
  bool more = true;
  for (int round = 0; more && round < kRoundsMax; ++round) {
    more = TakeKernelCompletions();
    FillKernelQueue();
    std::vector<std::pair<OperationId, absl::Status>> finished;
    finished.swap(finished_);
    for (auto& [id, status] : finished) Finish(id, std::move(status));
  }
  if (more || !finished_.empty()) SignalSelf();
  running_completions_ = false;
}

// True if there may be more.
bool UringRing::TakeKernelCompletions() {
  if (setup_flags_ != 0) {
    const int result = io_uring_get_events(&ring_);
    CHECK(result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY);
  }
  std::array<io_uring_cqe*, 64> completions;
  const unsigned count = io_uring_peek_batch_cqe(&ring_, completions.data(), completions.size());
  std::array<std::pair<OperationId, int>, 64> results;
  for (unsigned i = 0; i < count; ++i) {
    results[i] = {completions[i]->user_data, completions[i]->res};
  }
  io_uring_cq_advance(&ring_, count);
  in_kernel_count_ -= count;
  for (unsigned i = 0; i < count; ++i) HandleResult(results[i].first, results[i].second);
  const unsigned flags = __atomic_load_n(ring_.sq.kflags, __ATOMIC_ACQUIRE);
  return count > 0 || (flags & IORING_SQ_TASKRUN) != 0;
}

void UringRing::HandleResult(OperationId id, int result) {
  Operation& operation = operations_.at(id);
  std::optional<absl::Status> status = Advance(operation, result);
  if (status.has_value()) {
    finished_.emplace_back(id, *std::move(status));
  } else {
    waiting_.push_front(id);  // it has waited already
  }
}

std::optional<absl::Status> UringRing::Advance(Operation& operation, int result) const {
  const char* verb = VerbOf(operation.kind);
  if (operation.kind == Operation::Kind::kSync) {
    if (result < 0) return TransferError(-result, verb, operation.fd);
    return absl::OkStatus();
  }
  if (result == -EAGAIN || result == -EINTR) {
    if (++operation.retries <= kRetriesMax) return std::nullopt;
  }
  if (result < 0) return TransferError(-result, verb, operation.fd);
  operation.retries = 0;
  operation.done_bytes += static_cast<uint64_t>(result);
  CHECK(operation.done_bytes <= operation.length_bytes);
  if (operation.done_bytes == operation.length_bytes) return absl::OkStatus();
  if (operation.kind == Operation::Kind::kRead) {
    // A direct read behind the end of the file would be refused as unaligned: look first.
    absl::Status status = CheckNotTruncated(
        operation.fd, {operation.offset_bytes, operation.length_bytes, operation.done_bytes});
    if (!status.ok()) return status;
  }
  if (result > 0) return std::nullopt;
  return absl::UnavailableError(absl::StrFormat("%s %s: the kernel moved %d of %d bytes", verb,
                                                PathOfDescriptor(operation.fd),
                                                operation.done_bytes, operation.length_bytes));
}

void UringRing::Finish(OperationId id, absl::Status status) {
  const auto operation = operations_.find(id);
  const Done done = std::move(operation->second.done);
  operations_.erase(operation);
  done(std::move(status));
}

void UringRing::SignalSelf() const {
  const uint64_t one = 1;
  CHECK(write(event_fd_.get(), &one, sizeof(one)) == sizeof(one));
}

std::optional<unsigned> UringRing::RegisteredSlot(const std::byte* memory,
                                                  uint64_t length_bytes) const {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  auto buffer = registered_.upper_bound(address);
  if (buffer == registered_.begin()) return std::nullopt;
  --buffer;
  const uint64_t begin = address - buffer->first;
  if (begin > buffer->second.length_bytes || length_bytes > buffer->second.length_bytes - begin) {
    return std::nullopt;
  }
  return buffer->second.slot;
}

bool UringRing::UpdateSlot(unsigned slot, std::byte* memory, uint64_t length_bytes) {
  const iovec buffer{memory, length_bytes};
  const __u64 no_tag = 0;
  const int result = io_uring_register_buffers_update_tag(&ring_, slot, &buffer, &no_tag, 1);
  if (result == 1) return true;
  rlimit limit{};
  const bool known = getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  registration_refusal_ =
      known ? absl::StrFormat("%s, RLIMIT_MEMLOCK %d bytes", ErrnoName(-result), limit.rlim_cur)
            : ErrnoName(-result);
  return false;
}

bool UringRing::RegisterMemory(std::span<std::byte> memory) {
  if (free_slots_.size() * piece_bytes_ < memory.size()) {
    if (registration_refusal_.empty()) registration_refusal_ = "the table is full";
    return false;
  }
  for (uint64_t begin = 0; begin < memory.size(); begin += piece_bytes_) {
    const uint64_t length = std::min<uint64_t>(memory.size() - begin, piece_bytes_);
    if (!UpdateSlot(free_slots_.back(), memory.data() + begin, length)) {
      UnregisterMemory(memory);  // what came before: all or nothing
      return false;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.data() + begin);
    CHECK(registered_.emplace(address, Registered{length, free_slots_.back()}).second);
    free_slots_.pop_back();
  }
  return true;
}

void UringRing::UnregisterMemory(std::span<std::byte> memory) {
  const auto begin_address = reinterpret_cast<uintptr_t>(memory.data());
  const auto begin = registered_.lower_bound(begin_address);
  const auto end = registered_.lower_bound(begin_address + memory.size());
  for (auto buffer = begin; buffer != end; ++buffer) {
    // An empty entry takes the buffer out. If the kernel has no memory even for that, the slot is
    // given up: it is never used again, and its pages go with the ring.
    if (UpdateSlot(buffer->second.slot, nullptr, 0)) free_slots_.push_back(buffer->second.slot);
  }
  registered_.erase(begin, end);
}

std::string UringRing::Describe() const {
  std::string text = absl::StrFormat("io_uring, %d entries%s", entry_count_,
                                     setup_flags_ != 0 ? ", deferred task work" : "");
  if (!registered_.empty()) text += ", registered buffers";
  if (!registration_refusal_.empty()) {
    text += absl::StrFormat(", registration refused (%s)", registration_refusal_);
  }
  return text;
}

}  // namespace

absl::StatusOr<std::unique_ptr<IoRing>> NewUringRing(const UringOptions& options) {
  CHECK(options.entry_count >= 1 && options.entry_count <= 4096 &&
        (options.entry_count & (options.entry_count - 1)) == 0);
  CHECK(options.piece_bytes > 0 && options.piece_bytes <= kPieceBytesMax);
  UniqueFd event_fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!event_fd) return ErrnoStatus(errno, "create", "eventfd of io_uring");
  auto ring = std::make_unique<UringRing>(options, std::move(event_fd));
  RETURN_IF_ERROR(ring->Start(options.defer_task_run));
  return ring;
}

}  // namespace holdfast
