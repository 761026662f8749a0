#include "converter/torch_archive.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/zip_crc32.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kPrefix = "archive/";
constexpr uint64_t kDataAlignment = 64;
constexpr uint32_t kLarge = UINT32_MAX;  // a size that stands in the ZIP64 field instead
constexpr uint16_t kMany = UINT16_MAX;   // likewise, a number of entries
constexpr size_t kLocalHeaderBytes = 30;
constexpr uint16_t kUtf8Name = 0x0800;
constexpr uint16_t kDescriptorFollows = 0x0008;
constexpr uint16_t kVersionNeeded = 45;  // ZIP64
constexpr uint16_t kZip64Field = 0x0001;
constexpr uint16_t kPaddingField = 0x4246;  // "FB", torch's own

void Append(std::string& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
}

uint32_t Crc32Of(std::string_view text) {
  return ExtendZipCrc32(0, std::as_bytes(std::span(text.data(), text.size())));
}

// `extra`: the extra field, whole.
void AppendLocalHeader(std::string& out, std::string_view name, uint16_t flags, uint32_t crc32,
                       uint32_t bytes, std::string_view extra) {
  Append(out, 0x04034b50, 4);
  Append(out, kVersionNeeded, 2);
  Append(out, flags, 2);
  Append(out, 0, 2);  // stored
  Append(out, 0, 4);  // time and date
  Append(out, crc32, 4);
  Append(out, bytes, 4);
  Append(out, bytes, 4);
  Append(out, name.size(), 2);
  Append(out, extra.size(), 2);
  out.append(name);
  out.append(extra);
}

}  // namespace

TorchArchive::TorchArchive(std::string_view pickle) {
  CHECK(pickle.size() < kLarge);
  AddSmall("data.pkl", pickle);
  AddSmall("byteorder", "little");
}

std::string TorchArchive::Take() {
  std::string taken;
  taken.swap(made_);
  return taken;
}

void TorchArchive::AddSmall(std::string_view name, std::string_view content) {
  Entry entry{.name = std::string(kPrefix),
              .bytes = content.size(),
              .crc32 = Crc32Of(content),
              .offset = position_};
  entry.name.append(name);
  const size_t before = made_.size();
  AppendLocalHeader(made_, entry.name, kUtf8Name, entry.crc32, static_cast<uint32_t>(entry.bytes),
                    "");
  made_.append(content);
  position_ += made_.size() - before;
  entries_.push_back(std::move(entry));
}

std::string TorchArchive::BeginStorage(uint64_t bytes) {
  Entry entry{.name = absl::StrCat(std::string(kPrefix), "data/", storages_++),
              .bytes = bytes,
              .crc32 = 0,
              .offset = position_,
              .has_descriptor = bytes > 0};
  std::string extra;
  if (bytes >= kLarge) {
    Append(extra, kZip64Field, 2);
    Append(extra, 16, 2);
    Append(extra, bytes, 8);
    Append(extra, bytes, 8);
  }
  const uint64_t begin = position_ + kLocalHeaderBytes + entry.name.size() + extra.size() + 4;
  const uint64_t fill = (kDataAlignment - begin % kDataAlignment) % kDataAlignment;
  Append(extra, kPaddingField, 2);
  Append(extra, fill, 2);
  extra.append(fill, 'Z');
  const size_t before = made_.size();
  AppendLocalHeader(made_, entry.name,
                    entry.has_descriptor ? kUtf8Name | kDescriptorFollows : kUtf8Name, 0, 0, extra);
  position_ += made_.size() - before + bytes;
  entries_.push_back(std::move(entry));
  return Take();
}

std::string TorchArchive::EndStorage(uint32_t crc32) {
  CHECK(!entries_.empty());
  Entry& entry = entries_.back();
  entry.crc32 = crc32;
  if (!entry.has_descriptor) return "";
  std::string descriptor;
  const int size_bytes = entry.bytes >= kLarge ? 8 : 4;
  Append(descriptor, 0x08074b50, 4);
  Append(descriptor, crc32, 4);
  Append(descriptor, entry.bytes, size_bytes);
  Append(descriptor, entry.bytes, size_bytes);
  position_ += descriptor.size();
  return descriptor;
}

std::string TorchArchive::Finish() {
  AddSmall("version", "3\n");
  return Take() + Directory();
}

std::string TorchArchive::Directory() const {
  std::string out;
  for (const Entry& entry : entries_) {
    std::string extra;
    const bool large = entry.bytes >= kLarge;
    const bool far = entry.offset >= kLarge;
    if (large || far) {
      Append(extra, kZip64Field, 2);
      Append(extra, (large ? 16 : 0) + (far ? 8 : 0), 2);
      if (large) Append(extra, entry.bytes, 8);
      if (large) Append(extra, entry.bytes, 8);
      if (far) Append(extra, entry.offset, 8);
    }
    Append(out, 0x02014b50, 4);
    Append(out, kVersionNeeded, 2);
    Append(out, kVersionNeeded, 2);
    Append(out, entry.has_descriptor ? kUtf8Name | kDescriptorFollows : kUtf8Name, 2);
    Append(out, 0, 2);
    Append(out, 0, 4);
    Append(out, entry.crc32, 4);
    Append(out, large ? kLarge : entry.bytes, 4);
    Append(out, large ? kLarge : entry.bytes, 4);
    Append(out, entry.name.size(), 2);
    Append(out, extra.size(), 2);
    Append(out, 0, 2);  // comment
    Append(out, 0, 2);  // disk
    Append(out, 0, 2);  // internal attributes
    Append(out, 0, 4);  // external attributes
    Append(out, far ? kLarge : entry.offset, 4);
    out += entry.name;
    out += extra;
  }
  const uint64_t directory_bytes = out.size();
  const uint64_t end = position_ + directory_bytes;  // of the directory
  const uint64_t few = entries_.size() < kMany ? entries_.size() : kMany;
  // The end record's ZIP64 form and its locator, always, as torch.
  Append(out, 0x06064b50, 4);
  Append(out, 44, 8);
  Append(out, kVersionNeeded, 2);
  Append(out, kVersionNeeded, 2);
  Append(out, 0, 8);  // disks
  Append(out, entries_.size(), 8);
  Append(out, entries_.size(), 8);
  Append(out, directory_bytes, 8);
  Append(out, position_, 8);
  Append(out, 0x07064b50, 4);
  Append(out, 0, 4);
  Append(out, end, 8);
  Append(out, 1, 4);
  Append(out, 0x06054b50, 4);
  Append(out, 0, 4);
  Append(out, few, 2);
  Append(out, few, 2);
  Append(out, directory_bytes >= kLarge ? kLarge : directory_bytes, 4);
  Append(out, position_ >= kLarge ? kLarge : position_, 4);
  Append(out, 0, 2);
  return out;
}

uint64_t TorchArchive::Bytes(std::string_view pickle, std::span<const uint64_t> storage_bytes) {
  TorchArchive archive(pickle);
  uint64_t bytes = 0;
  for (const uint64_t of_storage : storage_bytes) {
    bytes += archive.BeginStorage(of_storage).size() + of_storage;
    bytes += archive.EndStorage(0).size();
  }
  return bytes + archive.Finish().size();
}

}  // namespace holdfast::converter
