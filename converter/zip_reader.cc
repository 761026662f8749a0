#include "converter/zip_reader.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/inflate.h"
#include "base/status_macros.h"
#include "base/utf8.h"
#include "base/zip_crc32.h"

namespace holdfast::converter {
namespace {

// Signatures and sizes of the records (APPNOTE 4.3).
constexpr uint32_t kLocalSignature = 0x04034b50;
constexpr uint32_t kCentralSignature = 0x02014b50;
constexpr uint32_t kEndSignature = 0x06054b50;
constexpr uint32_t kEnd64Signature = 0x06064b50;
constexpr uint32_t kLocator64Signature = 0x07064b50;
constexpr size_t kLocalBytes = 30;
constexpr size_t kCentralBytes = 46;
constexpr size_t kEndBytes = 22;
constexpr size_t kEnd64Bytes = 56;
constexpr size_t kLocator64Bytes = 20;
constexpr size_t kCommentBytesMax = 0xFFFF;

constexpr uint16_t kFlagEncrypted = 1u << 0;
constexpr uint16_t kFlagDescriptor = 1u << 3;
constexpr uint16_t kFlagPatched = 1u << 5;
constexpr uint16_t kFlagStrongEncryption = 1u << 6;
constexpr uint16_t kFlagMasked = 1u << 13;
constexpr uint16_t kFlagsNotRead =
    kFlagEncrypted | kFlagPatched | kFlagStrongEncryption | kFlagMasked;

constexpr uint32_t kIn64 = 0xFFFFFFFF;  // the value is in the ZIP64 field
constexpr uint16_t kZip64Field = 1;
constexpr size_t kPieceBytes = size_t{1} << 20;

// Little-endian numbers, one after the other, of bytes whose count has been checked.
class Cursor {
 public:
  explicit Cursor(std::string_view bytes) : bytes_(bytes) {}
  uint16_t U16() { return static_cast<uint16_t>(Take(2)); }
  uint32_t U32() { return static_cast<uint32_t>(Take(4)); }
  uint64_t U64() { return Take(8); }
  void Skip(size_t count) { at_ += count; }

 private:
  uint64_t Take(size_t count) {
    uint64_t value = 0;
    for (size_t i = count; i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes_[at_ + i]);
    at_ += count;
    return value;
  }
  std::string_view bytes_;
  size_t at_ = 0;
};

// What is wrong with a name, or "". A name is never used as a path; but another program might.
std::string_view WrongInName(std::string_view name) {
  if (name.empty()) return "is empty";
  if (name.size() > kZipNameBytesMax) return "is too long";
  if (!IsUtf8(name)) return "is not UTF-8";
  if (name.find('\0') != std::string_view::npos) return "has a NUL";
  if (name.find('\\') != std::string_view::npos) return "has a backslash";
  if (name.front() == '/') return "begins with a slash";
  for (size_t begin = 0; begin <= name.size();) {
    const size_t end = std::min(name.find('/', begin), name.size());
    if (name.substr(begin, end - begin) == "..") return "leads out of the archive";
    begin = end + 1;
  }
  return "";
}

}  // namespace

class ZipDirectoryReader {
 public:
  explicit ZipDirectoryReader(const ByteSource& source) : source_(source) {}

  absl::StatusOr<ZipDirectory> Read() {
    RETURN_IF_ERROR(FindEnd());
    RETURN_IF_ERROR(ReadCentral());
    RETURN_IF_ERROR(SortNames());
    RETURN_IF_ERROR(ReadLocals());
    return std::move(directory_);
  }

 private:
  template <typename... Args>
  absl::Status Broken(const absl::FormatSpec<Args...>& format, const Args&... args) const {
    return absl::DataLossError(
        absl::StrCat(source_.name(), ": zip: ", absl::StrFormat(format, args...)));
  }
  absl::Status BrokenEntry(std::string_view name, std::string_view what) const {
    return absl::DataLossError(
        absl::StrFormat("%s: zip: entry \"%s\": %s", source_.name(), name.substr(0, 200), what));
  }

