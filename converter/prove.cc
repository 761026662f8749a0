#include "converter/prove.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/whole_tensor_reader.h"

namespace holdfast::converter {
namespace {

// An element is not finite if all bits of `mask` are set in a number of it (of the exponent; of
// float8_e4m3fn, which has no infinity, of all but the sign), or if it equals `value`.
template <typename Bits>
uint64_t FirstWith(std::span<const std::byte> bytes, Bits mask, Bits value) {
  const size_t count = bytes.size() / sizeof(Bits);
  for (size_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes.data() + i * sizeof(Bits), sizeof(Bits));
    if ((bits & mask) == value) return i;
  }
  return count;
}

// What the elements of a state are expected to be: numbers of the training itself.
bool IsTrained(std::string_view state) {
  constexpr std::array<std::string_view, 5> kOthers = {"buffer", "tensor", "other", "rng", "ema"};
  return std::find(kOthers.begin(), kOthers.end(), state) == kOthers.end();
}

class Prover {
 public:
  Prover(const ForeignFolder& folder, const ForeignIndex& index, const ProofOptions& options)
      : index_(index), options_(options), reader_(folder, index) {
    for (const TensorState& state : index.tensor_states) total_bytes_ += state.Bytes();
  }

  absl::StatusOr<ProofReport> Run() {
    for (const std::string& text : index_.repairs) {
      Add(ProofFinding::Kind::kRepaired, Soundness::kRepairable, text);
    }
    for (const std::string& text : index_.losses) {
      Add(ProofFinding::Kind::kLost, Soundness::kLost, text);
    }
    for (const Unreadable& each : index_.unreadable) {
      Add(ProofFinding::Kind::kUnreadable, Soundness::kGood,
          absl::StrFormat("%s %s: it was not looked at", each.name, each.reason));
    }
    for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
      RETURN_IF_ERROR(CheckState(i));
      ++report_.states_checked;
    }
    return std::move(report_);
  }

 private:
  void Add(ProofFinding::Kind kind, Soundness soundness, std::string text) {
    report_.soundness = std::max(report_.soundness, soundness);
    ++report_.finding_count;
    if (report_.findings.size() >= kProofFindingsMax) return;
    report_.findings.push_back({kind, std::move(text)});
  }

  absl::Status Advance(uint64_t bytes) {
    report_.bytes_read += bytes;
    if (options_.progress == nullptr || options_.progress(report_.bytes_read, total_bytes_)) {
      return absl::OkStatus();
    }
    return absl::CancelledError("verify was stopped");
  }

  // What an error of reading says of the checkpoint is a finding.
  absl::Status Take(const absl::Status& status) {
    if (status.code() != absl::StatusCode::kDataLoss &&
        status.code() != absl::StatusCode::kNotFound) {
      return status;
    }
    Add(ProofFinding::Kind::kCover, Soundness::kLost, std::string(status.message()));
    return absl::OkStatus();
  }

  absl::Status CheckState(uint32_t number) {
    const TensorState& state = index_.tensor_states[number];
    uint64_t done = 0;
    uint64_t first = 0;
    bool found = false;
    const absl::Status read = reader_.Read(number, [&](std::span<const std::byte> bytes) {
      const uint64_t count = bytes.size() / ElementBytes(state.dtype);
      if (!found) {
        const uint64_t at = FirstNonFinite(state.dtype, bytes);
        found = at < count;
        first = done + at;
      }
      done += count;
      return Advance(bytes.size());
    });
    if (!read.ok()) RETURN_IF_ERROR(Take(read));
    if (found) {
      Add(IsTrained(state.state) ? ProofFinding::Kind::kNonFinite : ProofFinding::Kind::kUnusual,
          IsTrained(state.state) ? Soundness::kLost : Soundness::kGood,
          absl::StrFormat("%s: element %d of [%s] is not finite", Describe(state), first,
                          absl::StrJoin(state.shape, ", ")));
    }
    return CheckReplicas(number);
  }

