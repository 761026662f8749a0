#include "converter/dcp_items.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "base/zstd_codec.h"

namespace holdfast::converter {
namespace {

// PyTorch's only stream transform (torch/distributed/checkpoint/_extension.py), any minor version.
constexpr std::string_view kZstandard = "stream.zstd/1";

// A torch file is read at its ends: pickle and small records in front, the directory behind. What
// lies between in a stream is looked at only by who wants the tensor's bytes.
constexpr size_t kHeadBytes = size_t{8} << 20;
constexpr size_t kTailBytes = size_t{1} << 20;
constexpr size_t kBlockBytes = size_t{256} << 10;

// The ends of what a compressed item decodes to, and its length.
class DecodedItem : public ByteSource {
 public:
  // Errors: kDataLoss, kResourceExhausted (it decodes to more than bytes_max); those of the source.
  static absl::StatusOr<std::unique_ptr<DecodedItem>> Decode(const ByteSource& stored,
                                                             uint64_t bytes_max) {
    auto decoded = std::unique_ptr<DecodedItem>(new DecodedItem(stored.name()));
    RETURN_IF_ERROR(decoded->Fill(stored, bytes_max));
    return decoded;
  }

  const std::string& name() const override { return name_; }
  uint64_t size_bytes() const override { return bytes_; }

  absl::Status ReadAt(uint64_t offset_bytes, std::span<std::byte> out) const override {
    RETURN_IF_ERROR(CheckRange(offset_bytes, out.size()));
    for (size_t i = 0; i < out.size();) {
      const uint64_t at = offset_bytes + i;
      std::string_view part;
      if (at < head_.size()) {
        part = std::string_view(head_).substr(at);
      } else if (at >= bytes_ - tail_.size()) {
        part = std::string_view(tail_).substr(at - (bytes_ - tail_.size()));
      } else {
        return absl::UnimplementedError(absl::StrFormat(
            "%s: expected what is read of a compressed item in its first %d or last %d bytes, "
            "found it at %d of %d",
            name_, kHeadBytes, kTailBytes, at, bytes_));
      }
      const size_t count = std::min(part.size(), out.size() - i);
      std::copy_n(part.data(), count, reinterpret_cast<char*>(out.data()) + i);
      i += count;
    }
    return absl::OkStatus();
  }

 private:
  explicit DecodedItem(const std::string& stored) : name_(absl::StrCat(stored, ", decompressed")) {}

  absl::Status Fill(const ByteSource& stored, uint64_t bytes_max) {
    std::string block;
    uint64_t at = 0;
    ZstdDecompressor decompressor([&]() -> absl::StatusOr<std::string_view> {
      const uint64_t count = std::min<uint64_t>(kBlockBytes, stored.size_bytes() - at);
      ASSIGN_OR_RETURN(block, stored.ReadText(at, count));
      at += count;
      return block;
    });
    std::string decoded(kBlockBytes, '\0');
    for (size_t count = decoded.size(); count == decoded.size();) {
      if (const absl::Status status = decompressor.Read(decoded, &count); !status.ok()) {
        return absl::Status(status.code(), absl::StrFormat("%s: %s", name_, status.message()));
      }
      RETURN_IF_ERROR(Take(std::string_view(decoded).substr(0, count), bytes_max));
    }
    if (!decompressor.ended() || at < stored.size_bytes()) {
      return absl::DataLossError(
          absl::StrCat(name_, ": expected one zstd frame, found an end inside of it or behind it"));
    }
    return absl::OkStatus();
  }

  absl::Status Take(std::string_view decoded, uint64_t bytes_max) {
    bytes_ += decoded.size();
    if (bytes_ > bytes_max) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: expected at most %d bytes, found more", name_, bytes_max));
    }
    const size_t to_head = std::min(kHeadBytes - head_.size(), decoded.size());
    head_ += decoded.substr(0, to_head);
    tail_ += decoded.substr(to_head);
    if (tail_.size() >= 2 * kTailBytes) tail_.erase(0, tail_.size() - kTailBytes);
    return absl::OkStatus();
  }

  const std::string name_;
  uint64_t bytes_ = 0;
  std::string head_;
  std::string tail_;  // the last bytes of what follows the head
};

}  // namespace

DcpItems::DcpItems(const ForeignFolder& folder, const DcpMetadata& metadata, std::string directory,
                   std::string name, ForeignIndex& index)
    : folder_(folder),
      metadata_(metadata),
      directory_(std::move(directory)),
      name_(std::move(name)),
      index_(index),
      files_(metadata.files.size()) {}

absl::StatusOr<std::optional<uint32_t>> DcpItems::FileOf(const DcpItem& item) {
  File& file = files_[item.file];
  if (file.lookup == Lookup::kNotYet) {
    const std::string& path = metadata_.files[item.file];
    const absl::StatusOr<uint32_t> found = folder_.Resolve(directory_, path, name_);
    if (found.ok()) {
      file = {Lookup::kFound, *found};
    } else if (absl::IsNotFound(found.status())) {
      file.lookup = Lookup::kMissing;
      index_.notes.push_back(std::string(found.status().message()));
    } else {
      return found.status();
    }
  }
  if (file.lookup == Lookup::kMissing) return std::nullopt;
  return file.number;
}

absl::StatusOr<OpenedItem> DcpItems::Open(const DcpItem& item, uint32_t file,
                                          uint64_t decoded_bytes_max) {
  const FolderFile& info = folder_.files()[file];
  if (item.offset_bytes > info.bytes || item.stored_bytes > info.bytes - item.offset_bytes) {
    return absl::DataLossError(absl::StrFormat(
        "%s: expected an item at [%d, %d + %d), as %s says, found the end at %d", info.path,
        item.offset_bytes, item.offset_bytes, item.stored_bytes, name_, info.bytes));
  }
  const FolderSource stored(folder_, file, item.offset_bytes, item.stored_bytes);
  OpenedItem opened;
  const std::vector<std::string>& transforms = metadata_.transforms[item.transforms];
  if (transforms.empty()) {
    opened.extent = index_.AddRaw(file, item.offset_bytes, item.stored_bytes);
    opened.place = {.file = file, .begin_bytes = item.offset_bytes};
    ASSIGN_OR_RETURN(opened.torch, TorchFile::Open(stored));
    return opened;
  }
  if (transforms.size() != 1 || !transforms[0].starts_with(kZstandard)) {
    return absl::UnimplementedError(
        absl::StrFormat("%s: expected items as they are or %s, found the transforms %s", name_,
                        kZstandard, absl::StrJoin(transforms, ", ")));
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<DecodedItem> decoded,
                   DecodedItem::Decode(stored, decoded_bytes_max));
  opened.extent = static_cast<uint32_t>(index_.extents.size());
  index_.extents.push_back({.file = file,
                            .offset_bytes = item.offset_bytes,
                            .stored_bytes = item.stored_bytes,
                            .codec = Codec::kZstd,
                            .decoded_bytes = decoded->size_bytes()});
  opened.place.extent = opened.extent;
  ASSIGN_OR_RETURN(opened.torch, TorchFile::Open(*decoded));
  return opened;
}

std::string LostObject(const DcpMetadata& metadata, std::string_view name,
                       const DcpObject& object) {
  if (object.item == kNoItem) {
    return absl::StrFormat("the object %s: %s does not say where it is", object.key,
                           std::string(name));
  }
  return absl::StrFormat("the object %s: the file \"%s\" is not there", object.key,
                         metadata.files[metadata.items[object.item].file]);
}

}  // namespace holdfast::converter
