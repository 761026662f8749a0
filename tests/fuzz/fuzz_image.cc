// Heads of images are made by libhdf5 out of names, shapes and pieces that a trainer chooses. What
// is built holds every piece and blob at a place of its own.
#include <algorithm>
#include <string>
#include <vector>

#include "base/check.h"
#include "format/image.h"
#include "tests/fuzz/input_reader.h"
#include "tests/fuzz/scratch.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

// At most so many of each thing: libhdf5 takes long for more.
constexpr size_t kStatesMax = 6;
constexpr size_t kPiecesMax = 12;
constexpr size_t kBlobsMax = 4;

struct Range {
  uint64_t begin = 0;
  uint64_t end = 0;
};

std::vector<TensorState> ReadStates(InputReader& reader) {
  std::vector<TensorState> states(1 + reader.Byte() % kStatesMax);
  for (TensorState& state : states) {
    state.tensor = reader.Text();
    state.state = reader.Text();
    state.dtype = DtypeFromNumber(reader.Byte()).value_or(Dtype::kFloat8E5m2);
    state.shape.resize(reader.Byte() % (kTensorDimsMax + 2));
    for (uint64_t& size : state.shape) size = reader.Number();
  }
  return states;
}

std::vector<Piece> ReadPieces(InputReader& reader, const std::vector<TensorState>& states,
                              BoxTable& boxes) {
  std::vector<Piece> pieces(reader.Byte() % kPiecesMax);
  for (Piece& piece : pieces) {
    piece.tensor_state = static_cast<uint32_t>(reader.Byte() % states.size());
    const size_t dims = std::min(states[piece.tensor_state].shape.size(), kTensorDimsMax);
    if (reader.Byte() % 2 == 1) {
      std::vector<uint64_t> lo(dims);
      std::vector<uint64_t> size(dims);
      for (uint64_t& each : lo) each = reader.Number();
      for (uint64_t& each : size) each = reader.Number();
      piece.box = boxes.Add(lo, size);
    }
    piece.begin = reader.Number();
    piece.end = reader.Number();
  }
  return pieces;
}

void CheckApart(std::vector<Range> ranges, uint64_t end) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uint64_t covered = 0;
  for (const Range& range : ranges) {
    CHECK(range.begin >= covered && range.begin <= range.end);
    covered = range.end;
  }
  CHECK(covered <= end);
}

void CheckTemplate(const ImageSpec& spec, const ImageTemplate& image) {
  CHECK(image.image_bytes() % spec.block_bytes == 0);
  CHECK(image.piece_offsets().size() == spec.pieces.size());
  CHECK(image.blob_offsets().size() == spec.blobs.size());
  std::vector<Range> ranges = {{0, image.head_bytes()}};
  for (size_t i = 0; i < spec.pieces.size(); ++i) {
    const uint64_t bytes = spec.pieces[i].ElementCount() *
                           ElementBytes(spec.tensor_states[spec.pieces[i].tensor_state].dtype);
    const uint64_t begin = image.piece_offsets()[i];
    if (bytes > 0) ranges.push_back({begin, begin + bytes});
  }
  for (size_t i = 0; i < spec.blobs.size(); ++i) {
    const uint64_t begin = image.blob_offsets()[i];
    if (spec.blobs[i].capacity_bytes > 0) {
      ranges.push_back({begin, begin + spec.blobs[i].capacity_bytes});
    }
  }
  CheckApart(std::move(ranges), image.image_bytes());
  std::vector<std::byte> head(image.head_bytes());
  const std::vector<uint64_t> lengths(spec.blobs.size(), kBlobAbsent);
  image.StampHead({{Attempt{1}, Step{2}}, lengths}, 0, head);
}

}  // namespace

bool FuzzImage(Input input) {
  InputReader reader(input);
  ImageSpec spec;
  spec.job = "job";
  spec.job_uuid = "01234567-89ab-cdef-0123-456789abcdef";
  spec.world_size = 1;
  spec.block_bytes = uint64_t{1} << (reader.Byte() % 32);
  const std::string layout_json = reader.Text();
  spec.layout_json = layout_json;
  const std::vector<TensorState> states = ReadStates(reader);
  BoxTable boxes;
  const std::vector<Piece> pieces = ReadPieces(reader, states, boxes);
  spec.tensor_states = states;
  spec.pieces = pieces;
  spec.boxes = &boxes;
  spec.blobs.resize(reader.Byte() % kBlobsMax);
  for (ImageBlob& blob : spec.blobs) {
    blob.scope = reader.Byte() % 2 == 0 ? BlobScope::kGlobal : BlobScope::kRank;
    blob.name = reader.Text();
    blob.capacity_bytes = reader.Number();
  }
  const auto image = ImageTemplate::Build(spec, ScratchDirectory());
  if (image.ok()) {
    CheckTemplate(spec, *image);
    return true;
  }
  CHECK(image.status().code() == absl::StatusCode::kInvalidArgument ||
        image.status().code() == absl::StatusCode::kResourceExhausted);
  return false;
}

}  // namespace holdfast::fuzz
