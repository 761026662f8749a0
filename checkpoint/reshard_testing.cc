#include "checkpoint/reshard_testing.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "format/fingerprint.h"
#include "format/image_fingerprints.h"
#include "format/layout.h"
#include "format/manifest.h"
#include "format/writer_assignment.h"

namespace holdfast {
namespace {

// Byte `byte` of element `element`.
std::byte ByteOf(uint64_t name, uint64_t element, uint64_t byte) {
  uint64_t z = name + element * 0x9E3779B97F4A7C15u + byte * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  return static_cast<std::byte>(z >> 56);
}

uint64_t NameOf(const TensorState& state) {
  const std::string text = absl::StrCat(state.tensor, "\n", state.state);
  return uint64_t{Crc32c(std::as_bytes(std::span(text)))} << 20;
}

// The element of the tensor that has number `number` in the row-major order of the piece's box.
uint64_t ElementOf(const Piece& piece, uint64_t number, const TensorState& state,
                   const BoxTable& boxes) {
  if (piece.box == kWholeTensor) return number;
  const BoxView box = boxes[piece.box];
  uint64_t element = 0;
  uint64_t weight = 1;
  for (size_t d = state.shape.size(); d-- > 0;) {
    element += weight * (box.lo[d] + number % box.size[d]);
    number /= box.size[d];
    weight *= state.shape[d];
  }
  return element;
}

absl::Status WriteNewFile(FileSystem& file_system, const std::string& path,
                          std::span<const std::byte> bytes) {
  ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, file_system.CreateNew(path));
  RETURN_IF_ERROR(file->Append(bytes));
  return file->Sync();
}

absl::Status WriteNewFile(FileSystem& file_system, const std::string& path,
                          const std::string& text) {
  return WriteNewFile(file_system, path, std::as_bytes(std::span(text)));
}

// The image of one rank, and its entries in the index. Adds to the sums of tensor states.
absl::StatusOr<std::vector<std::byte>> MakeImage(const Layout& layout,
                                                 const WriterAssignment& assignment, Rank rank,
                                                 const TestCheckpoint& what, Index& index,
                                                 std::vector<Fingerprint>& sums) {
  ASSIGN_OR_RETURN(const RankLayout stored, assignment.ForRank(rank, {}));
  std::vector<Piece> pieces;
  for (const Segment& segment : stored.segments) pieces.push_back(segment.piece);
  ImageSpec spec;
  spec.job = what.job;
  spec.job_uuid = what.job_uuid;
  spec.rank = rank;
  spec.world_size = layout.world_size();
  spec.block_bytes = what.block_bytes;
  spec.layout_json = layout.text();
  spec.tensor_states = layout.tensor_states();
  spec.pieces = pieces;
  spec.boxes = &stored.boxes;
  spec.blobs = {{BlobScope::kRank, "rng", 500}};
  if (rank == Rank{0}) spec.blobs.push_back({BlobScope::kGlobal, "args", 100});
  std::vector<uint64_t> blob_bytes;
  for (const ImageBlob& blob : spec.blobs) {
    blob_bytes.push_back(TestBlob(blob.scope, blob.name, Value(rank)).size());
  }
  ASSIGN_OR_RETURN(const ImageTemplate image, ImageTemplate::Build(spec, ScratchDirectory()));
  std::vector<std::byte> bytes(image.image_bytes());
  image.StampHead({what.id, blob_bytes}, 0, std::span(bytes).first(image.head_bytes()));
  std::vector<PlacedPiece> placed;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const TensorState& state = layout.tensor_states()[pieces[i].tensor_state];
    uint64_t at = image.piece_offsets()[i];
    placed.push_back({pieces[i], at});
    for (uint64_t number = pieces[i].begin; number < pieces[i].end; ++number) {
      const uint64_t element = ElementOf(pieces[i], number, state, stored.boxes);
      for (uint64_t b = 0; b < ElementBytes(state.dtype); ++b) {
        bytes[at++] = ByteOf(NameOf(state), element, b);
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
    const ImageBlob& blob = spec.blobs[i];
    const std::string text = TestBlob(blob.scope, blob.name, Value(rank));
    const uint64_t at = image.blob_offsets()[i];
    std::ranges::copy(std::as_bytes(std::span(text)), bytes.begin() + static_cast<ptrdiff_t>(at));
    index.blobs.push_back({blob.scope, rank, blob.name, Value(rank), at, text.size()});
  }
  std::vector<FingerprintPart> parts;
  ImageFingerprints(layout.tensor_states(), stored.boxes, placed).AppendParts(0, bytes, parts);
  for (const FingerprintPart& part : parts) sums[part.tensor_state] += part.sum;

  IndexImage entry{ImageFileName(rank), rank, 0, bytes.size(), what.block_bytes, {}};
  for (size_t at = 0; at < bytes.size(); at += what.block_bytes) {
    entry.block_crc32c.push_back(Crc32c(std::span(bytes).subspan(at, what.block_bytes)));
  }
  index.images.push_back(std::move(entry));
  return bytes;
}

// From the first tensor or blob on, what belongs to none is zero.
absl::Status CheckGaps(const Index& index, std::vector<std::string> files) {
  std::vector<size_t> begins(files.size(), SIZE_MAX);
  const auto clear = [&](uint32_t image, uint64_t offset_bytes, uint64_t bytes) {
    if (bytes == 0) return;
    begins[image] = std::min<size_t>(begins[image], offset_bytes);
    files[image].replace(offset_bytes, bytes, bytes, '\0');
  };
  for (const IndexPiece& piece : index.pieces) {
    const Dtype dtype = index.tensor_states[piece.piece.tensor_state].dtype;
    clear(piece.image, piece.offset_bytes, piece.piece.ElementCount() * ElementBytes(dtype));
  }
  for (const IndexBlob& blob : index.blobs) clear(blob.image, blob.offset_bytes, blob.bytes);
  for (size_t i = 0; i < files.size(); ++i) {
    if (begins[i] == SIZE_MAX) continue;
    const size_t found = files[i].find_first_not_of('\0', begins[i]);
    if (found == std::string::npos) continue;
    return absl::DataLossError(
        absl::StrFormat("image %d: byte %d belongs to nothing and is not zero", i, found));
  }
  return absl::OkStatus();
}

}  // namespace

std::string ScratchDirectory() {
  return access("/dev/shm", W_OK) == 0 ? "/dev/shm" : testing::TempDir();
}

ReshardStorage SimReshardStorage(SimDisk& disk) {
  const auto wait = [&disk](absl::Status& result) {
    while (disk.in_flight_count() > 0) disk.RunCompletions();
    return result;
  };
  return {disk, SimReadAt(disk),
          [&disk, wait](IoFile& file, uint64_t offset, std::span<const std::byte> data) {
            absl::Status result = absl::UnknownError("not written");
            disk.Write(file, offset, data,
                       [&](absl::Status status) { result = std::move(status); });
            return wait(result);
          },
          [&disk, wait](IoFile& file) {
            absl::Status result = absl::UnknownError("not synced");
            disk.Sync(file, [&](absl::Status status) { result = std::move(status); });
            return wait(result);
          }};
}

std::string TestBlob(BlobScope scope, const std::string& name, uint32_t rank) {
  if (scope == BlobScope::kGlobal) return absl::StrCat(name, " of all");
  // That of rank 1 is empty.
  return rank == 1 ? "" : absl::StrCat(name, " of ", rank, std::string(rank * 30, 'x'));
}

absl::StatusOr<CatalogEntry> WriteTestCheckpoint(FileSystem& file_system,
                                                 const std::string& layout_json,
                                                 const TestCheckpoint& what) {
  ASSIGN_OR_RETURN(const std::unique_ptr<const Layout> layout, Layout::Parse(layout_json));
  const std::string job_directory = absl::StrCat(what.root, "/", what.job);
  const std::string directory = absl::StrCat(job_directory, "/", CheckpointDirectoryName(what.id));
  RETURN_IF_ERROR(file_system.CreateDirectory(job_directory));
  RETURN_IF_ERROR(WriteNewFile(file_system, absl::StrCat(job_directory, "/", kJobFileName),
                               EncodeJobRecord({what.job, what.job_uuid, "test", absl::Time()})));
  RETURN_IF_ERROR(file_system.CreateDirectory(directory));
  Index index;
  index.job = what.job;
  index.job_uuid = what.job_uuid;
  index.checkpoint = what.id;
  index.world_size = layout->world_size();
  index.layouts = {layout->text()};
  index.tensor_states = layout->tensor_states();
  index.facts.resize(index.tensor_states.size());
  std::vector<Fingerprint> sums(index.tensor_states.size());
  const WriterAssignment assignment = WriterAssignment::Create(*layout);
  for (uint32_t rank = 0; rank < index.world_size; ++rank) {
    ASSIGN_OR_RETURN(const std::vector<std::byte> bytes,
                     MakeImage(*layout, assignment, Rank{rank}, what, index, sums));
    RETURN_IF_ERROR(
        WriteNewFile(file_system, absl::StrCat(directory, "/", ImageFileName(Rank{rank})), bytes));
  }
  for (size_t i = 0; i < sums.size() && what.with_fingerprints; ++i) {
    index.facts[i].fingerprint = FingerprintOfShape(index.tensor_states[i]) + sums[i];
  }
  SortIndex(index);
  RETURN_IF_ERROR(CommitCheckpoint(file_system,
                                   {.job_directory = job_directory,
                                    .writer = "testing",
                                    .parent = std::nullopt,
                                    .created_at = absl::Time()},
                                   index));
  for (const std::string& made : {what.root, job_directory}) {
    RETURN_IF_ERROR(file_system.SyncDirectory(made));
  }
  return ReadCatalogEntry(file_system, job_directory, what.job, what.job_uuid, what.id);
}

absl::Status CheckTestCheckpoint(FileSystem& file_system, const ReadAt& read_at,
                                 const CatalogEntry& entry, uint32_t blob_ranks) {
  if (entry.state != CatalogEntry::State::kCommitted) return absl::DataLossError(entry.why);
  ASSIGN_OR_RETURN(const VerifyReport report, VerifyCheckpoint(file_system, read_at, entry, {}));
  if (report.verdict != Verdict::kGood) {
    return absl::DataLossError(absl::StrCat("damaged: ", report.findings.front().text));
  }
  if (report.fingerprints_not_computed != 0) return absl::DataLossError("no fingerprints");
  ASSIGN_OR_RETURN(const Index index, LoadIndex(file_system, entry.directory, *entry.manifest));
  std::vector<std::string> files;
  for (const IndexImage& image : index.images) {
    ASSIGN_OR_RETURN(std::string bytes,
                     file_system.ReadSmallFile(absl::StrCat(entry.directory, "/", image.file),
                                               uint64_t{1} << 30));
    files.push_back(std::move(bytes));
  }
  RETURN_IF_ERROR(CheckGaps(index, files));
  std::vector<std::vector<bool>> seen;
  for (const TensorState& state : index.tensor_states) seen.emplace_back(state.ElementCount());
  for (const IndexPiece& piece : index.pieces) {
    const TensorState& state = index.tensor_states[piece.piece.tensor_state];
    uint64_t at = piece.offset_bytes;
    for (uint64_t number = piece.piece.begin; number < piece.piece.end; ++number) {
      const uint64_t element = ElementOf(piece.piece, number, state, index.boxes);
      if (seen[piece.piece.tensor_state].at(element)) {
        return absl::DataLossError(
            absl::StrFormat("%s, element %d is there twice", Describe(state), element));
      }
      seen[piece.piece.tensor_state][element] = true;
      for (uint64_t b = 0; b < ElementBytes(state.dtype); ++b) {
        if (static_cast<std::byte>(files[piece.image].at(at++)) !=
            ByteOf(NameOf(state), element, b)) {
          return absl::DataLossError(
              absl::StrFormat("%s, element %d has another value", Describe(state), element));
        }
      }
    }
  }
  for (size_t i = 0; i < seen.size(); ++i) {
    if (std::ranges::count(seen[i], false) > 0) {
      return absl::DataLossError(absl::StrCat(Describe(index.tensor_states[i]), " has gaps"));
    }
  }
  if (index.blobs.size() != blob_ranks + 1 || index.BlobWorldSize() != blob_ranks) {
    return absl::DataLossError(absl::StrFormat("expected blobs of %d ranks, found %d, of %d",
                                               blob_ranks, index.blobs.size(),
                                               index.BlobWorldSize()));
  }
  for (const IndexBlob& blob : index.blobs) {
    if (files[blob.image].substr(blob.offset_bytes, blob.bytes) !=
        TestBlob(blob.scope, blob.name, Value(blob.rank))) {
      return absl::DataLossError(
          absl::StrFormat("blob %s of rank %d", blob.name, Value(blob.rank)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Found> FindNewest(FileSystem& file_system, const std::string& root,
                                 const std::string& job) {
  ASSIGN_OR_RETURN(const Catalog catalog, ReadCatalog(file_system, root, job));
  if (!catalog.newest.has_value()) return absl::NotFoundError("no checkpoint");
  Found found{catalog.entries[*catalog.newest], {}};
  if (!found.entry.manifest.has_value()) return absl::DataLossError(found.entry.why);
  ASSIGN_OR_RETURN(found.index,
                   LoadIndex(file_system, found.entry.directory, *found.entry.manifest));
  return found;
}

}  // namespace holdfast
