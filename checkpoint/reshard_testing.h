// For tests: makes checkpoints in any layout, and reads them back element by element.
//
// What a tensor state contains is defined here by its name: a function of (tensor, state, element,
// byte), whatever the layout. The reader shares the decoder of INDEX with the product and nothing
// else: it looks at pieces one element at a time, and plans nothing.
#ifndef HOLDFAST_CHECKPOINT_RESHARD_TESTING_H_
#define HOLDFAST_CHECKPOINT_RESHARD_TESTING_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/ids.h"
#include "checkpoint/catalog.h"
#include "checkpoint/reshard.h"
#include "format/index.h"
#include "io/file_system.h"
#include "tests/support/sim_disk.h"

namespace holdfast {

// For heads: hundreds of them are made, and memory is faster than a disk.
std::string ScratchDirectory();

// Of a simulated disk, for schedules of one thread.
ReshardStorage SimReshardStorage(SimDisk& disk);

struct TestCheckpoint {
  std::string root = "/src";
  std::string job = "job";
  std::string job_uuid = "01234567-89ab-4cde-8f01-23456789abcd";
  CheckpointId id{Attempt{3}, Step{7}};
  uint64_t block_bytes = 4096;
  bool with_fingerprints = true;
};

// Writes a committed checkpoint of `layout_json`, with a job around it: on every rank the blob
// "rng", of other lengths, and from rank 0 the global blob "args". The root exists.
absl::StatusOr<CatalogEntry> WriteTestCheckpoint(FileSystem& file_system,
                                                 const std::string& layout_json,
                                                 const TestCheckpoint& what);
std::string TestBlob(BlobScope scope, const std::string& name, uint32_t rank);

// OK if every element of every tensor state of the checkpoint is there exactly once and has the
// bytes that the definition says, and every blob; INDEX has the fingerprint of every state; and
// VerifyCheckpoint finds nothing wrong. `blob_ranks`: whose blobs are expected.
absl::Status CheckTestCheckpoint(FileSystem& file_system, const ReadAt& read_at,
                                 const CatalogEntry& entry, uint32_t blob_ranks);

// The newest of a job, with its INDEX.
struct Found {
  CatalogEntry entry;
  Index index;
};
absl::StatusOr<Found> FindNewest(FileSystem& file_system, const std::string& root,
                                 const std::string& job);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RESHARD_TESTING_H_
