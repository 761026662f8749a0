// Writes a committed checkpoint of any layout, without an agent and without a trainer: for tests
// and benchmarks of what reads checkpoints.
//
//   make_checkpoint [--large SEED] LAYOUT.json JOB_DIRECTORY STEP
//
// Step STEP of attempt 1, one image per rank, no blobs. Without --large: blocks of 4 KiB, no
// fingerprints, and element e of the row-major order of tensor state number s of the layout is, if
// float32, e + 1000 s; if bool, e mod 2; else byte b of it is
// 31 e + 7 b + 53 s + 1, mod 256. With it: blocks of 4 MiB, fingerprints, and random finite floats,
// in which every 4 bytes differ from those of another SEED (below 2^29), and nothing else does.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
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

constexpr char kUuid[] = "01234567-89ab-4cde-8f01-23456789abcd";

struct Options {
  uint64_t step = 1;
  std::optional<uint64_t> large_seed;

  uint64_t block_bytes() const { return large_seed.has_value() ? uint64_t{4} << 20 : 4096; }
};

// The contents of tensor state number `number`.
void FillByFormula(const TensorState& state, uint64_t number, std::span<std::byte> out) {
  const uint64_t element_bytes = ElementBytes(state.dtype);
  for (uint64_t element = 0; element < state.ElementCount(); ++element) {
    const std::span<std::byte> bytes = out.subspan(element * element_bytes, element_bytes);
    if (state.dtype == Dtype::kFloat32) {
      const auto value = static_cast<float>(element + 1000 * number);
      std::memcpy(bytes.data(), &value, sizeof(value));
      continue;
    }
    for (uint64_t b = 0; b < element_bytes; ++b) {
      bytes[b] = static_cast<std::byte>(
          state.dtype == Dtype::kBool ? element % 2 : 31 * element + 7 * b + 53 * number + 1);
    }
  }
}

