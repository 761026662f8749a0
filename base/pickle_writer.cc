#include "base/pickle_writer.h"

#include <bit>
#include <utility>

#include "base/check.h"

namespace holdfast {
namespace {

// Longer strings are rarely written twice, and the memo keeps a copy.
constexpr size_t kRememberedStringMax = 1024;

}  // namespace

PickleWriter::PickleWriter() : bytes_("\x80\x02") {}

void PickleWriter::Pop(size_t count) {
  CHECK(depth_ >= count);
  depth_ -= count;
}

size_t PickleWriter::PopToMark() {
  CHECK(!marks_.empty());
  const size_t count = depth_;
  depth_ = marks_.back();
  marks_.pop_back();
  return count;
}

void PickleWriter::LittleEndian(uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) Byte(static_cast<char>(value >> (8 * i)));
}

void PickleWriter::None() {
  Byte('N');
  Push();
}

void PickleWriter::Bool(bool value) {
  Byte(value ? '\x88' : '\x89');
  Push();
}

void PickleWriter::Int(int64_t value) {
  if (value >= 0 && value <= 0xff) {
    Byte('K');
    LittleEndian(static_cast<uint64_t>(value), 1);
  } else if (value >= 0 && value <= 0xffff) {
    Byte('M');
    LittleEndian(static_cast<uint64_t>(value), 2);
  } else if (value >= INT32_MIN && value <= INT32_MAX) {
    Byte('J');
    LittleEndian(static_cast<uint64_t>(value), 4);
  } else {
    // LONG1: as few bytes of two's complement as keep the sign.
    const uint64_t magnitude = static_cast<uint64_t>(value < 0 ? ~value : value);
    const int bytes = std::bit_width(magnitude) / 8 + 1;
    Byte('\x8a');
    Byte(static_cast<char>(bytes));
    LittleEndian(static_cast<uint64_t>(value), bytes);
  }
  Push();
}

void PickleWriter::BigInteger(std::string_view bytes) {
  CHECK(bytes.size() <= INT32_MAX);
  const bool is_short = bytes.size() <= 0xff;
  Byte(is_short ? '\x8a' : '\x8b');  // LONG1, LONG4
  LittleEndian(bytes.size(), is_short ? 1 : 4);
  bytes_.append(bytes);
  Push();
}

void PickleWriter::Float(double value) {
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  Byte('G');
  for (int shift = 56; shift >= 0; shift -= 8) Byte(static_cast<char>(bits >> shift));
  Push();
}

void PickleWriter::String(std::string_view text) {
  CHECK(text.size() <= UINT32_MAX);
  if (const auto known = strings_.find(std::string(text)); known != strings_.end()) {
    Recall(known->second);
    return;
  }
  Byte('X');
  LittleEndian(text.size(), 4);
  bytes_.append(text);
  Push();
  if (text.size() <= kRememberedStringMax) strings_.emplace(text, Remember());
}

void PickleWriter::Bytes(std::string_view bytes) {
  if (bytes.empty()) {
    Global("__builtin__", "bytes");
    Tuple(0);
  } else {
    std::string latin1;  // every byte as the character of that number, in UTF-8
    latin1.reserve(bytes.size() * 3 / 2);
    for (const char c : bytes) {
      const auto byte = static_cast<unsigned char>(c);
      if (byte < 0x80) {
        latin1.push_back(c);
      } else {
        latin1.push_back(static_cast<char>(0xc0 | byte >> 6));
        latin1.push_back(static_cast<char>(0x80 | (byte & 0x3f)));
      }
    }
    Global("_codecs", "encode");
    String(latin1);
    String("latin1");
    Tuple(2);
  }
  Reduce();
}

void PickleWriter::Global(std::string_view module, std::string_view name) {
  CHECK(module.find('\n') == std::string_view::npos && name.find('\n') == std::string_view::npos);
  std::string lines;
  lines.append(module).append("\n").append(name).append("\n");
  if (const auto known = globals_.find(lines); known != globals_.end()) {
    Recall(known->second);
    return;
  }
  Byte('c');
  bytes_.append(lines);
  Push();
  globals_.emplace(std::move(lines), Remember());
}

void PickleWriter::Mark() {
  Byte('(');
  marks_.push_back(depth_);
  depth_ = 0;
}

void PickleWriter::Tuple() {
  PopToMark();
  Byte('t');
  Push();
}

void PickleWriter::Tuple(size_t size) {
  CHECK(size <= 3);
  Pop(size);
  Byte(size == 0 ? ')' : static_cast<char>(0x84 + size));
  Push();
}

void PickleWriter::EmptyList() {
  Byte(']');
  Push();
}

void PickleWriter::Appends() {
  PopToMark();
  CHECK(depth_ > 0);
  Byte('e');
}

void PickleWriter::EmptyDict() {
  Byte('}');
  Push();
}

void PickleWriter::SetItems() {
  CHECK(PopToMark() % 2 == 0);
  CHECK(depth_ > 0);
  Byte('u');
}

void PickleWriter::Reduce() {
  Pop(2);
  Byte('R');
  Push();
}

void PickleWriter::NewObject() {
  Pop(2);
  Byte('\x81');
  Push();
}

void PickleWriter::Build() {
  Pop(2);
  Byte('b');
  Push();
}

void PickleWriter::PersistentId() {
  Pop(1);
  Byte('Q');
  Push();
}

uint32_t PickleWriter::Remember() {
  CHECK(depth_ > 0);
  CHECK(memo_count_ < UINT32_MAX);
  const uint32_t number = memo_count_++;
  if (number <= 0xff) {
    Byte('q');
    LittleEndian(number, 1);
  } else {
    Byte('r');
    LittleEndian(number, 4);
  }
  return number;
}

void PickleWriter::Recall(uint32_t number) {
  CHECK(number < memo_count_);
  if (number <= 0xff) {
    Byte('h');
    LittleEndian(number, 1);
  } else {
    Byte('j');
    LittleEndian(number, 4);
  }
  Push();
}

std::string PickleWriter::Finish() && {
  CHECK(marks_.empty() && depth_ == 1);
  Byte('.');
  return std::move(bytes_);
}

}  // namespace holdfast