  // Finds the end record, the last one that reaches to the end of the bytes, and through it where
  // the central directory lies.
  absl::Status FindEnd() {
    const uint64_t size = source_.size_bytes();
    if (size < kEndBytes) return Broken("expected at least %d bytes, found %d", kEndBytes, size);
    const size_t tail_bytes = std::min<uint64_t>(size, kEndBytes + kCommentBytesMax);
    ASSIGN_OR_RETURN(const std::string tail, source_.ReadText(size - tail_bytes, tail_bytes));
    size_t at = tail.size() - kEndBytes;
    for (;; --at) {
      Cursor cursor(std::string_view(tail).substr(at, kEndBytes));
      if (cursor.U32() == kEndSignature) {
        cursor.Skip(kEndBytes - 6);
        if (cursor.U16() == tail.size() - at - kEndBytes) break;
      }
      if (at == 0) return Broken("found no end record at the end: cut, or no zip");
    }
    Cursor end(std::string_view(tail).substr(at + 4, kEndBytes - 4));
    const uint16_t disk = end.U16();
    const uint16_t directory_disk = end.U16();
    const uint16_t count_here = end.U16();
    count_ = end.U16();
    central_bytes_ = end.U32();
    uint64_t central_offset = end.U32();
    if (disk != 0 || directory_disk != 0 || count_here != count_) {
      return absl::UnimplementedError(
          absl::StrCat(source_.name(), ": zip: is spread over several disks"));
    }
    central_end_ = size - tail.size() + at;
    std::optional<uint64_t> end64_offset;
    RETURN_IF_ERROR(ReadEnd64(central_offset, end64_offset));
    if (central_bytes_ > central_end_ || central_offset > central_end_ - central_bytes_) {
      return Broken("central directory: expected %d bytes at %d before %d", central_bytes_,
                    central_offset, central_end_);
    }
    // Both must tell the same of what stands before the archive.
    directory_.begin_ = central_end_ - central_bytes_ - central_offset;
    if (end64_offset.has_value() && central_end_ - directory_.begin_ != *end64_offset) {
      return Broken("ZIP64 end record: expected at %d, found at %d", *end64_offset,
                    central_end_ - directory_.begin_);
    }
    if (central_bytes_ > kZipDirectoryBytesMax || count_ > kZipEntriesMax) {
      return absl::ResourceExhaustedError(absl::StrFormat(
          "%s: zip: expected at most %d entries in %d bytes, found %d in %d", source_.name(),
          kZipEntriesMax, kZipDirectoryBytesMax, count_, central_bytes_));
    }
    return absl::OkStatus();
  }

  // The ZIP64 end record, if there is a locator. It lies between directory and locator; the one
  // form of it that is written (version 1, 44 bytes after its size).
  absl::Status ReadEnd64(uint64_t& central_offset, std::optional<uint64_t>& end64_offset) {
    if (central_end_ < kLocator64Bytes) return absl::OkStatus();
    ASSIGN_OR_RETURN(const std::string locator_bytes,
                     source_.ReadText(central_end_ - kLocator64Bytes, kLocator64Bytes));
    Cursor locator(locator_bytes);
    if (locator.U32() != kLocator64Signature) return absl::OkStatus();
    const uint32_t end64_disk = locator.U32();
    end64_offset = locator.U64();
    if (end64_disk != 0 || locator.U32() > 1) {
      return absl::UnimplementedError(
          absl::StrCat(source_.name(), ": zip: is spread over several disks"));
    }
    central_end_ -= kLocator64Bytes;
    if (central_end_ < kEnd64Bytes) return Broken("ZIP64 end record: expected before the locator");
    central_end_ -= kEnd64Bytes;
    ASSIGN_OR_RETURN(const std::string end_bytes, source_.ReadText(central_end_, kEnd64Bytes));
    Cursor end(end_bytes);
    const uint32_t signature = end.U32();
    const uint64_t following_bytes = end.U64();
    if (signature != kEnd64Signature || following_bytes != kEnd64Bytes - 12) {
      return Broken("ZIP64 end record: expected before the locator");
    }
    end.Skip(4);  // versions
    const uint32_t disk = end.U32();
    const uint32_t directory_disk = end.U32();
    const uint64_t count_here = end.U64();
    const uint64_t count = end.U64();
    const uint64_t central_bytes = end.U64();
    const uint64_t offset = end.U64();
    if (disk != 0 || directory_disk != 0 || count_here != count) {
      return absl::UnimplementedError(
          absl::StrCat(source_.name(), ": zip: is spread over several disks"));
    }
    if ((count_ != 0xFFFF && count_ != count) ||
        (central_bytes_ != kIn64 && central_bytes_ != central_bytes) ||
        (central_offset != kIn64 && central_offset != offset)) {
      return Broken("the end record and its ZIP64 form disagree");
    }
    count_ = count;
    central_bytes_ = central_bytes;
    central_offset = offset;
    return absl::OkStatus();
  }

