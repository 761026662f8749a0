// Writes a committed checkpoint of any layout, without an agent: for tests and benchmarks of what
// reads checkpoints.
//
//   make_checkpoint LAYOUT.json JOB_DIRECTORY STEP
//
// Step STEP of attempt 1, one image per rank, blocks of 4 KiB, no blobs, no fingerprints. Element e
// of the row-major order of tensor state number s (document order) is, if float32, e + 1000 s; if
// bool, e mod 2; else byte b of it is 31 e + 7 b + 53 s + 1, mod 256.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "format/image.h"
#include "format/index.h"
#include "format/layout.h"
#include "format/manifest.h"
#include "format/writer_assignment.h"
#include "io/posix_file_system.h"

namespace holdfast {
namespace {

constexpr char kUuid[] = "01234567-89ab-4cde-8f01-23456789abcd";
constexpr uint64_t kBlockBytes = 4096;

absl::Status WriteFile(const std::string& path, std::span<const std::byte> bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  file.close();
  return file.good() ? absl::OkStatus() : absl::UnavailableError("cannot write " + path);
}

void WriteElement(Dtype dtype, uint64_t state, uint64_t element, std::span<std::byte> out) {
  if (dtype == Dtype::kFloat32) {
    const float value = static_cast<float>(element + 1000 * state);
    std::copy_n(reinterpret_cast<const std::byte*>(&value), out.size(), out.begin());
    return;
  }
  for (uint64_t b = 0; b < out.size(); ++b) {
    out[b] = static_cast<std::byte>(dtype == Dtype::kBool ? element % 2
                                                          : 31 * element + 7 * b + 53 * state + 1);
  }
}

// The elements of a piece, in its order.
void WritePiece(const Piece& piece, const TensorState& tensor_state, const BoxTable& boxes,
                std::span<std::byte> out) {
  const std::vector<uint64_t> origin(tensor_state.shape.size(), 0);
  const BoxView box =
      piece.box == kWholeTensor ? BoxView{origin, tensor_state.shape} : boxes[piece.box];
  const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
  for (uint64_t i = piece.begin; i < piece.end; ++i) {
    uint64_t rest = i;
    uint64_t element = 0;
    uint64_t weight = 1;
    for (size_t d = box.size.size(); d-- > 0;) {
      element += weight * (box.lo[d] + rest % box.size[d]);
      rest /= box.size[d];
      weight *= tensor_state.shape[d];
    }
    WriteElement(tensor_state.dtype, piece.tensor_state, element,
                 out.subspan((i - piece.begin) * element_bytes, element_bytes));
  }
}

absl::Status AddImage(const Layout& layout, const WriterAssignment& writers, Rank rank,
                      const std::string& directory, Index& index) {
  ASSIGN_OR_RETURN(const RankLayout stored, writers.ForRank(rank, {}));
  std::vector<Piece> pieces;
  for (const Segment& segment : stored.segments) pieces.push_back(segment.piece);
  ImageSpec spec;
  spec.job = index.job;
  spec.job_uuid = kUuid;
  spec.rank = rank;
  spec.world_size = layout.world_size();
  spec.block_bytes = kBlockBytes;
  spec.layout_json = layout.text();
  spec.tensor_states = layout.tensor_states();
  spec.pieces = pieces;
  spec.boxes = &stored.boxes;
  ASSIGN_OR_RETURN(const ImageTemplate image, ImageTemplate::Build(spec, directory));
  std::vector<std::byte> bytes(image.image_bytes());
  image.StampHead({index.checkpoint, {}}, 0, std::span(bytes).first(image.head_bytes()));
  for (size_t i = 0; i < pieces.size(); ++i) {
    IndexPiece piece{pieces[i], Value(rank), image.piece_offsets()[i]};
    const TensorState& tensor_state = layout.tensor_states()[pieces[i].tensor_state];
    WritePiece(pieces[i], tensor_state, stored.boxes,
               std::span(bytes).subspan(piece.offset_bytes, pieces[i].ElementCount() *
                                                                ElementBytes(tensor_state.dtype)));
    if (piece.piece.box != kWholeTensor) {
      const BoxView box = stored.boxes[piece.piece.box];
      piece.piece.box = index.boxes.Add(box.lo, box.size);
    }
    index.pieces.push_back(piece);
  }
  IndexImage entry{ImageFileName(rank), rank, 0, bytes.size(), kBlockBytes, {}};
  for (size_t at = 0; at < bytes.size(); at += kBlockBytes) {
    entry.block_crc32c.push_back(Crc32c(std::span(bytes).subspan(at, kBlockBytes)));
  }
  RETURN_IF_ERROR(WriteFile(absl::StrCat(directory, "/", entry.file), bytes));
  index.images.push_back(std::move(entry));
  return absl::OkStatus();
}

absl::Status Run(const std::string& layout_path, const std::string& job_directory, uint64_t step) {
  std::ifstream file(layout_path);
  std::stringstream text;
  text << file.rdbuf();
  ASSIGN_OR_RETURN(const std::unique_ptr<const Layout> layout, Layout::Parse(text.str()));
  Index index;
  index.job = std::filesystem::path(job_directory).filename();
  index.job_uuid = kUuid;
  index.checkpoint = {Attempt{1}, Step{step}};
  index.world_size = layout->world_size();
  index.layouts = {layout->text()};
  index.tensor_states = layout->tensor_states();
  index.facts.resize(index.tensor_states.size());
  const std::string directory =
      absl::StrCat(job_directory, "/", CheckpointDirectoryName(index.checkpoint));
  std::filesystem::create_directories(directory);
  const WriterAssignment writers = WriterAssignment::Create(*layout);
  for (uint32_t rank = 0; rank < layout->world_size(); ++rank) {
    RETURN_IF_ERROR(AddImage(*layout, writers, Rank{rank}, directory, index));
  }
  SortIndex(index);
  const absl::Time time = absl::FromUnixSeconds(1'800'000'000);
  const std::string record =
      EncodeJobRecord({index.job, kUuid, std::string(WriterVersion()), time});
  RETURN_IF_ERROR(
      WriteFile(absl::StrCat(job_directory, "/", kJobFileName), std::as_bytes(std::span(record))));
  const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  CommitRequest request;
  request.job_directory = job_directory;
  request.writer = "maker";
  request.created_at = time;
  return CommitCheckpoint(*file_system, request, index);
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: make_checkpoint LAYOUT.json JOB_DIRECTORY STEP\n");
    return 2;
  }
  const absl::Status status = holdfast::Run(argv[1], argv[2], std::strtoull(argv[3], nullptr, 10));
  if (!status.ok()) std::fprintf(stderr, "make_checkpoint: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