  // Equal pieces, in groups; each against the first of its group.
  absl::Status CheckReplicas(uint32_t number) {
    const auto [begin, end] = index_.PiecesOf(number);
    if (end - begin < 2) return absl::OkStatus();
    std::vector<size_t> order(end - begin);
    std::iota(order.begin(), order.end(), begin);
    const auto range_of = [&](size_t i) {
      const Piece& piece = index_.pieces[i].piece;
      if (piece.begin == piece.end || piece.box == kWholeTensor) return piece;
      return AsRange(piece, index_.tensor_states[number], index_.boxes);
    };
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return ComparePieces(range_of(a), range_of(b), index_.boxes) < 0;
    });
    for (size_t i = 0; i < order.size();) {
      size_t last = i + 1;
      while (last < order.size() &&
             ComparePieces(range_of(order[i]), range_of(order[last]), index_.boxes) == 0) {
        RETURN_IF_ERROR(ComparePair(number, order[i], order[last]));
        ++last;
      }
      i = last;
    }
    return absl::OkStatus();
  }

  absl::Status ComparePair(uint32_t number, size_t a, size_t b) {
    const TensorState& state = index_.tensor_states[number];
    const ForeignPiece& first = index_.pieces[a];
    const ForeignPiece& second = index_.pieces[b];
    if (first.piece.begin == first.piece.end) return absl::OkStatus();
    ++report_.replicas_compared;
    // One and the same bytes: tied names, a storage that is named twice.
    if (first.extent == second.extent && first.offset_bytes == second.offset_bytes &&
        first.strides == second.strides) {
      return absl::OkStatus();
    }
    const uint64_t element_bytes = ElementBytes(state.dtype);
    const uint64_t step = WholeTensorReader::kWindowBytes / element_bytes;
    const uint64_t elements = first.piece.ElementCount();
    for (uint64_t at = 0; at < elements; at += step) {
      const uint64_t end = std::min(elements, at + step);
      a_.resize((end - at) * element_bytes);
      b_.resize(a_.size());
      absl::Status status = reader_.ReadPiece(first, at, end, a_);
      if (status.ok()) status = reader_.ReadPiece(second, at, end, b_);
      if (!status.ok()) return Take(status);
      RETURN_IF_ERROR(Advance(b_.size()));
      const auto differ = std::mismatch(a_.begin(), a_.end(), b_.begin()).first;
      if (differ == a_.end()) continue;
      const uint64_t element = at + static_cast<uint64_t>(differ - a_.begin()) / element_bytes;
      Add(ProofFinding::Kind::kReplicas, Soundness::kLost,
          absl::StrFormat(
              "%s: the copies in %s and %s differ in element %d of the tensor", Describe(state),
              NameOf(first), NameOf(second),
              ElementInTensor(first.piece, index_.boxes, state, first.piece.begin + element)));
      return absl::OkStatus();
    }
    return absl::OkStatus();
  }

  std::string NameOf(const ForeignPiece& piece) const {
    const Extent& extent = index_.extents[piece.extent];
    if (extent.file == kInline) return "the index";
    return absl::StrFormat("%s (offset %d)", index_.files[extent.file].path,
                           extent.offset_bytes + piece.offset_bytes);
  }

  const ForeignIndex& index_;
  const ProofOptions& options_;
  WholeTensorReader reader_;
  ProofReport report_;
  uint64_t total_bytes_ = 0;
  std::vector<std::byte> a_;
  std::vector<std::byte> b_;
};

}  // namespace

absl::StatusOr<ProofReport> Prove(const ForeignFolder& folder, const ForeignIndex& index,
                                  const ProofOptions& options) {
  return Prover(folder, index, options).Run();
}

uint64_t FirstNonFinite(Dtype dtype, std::span<const std::byte> bytes) {
  switch (dtype) {
    case Dtype::kFloat16:
      return FirstWith<uint16_t>(bytes, 0x7C00, 0x7C00);
    case Dtype::kBfloat16:
      return FirstWith<uint16_t>(bytes, 0x7F80, 0x7F80);
    case Dtype::kFloat32:
      return FirstWith<uint32_t>(bytes, 0x7F800000, 0x7F800000);
    case Dtype::kFloat64:
      return FirstWith<uint64_t>(bytes, 0x7FF0000000000000, 0x7FF0000000000000);
    case Dtype::kFloat8E4m3fn:
      return FirstWith<uint8_t>(bytes, 0x7F, 0x7F);
    case Dtype::kFloat8E5m2:
      return FirstWith<uint8_t>(bytes, 0x7C, 0x7C);
    case Dtype::kFloat8E4m3fnuz:
    case Dtype::kFloat8E5m2fnuz:
      return FirstWith<uint8_t>(bytes, 0xFF, 0x80);
    case Dtype::kFloat8E8m0fnu:
      return FirstWith<uint8_t>(bytes, 0xFF, 0xFF);
    case Dtype::kComplex32:
      return FirstWith<uint16_t>(bytes, 0x7C00, 0x7C00) / 2;
    case Dtype::kComplex64:
      return FirstWith<uint32_t>(bytes, 0x7F800000, 0x7F800000) / 2;
    case Dtype::kComplex128:
      return FirstWith<uint64_t>(bytes, 0x7FF0000000000000, 0x7FF0000000000000) / 2;
    case Dtype::kBool:
    case Dtype::kUint8:
    case Dtype::kInt8:
    case Dtype::kUint16:
    case Dtype::kInt16:
    case Dtype::kUint32:
    case Dtype::kInt32:
    case Dtype::kUint64:
    case Dtype::kInt64:
    case Dtype::kFloat4E2m1fnX2:
    case Dtype::kBits8:
    case Dtype::kBits16:
    case Dtype::kBits1x8:
    case Dtype::kBits2x4:
    case Dtype::kBits4x2:
      break;
  }
  return bytes.size() / ElementBytes(dtype);
}

}  // namespace holdfast::converter
