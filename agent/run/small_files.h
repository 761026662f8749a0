// Small files that are replaced as a whole.
#ifndef HOLDFAST_AGENT_RUN_SMALL_FILES_H_
#define HOLDFAST_AGENT_RUN_SMALL_FILES_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

// Readers find the old contents or the new, whatever dies when. VISIBLE after OK, not durable: it
// may be lost, or found empty, after a power cut.
absl::Status ReplaceFile(const std::string& path, std::string_view contents);

// kNotFound; kResourceExhausted (it is larger).
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t bytes_max);

// With all parents, mode 0700. One that is there already is left as it is.
absl::Status MakeDirectories(const std::string& path);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_SMALL_FILES_H_
