// What a reader of a foreign container reads from: a file of the checkpoint, a part of one (a torch
// archive inside a DCP file), or bytes in memory (a stream that had to be decompressed first).
#ifndef HOLDFAST_CONVERTER_BYTE_SOURCE_H_
#define HOLDFAST_CONVERTER_BYTE_SOURCE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_format.h"
#include "converter/foreign_folder.h"

namespace holdfast::converter {

// Threads: any. Lifetime: outlives whoever reads from it.
class ByteSource {
 public:
  virtual ~ByteSource() = default;

  // For errors: the file's path, and the part of it.
  virtual const std::string& name() const = 0;
  virtual uint64_t size_bytes() const = 0;

  // Fills `out` with the bytes from `offset_bytes` on. Errors: kDataLoss (past the end, both
  // numbers named), those of the FileSystem.
  [[nodiscard]] virtual absl::Status ReadAt(uint64_t offset_bytes,
                                            std::span<std::byte> out) const = 0;
  // The same as text. The caller has bounded bytes.
  absl::StatusOr<std::string> ReadText(uint64_t offset_bytes, size_t bytes) const {
    std::string text(bytes, '\0');
    const absl::Status status =
        ReadAt(offset_bytes, std::as_writable_bytes(std::span(text.data(), text.size())));
    if (!status.ok()) return status;
    return text;
  }

 protected:
  // OK if [offset_bytes, offset_bytes + count) lies within.
  absl::Status CheckRange(uint64_t offset_bytes, size_t count) const {
    if (offset_bytes <= size_bytes() && count <= size_bytes() - offset_bytes) {
      return absl::OkStatus();
    }
    return absl::DataLossError(absl::StrFormat("%s: expected %d bytes at %d, found the end at %d",
                                               name(), count, offset_bytes, size_bytes()));
  }
};

// Bytes [begin, begin + bytes) of a file of a folder.
class FolderSource : public ByteSource {
 public:
  // Lifetime: the folder outlives it. The range lies in the file, as files() says.
  FolderSource(const ForeignFolder& folder, uint32_t file)
      : FolderSource(folder, file, 0, folder.files()[file].bytes) {}
  FolderSource(const ForeignFolder& folder, uint32_t file, uint64_t begin, uint64_t bytes)
      : folder_(folder), file_(file), begin_(begin), bytes_(bytes) {
    name_ = folder.files()[file].path;
    if (begin != 0 || bytes != folder.files()[file].bytes) {
      name_ += absl::StrFormat(" [%d, %d)", begin, begin + bytes);
    }
  }

  const std::string& name() const override { return name_; }
  uint64_t size_bytes() const override { return bytes_; }
  absl::Status ReadAt(uint64_t offset_bytes, std::span<std::byte> out) const override {
    const absl::Status status = CheckRange(offset_bytes, out.size());
    return status.ok() ? folder_.ReadAt(file_, begin_ + offset_bytes, out) : status;
  }

 private:
  const ForeignFolder& folder_;
  const uint32_t file_;
  const uint64_t begin_;
  const uint64_t bytes_;
  std::string name_;
};

class MemorySource : public ByteSource {
 public:
  MemorySource(std::string name, std::string bytes)
      : name_(std::move(name)), bytes_(std::move(bytes)) {}

  const std::string& name() const override { return name_; }
  uint64_t size_bytes() const override { return bytes_.size(); }
  absl::Status ReadAt(uint64_t offset_bytes, std::span<std::byte> out) const override {
    const absl::Status status = CheckRange(offset_bytes, out.size());
    if (status.ok() && !out.empty()) {
      std::memcpy(out.data(), bytes_.data() + offset_bytes, out.size());
    }
    return status;
  }

 private:
  const std::string name_;
  const std::string bytes_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_BYTE_SOURCE_H_
