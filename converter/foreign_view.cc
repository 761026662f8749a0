#include "converter/foreign_view.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "format/image.h"
#include "format/planner.h"

namespace holdfast::converter {
namespace {

constexpr size_t kDimsMax = 32;  // H5S_MAX_RANK
// The dataset of a tensor without a name: in escaped names no % stands alone.
constexpr char kNameless[] = "%";

// A reason for which a tensor is not in the view; every other error ends it.
absl::Status LeaveOut(std::string reason) { return absl::UnimplementedError(reason); }

// Why HDF5 cannot show this piece where it is; empty if it can.
std::string Obstacle(const ForeignPiece& piece, const ForeignIndex& index) {
  const TensorState& state = index.tensor_states[piece.piece.tensor_state];
  switch (index.extents[piece.extent].codec) {
    case Codec::kRaw:
      break;
    case Codec::kDeflate:
      return "is stored compressed (deflate)";
    case Codec::kZstd:
      return "is stored compressed (zstd)";
  }
  if (piece.rounded) {
    return absl::StrFormat("is not stored: it is made by rounding float32 to %s",
                           DtypeName(state.dtype));
  }
  if (piece.conjugate) return "is stored conjugated";
  if (piece.negate) return "is stored negated";
  if (piece.byte_order == ByteOrder::kBig && ElementBytes(state.dtype) > 1 &&
      !HasHdf5Order(state.dtype)) {
    return absl::StrFormat("is stored big-endian, and HDF5 has no number like %s",
                           DtypeName(state.dtype));
  }
  return "";
}

// Of one byte there is no order.
Hdf5Order OrderOf(const ForeignPiece& piece, const TensorState& state) {
  return piece.byte_order == ByteOrder::kBig && ElementBytes(state.dtype) > 1 ? Hdf5Order::kBig
                                                                              : Hdf5Order::kLittle;
}

// A range of its tensor if its elements are one, in this order.
Piece RangeOf(const ForeignPiece& piece, const ForeignIndex& index) {
  if (piece.piece.box == kWholeTensor) return piece.piece;
  return AsRange(piece.piece, index.tensor_states[piece.piece.tensor_state], index.boxes);
}

// Every distinct piece once, ranges first and in order: of equal ones the first that can be shown.
absl::StatusOr<std::vector<const ForeignPiece*>> Chosen(const ForeignIndex& index,
                                                        uint32_t number) {
  const auto [first, last] = index.PiecesOf(number);
  std::vector<std::pair<Piece, const ForeignPiece*>> all;
  for (size_t i = first; i < last; ++i) {
    const ForeignPiece& piece = index.pieces[i];
    if (piece.piece.begin != piece.piece.end) all.emplace_back(RangeOf(piece, index), &piece);
  }
  std::stable_sort(all.begin(), all.end(), [&](const auto& a, const auto& b) {
    return ComparePieces(a.first, b.first, index.boxes) < 0;
  });
  std::vector<const ForeignPiece*> chosen;
  for (size_t i = 0; i < all.size();) {
    const ForeignPiece* found = nullptr;
    size_t next = i;
    for (; next < all.size() && ComparePieces(all[i].first, all[next].first, index.boxes) == 0;
         ++next) {
      if (found == nullptr && Obstacle(*all[next].second, index).empty()) found = all[next].second;
    }
    if (found == nullptr) return LeaveOut(Obstacle(*all[i].second, index));
    chosen.push_back(found);
    i = next;
  }
  return chosen;
}

bool IsInline(const ForeignPiece& piece, const ForeignIndex& index) {
  return index.extents[piece.extent].file == kInline;
}

class Builder {
 public:
  Builder(const ForeignIndex& index, const ForeignViewOptions& options)
      : index_(index), options_(options) {
    for (const Alias& alias : index.aliases) aliases_.emplace_back(alias.tensor_state, alias.of);
    std::sort(aliases_.begin(), aliases_.end());
  }

  absl::StatusOr<ForeignView> Run();

 private:
  absl::Status CheckAllThere() const;
  absl::Status Choose();
  std::string Source() const;
  Hdf5ViewDataset Dataset(size_t number);

