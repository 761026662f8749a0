#include "format/planner.h"

#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "format/planner_geometry.h"
#include "format/planner_source.h"

namespace holdfast {
namespace {

constexpr size_t kNamesLookedAtMax = 10'000;  // for "did you mean"
constexpr size_t kStatesNamedMax = 16;        // in one error
// Of one plan: ops, and steps of searches for pieces. Both grow with what there is to plan, by so
// much; a plan that takes more is refused.
constexpr uint64_t kOpsMin = 4'000'000;
constexpr uint64_t kOpsOfPieceMax = 16;
constexpr uint64_t kStepsMin = 1'000'000;
constexpr uint64_t kStepsOfPieceMax = 256;

// Numbers of things, grouped by tensor state: counting sort.
class ByState {
 public:
  template <typename Items, typename StateOf>
  ByState(size_t state_count, const Items& items, StateOf state_of) : begins_(state_count + 1, 0) {
    for (const auto& item : items) ++begins_[state_of(item) + 1];
    for (size_t i = 1; i < begins_.size(); ++i) begins_[i] += begins_[i - 1];
    numbers_.resize(items.size());
    std::vector<size_t> next(begins_.begin(), begins_.end() - 1);
    for (size_t i = 0; i < items.size(); ++i) {
      numbers_[next[state_of(items[i])]++] = static_cast<uint32_t>(i);
    }
  }

  std::span<const uint32_t> operator[](size_t state) const {
    return std::span(numbers_).subspan(begins_[state], begins_[state + 1] - begins_[state]);
  }

