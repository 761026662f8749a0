// The frame of INDEX that its encoder and its decoder share: sections and sizes of records. Private
// to them; docs/FORMAT.md says the same for everybody else.
//
//   header, section table, sections (each from a multiple of 8 on, zeros between), trailer
#ifndef HOLDFAST_FORMAT_INDEX_RECORDS_H_
#define HOLDFAST_FORMAT_INDEX_RECORDS_H_

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>

namespace holdfast::index_records {

inline constexpr std::string_view kMagic = "HFINDEX\n";
inline constexpr uint64_t kHeaderBytes = 64;
inline constexpr uint64_t kSectionEntryBytes = 24;
// CRC32C of all before it, then the same with all bits inverted. Not the CRC alone: the CRC32C of
// any bytes followed by their CRC32C is one constant, so the manifest's checksum of the whole file
// would fit every INDEX.
inline constexpr uint64_t kTrailerBytes = 8;

struct SectionKind {
  const char* name;
  uint32_t record_bytes;
};
// In the order of the file; section i has the number i + 1.
inline constexpr SectionKind kSections[] = {
    {"layouts", 8},        {"layout text", 1}, {"names", 1},   {"images", 48}, {"block CRC32Cs", 4},
    {"tensor states", 80}, {"boxes", 16},      {"numbers", 8}, {"pieces", 40}, {"blobs", 40},
};
enum : size_t {
  kLayouts,
  kLayoutText,
  kNames,
  kImages,
  kBlocks,
  kTensorStates,
  kBoxes,
  kNumbers,
  kPieces,
  kBlobs,
  kSectionCount
};
static_assert(std::size(kSections) == kSectionCount);
inline constexpr uint64_t kTableEnd = kHeaderBytes + kSectionCount * kSectionEntryBytes;

// Flags of a tensor state: which of its facts are computed.
inline constexpr uint8_t kHasFingerprint = 1;
inline constexpr uint8_t kHasNonFiniteCount = 2;
inline constexpr uint8_t kHasMarks = 4;
// Which function a fingerprint is of.
inline constexpr uint8_t kUndefinedFunction = 0;
inline constexpr uint8_t kFingerprintFunction = 1;  // format/fingerprint.h

// A reference to a name: offset in the names section in the upper 48 bits, length in the lower 16.
inline constexpr uint64_t kNameOffsetMax = (uint64_t{1} << 48) - 1;
// A longer name is written again wherever it is used. So a decoded index cannot be very much larger
// than its file, which DecodeIndex insists on.
inline constexpr size_t kSharedNameBytesMax = 256;
inline constexpr uint64_t kNameExpansionMax = 16;

inline constexpr uint64_t RoundUp8(uint64_t value) { return (value + 7) / 8 * 8; }

}  // namespace holdfast::index_records

#endif  // HOLDFAST_FORMAT_INDEX_RECORDS_H_
