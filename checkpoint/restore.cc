#include "checkpoint/restore.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <map>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/kill_point.h"
#include "base/status_macros.h"
#include "checkpoint/shared_mapping.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

void WakeAll(std::atomic<uint32_t>& word) {
  // The count of the woken is of no interest; the call cannot fail on mapped memory.
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

std::span<const std::byte> BytesOf(const std::vector<abi::RestoreOp>& ops) {
  return std::as_bytes(std::span(ops));
}

}  // namespace

absl::Status NotTheBeginning(const absl::Status& status) {
  if (status.code() != absl::StatusCode::kNotFound) return status;
  return absl::DataLossError(
      absl::StrFormat("what the restore needs is missing: %s", status.message()));
}

absl::StatusOr<UniqueFd> OpenReadOnly(const SharedMapping& mapping) {
  const std::string path = absl::StrFormat("/proc/self/fd/%d", mapping.fd());
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoStatus(errno, "open read-only", path);
  return fd;
}

Restore::Restore(std::shared_ptr<RestoreSource> source, std::shared_ptr<const Registration> target,
                 std::shared_ptr<StagingMemory> staging, abi::RestoreRing& ring, EventLoop& loop,
                 WorkPool& pool, const Options& options, Begun begun, Ended ended)
    : source_(std::move(source)),
      target_(std::move(target)),
      staging_(std::move(staging)),
      ring_(ring),
      loop_(loop),
      pool_(pool),
      options_(options),
      begun_(std::move(begun)),
      ended_(std::move(ended)),
      piece_bytes_max_(staging_->block_bytes()) {
  Plan();
}

// ---- Before the first piece ----

void Restore::Plan() {
  const auto result = std::make_shared<absl::StatusOr<RestorePlan>>();
  ++in_flight_count_;
  pool_.Run(
      [source = source_, target = target_, piece_bytes_max = piece_bytes_max_,
       selection = options_.selection,
       result] { *result = PlanRestore(source->index(), *target, piece_bytes_max, selection); },
      [this, alive = std::weak_ptr<bool>(alive_), result] {
        if (alive.expired()) return;
        --in_flight_count_;
        if (phase_ != Phase::kPlanning) return;
        if (!result->ok()) {
          Fail(result->status());
          return;
        }
        plan_ = *std::move(*result);
        // A registration of nothing at all only asks for the blobs.
        result_.is_whole =
            plan_.tensor_states_left_out == 0 &&
            (!target_->layout().tensor_states().empty() || source_->index().tensor_states.empty());
        for (size_t i = 0; i < plan_.pieces.size(); ++i) {
          const RestorePiece& piece = plan_.pieces[i];
          if (units_.empty() || units_.back().image != piece.image ||
              units_.back().block != piece.block) {
            units_.push_back({piece.image, piece.block, i, 0});
          }
          ++units_.back().piece_count;
        }
        KillPoint("restore.planned");
        phase_ = Phase::kBlobs;
        ReadBlobs();
      });
}

void Restore::ReadBlobs() {
  ++in_flight_count_;
  source_->Blobs([this, alive = std::weak_ptr<bool>(alive_)](
                     absl::StatusOr<std::shared_ptr<const SealedBlobs>> blobs) {
    if (alive.expired()) return;
    --in_flight_count_;
    if (phase_ != Phase::kBlobs) return;
    if (!blobs.ok()) {
      Fail(blobs.status());
      return;
    }
    blobs_ = *std::move(blobs);
    Begin();
  });
}

absl::StatusOr<RestoreBegun> Restore::Describe() {
  RestoreBegun begun;
  const Index& index = source_->index();
  begun.checkpoint = index.checkpoint;
  // Whose ranks the blobs are of: "mine" is an answer in a world of that size only.
  begun.world_size = index.BlobWorldSize();
  begun.restore_from = options_.restore_from;
  begun.op_count = plan_.ops.size();
  begun.operations_bytes = BytesOf(plan_.ops).size();
  begun.blobs_bytes = blobs_->bytes;
  begun.bytes = plan_.bytes;
  begun.tensor_states = plan_.tensor_states;
  begun.tensor_states_left_out = plan_.tensor_states_left_out;
  ASSIGN_OR_RETURN(begun.operations_fd, SealedMemory("holdfast-restore", BytesOf(plan_.ops)));
  begun.blobs_fd.Reset(fcntl(blobs_->fd.get(), F_DUPFD_CLOEXEC, 0));
  if (!begun.blobs_fd) return ErrnoStatus(errno, "duplicate", "the memory of the blobs");

  map_ids_.assign(index.images.size(), 0);
  std::map<const SharedMapping*, uint32_t> id_of = {{staging_->mapping(), 0}};
  for (const Unit& unit : units_) {
    const SharedMapping* mapping = source_->in_place(unit.image);
    if (mapping == nullptr) continue;
    const auto [entry, is_new] = id_of.try_emplace(mapping, begun.maps.size() + 1);
    map_ids_[unit.image] = entry->second;
    if (!is_new) continue;
    RestoreBegun::Map map;
    ASSIGN_OR_RETURN(map.fd, OpenReadOnly(*mapping));
    map.bytes = mapping->bytes().size();
    begun.maps.push_back(std::move(map));
  }
  return begun;
}

