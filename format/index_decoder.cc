// Reads INDEX. What is a count, a reference or a rule of the format is checked here, before
// anything is allocated for it; what the values mean is CheckIndex's.
#include <algorithm>
#include <cstring>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "format/index.h"
#include "format/index_records.h"

namespace holdfast {
namespace {

using namespace index_records;

absl::Status Wrong(const std::string& text) {
  return absl::DataLossError(absl::StrCat("INDEX: ", text));
}

uint64_t LoadLittleEndian(std::span<const std::byte> bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    value |= uint64_t{std::to_integer<uint8_t>(bytes[i])} << (8 * i);
  }
  return value;
}

absl::Status SetFingerprint(const std::string& what, uint8_t function,
                            const std::array<std::byte, 16>& bytes, TensorFacts& facts) {
  if (function == kUndefinedFunction) {
    facts.undefined_fingerprint = bytes;
    return absl::OkStatus();
  }
  if (function != kFingerprintFunction) {
    return Wrong(absl::StrFormat("%s: function of the fingerprint: expected %d or %d, found %d",
                                 what, kUndefinedFunction, kFingerprintFunction, function));
  }
  facts.fingerprint = Fingerprint::FromBytes(bytes);
  if (facts.fingerprint.has_value()) return absl::OkStatus();
  return Wrong(absl::StrFormat("%s: fingerprint: expected less than 2^127 - 1, found more", what));
}

// Reads fields of a record one after another.
class Fields {
 public:
  explicit Fields(std::span<const std::byte> record) : rest_(record) {}
  uint8_t Get8() { return static_cast<uint8_t>(Get(1)); }
  uint32_t Get32() { return static_cast<uint32_t>(Get(4)); }
  uint64_t Get64() { return Get(8); }
  std::span<const std::byte> GetBytes(size_t count) {
    CHECK(count <= rest_.size());
    const auto bytes = rest_.first(count);
    rest_ = rest_.subspan(count);
    return bytes;
  }

 private:
  uint64_t Get(size_t count) { return LoadLittleEndian(GetBytes(count)); }

  std::span<const std::byte> rest_;
};

class Decoder {
 public:
  explicit Decoder(std::span<const std::byte> file) : file_(file) {}
  absl::StatusOr<Index> Decode();

 private:
  struct Section {
    std::span<const std::byte> bytes;
    uint64_t count = 0;
  };

  absl::Status CheckFrame();
  absl::Status ReadHeader();
  absl::Status ReadSectionTable();
  absl::Status ReadLayouts();
  absl::Status ReadImages();
  absl::Status ReadTensorStates();
  absl::Status ReadBoxes();
  absl::Status ReadPieces();
  absl::Status ReadBlobs();

  Fields Record(size_t section, uint64_t index) const {
    const uint64_t bytes = kSections[section].record_bytes;
    return Fields(sections_[section].bytes.subspan(index * bytes, bytes));
  }
  absl::Status Expect(const std::string& what, uint64_t expected, uint64_t found) const {
    if (expected == found) return absl::OkStatus();
    return Wrong(absl::StrFormat("%s: expected %d, found %d", what, expected, found));
  }
  absl::Status ReadName(uint64_t reference, std::string& name);
  // The next `count` of the numbers: they are used once each, in order.
  absl::StatusOr<std::vector<uint64_t>> TakeNumbers(const std::string& what, uint64_t first,
                                                    uint64_t count);

