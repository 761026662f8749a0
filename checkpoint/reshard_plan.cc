#include "checkpoint/reshard_plan.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <string_view>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/lru_table.h"
#include "format/writer_assignment.h"

namespace holdfast {
namespace {

constexpr size_t kDifferencesShownMax = 5;
// Units are made smaller as long as that spares this much of what is read more than once.
constexpr double kWorthwhile = 0.9;
// Part of all reads, below which smaller units are not looked for.
constexpr double kAgainNegligible = 0.05;
// Smaller writes cost more than what they spare.
constexpr uint64_t kUnitBytesWanted = uint64_t{64} << 10;
// 256 GiB in blocks of 4 MiB; the tables about them stay below 10 MiB.
constexpr uint64_t kSlotsMax = uint64_t{1} << 16;

// A unit, with the place in the order of work.
struct OrderedUnit {
  std::pair<uint32_t, uint64_t> first_element;
  ReshardUnit unit;
};
// Of each unit while the list of them is made.
constexpr uint64_t kUnitBytesPlanned = sizeof(OrderedUnit) + sizeof(ReshardUnit);

uint64_t RoundDown(uint64_t value, uint64_t multiple) { return value / multiple * multiple; }

// The same copy, seen from the other side.
CopyOp Reversed(const CopyOp& op) {
  CopyOp reversed = op;
  std::swap(reversed.image, reversed.buffer);
  std::swap(reversed.image_offset_bytes, reversed.buffer_offset_bytes);
  std::swap(reversed.image_stride_bytes, reversed.buffer_stride_bytes);
  return reversed;
}

// Calls `visit(block)` for every block of which `op` reads something, ascending; perhaps for some
// between its runs.
template <typename Visit>
void ForEachBlock(const CopyOp& op, uint64_t block_bytes, Visit visit) {
  const uint64_t last = (op.ImageEnd() - 1) / block_bytes;
  if (op.count == 1 || op.image_stride_bytes <= block_bytes) {
    for (uint64_t block = op.image_offset_bytes / block_bytes; block <= last; ++block) visit(block);
    return;
  }
  uint64_t next = 0;
  for (uint64_t run = 0; run < op.count; ++run) {
    const uint64_t begin = op.image_offset_bytes + run * op.image_stride_bytes;
    const uint64_t run_last = (begin + op.run_bytes - 1) / block_bytes;
    for (next = std::max(next, begin / block_bytes); next <= run_last; ++next) visit(next);
  }
}

std::string ShapeText(const TensorState& state) {
  return absl::StrFormat("%s[%s]", DtypeName(state.dtype), absl::StrJoin(state.shape, ", "));
}

}  // namespace

std::string StateDifferences(const std::vector<TensorState>& source,
                             const std::vector<TensorState>& layout) {
  using Name = std::pair<std::string_view, std::string_view>;
  std::map<Name, const TensorState*> known;
  for (const TensorState& state : source) known.emplace(Name(state.tensor, state.state), &state);
  std::vector<std::string> shown;
  size_t count = 0;
  const auto add = [&](const TensorState& state, const std::string& text) {
    if (++count <= kDifferencesShownMax) shown.push_back(absl::StrCat(Describe(state), ": ", text));
  };
  for (const TensorState& state : layout) {
    const auto found = known.find(Name(state.tensor, state.state));
    if (found == known.end()) {
      add(state, "in the layout, not in the checkpoint");
      continue;
    }
    const TensorState& other = *found->second;
    if (other.dtype != state.dtype || other.shape != state.shape) {
      add(state, absl::StrFormat("%s in the layout, %s in the checkpoint", ShapeText(state),
                                 ShapeText(other)));
    }
    known.erase(found);
  }
  for (const TensorState& state : source) {
    if (known.contains(Name(state.tensor, state.state))) {
      add(state, "in the checkpoint, not in the layout");
    }
  }
  if (count == 0) return "";
  if (count > shown.size()) shown.push_back(absl::StrFormat("and %d more", count - shown.size()));
  return absl::StrCat(
      "the layout must place the tensor states of the checkpoint, all of them and no other: ",
      absl::StrJoin(shown, "; "));
}

ReshardPlan::ReshardPlan(const Index& source, ReshardTarget target)
    : source_(&source),
      target_(std::move(target)),
      block_bytes_(source.images.front().block_bytes),
      alignment_bytes_(std::min(target_.alignment_bytes, block_bytes_)) {}

absl::StatusOr<std::unique_ptr<const ReshardPlan>> ReshardPlan::Create(
    const Index& source, const ReshardTarget& target) {
  RETURN_IF_ERROR(CheckIndexCover(source));
  std::unique_ptr<ReshardPlan> plan(new ReshardPlan(source, target));
  ASSIGN_OR_RETURN(plan->layout_, Layout::Parse(target.layout_json));
  const std::string differences =
      StateDifferences(source.tensor_states, plan->layout_->tensor_states());
  if (!differences.empty()) return absl::InvalidArgumentError(differences);
  RETURN_IF_ERROR(plan->AssignPieces());
  plan->AssignBlobs();
  RETURN_IF_ERROR(plan->PlaceImages());
  RETURN_IF_ERROR(plan->PlanCopies());
  return std::unique_ptr<const ReshardPlan>(std::move(plan));
}

absl::Status ReshardPlan::AssignPieces() {
  const WriterAssignment assignment = WriterAssignment::Create(*layout_);
  std::vector<StoredPiece> all;
  images_.resize(layout_->world_size());
  for (uint32_t rank = 0; rank < images_.size(); ++rank) {
    ASSIGN_OR_RETURN(const RankLayout stored, assignment.ForRank(Rank{rank}, {}));
    std::vector<uint32_t> box_of(stored.boxes.size(), kWholeTensor);  // in the one table
    for (const Segment& segment : stored.segments) {
      Piece piece = segment.piece;
      if (piece.box != kWholeTensor) {
        uint32_t& box = box_of[piece.box];
        if (box == kWholeTensor) {
          const BoxView view = stored.boxes[piece.box];
          box = boxes_.Add(view.lo, view.size);
        }
        piece.box = box;
      }
      images_[rank].pieces.push_back({piece, 0});
      all.push_back({piece, rank, 0});
    }
  }
  const absl::Status covered = CheckCover({layout_->tensor_states(), boxes_, all});
  if (covered.ok()) return covered;
  return absl::InvalidArgumentError(absl::StrCat("the layout: ", covered.message()));
}

// A global blob is rank 0's; those of the old ranks go round.
void ReshardPlan::AssignBlobs() {
  for (const IndexBlob& blob : source_->blobs) {
    const bool is_global = blob.scope == BlobScope::kGlobal;
    ReshardImage& image =
        images_[is_global ? 0 : Value(blob.rank) % static_cast<uint32_t>(images_.size())];
    ReshardBlob placed;
    placed.blob = {blob.scope, blob.name, blob.bytes};
    if (!is_global || blob.rank != Rank{0}) placed.blob.saved_by = blob.rank;
    placed.rank = blob.rank;
    placed.bytes = blob.bytes;
    image.blobs.push_back(std::move(placed));
  }
}

absl::StatusOr<ImageTemplate> ReshardPlan::BuildImage(Rank rank) const {
  const ReshardImage& image = images_[Value(rank)];
  std::vector<Piece> pieces;
  pieces.reserve(image.pieces.size());
  for (const PlacedPiece& placed : image.pieces) pieces.push_back(placed.piece);
  ImageSpec spec;
  spec.job = target_.job;
  spec.job_uuid = target_.job_uuid;
  spec.rank = rank;
  spec.world_size = layout_->world_size();
  spec.block_bytes = block_bytes_;
  spec.layout_json = layout_->text();
  spec.tensor_states = layout_->tensor_states();
  spec.pieces = pieces;
  spec.boxes = &boxes_;
  for (const ReshardBlob& blob : image.blobs) spec.blobs.push_back(blob.blob);
  return ImageTemplate::Build(spec, target_.scratch_directory);
}

absl::Status ReshardPlan::PlaceImages() {
  for (uint32_t rank = 0; rank < images_.size(); ++rank) {
    ReshardImage& image = images_[rank];
    ASSIGN_OR_RETURN(const ImageTemplate built, BuildImage(Rank{rank}));
    image.image_bytes = built.image_bytes();
    image.head_bytes = built.head_bytes();
    image.units_begin = RoundDown(image.head_bytes, alignment_bytes_);
    for (size_t i = 0; i < image.pieces.size(); ++i) {
      image.pieces[i].image_offset_bytes = built.piece_offsets()[i];
    }
    for (size_t i = 0; i < image.blobs.size(); ++i) {
      image.blobs[i].offset_bytes = built.blob_offsets()[i];
    }
  }
  return absl::OkStatus();
}

absl::Status ReshardPlan::PlanCopies() {
  // Every target image is a buffer, every piece a contiguous segment of it.
  RankLayout wanted;
  wanted.boxes = boxes_;
  for (uint32_t image = 0; image < images_.size(); ++image) {
    wanted.buffers.push_back({absl::StrCat("image ", image), images_[image].image_bytes});
    for (const PlacedPiece& placed : images_[image].pieces) {
      if (placed.piece.ElementCount() == 0) continue;
      wanted.segments.push_back({.piece = placed.piece,
                                 .buffer = image,
                                 .strides = kContiguous,
                                 .buffer_offset_bytes = placed.image_offset_bytes});
    }
  }
  const std::vector<StoredPiece> stored = StoredPieces(*source_);
  ASSIGN_OR_RETURN(CopyPlan copies, PlanCopy({source_->tensor_states, source_->boxes, stored},
                                             layout_->tensor_states(), wanted));
  ops_ = std::move(copies.ops);
  // In the order in which AssignBlobs took them: by image it is that of each image's blobs.
  std::vector<size_t> next(images_.size(), 0);
  for (const IndexBlob& blob : source_->blobs) {
    const uint32_t image = blob.scope == BlobScope::kGlobal
                               ? 0
                               : Value(blob.rank) % static_cast<uint32_t>(images_.size());
    const ReshardBlob& placed = images_[image].blobs[next[image]++];
    if (blob.bytes == 0) continue;
    CopyOp op;
    op.image = blob.image;
    op.buffer = image;
    op.image_offset_bytes = blob.offset_bytes;
    op.buffer_offset_bytes = placed.offset_bytes;
    op.run_bytes = blob.bytes;
    ops_.push_back(op);
  }
  for (CopyOp& op : ops_) op = Reversed(op);
  std::sort(ops_.begin(), ops_.end(), [](const CopyOp& a, const CopyOp& b) {
    return std::tie(a.image, a.image_offset_bytes) < std::tie(b.image, b.image_offset_bytes);
  });
  ops_begin_.assign(images_.size() + 1, 0);
  reach_.reserve(ops_.size());
  for (const CopyOp& op : ops_) {
    const bool is_first = ops_begin_[op.image + 1]++ == 0;
    reach_.push_back(is_first ? op.ImageEnd() : std::max(reach_.back(), op.ImageEnd()));
  }
  std::partial_sum(ops_begin_.begin(), ops_begin_.end(), ops_begin_.begin());
  return absl::OkStatus();
}

uint64_t ReshardPlan::image_bytes() const {
  uint64_t bytes = 0;
  for (const ReshardImage& image : images_) bytes += image.image_bytes;
  return bytes;
}

void ReshardPlan::PartsOf(const ReshardUnit& unit, std::vector<ReshardPart>& parts) const {
  parts.clear();
  const auto reach = reach_.begin();
  const auto begin = reach + static_cast<ptrdiff_t>(ops_begin_[unit.image]);
  const auto end = reach + static_cast<ptrdiff_t>(ops_begin_[unit.image + 1]);
  // No op before this one reaches into the unit.
  auto at = static_cast<size_t>(std::upper_bound(begin, end, unit.begin_bytes) - reach);
  std::vector<CopyOp> in_unit;
  for (; at < ops_begin_[unit.image + 1]; ++at) {
    if (ops_[at].image_offset_bytes >= unit.end_bytes) break;
    ClipToImage(ops_[at], unit.begin_bytes, unit.end_bytes, in_unit);
  }
  std::vector<CopyOp> in_block;
  for (const CopyOp& clipped : in_unit) {
    const CopyOp op = Reversed(clipped);
    const uint64_t block_bytes = source_->images[op.image].block_bytes;
    ForEachBlock(op, block_bytes, [&](uint64_t block) {
      in_block.clear();
      ClipToImage(op, block * block_bytes, (block + 1) * block_bytes, in_block);
      for (CopyOp& part : in_block) {
        part.image_offset_bytes -= block * block_bytes;
        part.buffer_offset_bytes -= unit.begin_bytes;
        parts.push_back({part.image, block, part});
      }
    });
  }
  std::stable_sort(parts.begin(), parts.end(), [](const ReshardPart& a, const ReshardPart& b) {
    return std::tie(a.image, a.block) < std::tie(b.image, b.block);
  });
}

// ---- Order of work ----

// Number of the tensor state and of the element that lies at `begin_bytes` of the image, or begins
// the piece if that lies behind.
std::pair<uint32_t, uint64_t> ReshardPlan::FirstElementOf(const ReshardImage& image,
                                                          size_t piece_index,
                                                          uint64_t begin_bytes) const {
  const PlacedPiece& placed = image.pieces[piece_index];
  const TensorState& state = layout_->tensor_states()[placed.piece.tensor_state];
  uint64_t element = placed.piece.begin;
  if (begin_bytes > placed.image_offset_bytes) {
    element += (begin_bytes - placed.image_offset_bytes) / ElementBytes(state.dtype);
  }
  return {placed.piece.tensor_state, ElementInTensor(placed.piece, boxes_, state, element)};
}

uint64_t ReshardPlan::UnitCount(uint64_t unit_bytes) const {
  uint64_t count = 0;
  for (const ReshardImage& image : images_) {
    if (image.units_begin == image.image_bytes) continue;
    count += (image.image_bytes - 1) / unit_bytes - image.units_begin / unit_bytes + 1;
  }
  return count;
}

std::vector<ReshardUnit> ReshardPlan::UnitsOf(uint64_t unit_bytes) const {
  std::vector<OrderedUnit> ordered;
  ordered.reserve(UnitCount(unit_bytes));
  for (uint32_t number = 0; number < images_.size(); ++number) {
    const ReshardImage& image = images_[number];
    size_t piece = 0;
    for (uint64_t begin = image.units_begin; begin < image.image_bytes;) {
      const uint64_t end = RoundDown(begin, unit_bytes) + unit_bytes;
      const auto end_of = [&](const PlacedPiece& placed) {
        const Dtype dtype = layout_->tensor_states()[placed.piece.tensor_state].dtype;
        return placed.image_offset_bytes + placed.piece.ElementCount() * ElementBytes(dtype);
      };
      while (piece < image.pieces.size() && end_of(image.pieces[piece]) <= begin) ++piece;
      // What holds no tensor any more comes last.
      std::pair<uint32_t, uint64_t> first_element(UINT32_MAX, 0);
      if (piece < image.pieces.size() && image.pieces[piece].image_offset_bytes < end) {
        first_element = FirstElementOf(image, piece, begin);
      }
      ordered.push_back({first_element, {number, begin, end}});
      begin = end;
    }
  }
  CHECK(ordered.size() == UnitCount(unit_bytes));
  std::sort(ordered.begin(), ordered.end(), [](const OrderedUnit& a, const OrderedUnit& b) {
    return std::tie(a.first_element, a.unit.image, a.unit.begin_bytes) <
           std::tie(b.first_element, b.unit.image, b.unit.begin_bytes);
  });
  std::vector<ReshardUnit> units;
  units.reserve(ordered.size());
  for (const OrderedUnit& each : ordered) units.push_back(each.unit);
  return units;
}

uint64_t ReshardPlan::SimulateReads(std::span<const ReshardUnit> units, uint32_t slot_count,
                                    uint64_t& distinct_bytes) const {
  LruTable<std::pair<uint32_t, uint64_t>> table(slot_count);
  std::vector<std::vector<bool>> seen;
  for (const IndexImage& image : source_->images) seen.emplace_back(image.block_crc32c.size());
  distinct_bytes = 0;
  uint64_t bytes = 0;
  std::vector<ReshardPart> parts;
  for (const ReshardUnit& unit : units) {
    PartsOf(unit, parts);
    for (size_t i = 0; i < parts.size(); ++i) {
      const std::pair<uint32_t, uint64_t> key(parts[i].image, parts[i].block);
      if (i > 0 && key == std::pair(parts[i - 1].image, parts[i - 1].block)) continue;
      if (table.Find(key).has_value()) continue;
      CHECK(table.Assign(key, [](uint32_t) { return true; }).has_value());
      const uint64_t block_bytes = source_->images[key.first].block_bytes;
      bytes += block_bytes;
      if (!seen[key.first][key.second]) distinct_bytes += block_bytes;
      seen[key.first][key.second] = true;
    }
  }
  return bytes;
}

uint64_t ReshardPlan::slot_bytes() const {
  uint64_t bytes = 0;
  for (const IndexImage& image : source_->images) bytes = std::max(bytes, image.block_bytes);
  return bytes;
}

uint64_t ReshardPlan::unit_bytes_min() const {
  return std::min(block_bytes_, std::max(kUnitBytesWanted, alignment_bytes_));
}

uint64_t ReshardPlan::buffer_bytes_min() const { return unit_bytes_min() + slot_bytes(); }

uint64_t ReshardPlan::memory_bytes_min() const {
  uint64_t least = UINT64_MAX;
  // The sizes that Schedule() tries: the smaller the units, the longer their list.
  for (uint64_t unit_bytes = block_bytes_;;
       unit_bytes = std::max(unit_bytes / 4, unit_bytes_min())) {
    const uint64_t count = UnitCount(unit_bytes);
    least = std::min(least, std::max(count * kUnitBytesPlanned,
                                     count * sizeof(ReshardUnit) + unit_bytes + slot_bytes()));
    if (unit_bytes == unit_bytes_min()) return least;
  }
}

uint64_t ReshardPlan::writer_bytes(uint32_t thread_count) const {
  // Of each tensor state: the sums of each thread, of all, and the copy of these.
  uint64_t bytes =
      (uint64_t{thread_count} + 2) * sizeof(Fingerprint) * layout_->tensor_states().size();
  for (const ReshardImage& image : images_) {
    bytes += alignment_bytes_ + sizeof(uint32_t) * (image.image_bytes / block_bytes_) +
             ImageFingerprints::kBytesPerPiece * image.pieces.size();
  }
  return bytes;
}

ReshardSchedule ReshardPlan::ScheduleUnits(uint64_t unit_bytes, uint64_t buffer_bytes,
                                           uint32_t thread_count_max) const {
  ReshardSchedule schedule;
  schedule.unit_bytes = unit_bytes;
  schedule.slot_bytes = slot_bytes();
  schedule.units = UnitsOf(unit_bytes);
  // As many threads as leave each two blocks of the source: one that it reads, one behind.
  const uint64_t thread_bytes = unit_bytes + 2 * schedule.slot_bytes;
  const uint64_t threads = std::min<uint64_t>(thread_count_max, schedule.units.size());
  schedule.thread_count =
      static_cast<uint32_t>(std::max<uint64_t>(1, std::min(buffer_bytes / thread_bytes, threads)));
  const uint64_t units_bytes = schedule.thread_count * unit_bytes;
  if (buffer_bytes < units_bytes + schedule.slot_bytes) return schedule;
  schedule.slot_count = static_cast<uint32_t>(
      std::min<uint64_t>((buffer_bytes - units_bytes) / schedule.slot_bytes, kSlotsMax));
  // What the other threads hold is not there for reuse.
  const auto reads = [&](uint32_t slot_count) {
    return SimulateReads(schedule.units, slot_count - (schedule.thread_count - 1),
                         schedule.distinct_read_bytes);
  };
  schedule.read_bytes = reads(schedule.slot_count);
  // Memory that spares next to no read is not touched: new pages cost time.
  const uint64_t enough = schedule.read_bytes + schedule.distinct_read_bytes / 100;
  while (schedule.slot_count / 2 >= 2 * schedule.thread_count) {
    const uint64_t with_half = reads(schedule.slot_count / 2);
    if (with_half > enough) break;
    schedule.slot_count /= 2;
    schedule.read_bytes = with_half;
  }
  return schedule;
}

absl::StatusOr<ReshardSchedule> ReshardPlan::Schedule(uint64_t buffer_bytes,
                                                      uint32_t thread_count_max,
                                                      uint64_t memory_bytes) const {
  CHECK(thread_count_max > 0);
  if (buffer_bytes < buffer_bytes_min()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "buffers: expected at least %d bytes, one block of the source and a part of one of the "
        "target, found room for %d",
        buffer_bytes_min(), buffer_bytes));
  }
  if (memory_bytes < memory_bytes_min()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "buffers and the list of the parts of the target: expected at least %d bytes, found room "
        "for %d",
        memory_bytes_min(), memory_bytes));
  }
  const auto again = [](const ReshardSchedule& schedule) {
    return static_cast<double>(schedule.read_bytes - schedule.distinct_read_bytes);
  };
  ReshardSchedule best;
  for (uint64_t unit_bytes = block_bytes_;;
       unit_bytes = std::max(unit_bytes / 4, unit_bytes_min())) {
    const uint64_t count = UnitCount(unit_bytes);
    const uint64_t kept_bytes = best.units.size() * sizeof(ReshardUnit);
    const uint64_t list_bytes = count * sizeof(ReshardUnit);
    if (kept_bytes + count * kUnitBytesPlanned > memory_bytes) break;
    ReshardSchedule schedule = ScheduleUnits(
        unit_bytes, std::min(buffer_bytes, memory_bytes - list_bytes), thread_count_max);
    const bool fits = schedule.slot_count > 0;
    if (fits && (best.slot_count == 0 || again(schedule) < kWorthwhile * again(best))) {
      best = std::move(schedule);
    }
    const bool is_good = best.slot_count > 0 &&
                         again(best) <= kAgainNegligible * static_cast<double>(best.read_bytes);
    if (is_good || unit_bytes == unit_bytes_min()) break;
  }
  CHECK(best.slot_count > 0 && best.buffer_bytes() <= buffer_bytes);
  CHECK(best.buffer_bytes() + best.units.size() * sizeof(ReshardUnit) <= memory_bytes);
  return best;
}

