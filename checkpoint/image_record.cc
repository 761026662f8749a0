#include "checkpoint/image_record.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/copy_bytes.h"
#include "base/crc32c.h"
#include "base/status_macros.h"

namespace holdfast {
namespace {

constexpr uint64_t kRecordMagic = 0x3152464cu | (uint64_t{0x44524f43} << 32);  // "LFR1CORD"
constexpr uint32_t kSlotsPerRecordMax = 64;

struct HeaderBytes {
  uint64_t magic;
  uint32_t version;
  uint32_t slot_count;
  uint32_t block_count;
  uint32_t blob_count;
  uint64_t session_id;
  uint64_t registration_id;
  uint64_t memory_id;
  uint64_t block_bytes;
  uint64_t document_bytes;
  uint64_t crc32c;  // of all before
};
static_assert(sizeof(HeaderBytes) == 72 && sizeof(HeaderBytes) % 8 == 0);
constexpr uint64_t kSlotsOffset = 128;

uint64_t Aligned(uint64_t bytes, uint64_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

template <typename T>
std::span<const std::byte> BytesOf(std::span<const T> values) {
  return std::as_bytes(values);
}

// Where the parts lie.
struct Offsets {
  uint64_t table_bytes;  // of one block table
  uint64_t tables;
  uint64_t blobs;
  uint64_t entries;
  uint64_t end;
};

}  // namespace

// A copy is valid if `crc32c` is that of the bytes before it, continued by the registration and
// slot (so that a copy in the wrong place is none).
struct ImageRecord::Copy {
  uint64_t sequence;
  uint32_t state;
  uint32_t file;
  uint64_t generation;
  uint64_t step;
  int64_t begun_ns;
  uint32_t names_used;
  uint32_t block_root;
  int32_t code;
  uint32_t table_place;  // 0 or 1
  uint32_t table_count;  // 0 or block_count
  uint32_t table_crc32c;
  uint32_t blob_place;  // 0 or 1
  uint32_t blob_count;  // 0 or the header's
  uint32_t blob_crc32c;
  uint16_t path_bytes;
  uint16_t text_bytes;
  char path[kRecordPathBytesMax + 1];
  char text[kRecordTextBytesMax + 1];
  uint64_t reserved;
  uint64_t crc32c;
};

namespace {

constexpr uint64_t kCopyBytes = 1624;

Offsets OffsetsOf(const RecordHeader& header) {
  Offsets offsets;
  offsets.table_bytes = Aligned(uint64_t{header.block_count} * 4, 8);
  offsets.tables = Aligned(kSlotsOffset + uint64_t{header.slot_count} * 2 * kCopyBytes, 64);
  offsets.blobs =
      Aligned(offsets.tables + uint64_t{header.slot_count} * 2 * offsets.table_bytes, 64);
  offsets.entries =
      Aligned(offsets.blobs + uint64_t{header.slot_count} * 2 * header.blob_count * 8, 64);
  offsets.end = offsets.entries + uint64_t{header.slot_count} * header.block_count * 8;
  return offsets;
}

}  // namespace

ImageRecord::ImageRecord(std::shared_ptr<SharedMapping> mapping, const RecordHeader& header,
                         std::function<void()> after_store)
    : mapping_(std::move(mapping)),
      header_(header),
      after_store_(std::move(after_store)),
      slots_(header.slot_count, SlotRecord()),
      current_(header.slot_count) {
  static_assert(sizeof(Copy) == kCopyBytes && kCopyBytes % 8 == 0);
}

absl::StatusOr<std::unique_ptr<ImageRecord>> ImageRecord::Create(
    const RecordHeader& header, std::function<void()> after_store) {
  CHECK(header.slot_count > 0 && header.slot_count <= kSlotsPerRecordMax);
  ASSIGN_OR_RETURN(std::shared_ptr<SharedMapping> mapping,
                   SharedMapping::Create("holdfast-record", OffsetsOf(header).end));
  std::unique_ptr<ImageRecord> record(new ImageRecord(std::move(mapping), header, after_store));
  HeaderBytes bytes = {};
  bytes.magic = kRecordMagic;
  bytes.version = kImageRecordVersion;
  bytes.slot_count = header.slot_count;
  bytes.block_count = header.block_count;
  bytes.blob_count = header.blob_count;
  bytes.session_id = header.session_id;
  bytes.registration_id = header.registration_id;
  bytes.memory_id = header.memory_id;
  bytes.block_bytes = header.block_bytes;
  bytes.document_bytes = header.document_bytes;
  bytes.crc32c = Crc32c(std::as_bytes(std::span(&bytes, 1)).first(offsetof(HeaderBytes, crc32c)));
  std::memcpy(record->mapping_->bytes().data(), &bytes, sizeof(bytes));
  for (uint32_t index = 0; index < header.slot_count; ++index) record->Update(index, SlotRecord());
  return record;
}

absl::StatusOr<std::unique_ptr<ImageRecord>> ImageRecord::Reopen(
    UniqueFd fd, std::function<void()> after_store) {
  ASSIGN_OR_RETURN(std::shared_ptr<SharedMapping> mapping,
                   SharedMapping::Reopen("image record", std::move(fd), kSlotsOffset));
  HeaderBytes bytes;
  std::memcpy(&bytes, mapping->bytes().data(), sizeof(bytes));
  if (bytes.magic != kRecordMagic) {
    return absl::DataLossError(absl::StrFormat("image record: expected magic 0x%x, found 0x%x",
                                               kRecordMagic, bytes.magic));
  }
  if (bytes.version != kImageRecordVersion) {
    return absl::FailedPreconditionError(
        absl::StrFormat("image record: this agent knows version %d, found version %d",
                        kImageRecordVersion, bytes.version));
  }
  const uint32_t crc =
      Crc32c(std::as_bytes(std::span(&bytes, 1)).first(offsetof(HeaderBytes, crc32c)));
  if (crc != bytes.crc32c) {
    return absl::DataLossError(absl::StrFormat(
        "image record: header with checksum 0x%08x, expected 0x%08x", crc, bytes.crc32c));
  }
  RecordHeader header;
  header.session_id = bytes.session_id;
  header.registration_id = bytes.registration_id;
  header.memory_id = bytes.memory_id;
  header.block_bytes = bytes.block_bytes;
  header.document_bytes = bytes.document_bytes;
  header.slot_count = bytes.slot_count;
  header.block_count = bytes.block_count;
  header.blob_count = bytes.blob_count;
  if (header.slot_count == 0 || header.slot_count > kSlotsPerRecordMax ||
      OffsetsOf(header).end != mapping->bytes().size()) {
    return absl::DataLossError(absl::StrFormat(
        "image record: %d slots of %d blocks take %d bytes, found %d", header.slot_count,
        header.block_count, OffsetsOf(header).end, mapping->bytes().size()));
  }
  std::unique_ptr<ImageRecord> record(
      new ImageRecord(std::move(mapping), header, std::move(after_store)));
  for (uint32_t index = 0; index < header.slot_count; ++index) record->Load(index);
  return record;
}

void ImageRecord::Store(uint64_t* word, uint64_t value) {
  // Release: the compiler keeps the order of the stores, which is all that a later process sees.
  std::atomic_ref<uint64_t>(*word).store(value, std::memory_order_release);
  if (after_store_) after_store_();
}

void ImageRecord::StoreAll(uint64_t* words, std::span<const uint64_t> values) {
  for (size_t i = 0; i < values.size(); ++i) Store(words + i, values[i]);
}

uint64_t* ImageRecord::WordsAt(uint64_t offset) const {
  return reinterpret_cast<uint64_t*>(mapping_->bytes().data() + offset);
}
uint64_t* ImageRecord::CopyWords(uint32_t index, uint32_t which) const {
  return WordsAt(kSlotsOffset + (uint64_t{index} * 2 + which) * kCopyBytes);
}
uint64_t* ImageRecord::TableWords(uint32_t index, uint32_t which) const {
  const Offsets offsets = OffsetsOf(header_);
  return WordsAt(offsets.tables + (uint64_t{index} * 2 + which) * offsets.table_bytes);
}
uint64_t* ImageRecord::BlobWords(uint32_t index, uint32_t which) const {
  return WordsAt(OffsetsOf(header_).blobs + (uint64_t{index} * 2 + which) * header_.blob_count * 8);
}
uint64_t* ImageRecord::EntryWord(uint32_t index, uint32_t block) const {
  CHECK(index < header_.slot_count && block < header_.block_count);
  return WordsAt(OffsetsOf(header_).entries + (uint64_t{index} * header_.block_count + block) * 8);
}

namespace {

template <typename CopyType>
uint32_t CopyChecksum(const CopyType& copy, const RecordHeader& header, uint32_t index) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(&copy, 1));
  const uint64_t place[2] = {header.registration_id, index};
  return ExtendCrc32c(Crc32c(bytes.first(offsetof(CopyType, crc32c))),
                      std::as_bytes(std::span(place)));
}

}  // namespace

