// How the values of the configuration are written: sizes, durations, shares of memory.
#ifndef HOLDFAST_AGENT_CONFIG_VALUES_H_
#define HOLDFAST_AGENT_CONFIG_VALUES_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace holdfast {

// All errors: kInvalidArgument, with what was expected and the text found.

// "4096", "4KiB", "1.5 GiB", "10GB": bytes; K, M, G, T with iB are powers of 1024, with B powers
// of 1000. At most 2^62.
absl::StatusOr<uint64_t> ParseByteCount(const std::string& text);

// As ParseByteCount, or "25%" of `whole_bytes`; more than 0% and at most 100%.
absl::StatusOr<uint64_t> ParseMemoryShare(const std::string& text, uint64_t whole_bytes);

// "60s", "1m30s", "500ms", or a plain number of seconds. Not negative, at most 10 years.
absl::StatusOr<absl::Duration> ParseDuration(const std::string& text);

absl::StatusOr<uint64_t> ParseCount(const std::string& text, uint64_t min, uint64_t max);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_CONFIG_VALUES_H_