 private:
  std::vector<size_t> begins_;
  std::vector<uint32_t> numbers_;
};

absl::Status CheckStateNumbers(const SourceView& source) {
  for (const StoredPiece& piece : source.pieces) {
    if (piece.piece.tensor_state < source.tensor_states.size()) continue;
    return absl::DataLossError(
        absl::StrFormat("image %d: expected a piece of one of %d tensor states, found number %d",
                        piece.image, source.tensor_states.size(), piece.piece.tensor_state));
  }
  return absl::OkStatus();
}

ByState GroupPieces(const SourceView& source) {
  return ByState(source.tensor_states.size(), source.pieces,
                 [](const StoredPiece& piece) { return piece.piece.tensor_state; });
}

using StateName = std::pair<std::string_view, std::string_view>;  // tensor and state

StateName NameOf(const TensorState& tensor_state) {
  return {tensor_state.tensor, tensor_state.state};
}

struct NameHash {
  size_t operator()(const StateName& name) const {
    return std::hash<std::string_view>()(name.first) * 31 +
           std::hash<std::string_view>()(name.second);
  }
};
using NumberOfName = std::unordered_map<StateName, uint32_t, NameHash>;

absl::StatusOr<NumberOfName> NumberNames(const std::vector<TensorState>& tensor_states) {
  NumberOfName numbers;
  numbers.reserve(tensor_states.size());
  for (uint32_t i = 0; i < tensor_states.size(); ++i) {
    if (!numbers.emplace(NameOf(tensor_states[i]), i).second) {
      return absl::DataLossError(
          absl::StrCat(Describe(tensor_states[i]), ": expected it once, found it twice"));
    }
  }
  return numbers;
}

absl::Status NotInSource(const std::vector<TensorState>& source, const TensorState& wanted) {
  std::string states;
  size_t found = 0;
  std::vector<std::string_view> names;
  for (const TensorState& each : source) {
    if (each.tensor == wanted.tensor && ++found <= kStatesNamedMax) {
      absl::StrAppend(&states, states.empty() ? "" : ", ", each.state);
    }
    if (names.size() < kNamesLookedAtMax && (names.empty() || names.back() != each.tensor)) {
      names.push_back(each.tensor);
    }
  }
  return absl::FailedPreconditionError(absl::StrCat(
      Describe(wanted), ": expected it in the checkpoint, found ",
      states.empty()
          ? absl::StrCat("no such tensor", DidYouMean(wanted.tensor, names))
          : absl::StrCat("only its states ", states, found > kStatesNamedMax ? ", ..." : "")));
}

std::string ShapeText(const TensorState& tensor_state) {
  std::string text = absl::StrCat(std::string(DtypeName(tensor_state.dtype)), "[");
  for (size_t d = 0; d < tensor_state.shape.size(); ++d) {
    absl::StrAppend(&text, d ? ", " : "", tensor_state.shape[d]);
  }
  return text + "]";
}

absl::Status CheckSame(const TensorState& source, const TensorState& target) {
  if (source.dtype == target.dtype && source.shape == target.shape) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrFormat("%s: expected %s, as the layout says, found %s in the checkpoint",
                      Describe(target), ShapeText(target), ShapeText(source)));
}

// Makes one op of neighbours for which `join(last, op)` has joined `op` to `last`. In place: a plan
// can be hundreds of megabytes.
template <typename Join>
void JoinNeighbours(std::vector<CopyOp>& ops, Join join) {
  size_t kept = 0;
  for (const CopyOp& op : ops) {
    if (kept == 0 || !join(ops[kept - 1], op)) ops[kept++] = op;
  }
  ops.resize(kept);
}

bool JoinContiguous(CopyOp& last, const CopyOp& op) {
  if (last.count != 1 || op.count != 1 || last.image != op.image || last.buffer != op.buffer ||
      last.image_offset_bytes + last.run_bytes != op.image_offset_bytes ||
      last.buffer_offset_bytes + last.run_bytes != op.buffer_offset_bytes) {
    return false;
  }
  last.run_bytes += op.run_bytes;
  return true;
}

bool JoinStrided(CopyOp& last, const CopyOp& op) {
  const uint64_t image_step =
      op.image_offset_bytes - last.image_offset_bytes - (last.count - 1) * last.image_stride_bytes;
  const uint64_t buffer_step = op.buffer_offset_bytes - last.buffer_offset_bytes -
                               (last.count - 1) * last.buffer_stride_bytes;
  const bool forward =
      op.buffer_offset_bytes > last.buffer_offset_bytes && op.image_offset_bytes >= last.ImageEnd();
  if (op.count != 1 || last.image != op.image || last.buffer != op.buffer ||
      last.run_bytes != op.run_bytes || !forward ||
      (last.count > 1 &&
       (image_step != last.image_stride_bytes || buffer_step != last.buffer_stride_bytes))) {
    return false;
  }
  last.image_stride_bytes = image_step;
  last.buffer_stride_bytes = buffer_step;
  ++last.count;
  return true;
}

// Ops that go on where the one before ends are one op; ops of one run length at even distances are
// one op with a count.
std::vector<CopyOp> Coalesce(std::vector<CopyOp> ops) {
  std::sort(ops.begin(), ops.end(), [](const CopyOp& a, const CopyOp& b) {
    return std::tie(a.image, a.image_offset_bytes, a.buffer, a.buffer_offset_bytes) <
           std::tie(b.image, b.image_offset_bytes, b.buffer, b.buffer_offset_bytes);
  });
  JoinNeighbours(ops, JoinContiguous);
  JoinNeighbours(ops, JoinStrided);
  return ops;
}

std::vector<uint64_t> Zeros(const TensorState& tensor_state) {
  return std::vector<uint64_t>(tensor_state.shape.size(), 0);
}

// Where the elements of a piece lie when they lie one behind the other from offset_bytes.
Affine RowMajorOfPiece(const Piece& piece, const TensorState& tensor_state, const BoxTable& boxes,
                       uint64_t offset_bytes) {
  const std::vector<uint64_t> zeros = Zeros(tensor_state);
  const BoxView box =
      piece.box == kWholeTensor ? BoxView{zeros, tensor_state.shape} : boxes[piece.box];
  return RowMajor(box, piece.begin, offset_bytes, ElementBytes(tensor_state.dtype));
}

Affine BufferOf(const Segment& segment, const TensorState& tensor_state, const RankLayout& layout) {
  if (segment.strides == kContiguous) {
    return RowMajorOfPiece(segment.piece, tensor_state, layout.boxes, segment.buffer_offset_bytes);
  }
  Affine affine;
  affine.offset = segment.buffer_offset_bytes;
  const std::vector<uint64_t>& strides = layout.strides_bytes.at(segment.strides);
  CHECK(strides.size() == tensor_state.shape.size());
  for (size_t d = 0; d < strides.size(); ++d) {
    affine.strides[d] = strides[d];
    if (segment.piece.box != kWholeTensor) {
      affine.offset -= layout.boxes[segment.piece.box].lo[d] * strides[d];
    }
  }
  return affine;
}

// Plans one rank's segments, tensor state by tensor state.
class Planner {
 public:
  Planner(const SourceView& source, size_t segment_count)
      : source_(source),
        ops_max_(kOpsMin + kOpsOfPieceMax * (source.pieces.size() + segment_count)),
        steps_max_(kStepsMin + kStepsOfPieceMax * (source.pieces.size() + segment_count)) {}