void Restore::Begin() {
  absl::StatusOr<RestoreBegun> begun = Describe();
  if (!begun.ok()) {
    Fail(begun.status());
    return;
  }
  // A former restore may have been cut off: what it left in the ring is not for anybody.
  produced_ = consumed_ = ring_.consumed.load(std::memory_order_acquire);
  ring_.produced.store(produced_, std::memory_order_release);
  phase_ = Phase::kDelivering;
  std::exchange(begun_, nullptr)(std::move(begun));
  if (phase_ != Phase::kDelivering) return;  // cancelled in the callback
  StartFetches();
  CheckEnd();
}

// ---- Pieces ----

void Restore::StartFetches() {
  while (phase_ == Phase::kDelivering && fetch_count_ < options_.fetches_in_flight_max) {
    // What is verified and waits for the ring takes memory too.
    if (ready_.size() + delivered_.size() >= abi::kRestoreEntries) return;
    if (!again_.empty()) {
      if (!FetchStaged(again_.front())) return;
      again_.pop_front();
    } else if (next_unit_ < units_.size()) {
      if (!StartFetch(units_[next_unit_])) return;
      ++next_unit_;
    } else {
      return;
    }
  }
}

// False: no room now.
bool Restore::StartFetch(const Unit& unit) {
  if (source_->in_place(unit.image) == nullptr) return FetchStaged(unit);
  ++fetch_count_;
  ++in_flight_count_;
  source_->VerifyInPlace(
      unit.image, unit.block,
      [this, alive = std::weak_ptr<bool>(alive_), unit](absl::StatusOr<uint64_t> memory_offset) {
        if (alive.expired()) return;
        --fetch_count_;
        --in_flight_count_;
        if (phase_ != Phase::kDelivering) return;
        if (memory_offset.ok()) {
          DeliverInPlace(unit, *memory_offset);
        } else {
          again_.push_back(unit);
        }
        StartFetches();
        CheckEnd();
      });
  return true;
}

bool Restore::FetchStaged(const Unit& unit) {
  const uint64_t block_bytes = source_->index().images[unit.image].block_bytes;
  const uint64_t part_bytes = std::min(block_bytes, piece_bytes_max_);
  const size_t part_count = block_bytes / part_bytes;
  std::vector<uint64_t> staging = staging_->Take(part_count);
  if (staging.size() < part_count) {
    const size_t found = staging.size();
    staging_->Return(staging);
    if (fetch_count_ == 0 && ready_.empty() && delivered_.empty()) {
      Fail(absl::ResourceExhaustedError(absl::StrFormat(
          "no memory to restore into: %d free blocks of %d bytes are needed, %d are there",
          part_count, staging_->block_bytes(), found)));
    }
    return false;
  }
  std::vector<std::span<std::byte>> targets;
  for (const uint64_t offset : staging) {
    targets.push_back(staging_->memory().subspan(offset, part_bytes));
  }
  ++fetch_count_;
  ++in_flight_count_;
  source_->Fetch(unit.image, unit.block, std::move(targets),
                 [this, alive = std::weak_ptr<bool>(alive_), keep = staging_, unit,
                  staging = std::move(staging)](absl::StatusOr<RestoreSource::From> from) {
                   if (alive.expired()) return;
                   --fetch_count_;
                   --in_flight_count_;
                   if (phase_ != Phase::kDelivering || !from.ok()) {
                     staging_->Return(staging);
                     if (phase_ == Phase::kDelivering) Fail(from.status());
                     return;
                   }
                   DeliverStaged(unit, staging, *from);
                   StartFetches();
                   CheckEnd();
                 });
  return true;
}

