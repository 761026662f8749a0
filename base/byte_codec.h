// Bytes that pass between processes and files of ours: LEB128 varints in the order of the fields,
// between a magic with a version and a CRC32C. Encoder and decoder walk the same description of the
// fields (a template over ByteWriter and ByteReader), so they cannot disagree.
#ifndef HOLDFAST_BASE_BYTE_CODEC_H_
#define HOLDFAST_BASE_BYTE_CODEC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {

// CHECKs that every value is within its limit: what does not fit was to be cut before.
class ByteWriter {
 public:
  explicit ByteWriter(std::string* out) : out_(*out) {}

  template <typename T>
  void Number(std::string_view, T& value, uint64_t max = std::numeric_limits<T>::max()) {
    CHECK(static_cast<uint64_t>(value) <= max);
    Put(static_cast<uint64_t>(value));
  }
  template <typename T>
  void Enumerator(std::string_view what, T& value, size_t count) {
    uint64_t number = static_cast<uint64_t>(value);
    Number(what, number, count - 1);
  }
  void Signed(std::string_view, int32_t& value) {
    const auto wide = static_cast<int64_t>(value);
    Put((static_cast<uint64_t>(wide) << 1) ^ static_cast<uint64_t>(wide >> 63));
  }
  void Text(std::string_view what, std::string& text, size_t bytes_max) {
    uint64_t size = text.size();
    Number(what, size, bytes_max);
    out_ += text;
  }
  template <typename T>
  void Length(std::string_view what, std::vector<T>& list, size_t max) {
    uint64_t size = list.size();
    Number(what, size, max);
  }

 private:
  void Put(uint64_t value) {
    for (; value >= 0x80; value >>= 7) out_ += static_cast<char>(0x80 | (value & 0x7F));
    out_ += static_cast<char>(value);
  }
  std::string& out_;
};

// How many bytes ByteWriter would write, also of what is beyond its limits.
class ByteSizer {
 public:
  size_t bytes() const { return bytes_; }

  template <typename T>
  void Number(std::string_view, T& value, uint64_t = 0) {
    for (auto left = static_cast<uint64_t>(value); left >= 0x80; left >>= 7) ++bytes_;
    ++bytes_;
  }
  template <typename T>
  void Enumerator(std::string_view, T&, size_t) {
    ++bytes_;
  }
  void Signed(std::string_view what, int32_t& value) {
    const auto wide = static_cast<int64_t>(value);
    uint64_t number = (static_cast<uint64_t>(wide) << 1) ^ static_cast<uint64_t>(wide >> 63);
    Number(what, number);
  }
  void Text(std::string_view what, std::string& text, size_t) {
    size_t size = text.size();
    Number(what, size);
    bytes_ += text.size();
  }
  template <typename T>
  void Length(std::string_view what, std::vector<T>& list, size_t) {
    size_t size = list.size();
    Number(what, size);
  }

 private:
  size_t bytes_ = 0;
};

// Strict: the shortest form of every number, known enumerators, lengths within the limits, no byte
// left over (Finish). After the first error every value is zero, and Finish says what was wrong.
class ByteReader {
 public:
  // `name`: of what is read, the first word of every error. Refers to `bytes`.
  ByteReader(std::string_view name, std::span<const std::byte> bytes)
      : name_(name), bytes_(bytes) {}

  template <typename T>
  void Number(std::string_view what, T& value, uint64_t max = std::numeric_limits<T>::max()) {
    const uint64_t found = Get(what);
    if (status_.ok() && found > max) {
      status_ = absl::InvalidArgumentError(
          absl::StrFormat("%s: %s: expected at most %d, found %d", name_, what, max, found));
    }
    value = status_.ok() ? static_cast<T>(found) : T{};
  }
  template <typename T>
  void Enumerator(std::string_view what, T& value, size_t count) {
    uint64_t number = 0;
    Number(what, number, count - 1);
    value = static_cast<T>(number);
  }
  void Signed(std::string_view what, int32_t& value) {
    uint64_t found = 0;
    Number(what, found, std::numeric_limits<uint32_t>::max());
    value =
        static_cast<int32_t>(static_cast<int64_t>(found >> 1) ^ -static_cast<int64_t>(found & 1));
  }
  void Text(std::string_view what, std::string& text, size_t bytes_max) {
    uint64_t size = 0;
    Number(what, size, bytes_max);
    if (size > bytes_.size()) return Truncated(what);
    text.resize(size);
    std::transform(bytes_.begin(), bytes_.begin() + static_cast<ptrdiff_t>(size), text.begin(),
                   [](std::byte byte) { return static_cast<char>(byte); });
    bytes_ = bytes_.subspan(size);
  }
  template <typename T>
  void Length(std::string_view what, std::vector<T>& list, size_t max) {
    uint64_t size = 0;
    Number(what, size, max);
    // Every element takes a byte at least: a length that lies cannot make us allocate much.
    if (size > bytes_.size()) return Truncated(what);
    list.resize(size);
  }
  bool ok() const { return status_.ok(); }
  absl::Status Finish() {
    if (status_.ok() && !bytes_.empty()) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s: expected the end of the body, found %d bytes", name_, bytes_.size()));
    }
    return status_;
  }

 private:
  void Truncated(std::string_view what) {
    if (status_.ok()) {
      status_ = absl::DataLossError(
          absl::StrFormat("%s: %s: truncated with %d bytes left", name_, what, bytes_.size()));
    }
  }
  uint64_t Get(std::string_view what) {
    uint64_t value = 0;
    for (unsigned shift = 0; status_.ok(); shift += 7) {
      if (bytes_.empty()) {
        Truncated(what);
        break;
      }
      const auto byte = static_cast<uint64_t>(bytes_.front());
      bytes_ = bytes_.subspan(1);
      // The tenth byte holds one bit; a last byte of 0 is not the shortest form.
      if ((shift == 63 && byte > 1) || (shift > 0 && byte == 0)) {
        status_ = absl::InvalidArgumentError(
            absl::StrFormat("%s: %s: expected the shortest form of 64 bits", name_, what));
        break;
      }
      value |= (byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    return 0;
  }

  const std::string_view name_;
  std::span<const std::byte> bytes_;
  absl::Status status_;
};

// What stands around the fields: four bytes of magic, the version as one byte, the fields, and the
// CRC32C of all before it.
struct Envelope {
  std::string_view name;   // first word of every error
  std::string_view magic;  // 4 bytes
  uint8_t version = 0;     // below 0x80
  size_t bytes_max = 0;
};

inline constexpr size_t kEnvelopeBytes = 9;

// `bytes`: empty; the fields follow.
void OpenEnvelope(const Envelope& envelope, std::string& bytes);
// CHECKs bytes_max.
void SealEnvelope(const Envelope& envelope, std::string& bytes);
// The fields. Errors: kInvalidArgument (too long), kDataLoss (truncated, another magic or
// checksum), kUnimplemented (another version).
absl::StatusOr<std::span<const std::byte>> FieldsIn(const Envelope& envelope,
                                                    std::span<const std::byte> bytes);

}  // namespace holdfast

#endif  // HOLDFAST_BASE_BYTE_CODEC_H_
