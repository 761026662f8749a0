#include "hook/restore.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "hook/device_uploads.h"
#include "hook/stream_copy.h"

namespace holdfast::hook {
namespace {

// Copying looks at the deadline once per so many bytes.
constexpr uint64_t kCopyBytesPerLook = uint64_t{16} << 20;
// A sleep for pieces ends after so long to look at the connection.
constexpr int64_t kLookNs = 50 * kNsPerMs;

unsigned long long Print(uint64_t value) { return value; }

// One try, on one connection.
class RestoreRun {
 public:
  RestoreRun(Link& link, std::shared_ptr<Registration> registration,
             std::shared_ptr<const Selection> selection, std::span<void* const> streams,
             Deadline deadline)
      : link_(link),
        registration_(std::move(registration)),
        selection_(std::move(selection)),
        streams_(streams),
        deadline_(deadline) {
    const DeviceTable* const devices = registration_->document().devices().get();
    if (devices != nullptr) uploads_.emplace(*devices, deadline);
  }

  // HF_ABORTED: the connection was lost; try again.
  Result<RestoreOutcome> Run();

 private:
  Error MapAll(RestoreStart& start);
  Result<abi::RestoreDone> Consume();
  Error Execute(const abi::RestoreEntry& entry);
  Error ExecuteOp(const abi::RestoreOp& op, std::span<const std::byte> piece);
  Error CopyToHost(const abi::RestoreOp& op, const std::byte* source, std::byte* target);