  // The storage of a tensor state. kUnimplemented: LeaveOut.
  absl::Status CheckForHdf5(const TensorState& state) const;
  absl::StatusOr<Hdf5ViewDataset> Stored(uint32_t number);
  absl::Status Inside(std::span<const ForeignPiece* const> pieces, Hdf5ViewDataset& dataset);
  bool Ranges(std::span<const ForeignPiece* const> pieces, Hdf5ViewDataset& dataset) const;
  absl::Status Parts(std::span<const ForeignPiece* const> pieces, Hdf5ViewDataset& dataset) const;
  absl::Status AddStrided(const ForeignPiece& piece, Hdf5ViewDataset& dataset) const;
  Hdf5ViewSource SourceOf(const ForeignPiece& piece) const;

  const ForeignIndex& index_;
  const ForeignViewOptions& options_;
  std::vector<std::pair<uint32_t, uint32_t>> aliases_;
  ViewGroups groups_;
  std::vector<uint32_t> shown_;
  std::string source_;             // what /holdfast/source says
  std::vector<std::byte> inside_;  // of the dataset that was asked for last
  ForeignView view_;
};

absl::Status Builder::CheckForHdf5(const TensorState& state) const {
  if (state.state.empty()) return LeaveOut("is of a state without a name");
  if (state.shape.size() > kDimsMax) {
    return LeaveOut(absl::StrFormat("has %d dimensions, of which HDF5 knows at most %d",
                                    state.shape.size(), kDimsMax));
  }
  for (const uint64_t size : state.shape) {
    if (size > kTensorBytesMax) {  // it rounds up to a power of two
      return LeaveOut(absl::StrFormat("has a dimension of %d, of which HDF5 knows at most %d", size,
                                      kTensorBytesMax));
    }
  }
  return absl::OkStatus();
}

Hdf5ViewSource Builder::SourceOf(const ForeignPiece& piece) const {
  const Extent& extent = index_.extents[piece.extent];
  Hdf5ViewSource source;
  source.file = absl::StrCat(options_.prefix, index_.files[extent.file].path);
  source.offset_bytes = extent.offset_bytes + piece.offset_bytes;
  source.order = OrderOf(piece, index_.tensor_states[piece.piece.tensor_state]);
  return source;
}

// All of them are in the index: one behind the other, if they are ranges.
absl::Status Builder::Inside(std::span<const ForeignPiece* const> pieces,
                             Hdf5ViewDataset& dataset) {
  inside_.clear();
  const uint64_t element_bytes = ElementBytes(dataset.dtype);
  for (const ForeignPiece* piece : pieces) {
    if (!IsInline(*piece, index_) || RangeOf(*piece, index_).box != kWholeTensor ||
        piece->strides != kContiguous || piece->byte_order != ByteOrder::kLittle) {
      return LeaveOut("is stored partly as text");
    }
    const std::string_view text =
        std::string_view(index_.inline_bytes)
            .substr(index_.extents[piece->extent].offset_bytes + piece->offset_bytes,
                    piece->piece.ElementCount() * element_bytes);
    const auto bytes = std::as_bytes(std::span(text));
    inside_.insert(inside_.end(), bytes.begin(), bytes.end());
  }
  dataset.storage = Hdf5Storage::kInside;
  dataset.bytes = inside_;
  return absl::OkStatus();
}

// False if the pieces are no ranges of bytes one behind the other, of one byte order. They cover
// the tensor, and ranges are in order.
bool Builder::Ranges(std::span<const ForeignPiece* const> pieces, Hdf5ViewDataset& dataset) const {
  const uint64_t element_bytes = ElementBytes(dataset.dtype);
  std::vector<Hdf5ViewSource> ranges;
  for (const ForeignPiece* piece : pieces) {
    if (RangeOf(*piece, index_).box != kWholeTensor || piece->strides != kContiguous) return false;
    Hdf5ViewSource source = SourceOf(*piece);
    source.bytes = piece->piece.ElementCount() * element_bytes;
    if (!ranges.empty() && ranges.back().order != source.order) return false;
    if (!ranges.empty() && ranges.back().file == source.file &&
        ranges.back().offset_bytes + ranges.back().bytes == source.offset_bytes) {
      ranges.back().bytes += source.bytes;
      continue;
    }
    if (ranges.size() == kHdf5RangesMax) return false;
    ranges.push_back(std::move(source));
  }
  dataset.storage = Hdf5Storage::kRanges;
  dataset.order = ranges.front().order;
  dataset.sources = std::move(ranges);
  return true;
}

absl::Status Builder::AddStrided(const ForeignPiece& piece, Hdf5ViewDataset& dataset) const {
  const TensorState& state = index_.tensor_states[piece.piece.tensor_state];
  const std::vector<uint64_t> origin(state.shape.size(), 0);
  const BoxView box = piece.piece.box == kWholeTensor ? BoxView{origin, state.shape}
                                                      : index_.boxes[piece.piece.box];
  const std::vector<uint64_t>& strides = index_.strides[piece.strides];
  std::optional<std::vector<StridedPart>> parts = CutStrides(box.lo, box.size, strides);
  if (!parts.has_value()) {
    return LeaveOut(absl::StrFormat(
        "is stored in more than %d runs: [%s] elements at strides of [%s]", kViewPartsOfPieceMax,
        absl::StrJoin(box.size, ", "), absl::StrJoin(strides, ", ")));
  }
  for (StridedPart& part : *parts) {
    if (part.shape.size() > kDimsMax) {
      return LeaveOut(absl::StrFormat("has strides in more dimensions than HDF5's %d", kDimsMax));
    }
    Hdf5ViewSource source = SourceOf(piece);
    source.offset_bytes += part.offset_elements * ElementBytes(state.dtype);
    source.from.push_back({std::vector<uint64_t>(part.shape.size(), 0), std::move(part.take)});
    source.shape = std::move(part.shape);
    source.boxes.push_back(std::move(part.box));
    dataset.sources.push_back(std::move(source));
  }
  return absl::OkStatus();
}

absl::Status Builder::Parts(std::span<const ForeignPiece* const> pieces,
                            Hdf5ViewDataset& dataset) const {
  const TensorState& state = index_.tensor_states[pieces.front()->piece.tensor_state];
  dataset.storage = Hdf5Storage::kParts;
  for (const ForeignPiece* piece : pieces) {
    if (piece->strides != kContiguous) {
      RETURN_IF_ERROR(AddStrided(*piece, dataset));
      continue;
    }
    Hdf5ViewSource source = SourceOf(*piece);
    source.shape = PieceDatasetShape(piece->piece, state.shape, index_.boxes);
    source.boxes = ViewBoxesOf(piece->piece, state, index_.boxes);
    dataset.sources.push_back(std::move(source));
  }
  return absl::OkStatus();
}

absl::StatusOr<Hdf5ViewDataset> Builder::Stored(uint32_t number) {
  const TensorState& state = index_.tensor_states[number];
  RETURN_IF_ERROR(CheckForHdf5(state));
  Hdf5ViewDataset dataset;
  dataset.name = state.tensor.empty() ? kNameless : PieceDatasetName(state.tensor, 0);
  dataset.dtype = state.dtype;
  dataset.shape = state.shape;
  if (state.ElementCount() == 0) return dataset;
  ASSIGN_OR_RETURN(const std::vector<const ForeignPiece*> pieces, Chosen(index_, number));
  if (std::any_of(pieces.begin(), pieces.end(),
                  [&](const ForeignPiece* piece) { return IsInline(*piece, index_); })) {
    RETURN_IF_ERROR(Inside(pieces, dataset));
  } else if (!Ranges(pieces, dataset)) {
    RETURN_IF_ERROR(Parts(pieces, dataset));
  }
  return dataset;
}

// What is lost is damage, as it is in a view of ours. (Of more dimensions than the planner has, a
// tensor is one piece, and not in the view.)
absl::Status Builder::CheckAllThere() const {
  std::vector<StoredPiece> stored;
  std::vector<TensorState> states = index_.tensor_states;
  for (const ForeignPiece& piece : index_.pieces) {
    if (states[piece.piece.tensor_state].shape.size() > kTensorDimsMax) continue;
    stored.push_back({piece.piece, index_.extents[piece.extent].file, 0});
  }
  for (size_t i = 0; i < states.size(); ++i) {
    if (states[i].shape.size() > kTensorDimsMax) states[i].shape = {0};
    // Names that are legal here, and not there, where they must differ all the same.
    for (std::string* name : {&states[i].tensor, &states[i].state}) {
      if (!CheckName("", *name).ok()) *name = absl::StrCat("number ", i);
    }
  }
  return CheckCover({states, index_.boxes, stored});
}

absl::Status Builder::Choose() {
  for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
    const TensorState& state = index_.tensor_states[i];
    const absl::StatusOr<Hdf5ViewDataset> dataset = Stored(i);
    if (dataset.ok()) {
      shown_.push_back(i);
      groups_.Add(state);
      view_.in_parts_count += dataset->storage == Hdf5Storage::kParts ? 1 : 0;
      view_.copied_bytes += dataset->bytes.size();
      continue;
    }
    if (!absl::IsUnimplemented(dataset.status())) return dataset.status();
    view_.left_out.push_back({state.tensor, state.state, std::string(dataset.status().message())});
  }
  for (const Unreadable& each : index_.unreadable) {
    view_.left_out.push_back({each.name, "", each.reason});
  }
  view_.tensor_count = shown_.size();
  if (!shown_.empty() || view_.left_out.empty()) return absl::OkStatus();
  const ForeignView::LeftOut& first = view_.left_out.front();
  return absl::FailedPreconditionError(absl::StrFormat(
      "%s: expected a tensor that HDF5 can show where it is stored, found none: %s%s%s %s%s",
      options_.source, first.tensor, first.state.empty() ? "" : ", ", first.state, first.reason,
      view_.left_out.size() == 1 ? "" : absl::StrFormat("; %d more", view_.left_out.size() - 1)));
}

// JSON: what the view is of, and what is not in it.
std::string Builder::Source() const {
  nlohmann::ordered_json json = {{"source", options_.source},
                                 {"format", index_.format},
                                 {"variant", index_.variant},
                                 {"files", nlohmann::ordered_json::array()},
                                 {"left_out", nlohmann::ordered_json::array()},
                                 {"repairs", index_.repairs},
                                 {"losses", index_.losses}};
  for (const FolderFile& file : index_.files) {
    json["files"].push_back({{"file", file.path}, {"bytes", file.bytes}});
  }
  for (const ForeignView::LeftOut& each : view_.left_out) {
    json["left_out"].push_back(
        {{"name", each.tensor}, {"state", each.state}, {"reason", each.reason}});
  }
  // A path may be no UTF-8.
  return json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
}

Hdf5ViewDataset Builder::Dataset(size_t number) {
  if (number == shown_.size()) {
    Hdf5ViewDataset source;
    source.group = ViewGroups::kHoldfast;
    source.name = "source";
    source.text = source_;
    return source;
  }
  const TensorState& state = index_.tensor_states[shown_[number]];
  absl::StatusOr<Hdf5ViewDataset> dataset = Stored(shown_[number]);
  CHECK(dataset.ok());  // as it was in Choose
  dataset->group = groups_.Of(state);
  std::set<std::string_view> files;
  for (const Hdf5ViewSource& source : dataset->sources) files.insert(source.file);
  dataset->attributes = {{"state", std::string_view(state.state)},
                         {"dtype", DtypeName(state.dtype)},
                         {"shape", state.shape},
                         {"source_files", uint64_t{files.size()}}};
  if (!state.tensor.empty()) {
    dataset->attributes.push_back({"name", std::string_view(state.tensor)});
  }
  const auto alias = std::lower_bound(aliases_.begin(), aliases_.end(),
                                      std::pair<uint32_t, uint32_t>(shown_[number], 0));
  if (alias != aliases_.end() && alias->first == shown_[number] &&
      !index_.tensor_states[alias->second].tensor.empty()) {
    dataset->attributes.push_back(
        {"alias_of", std::string_view(index_.tensor_states[alias->second].tensor)});
  }
  return *std::move(dataset);
}

absl::StatusOr<ForeignView> Builder::Run() {
  if (const absl::Status cover = CheckAllThere(); !cover.ok()) {
    return absl::Status(cover.code(), absl::StrFormat("%s: %s", options_.source, cover.message()));
  }
  RETURN_IF_ERROR(Choose());
  source_ = Source();
  std::vector<Hdf5Attribute> root = {{"holdfast_view", uint64_t{1}},
                                     {"source", std::string_view(options_.source)},
                                     {"format", std::string_view(index_.format)},
                                     {"writer", WriterVersion()}};
  if (index_.has_step) root.push_back({"step", index_.step});
  Hdf5ViewPlan plan;
  plan.groups = groups_.Make(std::move(root));
  plan.parts_group = ViewGroups::kParts;
  plan.dataset_count = shown_.size() + 1;
  plan.dataset = [this](size_t number) { return Dataset(number); };
  plan.bytes_max = options_.bytes_max;
  ASSIGN_OR_RETURN(view_.bytes, BuildHdf5View(plan));
  return std::move(view_);
}

}  // namespace

