#include "format/fingerprint.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "format/fingerprint_field.h"

namespace holdfast {
namespace {

using fingerprint_kernel::kBlockWords;
using fingerprint_kernel::kOuterGroupBlocks;
using fingerprint_kernel::kSumCount;

constexpr uint64_t kWordBytes = 4;
constexpr uint64_t kBlockBytes = kBlockWords * kWordBytes;

Fingerprinter::Kernel FastestKernel() {
  return Fingerprinter::Supports(Fingerprinter::Kernel::kAvx2) ? Fingerprinter::Kernel::kAvx2
                                                               : Fingerprinter::Kernel::kPortable;
}

// Adds value * v[i] to a sum, v the coefficients of dtype and shape.
class ShapeSum {
 public:
  void Add(uint32_t value) {
    const ChaChaBlock block = KeyStream(fingerprint_kernel::Purpose::kShape, next_ / kSumCount);
    const absl::uint128 v = fingerprint_kernel::FieldElement(block, next_ % kSumCount);
    sum_ = fingerprint_field::Add(sum_, fingerprint_field::Multiply(value, v));
    ++next_;
  }
  absl::uint128 sum() const { return sum_; }

 private:
  size_t next_ = 0;
  absl::uint128 sum_ = 0;
};

// Calls `run(position, bytes)` for every run of bytes that lie one behind the other in the tensor,
// at `position` of its row-major order, among bytes [begin, end) of the row-major order of the box.
template <typename Run>
void ForRuns(BoxView box, std::span<const uint64_t> shape, uint64_t element_bytes, uint64_t begin,
             uint64_t end, Run run) {
  if (begin == end) return;
  if (const std::optional<uint64_t> start = ContiguousStart(box, shape); start.has_value()) {
    run(*start * element_bytes + begin, end - begin);
    return;
  }
  // A run is a row: all of the box in the dimensions from `row` on, of which the box spans all but
  // the first.
  size_t row = shape.size() - 1;
  uint64_t row_stride = element_bytes;  // of dimension `row`
  while (box.size[row] == shape[row]) row_stride *= shape[row--];
  const uint64_t row_bytes = box.size[row] * row_stride;
  while (begin < end) {
    const uint64_t within = begin % row_bytes;
    uint64_t number = begin / row_bytes;
    uint64_t position = box.lo[row] * row_stride + within;
    uint64_t stride = row_stride;
    for (size_t d = row; d-- > 0;) {
      stride *= shape[d + 1];
      position += (box.lo[d] + number % box.size[d]) * stride;
      number /= box.size[d];
    }
    const uint64_t count = std::min(row_bytes - within, end - begin);
    run(position, count);
    begin += count;
  }
}

}  // namespace

Fingerprint::Fingerprint(absl::uint128 value) : value_(value) {
  CHECK(value < fingerprint_field::kPrime);
}

std::optional<Fingerprint> Fingerprint::FromBytes(std::span<const std::byte, 16> bytes) {
  absl::uint128 value = 0;
  for (size_t i = bytes.size(); i-- > 0;) value = (value << 8) | std::to_integer<uint8_t>(bytes[i]);
  if (value >= fingerprint_field::kPrime) return std::nullopt;
  return Fingerprint(value);
}

std::array<std::byte, 16> Fingerprint::Bytes() const {
  std::array<std::byte, 16> bytes;
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(absl::Uint128Low64(value_ >> static_cast<int>(8 * i)));
  }
  return bytes;
}

std::string Fingerprint::Hex() const {
  return absl::StrFormat("%016x%016x", absl::Uint128High64(value_), absl::Uint128Low64(value_));
}

Fingerprint& Fingerprint::operator+=(const Fingerprint& other) {
  value_ = fingerprint_field::Add(value_, other.value_);
  return *this;
}

Fingerprint FingerprintOfShape(const TensorState& tensor_state) {
  ShapeSum sum;
  sum.Add(static_cast<uint32_t>(tensor_state.dtype) +
          256 * static_cast<uint32_t>(tensor_state.shape.size()));
  for (const uint64_t extent : tensor_state.shape) {
    sum.Add(static_cast<uint32_t>(extent));
    sum.Add(static_cast<uint32_t>(extent >> 32));
  }
  return Fingerprint(sum.sum());
}

