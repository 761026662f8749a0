#include "checkpoint/verify.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "checkpoint/describe.h"
#include "format/image_fingerprints.h"
#include "io/transfer.h"

namespace holdfast {
namespace {

// Errors that say something about the checkpoint; all others are about reading it now.
bool IsAboutContents(const absl::Status& status) {
  return status.code() == absl::StatusCode::kDataLoss ||
         status.code() == absl::StatusCode::kNotFound ||
         status.code() == absl::StatusCode::kResourceExhausted;
}

class Verifier {
 public:
  Verifier(FileSystem& file_system, const ReadAt& read_at, const CatalogEntry& entry,
           const VerifyOptions& options)
      : file_system_(file_system), read_at_(read_at), entry_(entry), options_(options) {}

  absl::StatusOr<VerifyReport> Run() {
    if (entry_.state == CatalogEntry::State::kIncomplete ||
        entry_.state == CatalogEntry::State::kFenced) {
      AddFinding({.file = "", .text = entry_.why}, Verdict::kNotFound);
      return std::move(report_);
    }
    report_.verdict = Verdict::kGood;
    if (entry_.state == CatalogEntry::State::kDamaged) {
      AddFinding({.file = kManifestFileName, .text = entry_.why}, Verdict::kDamaged);
      return std::move(report_);
    }
    absl::StatusOr<Index> index = LoadIndex(file_system_, entry_.directory, *entry_.manifest);
    if (!index.ok()) {
      if (!IsAboutContents(index.status())) return index.status();
      AddFinding({.file = kIndexFileName, .text = std::string(index.status().message())},
                 Verdict::kDamaged);
      return std::move(report_);
    }
    const absl::Status cover = CheckIndexCover(*index);
    if (!cover.ok()) {
      AddFinding({.file = kIndexFileName, .text = std::string(cover.message())}, Verdict::kDamaged);
    }
    for (const IndexImage& image : index->images) bytes_total_ += image.bytes;
    sums_.resize(index->tensor_states.size());
    std::vector<std::vector<PlacedPiece>> pieces(index->images.size());
    for (const IndexPiece& piece : index->pieces) {
      pieces[piece.image].push_back({piece.piece, piece.offset_bytes});
    }
    for (uint32_t image = 0; image < index->images.size(); ++image) {
      RETURN_IF_ERROR(CheckImage(
          *index, image, ImageFingerprints(index->tensor_states, index->boxes, pieces[image])));
    }
    // With gaps or overlaps the sums say nothing.
    if (cover.ok()) CheckFingerprints(*index);
    return std::move(report_);
  }

 private:
  // Of a tensor state, over the blocks that are good.
  struct Sum {
    uint64_t bytes = 0;
    Fingerprint fingerprint;
  };

  void AddFinding(Finding finding, Verdict verdict) {
    // Verdicts are ordered from good to bad, but for kNotFound, which is given alone.
    report_.verdict = std::max(report_.verdict, verdict);
    ++report_.finding_count;
    if (report_.findings.size() < kFindingsMax) report_.findings.push_back(std::move(finding));
  }

  absl::Status CheckImage(const Index& index, uint32_t number,
                          const ImageFingerprints& fingerprints) {
    const IndexImage& image = index.images[number];
    const std::string path = absl::StrCat(entry_.directory, "/", image.file);
    absl::StatusOr<std::unique_ptr<IoFile>> file =
        file_system_.OpenForRead(path, Caching::kBuffered);
    if (!file.ok()) {
      if (!IsAboutContents(file.status())) return file.status();
      AddFinding({.file = image.file, .text = std::string(file.status().message())},
                 Verdict::kDamaged);
      return absl::OkStatus();
    }
    if ((*file)->size_bytes() != image.bytes) {
      AddFinding({.file = image.file,
                  .text = absl::StrFormat("%s: expected %d bytes, found %d", image.file,
                                          image.bytes, (*file)->size_bytes())},
                 Verdict::kDamaged);
    }
    std::vector<std::byte> block(image.block_bytes);
    const uint64_t whole_blocks =
        std::min<uint64_t>(image.block_crc32c.size(), (*file)->size_bytes() / image.block_bytes);
    for (uint64_t at = 0; at < whole_blocks; ++at) {
      const uint64_t begin = at * image.block_bytes;
      const absl::Status read = read_at_(**file, begin, block);
      if (!read.ok() && !IsAboutContents(read)) return read;
      ++report_.blocks_checked;
      report_.bytes_read += block.size();
      if (CheckBlock(index, number, at,
                     read.ok() ? absl::StatusOr<uint32_t>(Crc32c(block)) : read)) {
        AddToSums(fingerprints, begin, block);
      }
      if (options_.progress && !options_.progress(report_.bytes_read, bytes_total_)) {
        return absl::CancelledError("verification was stopped");
      }
    }
    return absl::OkStatus();
  }

