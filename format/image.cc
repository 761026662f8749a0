#include "format/image.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "format/hdf5_template.h"
#include "format/manifest.h"

namespace holdfast {
namespace {

// A cell is found by the value that the template is built with: a number in the low half, this mark
// in the high one. No mark can stand in text, since these bytes are in no UTF-8. It could stand in
// a shape: if a mark turns up elsewhere, the next one is tried.
constexpr uint32_t kCellMarks[] = {0xC1FEF8FF, 0xC0FFFEF9, 0xF5FDC1FF};

constexpr uint32_t kAttemptCell = 0;
constexpr uint32_t kStepCell = 1;
constexpr uint32_t kFirstBlobCell = 2;

constexpr uint64_t CellValue(uint32_t mark, uint32_t number) {
  return uint64_t{mark} << 32 | number;
}

void StoreLittleEndian(uint64_t value, std::span<std::byte> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<std::byte>(value >> (8 * i));
}

// Offsets of cells 0 to count - 1; empty if one is not found exactly once.
std::optional<std::vector<uint64_t>> FindCells(std::span<const std::byte> head, uint32_t mark,
                                               size_t count) {
  std::vector<uint64_t> offsets(count, UINT64_MAX);
  std::byte pattern[4];
  StoreLittleEndian(mark, pattern);
  for (auto from = head.begin();;) {
    const auto at = std::search(from, head.end(), std::begin(pattern), std::end(pattern));
    if (at == head.end()) break;
    from = at + 1;
    const auto position = static_cast<size_t>(at - head.begin());
    if (position < 4) return std::nullopt;
    uint32_t number = 0;
    for (size_t i = 0; i < 4; ++i) {
      number |= std::to_integer<uint32_t>(head[position - 4 + i]) << (8 * i);
    }
    if (number >= count || offsets[number] != UINT64_MAX) return std::nullopt;
    offsets[number] = position - 4;
  }
  if (std::find(offsets.begin(), offsets.end(), UINT64_MAX) != offsets.end()) return std::nullopt;
  return offsets;
}

// The file that an image spec asks for.
class ImagePlan {
 public:
  explicit ImagePlan(const ImageSpec& spec) : spec_(spec) { NumberPieces(); }

  Hdf5Plan ForMark(uint32_t mark) const;

  // Datasets in front of the pieces: the layout.
  static constexpr size_t kFirstPiece = 1;
  size_t first_blob() const { return kFirstPiece + spec_.pieces.size(); }
  size_t dataset_count() const { return first_blob() + spec_.blobs.size(); }
  size_t cell_count() const { return kFirstBlobCell + spec_.blobs.size(); }

 private:
  enum : uint32_t { kRootGroup, kHoldfastGroup, kTensorsGroup, kBlobsGroup, kFirstFreeGroup };

  void NumberPieces();
  std::string PieceName(size_t piece) const;
  Hdf5Dataset Dataset(uint32_t mark, size_t index) const;
  Hdf5Dataset PieceDataset(size_t piece_index) const;
  Hdf5Dataset BlobDataset(uint32_t mark, size_t blob_index) const;

