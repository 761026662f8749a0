// How recovery writes texts: cut to their limits, durations and numbers as people read them.
#ifndef HOLDFAST_AGENT_RECOVERY_TEXT_H_
#define HOLDFAST_AGENT_RECOVERY_TEXT_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/time/time.h"

namespace holdfast::recovery {

// Of at most so many bytes, in UTF-8: a byte that is none becomes '?', and so does a control
// character, which could change what a terminal shows.
std::string CutText(std::string_view text, size_t bytes_max);

// "0.43 s", "38 s", "2m10s", "3h05m", "4d03h".
std::string DurationText(absl::Duration duration);

// "41,200".
std::string CountText(uint64_t count);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_TEXT_H_
