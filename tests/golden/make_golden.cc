// Writes the golden checkpoint of format 1, which format/golden_test.cc reads for ever (P10):
//
//   make_golden DIRECTORY
//
// Run once per format version, never by a test; the result is committed under tests/data. A change
// of it is a change of the format.
//
// It holds every kind of thing that a checkpoint can hold, in 2 ranks: replicated, sharded and flat
// states, most dtypes, 0-d and empty tensors, names to escape, blobs of both scopes and one that
// was not given. Element i of a tensor state has the bytes of golden_test.cc's GoldenByte().
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "format/image.h"
#include "format/index.h"
#include "format/layout.h"
#include "format/manifest.h"
#include "format/writer_assignment.h"

namespace holdfast {
namespace {

constexpr char kJob[] = "golden.job-1";
constexpr char kUuid[] = "c0ffee00-1234-4abc-8def-0123456789ab";
constexpr CheckpointId kCheckpoint{Attempt{3}, Step{42}};
constexpr uint64_t kBlockBytes = 4096;
constexpr char kLayout[] = R"({"holdfast_layout": 1,
 "mesh": [{"axis": "dp", "size": 2}],
 "tensors": [
  {"name": "embed/wte.weight", "shape": [16, 8], "states": [
   {"state": "param", "dtype": "bfloat16"},
   {"state": "exp_avg", "dtype": "float32",
    "place": [{"op": "flat", "axis": "dp", "rule": "ceil"}]}]},
  {"name": "embed", "shape": [7], "states": [{"state": "param", "dtype": "float8_e4m3fn"}]},
  {"name": "h.0.attn", "shape": [6, 4], "states": [
   {"state": "param", "dtype": "float32",
    "place": [{"op": "shard", "dim": 1, "axis": "dp", "rule": "even"}]}]},
  {"name": "scale", "shape": [], "states": [{"state": "param", "dtype": "float64"}]},
  {"name": "empty", "shape": [0, 3], "states": [{"state": "param", "dtype": "int32"}]},
  {"name": "mask", "shape": [5], "states": [
   {"state": "param", "dtype": "bool",
    "place": [{"op": "shard", "dim": 0, "axis": "dp", "rule": "ceil"}]}]},
  {"name": "größe", "shape": [3], "states": [{"state": "param", "dtype": "int64"}]}]})";

// Numbered as `number` among the tensor states of the document.
std::byte GoldenByte(Dtype dtype, uint64_t number, uint64_t element, uint64_t byte) {
  if (dtype == Dtype::kBool) return static_cast<std::byte>(element % 2);
  return static_cast<std::byte>(element * 31 + byte * 7 + number * 53 + 1);
}

absl::Status WriteFile(const std::string& path, std::span<const std::byte> bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  file.close();
  return file.good() ? absl::OkStatus() : absl::UnavailableError("cannot write " + path);
}

absl::Status WriteFile(const std::string& path, const std::string& text) {
  return WriteFile(path, std::as_bytes(std::span(text)));
}

// The image of one rank, complete, and its entries in the index.
absl::StatusOr<std::vector<std::byte>> MakeImage(const Layout& layout, Rank rank,
                                                 const std::string& scratch, Index& index) {
  ASSIGN_OR_RETURN(const RankLayout stored, WriterAssignment::Create(layout).ForRank(rank, {}));
  std::vector<Piece> pieces;
  for (const Segment& segment : stored.segments) pieces.push_back(segment.piece);
  ImageSpec spec;
  spec.job = kJob;
  spec.job_uuid = kUuid;
  spec.rank = rank;
  spec.world_size = 2;
  spec.block_bytes = kBlockBytes;
  spec.layout_json = layout.text();
  spec.tensor_states = layout.tensor_states();
  spec.pieces = pieces;
  spec.boxes = &stored.boxes;
  std::vector<std::string> contents = {absl::StrCat("random state of rank ", Value(rank)), ""};
  std::vector<uint64_t> blob_bytes = {contents[0].size(), kBlobAbsent};
  spec.blobs = {{BlobScope::kRank, "rng", 64}, {BlobScope::kRank, "not/given", 8}};
  if (rank == Rank{0}) {
    spec.blobs.push_back({BlobScope::kGlobal, "args", 100});
    contents.push_back("--seed 1 --lr 3e-4");
    blob_bytes.push_back(contents.back().size());
  }

  ASSIGN_OR_RETURN(const ImageTemplate image, ImageTemplate::Build(spec, scratch));
  std::vector<std::byte> bytes(image.image_bytes());
  image.StampHead({kCheckpoint, blob_bytes}, 0, std::span(bytes).first(image.head_bytes()));
  for (size_t i = 0; i < pieces.size(); ++i) {
    const TensorState& tensor_state = layout.tensor_states()[pieces[i].tensor_state];
    const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
    uint64_t at = image.piece_offsets()[i];
    for (uint64_t element = pieces[i].begin; element < pieces[i].end; ++element) {
      const uint64_t number = ElementInTensor(pieces[i], stored.boxes, tensor_state, element);
      for (uint64_t b = 0; b < element_bytes; ++b) {
        bytes[at++] = GoldenByte(tensor_state.dtype, pieces[i].tensor_state, number, b);
      }
    }
    IndexPiece piece{pieces[i], Value(rank), image.piece_offsets()[i]};
    if (piece.piece.box != kWholeTensor) {
      const BoxView box = stored.boxes[piece.piece.box];
      piece.piece.box = index.boxes.Add(box.lo, box.size);
    }
    index.pieces.push_back(piece);
  }
  for (size_t i = 0; i < spec.blobs.size(); ++i) {
    if (blob_bytes[i] == kBlobAbsent) continue;
    const uint64_t at = image.blob_offsets()[i];
    std::ranges::copy(std::as_bytes(std::span(contents[i])),
                      bytes.begin() + static_cast<ptrdiff_t>(at));
    index.blobs.push_back(
        {spec.blobs[i].scope, rank, spec.blobs[i].name, Value(rank), at, blob_bytes[i]});
  }

  IndexImage entry{
      ImageFileName(rank, rank == Rank{1} ? 1 : 0), rank, 0, bytes.size(), kBlockBytes, {}};
  for (size_t at = 0; at < bytes.size(); at += kBlockBytes) {
    entry.block_crc32c.push_back(Crc32c(std::span(bytes).subspan(at, kBlockBytes)));
  }
  index.images.push_back(std::move(entry));
  return bytes;
}