void Restore::DeliverInPlace(const Unit& unit, uint64_t memory_offset) {
  for (size_t i = unit.first_piece; i < unit.first_piece + unit.piece_count; ++i) {
    const RestorePiece& piece = plan_.pieces[i];
    Delivery delivery;
    delivery.entry.offset = memory_offset + piece.offset_bytes;
    delivery.entry.bytes = piece.bytes;
    delivery.entry.first_op = piece.first_op;
    delivery.entry.op_count = piece.op_count;
    delivery.entry.map_id = map_ids_[unit.image];
    delivery.from = RestoreSource::From::kMemory;
    ready_.push_back(delivery);
  }
  FillRing();
}

void Restore::DeliverStaged(const Unit& unit, const std::vector<uint64_t>& staging,
                            RestoreSource::From from) {
  std::vector<uint64_t> unused = staging;
  for (size_t i = unit.first_piece; i < unit.first_piece + unit.piece_count; ++i) {
    const RestorePiece& piece = plan_.pieces[i];
    const uint64_t offset = staging[piece.offset_bytes / piece.bytes];
    Delivery delivery;
    delivery.entry.offset = offset;
    delivery.entry.bytes = piece.bytes;
    delivery.entry.first_op = piece.first_op;
    delivery.entry.op_count = piece.op_count;
    delivery.staging = offset;
    delivery.from = from;
    ready_.push_back(delivery);
    unused.erase(std::find(unused.begin(), unused.end(), offset));
  }
  staging_->Return(unused);
  FillRing();
}

void Restore::FillRing() {
  bool any = false;
  while (!ready_.empty() && delivered_.size() < abi::kRestoreEntries) {
    ring_.entries[produced_ % abi::kRestoreEntries] = ready_.front().entry;
    ring_.produced.store(++produced_, std::memory_order_release);
    delivered_.push_back(ready_.front());
    ready_.pop_front();
    any = true;
    KillPoint("restore.piece_delivered");
  }
  if (any) WakeAll(ring_.produced);
}

void Restore::Advance() {
  if (phase_ != Phase::kDelivering) return;
  const uint32_t consumed = ring_.consumed.load(std::memory_order_acquire);
  const uint32_t count = consumed - consumed_;  // modulo 2^32
  if (count > delivered_.size()) {
    Fail(absl::InvalidArgumentError(
        absl::StrFormat("the restore ring says that %d pieces were consumed; %d are in it", count,
                        delivered_.size())));
    return;
  }
  std::vector<uint64_t> free;
  for (uint32_t i = 0; i < count; ++i) {
    const Delivery& delivery = delivered_.front();
    if (delivery.staging.has_value()) free.push_back(*delivery.staging);
    for (uint64_t op = 0; op < delivery.entry.op_count; ++op) {
      const abi::RestoreOp& done = plan_.ops[delivery.entry.first_op + op];
      result_.bytes += done.run_bytes * done.count;
      if (delivery.from == RestoreSource::From::kMemory) {
        result_.bytes_from_memory += done.run_bytes * done.count;
      }
    }
    delivered_.pop_front();
  }
  consumed_ = consumed;
  staging_->Return(free);
  FillRing();
  StartFetches();
  CheckEnd();
}

// ---- The end ----

void Restore::CheckEnd() {
  if (phase_ != Phase::kDelivering || next_unit_ < units_.size() || !again_.empty() ||
      fetch_count_ > 0 || !ready_.empty() || !delivered_.empty()) {
    return;
  }
  phase_ = Phase::kOver;
  KillPoint("restore.ended");
  loop_.Post([ended = std::exchange(ended_, nullptr), result = result_] { ended(result); });
}

void Restore::Fail(absl::Status why) { Cancel(NotTheBeginning(why), Report::kYes); }

void Restore::Cancel(absl::Status why, Report report) {
  if (phase_ == Phase::kOver) return;
  phase_ = Phase::kOver;
  std::vector<uint64_t> free;
  for (const std::deque<Delivery>* deliveries : {&ready_, &delivered_}) {
    for (const Delivery& delivery : *deliveries) {
      if (delivery.staging.has_value()) free.push_back(*delivery.staging);
    }
  }
  ready_.clear();
  delivered_.clear();
  staging_->Return(free);
  if (report == Report::kNo) return;
  if (begun_) {
    loop_.Post([begun = std::exchange(begun_, nullptr), why] { begun(why); });
  } else {
    loop_.Post([ended = std::exchange(ended_, nullptr), why] { ended(why); });
  }
}

}  // namespace holdfast
