// The small JSON files of a checkpoint root: MANIFEST.json (commits a checkpoint), JOB.json (whose
// directory this is), BAD.<n> (a mark against a checkpoint) and HEAD.<n> (which branch is current).
// Bytes: docs/FORMAT.md. Publishing them is not done here.
//
// All four end in one line that is the CRC32C of all bytes before it. Decoders check that line
// first, byte for byte, then read strictly: no unknown member, no duplicate, nothing behind the
// end. So no bit of such a file can change unseen.
//
// Lineage. A manifest names its parent: the checkpoint that its run had restored or committed last.
// HEAD.<n> with the greatest n names the current branch: `to` and its ancestors by parent links,
// and everything made by an attempt greater than abandons_attempts_up_to, unless it descends from a
// checkpoint that is not on the branch. (Attempt numbers only grow and HEAD names the greatest at
// its time, so later attempts began on the branch.) Without any HEAD all checkpoints are on the
// branch. The newest checkpoint is the greatest CheckpointId on the branch.
//
// Threads: all functions here are pure. Errors of decoders: kDataLoss; the text names the file,
// what was expected and what was found.
#ifndef HOLDFAST_FORMAT_MANIFEST_H_
#define HOLDFAST_FORMAT_MANIFEST_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/ids.h"
#include "format/checkpoint_names.h"

namespace holdfast {

inline constexpr uint32_t kFormatVersion = 1;
inline constexpr uint64_t kManifestBytesMax = uint64_t{256} << 20;    // a million ranks
inline constexpr uint64_t kSmallRecordBytesMax = uint64_t{64} << 10;  // JOB, BAD, HEAD
inline constexpr size_t kReasonBytesMax = 4096;

// ---- MANIFEST.json ----

// The faults that a checkpoint survives in this root (DESIGN section 1).
struct FaultSet {
  bool process = false;
  bool power = false;
  uint32_t nodes = 0;  // any so many nodes are lost
  friend bool operator==(const FaultSet&, const FaultSet&) = default;
};
std::string Describe(const FaultSet& faults);  // "process, power"; "nothing"

// How much was read back from storage and compared before the manifest was published.
enum class Verification { kNone, kSample, kAll };

struct ManifestImage {
  std::string file;            // in the checkpoint's directory
  uint64_t bytes = 0;          // of the file
  uint32_t checksum_root = 0;  // ChecksumRoot() of its block table in INDEX
  friend bool operator==(const ManifestImage&, const ManifestImage&) = default;
};

struct Manifest {
  std::string job;
  std::string job_uuid;
  CheckpointId checkpoint;
  std::optional<CheckpointId> parent;  // empty: the run began from nothing
  uint32_t world_size = 0;
  FaultSet survives;
  uint64_t index_bytes = 0;
  uint32_t index_crc32c = 0;          // of all bytes of INDEX
  std::vector<ManifestImage> images;  // one per rank, in order of the ranks
  Verification verification = Verification::kNone;
  std::string created_by;   // "holdfast 0.1.0"
  absl::Time created_at{};  // wall clock in whole seconds; for people only
};

// Deterministic. CHECKs that the manifest is one that DecodeManifest accepts.
std::string EncodeManifest(const Manifest& manifest);
// `where` names the file in errors.
absl::StatusOr<Manifest> DecodeManifest(std::string_view bytes, const std::string& where);

// ---- JOB.json ----

// The checkpoint that a tool made a job's first one from (attempt 0).
struct JobSource {
  std::string job;
  std::string job_uuid;
  CheckpointId checkpoint;
  std::string directory;  // where it lay then: for people, UTF-8, at most kSourceBytesMax
  friend bool operator==(const JobSource&, const JobSource&) = default;
};
inline constexpr size_t kSourceBytesMax = 16384;

struct JobRecord {
  std::string job;
  std::string job_uuid;
  std::string created_by;
  absl::Time created_at{};                         // as in Manifest
  std::optional<JobSource> source = std::nullopt;  // empty: runs of the job made all that it has
};
std::string EncodeJobRecord(const JobRecord& record);
absl::StatusOr<JobRecord> DecodeJobRecord(std::string_view bytes, const std::string& where);

// ---- BAD.<n> ----

struct BadMark {
  uint32_t number = 0;  // n of the name, 1 and up
  std::string job_uuid;
  CheckpointId checkpoint;
  std::string reason;  // UTF-8, at most kReasonBytesMax
  std::string created_by;
  absl::Time created_at{};
};
std::string EncodeBadMark(const BadMark& mark);
absl::StatusOr<BadMark> DecodeBadMark(std::string_view bytes, const std::string& where);

// ---- HEAD.<n> ----

struct Head {
  uint32_t number = 0;  // n of the name, 1 and up
  std::string job_uuid;
  std::optional<CheckpointId> to;  // empty: the branch begins from nothing
  Attempt abandons_attempts_up_to{};
  std::string reason;
  std::string created_by;
  absl::Time created_at{};
};
std::string EncodeHead(const Head& head);
absl::StatusOr<Head> DecodeHead(std::string_view bytes, const std::string& where);

// ---- Lineage ----

struct LineageEntry {
  CheckpointId checkpoint;
  std::optional<CheckpointId> parent;
};
// Which of `entries` are on the current branch (see the head of this file), ascending. A parent
// that is not among `entries` was deleted since: it ends the chain of ancestors of `to`, and a
// later checkpoint with such a parent counts as on the branch. O(n log n).
std::vector<CheckpointId> CurrentBranch(std::span<const LineageEntry> entries,
                                        const std::optional<Head>& head);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_MANIFEST_H_
