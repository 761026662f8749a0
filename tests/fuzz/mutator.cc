#include "tests/fuzz/mutator.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"
#include "hook/abi/messages.h"

namespace holdfast::fuzz {
namespace {

constexpr size_t kInputBytesMax = 64 << 10;
constexpr size_t kEditsMax = 8;

uint32_t CrcOf(std::string_view bytes) { return Crc32c(std::as_bytes(std::span(bytes))); }

void Store(std::string& input, size_t at, uint64_t value, size_t bytes) {
  for (size_t i = 0; i < bytes && at + i < input.size(); ++i) {
    input[at + i] = static_cast<char>(value >> (8 * i));
  }
}

// The last line `"crc32c": "00000000"}`.
std::string SealText(std::string input) {
  const size_t seal_bytes = sizeof("\"crc32c\": \"00000000\"}\n") - 1;
  if (input.size() < seal_bytes) return input;
  input.resize(input.size() - seal_bytes);
  return absl::StrCat(input, absl::StrFormat("\"crc32c\": \"%08x\"}\n", CrcOf(input)));
}

// docs/FORMAT.md: the bytes of the file at 16; the CRC32C and its inverse at the end.
std::string SealIndex(std::string input) {
  if (input.size() < 24 + 8) return input;
  Store(input, 16, input.size(), 8);
  const uint32_t crc = CrcOf(std::string_view(input).substr(0, input.size() - 8));
  Store(input, input.size() - 8, crc, 4);
  Store(input, input.size() - 4, ~crc, 4);
  return input;
}

// checkpoint/image_record.cc: the header's checksum at 64; two copies a slot from 128 on, 1624
// bytes each, their checksum in the last 8 over what is before, the registration and the slot.
std::string SealImageRecord(std::string input) {
  constexpr size_t kHeaderCrc = 64;
  constexpr size_t kSlots = 128;
  constexpr size_t kCopyBytes = 1624;
  if (input.size() < kSlots) return input;
  Store(input, kHeaderCrc, CrcOf(std::string_view(input).substr(0, kHeaderCrc)), 8);
  uint64_t registration_id = 0;
  std::memcpy(&registration_id, input.data() + 32, 8);
  uint32_t slot_count = 0;
  std::memcpy(&slot_count, input.data() + 12, 4);
  for (uint64_t copy = 0; copy < 2 * uint64_t{slot_count}; ++copy) {
    const size_t at = kSlots + copy * kCopyBytes;
    if (at + kCopyBytes > input.size()) break;
    const uint64_t place[2] = {registration_id, copy / 2};
    const uint32_t crc = ExtendCrc32c(CrcOf(std::string_view(input).substr(at, kCopyBytes - 8)),
                                      std::as_bytes(std::span(place)));
    Store(input, at + kCopyBytes - 8, crc, 8);
  }
  return input;
}

// hook/abi/messages.h: the bytes of the document at 8, those of the layout, which is its end,
// at 24.
std::string SealRegistration(std::string input) {
  if (input.size() < sizeof(abi::RegistrationDocument)) return input;
  Store(input, 8, input.size(), 8);
  uint64_t layout_offset = 0;
  std::memcpy(&layout_offset, input.data() + 16, 8);
  if (layout_offset <= input.size()) Store(input, 24, input.size() - layout_offset, 8);
  return input;
}

bool IsText(Form form) { return form == Form::kText || form == Form::kSealedText; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

constexpr uint64_t kExtremes[] = {0,
                                  1,
                                  2,
                                  0xFF,
                                  0x7FFFFFFF,
                                  0xFFFFFFFF,
                                  uint64_t{1} << 20,
                                  uint64_t{1} << 32,
                                  uint64_t{1} << 53,
                                  uint64_t{1} << 62,
                                  INT64_MAX,
                                  UINT64_MAX - 7,
                                  UINT64_MAX};
constexpr std::string_view kTextExtremes[] = {"0",
                                              "1",
                                              "-1",
                                              "3",
                                              "65536",
                                              "1048576",
                                              "4294967295",
                                              "4294967296",
                                              "1e400",
                                              "4611686018427387904",
                                              "9223372036854775807",
                                              "18446744073709551615",
                                              "18446744073709551616",
                                              "null",
                                              "[]",
                                              "{}",
                                              "\"\""};

// [begin, end) of the digits around or behind `at`; empty if there are none.
std::pair<size_t, size_t> NumberNear(const std::string& input, size_t at) {
  while (at < input.size() && !IsDigit(input[at])) ++at;
  size_t begin = at;
  while (begin > 0 && IsDigit(input[begin - 1])) --begin;
  while (at < input.size() && IsDigit(input[at])) ++at;
  return {begin, at};
}

// [begin, end) of the JSON value in brackets, braces or quotes that begins at or behind `at`.
std::pair<size_t, size_t> ValueNear(const std::string& input, size_t at) {
  const size_t begin = input.find_first_of("[{\"", at);
  if (begin == std::string::npos) return {input.size(), input.size()};
  if (input[begin] == '"') {
    const size_t end = input.find('"', begin + 1);
    return {begin, end == std::string::npos ? input.size() : end + 1};
  }
  size_t depth = 0;
  for (size_t i = begin; i < input.size(); ++i) {
    if (input[i] == '[' || input[i] == '{') ++depth;
    if ((input[i] == ']' || input[i] == '}') && --depth == 0) return {begin, i + 1};
  }
  return {begin, input.size()};
}

void EnumerateNumbers(Form form, const std::string& seed, const Visit& visit) {
  if (IsText(form)) {
    for (size_t at = 0; at < seed.size();) {
      const auto [begin, end] = NumberNear(seed, at);
      if (begin == end) return;
      for (const std::string_view extreme : kTextExtremes) {
        visit(Sealed(form,
                     absl::StrCat(seed.substr(0, begin), std::string(extreme), seed.substr(end))),
              absl::StrFormat("the number at %d is %s", begin, std::string(extreme)));
      }
      at = end;
    }
    return;
  }
  for (size_t at = 0; at < seed.size(); at += 4) {
    for (const uint64_t extreme : kExtremes) {
      for (const size_t bytes : {size_t{4}, size_t{8}}) {
        std::string input = seed;
        Store(input, at, extreme, bytes);
        visit(Sealed(form, std::move(input)),
              absl::StrFormat("the %d bytes at %d are %d", bytes, at, extreme));
      }
    }
  }
}

}  // namespace

std::string Sealed(Form form, std::string input) {
  switch (form) {
    case Form::kBinary:
    case Form::kText:
      return input;
    case Form::kSealedText:
      return SealText(std::move(input));
    case Form::kIndex:
      return SealIndex(std::move(input));
    case Form::kImageRecord:
      return SealImageRecord(std::move(input));
    case Form::kRegistration:
      return SealRegistration(std::move(input));
  }
  return input;
}

void EnumerateMutations(Form form, const std::string& seed, const Visit& visit) {
  visit(seed, "as it is");
  for (size_t bytes = 0; bytes < seed.size(); ++bytes) {
    visit(Sealed(form, seed.substr(0, bytes)), absl::StrFormat("cut off after %d bytes", bytes));
  }
  for (size_t at = 0; at < seed.size(); ++at) {
    for (const uint8_t bits : {0x01, 0x80, 0x40}) {
      std::string input = seed;
      input[at] = static_cast<char>(input[at] ^ bits);
      visit(Sealed(form, std::move(input)), absl::StrFormat("byte %d xor 0x%02x", at, bits));
    }
  }
  EnumerateNumbers(form, seed, visit);
}

std::string Mutator::Next() {
  std::string input = seeds_[Below(seeds_.size())];
  // Mostly one: few documents survive several.
  size_t edits = 1;
  while (edits < kEditsMax && Below(3) == 0) ++edits;
  for (; edits > 0; --edits) {
    const bool has_text = IsText(form_) || form_ == Form::kRegistration;
    if (has_text && Below(4) != 0) {
      EditText(input);
    } else {
      Edit(input);
    }
  }
  if (input.size() > kInputBytesMax) input.resize(kInputBytesMax);
  return Sealed(form_, std::move(input));
}

// Bytes of any kind.
void Mutator::Edit(std::string& input) {
  const size_t at = Below(input.size());
  const size_t bytes = Below(std::min<size_t>(input.size() - at, 64) + 1);
  switch (Below(6)) {
    case 0:
      if (!input.empty()) input[at] = static_cast<char>(random_());
      return;
    case 1: {
      const uint64_t extreme = kExtremes[Below(std::size(kExtremes))];
      Store(input, at / 4 * 4, extreme, size_t{1} << Below(4));
      return;
    }
    case 2:
      input.erase(at, bytes);
      return;
    case 3:
      input.insert(Below(input.size() + 1), input.substr(at, bytes));
      return;
    case 4: {  // the end of another one
      const std::string& other = seeds_[Below(seeds_.size())];
      input = input.substr(0, at) + other.substr(std::min(other.size(), at));
      return;
    }
    default:
      if (input.size() > 1) input.resize(1 + at);
      return;
  }
}

// Values of JSON.
void Mutator::EditText(std::string& input) {
  const auto [begin, end] = ValueNear(input, Below(input.size() + 1));
  switch (Below(5)) {
    case 0: {
      const auto [first, last] = NumberNear(input, Below(input.size() + 1));
      input.replace(first, last - first,
                    std::string(kTextExtremes[Below(std::size(kTextExtremes))]));
      return;
    }
    case 1:  // takes the place of another one
      if (const auto [first, last] = ValueNear(input, Below(input.size() + 1)); first < last) {
        const std::string value = input.substr(begin, end - begin);
        input.replace(first, last - first, value);
      }
      return;
    case 2: {  // once more
      const std::string value = input.substr(begin, end - begin);
      input.insert(end, absl::StrCat(",", value));
      return;
    }
    case 3:
      input.erase(begin, std::min(input.size(), end + 1) - begin);
      return;
    default: {  // one of another seed
      const std::string& other = seeds_[Below(seeds_.size())];
      const auto [first, last] = ValueNear(other, Below(other.size() + 1));
      input.replace(begin, end - begin, other.substr(first, last - first));
      return;
    }
  }
}

}  // namespace holdfast::fuzz
