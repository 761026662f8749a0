#include <map>
#include <string>
#include <string_view>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "format/index.h"
#include "format/index_records.h"

namespace holdfast {
namespace {

using namespace index_records;

class Bytes {
 public:
  void Put8(uint8_t value) { bytes_.push_back(std::byte{value}); }
  void Put32(uint32_t value) { Put(value, 4); }
  void Put64(uint64_t value) { Put(value, 8); }
  void Put(std::string_view text) {
    const auto span = std::as_bytes(std::span(text));
    bytes_.insert(bytes_.end(), span.begin(), span.end());
  }
  void Put(const Bytes& other) {
    bytes_.insert(bytes_.end(), other.bytes_.begin(), other.bytes_.end());
  }
  void PadTo8() { bytes_.resize(RoundUp8(bytes_.size())); }
  uint64_t size() const { return bytes_.size(); }
  std::vector<std::byte>& bytes() { return bytes_; }

 private:
  void Put(uint64_t value, size_t count) {
    for (size_t i = 0; i < count; ++i) bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
  }

  std::vector<std::byte> bytes_;
};

class Encoder {
 public:
  explicit Encoder(const Index& index) : index_(index) {}
  std::vector<std::byte> Encode();

 private:
  uint64_t AddName(std::string_view name);
  void AddImages();
  void AddTensorStates();
  void AddPieces();
  void AddBlobs();

