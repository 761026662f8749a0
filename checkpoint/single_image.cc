// The steps are those of reshard.cc, with one image that is written front to back:
//   1. JOB.json: contents, name by link, directory; the checkpoint's directory;
//   2. the image, created O_EXCL: head, tensors, blobs, zeros between them; every byte is
//      checksummed and added to its tensor's fingerprint as it is written; synced;
//   3. the commit (commit.cc).
#include "checkpoint/single_image.h"

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/publish.h"
#include "format/checkpoint_names.h"
#include "format/fingerprint.h"
#include "format/image.h"
#include "format/index.h"
#include "format/layout.h"
#include "format/manifest.h"

namespace holdfast {
namespace {

constexpr uint64_t kBlockBytes = uint64_t{4} << 20;
constexpr uint64_t kPieceBytesMax = uint64_t{1} << 20;  // of head and zeros that are made at once

// SingleImagePlan::write_memory_bytes.
constexpr uint64_t kWriteBytes = uint64_t{24} << 20;
constexpr uint64_t kWriteBytesOfState = 1024;
constexpr uint64_t kWriteCopies = 4;

// A document of a world of one rank that has everything.
std::string LayoutOf(const std::vector<TensorState>& states) {
  nlohmann::ordered_json tensors = nlohmann::ordered_json::array();
  for (const TensorState& state : states) {
    nlohmann::ordered_json described = {{"state", state.state}, {"dtype", DtypeName(state.dtype)}};
    if (tensors.empty() || tensors.back()["name"] != state.tensor) {
      tensors.push_back({{"name", state.tensor},
                         {"shape", state.shape},
                         {"states", nlohmann::ordered_json::array()}});
    }
    if (tensors.back()["shape"] != state.shape) described["shape"] = state.shape;
    tensors.back()["states"].push_back(std::move(described));
  }
  return nlohmann::ordered_json{{"holdfast_layout", 1},
                                {"mesh", nlohmann::ordered_json::array()},
                                {"tensors", std::move(tensors)}}
      .dump();
}

}  // namespace

struct SingleImagePlan::Contents {
  std::vector<uint32_t> order;  // of the states, by (tensor, state)
  std::string layout;
  std::vector<TensorState> states;  // in that order
  std::vector<Piece> pieces;
  ImageTemplate image;
};

SingleImagePlan::SingleImagePlan(std::unique_ptr<Contents> contents)
    : contents_(std::move(contents)) {}
SingleImagePlan::~SingleImagePlan() = default;
SingleImagePlan::SingleImagePlan(SingleImagePlan&&) noexcept = default;
SingleImagePlan& SingleImagePlan::operator=(SingleImagePlan&&) noexcept = default;

absl::StatusOr<SingleImagePlan> SingleImagePlan::Create(const TensorSource& source,
                                                        const SingleImageRequest& request) {
  std::vector<uint32_t> order(source.states.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return std::tie(source.states[a].tensor, source.states[a].state) <
           std::tie(source.states[b].tensor, source.states[b].state);
  });
  for (const TensorState& state : source.states) RETURN_IF_ERROR(CheckTensorState(state));
  std::vector<TensorState> states;
  std::vector<Piece> pieces;
  for (uint32_t i = 0; i < order.size(); ++i) {
    states.push_back(source.states[order[i]]);
    pieces.push_back({i, kWholeTensor, 0, states.back().ElementCount()});
  }
  std::string text = LayoutOf(states);
  RETURN_IF_ERROR(Layout::Parse(text).status());
  ImageSpec spec;
  spec.job = request.job;
  spec.job_uuid = request.job_uuid;
  spec.rank = Rank{0};
  spec.world_size = 1;
  spec.block_bytes = kBlockBytes;
  spec.layout_json = text;
  spec.tensor_states = states;
  spec.pieces = pieces;
  const BoxTable boxes;
  spec.boxes = &boxes;
  for (const SingleImageBlob& blob : request.blobs) {
    spec.blobs.push_back({BlobScope::kGlobal, blob.name, blob.bytes.size()});
  }
  ASSIGN_OR_RETURN(ImageTemplate image, ImageTemplate::Build(spec, request.scratch_directory));
  return SingleImagePlan(std::make_unique<Contents>(Contents{.order = std::move(order),
                                                             .layout = std::move(text),
                                                             .states = std::move(states),
                                                             .pieces = std::move(pieces),
                                                             .image = std::move(image)}));
}

