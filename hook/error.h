// The error type of hook/: a code and a text of bounded size, in place.
//
// It allocates nothing, so that a failure can be reported also when memory is short and inside
// hf_save, which promises no allocation. Plain data, std only.
#ifndef HOLDFAST_HOOK_ERROR_H_
#define HOLDFAST_HOOK_ERROR_H_

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "hook/holdfast.h"

namespace holdfast::hook {

// Length of the longest prefix of `text` of at most `bytes_max` bytes that does not end inside a
// UTF-8 sequence.
inline size_t Utf8PrefixBytes(const char* text, size_t text_bytes, size_t bytes_max) {
  if (text_bytes <= bytes_max) return text_bytes;
  size_t end = bytes_max;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return end;
}

// HF_OK with an empty text, or a failure: what failed, the thing's name, expected and found.
class [[nodiscard]] Error {
 public:
  Error() { text_[0] = '\0'; }
  Error(hf_code code, const char* format, ...) __attribute__((format(printf, 3, 4))) : code_(code) {
    std::va_list arguments;
    va_start(arguments, format);
    char longer[sizeof(text_) + 8];
    const int length = std::vsnprintf(longer, sizeof(longer), format, arguments);
    va_end(arguments);
    const size_t written = length < 0 ? 0 : std::strlen(longer);
    const size_t kept = Utf8PrefixBytes(longer, written, sizeof(text_) - 1);
    std::memcpy(text_, longer, kept);
    text_[kept] = '\0';
  }
  Error(const Error& other) { *this = other; }
  Error& operator=(const Error& other) {
    if (this == &other) return *this;
    code_ = other.code_;
    std::memcpy(text_, other.text_, std::strlen(other.text_) + 1);
    return *this;
  }

  bool ok() const { return code_ == HF_OK; }
  hf_code code() const { return code_; }
  const char* text() const { return text_; }

 private:
  hf_code code_ = HF_OK;
  char text_[sizeof(hf_error::text)];
};

// A value or an error. value() only after ok().
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Error error) : error_(error) {
    if (error_.ok()) error_ = Error(HF_INTERNAL, "no value and no error");
  }

  bool ok() const { return value_.has_value(); }
  const Error& error() const { return error_; }
  T& value() { return *value_; }
  const T& value() const { return *value_; }

 private:
  Error error_;
  std::optional<T> value_;
};

// A name for use in an error's text: the name, or its beginning and "..." if it is long. Names may
// be 4 KiB; the text must have room for what was expected and what was found.
class ShortName {
 public:
  explicit ShortName(std::string_view name) {
    constexpr size_t kKept = sizeof(text_) - 4;
    const size_t kept = Utf8PrefixBytes(name.data(), name.size(), kKept);
    if (kept > 0) std::memcpy(text_, name.data(), kept);
    std::memcpy(text_ + kept, kept < name.size() ? "..." : "", kept < name.size() ? 4 : 1);
  }
  const char* text() const { return text_; }

 private:
  char text_[256];
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_ERROR_H_