void ImageRecord::Update(uint32_t index, const SlotRecord& record) {
  CHECK(index < header_.slot_count);
  CHECK(record.block_table.empty() || record.block_table.size() == header_.block_count);
  CHECK(record.blob_bytes.empty() || record.blob_bytes.size() == header_.blob_count);
  CHECK(record.path.size() <= kRecordPathBytesMax);
  Current& current = current_[index];
  const absl::StatusOr<SlotRecord>& before = slots_[index];

  // 1. What the copy will refer to, where the current copy does not.
  Current next = current;
  if (!before.ok() || before->block_table != record.block_table) {
    next.table = 1 - current.table;
    std::vector<uint64_t> words((record.block_table.size() + 1) / 2);
    CopyBytes(words.data(), record.block_table.data(), record.block_table.size() * 4);
    StoreAll(TableWords(index, next.table), words);
  }
  if (!before.ok() || before->blob_bytes != record.blob_bytes) {
    next.blobs = 1 - current.blobs;
    StoreAll(BlobWords(index, next.blobs), record.blob_bytes);
  }

  // 2. The copy that is not current. Whatever part of it has arrived, its checksum is wrong until
  // the last store, and the reader takes the other one.
  next.copy = 1 - current.copy;
  next.sequence = current.sequence + 1;
  Copy copy = {};
  copy.sequence = next.sequence;
  copy.state = static_cast<uint32_t>(record.state);
  copy.file = static_cast<uint32_t>(record.file);
  copy.generation = record.generation;
  copy.step = record.step;
  copy.begun_ns = record.begun_ns;
  copy.names_used = record.names_used;
  copy.block_root = record.block_root;
  copy.code = record.code;
  copy.table_place = next.table;
  copy.table_count = static_cast<uint32_t>(record.block_table.size());
  copy.table_crc32c = Crc32c(BytesOf<uint32_t>(record.block_table));
  copy.blob_place = next.blobs;
  copy.blob_count = static_cast<uint32_t>(record.blob_bytes.size());
  copy.blob_crc32c = Crc32c(BytesOf<uint64_t>(record.blob_bytes));
  copy.path_bytes = static_cast<uint16_t>(record.path.size());
  copy.text_bytes =
      static_cast<uint16_t>(std::min<size_t>(record.text.size(), kRecordTextBytesMax));
  std::memcpy(copy.path, record.path.data(), copy.path_bytes);
  std::memcpy(copy.text, record.text.data(), copy.text_bytes);
  copy.crc32c = CopyChecksum(copy, header_, index);
  uint64_t words[kCopyBytes / 8];
  std::memcpy(words, &copy, kCopyBytes);
  StoreAll(CopyWords(index, next.copy), words);

  current = next;
  slots_[index] = record;
  slots_[index]->text.resize(copy.text_bytes);
}

