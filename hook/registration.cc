#include "hook/registration.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace holdfast::hook {
namespace {

using abi::CaptureOp;

unsigned long long Print(uint64_t value) { return value; }

Error CheckBuffer(const hf_buffer& buffer, size_t index) {
  if (buffer.name == nullptr || buffer.name[0] == '\0') {
    return Error(HF_INVALID_ARGUMENT, "buffer %zu has no name", index);
  }
  if (buffer.group >= kGroupCount) {
    return Error(HF_INVALID_ARGUMENT, "buffer '%s': group: expected 0 to %u, found %u",
                 ShortName(buffer.name).text(), kGroupCount - 1, buffer.group);
  }
  if (buffer.data == nullptr && buffer.bytes > 0) {
    return Error(HF_INVALID_ARGUMENT, "buffer '%s' of %llu bytes: data is NULL",
                 ShortName(buffer.name).text(), Print(buffer.bytes));
  }
  return Error();
}

Error CheckBlob(const hf_blob_slot& blob, size_t index) {
  if (blob.name == nullptr || blob.name[0] == '\0') {
    return Error(HF_INVALID_ARGUMENT, "blob %zu has no name", index);
  }
  // Callers in C may have put any number there, which an enum must not be read with.
  int scope = 0;
  static_assert(sizeof(scope) == sizeof(blob.scope));
  std::memcpy(&scope, &blob.scope, sizeof(scope));
  if (scope != HF_BLOB_GLOBAL && scope != HF_BLOB_RANK) {
    return Error(HF_INVALID_ARGUMENT, "blob '%s': scope: expected 0 or 1, found %d",
                 ShortName(blob.name).text(), scope);
  }
  return Error();
}

uint64_t AlignUp(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

void Put(std::vector<std::byte>& bytes, uint64_t offset, const void* data, size_t size) {
  if (size > 0) std::memcpy(bytes.data() + offset, data, size);
}

std::vector<std::byte> Serialize(std::string_view layout,
                                 const std::vector<Document::Buffer>& buffers,
                                 const std::vector<Document::Blob>& blobs, abi::Copies copies) {
  abi::RegistrationDocument header = {};
  header.magic = abi::kProtocolMagic;
  header.version = abi::kProtocolVersion;
  header.layout_offset = sizeof(header);
  header.layout_bytes = layout.size();
  header.buffers_offset = AlignUp(header.layout_offset + layout.size(), 8);
  header.buffer_count = buffers.size();
  header.blobs_offset = header.buffers_offset + buffers.size() * sizeof(abi::DocumentBuffer);
  header.blob_count = blobs.size();
  header.copies = copies;
  uint64_t name_offset = header.blobs_offset + blobs.size() * sizeof(abi::DocumentBlob);
  header.total_bytes = name_offset;
  for (const Document::Buffer& buffer : buffers) header.total_bytes += buffer.name.size();
  for (const Document::Blob& blob : blobs) header.total_bytes += blob.name.size();

  std::vector<std::byte> bytes(header.total_bytes);
  Put(bytes, 0, &header, sizeof(header));
  Put(bytes, header.layout_offset, layout.data(), layout.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Document::Buffer& buffer = buffers[i];
    const abi::DocumentBuffer entry = {name_offset, static_cast<uint32_t>(buffer.name.size()),
                                       buffer.group, buffer.bytes};
    Put(bytes, header.buffers_offset + i * sizeof(entry), &entry, sizeof(entry));
    Put(bytes, name_offset, buffer.name.data(), buffer.name.size());
    name_offset += buffer.name.size();
  }
  for (size_t i = 0; i < blobs.size(); ++i) {
    const Document::Blob& blob = blobs[i];
    const abi::DocumentBlob entry = {name_offset, static_cast<uint32_t>(blob.name.size()),
                                     static_cast<uint32_t>(blob.scope), blob.capacity_bytes};
    Put(bytes, header.blobs_offset + i * sizeof(entry), &entry, sizeof(entry));
    Put(bytes, name_offset, blob.name.data(), blob.name.size());
    name_offset += blob.name.size();
  }
  return bytes;
}

// True if `count` entries of `entry_bytes` at `offset`, aligned, lie within `bytes`.
bool ArrayFits(uint64_t offset, uint64_t count, uint64_t entry_bytes, uint64_t bytes) {
  return offset % 8 == 0 && offset <= bytes && count <= (bytes - offset) / entry_bytes;
}

}  // namespace

bool RunsFit(uint64_t offset, uint64_t run_bytes, uint64_t count, uint64_t stride, uint64_t bytes) {
  if (run_bytes == 0 || count == 0) return true;
  uint64_t total = 0;
  uint64_t last = 0;
  uint64_t end = 0;
  return !__builtin_mul_overflow(run_bytes, count, &total) &&
         !__builtin_mul_overflow(stride, count - 1, &last) &&
         !__builtin_add_overflow(last, run_bytes, &end) &&
         !__builtin_add_overflow(end, offset, &end) && end <= bytes;
}

Result<std::shared_ptr<const Document>> Document::Make(const char* layout_json,
                                                       std::span<const hf_buffer> buffers,
                                                       std::span<const hf_blob_slot> blobs,
                                                       abi::Copies copies) {
  if (layout_json == nullptr) return Error(HF_INVALID_ARGUMENT, "layout_json is NULL");
  auto document = std::make_shared<Document>();
  document->buffers_.reserve(buffers.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (Error error = CheckBuffer(buffers[i], i); !error.ok()) return error;
    document->buffers_.push_back(
        {buffers[i].name, buffers[i].data, buffers[i].bytes, buffers[i].group, kHostPlace});
  }
  if (Error error = document->FindPlaces(); !error.ok()) return error;
  document->blobs_.reserve(blobs.size());
  for (size_t i = 0; i < blobs.size(); ++i) {
    if (Error error = CheckBlob(blobs[i], i); !error.ok()) return error;
    document->blobs_.push_back({blobs[i].name, blobs[i].scope, blobs[i].capacity_bytes});
  }
  const std::vector<Blob>& named = document->blobs_;
  std::vector<uint32_t>& order = document->blobs_by_name_;
  order.resize(named.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return named[a].name < named[b].name; });
  for (size_t i = 1; i < order.size(); ++i) {
    if (named[order[i - 1]].name == named[order[i]].name) {
      return Error(HF_INVALID_ARGUMENT, "blob '%s' is registered twice",
                   ShortName(named[order[i]].name).text());
    }
  }
  const std::vector<std::byte> bytes =
      Serialize(layout_json, document->buffers_, document->blobs_, copies);
  Result<UniqueFd> memory = MakeSealedMemory("holdfast-registration", bytes);
  if (!memory.ok()) return memory.error();
  document->memory_ = std::move(memory.value());
  document->bytes_ = bytes.size();
  return std::shared_ptr<const Document>(std::move(document));
}

