// Decodes the byte code of a pickle; what the opcodes do is base/pickle_builder.h.
#include "base/pickle_reader.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <optional>
#include <span>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "base/pickle_builder.h"
#include "base/utf8.h"

namespace holdfast {
namespace {

struct NamedOpcode {
  uint8_t opcode;
  std::string_view name;
};

// Opcodes that find or call something (Lib/pickletools.py).
constexpr NamedOpcode kClassOpcodes[] = {
    {'c', "GLOBAL"},  {0x93, "STACK_GLOBAL"}, {'R', "REDUCE"},    {'b', "BUILD"},
    {0x81, "NEWOBJ"}, {0x92, "NEWOBJ_EX"},    {'Q', "BINPERSID"},
};
// Those that are refused in every case.
constexpr NamedOpcode kRefusedOpcodes[] = {
    {'i', "INST"},  {'o', "OBJ"},    {0x82, "EXT1"},        {0x83, "EXT2"},
    {0x84, "EXT4"}, {'P', "PERSID"}, {0x97, "NEXT_BUFFER"}, {0x98, "READONLY_BUFFER"},
};

std::string_view NameIn(std::span<const NamedOpcode> opcodes, uint8_t opcode) {
  for (const NamedOpcode& named : opcodes) {
    if (named.opcode == opcode) return named.name;
  }
  return "";
}

// UTF-8 in which surrogates may stand alone, as Python's "surrogatepass" writes them.
bool IsUtf8OrSurrogates(std::string_view text) {
  while (!text.empty()) {
    size_t bytes = Utf8SequenceBytes(text);
    const auto byte = [text](size_t i) { return static_cast<uint8_t>(text[i]); };
    if (bytes == 0 && text.size() >= 3 && byte(0) == 0xED && byte(1) >= 0xA0 && byte(1) <= 0xBF &&
        (byte(2) & 0xC0) == 0x80) {
      bytes = 3;
    }
    if (bytes == 0) return false;
    text.remove_prefix(bytes);
  }
  return true;
}

// How many bytes of a two's complement are needed: those at the end may only repeat the sign.
size_t NeededBytes(std::string_view integer) {
  size_t needed = integer.size();
  for (; needed > 1; --needed) {
    const bool negative = (static_cast<uint8_t>(integer[needed - 2]) & 0x80) != 0;
    if (static_cast<uint8_t>(integer[needed - 1]) != (negative ? 0xFF : 0x00)) break;
  }
  return needed;
}

// Two's complement, little-endian, of decimal digits. Quadratic, in at most
// kPickleIntegerDigitsMax digits.
std::string BytesOfDecimal(std::string_view digits, bool negative) {
  std::string bytes;
  for (const char digit : digits) {
    unsigned carry = static_cast<unsigned>(digit - '0');
    for (char& byte : bytes) {
      const unsigned sum = static_cast<uint8_t>(byte) * 10u + carry;
      byte = static_cast<char>(sum);
      carry = sum >> 8;
    }
    if (carry != 0) bytes.push_back(static_cast<char>(carry));
  }
  bytes.push_back('\0');  // the sign
  if (negative) {
    unsigned carry = 1;
    for (char& byte : bytes) {
      const unsigned sum = (static_cast<uint8_t>(byte) ^ 0xFFu) + carry;
      byte = static_cast<char>(sum);
      carry = sum >> 8;
    }
  }
  return bytes;
}

}  // namespace

static_assert(std::endian::native == std::endian::little);

// Decodes the opcodes, one after the other.
class PickleMachine {
 public:
  PickleMachine(PickleDocument& document, const PickleOptions& options)
      : document_(document),
        options_(options),
        opaque_(options.classes == PickleOptions::Classes::kOpaque),
        text_(document.text_),
        end_(document.text_.size()),
        build_(document, options) {}

  absl::Status Run() {
    if (end_ == 1 && Byte(0) == 0x80) {
      Truncated();
    } else if (end_ != 0 && Byte(0) == 0x80) {
      if (Byte(1) < 1 || Byte(1) > 5) {
        build_.Refuse(
            absl::StrFormat("expected a pickle of protocol 1 to 5, found protocol %d", Byte(1)));
      }
      at_ = 2;
    } else {
      has_header_ = false;
    }
    while (build_.ok() && !build_.stopped()) Step();
    document_.consumed_bytes_ = at_;
    if (build_.ok() && at_ != end_ && options_.following == PickleOptions::Following::kRefused) {
      build_.Refuse(absl::StrFormat("expected the end, found %d bytes more", end_ - at_));
    }
    if (!build_.ok()) return build_.status();
    document_.MakeDictsUnique();
    return absl::OkStatus();
  }

