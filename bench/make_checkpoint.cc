// Writes one committed checkpoint of a job of its own, without an agent and without a trainer, as
// fast as storage takes it: for benchmarks of commands that read checkpoints.
//
//   bench_make_checkpoint ROOT JOB LAYOUT_FILE
//
// What a tensor state holds depends on its place in the document alone, so equal documents but for
// their placements give equal tensors. One job and step per call; blocks of 4 MiB.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "format/checkpoint_names.h"
#include "format/fingerprint.h"
#include "format/image.h"
#include "format/index.h"
#include "format/layout.h"
#include "format/manifest.h"
#include "format/planner.h"
#include "format/writer_assignment.h"
#include "io/posix_file_system.h"

namespace holdfast {
namespace {

constexpr uint64_t kBlockBytes = uint64_t{4} << 20;
constexpr char kUuid[] = "01234567-89ab-4cde-8f01-23456789abcd";
constexpr CheckpointId kId{Attempt{1}, Step{1}};

class Maker {
 public:
  Maker(const Layout& layout, std::string job_directory, std::string job)
      : layout_(layout), job_directory_(std::move(job_directory)), job_(std::move(job)) {}

  absl::Status Run() {
    const std::string directory = absl::StrCat(job_directory_, "/", CheckpointDirectoryName(kId));
    RETURN_IF_ERROR(files_->CreateDirectory(job_directory_));
    JobRecord record;
    record.job = job_;
    record.job_uuid = kUuid;
    record.created_at = absl::Now();
    record.created_by = std::string(WriterVersion());
    const std::string text = EncodeJobRecord(record);
    RETURN_IF_ERROR(
        Write(absl::StrCat(job_directory_, "/", kJobFileName), std::as_bytes(std::span(text))));
    RETURN_IF_ERROR(files_->CreateDirectory(directory));

    index_.job = job_;
    index_.job_uuid = kUuid;
    index_.checkpoint = kId;
    index_.world_size = layout_.world_size();
    index_.layouts = {layout_.text()};
    index_.tensor_states = layout_.tensor_states();
    // The whole tensors, each an image of its own: the source of every rank's image.
    for (uint32_t i = 0; i < layout_.tensor_states().size(); ++i) {
      const TensorState& state = layout_.tensor_states()[i];
      whole_.push_back({{i, kWholeTensor, 0, state.ElementCount()}, i, 0});
      index_.facts.emplace_back().fingerprint =
          FingerprintOfShape(state) + Fingerprinter().OfRun(state, 0, Contents(i));
    }
    const WriterAssignment writers = WriterAssignment::Create(layout_);
    for (uint32_t rank = 0; rank < layout_.world_size(); ++rank) {
      RETURN_IF_ERROR(WriteImage(writers, Rank{rank}, directory));
    }
    SortIndex(index_);
    CommitRequest request;
    request.job_directory = job_directory_;
    request.writer = "bench";
    request.created_at = absl::Now();
    return CommitCheckpoint(*files_, request, index_);
  }

 private:
  const std::vector<std::byte>& Contents(uint32_t state) {
    if (made_ == state) return contents_;
    made_ = state;
    std::mt19937_64 random(state);
    contents_.resize((layout_.tensor_states()[state].Bytes() + 7) / 8 * 8);
    for (size_t at = 0; at < contents_.size(); at += 8) {
      const uint64_t word = random() & 0x3FFF'FFFF'3FFF'FFFF;  // finite floats
      std::memcpy(contents_.data() + at, &word, 8);
    }
    contents_.resize(layout_.tensor_states()[state].Bytes());
    return contents_;
  }

  absl::Status WriteImage(const WriterAssignment& writers, Rank rank,
                          const std::string& directory) {
    ASSIGN_OR_RETURN(RankLayout stored, writers.ForRank(rank, {}));
    std::vector<Piece> pieces;
    for (const Segment& segment : stored.segments) pieces.push_back(segment.piece);
    ImageSpec spec;
    spec.job = job_;
    spec.job_uuid = kUuid;
    spec.rank = rank;
    spec.world_size = layout_.world_size();
    spec.block_bytes = kBlockBytes;
    spec.layout_json = layout_.text();
    spec.tensor_states = layout_.tensor_states();
    spec.pieces = pieces;
    spec.boxes = &stored.boxes;
    ASSIGN_OR_RETURN(const ImageTemplate image, ImageTemplate::Build(spec, job_directory_));
    std::vector<std::byte> bytes(image.image_bytes());
    image.StampHead({kId, {}}, 0, std::span(bytes).first(image.head_bytes()));

    RankLayout target;
    target.boxes = stored.boxes;
    for (size_t i = 0; i < pieces.size(); ++i) {
      target.segments.push_back(
          {.piece = pieces[i], .buffer_offset_bytes = image.piece_offsets()[i]});
      IndexPiece piece{pieces[i], Value(rank), image.piece_offsets()[i]};
      if (piece.piece.box != kWholeTensor) {
        const BoxView box = stored.boxes[piece.piece.box];
        piece.piece.box = index_.boxes.Add(box.lo, box.size);
      }
      index_.pieces.push_back(piece);
    }
    const BoxTable no_boxes;
    ASSIGN_OR_RETURN(const CopyPlan plan, PlanCopy({layout_.tensor_states(), no_boxes, whole_},
                                                   layout_.tensor_states(), target));
    for (const CopyOp& op : plan.ops) {
      const std::byte* const from = Contents(op.image).data() + op.image_offset_bytes;
      for (uint64_t i = 0; i < op.count; ++i) {
        std::memcpy(bytes.data() + op.buffer_offset_bytes + i * op.buffer_stride_bytes,
                    from + i * op.image_stride_bytes, op.run_bytes);
      }
    }
    IndexImage entry{ImageFileName(rank), rank, 0, bytes.size(), kBlockBytes, {}};
    for (size_t at = 0; at < bytes.size(); at += kBlockBytes) {
      entry.block_crc32c.push_back(Crc32c(std::span(bytes).subspan(at, kBlockBytes)));
    }
    index_.images.push_back(entry);
    return Write(absl::StrCat(directory, "/", entry.file), bytes);
  }

  absl::Status Write(const std::string& path, std::span<const std::byte> bytes) {
    ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, files_->CreateNew(path));
    RETURN_IF_ERROR(file->Append(bytes));
    return file->Sync();
  }

  const Layout& layout_;
  const std::string job_directory_;
  const std::string job_;
  const std::unique_ptr<FileSystem> files_ = NewPosixFileSystem();
  Index index_;
  std::vector<StoredPiece> whole_;
  std::optional<uint32_t> made_;  // whose contents are there
  std::vector<std::byte> contents_;
};

absl::Status Run(const std::string& root, const std::string& job, const std::string& layout_file) {
  std::ifstream file(layout_file, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  ASSIGN_OR_RETURN(const std::unique_ptr<const Layout> layout, Layout::Parse(text));
  return Maker(*layout, absl::StrCat(root, "/", job), job).Run();
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s ROOT JOB LAYOUT_FILE\n", argv[0]);
    return 2;
  }
  const absl::Status status = holdfast::Run(argv[1], argv[2], argv[3]);
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return 1;
}