  absl::Status Fill(const StateSource& pieces, const TensorState& tensor_state,
                    const Segment& segment, const RankLayout& target,
                    std::vector<uint32_t>& chosen) {
    const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
    const Affine buffer = BufferOf(segment, tensor_state, target);
    const auto numbers = [&](const StoredPiece& stored) {
      CopyOp op;
      op.image = stored.image;
      op.buffer = segment.buffer;
      return op;
    };
    const auto copy_box = [&](uint32_t index, const ElementBox& box) {
      const StoredPiece& stored =
          Choose(pieces[index], chosen[index], box.Volume() * element_bytes);
      const Affine image = RowMajorOfPiece(pieces[index].piece, tensor_state, source_.boxes,
                                           stored.image_offset_bytes);
      if (!HasRoom(CountRuns(box, image, buffer, element_bytes))) return;
      AppendRuns(box, image, buffer, element_bytes, numbers(stored), ops_);
    };
    const auto copy_range = [&](uint32_t index, uint64_t begin, uint64_t end) {
      if (segment.strides != kContiguous) {
        const std::vector<uint64_t> zeros = Zeros(tensor_state);
        std::vector<ElementBox> boxes;
        CutIntoBoxes({zeros, tensor_state.shape}, begin, end, boxes);
        for (const ElementBox& box : boxes) copy_box(index, box);
        return;
      }
      const StoredPiece& stored =
          Choose(pieces[index], chosen[index], (end - begin) * element_bytes);
      CopyOp op = numbers(stored);
      op.image_offset_bytes =
          stored.image_offset_bytes + (begin - pieces[index].piece.begin) * element_bytes;
      op.buffer_offset_bytes =
          segment.buffer_offset_bytes + (begin - segment.piece.begin) * element_bytes;
      op.run_bytes = (end - begin) * element_bytes;
      if (HasRoom(1)) ops_.push_back(op);
    };
    bytes_ += segment.piece.ElementCount() * element_bytes;
    RETURN_IF_ERROR(pieces.Cover(segment.piece, target.boxes, copy_range, copy_box, steps_));
    if (!is_full_ && steps_ <= steps_max_ + kStepsOfPieceMax * ops_.size()) return absl::OkStatus();
    return absl::ResourceExhaustedError(absl::StrFormat(
        "%s: expected a plan of at most %d copies, found in at most %d steps; its pieces are cut "
        "too finely, or lie across each other",
        Describe(tensor_state), ops_max_, steps_max_ + kStepsOfPieceMax * ops_.size()));
  }

  CopyPlan Finish() {
    CopyPlan plan;
    plan.ops = Coalesce(std::move(ops_));
    uint64_t bytes = 0;
    for (const CopyOp& op : plan.ops) bytes += op.Bytes();
    CHECK(bytes == bytes_);  // every byte of every segment has one op
    plan.bytes = bytes;
    return plan;
  }

