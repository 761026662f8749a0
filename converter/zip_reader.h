// The directory of a zip archive (PKWARE APPNOTE 6.3.10, ZIP64), for bytes that we do not trust:
// names, sizes and where the bytes of each entry lie, so that they can be read in place. Parsers
// disagree about odd archives, which is how one file shows two contents; so whatever could be read
// in two ways is refused: overlapping entries, duplicate names, local headers that contradict the
// central directory, bytes behind the end record.
//
// What may stand before the archive: an archive inside another file has offsets relative to its own
// beginning, and is found by where its central directory really ends.
//
// Ours, because libzip 1.7 does not say where the bytes of an entry lie.
#ifndef HOLDFAST_CONVERTER_ZIP_READER_H_
#define HOLDFAST_CONVERTER_ZIP_READER_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/byte_source.h"

namespace holdfast::converter {

inline constexpr size_t kZipEntriesMax = size_t{1} << 22;
inline constexpr size_t kZipDirectoryBytesMax = size_t{1} << 30;
inline constexpr size_t kZipNameBytesMax = 4096;
// An entry that inflates to more than so many times its stored bytes is refused (deflate's own
// bound is about 1032).
inline constexpr uint64_t kZipInflationMax = 1100;

struct ZipEntry {
  std::string name;
  enum class Method : uint8_t { kStored, kDeflated };
  Method method = Method::kStored;
  uint64_t data_offset = 0;   // in the source
  uint64_t stored_bytes = 0;  // there
  uint64_t bytes = 0;         // of the content; stored_bytes, if it is stored
  uint32_t crc32 = 0;         // as the directory has it, not checked
};

// Threads: any, once read. Lifetime: does not refer to the source.
class ZipDirectory {
 public:
  // Whether these first bytes (4 are enough) can begin an archive; none says that one ends here.
  static bool BeginsLikeZip(std::string_view head);
  // Errors: kDataLoss (no zip, or one that could be read in two ways), kUnimplemented
  // (encrypted, several disks, another method), kResourceExhausted (beyond a limit); those of the
  // source. All name the source, and the entry where there is one.
  static absl::StatusOr<ZipDirectory> Read(const ByteSource& source);

  // In the order of the central directory.
  std::span<const ZipEntry> entries() const { return entries_; }
  const ZipEntry* Find(std::string_view name) const;  // null if there is none
  // Bytes that stand before the archive.
  uint64_t begin() const { return begin_; }

 private:
  friend class ZipDirectoryReader;
  ZipDirectory() = default;

  std::vector<ZipEntry> entries_;
  std::vector<uint32_t> by_name_;  // numbers of entries, sorted by name
  uint64_t begin_ = 0;
};

// Whether the content is compared with ZipEntry::crc32. torch writes 0 if told not to compute it.
enum class ZipCheck : uint8_t { kNone, kCrc32, kCrc32UnlessZero };

// The content of an entry, inflated where need be. Errors: kResourceExhausted (more than
// bytes_max), kDataLoss (CRC32, or the deflated bytes are broken or of another length); those of
// the source.
absl::StatusOr<std::string> ReadZipEntry(const ByteSource& source, const ZipEntry& entry,
                                         uint64_t bytes_max, ZipCheck check);

// OK if the bytes of a stored entry have its CRC32, read in pieces; kDataLoss with both numbers.
// kUnimplemented for a deflated one.
absl::Status CheckZipCrc32(const ByteSource& source, const ZipEntry& entry);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_ZIP_READER_H_