uint64_t SingleImagePlan::image_bytes() const { return contents_->image.image_bytes(); }

uint64_t SingleImagePlan::write_memory_bytes() const {
  uint64_t names = 0;
  for (const TensorState& state : contents_->states) {
    names += state.tensor.size() + state.state.size() + sizeof(uint64_t) * state.shape.size();
  }
  return kWriteBytes + contents_->states.size() * kWriteBytesOfState + kWriteCopies * names +
         kWriteCopies * contents_->layout.size();
}

namespace {

// The image, front to back.
class ImageWriter {
 public:
  ImageWriter(WritableFile& file, uint64_t block_bytes) : file_(file), block_bytes_(block_bytes) {}

  uint64_t position() const { return position_; }

  absl::Status Append(std::span<const std::byte> bytes) {
    RETURN_IF_ERROR(file_.Append(bytes));
    while (!bytes.empty()) {
      const uint64_t count = std::min(block_bytes_ - position_ % block_bytes_, bytes.size());
      crc32c_ = ExtendCrc32c(crc32c_, bytes.first(count));
      position_ += count;
      bytes = bytes.subspan(count);
      if (position_ % block_bytes_ == 0) block_crc32c_.push_back(std::exchange(crc32c_, 0));
    }
    return absl::OkStatus();
  }

  absl::Status Zeros(uint64_t until) {
    CHECK(position_ <= until);
    const std::vector<std::byte> zeros(std::min(until - position_, kPieceBytesMax));
    while (position_ < until) {
      RETURN_IF_ERROR(
          Append(std::span(zeros).first(std::min<uint64_t>(until - position_, zeros.size()))));
    }
    return absl::OkStatus();
  }

  std::vector<uint32_t> TakeChecksums() { return std::move(block_crc32c_); }

 private:
  WritableFile& file_;
  const uint64_t block_bytes_;
  uint64_t position_ = 0;
  uint32_t crc32c_ = 0;
  std::vector<uint32_t> block_crc32c_;
};

struct Written {
  std::vector<uint32_t> block_crc32c;
  std::vector<TensorFacts> facts;
};

absl::StatusOr<Written> WriteImage(FileSystem& file_system, const std::string& path,
                                   const TensorSource& source, const SingleImageRequest& request,
                                   const SingleImagePlan::Contents& plan, CheckpointId id) {
  ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, file_system.CreateNew(path));
  ImageWriter image(*file, plan.image.block_bytes());
  std::vector<uint64_t> blob_bytes;
  for (const SingleImageBlob& blob : request.blobs) blob_bytes.push_back(blob.bytes.size());
  std::vector<std::byte> piece(kPieceBytesMax);
  while (image.position() < plan.image.head_bytes()) {
    const uint64_t begin = image.position();
    const auto part =
        std::span(piece).first(std::min(plan.image.head_bytes() - begin, kPieceBytesMax));
    plan.image.StampHead({id, blob_bytes}, begin, part);
    RETURN_IF_ERROR(image.Append(part));
  }
  Written written;
  for (size_t i = 0; i < plan.states.size(); ++i) {
    const TensorState& state = plan.states[i];
    Fingerprint sum = FingerprintOfShape(state);
    if (state.Bytes() > 0) {
      RETURN_IF_ERROR(image.Zeros(plan.image.piece_offsets()[i]));
      Fingerprinter fingerprinter;
      uint64_t done = 0;
      RETURN_IF_ERROR(
          source.read(plan.order[i], [&](std::span<const std::byte> bytes) -> absl::Status {
            if (bytes.size() > state.Bytes() - done) {
              return absl::InvalidArgumentError(
                  absl::StrFormat("%s: found more than %d bytes", Describe(state), state.Bytes()));
            }
            sum += fingerprinter.OfRun(state, done, bytes);
            done += bytes.size();
            return image.Append(bytes);
          }));
      if (done != state.Bytes()) {
        return absl::InvalidArgumentError(absl::StrFormat("%s: expected %d bytes, found %d",
                                                          Describe(state), state.Bytes(), done));
      }
    }
    written.facts.emplace_back().fingerprint = sum;
  }
  for (size_t i = 0; i < request.blobs.size(); ++i) {
    if (request.blobs[i].bytes.empty()) continue;
    RETURN_IF_ERROR(image.Zeros(plan.image.blob_offsets()[i]));
    RETURN_IF_ERROR(image.Append(std::as_bytes(std::span(request.blobs[i].bytes))));
  }
  RETURN_IF_ERROR(image.Zeros(plan.image.image_bytes()));
  RETURN_IF_ERROR(file->Sync());
  written.block_crc32c = image.TakeChecksums();
  return written;
}