  const Index& index_;
  Bytes sections_[kSectionCount];
  std::map<std::string, uint64_t, std::less<>> shared_names_;
};

uint64_t Encoder::AddName(std::string_view name) {
  const auto at = shared_names_.find(name);
  if (at != shared_names_.end()) return at->second;
  const uint64_t offset = sections_[kNames].size();
  CHECK(offset <= kNameOffsetMax && name.size() <= UINT16_MAX);
  const uint64_t reference = offset << 16 | name.size();
  sections_[kNames].Put(name);
  if (name.size() <= kSharedNameBytesMax) shared_names_.emplace(name, reference);
  return reference;
}

void Encoder::AddImages() {
  uint64_t first_block = 0;
  for (const IndexImage& image : index_.images) {
    Bytes& record = sections_[kImages];
    record.Put64(AddName(image.file));
    record.Put32(Value(image.rank));
    record.Put32(image.layout);
    record.Put64(image.bytes);
    record.Put64(image.block_bytes);
    record.Put64(first_block);
    record.Put64(image.block_crc32c.size());
    first_block += image.block_crc32c.size();
    for (const uint32_t crc : image.block_crc32c) sections_[kBlocks].Put32(crc);
  }
}

void Encoder::AddTensorStates() {
  Bytes& numbers = sections_[kNumbers];
  size_t piece = 0;
  for (size_t i = 0; i < index_.tensor_states.size(); ++i) {
    const TensorState& tensor_state = index_.tensor_states[i];
    const TensorFacts& facts = index_.facts[i];
    const size_t first_piece = piece;
    while (piece < index_.pieces.size() && index_.pieces[piece].piece.tensor_state == i) ++piece;

    Bytes& record = sections_[kTensorStates];
    record.Put64(AddName(tensor_state.tensor));
    record.Put64(AddName(tensor_state.state));
    record.Put64(numbers.size() / 8);
    record.Put64(first_piece);
    record.Put64(piece - first_piece);
    record.Put32(static_cast<uint32_t>(tensor_state.shape.size()));
    record.Put8(static_cast<uint8_t>(tensor_state.dtype));
    const bool has_fingerprint =
        facts.fingerprint.has_value() || facts.undefined_fingerprint.has_value();
    record.Put8(static_cast<uint8_t>((has_fingerprint ? kHasFingerprint : 0) |
                                     (facts.non_finite_count.has_value() ? kHasNonFiniteCount : 0) |
                                     (facts.marks.has_value() ? kHasMarks : 0)));
    record.Put8(facts.fingerprint.has_value() ? kFingerprintFunction : kUndefinedFunction);
    record.Put8(0);
    for (const std::byte byte :
         facts.fingerprint.has_value()
             ? facts.fingerprint->Bytes()
             : facts.undefined_fingerprint.value_or(std::array<std::byte, 16>{})) {
      record.Put8(std::to_integer<uint8_t>(byte));
    }
    record.Put64(facts.non_finite_count.value_or(0));
    record.Put64(facts.marks.value_or(0));
    for (const uint64_t extent : tensor_state.shape) numbers.Put64(extent);
  }
}

void Encoder::AddPieces() {
  Bytes& numbers = sections_[kNumbers];
  for (uint32_t i = 0; i < index_.boxes.size(); ++i) {
    const BoxView box = index_.boxes[i];
    sections_[kBoxes].Put64(numbers.size() / 8);
    sections_[kBoxes].Put32(static_cast<uint32_t>(box.lo.size()));
    sections_[kBoxes].Put32(0);
    for (const uint64_t lo : box.lo) numbers.Put64(lo);
    for (const uint64_t size : box.size) numbers.Put64(size);
  }
  for (const IndexPiece& piece : index_.pieces) {
    Bytes& record = sections_[kPieces];
    record.Put32(piece.piece.tensor_state);
    record.Put32(piece.piece.box);
    record.Put64(piece.piece.begin);
    record.Put64(piece.piece.end);
    record.Put64(piece.offset_bytes);
    record.Put32(piece.image);
    record.Put32(0);
  }
}

void Encoder::AddBlobs() {
  for (const IndexBlob& blob : index_.blobs) {
    Bytes& record = sections_[kBlobs];
    record.Put64(AddName(blob.name));
    record.Put64(blob.offset_bytes);
    record.Put64(blob.bytes);
    record.Put32(blob.image);
    record.Put32(Value(blob.rank));
    record.Put32(static_cast<uint32_t>(blob.scope));
    record.Put32(0);
  }
}

std::vector<std::byte> Encoder::Encode() {
  const uint64_t job = AddName(index_.job);
  const uint64_t job_uuid = AddName(index_.job_uuid);
  for (const std::string& layout : index_.layouts) {
    sections_[kLayouts].Put64(layout.size());
    sections_[kLayoutText].Put(layout);
  }
  AddImages();
  AddTensorStates();
  AddPieces();
  AddBlobs();

  uint64_t file_bytes = kTableEnd + kTrailerBytes;
  for (const Bytes& section : sections_) file_bytes += RoundUp8(section.size());

  Bytes file;
  file.bytes().reserve(file_bytes);
  file.Put(kMagic);
  file.Put32(kFormatVersion);
  file.Put32(kSectionCount);
  file.Put64(file_bytes);
  file.Put64(Value(index_.checkpoint.step));
  file.Put32(Value(index_.checkpoint.attempt));
  file.Put32(index_.world_size);
  file.Put64(job);
  file.Put64(job_uuid);
  file.Put32(index_.blob_world_size);
  file.Put32(0);
  uint64_t offset = kTableEnd;
  for (size_t i = 0; i < kSectionCount; ++i) {
    file.Put32(static_cast<uint32_t>(i + 1));
    file.Put32(kSections[i].record_bytes);
    file.Put64(offset);
    file.Put64(sections_[i].size() / kSections[i].record_bytes);
    offset += RoundUp8(sections_[i].size());
  }
  for (Bytes& section : sections_) {
    file.Put(section);
    file.PadTo8();
    section = Bytes();  // hundreds of megabytes in a large index
  }
  const uint32_t crc = Crc32c(file.bytes());
  file.Put32(crc);
  file.Put32(~crc);
  CHECK(file.size() == file_bytes);
  return std::move(file.bytes());
}

}  // namespace

absl::StatusOr<std::vector<std::byte>> EncodeIndex(const Index& index) {
  if (const absl::Status status = CheckIndex(index); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrFormat("cannot be written: %s", status.message()));
  }
  return Encoder(index).Encode();
}

}  // namespace holdfast
