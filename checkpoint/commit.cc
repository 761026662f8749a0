// The protocol of a commit. Every image is durable under its file when it begins; each step is
// entered only if the one before succeeded, and nothing but the manifest's name makes a checkpoint.
//
//   1. The pieces cover every tensor exactly once (the planner's proof), and the index is
//   consistent.
//   2. INDEX is published: contents, sync, name. Its bytes depend on the images only, so a worker
//      that crashed here and one that goes on write the same; but for fingerprints, which one of
//      them may know and the other not: then that of the first stands.
//   3. SyncDirectory: the names of the images and of INDEX are durable.
//   4. What a reader would read is read back: INDEX (bytes against the manifest's checksum,
//   decoded),
//      the manifest (decoded, consistent with INDEX), the size of every image file.
//   5. MANIFEST.json.partial.<writer>: contents, sync.
//   6. link(partial, MANIFEST.json): the checkpoint is visible. Exactly one can win this name: this
//      commit, or the fence of a newer attempt.
//   7. SyncDirectory: the checkpoint is durable, and only now reported.
//
// A crash before 6 leaves a directory without a manifest, which readers do not see. A crash between
// 6 and 7 leaves either that or a whole checkpoint, because all that the manifest speaks of was
// durable before its name could be.
#include "checkpoint/commit.h"

#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"
#include "base/json_reader.h"
#include "base/kill_point.h"
#include "base/status_macros.h"
#include "checkpoint/describe.h"
#include "checkpoint/publish.h"
#include "checkpoint/sealed_json.h"
#include "checkpoint/verify.h"
#include "format/planner.h"