void FillAtRandom(uint64_t number, uint64_t seed, std::span<std::byte> out) {
  std::mt19937_64 random(number);
  const uint64_t differs = (seed << 32 | seed) & 0x1FFF'FFFF'1FFF'FFFF;
  while (!out.empty()) {
    const uint64_t word = (random() & 0x3FFF'FFFF'3FFF'FFFF) ^ differs;  // finite floats
    const size_t bytes = std::min(out.size(), sizeof(word));
    std::memcpy(out.data(), &word, bytes);
    out = out.subspan(bytes);
  }
}

class Maker {
 public:
  Maker(const Layout& layout, std::string job_directory, const Options& options)
      : layout_(layout), job_directory_(std::move(job_directory)), options_(options) {}

  absl::Status Run() {
    index_.job = std::filesystem::path(job_directory_).filename();
    index_.job_uuid = kUuid;
    index_.checkpoint = {Attempt{1}, Step{options_.step}};
    index_.world_size = layout_.world_size();
    index_.layouts = {layout_.text()};
    index_.tensor_states = layout_.tensor_states();
    // The whole tensors, each an image of its own: the source of every rank's image.
    for (uint32_t i = 0; i < layout_.tensor_states().size(); ++i) {
      const TensorState& state = layout_.tensor_states()[i];
      if (state.ElementCount() > 0) {
        whole_.push_back({{i, kWholeTensor, 0, state.ElementCount()}, i, 0});
      }
      TensorFacts& facts = index_.facts.emplace_back();
      if (!options_.large_seed.has_value()) continue;
      facts.fingerprint = FingerprintOfShape(state) + Fingerprinter().OfRun(state, 0, Contents(i));
    }
    const std::string directory =
        absl::StrCat(job_directory_, "/", CheckpointDirectoryName(index_.checkpoint));
    std::filesystem::create_directories(directory);
    const WriterAssignment writers = WriterAssignment::Create(layout_);
    for (uint32_t rank = 0; rank < layout_.world_size(); ++rank) {
      RETURN_IF_ERROR(WriteImage(writers, Rank{rank}, directory));
    }
    SortIndex(index_);
    const absl::Time time = absl::FromUnixSeconds(1'800'000'000);
    // Another step may have written it before: the same.
    const std::string record =
        EncodeJobRecord({index_.job, kUuid, std::string(WriterVersion()), time});
    std::ofstream file(absl::StrCat(job_directory_, "/", kJobFileName), std::ios::binary);
    file << record;
    file.close();
    if (!file.good()) return absl::UnavailableError(absl::StrCat(job_directory_, ": cannot write"));
    CommitRequest request;
    request.job_directory = job_directory_;
    request.writer = "maker";
    request.created_at = time;
    return CommitCheckpoint(*files_, request, index_);
  }

 private:
  const std::vector<std::byte>& Contents(uint32_t number) {
    if (made_ == number) return contents_;
    made_ = number;
    const TensorState& state = layout_.tensor_states()[number];
    contents_.resize(state.Bytes());
    if (options_.large_seed.has_value()) {
      FillAtRandom(number, *options_.large_seed, contents_);
    } else {
      FillByFormula(state, number, contents_);
    }
    return contents_;
  }

  absl::Status WriteImage(const WriterAssignment& writers, Rank rank,
                          const std::string& directory) {
    ASSIGN_OR_RETURN(RankLayout stored, writers.ForRank(rank, {}));
    std::vector<Piece> pieces;
    for (const Segment& segment : stored.segments) pieces.push_back(segment.piece);
    const uint64_t block_bytes = options_.block_bytes();
    ImageSpec spec;
    spec.job = index_.job;
    spec.job_uuid = kUuid;
    spec.rank = rank;
    spec.world_size = layout_.world_size();
    spec.block_bytes = block_bytes;
    spec.layout_json = layout_.text();
    spec.tensor_states = layout_.tensor_states();
    spec.pieces = pieces;
    spec.boxes = &stored.boxes;
    ASSIGN_OR_RETURN(const ImageTemplate image, ImageTemplate::Build(spec, directory));
    std::vector<std::byte> bytes(image.image_bytes());
    image.StampHead({index_.checkpoint, {}}, 0, std::span(bytes).first(image.head_bytes()));

    RankLayout target;
    target.boxes = stored.boxes;
    for (size_t i = 0; i < pieces.size(); ++i) {
      if (pieces[i].ElementCount() > 0) {
        target.segments.push_back(
            {.piece = pieces[i], .buffer_offset_bytes = image.piece_offsets()[i]});
      }
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
    IndexImage entry{ImageFileName(rank), rank, 0, bytes.size(), block_bytes, {}};
    for (size_t at = 0; at < bytes.size(); at += block_bytes) {
      entry.block_crc32c.push_back(Crc32c(std::span(bytes).subspan(at, block_bytes)));
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
  const Options options_;
  const std::unique_ptr<FileSystem> files_ = NewPosixFileSystem();
  Index index_;
  std::vector<StoredPiece> whole_;
  std::optional<uint32_t> made_;  // whose contents are there
  std::vector<std::byte> contents_;
};

absl::Status Run(const std::string& layout_path, const std::string& job_directory,
                 const Options& options) {
  std::ifstream file(layout_path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  ASSIGN_OR_RETURN(const std::unique_ptr<const Layout> layout, Layout::Parse(text));
  return Maker(*layout, job_directory, options).Run();
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) {
  std::span<char*> arguments(argv + 1, static_cast<size_t>(argc - 1));
  holdfast::Options options;
  if (arguments.size() > 2 && arguments[0] == std::string_view("--large")) {
    options.large_seed = std::strtoull(arguments[1], nullptr, 10);
    arguments = arguments.subspan(2);
  }
  if (arguments.size() != 3) {
    std::fprintf(stderr, "usage: make_checkpoint [--large SEED] LAYOUT.json JOB_DIRECTORY STEP\n");
    return 2;
  }
  options.step = std::strtoull(arguments[2], nullptr, 10);
  const absl::Status status = holdfast::Run(arguments[0], arguments[1], options);
  if (!status.ok()) std::fprintf(stderr, "make_checkpoint: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