 private:
  using Type = PickleValue::Type;
  using Making = PickleValue::Making;
  using Place = PickleBuilder::Place;
  using Kwargs = PickleBuilder::Kwargs;

  uint8_t Byte(size_t at) const { return static_cast<uint8_t>(text_[at]); }
  std::string_view Text(Place place) const {
    return std::string_view(text_).substr(place.offset, place.length);
  }
  void Truncated() {
    const bool is_error = options_.following == PickleOptions::Following::kRefused;
    build_.Fail(is_error ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kOutOfRange,
                "truncated");
  }

  // The next bytes, as a little-endian number of this width; 0 after an error.
  template <typename T>
  T Number() {
    if (end_ - at_ < sizeof(T)) {
      Truncated();
      return 0;
    }
    T value = 0;
    std::memcpy(&value, text_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }
  // A length in four bytes that have a sign.
  uint64_t SignedLength() {
    const uint64_t length = Number<uint32_t>();
    if (length > INT32_MAX) build_.Refuse("expected a length that is not negative");
    return length;
  }
  // The next `length` bytes; nothing and an error if there are fewer, or after an error.
  std::optional<Place> Take(uint64_t length) {
    if (!build_.ok()) return std::nullopt;
    if (length > end_ - at_) {
      Truncated();
      return std::nullopt;
    }
    const Place place{at_, static_cast<size_t>(length)};
    at_ += place.length;
    return place;
  }
  // The text up to the next newline, at most `bytes_max`; takes the newline too.
  std::optional<Place> TakeLine(size_t bytes_max) {
    const size_t searched = std::min(end_ - at_, bytes_max + 1);
    const size_t newline = std::string_view(text_).substr(at_, searched).find('\n');
    if (newline == std::string_view::npos) {
      if (searched <= bytes_max) {
        Truncated();
      } else {
        build_.Refuse(absl::StrFormat("expected a line of at most %d bytes", bytes_max));
      }
      return std::nullopt;
    }
    const Place line{at_, newline};
    at_ += newline + 1;
    return line;
  }

  void String(uint64_t length) {
    const std::optional<Place> place = Take(length);
    if (!place.has_value()) return;
    if (opaque_ ? IsUtf8OrSurrogates(Text(*place)) : IsUtf8(Text(*place))) {
      build_.PushPlace(Type::kString, place->offset, place->length);
    } else {
      build_.Refuse("expected UTF-8");
    }
  }
  void Bytes(Type type, uint64_t length) {
    const std::optional<Place> place = Take(length);
    if (place.has_value()) build_.PushPlace(type, place->offset, place->length);
  }
  // Python 2's str: a string if it can be one.
  void OldString(uint64_t length) {
    const std::optional<Place> place = Take(length);
    if (!place.has_value()) return;
    build_.PushPlace(IsUtf8(Text(*place)) ? Type::kString : Type::kBytes, place->offset,
                     place->length);
  }

  // Two's complement of `length` bytes.
  void Long(uint64_t length) {
    const std::optional<Place> place = Take(length);
    if (!place.has_value()) return;
    const std::string_view bytes = Text(*place);
    const size_t used = NeededBytes(bytes);
    if (used > 8) return BigInteger({place->offset, used});
    uint64_t value = 0;
    for (size_t i = used; i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes[i]);
    const unsigned unused = static_cast<unsigned>(64 - 8 * used);
    build_.PushInteger(used == 0 ? 0 : static_cast<int64_t>(value << unused) >> unused);
  }
  void BigInteger(Place place) {
    if (opaque_) return build_.PushPlace(Type::kBigInteger, place.offset, place.length);
    build_.Refuse(
        absl::StrFormat("expected an integer of at most 8 bytes, found %d", place.length));
  }
  // INT (in which 00 and 01 are booleans) and LONG: decimal text.
  void DecimalInteger(bool is_long) {
    const std::optional<Place> line = TakeLine(kPickleIntegerDigitsMax + 2);
    if (!line.has_value()) return;
    std::string_view text = Text(*line);
    if (!is_long && (text == "00" || text == "01")) {
      return build_.PushBool(text == "01");
    }
    if (is_long && text.ends_with('L')) text.remove_suffix(1);
    const bool negative = text.starts_with('-');
    const std::string_view digits = negative ? text.substr(1) : text;
    if (digits.empty() || digits.size() > kPickleIntegerDigitsMax ||
        digits.find_first_not_of("0123456789") != std::string_view::npos) {
      return build_.Refuse(
          absl::StrFormat("expected an integer of at most %d digits", kPickleIntegerDigitsMax));
    }
    int64_t value = 0;
    if (std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc()) {
      return build_.PushInteger(value);
    }
    std::string bytes = BytesOfDecimal(digits, negative);
    bytes.resize(NeededBytes(bytes));
    const size_t offset = document_.text_.size();
    document_.text_ += bytes;
    BigInteger({offset, bytes.size()});
  }
  void DecimalFloat() {
    const std::optional<Place> line = TakeLine(kPickleIntegerDigitsMax);
    if (!line.has_value()) return;
    const std::string_view text = Text(*line);
    double value = 0;
    if (!absl::SimpleAtod(absl::string_view(text.data(), text.size()), &value)) {
      return build_.Refuse("expected a number");
    }
    build_.PushDouble(value);
  }
  void BinFloat() {
    uint64_t bits = 0;  // big-endian, as nothing else is
    for (int i = 0; i < 8; ++i) bits = bits << 8 | Number<uint8_t>();
    build_.PushDouble(std::bit_cast<double>(bits));
  }

  // PUT and GET: the key in decimal.
  void DecimalMemo(bool is_put) {
    if (!has_header_) return RefuseProtocol0();
    const std::optional<Place> line = TakeLine(20);
    if (!line.has_value()) return;
    const std::string_view text = Text(*line);
    uint64_t key = 0;
    const auto parsed = std::from_chars(text.data(), text.data() + text.size(), key);
    if (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size()) {
      return build_.Refuse("expected a number to remember by");
    }
    is_put ? build_.Remember(key) : build_.Recall(key);
  }
  void RefuseProtocol0() {
    build_.Refuse("expected a pickle of protocol 1 to 5, found protocol 0");
  }

  void Global() {
    const std::optional<Place> module = TakeLine(kPickleNameBytesMax);
    const std::optional<Place> name =
        module.has_value() ? TakeLine(kPickleNameBytesMax) : std::nullopt;
    if (name.has_value()) PushGlobal(*module, *name);
  }
  void StackGlobal() {
    const auto names = build_.TakeNames();
    if (names.has_value()) PushGlobal(names->first, names->second);
  }
  void PushGlobal(Place module, Place name) {
    if (!IsUtf8(Text(module)) || !IsUtf8(Text(name))) return build_.Refuse("expected UTF-8");
    build_.PushGlobal(module, name);
  }

  void Step() {
    build_.Begin(at_);
    if (at_ == end_) return Truncated();
    const uint8_t opcode = Byte(at_++);
    // Most opcodes of a large pickle remember and recall.
    if (MemoStep(opcode) || ConstantStep(opcode) || ContainerStep(opcode)) return;
    if (opaque_ && ClassStep(opcode)) return;
    if (opcode == 'S' || opcode == 'V' || (opcode == 'P' && !has_header_)) return RefuseProtocol0();
    if (const std::string_view name = NameIn(kRefusedOpcodes, opcode); !name.empty()) {
      return build_.Forbid(absl::StrFormat(
          "%s is not read: what it stands for is not in the pickle, or could run code", name));
    }
    if (const std::string_view name = NameIn(kClassOpcodes, opcode); !name.empty()) {
      return build_.Forbid(absl::StrFormat("%s could run code: only plain values are read", name));
    }
    build_.Refuse(absl::StrFormat("opcode %02x is none that is read", opcode));
  }

  // Each of these returns whether the opcode was one of its own.
  bool ConstantStep(uint8_t opcode) {
    switch (opcode) {
      case 'N':
        build_.PushEmpty(Type::kNone);
        break;
      case 0x88:
      case 0x89:
        build_.PushBool(opcode == 0x88);
        break;
      case 'J':  // BININT: the only signed one
        build_.PushInteger(Number<int32_t>());
        break;
      case 'K':
        build_.PushInteger(Number<uint8_t>());
        break;
      case 'M':
        build_.PushInteger(Number<uint16_t>());
        break;
      case 0x8a:
        Long(Number<uint8_t>());
        break;
      case 0x8b:
        Long(SignedLength());
        break;
      case 'I':
      case 'L':
        DecimalInteger(opcode == 'L');
        break;
      case 'F':
        DecimalFloat();
        break;
      case 'G':
        BinFloat();
        break;
      case 'X':
        String(Number<uint32_t>());
        break;
      case 0x8c:
        String(Number<uint8_t>());
        break;
      case 0x8d:
        String(Number<uint64_t>());
        break;
      case 'T':
        OldString(SignedLength());
        break;
      case 'U':
        OldString(Number<uint8_t>());
        break;
      case 'B':
        Bytes(Type::kBytes, Number<uint32_t>());
        break;
      case 'C':
        Bytes(Type::kBytes, Number<uint8_t>());
        break;
      case 0x8e:
        Bytes(Type::kBytes, Number<uint64_t>());
        break;
      case 0x96:
        Bytes(Type::kByteArray, Number<uint64_t>());
        break;
      default:
        return false;
    }
    return true;
  }

  bool ContainerStep(uint8_t opcode) {
    switch (opcode) {
      case '(':
        build_.Mark();
        break;
      case '0':
        build_.PopAny();
        break;
      case '1':
        build_.PopToMark();
        break;
      case '2':
        build_.Duplicate();
        break;
      case ']':
        build_.PushEmpty(Type::kList);
        break;
      case ')':
        build_.PushEmptyTuple();
        break;
      case '}':
        build_.PushEmpty(Type::kDict);
        break;
      case 0x8f:
        build_.PushEmpty(Type::kSet);
        break;
      case 'l':
        build_.MakeFromMark(Type::kList);
        break;
      case 't':
        build_.MakeFromMark(Type::kTuple);
        break;
      case 'd':
        build_.MakeFromMark(Type::kDict);
        break;
      case 0x91:
        build_.MakeFromMark(Type::kFrozenSet);
        break;
      case 0x85:
      case 0x86:
      case 0x87:
        build_.MakeTuple(opcode - 0x84u);
        break;
      case 'a':
        build_.AddTop(Type::kList, 1);
        break;
      case 'e':
        build_.AddMarked(Type::kList);
        break;
      case 's':
        build_.AddTop(Type::kDict, 2);
        break;
      case 'u':
        build_.AddMarked(Type::kDict);
        break;
      case 0x90:
        build_.AddToSet();
        break;
      default:
        return false;
    }
    return true;
  }

  bool MemoStep(uint8_t opcode) {
    switch (opcode) {
      case 'q':
        build_.Remember(Number<uint8_t>());
        break;
      case 'r':
        build_.Remember(Number<uint32_t>());
        break;
      case 0x94:
        build_.RememberNext();
        break;
      case 'h':
        build_.Recall(Number<uint8_t>());
        break;
      case 'j':
        build_.Recall(Number<uint32_t>());
        break;
      case 'p':
      case 'g':
        DecimalMemo(opcode == 'p');
        break;
      case 0x95:  // FRAME: how much to read ahead
        if (Number<uint64_t>() > end_ - at_) Truncated();
        break;
      case '.':
        build_.Stop();
        break;
      default:
        return false;
    }
    return true;
  }

  bool ClassStep(uint8_t opcode) {
    switch (opcode) {
      case 'c':
        Global();
        break;
      case 0x93:
        StackGlobal();
        break;
      case 'R':
        build_.MakeObject(Making::kReduce, Kwargs::kNone);
        break;
      case 0x81:
        build_.MakeObject(Making::kNew, Kwargs::kNone);
        break;
      case 0x92:
        build_.MakeObject(Making::kNew, Kwargs::kTopmost);
        break;
      case 'b':
        build_.Build();
        break;
      case 'Q':
        build_.BinPersid();
        break;
      default:
        return false;
    }
    return true;
  }

  PickleDocument& document_;
  const PickleOptions options_;
  const bool opaque_;
  const std::string& text_;  // grows: see DecimalInteger
  const size_t end_;         // of the bytes that were given
  size_t at_ = 0;
  bool has_header_ = true;
  PickleBuilder build_;
};

absl::StatusOr<std::unique_ptr<PickleDocument>> PickleDocument::Parse(
    std::string bytes, const PickleOptions& options) {
  const size_t bytes_max = std::min(options.bytes_max, size_t{1} << 30);
  if (bytes.size() > bytes_max) {
    return absl::InvalidArgumentError(
        absl::StrFormat("pickle: expected at most %d bytes, found %d", bytes_max, bytes.size()));
  }
  std::unique_ptr<PickleDocument> document(new PickleDocument);
  document->text_ = std::move(bytes);
  if (absl::Status status = PickleMachine(*document, options).Run(); !status.ok()) return status;
  return document;
}

}  // namespace holdfast