std::optional<std::vector<StridedPart>> CutStrides(std::span<const uint64_t> lo,
                                                   std::span<const uint64_t> size,
                                                   std::span<const uint64_t> strides) {
  CHECK(lo.size() == size.size() && size.size() == strides.size());
  // The grid: dimensions in the order of the tensor whose strides are multiples of one another, and
  // which do not overlap. Of all such chains, the one with the most elements.
  std::vector<uint64_t> most(size.size(), 0);  // of the chains that end with this dimension
  std::vector<size_t> before(size.size(), SIZE_MAX);
  size_t last = SIZE_MAX;
  for (size_t d = 0; d < size.size(); ++d) {
    if (size[d] == 1 || strides[d] == 0) continue;
    most[d] = size[d];
    for (size_t p = 0; p < d; ++p) {
      if (most[p] == 0 || strides[p] % strides[d] != 0 || strides[p] / strides[d] < size[d]) {
        continue;
      }
      if (most[p] * size[d] > most[d]) {
        most[d] = most[p] * size[d];
        before[d] = p;
      }
    }
    if (last == SIZE_MAX || most[d] > most[last]) last = d;
  }
  std::vector<size_t> grid;
  for (size_t d = last; d != SIZE_MAX; d = before[d]) grid.push_back(d);
  std::reverse(grid.begin(), grid.end());

  StridedPart part;
  part.box.lo.assign(lo.begin(), lo.end());
  part.box.size.assign(size.size(), 1);
  std::vector<bool> in_grid(size.size(), false);
  for (size_t i = 0; i < grid.size(); ++i) {
    const size_t d = grid[i];
    in_grid[d] = true;
    part.shape.push_back(i == 0 ? size[d] : strides[grid[i - 1]] / strides[d]);
    part.take.push_back(size[d]);
    part.box.size[d] = size[d];
  }
  if (grid.empty() || strides[grid.back()] > 1) {
    part.shape.push_back(grid.empty() ? 1 : strides[grid.back()]);
    part.take.push_back(1);
  }
  uint64_t count = 1;
  std::vector<size_t> loops;
  for (size_t d = 0; d < size.size(); ++d) {
    if (in_grid[d] || size[d] == 1) continue;
    if (size[d] > kViewPartsOfPieceMax / count) return std::nullopt;
    count *= size[d];
    loops.push_back(d);
  }
  std::vector<StridedPart> parts;
  parts.reserve(count);
  for (uint64_t i = 0; i < count; ++i) {
    parts.push_back(part);
    // The next combination, the last dimension first.
    for (size_t l = loops.size(); l-- > 0;) {
      const size_t d = loops[l];
      part.offset_elements += strides[d];
      if (++part.box.lo[d] < lo[d] + size[d]) break;
      part.offset_elements -= size[d] * strides[d];
      part.box.lo[d] = lo[d];
    }
  }
  return parts;
}

absl::StatusOr<ForeignView> BuildForeignView(const ForeignIndex& index,
                                             const ForeignViewOptions& options) {
  return Builder(index, options).Run();
}

}  // namespace holdfast::converter
