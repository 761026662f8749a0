#include <algorithm>
#include <numeric>
#include <set>
#include <string>

#include "base/check.h"
#include "format/planner.h"
#include "format/writer_assignment.h"
#include "tests/fuzz/targets.h"
#include "tests/fuzz/use_layout.h"

namespace holdfast::fuzz {
namespace {

constexpr uint32_t kRanksStoredMax = 8;  // of larger worlds only some ranks are looked at

bool IsRefusal(const absl::Status& status) {
  return status.code() == absl::StatusCode::kInvalidArgument && !status.message().empty();
}

// One past the last byte of a segment in its buffer.
uint64_t EndOf(const Segment& segment, const RankLayout& held, uint64_t element_bytes) {
  if (segment.strides == kContiguous) {
    return segment.buffer_offset_bytes + segment.piece.ElementCount() * element_bytes;
  }
  const BoxView box = held.boxes[segment.piece.box];
  const std::vector<uint64_t>& strides = held.strides_bytes.at(segment.strides);
  uint64_t last = segment.buffer_offset_bytes;
  for (size_t d = 0; d < strides.size(); ++d) last += (box.size[d] - 1) * strides[d];
  return last + element_bytes;
}

// Elements that the rank holds.
uint64_t CheckHeld(const std::vector<TensorState>& states, const RankLayout& held) {
  uint64_t elements = 0;
  for (const Segment& segment : held.segments) {
    CHECK_OK(CheckPiece(segment.piece, states, held.boxes));
    CHECK(segment.piece.ElementCount() > 0 && segment.buffer < held.buffers.size());
    const uint64_t element_bytes = ElementBytes(states[segment.piece.tensor_state].dtype);
    CHECK(EndOf(segment, held, element_bytes) <= held.buffers[segment.buffer].bytes);
    elements += segment.piece.ElementCount();
  }
  return elements;
}

// What all ranks store, as an INDEX lists it.
struct Stored {
  BoxTable boxes;
  std::vector<StoredPiece> pieces;
};

void Add(const RankLayout& stored, uint32_t image, Stored& all) {
  uint64_t offset = 0;
  for (const Segment& segment : stored.segments) {
    StoredPiece piece{segment.piece, image, offset};
    if (segment.piece.box != kWholeTensor) {
      const BoxView box = stored.boxes[segment.piece.box];
      piece.piece.box = all.boxes.Add(box.lo, box.size);
    }
    all.pieces.push_back(piece);
    offset += 8;  // where it lies plays no part in the proof
  }
}

bool IsTooMuch(const absl::Status& status) {
  return status.code() == absl::StatusCode::kResourceExhausted;
}

}  // namespace

void UseLayout(const Layout& layout) {
  const std::vector<TensorState>& states = layout.tensor_states();
  const uint32_t world_size = layout.world_size();
  for (const uint32_t rank : std::set<uint32_t>{0, world_size / 2, world_size - 1}) {
    const RankHoldings held = layout.HeldByRank(Rank{rank});
    const uint64_t elements = CheckHeld(states, held.layout);
    const absl::StatusOr<RankLayout> whole = layout.ForRank(Rank{rank});
    if (!whole.ok()) {
      CHECK(IsRefusal(whole.status()));  // two tensors in one place
      continue;
    }
    CHECK(CheckHeld(states, *whole) == elements);
  }

  uint64_t bytes = 0;
  for (const TensorState& state : states) bytes += state.Bytes();
  uint64_t load_bytes = 0;
  for (const HolderLoad& load : layout.HolderLoads()) load_bytes += load.bytes;
  CHECK(load_bytes == bytes);

  if (world_size > kRanksStoredMax) return;
  const WriterAssignment writers = WriterAssignment::Create(layout);
  Stored all;
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    const absl::StatusOr<RankLayout> stored = writers.ForRank(Rank{rank}, {});
    if (!stored.ok()) {
      CHECK(IsRefusal(stored.status()));
      return;
    }
    Add(*stored, rank, all);
  }
  const SourceView source{states, all.boxes, all.pieces};
  const absl::Status covered = CheckCover(source);
  CHECK(covered.ok() || IsTooMuch(covered));
  const absl::StatusOr<CopyPlan> plan = PlanCopy(source, states, *layout.ForRank(Rank{0}));
  CHECK(plan.ok() || IsTooMuch(plan.status()));
}

bool FuzzLayout(Input input) {
  const auto layout = Layout::Parse(std::string(input.begin(), input.end()));
  if (!layout.ok()) {
    CHECK(IsRefusal(layout.status()));
    return false;
  }
  UseLayout(**layout);
  return true;
}

}  // namespace holdfast::fuzz