  const ImageSpec& spec_;
  std::vector<std::string_view> states_;  // in order of first use; group kFirstFreeGroup + index
  std::vector<uint32_t> group_of_piece_;
  std::vector<uint32_t> number_of_piece_;  // among the pieces of the same tensor state
  std::vector<uint64_t> names_bytes_;      // of each state
  std::vector<BlobScope> scopes_;          // used by blobs; their groups follow the states'
};

void ImagePlan::NumberPieces() {
  std::map<std::string_view, uint32_t> group_of_state;
  std::vector<uint32_t> pieces_of_state(spec_.tensor_states.size(), 0);
  for (const Piece& piece : spec_.pieces) {
    const TensorState& tensor_state = spec_.tensor_states[piece.tensor_state];
    const auto [at, is_new] = group_of_state.try_emplace(
        tensor_state.state, static_cast<uint32_t>(kFirstFreeGroup + states_.size()));
    if (is_new) {
      states_.push_back(tensor_state.state);
      names_bytes_.push_back(0);
    }
    group_of_piece_.push_back(at->second);
    number_of_piece_.push_back(pieces_of_state[piece.tensor_state]++);
    // A heap entry is the name and its NUL, rounded up to 8.
    names_bytes_[at->second - kFirstFreeGroup] +=
        (PieceName(number_of_piece_.size() - 1).size() + 8) / 8 * 8;
  }
  for (const ImageBlob& blob : spec_.blobs) {
    if (std::find(scopes_.begin(), scopes_.end(), blob.scope) == scopes_.end()) {
      scopes_.push_back(blob.scope);
    }
  }
}

std::string ImagePlan::PieceName(size_t piece) const {
  return PieceDatasetName(spec_.tensor_states[spec_.pieces[piece].tensor_state].tensor,
                          number_of_piece_[piece]);
}

Hdf5Plan ImagePlan::ForMark(uint32_t mark) const {
  Hdf5Plan plan;
  plan.groups.push_back({"/",
                         {{"format_version", uint64_t{kFormatVersion}},
                          {"job", std::string_view(spec_.job)},
                          {"job_uuid", std::string_view(spec_.job_uuid)},
                          {"rank", uint64_t{Value(spec_.rank)}},
                          {"world_size", uint64_t{spec_.world_size}},
                          {"writer", WriterVersion()},
                          {"attempt", CellValue(mark, kAttemptCell)},
                          {"step", CellValue(mark, kStepCell)}},
                         64});
  plan.groups.push_back({"/holdfast", {}, 16});
  plan.groups.push_back({"/tensors", {}, 16 * states_.size()});
  plan.groups.push_back({"/blobs", {}, 32});
  for (size_t i = 0; i < states_.size(); ++i) {
    plan.groups.push_back({absl::StrCat("/tensors/", EscapeName(states_[i])),
                           {{"name", states_[i]}},
                           names_bytes_[i]});
  }
  for (const BlobScope scope : scopes_) {
    plan.groups.push_back(
        {absl::StrCat("/blobs/", std::string(BlobScopeName(scope))), {}, 32 * spec_.blobs.size()});
  }
  plan.dataset_count = dataset_count();
  plan.dataset = [this, mark](size_t index) { return Dataset(mark, index); };
  plan.alignment_bytes = kImageAlignmentBytes;
  plan.head_bytes_max = kHeadBytesMax;
  return plan;
}

Hdf5Dataset ImagePlan::Dataset(uint32_t mark, size_t index) const {
  if (index >= first_blob()) return BlobDataset(mark, index - first_blob());
  if (index >= kFirstPiece) return PieceDataset(index - kFirstPiece);
  Hdf5Dataset layout;
  layout.group = kHoldfastGroup;
  layout.name = "layout";
  layout.text = spec_.layout_json;
  return layout;
}

Hdf5Dataset ImagePlan::PieceDataset(size_t piece_index) const {
  const Piece& piece = spec_.pieces[piece_index];
  const TensorState& tensor_state = spec_.tensor_states[piece.tensor_state];
  Hdf5Dataset dataset;
  dataset.group = group_of_piece_[piece_index];
  dataset.name = PieceName(piece_index);
  dataset.dtype = tensor_state.dtype;
  dataset.attributes = {{"name", std::string_view(tensor_state.tensor)},
                        {"dtype", DtypeName(tensor_state.dtype)},
                        {"shape", tensor_state.shape},
                        {"range", std::vector<uint64_t>{piece.begin, piece.end}}};
  if (piece.box != kWholeTensor) {
    const BoxView box = (*spec_.boxes)[piece.box];
    dataset.attributes.push_back({"box_lo", std::vector<uint64_t>(box.lo.begin(), box.lo.end())});
    dataset.attributes.push_back(
        {"box_size", std::vector<uint64_t>(box.size.begin(), box.size.end())});
  }
  dataset.shape = PieceDatasetShape(piece, tensor_state.shape, *spec_.boxes);
  return dataset;
}

Hdf5Dataset ImagePlan::BlobDataset(uint32_t mark, size_t blob_index) const {
  const ImageBlob& blob = spec_.blobs[blob_index];
  const auto scope = std::find(scopes_.begin(), scopes_.end(), blob.scope);
  Hdf5Dataset dataset;
  dataset.group = static_cast<uint32_t>(kFirstFreeGroup + states_.size()) +
                  static_cast<uint32_t>(scope - scopes_.begin());
  dataset.name = EscapeName(blob.name);
  dataset.shape = {blob.capacity_bytes};
  dataset.attributes = {
      {"name", std::string_view(blob.name)},
      {"bytes", CellValue(mark, kFirstBlobCell + static_cast<uint32_t>(blob_index))}};
  if (blob.saved_by.has_value()) {
    // An escaped name has no dot, so this cannot be the name of another blob.
    absl::StrAppend(&dataset.name, ".rank", Value(*blob.saved_by));
    dataset.attributes.push_back({"saved_by", uint64_t{Value(*blob.saved_by)}});
  }
  return dataset;
}

absl::Status CheckBlobs(std::span<const ImageBlob> blobs) {
  std::set<std::tuple<BlobScope, std::string_view, std::optional<Rank>>> seen;
  for (const ImageBlob& blob : blobs) {
    RETURN_IF_ERROR(CheckName("blob", blob.name));
    if (!seen.emplace(blob.scope, blob.name, blob.saved_by).second) {
      return absl::InvalidArgumentError(absl::StrFormat("blob \"%s\" of scope %s is given twice",
                                                        blob.name, BlobScopeName(blob.scope)));
    }
    if (blob.capacity_bytes > kImageBytesMax) {
      return absl::InvalidArgumentError(
          absl::StrFormat("blob \"%s\": expected a capacity of at most %d bytes, found %d",
                          blob.name, kImageBytesMax, blob.capacity_bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSpec(const ImageSpec& spec) {
  CHECK(spec.boxes != nullptr);
  RETURN_IF_ERROR(CheckJobName(spec.job));
  RETURN_IF_ERROR(CheckJobUuid(spec.job_uuid));
  RETURN_IF_ERROR(CheckBlockBytes(spec.block_bytes));
  if (Value(spec.rank) >= spec.world_size) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "rank: expected less than the world size %d, found %d", spec.world_size, Value(spec.rank)));
  }
  if (spec.layout_json.empty()) {
    return absl::InvalidArgumentError("layout document: expected text, found nothing");
  }
  RETURN_IF_ERROR(CheckBlobs(spec.blobs));
  uint64_t total_bytes = 0;
  const auto add = [&](uint64_t bytes) {
    total_bytes += std::min(bytes, kImageBytesMax) + kImageAlignmentBytes;
    return total_bytes <= kImageBytesMax;
  };
  bool fits = true;
  for (const Piece& piece : spec.pieces) {
    RETURN_IF_ERROR(CheckPiece(piece, spec.tensor_states, *spec.boxes));
    const TensorState& tensor_state = spec.tensor_states[piece.tensor_state];
    RETURN_IF_ERROR(CheckTensorState(tensor_state));
    fits = fits && add(piece.ElementCount() * ElementBytes(tensor_state.dtype));
  }
  for (const ImageBlob& blob : spec.blobs) fits = fits && add(blob.capacity_bytes);
  if (!fits) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "image: expected at most %d bytes of tensors and blobs, found more", kImageBytesMax));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckBlockBytes(uint64_t block_bytes) {
  const bool is_power_of_two = (block_bytes & (block_bytes - 1)) == 0;
  if (!is_power_of_two || block_bytes < kBlockBytesMin || block_bytes > kBlockBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("block_bytes: expected a power of two from %d to %d, found %d",
                        kBlockBytesMin, kBlockBytesMax, block_bytes));
  }
  return absl::OkStatus();
}

std::string_view BlobScopeName(BlobScope scope) {
  return scope == BlobScope::kGlobal ? "global" : "rank";
}

std::string EscapeName(std::string_view name) {
  std::string escaped;
  escaped.reserve(name.size() + 16);
  for (const char c : name) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '/' || c == '.' || c == '%' || byte < 0x20 || byte == 0x7f) {
      absl::StrAppendFormat(&escaped, "%%%02X", byte);
    } else {
      escaped.push_back(c);
    }
  }
  return escaped;
}

