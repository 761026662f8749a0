// The files of a conversion's output, written one after the other: every writer's way to the disk.
#ifndef HOLDFAST_CONVERTER_OUTPUT_FILES_H_
#define HOLDFAST_CONVERTER_OUTPUT_FILES_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "io/file_streamer.h"
#include "io/file_system.h"

namespace holdfast::converter {

// Called now and then with bytes written and bytes in all; false stops: kCancelled.
using ConversionProgress = std::function<bool(uint64_t done, uint64_t total)>;

// Threads: one. Lifetime: file system and progress outlive it.
class OutputFiles {
 public:
  // `directory` exists. `total_bytes`: for the progress.
  OutputFiles(FileSystem& file_system, std::string directory, uint64_t total_bytes,
              const ConversionProgress& progress);

  // Begins a file, which must not be there, at `path` below the directory; directories on the way
  // are made. CHECKs that none is open.
  absl::Status Open(const std::string& path);
  absl::Status Append(std::span<const std::byte> bytes);
  absl::Status Append(std::string_view text);
  absl::Status Close();
  // Open, Append, Close.
  absl::Status WriteWhole(const std::string& path, std::string_view text);
  // After OK the files are durable, and their names in the directories that were made (those in
  // `directory` itself are its owner's).
  absl::Status Finish();

 private:
  FileSystem& file_system_;
  const std::string directory_;
  const uint64_t total_bytes_;
  const ConversionProgress& progress_;
  std::set<std::string> made_;  // directories, relative
  FileStreamer streamer_;
  uint64_t done_bytes_ = 0;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_OUTPUT_FILES_H_