Error Document::FindPlaces() {
  Result<std::shared_ptr<const DeviceDriver>> driver = DeviceDriver::FindLoaded();
  if (!driver.ok()) return driver.error();
  if (driver.value() == nullptr) return Error();
  auto table = std::make_shared<DeviceTable>(std::move(driver.value()));
  for (Buffer& buffer : buffers_) {
    if (buffer.bytes == 0) continue;
    Result<int32_t> place = table->Enter(buffer.data);
    if (!place.ok()) {
      return Error(place.error().code(), "buffer '%s': %s", ShortName(buffer.name).text(),
                   place.error().text());
    }
    buffer.place = place.value();
  }
  if (table->count() > 0) devices_ = std::move(table);
  return Error();
}

int64_t Document::FindBlob(std::string_view name) const {
  const auto found = std::lower_bound(
      blobs_by_name_.begin(), blobs_by_name_.end(), name,
      [&](uint32_t index, std::string_view wanted) { return blobs_[index].name < wanted; });
  if (found == blobs_by_name_.end() || blobs_[*found].name != name) return -1;
  return *found;
}

Result<std::shared_ptr<Registration>> Registration::Make(std::shared_ptr<const Document> document,
                                                         const abi::RegisterReply& reply,
                                                         std::span<const UniqueFd> fds) {
  if (fds.size() != 3) {
    return Error(HF_INTERNAL, "registration from the agent: expected 3 descriptors, found %zu",
                 fds.size());
  }
  Result<Mapping> memory =
      Mapping::Map(fds[0].get(), reply.memory_bytes, Mapping::Access::kReadWrite, "rank memory");
  if (!memory.ok()) return memory.error();
  Result<Mapping> shared = Mapping::Map(fds[1].get(), reply.registration_memory_bytes,
                                        Mapping::Access::kReadWrite, "registration memory");
  if (!shared.ok()) return shared.error();
  Result<Mapping> plan =
      Mapping::Map(fds[2].get(), reply.capture_plan_bytes, Mapping::Access::kRead, "capture plan");
  if (!plan.ok()) return plan.error();

  auto registration = std::make_shared<Registration>();
  registration->document_ = std::move(document);
  registration->id_ = reply.registration_id;
  registration->memory_ = std::move(memory.value());
  registration->shared_memory_ = std::move(shared.value());
  registration->plan_ = std::move(plan.value());
  if (Error error = registration->CheckShared(reply); !error.ok()) return error;
  if (Error error = registration->CheckPlan(); !error.ok()) return error;
  const std::shared_ptr<const DeviceTable>& devices = registration->document_->devices();
  if (devices != nullptr) {
    registration->pins_ =
        std::make_unique<DevicePins>(devices, registration->memory_.data(),
                                     registration->memory_.bytes(), registration->block_bytes_);
  }
  registration->Prepare();
  return registration;
}