namespace holdfast {
namespace {

constexpr char kFenceBegin[] = "{\"holdfast_fence\": 1,\n";

std::string_view AsText(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Manifest MakeManifest(const CommitRequest& request, const Index& index,
                      std::span<const std::byte> index_bytes) {
  Manifest manifest;
  manifest.job = index.job;
  manifest.job_uuid = index.job_uuid;
  manifest.checkpoint = index.checkpoint;
  manifest.parent = request.parent;
  manifest.world_size = index.world_size;
  manifest.survives = {.process = true, .power = true, .nodes = 0};
  manifest.index_bytes = index_bytes.size();
  manifest.index_crc32c = Crc32c(index_bytes);
  for (const IndexImage& image : index.images) {
    manifest.images.push_back({.file = image.file,
                               .bytes = image.bytes,
                               .checksum_root = ChecksumRoot(image.block_crc32c)});
  }
  manifest.verification = Verification::kNone;
  manifest.created_by = std::string(WriterVersion());
  manifest.created_at = request.created_at;
  return manifest;
}

// Step 4, by the reader's code: nothing of what was just written is believed.
absl::Status CheckReadBack(FileSystem& file_system, const std::string& directory,
                           const std::string& manifest_text) {
  const std::string manifest_path = absl::StrCat(directory, "/", kManifestFileName);
  ASSIGN_OR_RETURN(const Manifest manifest, DecodeManifest(manifest_text, manifest_path));
  RETURN_IF_ERROR(LoadIndex(file_system, directory, manifest).status());
  return CheckImageSizes(file_system, directory, manifest);
}

bool SameCommit(const Manifest& a, const Manifest& b) {
  return a.job == b.job && a.job_uuid == b.job_uuid && a.checkpoint == b.checkpoint &&
         a.world_size == b.world_size && a.index_bytes == b.index_bytes &&
         a.index_crc32c == b.index_crc32c && a.images == b.images;
}

// The manifest's name was taken. OK: by this very commit, made by a worker that died since.
absl::Status CheckTakenBySame(FileSystem& file_system, const std::string& path,
                              const Manifest& manifest) {
  ASSIGN_OR_RETURN(const std::string bytes, file_system.ReadSmallFile(path, kManifestBytesMax));
  const absl::StatusOr<Attempt> fence = DecodeFence(bytes, manifest.checkpoint, path);
  if (fence.ok()) {
    return absl::FailedPreconditionError(
        absl::StrFormat("%s is fenced: attempt %d began before it was committed",
                        Describe(manifest.checkpoint), Value(*fence)));
  }
  if (fence.status().code() != absl::StatusCode::kNotFound) return fence.status();
  ASSIGN_OR_RETURN(const Manifest found, DecodeManifest(bytes, path));
  if (SameCommit(found, manifest)) return absl::OkStatus();
  return absl::AlreadyExistsError(
      absl::StrFormat("%s: another checkpoint was committed under this name", path));
}

// Whether a file under the manifest's name is one: this or another's, or a fence.
bool IsWholeManifest(const std::string& bytes, CheckpointId id) {
  return DecodeFence(bytes, id, "").ok() || DecodeManifest(bytes, "").ok();
}

PublishOptions ManifestOptions(const std::string& writer, CheckpointId id) {
  return {.writer = writer,
          .on_visible = nullptr,
          .on_durable = nullptr,
          .is_whole = [id](const std::string& bytes) { return IsWholeManifest(bytes, id); },
          .bytes_max = kManifestBytesMax};
}

// Whether `found`, a file that is there already, says what `index` says, but for fingerprints that
// only one of them has.
bool IsSameIndex(const Index& index, std::span<const std::byte> index_bytes,
                 std::span<const std::byte> found) {
  absl::StatusOr<Index> other = DecodeIndex(found);
  if (!other.ok() || other->facts.size() != index.facts.size()) return false;
  for (size_t i = 0; i < index.facts.size(); ++i) {
    const std::optional<Fingerprint>& mine = index.facts[i].fingerprint;
    std::optional<Fingerprint>& theirs = other->facts[i].fingerprint;
    if (mine.has_value() && theirs.has_value() && mine != theirs) return false;
    theirs = mine;
  }
  const absl::StatusOr<std::vector<std::byte>> bytes = EncodeIndex(*other);
  return bytes.ok() && std::ranges::equal(*bytes, index_bytes);
}

// The bytes that INDEX has then: these, or those of a worker that died since.
absl::StatusOr<std::vector<std::byte>> PublishIndex(FileSystem& file_system,
                                                    const CommitRequest& request,
                                                    const std::string& directory,
                                                    const Index& index) {
  ASSIGN_OR_RETURN(std::vector<std::byte> bytes, EncodeIndex(index));
  const absl::Status published =
      PublishFile(file_system, directory, kIndexFileName, AsText(bytes),
                  {.writer = request.writer,
                   .on_visible = [] { KillPoint("commit.index_written"); },
                   .on_durable = nullptr,
                   .is_whole =
                       [](const std::string& found) {
                         return DecodeIndex(std::as_bytes(std::span(found))).ok();
                       },
                   .bytes_max = kIndexBytesMax});
  if (published.ok()) return bytes;
  if (published.code() != absl::StatusCode::kAlreadyExists) return published;
  const std::string path = absl::StrCat(directory, "/", kIndexFileName);
  ASSIGN_OR_RETURN(const std::string found, file_system.ReadSmallFile(path, kIndexBytesMax));
  if (found == AsText(bytes)) return bytes;
  const std::span<const std::byte> found_bytes = std::as_bytes(std::span(found));
  if (IsSameIndex(index, bytes, found_bytes)) {
    return std::vector<std::byte>(found_bytes.begin(), found_bytes.end());
  }
  return absl::AlreadyExistsError(absl::StrFormat(
      "%s: expected none, or one of %d bytes with CRC32C %08x; found one of %d bytes with %08x",
      path, bytes.size(), Crc32c(bytes), found.size(), Crc32c(found_bytes)));
}

}  // namespace

std::vector<StoredPiece> StoredPieces(const Index& index) {
  std::vector<StoredPiece> pieces;
  pieces.reserve(index.pieces.size());
  for (const IndexPiece& piece : index.pieces) {
    pieces.push_back({piece.piece, piece.image, piece.offset_bytes});
  }
  return pieces;
}

absl::Status CheckIndexCover(const Index& index) {
  const std::vector<StoredPiece> pieces = StoredPieces(index);
  return CheckCover({index.tensor_states, index.boxes, pieces});
}

absl::Status CommitCheckpoint(FileSystem& file_system, const CommitRequest& request,
                              const Index& index) {
  const std::string directory =
      absl::StrCat(request.job_directory, "/", CheckpointDirectoryName(index.checkpoint));
  ASSIGN_OR_RETURN(const std::vector<std::byte> index_bytes,
                   PublishIndex(file_system, request, directory, index));
  RETURN_IF_ERROR(file_system.SyncDirectory(directory));
  KillPoint("commit.index_durable");

  const Manifest manifest = MakeManifest(request, index, index_bytes);
  const std::string manifest_text = EncodeManifest(manifest);
  RETURN_IF_ERROR(CheckReadBack(file_system, directory, manifest_text));

  PublishOptions options = ManifestOptions(request.writer, index.checkpoint);
  options.on_durable = [] { KillPoint("commit.manifest_written"); };
  const absl::Status published =
      PublishFile(file_system, directory, kManifestFileName, manifest_text, options);
  if (published.code() == absl::StatusCode::kAlreadyExists) {
    RETURN_IF_ERROR(
        CheckTakenBySame(file_system, absl::StrCat(directory, "/", kManifestFileName), manifest));
    RETURN_IF_ERROR(RemoveMarkers(file_system, directory, kManifestFileName));
  } else if (!published.ok()) {
    return published;
  }
  KillPoint("commit.manifest_linked");
  RETURN_IF_ERROR(file_system.SyncDirectory(directory));
  KillPoint("commit.manifest_durable");
  return absl::OkStatus();
}

absl::Status FenceCheckpoint(FileSystem& file_system, const std::string& job_directory,
                             const std::string& writer, CheckpointId id, Attempt fenced_by) {
  const std::string directory = absl::StrCat(job_directory, "/", CheckpointDirectoryName(id));
  const std::string text =
      SealJson({"\"holdfast_fence\": 1", absl::StrFormat("\"attempt\": %d", Value(id.attempt)),
                absl::StrFormat("\"step\": %d", Value(id.step)),
                absl::StrFormat("\"fenced_by\": %d", Value(fenced_by))});
  const absl::Status published =
      PublishFile(file_system, directory, kManifestFileName, text, ManifestOptions(writer, id));
  if (published.code() == absl::StatusCode::kAlreadyExists) {
    const std::string path = absl::StrCat(directory, "/", kManifestFileName);
    ASSIGN_OR_RETURN(const std::string bytes, file_system.ReadSmallFile(path, kManifestBytesMax));
    if (!DecodeFence(bytes, id, path).ok()) {
      if (const absl::StatusOr<Manifest> committed = DecodeManifest(bytes, path); committed.ok()) {
        return published;
      } else {
        return absl::UnavailableError(absl::StrFormat("%s: neither a manifest nor a fence: %s",
                                                      path, committed.status().message()));
      }
    }
  } else if (!published.ok()) {
    return published;
  }
  return file_system.SyncDirectory(directory);
}

absl::StatusOr<Attempt> DecodeFence(std::string_view bytes, CheckpointId id,
                                    const std::string& where) {
  if (bytes.substr(0, sizeof(kFenceBegin) - 1) != kFenceBegin) {
    return absl::NotFoundError(absl::StrFormat("%s: not a fence", where));
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document, UnsealJson(bytes, where));
  const auto read = [&]() -> absl::StatusOr<Attempt> {
    const JsonValue root = document->root();
    RETURN_IF_ERROR(root.ExpectKeys({"holdfast_fence", "attempt", "step", "fenced_by", "crc32c"}));
    ASSIGN_OR_RETURN(const JsonValue attempt, root.Get("attempt"));
    ASSIGN_OR_RETURN(const uint64_t attempt_number, attempt.Uint64());
    ASSIGN_OR_RETURN(const JsonValue step, root.Get("step"));
    ASSIGN_OR_RETURN(const uint64_t step_number, step.Uint64());
    ASSIGN_OR_RETURN(const JsonValue by, root.Get("fenced_by"));
    ASSIGN_OR_RETURN(const uint64_t by_number, by.Uint64());
    if (attempt_number != Value(id.attempt))
      return attempt.Mismatch(absl::StrCat(Value(id.attempt)));
    if (step_number != Value(id.step)) return step.Mismatch(absl::StrCat(Value(id.step)));
    if (by_number > UINT32_MAX) return by.Mismatch("an attempt");
    return Attempt{static_cast<uint32_t>(by_number)};
  };
  absl::StatusOr<Attempt> fenced_by = read();
  if (fenced_by.ok()) return fenced_by;
  return absl::DataLossError(absl::StrFormat("%s: %s", where, fenced_by.status().message()));
}

}  // namespace holdfast