  std::span<const std::byte> file_;
  Section sections_[kSectionCount];
  uint64_t numbers_taken_ = 0;
  uint64_t names_bytes_ = 0;  // given out so far
  // [first, count) of each tensor state in the pieces, as its record says.
  std::vector<std::pair<uint64_t, uint64_t>> pieces_of_state_;
  Index index_;
};

absl::Status Decoder::CheckFrame() {
  if (file_.size() > kIndexBytesMax || file_.size() < kTableEnd + kTrailerBytes) {
    return Wrong(absl::StrFormat("expected %d to %d bytes, found %d", kTableEnd + kTrailerBytes,
                                 kIndexBytesMax, file_.size()));
  }
  const std::span<const std::byte> magic = file_.first(kMagic.size());
  if (std::memcmp(magic.data(), kMagic.data(), kMagic.size()) != 0) {
    return Wrong(absl::StrFormat("magic: expected %016x, found %016x (little-endian)",
                                 LoadLittleEndian(std::as_bytes(std::span(kMagic))),
                                 LoadLittleEndian(magic)));
  }
  const uint64_t version = LoadLittleEndian(file_.subspan(8, 4));
  RETURN_IF_ERROR(Expect("format version", kFormatVersion, version));
  RETURN_IF_ERROR(
      Expect("bytes of the file", LoadLittleEndian(file_.subspan(16, 8)), file_.size()));
  const std::span<const std::byte> sealed = file_.first(file_.size() - kTrailerBytes);
  const uint32_t crc = Crc32c(sealed);
  const uint64_t expected = uint64_t{~crc} << 32 | crc;
  const uint64_t found = LoadLittleEndian(file_.subspan(sealed.size()));
  if (expected != found) {
    return Wrong(absl::StrFormat("checksum of the first %d bytes: expected %016x, found %016x",
                                 sealed.size(), expected, found));
  }
  return absl::OkStatus();
}

absl::Status Decoder::ReadSectionTable() {
  uint64_t offset = kTableEnd;
  const uint64_t end = file_.size() - kTrailerBytes;
  for (size_t i = 0; i < kSectionCount; ++i) {
    const SectionKind& kind = kSections[i];
    const std::string what = absl::StrFormat("section %s", kind.name);
    Fields entry(file_.subspan(kHeaderBytes + i * kSectionEntryBytes, kSectionEntryBytes));
    RETURN_IF_ERROR(Expect(absl::StrCat(what, ": number"), i + 1, entry.Get32()));
    RETURN_IF_ERROR(Expect(absl::StrCat(what, ": record bytes"), kind.record_bytes, entry.Get32()));
    RETURN_IF_ERROR(Expect(absl::StrCat(what, ": offset"), offset, entry.Get64()));
    const uint64_t count = entry.Get64();
    if (count > (end - offset) / kind.record_bytes) {
      return Wrong(absl::StrFormat("%s: expected at most %d records of %d bytes, found %d", what,
                                   (end - offset) / kind.record_bytes, kind.record_bytes, count));
    }
    const uint64_t bytes = count * kind.record_bytes;
    sections_[i] = {file_.subspan(offset, bytes), count};
    // The file ends at a multiple of 8, so the padding is in it if the section is.
    const uint64_t next = RoundUp8(offset + bytes);
    if (next > end) return Wrong(absl::StrFormat("%s: no room for its padding", what));
    for (uint64_t at = offset + bytes; at < next; ++at) {
      RETURN_IF_ERROR(
          Expect(absl::StrCat(what, ": padding"), 0, std::to_integer<uint64_t>(file_[at])));
    }
    offset = next;
  }
  return Expect("end of the sections", end, offset);
}

absl::Status Decoder::ReadName(uint64_t reference, std::string& name) {
  const uint64_t offset = reference >> 16;
  const uint64_t bytes = reference & UINT16_MAX;
  const std::span<const std::byte> names = sections_[kNames].bytes;
  if (offset > names.size() || bytes > names.size() - offset) {
    return Wrong(
        absl::StrFormat("name: expected one in the %d bytes of names, found %d bytes at "
                        "offset %d",
                        names.size(), bytes, offset));
  }
  names_bytes_ += bytes;
  if (names_bytes_ > kNameExpansionMax * file_.size()) {
    return Wrong(absl::StrFormat("names: expected at most %d bytes in all, found more",
                                 kNameExpansionMax * file_.size()));
  }
  name.resize(bytes);
  if (bytes > 0) std::memcpy(name.data(), names.data() + offset, bytes);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<uint64_t>> Decoder::TakeNumbers(const std::string& what, uint64_t first,
                                                           uint64_t count) {
  RETURN_IF_ERROR(Expect(absl::StrCat(what, ": first number"), numbers_taken_, first));
  if (count > sections_[kNumbers].count - numbers_taken_) {
    return Wrong(absl::StrFormat("%s: expected at most %d numbers, found %d", what,
                                 sections_[kNumbers].count - numbers_taken_, count));
  }
  std::vector<uint64_t> numbers(count);
  for (uint64_t i = 0; i < count; ++i) numbers[i] = Record(kNumbers, first + i).Get64();
  numbers_taken_ += count;
  return numbers;
}

absl::Status Decoder::ReadHeader() {
  Fields header(file_.subspan(kMagic.size() + 4, kHeaderBytes - kMagic.size() - 4));
  RETURN_IF_ERROR(Expect("sections", kSectionCount, header.Get32()));
  static_cast<void>(header.Get64());  // the file's bytes: CheckFrame
  const Step step{header.Get64()};
  index_.checkpoint = {Attempt{header.Get32()}, step};
  index_.world_size = header.Get32();
  const uint64_t job = header.Get64();
  const uint64_t job_uuid = header.Get64();
  index_.blob_world_size = header.Get32();
  RETURN_IF_ERROR(Expect("reserved bytes of the header", 0, header.Get32()));
  RETURN_IF_ERROR(ReadSectionTable());
  RETURN_IF_ERROR(ReadName(job, index_.job));
  return ReadName(job_uuid, index_.job_uuid);
}

absl::Status Decoder::ReadLayouts() {
  std::span<const std::byte> text = sections_[kLayoutText].bytes;
  for (uint64_t i = 0; i < sections_[kLayouts].count; ++i) {
    const uint64_t bytes = Record(kLayouts, i).Get64();
    if (bytes > text.size()) {
      return Wrong(absl::StrFormat("layouts[%d]: expected at most %d bytes, found %d", i,
                                   text.size(), bytes));
    }
    std::string layout(bytes, '\0');
    if (bytes > 0) std::memcpy(layout.data(), text.data(), bytes);
    index_.layouts.push_back(std::move(layout));
    text = text.subspan(bytes);
  }
  return Expect("bytes of layout text that no layout uses", 0, text.size());
}

absl::Status Decoder::ReadImages() {
  uint64_t blocks_taken = 0;
  for (uint64_t i = 0; i < sections_[kImages].count; ++i) {
    const std::string what = absl::StrFormat("images[%d]", i);
    Fields record = Record(kImages, i);
    IndexImage image;
    RETURN_IF_ERROR(ReadName(record.Get64(), image.file));
    image.rank = Rank{record.Get32()};
    image.layout = record.Get32();
    image.bytes = record.Get64();
    image.block_bytes = record.Get64();
    RETURN_IF_ERROR(Expect(absl::StrCat(what, ": first block"), blocks_taken, record.Get64()));
    const uint64_t block_count = record.Get64();
    const uint64_t blocks_left = sections_[kBlocks].count - blocks_taken;
    if (block_count > blocks_left) {
      return Wrong(absl::StrFormat("%s: expected at most %d blocks, found %d", what, blocks_left,
                                   block_count));
    }
    image.block_crc32c.resize(block_count);
    for (uint64_t k = 0; k < block_count; ++k) {
      image.block_crc32c[k] = Record(kBlocks, blocks_taken + k).Get32();
    }
    blocks_taken += block_count;
    index_.images.push_back(std::move(image));
  }
  return Expect("blocks", sections_[kBlocks].count, blocks_taken);
}

absl::Status Decoder::ReadTensorStates() {
  const uint64_t count = sections_[kTensorStates].count;
  if (count > UINT32_MAX) return Wrong("tensor states: expected less than 2^32, found more");
  index_.tensor_states.reserve(count);
  index_.facts.reserve(count);
  pieces_of_state_.reserve(count);
  for (uint64_t i = 0; i < count; ++i) {
    const std::string what = absl::StrFormat("tensor_states[%d]", i);
    Fields record = Record(kTensorStates, i);
    TensorState tensor_state;
    RETURN_IF_ERROR(ReadName(record.Get64(), tensor_state.tensor));
    RETURN_IF_ERROR(ReadName(record.Get64(), tensor_state.state));
    const uint64_t first_number = record.Get64();
    const uint64_t first_piece = record.Get64();
    pieces_of_state_.emplace_back(first_piece, record.Get64());
    const uint32_t dims = record.Get32();
    ASSIGN_OR_RETURN(tensor_state.shape, TakeNumbers(what, first_number, dims));
    const uint8_t dtype_number = record.Get8();
    const std::optional<Dtype> dtype = DtypeFromNumber(dtype_number);
    if (!dtype.has_value()) {
      return Wrong(
          absl::StrFormat("%s: expected the number of a dtype, found %d", what, dtype_number));
    }
    tensor_state.dtype = *dtype;

    const uint8_t flags = record.Get8();
    if (flags > (kHasFingerprint | kHasNonFiniteCount | kHasMarks)) {
      return Wrong(absl::StrFormat("%s: flags: expected at most 7, found %d", what, flags));
    }
    const uint8_t function = record.Get8();
    RETURN_IF_ERROR(Expect(absl::StrCat(what, ": reserved"), 0, record.Get8()));
    std::array<std::byte, 16> fingerprint = {};
    std::ranges::copy(record.GetBytes(16), fingerprint.begin());
    const uint64_t non_finite_count = record.Get64();
    const uint64_t marks = record.Get64();
    TensorFacts facts;
    if ((flags & kHasFingerprint) != 0) {
      RETURN_IF_ERROR(SetFingerprint(what, function, fingerprint, facts));
    } else {
      RETURN_IF_ERROR(Expect(absl::StrCat(what, ": function of no fingerprint"), 0, function));
    }
    if ((flags & kHasNonFiniteCount) != 0) facts.non_finite_count = non_finite_count;
    if ((flags & kHasMarks) != 0) facts.marks = marks;
    if (((flags & kHasFingerprint) == 0 && fingerprint != std::array<std::byte, 16>{}) ||
        (!facts.non_finite_count.has_value() && non_finite_count != 0) ||
        (!facts.marks.has_value() && marks != 0)) {
      return Wrong(
          absl::StrFormat("%s: expected zeros where its flags %d say 'not computed'", what, flags));
    }
    index_.tensor_states.push_back(std::move(tensor_state));
    index_.facts.push_back(facts);
  }
  return absl::OkStatus();
}

absl::Status Decoder::ReadBoxes() {
  if (sections_[kBoxes].count >= kWholeTensor) return Wrong("boxes: expected less, found 2^32 - 1");
  for (uint64_t i = 0; i < sections_[kBoxes].count; ++i) {
    const std::string what = absl::StrFormat("boxes[%d]", i);
    Fields record = Record(kBoxes, i);
    const uint64_t first_number = record.Get64();
    const uint32_t dims = record.Get32();
    RETURN_IF_ERROR(Expect(absl::StrCat(what, ": reserved"), 0, record.Get32()));
    if (dims > kTensorDimsMax) {
      return Wrong(absl::StrFormat("%s: expected at most %d dimensions, found %d", what,
                                   kTensorDimsMax, dims));
    }
    ASSIGN_OR_RETURN(const std::vector<uint64_t> numbers,
                     TakeNumbers(what, first_number, 2 * uint64_t{dims}));
    const std::span<const uint64_t> values(numbers);
    index_.boxes.Add(values.first(dims), values.subspan(dims));
  }
  return Expect("numbers", sections_[kNumbers].count, numbers_taken_);
}

absl::Status Decoder::ReadPieces() {
  index_.pieces.reserve(sections_[kPieces].count);
  for (uint64_t i = 0; i < sections_[kPieces].count; ++i) {
    Fields record = Record(kPieces, i);
    IndexPiece piece;
    piece.piece.tensor_state = record.Get32();
    piece.piece.box = record.Get32();
    piece.piece.begin = record.Get64();
    piece.piece.end = record.Get64();
    piece.offset_bytes = record.Get64();
    piece.image = record.Get32();
    RETURN_IF_ERROR(Expect(absl::StrFormat("pieces[%d]: reserved", i), 0, record.Get32()));
    index_.pieces.push_back(piece);
  }
  return absl::OkStatus();
}

absl::Status Decoder::ReadBlobs() {
  for (uint64_t i = 0; i < sections_[kBlobs].count; ++i) {
    Fields record = Record(kBlobs, i);
    IndexBlob blob;
    RETURN_IF_ERROR(ReadName(record.Get64(), blob.name));
    blob.offset_bytes = record.Get64();
    blob.bytes = record.Get64();
    blob.image = record.Get32();
    blob.rank = Rank{record.Get32()};
    const uint32_t scope = record.Get32();
    if (scope > 1) {
      return Wrong(absl::StrFormat("blobs[%d]: scope: expected 0 or 1, found %d", i, scope));
    }
    blob.scope = static_cast<BlobScope>(scope);
    RETURN_IF_ERROR(Expect(absl::StrFormat("blobs[%d]: reserved", i), 0, record.Get32()));
    index_.blobs.push_back(std::move(blob));
  }
  return absl::OkStatus();
}

absl::StatusOr<Index> Decoder::Decode() {
  RETURN_IF_ERROR(CheckFrame());
  RETURN_IF_ERROR(ReadHeader());
  RETURN_IF_ERROR(ReadLayouts());
  RETURN_IF_ERROR(ReadImages());
  RETURN_IF_ERROR(ReadTensorStates());
  RETURN_IF_ERROR(ReadBoxes());
  RETURN_IF_ERROR(ReadPieces());
  RETURN_IF_ERROR(ReadBlobs());
  RETURN_IF_ERROR(CheckIndex(index_));
  // The pieces are in order now, so each state's are a range that its record must name.
  for (uint32_t i = 0; i < pieces_of_state_.size(); ++i) {
    const auto [first, last] = index_.PiecesOf(i);
    const std::string what = absl::StrFormat("tensor_states[%d]: ", i);
    RETURN_IF_ERROR(Expect(what + "first piece", first, pieces_of_state_[i].first));
    RETURN_IF_ERROR(Expect(what + "pieces", last - first, pieces_of_state_[i].second));
  }
  return std::move(index_);
}

}  // namespace

absl::StatusOr<Index> DecodeIndex(std::span<const std::byte> bytes) {
  return Decoder(bytes).Decode();
}

}  // namespace holdfast
