// Well-formed UTF-8 (Unicode 15, table 3-7): no overlong forms, no surrogates, at most U+10FFFF.
#ifndef HOLDFAST_BASE_UTF8_H_
#define HOLDFAST_BASE_UTF8_H_

#include <cstddef>
#include <string_view>

namespace holdfast {

// Bytes (1 to 4) of the sequence that `text` begins with, or 0 if that is not well-formed or `text`
// is empty.
size_t Utf8SequenceBytes(std::string_view text);

bool IsUtf8(std::string_view text);

}  // namespace holdfast

#endif  // HOLDFAST_BASE_UTF8_H_
