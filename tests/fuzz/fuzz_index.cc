// What decodes can be encoded, and decodes to the same again; its pieces lie in their tensors and
// images; the planner gives a verdict on them, and what it calls complete fills the buffers of
// every layout in it.
#include <algorithm>
#include <string>

#include "base/check.h"
#include "format/index.h"
#include "format/layout.h"
#include "format/planner.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

bool IsVerdict(const absl::Status& status) {
  return status.ok() || status.code() == absl::StatusCode::kDataLoss ||
         status.code() == absl::StatusCode::kResourceExhausted;
}

// All of these tensor states, whole, one buffer each.
RankLayout WholeStates(const std::vector<TensorState>& states) {
  RankLayout whole;
  for (uint32_t i = 0; i < states.size(); ++i) {
    const uint64_t elements = states[i].ElementCount();
    if (elements == 0) continue;
    Segment segment;
    segment.piece = {i, kWholeTensor, 0, elements};
    segment.buffer = static_cast<uint32_t>(whole.buffers.size());
    whole.buffers.push_back({"", states[i].Bytes()});
    whole.segments.push_back(segment);
  }
  return whole;
}

void CheckPlan(const Index& index, const absl::StatusOr<CopyPlan>& plan) {
  if (!plan.ok()) {
    CHECK(IsVerdict(plan.status()) ||
          plan.status().code() == absl::StatusCode::kFailedPrecondition);
    return;
  }
  uint64_t bytes = 0;
  for (const CopyOp& op : plan->ops) {
    CHECK(op.image < index.images.size() && op.ImageEnd() <= index.images[op.image].bytes);
    bytes += op.Bytes();
  }
  CHECK(bytes == plan->bytes);
}

// Written anew, so that no check stands for itself.
void CheckInside(const Index& index, const IndexPiece& stored) {
  const Piece& piece = stored.piece;
  CHECK(piece.tensor_state < index.tensor_states.size() && stored.image < index.images.size());
  const TensorState& state = index.tensor_states[piece.tensor_state];
  std::vector<uint64_t> size = state.shape;
  if (piece.box != kWholeTensor) {
    CHECK(piece.box < index.boxes.size());
    const BoxView box = index.boxes[piece.box];
    CHECK(box.size.size() == size.size());
    for (size_t d = 0; d < size.size(); ++d) {
      CHECK(box.size[d] <= size[d] && box.lo[d] <= size[d] - box.size[d]);
      size[d] = box.size[d];
    }
  }
  uint64_t volume = 1;  // at most 2^62, or 0
  for (uint64_t each : size) volume *= each;
  CHECK(piece.begin <= piece.end && piece.end <= volume);
  const uint64_t bytes = (piece.end - piece.begin) * ElementBytes(state.dtype);
  const uint64_t image_bytes = index.images[stored.image].bytes;
  CHECK(bytes <= image_bytes && stored.offset_bytes <= image_bytes - bytes);
}

void UsePieces(const Index& index) {
  std::vector<StoredPiece> stored;
  for (const IndexPiece& piece : index.pieces) {
    CheckInside(index, piece);
    stored.push_back({piece.piece, piece.image, piece.offset_bytes});
  }
  const SourceView source{index.tensor_states, index.boxes, stored};
  const absl::Status covered = CheckCover(source);
  CHECK(IsVerdict(covered));
  uint64_t bytes = 0;  // of all states; a plan counts them
  for (const TensorState& state : index.tensor_states) {
    if (state.Bytes() > kTensorBytesMax - bytes) return;
    bytes += state.Bytes();
  }
  const auto plan = PlanCopy(source, index.tensor_states, WholeStates(index.tensor_states));
  CheckPlan(index, plan);
  CHECK(!plan.ok() || covered.ok() || covered.code() == absl::StatusCode::kResourceExhausted);
  for (const std::string& text : index.layouts) {
    const auto layout = Layout::Parse(text);
    if (!layout.ok()) continue;
    const auto held = (*layout)->ForRank(Rank{(*layout)->world_size() - 1});
    if (held.ok()) CheckPlan(index, PlanCopy(source, (*layout)->tensor_states(), *held));
  }
}

}  // namespace

bool FuzzIndex(Input input) {
  const absl::StatusOr<Index> index = DecodeIndex(std::as_bytes(input));
  if (!index.ok()) {
    CHECK(index.status().code() == absl::StatusCode::kDataLoss);
    return false;
  }
  // Names may be shared otherwise than our encoder shares them, so only the second encoding is sure
  // to be the first.
  const auto encoded = EncodeIndex(*index);
  CHECK_OK(encoded.status());
  const auto again = DecodeIndex(*encoded);
  CHECK_OK(again.status());
  CHECK(*EncodeIndex(*again) == *encoded);
  CHECK(again->tensor_states.size() == index->tensor_states.size() &&
        again->pieces.size() == index->pieces.size() && again->blobs == index->blobs &&
        again->facts == index->facts && again->layouts == index->layouts);
  UsePieces(*index);
  return true;
}

}  // namespace holdfast::fuzz