std::string PieceDatasetName(std::string_view tensor, uint32_t number) {
  std::string name = EscapeName(tensor);
  // An escaped name has no dot, so this cannot be the name of another tensor.
  if (number > 0) absl::StrAppend(&name, ".g", number);
  return name;
}

std::vector<uint64_t> PieceDatasetShape(const Piece& piece, std::span<const uint64_t> tensor_shape,
                                        const BoxTable& boxes) {
  const std::span<const uint64_t> size =
      piece.box == kWholeTensor ? tensor_shape : boxes[piece.box].size;
  uint64_t count = 1;
  for (const uint64_t extent : size) count *= extent;
  if (piece.begin != 0 || piece.end != count) return {piece.ElementCount()};
  return {size.begin(), size.end()};
}

std::string_view WriterVersion() { return "holdfast " HOLDFAST_VERSION; }

absl::StatusOr<ImageTemplate> ImageTemplate::Build(const ImageSpec& spec,
                                                   const std::string& scratch_directory) {
  RETURN_IF_ERROR(CheckSpec(spec));
  const ImagePlan image_plan(spec);
  for (const uint32_t mark : kCellMarks) {
    ASSIGN_OR_RETURN(Hdf5Layout layout,
                     BuildHdf5Layout(image_plan.ForMark(mark), scratch_directory));
    const std::optional<std::vector<uint64_t>> cells =
        FindCells(layout.head, mark, image_plan.cell_count());
    if (!cells.has_value()) continue;

    ImageTemplate result;
    result.block_bytes_ = spec.block_bytes;
    result.image_bytes_ =
        (layout.end_bytes + spec.block_bytes - 1) / spec.block_bytes * spec.block_bytes;
    result.head_ = std::move(layout.head);
    const auto& offsets = layout.dataset_offsets;
    const auto first_piece = offsets.begin() + ImagePlan::kFirstPiece;
    const auto first_blob = offsets.begin() + static_cast<ptrdiff_t>(image_plan.first_blob());
    result.piece_offsets_.assign(first_piece, first_blob);
    result.blob_offsets_.assign(first_blob, offsets.end());
    for (const ImageBlob& blob : spec.blobs) result.blob_capacities_.push_back(blob.capacity_bytes);
    // Nothing of the marks stays behind: the template does not depend on which one served.
    for (const uint64_t cell : *cells) {
      StoreLittleEndian(0, std::span(result.head_).subspan(cell, 8));
    }
    result.cells_ = *cells;
    return result;
  }
  return absl::InternalError("the values that each save writes were not found in the HDF5 head");
}

void ImageTemplate::StampHead(const ImageStamp& stamp, uint64_t begin,
                              std::span<std::byte> out) const {
  CHECK(begin <= head_.size() && out.size() <= head_.size() - begin);
  CHECK(stamp.blob_bytes.size() == blob_capacities_.size());
  if (!out.empty()) std::memcpy(out.data(), head_.data() + begin, out.size());
  for (size_t i = 0; i < cells_.size(); ++i) {
    uint64_t value = 0;
    if (i == kAttemptCell) {
      value = Value(stamp.checkpoint.attempt);
    } else if (i == kStepCell) {
      value = Value(stamp.checkpoint.step);
    } else {
      value = stamp.blob_bytes[i - kFirstBlobCell];
      CHECK(value == kBlobAbsent || value <= blob_capacities_[i - kFirstBlobCell]);
    }
    std::byte bytes[8];
    StoreLittleEndian(value, bytes);
    for (uint64_t k = 0; k < 8; ++k) {
      const uint64_t at = cells_[i] + k;
      if (at >= begin && at - begin < out.size()) out[at - begin] = bytes[k];
    }
  }
}

}  // namespace holdfast
