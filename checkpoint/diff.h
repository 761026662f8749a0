// Whether two checkpoints hold the same tensors, whatever their layouts, and by how much they
// differ. Uses nothing of the engine: `holdfast diff` runs it where no agent is.
//
// By fingerprints: from INDEX alone; equal ones mean equal tensors (docs/FORMAT.md gives the
// bound). By bytes: every element of both is read, verified and compared, in bounded memory, and
// what was read is held against the fingerprints of INDEX once more.
//
// Tensor states are the same by name (tensor and state), and equal if dtype, shape and all bits of
// all elements are. Steps, jobs, layouts and blobs are no part of that.
#ifndef HOLDFAST_CHECKPOINT_DIFF_H_
#define HOLDFAST_CHECKPOINT_DIFF_H_

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "base/ids.h"
#include "checkpoint/verify.h"
#include "format/element_difference.h"
#include "format/index.h"
#include "io/file_system.h"

namespace holdfast {

// Differences that a report lists; what comes after is counted only.
inline constexpr size_t kDiffTensorsMax = 10'000;
inline constexpr size_t kDiffBlobsMax = 10'000;
// For the blocks of both checkpoints that a comparison by bytes has in memory at once (more where
// kDiffSlotsMin blocks of each do not fit).
inline constexpr uint64_t kDiffMemoryBytes = uint64_t{256} << 20;

// A tensor state that is not equal, or not known to be.
struct TensorDifference {
  enum class Kind {
    kOnlyInA,
    kOnlyInB,
    kOtherKind,      // both have it, with another dtype or shape
    kContents,       // elements differ
    kNotComparable,  // by fingerprints: one of the two, or both, has none
  };
  Kind kind = Kind::kContents;
  std::optional<TensorState> a;  // empty: only in B
  std::optional<TensorState> b;
  bool a_has_fingerprint = false;
  bool b_has_fingerprint = false;
  // Of kContents, by bytes. `elements.first` counts in row-major order of the whole tensor.
  std::optional<ElementDifferences> elements;

  const TensorState& state() const { return a.has_value() ? *a : *b; }
};
inline constexpr size_t kTensorDifferenceKinds = 5;

// A blob that is not the same in both, or not known to be. Named by scope, name and, of rank scope,
// the rank that saved it; of a global one the rank does not count.
struct BlobDifference {
  enum class Kind {
    kOnlyInA,
    kOnlyInB,
    kContents,     // other length or bytes
    kNotCompared,  // equal length; bytes are compared by bytes only
  };
  Kind kind = Kind::kContents;
  BlobScope scope = BlobScope::kGlobal;
  std::string name;
  Rank rank{};
  uint64_t a_bytes = 0;
  uint64_t b_bytes = 0;
};
inline constexpr size_t kBlobDifferenceKinds = 4;

struct DiffReport {
  // Of the tensors. Damage is apart: see `damage`.
  enum class Verdict {
    kEqual,
    kDifferent,
    kUnknown,  // nothing differs, but something could not be compared
  };
  Verdict verdict = Verdict::kEqual;
  uint64_t states_compared = 0;  // tensor states that both have, of one dtype and shape
  uint64_t states_equal = 0;
  std::array<uint64_t, kTensorDifferenceKinds> tensor_counts{};  // by Kind
  std::vector<TensorDifference> tensors;  // ascending by (tensor, state); at most kDiffTensorsMax
  uint64_t blobs_equal = 0;
  std::array<uint64_t, kBlobDifferenceKinds> blob_counts{};
  std::vector<BlobDifference> blobs;  // ascending by (scope, name, rank); at most kDiffBlobsMax

  // By bytes only. Sentences: tensor states whose bytes do not have the fingerprint that their
  // INDEX says, though every block has its checksum. At most kFindingsMax; damage_count counts all.
  std::vector<std::string> damage;
  uint64_t damage_count = 0;
  uint64_t bytes_read = 0;
  uint64_t fingerprints_checked = 0;
};

struct DiffInput {
  std::string directory;
  const Index& index;  // what LoadIndex gave for it
};

// From the two indices alone. O(n) in tensor states and blobs.
DiffReport DiffFingerprints(const Index& a, const Index& b);

struct DiffThreads {
  uint32_t comparers_max = 4;  // and at most as many as there are processors
  // For tests: starts a thread, or throws std::system_error as std::jthread does. Unset: that.
  std::function<std::jthread(std::function<void()> body)> start = nullptr;
};

struct DiffOptions {
  // Called on the calling thread with bytes read and bytes to read, of tensors and of blobs that
  // are compared (those that differ are not read to the end); false stops: kCancelled.
  std::function<bool(uint64_t bytes_done, uint64_t bytes_total)> progress;
  uint64_t memory_bytes_max = kDiffMemoryBytes;
  DiffThreads threads;
};

// Reads all tensor states that both have with one dtype and shape, and the blobs of equal length
// that both have. Blocking; starts a few threads, which are gone when it returns.
// Errors: kDataLoss (a block, a file, or the cover of a checkpoint is damaged: with its path and,
// of a block, offset and tensors), kCancelled, kResourceExhausted (memory, threads),
// kInvalidArgument (too many windows, see DiffPlan::Create), and those of reading.
absl::StatusOr<DiffReport> DiffBytes(FileSystem& file_system, const ReadAt& read_at,
                                     const DiffInput& a, const DiffInput& b, Caching caching,
                                     const DiffOptions& options);

// Coordinates of element number `element` of a tensor of this shape, which has it.
std::vector<uint64_t> CoordinatesOf(std::span<const uint64_t> shape, uint64_t element);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_DIFF_H_