Error Registration::CheckShared(const abi::RegisterReply& reply) {
  const uint64_t bytes = shared_memory_.bytes();
  if (bytes < sizeof(abi::RegistrationMemory)) {
    return Error(HF_INTERNAL, "registration memory: expected at least %zu bytes, found %llu",
                 sizeof(abi::RegistrationMemory), Print(bytes));
  }
  shared_ = reinterpret_cast<abi::RegistrationMemory*>(shared_memory_.data());
  if (shared_->magic != abi::kRegistrationMemoryMagic ||
      shared_->version != abi::kProtocolVersion || shared_->registration_id != id_) {
    return Error(HF_INTERNAL, "registration memory: magic %08x, version %u or id %llu is wrong",
                 shared_->magic, shared_->version, Print(shared_->registration_id));
  }
  image_bytes_ = reply.image_bytes;
  block_bytes_ = reply.block_bytes;
  block_count_ = shared_->block_count;
  slot_count_ = shared_->slot_count;
  if (block_bytes_ == 0 || shared_->block_bytes != block_bytes_ ||
      image_bytes_ % block_bytes_ != 0 || image_bytes_ / block_bytes_ > block_count_ ||
      block_count_ > UINT64_MAX / block_bytes_) {
    return Error(HF_INTERNAL,
                 "registration: an image of %llu bytes does not fit %u blocks of %llu bytes",
                 Print(image_bytes_), block_count_, Print(block_bytes_));
  }
  const uint64_t blob_count = document_->blobs().size();
  if (slot_count_ == 0 || slot_count_ > abi::kSlotsMax || shared_->blob_count != blob_count) {
    return Error(HF_INTERNAL, "registration memory: %u slots, %u blobs; expected 1 to %u, %llu",
                 slot_count_, shared_->blob_count, abi::kSlotsMax, Print(blob_count));
  }
  const uint64_t all_blocks = uint64_t{slot_count_} * block_count_;
  block_table_offset_ = shared_->block_table_offset;
  block_done_offset_ = shared_->block_done_offset;
  blob_bytes_offset_ = shared_->blob_bytes_offset;
  if (!ArrayFits(block_table_offset_, all_blocks, sizeof(uint32_t), bytes) ||
      !ArrayFits(block_done_offset_, all_blocks, 1, bytes) ||
      !ArrayFits(blob_bytes_offset_, slot_count_ * blob_count, sizeof(uint64_t), bytes)) {
    return Error(HF_INTERNAL, "registration memory: its arrays do not lie within %llu bytes",
                 Print(bytes));
  }
  return Error();
}