  absl::Status ReadCentral() {
    if (count_ > central_bytes_ / kCentralBytes) {
      return Broken("central directory: expected %d entries, found %d bytes", count_,
                    central_bytes_);
    }
    ASSIGN_OR_RETURN(const std::string text,
                     source_.ReadText(central_end_ - central_bytes_, central_bytes_));
    std::string_view rest = text;
    directory_.entries_.reserve(count_);
    locals_.reserve(count_);
    for (uint64_t i = 0; i < count_; ++i) RETURN_IF_ERROR(ReadCentralEntry(rest));
    if (!rest.empty()) {
      return Broken("central directory: expected %d entries, found %d bytes more", count_,
                    rest.size());
    }
    return absl::OkStatus();
  }

  absl::Status ReadCentralEntry(std::string_view& rest) {
    if (rest.size() < kCentralBytes) return Broken("central directory: cut");
    Cursor cursor(rest);
    if (cursor.U32() != kCentralSignature) {
      return Broken("central directory: expected an entry, found none");
    }
    cursor.Skip(4);  // versions
    Local local;
    local.flags = cursor.U16();
    local.method = cursor.U16();
    cursor.Skip(4);  // time
    ZipEntry entry;
    entry.crc32 = cursor.U32();
    entry.stored_bytes = cursor.U32();
    entry.bytes = cursor.U32();
    const size_t name_bytes = cursor.U16();
    const size_t extra_bytes = cursor.U16();
    const size_t comment_bytes = cursor.U16();
    const uint16_t disk = cursor.U16();
    cursor.Skip(6);  // attributes
    local.offset = cursor.U32();
    rest.remove_prefix(kCentralBytes);
    if (rest.size() < name_bytes + extra_bytes + comment_bytes) {
      return Broken("central directory: cut");
    }
    entry.name = rest.substr(0, name_bytes);
    const std::string_view extra = rest.substr(name_bytes, extra_bytes);
    rest.remove_prefix(name_bytes + extra_bytes + comment_bytes);

    if (const std::string_view wrong = WrongInName(entry.name); !wrong.empty()) {
      return BrokenEntry(entry.name, absl::StrFormat("its name %s", wrong));
    }
    if ((local.flags & kFlagsNotRead) != 0 || disk != 0 ||
        (local.method != 0 && local.method != 8)) {
      return absl::UnimplementedError(absl::StrFormat(
          "%s: zip: entry \"%s\": expected it stored or deflated, not encrypted, on one disk; "
          "found method %d, flags %04x, disk %d",
          source_.name(), entry.name, local.method, local.flags, disk));
    }
    RETURN_IF_ERROR(ReadZip64(extra, entry, local));
    entry.method = local.method == 0 ? ZipEntry::Method::kStored : ZipEntry::Method::kDeflated;
    if (entry.method == ZipEntry::Method::kStored && entry.stored_bytes != entry.bytes) {
      return BrokenEntry(entry.name, absl::StrFormat("is stored, but %d bytes are said to be %d",
                                                     entry.stored_bytes, entry.bytes));
    }
    const uint64_t room = central_end_ - central_bytes_ - directory_.begin_;
    if (local.offset > room || room - local.offset < kLocalBytes ||
        entry.stored_bytes > room - local.offset - kLocalBytes) {
      return BrokenEntry(entry.name, absl::StrFormat("expected %d bytes at %d before the directory "
                                                     "at %d",
                                                     entry.stored_bytes, local.offset, room));
    }
    directory_.entries_.push_back(std::move(entry));
    locals_.push_back(local);
    return absl::OkStatus();
  }

  struct Local {
    uint64_t offset = 0;  // from the beginning of the archive
    uint16_t flags = 0;
    uint16_t method = 0;
  };