bool Fingerprinter::Supports(Kernel kernel) {
  return kernel == Kernel::kPortable || __builtin_cpu_supports("avx2");
}

Fingerprinter::Fingerprinter() : Fingerprinter(FastestKernel()) {}

Fingerprinter::Fingerprinter(Kernel kernel)
    : add_words_(kernel == Kernel::kAvx2 ? fingerprint_kernel::AddWordsAvx2
                                         : fingerprint_kernel::AddWordsPortable),
      make_outer_(kernel == Kernel::kAvx2 ? fingerprint_kernel::MakeOuterAvx2
                                          : fingerprint_kernel::MakeOuterPortable) {
  CHECK(Supports(kernel));
}

Fingerprint Fingerprinter::OfRun(const TensorState& tensor_state, uint64_t first_byte,
                                 std::span<const std::byte> bytes) {
  CHECK(first_byte <= tensor_state.Bytes() && bytes.size() <= tensor_state.Bytes() - first_byte);
  AddBytes(first_byte, bytes);
  return TakeSum();
}

Fingerprint Fingerprinter::OfPiece(const TensorState& tensor_state, const Piece& piece,
                                   const BoxTable& boxes, uint64_t skip_bytes,
                                   std::span<const std::byte> bytes) {
  const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
  const uint64_t piece_bytes = piece.ElementCount() * element_bytes;
  CHECK(skip_bytes <= piece_bytes && bytes.size() <= piece_bytes - skip_bytes);
  const uint64_t begin = piece.begin * element_bytes + skip_bytes;
  if (piece.box == kWholeTensor) return OfRun(tensor_state, begin, bytes);
  ForRuns(boxes[piece.box], tensor_state.shape, element_bytes, begin, begin + bytes.size(),
          [&](uint64_t position, uint64_t count) {
            AddBytes(position, bytes.first(count));
            bytes = bytes.subspan(count);
          });
  return TakeSum();
}

// `position` of the first byte among the bytes of the tensor.
void Fingerprinter::AddBytes(uint64_t position, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const uint64_t block = position / kBlockBytes;
    if (block != block_) {
      FinishBlock();
      block_ = block;
    }
    const size_t count = std::min<uint64_t>(bytes.size(), kBlockBytes - position % kBlockBytes);
    AddBytesOfBlock(position % kBlockBytes, bytes.first(count));
    bytes = bytes.subspan(count);
    position += count;
  }
}

void Fingerprinter::AddBytesOfBlock(size_t position, std::span<const std::byte> bytes) {
  const fingerprint_kernel::InnerCoefficients& inner = fingerprint_kernel::Inner();
  // The bytes of a word that are here are a term of their own: the word with zeros for the others.
  const auto add_part = [&](size_t count) {
    uint32_t word = 0;
    for (size_t i = 0; i < count; ++i) {
      word |= std::to_integer<uint32_t>(bytes[i]) << 8 * (position % kWordBytes + i);
    }
    sums_.AddWord(word, position / kWordBytes, inner);
    bytes = bytes.subspan(count);
    position += count;
  };
  if (position % kWordBytes != 0) {
    add_part(std::min<size_t>(bytes.size(), kWordBytes - position % kWordBytes));
  }
  const size_t words = bytes.size() / kWordBytes;
  if (words > 0) {
    add_words_(inner, position / kWordBytes, bytes.data(), words, sums_);
    bytes = bytes.subspan(words * kWordBytes);
    position += words * kWordBytes;
  }
  if (!bytes.empty()) add_part(bytes.size());
}

void Fingerprinter::FinishBlock() {
  if (block_ == kNone) return;
  if (block_ / kOuterGroupBlocks != outer_group_) {
    outer_group_ = block_ / kOuterGroupBlocks;
    make_outer_(outer_group_, outer_);
  }
  for (size_t k = 0; k < kSumCount; ++k) {
    const absl::uint128 u = outer_[block_ % kOuterGroupBlocks][k];
    total_ = fingerprint_field::Add(total_, fingerprint_field::Multiply(sums_.sum[k], u));
  }
  sums_ = {};
  block_ = kNone;
}

Fingerprint Fingerprinter::TakeSum() {
  FinishBlock();
  const Fingerprint sum(total_);
  total_ = 0;
  return sum;
}

}  // namespace holdfast