 private:
  // The replica to read: of the image from which least is read so far, once for all of a piece.
  const StoredPiece& Choose(const SourcePiece& piece, uint32_t& chosen, uint64_t bytes) {
    if (chosen == UINT32_MAX) {
      chosen = piece.replicas[0];
      for (uint32_t replica : piece.replicas) {
        if (read_bytes_[source_.pieces[replica].image] <
            read_bytes_[source_.pieces[chosen].image]) {
          chosen = replica;
        }
      }
    }
    const StoredPiece& stored = source_.pieces[chosen];
    read_bytes_[stored.image] += bytes;
    return stored;
  }

  bool HasRoom(uint64_t op_count) {
    is_full_ = is_full_ || op_count > ops_max_ - ops_.size();
    return !is_full_;
  }

  const SourceView& source_;
  const uint64_t ops_max_;
  const uint64_t steps_max_;
  std::unordered_map<uint32_t, uint64_t> read_bytes_;  // of each image
  std::vector<CopyOp> ops_;
  bool is_full_ = false;  // there were more
  uint64_t steps_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace

absl::Status CheckCover(const SourceView& source) {
  RETURN_IF_ERROR(CheckStateNumbers(source));
  RETURN_IF_ERROR(NumberNames(source.tensor_states).status());
  const ByState pieces = GroupPieces(source);
  for (uint32_t i = 0; i < source.tensor_states.size(); ++i) {
    if (absl::Status good = CheckTensorState(source.tensor_states[i]); !good.ok()) {
      return absl::DataLossError(std::string(good.message()));
    }
    ASSIGN_OR_RETURN(const StateSource state,
                     StateSource::Create(source, i, pieces[i], StateSource::Asked::kRanges));
    const Piece whole{i, kWholeTensor, 0, source.tensor_states[i].ElementCount()};
    uint64_t steps = 0;
    RETURN_IF_ERROR(state.Cover(
        whole, source.boxes, [](uint32_t, uint64_t, uint64_t) {},
        [](uint32_t, const ElementBox&) {}, steps));
  }
  return absl::OkStatus();
}

absl::StatusOr<CopyPlan> PlanCopy(const SourceView& source,
                                  const std::vector<TensorState>& target_states,
                                  const RankLayout& target) {
  RETURN_IF_ERROR(CheckStateNumbers(source));
  ASSIGN_OR_RETURN(const NumberOfName numbers, NumberNames(source.tensor_states));
  const ByState pieces = GroupPieces(source);
  const ByState segments(target_states.size(), target.segments, [&](const Segment& segment) {
    CHECK(segment.piece.tensor_state < target_states.size());
    return segment.piece.tensor_state;
  });
  Planner planner(source, target.segments.size());
  for (size_t i = 0; i < target_states.size(); ++i) {
    if (segments[i].empty()) continue;
    const TensorState& wanted = target_states[i];
    const auto number = numbers.find(NameOf(wanted));
    if (number == numbers.end()) return NotInSource(source.tensor_states, wanted);
    RETURN_IF_ERROR(CheckSame(source.tensor_states[number->second], wanted));
    StateSource::Asked asked = StateSource::Asked::kRanges;
    for (uint32_t segment : segments[i]) {
      if (target.segments[segment].piece.box != kWholeTensor) asked = StateSource::Asked::kBoxes;
    }
    const std::span<const uint32_t> stored = pieces[number->second];
    ASSIGN_OR_RETURN(const StateSource state,
                     StateSource::Create(source, number->second, stored, asked));
    std::vector<uint32_t> chosen(stored.size(), UINT32_MAX);
    for (uint32_t segment : segments[i]) {
      RETURN_IF_ERROR(planner.Fill(state, wanted, target.segments[segment], target, chosen));
    }
  }
  return planner.Finish();
}

std::vector<CopyOp> PlanSegment(const std::vector<TensorState>& tensor_states,
                                const RankLayout& layout, const Segment& segment, uint32_t image,
                                uint64_t image_offset_bytes) {
  const TensorState& tensor_state = tensor_states[segment.piece.tensor_state];
  const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
  std::vector<CopyOp> ops;
  CopyOp op;
  op.image = image;
  op.buffer = segment.buffer;
  if (segment.strides == kContiguous) {
    op.image_offset_bytes = image_offset_bytes;
    op.buffer_offset_bytes = segment.buffer_offset_bytes;
    op.run_bytes = segment.piece.ElementCount() * element_bytes;
    if (op.run_bytes > 0) ops.push_back(op);
    return ops;
  }
  const std::vector<uint64_t> zeros = Zeros(tensor_state);
  const BoxView box = segment.piece.box == kWholeTensor ? BoxView{zeros, tensor_state.shape}
                                                        : layout.boxes[segment.piece.box];
  std::vector<ElementBox> parts;
  CutIntoBoxes(box, segment.piece.begin, segment.piece.end, parts);
  const Affine at_image =
      RowMajorOfPiece(segment.piece, tensor_state, layout.boxes, image_offset_bytes);
  const Affine at_buffer = BufferOf(segment, tensor_state, layout);
  for (const ElementBox& part : parts) {
    AppendRuns(part, at_image, at_buffer, element_bytes, op, ops);
  }
  return Coalesce(std::move(ops));
}

void ClipToImage(const CopyOp& op, uint64_t image_begin_bytes, uint64_t image_end_bytes,
                 std::vector<CopyOp>& out) {
  const uint64_t begin = image_begin_bytes;
  const uint64_t end = image_end_bytes;
  if (begin >= op.ImageEnd() || end <= op.image_offset_bytes || begin >= end) return;
  // The runs that have bytes in [begin, end).
  uint64_t first = 0;
  uint64_t last = 1;
  if (op.count > 1) {
    const uint64_t first_end = op.image_offset_bytes + op.run_bytes;
    if (begin >= first_end) first = (begin - first_end) / op.image_stride_bytes + 1;
    last = std::min(op.count, (end - op.image_offset_bytes - 1) / op.image_stride_bytes + 1);
  }
  if (first >= last) return;  // between two runs
  // Runs [from, to) without `skip` bytes at the beginning of each and `drop` at the end.
  const auto append = [&](uint64_t from, uint64_t to, uint64_t skip, uint64_t drop) {
    if (from >= to) return;
    CopyOp part = op;
    part.image_offset_bytes += from * op.image_stride_bytes + skip;
    part.buffer_offset_bytes += from * op.buffer_stride_bytes + skip;
    part.run_bytes -= skip + drop;
    part.count = to - from;
    if (part.count == 1) part.image_stride_bytes = part.buffer_stride_bytes = 0;
    out.push_back(part);
  };
  const uint64_t first_begin = op.image_offset_bytes + first * op.image_stride_bytes;
  const uint64_t last_end =
      op.image_offset_bytes + (last - 1) * op.image_stride_bytes + op.run_bytes;
  const uint64_t skip = begin > first_begin ? begin - first_begin : 0;
  const uint64_t drop = end < last_end ? last_end - end : 0;
  if (last - first == 1) return append(first, last, skip, drop);
  append(first, first + 1, skip, 0);
  append(first + 1, last - 1, 0, 0);
  append(last - 1, last, 0, drop);
}

std::vector<uint32_t> StatesNotIn(const std::vector<TensorState>& source_states,
                                  const std::vector<TensorState>& target_states) {
  NumberOfName targets;
  for (uint32_t i = 0; i < target_states.size(); ++i) {
    targets.emplace(NameOf(target_states[i]), i);
  }
  std::vector<uint32_t> missing;
  for (uint32_t i = 0; i < source_states.size(); ++i) {
    if (!targets.contains(NameOf(source_states[i]))) {
      missing.push_back(i);
    }
  }
  return missing;
}

}  // namespace holdfast