// ---- The index ----

Index ReshardPlan::MakeIndex(CheckpointId checkpoint,
                             std::vector<std::vector<uint32_t>> block_crc32c,
                             std::span<const Fingerprint> sums) const {
  CHECK(block_crc32c.size() == images_.size() && sums.size() == layout_->tensor_states().size());
  Index index;
  index.job = target_.job;
  index.job_uuid = target_.job_uuid;
  index.checkpoint = checkpoint;
  index.world_size = layout_->world_size();
  const uint32_t blob_world_size = source_->BlobWorldSize();
  index.blob_world_size = blob_world_size == index.world_size ? 0 : blob_world_size;
  index.layouts = {layout_->text()};
  index.tensor_states = layout_->tensor_states();
  index.boxes = boxes_;
  for (uint32_t i = 0; i < images_.size(); ++i) {
    index.images.push_back({.file = ImageFileName(Rank{i}),
                            .rank = Rank{i},
                            .layout = 0,
                            .bytes = images_[i].image_bytes,
                            .block_bytes = block_bytes_,
                            .block_crc32c = std::move(block_crc32c[i])});
    for (const PlacedPiece& placed : images_[i].pieces) {
      index.pieces.push_back({placed.piece, i, placed.image_offset_bytes});
    }
    for (const ReshardBlob& blob : images_[i].blobs) {
      index.blobs.push_back({.scope = blob.blob.scope,
                             .rank = blob.rank,
                             .name = blob.blob.name,
                             .image = i,
                             .offset_bytes = blob.offset_bytes,
                             .bytes = blob.bytes});
    }
  }
  for (size_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& state = index.tensor_states[i];
    TensorFacts facts = source_->facts[*source_->FindTensorState(state.tensor, state.state)];
    facts.fingerprint = FingerprintOfShape(state) + sums[i];
    facts.undefined_fingerprint.reset();
    index.facts.push_back(facts);
  }
  SortIndex(index);
  return index;
}

}  // namespace holdfast