void ImageRecord::Load(uint32_t index) {
  absl::StatusOr<SlotRecord> best =
      absl::DataLossError(absl::StrFormat("slot %d: neither copy has its checksum", index));
  uint64_t best_sequence = 0;
  for (uint32_t which = 0; which < 2; ++which) {
    Copy copy;
    std::memcpy(&copy, CopyWords(index, which), sizeof(copy));
    if (copy.crc32c != CopyChecksum(copy, header_, index)) continue;
    if (copy.sequence <= best_sequence) continue;
    best_sequence = copy.sequence;
    best = Decode(index, copy);
    current_[index] = {copy.sequence, which, copy.table_place & 1, copy.blob_place & 1};
  }
  slots_[index] = std::move(best);
}

absl::StatusOr<SlotRecord> ImageRecord::Decode(uint32_t index, const Copy& copy) const {
  const bool in_range =
      copy.state <= static_cast<uint32_t>(SlotRecord::State::kVoid) &&
      copy.file <= static_cast<uint32_t>(SlotRecord::File::kFailed) && copy.table_place <= 1 &&
      copy.blob_place <= 1 && (copy.table_count == 0 || copy.table_count == header_.block_count) &&
      (copy.blob_count == 0 || copy.blob_count == header_.blob_count) &&
      copy.path_bytes <= kRecordPathBytesMax && copy.text_bytes <= kRecordTextBytesMax;
  if (!in_range) {
    return absl::DataLossError(
        absl::StrFormat("slot %d: values out of range under a good checksum", index));
  }
  SlotRecord record;
  record.state = static_cast<SlotRecord::State>(copy.state);
  record.file = static_cast<SlotRecord::File>(copy.file);
  record.generation = copy.generation;
  record.step = copy.step;
  record.begun_ns = copy.begun_ns;
  record.names_used = copy.names_used;
  record.block_root = copy.block_root;
  record.code = copy.code;
  record.path.assign(copy.path, copy.path_bytes);
  record.text.assign(copy.text, copy.text_bytes);
  record.block_table.resize(copy.table_count);
  CopyBytes(record.block_table.data(), TableWords(index, copy.table_place),
            record.block_table.size() * 4);
  record.blob_bytes.resize(copy.blob_count);
  CopyBytes(record.blob_bytes.data(), BlobWords(index, copy.blob_place),
            record.blob_bytes.size() * 8);
  if (Crc32c(BytesOf<uint32_t>(record.block_table)) != copy.table_crc32c) {
    return absl::DataLossError(absl::StrFormat("slot %d: block table damaged", index));
  }
  if (Crc32c(BytesOf<uint64_t>(record.blob_bytes)) != copy.blob_crc32c) {
    return absl::DataLossError(absl::StrFormat("slot %d: blob lengths damaged", index));
  }
  return record;
}

void ImageRecord::SetChecksum(uint32_t index, uint32_t block, uint64_t generation,
                              uint32_t crc32c) {
  Store(EntryWord(index, block), crc32c | generation << 32);
}

std::optional<uint32_t> ImageRecord::Checksum(uint32_t index, uint32_t block,
                                              uint64_t generation) const {
  const uint64_t word =
      std::atomic_ref<uint64_t>(*EntryWord(index, block)).load(std::memory_order_acquire);
  if (word >> 32 != (generation & UINT32_MAX)) return std::nullopt;
  return static_cast<uint32_t>(word);
}

}  // namespace holdfast