  Link& link_;
  const std::shared_ptr<Registration> registration_;
  const std::shared_ptr<const Selection> selection_;
  const std::span<void* const> streams_;
  const Deadline deadline_;
  std::optional<DeviceUploads> uploads_;
  uint64_t epoch_ = 0;
  Mapping operations_memory_;
  std::span<const abi::RestoreOp> operations_;
  std::vector<Mapping> maps_;  // of map_id 1 and up
  uint64_t bytes_since_look_ = 0;
};

Error RestoreRun::MapAll(RestoreStart& start) {
  const abi::RestoreReply& reply = start.reply;
  Result<Mapping> operations = Mapping::Map(start.operations.get(), reply.operations_bytes,
                                            Mapping::Access::kRead, "restore operations");
  if (!operations.ok()) return operations.error();
  operations_memory_ = std::move(operations.value());
  if (reply.op_count > operations_memory_.bytes() / sizeof(abi::RestoreOp)) {
    return Error(HF_INTERNAL, "restore operations: %llu do not lie in %llu bytes",
                 Print(reply.op_count), Print(operations_memory_.bytes()));
  }
  operations_ = {reinterpret_cast<const abi::RestoreOp*>(operations_memory_.data()),
                 reply.op_count};
  for (auto& [map, fd] : start.image_maps) {
    if (map.map_id == 0 || map.map_id > kImageMapsMax) {
      return Error(HF_INTERNAL, "image map from the agent: id %u is out of range", map.map_id);
    }
    Result<Mapping> memory =
        Mapping::Map(fd.get(), map.bytes, Mapping::Access::kRead, "image memory");
    if (!memory.ok()) return memory.error();
    if (maps_.size() < map.map_id) maps_.resize(map.map_id);
    maps_[map.map_id - 1] = std::move(memory.value());
  }
  return Error();
}

Result<RestoreOutcome> RestoreRun::Run() {
  Result<RestoreStart> start = link_.StartRestore(*registration_, selection_, deadline_);
  if (!start.ok()) return start.error();
  epoch_ = start.value().epoch;
  if (Error error = MapAll(start.value()); !error.ok()) return error;
  const abi::RestoreReply& reply = start.value().reply;
  Result<Mapping> blob_memory = Mapping::Map(start.value().blobs.get(), reply.blobs_bytes,
                                             Mapping::Access::kRead, "restored blobs");
  if (!blob_memory.ok()) return blob_memory.error();
  Result<RestoredBlobSet> blobs =
      RestoredBlobSet::Make(std::move(blob_memory.value()), reply.world_size);
  if (!blobs.ok()) return blobs.error();
  if (uploads_.has_value()) {
    if (Error error = uploads_->Begin(streams_); !error.ok()) return error;
  }
  Result<abi::RestoreDone> done = Consume();
  if (!done.ok()) return done.error();
  if (uploads_.has_value()) {
    if (Error error = uploads_->Finish(); !error.ok()) return error;
  }
  if (Error error = ToError(done.value().status); !error.ok()) {
    return error.code() == HF_ABORTED ? Error(HF_INTERNAL, "%s", error.text()) : error;
  }
  RestoreOutcome outcome;
  outcome.step = reply.step;
  outcome.attempt = reply.attempt;
  outcome.world_size = reply.world_size;
  outcome.bytes = done.value().bytes;
  outcome.bytes_from_memory = done.value().bytes_from_memory;
  outcome.tensor_states = reply.tensor_states;
  outcome.tensor_states_left_out = reply.tensor_states_left_out;
  if (reply.restore_from > HF_RESTORE_FROM_IGNORED) {
    return Error(HF_INTERNAL, "restore reply from the agent: restore_from is %u",
                 reply.restore_from);
  }
  outcome.restore_from = static_cast<hf_restore_from>(reply.restore_from);
  outcome.blobs = std::move(blobs.value());
  return outcome;
}

Result<abi::RestoreDone> RestoreRun::Consume() {
  abi::RestoreRing& ring = registration_->shared().restore;
  for (;;) {
    // kRestoreDone follows the last entry's consumption, or is an error, whatever is in the ring.
    if (std::optional<abi::RestoreDone> done = link_.restore_done(epoch_)) return *done;
    if (link_.epoch() != epoch_) return Error(HF_ABORTED, "the connection was lost");
    // Pairs with the agent's release: the entries before it, and their pieces, are there.
    const uint32_t produced = ring.produced.load(std::memory_order_acquire);
    const uint32_t consumed = ring.consumed.load(std::memory_order_relaxed);
    if (produced == consumed) {
      if (deadline_.passed()) {
        return Error(HF_DEADLINE_EXCEEDED, "the restore did not end in time");
      }
      FutexWait(ring.produced, produced, deadline_.Earlier(Deadline::After(kLookNs)),
                FutexScope::kShared);
      continue;
    }
    if (produced - consumed > abi::kRestoreEntries) {
      return Error(HF_INTERNAL, "restore ring: %u entries produced, %u consumed", produced,
                   consumed);
    }
    const abi::RestoreEntry entry = ring.entries[consumed % abi::kRestoreEntries];
    if (Error error = Execute(entry); !error.ok()) return error;
    // Release: the piece was read.
    ring.consumed.store(consumed + 1, std::memory_order_release);
    link_.RingDoorbell();
  }
}

Error RestoreRun::Execute(const abi::RestoreEntry& entry) {
  const Mapping* memory = nullptr;
  if (entry.map_id == 0) {
    memory = &registration_->memory();
  } else if (entry.map_id <= maps_.size()) {
    memory = &maps_[entry.map_id - 1];
  }
  if (memory == nullptr || entry.offset > memory->bytes() ||
      entry.bytes > memory->bytes() - entry.offset) {
    return Error(HF_INTERNAL, "restore: piece at %llu of %llu bytes is not in memory %u",
                 Print(entry.offset), Print(entry.bytes), entry.map_id);
  }
  if (entry.first_op > operations_.size() || entry.op_count > operations_.size() - entry.first_op) {
    return Error(HF_INTERNAL, "restore: operations %llu, %llu of them, expected at most %zu",
                 Print(entry.first_op), Print(entry.op_count), operations_.size());
  }
  const std::span<const std::byte> piece(memory->data() + entry.offset, entry.bytes);
  MapPages(piece.data(), piece.size(), Mapping::Access::kRead);
  for (const abi::RestoreOp& op : operations_.subspan(entry.first_op, entry.op_count)) {
    if (Error error = ExecuteOp(op, piece); !error.ok()) return error;
  }
  return Error();
}

Error RestoreRun::ExecuteOp(const abi::RestoreOp& op, std::span<const std::byte> piece) {
  const std::vector<Document::Buffer>& buffers = registration_->document().buffers();
  if (op.buffer_index >= buffers.size() ||
      !RunsFit(op.source_offset, op.run_bytes, op.count, op.source_stride, piece.size()) ||
      !RunsFit(op.buffer_offset, op.run_bytes, op.count, op.buffer_stride,
               buffers[op.buffer_index].bytes)) {
    return Error(HF_INTERNAL,
                 "restore: an operation (buffer %u, source offset %llu, buffer offset %llu) is out "
                 "of bounds",
                 op.buffer_index, Print(op.source_offset), Print(op.buffer_offset));
  }
  if (op.run_bytes == 0) return Error();
  const Document::Buffer& buffer = buffers[op.buffer_index];
  std::byte* const target = static_cast<std::byte*>(buffer.data) + op.buffer_offset;
  const std::byte* const source = piece.data() + op.source_offset;
  if (buffer.place == kHostPlace) return CopyToHost(op, source, target);
  Error error =
      uploads_->Copy(static_cast<uint32_t>(buffer.place),
                     {target, op.run_bytes, op.count, op.buffer_stride}, source, op.source_stride);
  if (error.ok()) return error;
  return Error(error.code(), "buffer '%s': %s", ShortName(buffer.name).text(), error.text());
}

Error RestoreRun::CopyToHost(const abi::RestoreOp& op, const std::byte* source, std::byte* target) {
  for (uint64_t run = 0; run < op.count; ++run) {
    StreamCopy(target + run * op.buffer_stride, source + run * op.source_stride, op.run_bytes);
    bytes_since_look_ += op.run_bytes;
    if (bytes_since_look_ < kCopyBytesPerLook) continue;
    bytes_since_look_ = 0;
    if (deadline_.passed()) {
      return Error(HF_DEADLINE_EXCEEDED, "the restore did not end in time");
    }
  }
  return Error();
}

}  // namespace

Result<RestoredBlobSet> RestoredBlobSet::Make(Mapping memory, uint32_t world_size) {
  RestoredBlobSet set;
  set.saved_world_size_ = world_size;
  abi::RestoredBlobs header = {};
  const uint64_t bytes = memory.bytes();
  if (bytes < sizeof(header)) {
    return Error(HF_INTERNAL, "restored blobs: %llu bytes are too few", Print(bytes));
  }
  std::memcpy(&header, memory.data(), sizeof(header));
  if (header.magic != abi::kProtocolMagic || header.version != abi::kProtocolVersion ||
      header.blob_count > (bytes - sizeof(header)) / sizeof(abi::RestoredBlob)) {
    return Error(HF_INTERNAL, "restored blobs: magic %08x, version %u or count %llu is wrong",
                 header.magic, header.version, Print(header.blob_count));
  }
  set.blobs_ = {reinterpret_cast<const abi::RestoredBlob*>(memory.data() + sizeof(header)),
                header.blob_count};
  for (const abi::RestoredBlob& blob : set.blobs_) {
    if (!RunsFit(blob.name_offset, blob.name_bytes, 1, 0, bytes) ||
        !RunsFit(blob.data_offset, blob.data_bytes, 1, 0, bytes) || blob.name_offset > bytes ||
        blob.data_offset > bytes) {
      return Error(HF_INTERNAL, "restored blobs: an entry does not lie in %llu bytes",
                   Print(bytes));
    }
  }
  set.memory_ = std::move(memory);
  return set;
}

std::string_view RestoredBlobSet::NameOf(const abi::RestoredBlob& blob) const {
  return {reinterpret_cast<const char*>(memory_.data() + blob.name_offset), blob.name_bytes};
}

std::span<const std::byte> RestoredBlobSet::DataOf(const abi::RestoredBlob& blob) const {
  return {memory_.data() + blob.data_offset, blob.data_bytes};
}

Result<std::span<const std::byte>> RestoredBlobSet::Find(std::string_view name, int64_t rank,
                                                         uint32_t own_rank,
                                                         uint32_t world_size) const {
  bool of_ranks = false;
  for (const abi::RestoredBlob& blob : blobs_) {
    if (NameOf(blob) != name) continue;
    const bool global = blob.scope == HF_BLOB_GLOBAL;
    if (global && rank == -1) return DataOf(blob);
    if (global) continue;
    of_ranks = true;
    if (rank == -1 && saved_world_size_ == world_size && blob.rank == own_rank) {
      return DataOf(blob);
    }
    if (rank >= 0 && blob.rank == static_cast<uint64_t>(rank)) return DataOf(blob);
  }
  if (of_ranks && rank == -1 && saved_world_size_ != world_size) {
    return Error(HF_INVALID_ARGUMENT,
                 "blob '%s' was saved by each of %u ranks, and there are %u now: none of them is "
                 "this rank's; ask for ranks 0 to %u",
                 ShortName(name).text(), saved_world_size_, world_size, saved_world_size_ - 1);
  }
  return Error(HF_NOT_FOUND, "the checkpoint has no blob '%s' of rank %lld", ShortName(name).text(),
               static_cast<long long>(rank));
}

Result<RestoreOutcome> RestoreBuffers(Link& link, const std::shared_ptr<const Selection>& selection,
                                      std::span<void* const> streams, Deadline deadline) {
  for (;;) {
    if (Error error = link.WaitConnected(deadline); !error.ok()) return error;
    Result<std::shared_ptr<Registration>> registration = link.registration();
    if (!registration.ok()) return registration.error();
    Result<RestoreOutcome> outcome =
        RestoreRun(link, std::move(registration.value()), selection, streams, deadline).Run();
    if (outcome.ok()) return outcome;
    // Else the agent would hold memory for it, from which the next saves are to come.
    link.CancelRestore();
    if (outcome.error().code() != HF_ABORTED) return outcome;
  }
}

}  // namespace holdfast::hook
