#include "converter/output_files.h"

#include <utility>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

constexpr size_t kBufferBytes = size_t{256} << 10;

}  // namespace

OutputFiles::OutputFiles(FileSystem& file_system, std::string directory, uint64_t total_bytes,
                         const ConversionProgress& progress)
    : file_system_(file_system),
      directory_(std::move(directory)),
      total_bytes_(total_bytes),
      progress_(progress) {
  buffer_.reserve(kBufferBytes);
}

absl::Status OutputFiles::Open(const std::string& path) {
  CHECK(file_ == nullptr);
  for (size_t slash = path.find('/'); slash != std::string::npos;
       slash = path.find('/', slash + 1)) {
    const std::string below = path.substr(0, slash);
    if (!made_.insert(below).second) continue;
    RETURN_IF_ERROR(file_system_.CreateDirectory(absl::StrFormat("%s/%s", directory_, below)));
  }
  ASSIGN_OR_RETURN(file_, file_system_.CreateNew(absl::StrFormat("%s/%s", directory_, path)));
  return absl::OkStatus();
}

absl::Status OutputFiles::Append(std::span<const std::byte> bytes) {
  CHECK(file_ != nullptr);
  if (buffer_.size() + bytes.size() > kBufferBytes) RETURN_IF_ERROR(Flush());
  if (bytes.size() > kBufferBytes) {
    RETURN_IF_ERROR(file_->Append(bytes));
  } else {
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  }
  done_bytes_ += bytes.size();
  if (progress_ == nullptr || progress_(done_bytes_, total_bytes_)) return absl::OkStatus();
  return absl::CancelledError("stopped; nothing was left behind");
}

absl::Status OutputFiles::Append(std::string_view text) {
  return Append(std::as_bytes(std::span(text.data(), text.size())));
}

absl::Status OutputFiles::Flush() {
  if (buffer_.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(file_->Append(buffer_));
  buffer_.clear();
  return absl::OkStatus();
}

absl::Status OutputFiles::Close() {
  CHECK(file_ != nullptr);
  RETURN_IF_ERROR(Flush());
  RETURN_IF_ERROR(file_->Sync());
  file_.reset();
  return absl::OkStatus();
}

absl::Status OutputFiles::WriteWhole(const std::string& path, std::string_view text) {
  RETURN_IF_ERROR(Open(path));
  RETURN_IF_ERROR(Append(text));
  return Close();
}

absl::Status OutputFiles::Finish() {
  CHECK(file_ == nullptr);
  for (const std::string& below : made_) {
    RETURN_IF_ERROR(file_system_.SyncDirectory(absl::StrFormat("%s/%s", directory_, below)));
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
