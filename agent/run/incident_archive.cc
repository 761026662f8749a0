#include "agent/run/incident_archive.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "base/zstd_codec.h"

namespace holdfast {
namespace {

constexpr size_t kBlockBytes = 512;
constexpr size_t kEndBytes = 2 * kBlockBytes;
constexpr size_t kReadBytes = size_t{256} << 10;

// The header of POSIX.1-1988 (ustar), by its fields.
struct Header {
  char name[100];
  char mode[8];
  char user[8];
  char group[8];
  char size[12];
  char modified[12];
  char checksum[8];
  char type;
  char link[100];
  char magic[6];
  char version[2];
  char user_name[32];
  char group_name[32];
  char device_major[8];
  char device_minor[8];
  char prefix[155];
  char padding[12];
};
static_assert(sizeof(Header) == kBlockBytes);

Header HeaderOf(std::string_view name, size_t bytes) {
  Header header{};
  std::memcpy(header.name, name.data(), name.size());
  std::memcpy(header.mode, "0000600", 8);
  std::memcpy(header.user, "0000000", 8);
  std::memcpy(header.group, "0000000", 8);
  std::snprintf(header.size, sizeof(header.size), "%011zo", bytes);
  std::memcpy(header.modified, "00000000000", 12);
  header.type = '0';
  std::memcpy(header.magic, "ustar", 6);
  std::memcpy(header.version, "00", 2);
  // Summed with blanks in the place of the sum.
  std::memset(header.checksum, ' ', sizeof(header.checksum));
  unsigned sum = 0;
  for (const unsigned char byte :
       std::span(reinterpret_cast<const unsigned char*>(&header), sizeof(header))) {
    sum += byte;
  }
  std::snprintf(header.checksum, 7, "%06o", sum);
  return header;
}

size_t Padded(size_t bytes) { return (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes; }

absl::Status Damaged(size_t at, const std::string& expected, const std::string& found) {
  return absl::DataLossError(
      absl::StrFormat("incident: at byte %d: expected %s, found %s", at, expected, found));
}

bool IsZero(std::string_view bytes) {
  return bytes.find_first_not_of('\0') == std::string_view::npos;
}

}  // namespace

bool IsIncidentFileName(std::string_view name) {
  return !name.empty() && name.size() <= kIncidentNameBytesMax && name.front() != '.' &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' ||
                  c == '-';
         });
}

absl::StatusOr<std::string> PackIncident(std::vector<IncidentFile> files) {
  std::sort(files.begin(), files.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  if (files.size() > kIncidentFilesMax) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "incident: expected at most %d files, found %d", kIncidentFilesMax, files.size()));
  }
  ZstdCompressor compressor;
  std::string archive;
  size_t bytes = kEndBytes;
  for (size_t i = 0; i < files.size(); ++i) {
    const IncidentFile& file = files[i];
    if (!IsIncidentFileName(file.name) || (i > 0 && files[i - 1].name == file.name)) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "incident: \"%s\": expected a name of its own of letters, digits, '.', '_' and '-'",
          file.name));
    }
    const size_t padded = Padded(file.contents.size());
    bytes += kBlockBytes + padded;
    if (bytes > kIncidentBytesMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("incident: expected at most %d bytes, found more", kIncidentBytesMax));
    }
    const Header header = HeaderOf(file.name, file.contents.size());
    std::string member(reinterpret_cast<const char*>(&header), sizeof(header));
    member += file.contents;
    member.append(padded - file.contents.size(), '\0');
    compressor.Compress(member, archive);
  }
  compressor.Compress(std::string(kEndBytes, '\0'), archive);
  compressor.Finish(archive);
  return archive;
}

absl::StatusOr<std::vector<IncidentFile>> ReadIncidentTar(std::string_view tar) {
  std::vector<IncidentFile> files;
  size_t at = 0;
  for (;;) {
    if (tar.size() - at < kBlockBytes) {
      return Damaged(at, "a header or the end", absl::StrCat(tar.size() - at, " bytes"));
    }
    if (IsZero(tar.substr(at, kBlockBytes))) break;
    if (files.size() >= kIncidentFilesMax) {
      return Damaged(at, absl::StrCat("at most ", kIncidentFilesMax, " files"), "one more");
    }
    Header header;
    std::memcpy(&header, tar.data() + at, sizeof(header));
    const std::string name(header.name, strnlen(header.name, sizeof(header.name)));
    if (!IsIncidentFileName(name)) return Damaged(at, "a plain file name", "another one");
    if (!files.empty() && !(files.back().name < name)) {
      return Damaged(at, absl::StrCat("a name behind ", files.back().name), name);
    }
    size_t bytes = 0;
    for (size_t i = 0; i + 1 < sizeof(header.size); ++i) {
      const char digit = header.size[i];
      if (digit < '0' || digit > '7') return Damaged(at, "an octal size", "something else");
      bytes = bytes * 8 + static_cast<size_t>(digit - '0');
    }
    // Whatever else it says is not what the writer says.
    const Header expected = HeaderOf(name, bytes);
    if (std::memcmp(&header, &expected, sizeof(header)) != 0) {
      return Damaged(at, absl::StrCat("the header of ", name), "another one");
    }
    at += kBlockBytes;
    if (tar.size() - at < Padded(bytes)) {
      return Damaged(at, absl::StrFormat("%d bytes of %s", bytes, name),
                     absl::StrCat(tar.size() - at));
    }
    files.push_back({name, std::string(tar.substr(at, bytes))});
    if (!IsZero(tar.substr(at + bytes, Padded(bytes) - bytes))) {
      return Damaged(at + bytes, "zeros", "something else");
    }
    at += Padded(bytes);
  }
  if (tar.size() - at != kEndBytes || !IsZero(tar.substr(at))) {
    return Damaged(at, absl::StrFormat("%d zeros at the end", kEndBytes), "something else");
  }
  return files;
}

absl::StatusOr<std::vector<IncidentFile>> UnpackIncident(std::string_view archive) {
  ZstdDecompressor decompressor(archive);
  std::string tar;
  for (;;) {
    const size_t had = tar.size();
    const size_t wanted = std::min(kReadBytes, kIncidentBytesMax + 1 - had);
    tar.resize(had + wanted);
    size_t count = 0;
    const absl::Status read = decompressor.Read(std::span(tar).subspan(had), &count);
    if (!read.ok()) {
      return absl::DataLossError(absl::StrCat("incident: ", std::string(read.message())));
    }
    tar.resize(had + count);
    if (tar.size() > kIncidentBytesMax) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("incident: expected at most %d bytes, found more", kIncidentBytesMax));
    }
    if (count < wanted) break;
  }
  if (!decompressor.ended()) {
    return Damaged(tar.size(), "the end of the zstd frame, and nothing behind it",
                   "something else");
  }
  return ReadIncidentTar(tar);
}

}  // namespace holdfast
