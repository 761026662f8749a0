// The names of everything in a checkpoint root (docs/FORMAT.md): how they are made, and how names
// that were found are read. Readers are strict: what they accept is exactly what the makers make.
//
// Threads: all functions here are pure.
#ifndef HOLDFAST_FORMAT_CHECKPOINT_NAMES_H_
#define HOLDFAST_FORMAT_CHECKPOINT_NAMES_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "base/ids.h"

namespace holdfast {

inline constexpr size_t kJobNameBytesMax = 128;

inline constexpr char kJobFileName[] = "JOB.json";
inline constexpr char kManifestFileName[] = "MANIFEST.json";
inline constexpr char kIndexFileName[] = "INDEX";

// "s000000001000.a0004"; wider where the numbers need it.
std::string CheckpointDirectoryName(CheckpointId id);
// Empty unless `name` is what CheckpointDirectoryName gives for the result.
std::optional<CheckpointId> ParseCheckpointDirectoryName(std::string_view name);

// "rank-00000.h5", and with retry > 0 (an image written again after a failed write)
// "rank-00000.r1.h5".
std::string ImageFileName(Rank rank, uint32_t retry = 0);
struct ImageFile {
  Rank rank{};
  uint32_t retry = 0;
};
std::optional<ImageFile> ParseImageFileName(std::string_view name);

std::string BadFileName(uint32_t number);   // "BAD.1"
std::string HeadFileName(uint32_t number);  // "HEAD.1"
// n of "BAD.<n>" or "HEAD.<n>" (prefix without the dot), 1 and up; empty for any other name.
std::optional<uint32_t> ParseNumberedName(std::string_view prefix, std::string_view name);

// kInvalidArgument unless [A-Za-z0-9._-]{1,128} without a leading dot.
absl::Status CheckJobName(std::string_view job);
// kInvalidArgument unless a UUID in small letters: 8-4-4-4-12 hexadecimal digits.
absl::Status CheckJobUuid(std::string_view uuid);
// kInvalidArgument unless fit to be opened in a checkpoint directory: 1 to 255 bytes of
// [A-Za-z0-9._-], no leading dot.
absl::Status CheckFileName(std::string_view file);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_CHECKPOINT_NAMES_H_