  // Takes what does not fit 32 bits from the ZIP64 field of the entry (APPNOTE 4.5.3): only those
  // values are there that the entry marks, in this order.
  absl::Status ReadZip64(std::string_view extra, ZipEntry& entry, Local& local) {
    std::optional<std::string_view> field;
    while (!extra.empty()) {
      if (extra.size() < 4) return BrokenEntry(entry.name, "its extra fields are cut");
      Cursor head(extra);
      const uint16_t id = head.U16();
      const size_t bytes = head.U16();
      if (bytes > extra.size() - 4) return BrokenEntry(entry.name, "its extra fields are cut");
      if (id == kZip64Field) {
        if (field.has_value()) return BrokenEntry(entry.name, "has two ZIP64 fields");
        field = extra.substr(4, bytes);
      }
      extra.remove_prefix(4 + bytes);
    }
    const auto take = [&](uint64_t& value) {
      if (value != kIn64) return true;
      if (!field.has_value() || field->size() < 8) return false;
      value = Cursor(*field).U64();
      field->remove_prefix(8);
      return true;
    };
    if (!take(entry.bytes) || !take(entry.stored_bytes) || !take(local.offset)) {
      return BrokenEntry(entry.name, "its ZIP64 field lacks a value");
    }
    return absl::OkStatus();
  }

  absl::Status SortNames() {
    const std::vector<ZipEntry>& entries = directory_.entries_;
    std::vector<uint32_t>& by_name = directory_.by_name_;
    by_name.resize(entries.size());
    std::iota(by_name.begin(), by_name.end(), 0u);
    std::sort(by_name.begin(), by_name.end(),
              [&](uint32_t a, uint32_t b) { return entries[a].name < entries[b].name; });
    for (size_t i = 1; i < by_name.size(); ++i) {
      if (entries[by_name[i]].name == entries[by_name[i - 1]].name) {
        return BrokenEntry(entries[by_name[i]].name, "duplicate name");
      }
    }
    return absl::OkStatus();
  }