  void AddToSums(const ImageFingerprints& fingerprints, uint64_t offset_bytes,
                 std::span<const std::byte> block) {
    parts_.clear();
    fingerprints.AppendParts(offset_bytes, block, parts_);
    for (const FingerprintPart& part : parts_) {
      sums_[part.tensor_state].bytes += part.bytes;
      sums_[part.tensor_state].fingerprint += part.sum;
    }
  }

  // A tensor state with a bad block is damaged, which is reported already.
  void CheckFingerprints(const Index& index) {
    for (size_t i = 0; i < index.tensor_states.size(); ++i) {
      const TensorState& state = index.tensor_states[i];
      const std::optional<Fingerprint>& expected = index.facts[i].fingerprint;
      if (!expected.has_value()) {
        ++report_.fingerprints_not_computed;
        continue;
      }
      if (sums_[i].bytes != state.Bytes()) continue;
      const Fingerprint found = FingerprintOfShape(state) + sums_[i].fingerprint;
      if (found == *expected) {
        ++report_.fingerprints_checked;
        continue;
      }
      AddFinding({.file = kIndexFileName,
                  .tensors = {absl::StrFormat("%s (%s)", state.tensor, state.state)},
                  .text = WrongFingerprintText(state, *expected, found)},
                 Verdict::kDamaged);
    }
  }

  // Whether it is good.
  bool CheckBlock(const Index& index, uint32_t number, uint64_t block,
                  const absl::StatusOr<uint32_t>& found) {
    const IndexImage& image = index.images[number];
    if (found.ok() && *found == image.block_crc32c[block]) return true;
    Finding finding;
    finding.file = image.file;
    finding.offset_bytes = block * image.block_bytes;
    finding.bytes = image.block_bytes;
    finding.tensors = TensorsAt(index, number, finding.offset_bytes,
                                finding.offset_bytes + finding.bytes, kFindingTensorsMax);
    const std::string what = found.ok() ? absl::StrFormat("expected CRC32C %08x, found %08x",
                                                          image.block_crc32c[block], *found)
                                        : std::string(found.status().message());
    finding.text = BadBlockText(image, image.file, block, what, finding.tensors);
    const Verdict verdict = finding.tensors.empty() ? Verdict::kDamagedUnread : Verdict::kDamaged;
    AddFinding(std::move(finding), verdict);
    return false;
  }

