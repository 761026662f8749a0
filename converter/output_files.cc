#include "converter/output_files.h"

#include <utility>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast::converter {

OutputFiles::OutputFiles(FileSystem& file_system, std::string directory, uint64_t total_bytes,
                         const ConversionProgress& progress)
    : file_system_(file_system),
      directory_(std::move(directory)),
      total_bytes_(total_bytes),
      progress_(progress),
      streamer_(file_system) {}

absl::Status OutputFiles::Open(const std::string& path) {
  for (size_t slash = path.find('/'); slash != std::string::npos;
       slash = path.find('/', slash + 1)) {
    const std::string below = path.substr(0, slash);
    if (!made_.insert(below).second) continue;
    RETURN_IF_ERROR(file_system_.CreateDirectory(absl::StrFormat("%s/%s", directory_, below)));
  }
  return streamer_.Open(absl::StrFormat("%s/%s", directory_, path));
}

absl::Status OutputFiles::Append(std::span<const std::byte> bytes) {
  RETURN_IF_ERROR(streamer_.Append(bytes));
  done_bytes_ += bytes.size();
  if (progress_ == nullptr || progress_(done_bytes_, total_bytes_)) return absl::OkStatus();
  return absl::CancelledError("stopped; nothing was left behind");
}

absl::Status OutputFiles::Append(std::string_view text) {
  return Append(std::as_bytes(std::span(text.data(), text.size())));
}

absl::Status OutputFiles::Close() { return streamer_.Close(); }

absl::Status OutputFiles::WriteWhole(const std::string& path, std::string_view text) {
  RETURN_IF_ERROR(Open(path));
  RETURN_IF_ERROR(Append(text));
  return Close();
}

absl::Status OutputFiles::Finish() {
  RETURN_IF_ERROR(streamer_.Finish());
  for (const std::string& below : made_) {
    RETURN_IF_ERROR(file_system_.SyncDirectory(absl::StrFormat("%s/%s", directory_, below)));
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