Error Registration::CheckPlan() {
  abi::CapturePlan header = {};
  if (plan_.bytes() < sizeof(header)) {
    return Error(HF_INTERNAL, "capture plan: %llu bytes are too few", Print(plan_.bytes()));
  }
  std::memcpy(&header, plan_.data(), sizeof(header));
  const uint64_t rest = plan_.bytes() - sizeof(header);
  const uint64_t blob_count = document_->blobs().size();
  if (header.magic != abi::kProtocolMagic || header.version != abi::kProtocolVersion ||
      header.image_bytes != image_bytes_ || header.slot_bytes != block_count_ * block_bytes_ ||
      header.blob_count != blob_count || header.op_count > rest / sizeof(CaptureOp) ||
      header.op_count >= UINT32_MAX ||
      blob_count > (rest - header.op_count * sizeof(CaptureOp)) / sizeof(abi::BlobArea)) {
    return Error(HF_INTERNAL,
                 "capture plan: %llu operations, %llu blobs, image of %llu bytes in %llu bytes do "
                 "not fit the registration",
                 Print(header.op_count), Print(header.blob_count), Print(header.image_bytes),
                 Print(plan_.bytes()));
  }
  const std::byte* begin = plan_.data() + sizeof(header);
  ops_ = {reinterpret_cast<const CaptureOp*>(begin), header.op_count};
  blob_areas_ = {reinterpret_cast<const abi::BlobArea*>(begin + ops_.size_bytes()), blob_count};

  uint64_t end = 0;  // of the operations so far, in the slot
  for (size_t i = 0; i < ops_.size(); ++i) {
    const CaptureOp& op = ops_[i];
    const bool known = op.buffer_index < document_->buffers().size() && op.group < kGroupCount;
    if (!known ||
        !RunsFit(op.buffer_offset, op.run_bytes, op.count, op.buffer_stride,
                 document_->buffers()[op.buffer_index].bytes) ||
        op.image_offset < end || op.image_offset > header.slot_bytes ||
        OpBytes(op) > header.slot_bytes - op.image_offset) {
      return Error(HF_INTERNAL,
                   "capture plan: operation %zu (image offset %llu, buffer %u, group %u) is out of "
                   "bounds or order",
                   i, Print(op.image_offset), op.buffer_index, op.group);
    }
    end = op.image_offset + OpBytes(op);
  }
  for (size_t i = 0; i < blob_areas_.size(); ++i) {
    const abi::BlobArea& area = blob_areas_[i];
    if (area.capacity_bytes == 0) continue;
    if (area.image_offset > image_bytes_ ||
        area.capacity_bytes > image_bytes_ - area.image_offset) {
      return Error(HF_INTERNAL, "capture plan: the area of blob '%s' is not in the image",
                   ShortName(document_->blobs()[i].name).text());
    }
  }
  return Error();
}

void Registration::Prepare() {
  groups_of_block_.assign(block_count_, 0);
  first_op_.assign(block_count_, static_cast<uint32_t>(ops_.size()));
  for (uint32_t i = 0; i < ops_.size(); ++i) {
    const CaptureOp& op = ops_[i];
    const uint64_t bytes = OpBytes(op);
    if (bytes == 0) continue;
    const bool on_device = document_->buffers()[op.buffer_index].place != kHostPlace;
    GroupOps& of_group = group_ops_[on_device ? 1 : 0][op.group];
    if (on_device) device_groups_ |= uint64_t{1} << op.group;
    of_group.ops.push_back(i);
    of_group.bytes_before.push_back(of_group.bytes);
    of_group.bytes += bytes;
    groups_ |= uint64_t{1} << op.group;
    const uint64_t last = (op.image_offset + bytes - 1) / block_bytes_;
    for (uint64_t block = op.image_offset / block_bytes_; block <= last; ++block) {
      groups_of_block_[block] |= uint64_t{1} << op.group;
      first_op_[block] = std::min(first_op_[block], i);
    }
  }
  for (uint32_t block = 0; block < block_count_; ++block) {
    const uint64_t groups = groups_of_block_[block];
    (groups != 0 ? copied_blocks_ : other_blocks_).push_back(block);
    for (uint64_t rest = groups; rest != 0; rest &= rest - 1) {
      ++blocks_of_group_[__builtin_ctzll(rest)];
    }
  }
  const auto lowest_group_then_place = [&](uint32_t a, uint32_t b) {
    const int group_a = __builtin_ctzll(groups_of_block_[a]);
    const int group_b = __builtin_ctzll(groups_of_block_[b]);
    return group_a != group_b ? group_a < group_b : a < b;
  };
  std::sort(copied_blocks_.begin(), copied_blocks_.end(), lowest_group_then_place);
  pointers_.resize(document_->buffers().size());
}

std::atomic<uint8_t>& Registration::block_done(uint32_t slot, uint32_t block) const {
  static_assert(sizeof(std::atomic<uint8_t>) == 1);
  std::byte* first = shared_memory_.data() + block_done_offset_;
  return *reinterpret_cast<std::atomic<uint8_t>*>(first + uint64_t{slot} * block_count_ + block);
}

uint64_t& Registration::blob_bytes(uint32_t slot, uint32_t blob) const {
  uint64_t* first = reinterpret_cast<uint64_t*>(shared_memory_.data() + blob_bytes_offset_);
  return first[uint64_t{slot} * document_->blobs().size() + blob];
}

std::byte* Registration::BlockData(uint32_t slot, uint32_t block) const {
  const uint32_t* table =
      reinterpret_cast<const uint32_t*>(shared_memory_.data() + block_table_offset_);
  const uint64_t index = table[uint64_t{slot} * block_count_ + block];
  if (index >= memory_.bytes() / block_bytes_) return nullptr;
  return memory_.data() + index * block_bytes_;
}

}  // namespace holdfast::hook
