// What a root holds of a job: a directory without a manifest does not exist for readers, but is
// listed here with the reason. Reads through FileSystem only, trusts nothing that it reads, and
// follows no symbolic link.
//
// It reads manifests, marks and HEADs, not images: whether the bytes are good is checkpoint/
// verify.h's to say.
#ifndef HOLDFAST_CHECKPOINT_CATALOG_H_
#define HOLDFAST_CHECKPOINT_CATALOG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "checkpoint/lineage.h"
#include "format/manifest.h"
#include "io/file_system.h"

namespace holdfast {

inline constexpr size_t kJobsMax = 100'000;
inline constexpr size_t kCheckpointsMax = 100'000;        // directories of one job
inline constexpr size_t kCheckpointFilesMax = 4'000'000;  // names in one directory
inline constexpr uint32_t kMarksMax = 1'000;              // BAD.<n> of a checkpoint

struct CatalogEntry {
  enum class State {
    kCommitted,
    kIncomplete,  // no manifest: being written, or left behind by a crash; not restorable
    kFenced,      // a newer attempt has decided that it will never be committed (commit.h)
    kDamaged,     // there is a manifest, but it, or what it says, is wrong: `why`
  };
  CheckpointId id;
  std::string directory;  // path
  State state = State::kIncomplete;
  std::string why;                   // of kIncomplete, kFenced, kDamaged: for people
  std::optional<Manifest> manifest;  // if it could be read
  std::vector<BadMark> bad_marks;    // not empty: marked bad
  // Of kCommitted: a publication without links left its marker (publish.h).
  bool has_stale_marker = false;
  Branch branch = Branch::kUnknown;  // of kCommitted and kDamaged
};

struct Catalog {
  JobRecord job;
  std::optional<Head> head;
  std::vector<CatalogEntry> entries;  // ascending by id
  Lineage::Outcome outcome = Lineage::Outcome::kNone;
  std::optional<size_t> newest;       // as Lineage::newest, index into entries
  Attempt greatest_attempt{};         // of all directories; 0: there is none
  std::vector<std::string> warnings;  // what was seen and ignored: links, odd names

  const CatalogEntry* Find(CheckpointId id) const;  // null if there is none
};

// Names of the jobs in a root, sorted: directories with a legal name that hold a JOB.json.
absl::StatusOr<std::vector<std::string>> ListJobs(FileSystem& file_system, const std::string& root);

// The record of the job that the directory holds now. kNotFound: there is none; kDataLoss: it is
// damaged, or that of a job of another name.
absl::StatusOr<JobRecord> ReadJobRecord(FileSystem& file_system, const std::string& root,
                                        const std::string& job);

// Errors: kNotFound (no such job in the root), kDataLoss (JOB.json or the newest HEAD damaged, or
// of another job), kResourceExhausted (a limit above, with both numbers), and the FileSystem's. A
// single damaged checkpoint is an entry, not an error.
absl::StatusOr<Catalog> ReadCatalog(FileSystem& file_system, const std::string& root,
                                    const std::string& job);

// The entry of one checkpoint directory, without its branch. `job_uuid` empty: not compared.
// kNotFound if there is no such directory.
absl::StatusOr<CatalogEntry> ReadCatalogEntry(FileSystem& file_system,
                                              const std::string& job_directory,
                                              const std::string& job, const std::string& job_uuid,
                                              CheckpointId id);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_CATALOG_H_
