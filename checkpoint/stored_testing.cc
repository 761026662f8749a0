#include "checkpoint/stored_testing.h"

#include <span>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "format/checkpoint_names.h"
#include "format/writer_assignment.h"
#include "io/posix_file_system.h"

namespace holdfast {
namespace {

std::vector<std::byte> RandomBytes(std::mt19937_64& random, uint64_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

}  // namespace

Truths RandomTruths(const std::vector<TensorState>& states, std::mt19937_64& random) {
  Truths truths;
  for (const TensorState& state : states) {
    truths[{state.tensor, state.state}] = {state, RandomBytes(random, state.Bytes())};
  }
  return truths;
}

StoredCheckpoint::StoredCheckpoint(const Layout& layout, const Truths& truths,
                                   std::mt19937_64& random, Alignment alignment) {
  index_.world_size = layout.world_size();
  index_.tensor_states = layout.tensor_states();
  const WriterAssignment writers = WriterAssignment::Create(layout);
  for (uint32_t rank = 0; rank < layout.world_size(); ++rank) {
    const RankLayout stored = writers.ForRank(Rank{rank}, {}).value();
    std::vector<std::byte> image = RandomBytes(random, random() % (2 * kStoredBlockBytes));
    for (const Segment& segment : stored.segments) {
      Add(segment.piece, stored.boxes, rank, truths, random, alignment, image);
    }
    image.resize((image.size() + kStoredBlockBytes) / kStoredBlockBytes * kStoredBlockBytes);
    images_.push_back(std::move(image));
  }
  SortIndex(index_);
  index_.facts.resize(index_.tensor_states.size());
  for (size_t i = 0; i < index_.facts.size(); ++i) {
    const TensorState& state = index_.tensor_states[i];
    index_.facts[i].fingerprint =
        FingerprintOfShape(state) +
        Fingerprinter().OfRun(state, 0, truths.at({state.tensor, state.state}).bytes);
  }
}

void StoredCheckpoint::AddBlob(BlobScope scope, uint32_t rank, const std::string& name,
                               const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  std::vector<std::byte>& image = images_[0];
  index_.blobs.push_back({.scope = scope,
                          .rank = Rank{rank},
                          .name = name,
                          .image = 0,
                          .offset_bytes = image.size() + 10,
                          .bytes = text.size()});
  image.resize(image.size() + 10);
  image.insert(image.end(), bytes.begin(), bytes.end());
  image.resize((image.size() + kStoredBlockBytes - 1) / kStoredBlockBytes * kStoredBlockBytes);
  SortIndex(index_);
}

void StoredCheckpoint::Write() {
  const std::unique_ptr<FileSystem> files = NewPosixFileSystem();
  index_.images.clear();
  for (uint32_t i = 0; i < images_.size(); ++i) {
    IndexImage image;
    image.file = ImageFileName(Rank{i});
    image.rank = Rank{i};
    image.bytes = images_[i].size();
    image.block_bytes = kStoredBlockBytes;
    for (uint64_t at = 0; at < image.bytes; at += kStoredBlockBytes) {
      image.block_crc32c.push_back(Crc32c(std::span(images_[i]).subspan(at, kStoredBlockBytes)));
    }
    const auto file = files->CreateNew(directory_.Join(image.file));
    CHECK_OK(file.status());
    CHECK_OK((*file)->Append(images_[i]));
    index_.images.push_back(std::move(image));
  }
}

std::string StoredCheckpoint::PathOf(uint32_t image) const {
  return directory_.Join(ImageFileName(Rank{image}));
}

void StoredCheckpoint::Add(Piece piece, const BoxTable& boxes, uint32_t rank, const Truths& truths,
                           std::mt19937_64& random, Alignment alignment,
                           std::vector<std::byte>& image) {
  const TensorState& state = index_.tensor_states[piece.tensor_state];
  const Truth& truth = truths.at({state.tensor, state.state});
  const uint64_t element_bytes = ElementBytes(state.dtype);
  uint64_t offset = image.size() + random() % 70;
  if (alignment == Alignment::kOfElements) {
    offset = (offset + element_bytes - 1) / element_bytes * element_bytes;
  }
  image.resize(offset);
  std::vector<uint64_t> lo(state.shape.size(), 0);
  std::vector<uint64_t> size = state.shape;
  if (piece.box != kWholeTensor) {
    lo.assign(boxes[piece.box].lo.begin(), boxes[piece.box].lo.end());
    size.assign(boxes[piece.box].size.begin(), boxes[piece.box].size.end());
    piece.box = index_.boxes.Add(lo, size);
  }
  for (uint64_t number = piece.begin; number < piece.end; ++number) {
    std::vector<uint64_t> x(size.size());
    uint64_t rest = number;
    for (size_t d = size.size(); d-- > 0; rest /= size[d]) x[d] = rest % size[d];
    uint64_t element = 0;
    for (size_t d = 0; d < size.size(); ++d) element = element * state.shape[d] + lo[d] + x[d];
    const auto from = truth.bytes.begin() + static_cast<ptrdiff_t>(element * element_bytes);
    image.insert(image.end(), from, from + static_cast<ptrdiff_t>(element_bytes));
  }
  index_.pieces.push_back({.piece = piece, .image = rank, .offset_bytes = offset});
}

std::unique_ptr<const Layout> MatrixLayout(uint32_t ranks, uint64_t rows, uint64_t columns,
                                           const std::string& place) {
  return Layout::Parse(absl::StrFormat(R"({"holdfast_layout":1,"mesh":[{"axis":"tp","size":%d}],
      "tensors":[{"name":"w","shape":[%d,%d],"states":[
        {"state":"param","dtype":"bfloat16"%s}]}]})",
                                       ranks, rows, columns, place))
      .value();
}

std::string CutOver(int dim) {
  return absl::StrFormat(R"(,"place":[{"op":"shard","dim":%d,"axis":"tp","rule":"balanced"}])",
                         dim);
}

}  // namespace holdfast