Index MakeIndex(const SingleImageRequest& request, SingleImagePlan::Contents plan, CheckpointId id,
                Written written) {
  Index index;
  index.job = request.job;
  index.job_uuid = request.job_uuid;
  index.checkpoint = id;
  index.world_size = 1;
  index.layouts.push_back(std::move(plan.layout));
  index.images.push_back({.file = ImageFileName(Rank{0}),
                          .rank = Rank{0},
                          .layout = 0,
                          .bytes = plan.image.image_bytes(),
                          .block_bytes = plan.image.block_bytes(),
                          .block_crc32c = std::move(written.block_crc32c)});
  index.tensor_states = std::move(plan.states);
  index.facts = std::move(written.facts);
  for (size_t i = 0; i < plan.pieces.size(); ++i) {
    index.pieces.push_back({plan.pieces[i], 0, plan.image.piece_offsets()[i]});
  }
  for (size_t i = 0; i < request.blobs.size(); ++i) {
    index.blobs.push_back({.scope = BlobScope::kGlobal,
                           .rank = Rank{0},
                           .name = request.blobs[i].name,
                           .image = 0,
                           .offset_bytes = plan.image.blob_offsets()[i],
                           .bytes = request.blobs[i].bytes.size()});
  }
  SortIndex(index);
  return index;
}

absl::Status PublishJob(FileSystem& file_system, const SingleImageRequest& request) {
  JobRecord record;
  record.job = request.job;
  record.job_uuid = request.job_uuid;
  record.created_by = std::string(WriterVersion());
  record.created_at = request.created_at;
  return PublishFile(
      file_system, request.job_directory, kJobFileName, EncodeJobRecord(record),
      {.writer = request.writer,
       .on_visible = nullptr,
       .on_durable = nullptr,
       .is_whole = [](const std::string& bytes) { return DecodeJobRecord(bytes, "").ok(); },
       .bytes_max = kSmallRecordBytesMax});
}

}  // namespace

absl::StatusOr<SingleImageReport> WriteSingleImage(FileSystem& file_system,
                                                   const TensorSource& source,
                                                   const SingleImageRequest& request,
                                                   SingleImagePlan plan) {
  RETURN_IF_ERROR(CheckJobName(request.job));
  const CheckpointId id{Attempt{0}, request.step};
  SingleImageReport report;
  report.directory = absl::StrCat(request.job_directory, "/", CheckpointDirectoryName(id));
  report.bytes_written = plan.image_bytes();
  RETURN_IF_ERROR(PublishJob(file_system, request));
  RETURN_IF_ERROR(EnsureDirectory(file_system, request.job_directory, CheckpointDirectoryName(id)));
  const std::string path = absl::StrCat(report.directory, "/", ImageFileName(Rank{0}));
  ASSIGN_OR_RETURN(Written written,
                   WriteImage(file_system, path, source, request, *plan.contents_, id));
  RETURN_IF_ERROR(
      CommitCheckpoint(file_system,
                       {.job_directory = request.job_directory,
                        .writer = request.writer,
                        .parent = std::nullopt,
                        .created_at = request.created_at},
                       MakeIndex(request, std::move(*plan.contents_), id, std::move(written))));
  return report;
}

}  // namespace holdfast