  // Every entry has a local header that says the same, and its bytes end before the next one's.
  absl::Status ReadLocals() {
    std::vector<uint32_t> by_offset(locals_.size());
    std::iota(by_offset.begin(), by_offset.end(), 0u);
    std::sort(by_offset.begin(), by_offset.end(),
              [&](uint32_t a, uint32_t b) { return locals_[a].offset < locals_[b].offset; });
    const uint64_t central_begin = central_end_ - central_bytes_;
    for (size_t i = 0; i < by_offset.size(); ++i) {
      ZipEntry& entry = directory_.entries_[by_offset[i]];
      const Local& local = locals_[by_offset[i]];
      RETURN_IF_ERROR(ReadLocal(local, entry));
      const uint64_t next = i + 1 < by_offset.size()
                                ? directory_.begin_ + locals_[by_offset[i + 1]].offset
                                : central_begin;
      if (entry.data_offset > next || entry.stored_bytes > next - entry.data_offset) {
        return BrokenEntry(entry.name, "overlaps another entry, or the directory");
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadLocal(const Local& local, ZipEntry& entry) {
    // The central directory follows, and is larger than the longest name of an entry in it.
    const uint64_t offset = directory_.begin_ + local.offset;
    ASSIGN_OR_RETURN(const std::string text,
                     source_.ReadText(offset, kLocalBytes + entry.name.size()));
    Cursor cursor(text);
    if (cursor.U32() != kLocalSignature) {
      return BrokenEntry(entry.name,
                         absl::StrFormat("expected a local header at %d, found none", offset));
    }
    cursor.Skip(2);  // version
    const uint16_t flags = cursor.U16();
    const uint16_t method = cursor.U16();
    cursor.Skip(4);  // time
    const uint32_t crc32 = cursor.U32();
    const uint32_t stored_bytes = cursor.U32();
    const uint32_t bytes = cursor.U32();
    const size_t name_bytes = cursor.U16();
    const size_t extra_bytes = cursor.U16();
    const bool sizes_follow = (flags & kFlagDescriptor) != 0;
    const auto differs = [](uint32_t here, uint64_t there) {
      return here != kIn64 && here != there;
    };
    if (name_bytes != entry.name.size() ||
        std::string_view(text).substr(kLocalBytes) != entry.name || method != local.method ||
        (flags & kFlagsNotRead) != (local.flags & kFlagsNotRead) ||
        (!sizes_follow && (crc32 != entry.crc32 || differs(stored_bytes, entry.stored_bytes) ||
                           differs(bytes, entry.bytes)))) {
      return BrokenEntry(entry.name, "its local header and the central directory disagree");
    }
    entry.data_offset = offset + kLocalBytes + name_bytes + extra_bytes;
    return absl::OkStatus();
  }

  const ByteSource& source_;
  ZipDirectory directory_;
  uint64_t count_ = 0;
  uint64_t central_bytes_ = 0;
  uint64_t central_end_ = 0;  // in the source
  std::vector<Local> locals_;
};

bool ZipDirectory::BeginsLikeZip(std::string_view head) {
  return head.starts_with("PK\x03\x04") || head.starts_with("PK\x05\x06");
}

absl::StatusOr<ZipDirectory> ZipDirectory::Read(const ByteSource& source) {
  return ZipDirectoryReader(source).Read();
}

const ZipEntry* ZipDirectory::Find(std::string_view name) const {
  const auto found = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [this](uint32_t entry, std::string_view text) { return entries_[entry].name < text; });
  const bool is_there = found != by_name_.end() && entries_[*found].name == name;
  return is_there ? &entries_[*found] : nullptr;
}

namespace {

// Fills `content` with what the entry inflates to, which must be as long.
absl::Status InflateInto(const ByteSource& source, const ZipEntry& entry, std::string& content) {
  std::string piece;
  uint64_t at = 0;
  Inflater inflater([&]() -> absl::StatusOr<std::string_view> {
    const size_t piece_bytes = std::min<uint64_t>(entry.stored_bytes - at, kPieceBytes);
    ASSIGN_OR_RETURN(piece, source.ReadText(entry.data_offset + at, piece_bytes));
    at += piece_bytes;
    return std::string_view(piece);
  });
  size_t made = 0;
  RETURN_IF_ERROR(inflater.Read(content, &made));
  // One byte more shows whether there would be more.
  char byte = 0;
  size_t more = 0;
  RETURN_IF_ERROR(inflater.Read(std::span(&byte, 1), &more));
  if (made == content.size() && more == 0 && inflater.ended()) return absl::OkStatus();
  return absl::DataLossError("the deflated bytes are not as many as the directory says");
}

absl::Status CompareCrc32(const ByteSource& source, const ZipEntry& entry, uint32_t found) {
  if (found == entry.crc32) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrFormat("%s: zip: entry \"%s\": expected CRC32 %08x, found "
                      "%08x",
                      source.name(), entry.name, entry.crc32, found));
}

}  // namespace

absl::StatusOr<std::string> ReadZipEntry(const ByteSource& source, const ZipEntry& entry,
                                         uint64_t bytes_max, ZipCheck check) {
  const bool deflated = entry.method == ZipEntry::Method::kDeflated;
  if (entry.bytes > bytes_max ||
      (deflated && entry.bytes / kZipInflationMax > entry.stored_bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%s: zip: entry \"%s\": expected at most %d bytes, found %d", source.name(),
                        entry.name, bytes_max, entry.bytes));
  }
  std::string content;
  if (deflated) {
    content.resize(entry.bytes);
    if (const absl::Status status = InflateInto(source, entry, content); !status.ok()) {
      return absl::Status(status.code(),
                          absl::StrFormat("%s: zip: entry \"%s\": %s", source.name(), entry.name,
                                          std::string(status.message())));
    }
  } else {
    ASSIGN_OR_RETURN(content, source.ReadText(entry.data_offset, entry.bytes));
  }
  if (check == ZipCheck::kCrc32 || (check == ZipCheck::kCrc32UnlessZero && entry.crc32 != 0)) {
    const uint32_t found = ExtendZipCrc32(0, std::as_bytes(std::span(content)));
    RETURN_IF_ERROR(CompareCrc32(source, entry, found));
  }
  return content;
}

absl::Status CheckZipCrc32(const ByteSource& source, const ZipEntry& entry) {
  if (entry.method == ZipEntry::Method::kDeflated) {
    return absl::UnimplementedError(
        absl::StrFormat("%s: zip: entry \"%s\": is deflated", source.name(), entry.name));
  }
  uint32_t crc32 = 0;
  std::vector<std::byte> piece(std::min<uint64_t>(entry.bytes, kPieceBytes));
  for (uint64_t at = 0; at < entry.bytes;) {
    const std::span<std::byte> part =
        std::span(piece).first(std::min<uint64_t>(piece.size(), entry.bytes - at));
    RETURN_IF_ERROR(source.ReadAt(entry.data_offset + at, part));
    crc32 = ExtendZipCrc32(crc32, part);
    at += part.size();
  }
  return CompareCrc32(source, entry, crc32);
}

}  // namespace holdfast::converter
