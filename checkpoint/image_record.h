// The record of a registration's images: all that a restarted worker must know of them, in a memfd
// that only the agent maps. The trainer never sees it.
//
// Invariant: a crash at any instruction leaves every slot's record as it was before the update that
// was cut off, or as it is after it. How: a slot has two copies. An update writes the copy that is
// not valid for readers (the older one), its sequence number and checksum last; a reader takes the
// valid copy with the greater sequence. What a copy refers to (block table, blob lengths) has two
// places as well, and an update that changes them writes the place that the current copy does not
// refer to, before the copy. Stores are 8 bytes each, in program order; memory of a killed process
// stays as its stores left it, so nothing needs to be flushed.
//
// Checksums of blocks are single stores: {CRC32C, number of the grant}. An entry of another grant
// does not count, so nothing needs to be erased.
//
// Bytes, all integers little-endian, offsets 64-aligned: RecordHeader; slot_count x 2 SlotCopy;
// slot_count x 2 x block_count uint32 (padded to 8); slot_count x 2 x blob_count uint64; slot_count
// x block_count uint64.
#ifndef HOLDFAST_CHECKPOINT_IMAGE_RECORD_H_
#define HOLDFAST_CHECKPOINT_IMAGE_RECORD_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/shared_mapping.h"
#include "io/unique_fd.h"

namespace holdfast {

// A worker of another version refuses a record that it does not know.
inline constexpr uint32_t kImageRecordVersion = 1;

// Constant for the life of a record.
struct RecordHeader {
  uint64_t session_id = 0;
  uint64_t registration_id = 0;
  uint64_t memory_id = 0;  // the rank memory in which the blocks are
  uint64_t block_bytes = 0;
  uint64_t document_bytes = 0;
  uint32_t slot_count = 0;
  uint32_t block_count = 0;  // of a slot: of the image and its extra copies
  uint32_t blob_count = 0;
  friend bool operator==(const RecordHeader&, const RecordHeader&) = default;
};

// What is known of the image in a slot.
struct SlotRecord {
  enum class State : uint32_t { kEmpty, kGranted, kCapturing, kSealed, kVoid };
  enum class File : uint32_t {
    kNone,
    kWriting,  // `path` may exist and is not published: to be removed
    kDurable,  // `path` holds the image
    kFailed,   // storage was given up; `text` says why
  };

  State state = State::kEmpty;
  File file = File::kNone;
  uint64_t generation = 0;
  uint64_t step = 0;                  // from kCapturing on
  int64_t begun_ns = 0;               // agent's clock when the capture was first seen
  uint32_t names_used = 0;            // file names so far; none is ever used twice
  uint32_t block_root = 0;            // kSealed: CRC32C of all block_count checksums
  int32_t code = 0;                   // kVoid, or kFailed: absl::StatusCode
  std::string path;                   // at most kRecordPathBytesMax
  std::string text;                   // cut to kRecordTextBytesMax
  std::vector<uint32_t> block_table;  // from kGranted on: block_count entries; else empty
  std::vector<uint64_t> blob_bytes;   // from kCapturing on: blob_count entries; else empty
  friend bool operator==(const SlotRecord&, const SlotRecord&) = default;
};

inline constexpr size_t kRecordPathBytesMax = 1023;
inline constexpr size_t kRecordTextBytesMax = 503;

// Threads: the event loop's. Lifetime: owns its mapping.
class ImageRecord {
 public:
  // A new record, all slots kEmpty. `after_store` runs after every 8-byte store: where a test takes
  // the picture that a crash would leave. Errors: kResourceExhausted.
  static absl::StatusOr<std::unique_ptr<ImageRecord>> Create(
      const RecordHeader& header, std::function<void()> after_store = {});
  // Takes over the record of a former worker. Errors: kDataLoss (seals, size, magic, header's
  // checksum), kFailedPrecondition (another version). A damaged slot is no error here: see slot().
  static absl::StatusOr<std::unique_ptr<ImageRecord>> Reopen(
      UniqueFd fd, std::function<void()> after_store = {});

  const RecordHeader& header() const { return header_; }
  int fd() const { return mapping_->fd(); }

  // As last written, or as found by Reopen: kDataLoss says what is wrong with a slot of which
  // neither copy, or not what it refers to, can be believed.
  const absl::StatusOr<SlotRecord>& slot(uint32_t index) const { return slots_[index]; }

  // CHECKs the sizes named at SlotRecord.
  void Update(uint32_t index, const SlotRecord& record);

  // The CRC32C of a block of the image of this generation.
  void SetChecksum(uint32_t index, uint32_t block, uint64_t generation, uint32_t crc32c);
  std::optional<uint32_t> Checksum(uint32_t index, uint32_t block, uint64_t generation) const;

 private:
  struct Copy;  // image_record.cc: the bytes of a slot's copy

  ImageRecord(std::shared_ptr<SharedMapping> mapping, const RecordHeader& header,
              std::function<void()> after_store);
  void Store(uint64_t* word, uint64_t value);
  void StoreAll(uint64_t* words, std::span<const uint64_t> values);
  uint64_t* WordsAt(uint64_t offset) const;
  uint64_t* CopyWords(uint32_t index, uint32_t which) const;
  uint64_t* TableWords(uint32_t index, uint32_t which) const;
  uint64_t* BlobWords(uint32_t index, uint32_t which) const;
  uint64_t* EntryWord(uint32_t index, uint32_t block) const;
  void Load(uint32_t index);
  absl::StatusOr<SlotRecord> Decode(uint32_t index, const Copy& copy) const;

  // Which copy and places are current.
  struct Current {
    uint64_t sequence = 0;
    uint32_t copy = 0;
    uint32_t table = 0;
    uint32_t blobs = 0;
  };

  std::shared_ptr<SharedMapping> mapping_;
  const RecordHeader header_;
  std::function<void()> after_store_;
  std::vector<absl::StatusOr<SlotRecord>> slots_;
  std::vector<Current> current_;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_IMAGE_RECORD_H_