absl::Status MakeGolden(const std::string& root) {
  const std::string job_directory = absl::StrCat(root, "/", kJob);
  const std::string directory =
      absl::StrCat(job_directory, "/", CheckpointDirectoryName(kCheckpoint));
  std::filesystem::create_directories(directory);
  ASSIGN_OR_RETURN(const std::unique_ptr<const Layout> layout, Layout::Parse(kLayout));

  Index index;
  index.job = kJob;
  index.job_uuid = kUuid;
  index.checkpoint = kCheckpoint;
  index.world_size = 2;
  index.layouts = {layout->text()};
  index.tensor_states = layout->tensor_states();
  index.facts.resize(index.tensor_states.size());
  index.facts[0].undefined_fingerprint.emplace().fill(std::byte{0x5A});
  index.facts[0].non_finite_count = 7;
  index.facts[1].marks = 0;
  for (const Rank rank : {Rank{0}, Rank{1}}) {
    ASSIGN_OR_RETURN(const std::vector<std::byte> bytes,
                     MakeImage(*layout, rank, directory, index));
    RETURN_IF_ERROR(WriteFile(absl::StrCat(directory, "/", index.images.back().file), bytes));
  }
  SortIndex(index);
  ASSIGN_OR_RETURN(const std::vector<std::byte> index_bytes, EncodeIndex(index));
  RETURN_IF_ERROR(WriteFile(absl::StrCat(directory, "/", kIndexFileName), index_bytes));

  const absl::Time time = absl::FromUnixSeconds(1'800'000'000);
  const std::string writer(WriterVersion());
  Manifest manifest;
  manifest.job = kJob;
  manifest.job_uuid = kUuid;
  manifest.checkpoint = kCheckpoint;
  manifest.parent = CheckpointId{Attempt{2}, Step{40}};
  manifest.world_size = 2;
  manifest.survives = {.process = true, .power = true, .nodes = 0};
  manifest.index_bytes = index_bytes.size();
  manifest.index_crc32c = Crc32c(index_bytes);
  for (const IndexImage& image : index.images) {
    manifest.images.push_back({image.file, image.bytes, ChecksumRoot(image.block_crc32c)});
  }
  manifest.created_by = writer;
  manifest.created_at = time;
  RETURN_IF_ERROR(
      WriteFile(absl::StrCat(directory, "/", kManifestFileName), EncodeManifest(manifest)));
  RETURN_IF_ERROR(WriteFile(absl::StrCat(job_directory, "/", kJobFileName),
                            EncodeJobRecord({kJob, kUuid, writer, time})));
  const Head head{1, kUuid, kCheckpoint, Attempt{5}, "the loss went up", writer, time};
  RETURN_IF_ERROR(WriteFile(absl::StrCat(job_directory, "/", HeadFileName(1)), EncodeHead(head)));
  // Beside the job, so that the checkpoint itself stays good.
  const BadMark bad{1, kUuid, kCheckpoint, "NaN in \"embed\"", writer, time};
  return WriteFile(absl::StrCat(root, "/", BadFileName(1)), EncodeBadMark(bad));
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: make_golden DIRECTORY\n");
    return 2;
  }
  const absl::Status status = holdfast::MakeGolden(argv[1]);
  if (!status.ok()) std::fprintf(stderr, "make_golden: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
