#include "tests/support/scripted_trainer.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/copy_bytes.h"

namespace holdfast {
namespace {

std::span<std::byte> MapAll(int fd, int protection) {
  struct stat info;
  CHECK(fstat(fd, &info) == 0 && info.st_size > 0);
  const auto bytes = static_cast<size_t>(info.st_size);
  void* address = mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  CHECK(address != MAP_FAILED);
  return {static_cast<std::byte*>(address), bytes};
}

int64_t MonotonicNs() {
  timespec now;
  CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
  return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

template <typename T>
void AppendBytes(std::string& out, const T& value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

}  // namespace

std::string EncodeDocument(const std::string& layout_json,
                           const std::vector<TrainerBuffer>& buffers,
                           const std::vector<TrainerBlob>& blobs, abi::Copies copies) {
  abi::RegistrationDocument header = {};
  header.magic = abi::kProtocolMagic;
  header.version = abi::kProtocolVersion;
  header.buffer_count = buffers.size();
  header.blob_count = blobs.size();
  header.copies = copies;
  header.buffers_offset = sizeof(header);
  header.blobs_offset = header.buffers_offset + buffers.size() * sizeof(abi::DocumentBuffer);
  header.layout_offset = header.blobs_offset + blobs.size() * sizeof(abi::DocumentBlob);
  header.layout_bytes = layout_json.size();

  std::string names;
  const uint64_t names_offset = header.layout_offset + layout_json.size();
  std::string items;
  for (const TrainerBuffer& buffer : buffers) {
    const abi::DocumentBuffer item = {names_offset + names.size(),
                                      static_cast<uint32_t>(buffer.name.size()), buffer.group,
                                      buffer.bytes};
    names += buffer.name;
    AppendBytes(items, item);
  }
  for (const TrainerBlob& blob : blobs) {
    const abi::DocumentBlob item = {names_offset + names.size(),
                                    static_cast<uint32_t>(blob.name.size()), blob.scope,
                                    blob.capacity_bytes};
    names += blob.name;
    AppendBytes(items, item);
  }
  header.total_bytes = names_offset + names.size();
  std::string document;
  AppendBytes(document, header);
  return document + items + layout_json + names;
}

UniqueFd SealedDocument(const std::string& document) {
  UniqueFd fd(memfd_create("document", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  CHECK(fd.get() >= 0);
  CHECK(write(fd.get(), document.data(), document.size()) == static_cast<ssize_t>(document.size()));
  CHECK(fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) ==
        0);
  return fd;
}

ScriptedTrainer::ScriptedTrainer(const Descriptors& descriptors,
                                 const std::vector<TrainerBuffer>& buffers)
    : page_(MapAll(descriptors.rank_page, PROT_READ | PROT_WRITE)),
      memory_(MapAll(descriptors.memory, PROT_READ | PROT_WRITE)),
      registration_(MapAll(descriptors.registration_memory, PROT_READ | PROT_WRITE)),
      block_bytes_(registration().block_bytes),
      block_count_(registration().block_count),
      blob_count_(registration().blob_count),
      block_table_offset_(registration().block_table_offset),
      block_done_offset_(registration().block_done_offset),
      blob_bytes_offset_(registration().blob_bytes_offset),
      next_block_(registration().slot_count) {
  const std::span<std::byte> plan = MapAll(descriptors.capture_plan, PROT_READ);
  abi::CapturePlan header;
  std::memcpy(&header, plan.data(), sizeof(header));
  CHECK(header.magic == abi::kProtocolMagic && header.version == abi::kProtocolVersion);
  ops_.resize(header.op_count);
  areas_.resize(header.blob_count);
  const size_t ops_bytes = ops_.size() * sizeof(abi::CaptureOp);
  const size_t areas_bytes = areas_.size() * sizeof(abi::BlobArea);
  CHECK(plan.size() == sizeof(header) + ops_bytes + areas_bytes);
  CopyBytes(ops_.data(), plan.data() + sizeof(header), ops_bytes);
  CopyBytes(areas_.data(), plan.data() + sizeof(header) + ops_bytes, areas_bytes);
  image_bytes_ = header.image_bytes;
  munmap(plan.data(), plan.size());
  for (const TrainerBuffer& buffer : buffers) buffers_.emplace_back(buffer.bytes);
}

ScriptedTrainer::~ScriptedTrainer() {
  for (const std::span<std::byte> mapped : {page_, memory_, registration_}) {
    munmap(mapped.data(), mapped.size());
  }
}

std::byte ScriptedTrainer::PatternByte(uint64_t step, uint32_t buffer, uint64_t offset) {
  // Mixed well enough that no two places of a test are equal by construction.
  uint64_t mixed = (offset + 1) * 0x9e3779b97f4a7c15u ^ (step + 1) * 0xbf58476d1ce4e5b9u ^
                   (uint64_t{buffer} + 1) * 0x94d049bb133111ebu;
  mixed ^= mixed >> 29;
  mixed *= 0xbf58476d1ce4e5b9u;
  return static_cast<std::byte>(mixed >> 56);
}

void ScriptedTrainer::FillBuffers(uint64_t step) {
  for (uint32_t buffer = 0; buffer < buffers_.size(); ++buffer) {
    for (uint64_t offset = 0; offset < buffers_[buffer].size(); ++offset) {
      buffers_[buffer][offset] = PatternByte(step, buffer, offset);
    }
  }
}

abi::RankPage& ScriptedTrainer::page() const {
  return *reinterpret_cast<abi::RankPage*>(page_.data());
}

abi::RegistrationMemory& ScriptedTrainer::registration() const {
  return *reinterpret_cast<abi::RegistrationMemory*>(registration_.data());
}

std::span<std::byte> ScriptedTrainer::Block(uint32_t slot, uint32_t block) const {
  uint32_t index = 0;
  std::memcpy(&index,
              registration_.data() + block_table_offset_ +
                  (uint64_t{slot} * block_count_ + block) * sizeof(index),
              sizeof(index));
  // A garbage table leads somewhere into the trainer's own memory.
  return memory_.subspan(index % (memory_.size() / block_bytes_) * block_bytes_, block_bytes_);
}

std::atomic<uint8_t>& ScriptedTrainer::BlockDone(uint32_t slot, uint32_t block) const {
  return *reinterpret_cast<std::atomic<uint8_t>*>(registration_.data() + block_done_offset_ +
                                                  uint64_t{slot} * block_count_ + block);
}

uint64_t* ScriptedTrainer::BlobBytes(uint32_t slot) const {
  return reinterpret_cast<uint64_t*>(registration_.data() + blob_bytes_offset_) +
         uint64_t{slot} * blob_count_;
}

bool ScriptedTrainer::HasGrant() const {
  for (uint32_t slot = 0; slot < next_block_.size(); ++slot) {
    if (registration().slots[slot].state.load() == abi::SlotState::kGranted) return true;
  }
  return false;
}

void ScriptedTrainer::WriteImage(uint32_t slot, uint64_t image_offset,
                                 std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const uint64_t in_block = image_offset % block_bytes_;
    const uint64_t part = std::min<uint64_t>(bytes.size(), block_bytes_ - in_block);
    std::memcpy(Block(slot, static_cast<uint32_t>(image_offset / block_bytes_)).data() + in_block,
                bytes.data(), part);
    bytes = bytes.subspan(part);
    image_offset += part;
  }
}

std::optional<uint32_t> ScriptedTrainer::BeginSave(
    uint64_t step, const std::vector<std::optional<std::string>>& blobs) {
  CHECK(blobs.size() == areas_.size());
  for (uint32_t index = 0; index < next_block_.size(); ++index) {
    abi::ImageSlot& slot = registration().slots[index];
    abi::SlotState expected = abi::SlotState::kGranted;
    if (!slot.state.compare_exchange_strong(expected, abi::SlotState::kClaimed)) continue;
    FillBuffers(step);
    for (size_t i = 0; i < blobs.size(); ++i) {
      const bool stored = blobs[i].has_value() && areas_[i].image_offset != UINT64_MAX;
      BlobBytes(index)[i] = stored ? blobs[i]->size() : UINT64_MAX;
      if (stored) {
        WriteImage(index, areas_[i].image_offset, std::as_bytes(std::span<const char>(*blobs[i])));
      }
    }
    next_block_[index] = 0;
    slot.step.store(step);
    slot.save_ns.store(MonotonicNs());
    slot.captured_ns.store(0);
    slot.state.store(abi::SlotState::kCapturing, std::memory_order_release);
    return index;
  }
  return std::nullopt;
}

void ScriptedTrainer::CopyBlock(uint32_t slot, uint32_t block) {
  const uint64_t begin = block * block_bytes_;
  const uint64_t end = begin + block_bytes_;
  // They ascend and do not overlap.
  const auto first = std::partition_point(ops_.begin(), ops_.end(), [&](const abi::CaptureOp& op) {
    return op.image_offset + op.run_bytes * op.count <= begin;
  });
  for (auto at = first; at != ops_.end() && at->image_offset < end; ++at) {
    const abi::CaptureOp& op = *at;
    for (uint64_t run = 0; run < op.count; ++run) {
      const uint64_t run_begin = op.image_offset + run * op.run_bytes;
      const uint64_t from = std::max(begin, run_begin);
      const uint64_t to = std::min(end, run_begin + op.run_bytes);
      if (from >= to) continue;
      const std::byte* source = buffers_[op.buffer_index].data() + op.buffer_offset +
                                run * op.buffer_stride + (from - run_begin);
      WriteImage(slot, from, {source, to - from});
    }
  }
  BlockDone(slot, block).store(1, std::memory_order_release);
}

bool ScriptedTrainer::CopyBlocks(uint32_t slot, uint32_t count_max) {
  for (uint32_t i = 0; i < count_max && next_block_[slot] < block_count(); ++i) {
    CopyBlock(slot, next_block_[slot]++);
  }
  if (next_block_[slot] < block_count()) return false;
  registration().slots[slot].captured_ns.store(MonotonicNs(), std::memory_order_release);
  return true;
}

void ScriptedTrainer::Finish(uint32_t slot) {
  registration().slots[slot].state.store(abi::SlotState::kCaptured, std::memory_order_release);
}

void ScriptedTrainer::GiveUp(uint32_t index, int32_t code, const std::string& text,
                             abi::SlotState state) {
  abi::ImageSlot& slot = registration().slots[index];
  slot.void_code.store(code);
  const size_t kept = std::min(text.size(), sizeof(slot.void_text) - 1);
  std::memcpy(slot.void_text, text.data(), kept);
  slot.void_text[kept] = '\0';
  slot.state.store(state, std::memory_order_release);
}

std::optional<uint32_t> ScriptedTrainer::Save(
    uint64_t step, const std::vector<std::optional<std::string>>& blobs) {
  const std::optional<uint32_t> slot = BeginSave(step, blobs);
  if (!slot) return std::nullopt;
  CopyBlocks(*slot);
  Finish(*slot);
  return slot;
}

std::optional<ScriptedTrainer::Report> ScriptedTrainer::ReportOf(uint64_t step) const {
  for (const abi::SaveReport& report : page().reports) {
    if (report.step.load() != step) continue;
    CHECK(report.sequence.load() % 2 == 0);  // nobody is writing: one thread
    Report result;
    result.state = report.state.load();
    result.block_count = report.block_count.load();
    result.blocks_captured = report.blocks_captured.load();
    result.blocks_flushed = report.blocks_flushed.load();
    result.capture_ns = report.capture_ns.load();
    result.flush_ns = report.flush_ns.load();
    result.commit_ns = report.commit_ns.load();
    result.code = report.code.load();
    result.text.assign(report.text, strnlen(report.text, sizeof(report.text)));
    return result;
  }
  return std::nullopt;
}

std::map<uint64_t, std::string> ScriptedTrainer::TrainerBytes(
    uint64_t step, const std::vector<std::optional<std::string>>& blobs) const {
  std::map<uint64_t, std::string> result;
  for (const abi::CaptureOp& op : ops_) {
    std::string bytes;
    for (uint64_t run = 0; run < op.count; ++run) {
      for (uint64_t i = 0; i < op.run_bytes; ++i) {
        bytes.push_back(static_cast<char>(
            PatternByte(step, op.buffer_index, op.buffer_offset + run * op.buffer_stride + i)));
      }
    }
    result[op.image_offset] = std::move(bytes);
  }
  for (size_t i = 0; i < blobs.size(); ++i) {
    if (blobs[i] && areas_[i].image_offset != UINT64_MAX && !blobs[i]->empty()) {
      result[areas_[i].image_offset] = *blobs[i];
    }
  }
  return result;
}

}  // namespace holdfast
