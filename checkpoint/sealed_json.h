// Small JSON records whose last line is the CRC32C of all bytes before it, as MANIFEST.json has it
// (docs/FORMAT.md): for records that are not part of the format that other tools read (the store,
// fences).
#ifndef HOLDFAST_CHECKPOINT_SEALED_JSON_H_
#define HOLDFAST_CHECKPOINT_SEALED_JSON_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/json_reader.h"

namespace holdfast {

// `members` are lines of an object, each `"name": value` without a comma.
std::string SealJson(const std::vector<std::string>& members);

// Checks the last line, byte for byte, then parses strictly. The member "crc32c" is part of what is
// returned. kDataLoss; `where` names the file.
absl::StatusOr<std::unique_ptr<JsonDocument>> UnsealJson(std::string_view bytes,
                                                         const std::string& where);

// A member's text: the string in quotes, escaped.
std::string JsonString(std::string_view text);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SEALED_JSON_H_