  FileSystem& file_system_;
  const ReadAt& read_at_;
  const CatalogEntry& entry_;
  const VerifyOptions& options_;
  VerifyReport report_;
  uint64_t bytes_total_ = 0;
  std::vector<Sum> sums_;  // one per tensor state
  std::vector<FingerprintPart> parts_;
};

}  // namespace

ReadAt PlainReadAt() {
  return [](IoFile& file, uint64_t offset, std::span<std::byte> out) {
    return ReadAll(file.handle(), offset, out);
  };
}

absl::StatusOr<VerifyReport> VerifyCheckpoint(FileSystem& file_system, const ReadAt& read_at,
                                              const CatalogEntry& entry,
                                              const VerifyOptions& options) {
  return Verifier(file_system, read_at, entry, options).Run();
}

absl::StatusOr<Index> LoadIndex(FileSystem& file_system, const std::string& directory,
                                const Manifest& manifest) {
  const std::string path = absl::StrCat(directory, "/", kIndexFileName);
  // Before anything is allocated: a manifest can say anything, and a file can be one large hole.
  if (manifest.index_bytes > kIndexBytesMax) {
    return absl::DataLossError(absl::StrFormat("%s: expected at most %d bytes, found %d in %s",
                                               path, kIndexBytesMax, manifest.index_bytes,
                                               kManifestFileName));
  }
  ASSIGN_OR_RETURN(const FileInfo info, file_system.Stat(path));
  if (info.kind != FileInfo::Kind::kFile || info.size_bytes != manifest.index_bytes) {
    return absl::DataLossError(absl::StrFormat("%s: expected a file of %d bytes, found %d", path,
                                               manifest.index_bytes, info.size_bytes));
  }
  ASSIGN_OR_RETURN(const std::string text, file_system.ReadSmallFile(path, manifest.index_bytes));
  const std::span<const std::byte> bytes = std::as_bytes(std::span(text));
  const auto named = [&](const absl::Status& status) {
    return absl::Status(status.code(), absl::StrFormat("%s: %s", path, status.message()));
  };
  if (absl::Status right = CheckIndexBytes(manifest, bytes); !right.ok()) return named(right);
  absl::StatusOr<Index> index = DecodeIndex(bytes);
  if (!index.ok()) return named(index.status());
  if (absl::Status right = CheckConsistent(manifest, *index); !right.ok()) return named(right);
  return index;
}

absl::StatusOr<Index> LoadCommittedIndex(FileSystem& file_system, const CatalogEntry& entry) {
  switch (entry.state) {
    case CatalogEntry::State::kCommitted:
      return LoadIndex(file_system, entry.directory, *entry.manifest);
    case CatalogEntry::State::kDamaged:
      return absl::DataLossError(absl::StrFormat("%s: damaged: %s", entry.directory, entry.why));
    case CatalogEntry::State::kIncomplete:
    case CatalogEntry::State::kFenced:
      break;
  }
  return absl::NotFoundError(absl::StrFormat("%s: not committed: %s", entry.directory, entry.why));
}

absl::Status CheckImageSizes(FileSystem& file_system, const std::string& directory,
                             const Manifest& manifest) {
  for (const ManifestImage& image : manifest.images) {
    const std::string path = absl::StrCat(directory, "/", image.file);
    ASSIGN_OR_RETURN(const FileInfo info, file_system.Stat(path));
    if (info.kind != FileInfo::Kind::kFile || info.size_bytes != image.bytes) {
      return absl::DataLossError(absl::StrFormat("%s: expected a file of %d bytes, found %d", path,
                                                 image.bytes, info.size_bytes));
    }
  }
  return absl::OkStatus();
}

std::vector<std::string> TensorsAt(const Index& index, uint32_t image, uint64_t begin_bytes,
                                   uint64_t end_bytes, size_t count_max) {
  std::vector<std::string> names;
  // Neighbouring pieces of one tensor state count once.
  const auto add = [&](std::string name) {
    if (names.size() < count_max && (names.empty() || names.back() != name)) {
      names.push_back(std::move(name));
    }
  };
  for (const IndexPiece& piece : index.pieces) {
    if (piece.image != image) continue;
    const TensorState& state = index.tensor_states[piece.piece.tensor_state];
    const uint64_t bytes = piece.piece.ElementCount() * ElementBytes(state.dtype);
    if (piece.offset_bytes < end_bytes && piece.offset_bytes + bytes > begin_bytes) {
      add(absl::StrFormat("%s (%s)", state.tensor, state.state));
    }
  }
  for (const IndexBlob& blob : index.blobs) {
    if (blob.image == image && blob.offset_bytes < end_bytes &&
        blob.offset_bytes + blob.bytes > begin_bytes) {
      add(absl::StrFormat("blob %s", blob.name));
    }
  }
  return names;
}

std::string BadBlockText(const IndexImage& image, const std::string& file, uint64_t block,
                         const std::string& what, const std::vector<std::string>& tensors) {
  const uint64_t begin = block * image.block_bytes;
  return absl::StrFormat("%s: block %d, bytes [%d, %d): %s; there lies: %s", file, block, begin,
                         begin + image.block_bytes, what,
                         tensors.empty() ? "no tensor" : absl::StrJoin(tensors, ", "));
}

std::string WrongFingerprintText(const TensorState& tensor_state, const Fingerprint& expected,
                                 const Fingerprint& found) {
  return absl::StrFormat(
      "%s: expected fingerprint %s, found %s, though every block of it has its checksum",
      Describe(tensor_state), expected.Hex(), found.Hex());
}

}  // namespace holdfast
