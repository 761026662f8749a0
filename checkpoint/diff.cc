#include "checkpoint/diff.h"

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "checkpoint/block_reader.h"
#include "checkpoint/commit.h"
#include "checkpoint/diff_bytes.h"
#include "checkpoint/diff_plan.h"
#include "format/fingerprint.h"

namespace holdfast {
namespace {

// Walks two ascending lists: calls visit(place in a, place in b), empty where it is in one only.
// Equal keys in one list are taken one after another.
template <typename Item, typename Key, typename Visit>
void Merge(const std::vector<Item>& a, const std::vector<Item>& b, Key key, Visit visit) {
  uint32_t i = 0;
  uint32_t j = 0;
  while (i < a.size() || j < b.size()) {
    const bool only_a = j == b.size() || (i < a.size() && key(a[i]) < key(b[j]));
    const bool only_b = i == a.size() || (j < b.size() && key(b[j]) < key(a[i]));
    visit(only_b ? std::nullopt : std::optional(i), only_a ? std::nullopt : std::optional(j));
    if (!only_b) ++i;
    if (!only_a) ++j;
  }
}

auto NameOf(const TensorState& state) { return std::tie(state.tensor, state.state); }

using BlobKey = std::tuple<BlobScope, const std::string&, Rank>;
BlobKey NameOf(const IndexBlob& blob) {
  return {blob.scope, blob.name, blob.scope == BlobScope::kRank ? blob.rank : Rank{}};
}

bool IsOneKind(const TensorState& a, const TensorState& b) {
  return a.dtype == b.dtype && a.shape == b.shape;
}

void Add(TensorDifference difference, DiffReport& report) {
  ++report.tensor_counts[static_cast<size_t>(difference.kind)];
  if (report.tensors.size() < kDiffTensorsMax) report.tensors.push_back(std::move(difference));
}

void Add(BlobDifference difference, DiffReport& report) {
  ++report.blob_counts[static_cast<size_t>(difference.kind)];
  if (report.blobs.size() < kDiffBlobsMax) report.blobs.push_back(std::move(difference));
}

// Adds what is in one only or of two kinds, and calls `compare` with the numbers of the others.
template <typename Compare>
void AddStates(const Index& a, const Index& b, DiffReport& report, Compare compare) {
  using Kind = TensorDifference::Kind;
  const auto key = [](const TensorState& state) { return NameOf(state); };
  Merge(a.tensor_states, b.tensor_states, key,
        [&](std::optional<uint32_t> i, std::optional<uint32_t> j) {
          TensorDifference difference;
          if (i.has_value()) {
            difference.a = a.tensor_states[*i];
            difference.a_has_fingerprint = a.facts[*i].fingerprint.has_value();
          }
          if (j.has_value()) {
            difference.b = b.tensor_states[*j];
            difference.b_has_fingerprint = b.facts[*j].fingerprint.has_value();
          }
          if (!i.has_value() || !j.has_value()) {
            difference.kind = i.has_value() ? Kind::kOnlyInA : Kind::kOnlyInB;
          } else if (!IsOneKind(*difference.a, *difference.b)) {
            difference.kind = Kind::kOtherKind;
          } else {
            ++report.states_compared;
            if (compare(*i, *j, difference)) {
              ++report.states_equal;
              return;
            }
          }
          Add(std::move(difference), report);
        });
}

// Adds what is in one only or of two lengths, and calls `compare` with the others, which says
// what they are, or nothing if they are equal.
template <typename Compare>
absl::Status AddBlobs(const Index& a, const Index& b, DiffReport& report, Compare compare) {
  using Kind = BlobDifference::Kind;
  absl::Status status;
  const auto key = [](const IndexBlob& blob) { return NameOf(blob); };
  Merge(a.blobs, b.blobs, key, [&](std::optional<uint32_t> i, std::optional<uint32_t> j) {
    if (!status.ok()) return;
    const IndexBlob& named = i.has_value() ? a.blobs[*i] : b.blobs[*j];
    BlobDifference difference{.scope = named.scope, .name = named.name, .rank = named.rank};
    if (i.has_value()) difference.a_bytes = a.blobs[*i].bytes;
    if (j.has_value()) difference.b_bytes = b.blobs[*j].bytes;
    if (!i.has_value() || !j.has_value()) {
      difference.kind = i.has_value() ? Kind::kOnlyInA : Kind::kOnlyInB;
    } else if (difference.a_bytes != difference.b_bytes) {
      difference.kind = Kind::kContents;
    } else {
      const absl::StatusOr<std::optional<Kind>> found = compare(a.blobs[*i], b.blobs[*j]);
      status = found.status();
      if (found.ok() && !found->has_value()) ++report.blobs_equal;
      if (!found.ok() || !found->has_value()) return;
      difference.kind = **found;
    }
    Add(std::move(difference), report);
  });
  return status;
}

DiffReport::Verdict VerdictOf(const DiffReport& report) {
  using Kind = TensorDifference::Kind;
  for (const Kind kind : {Kind::kOnlyInA, Kind::kOnlyInB, Kind::kOtherKind, Kind::kContents}) {
    if (report.tensor_counts[static_cast<size_t>(kind)] > 0) {
      return DiffReport::Verdict::kDifferent;
    }
  }
  return report.tensor_counts[static_cast<size_t>(Kind::kNotComparable)] > 0
             ? DiffReport::Verdict::kUnknown
             : DiffReport::Verdict::kEqual;
}

// The bytes of blobs, block by block; blobs that share a block, and follow one another, read it
// once.
class BlobReader {
 public:
  BlobReader(const BlockReader& reader, const Index& index) : reader_(reader), index_(index) {}

  // From this place of the image to the end of its block.
  absl::StatusOr<std::span<const std::byte>> From(uint32_t image, uint64_t offset_bytes) {
    const uint64_t block_bytes = index_.images[image].block_bytes;
    const uint64_t block = offset_bytes / block_bytes;
    if (image_ != image || block_ != block) {
      if (memory_bytes_ != block_bytes) memory_ = AllocateBlockMemory(block_bytes);
      memory_bytes_ = block_bytes;
      if (memory_ == nullptr) {
        return absl::ResourceExhaustedError(
            absl::StrFormat("no memory for a block of %d bytes", block_bytes));
      }
      image_.reset();
      RETURN_IF_ERROR(reader_.Read(image, block, {memory_.get(), block_bytes}));
      bytes_read_ += block_bytes;
      image_ = image;
      block_ = block;
    }
    return std::span<const std::byte>(memory_.get(), block_bytes)
        .subspan(offset_bytes % block_bytes);
  }
  uint64_t bytes_read() const { return bytes_read_; }

 private:
  const BlockReader& reader_;
  const Index& index_;
  BlockMemory memory_;
  uint64_t memory_bytes_ = 0;
  std::optional<uint32_t> image_;  // whose block is in the memory
  uint64_t block_ = 0;
  uint64_t bytes_read_ = 0;
};

// Both have one length. `progress` is called block by block; false stops: kCancelled.
absl::StatusOr<bool> AreEqual(const IndexBlob& a, const IndexBlob& b, BlobReader& a_reader,
                              BlobReader& b_reader,
                              const std::function<bool(uint64_t bytes_compared)>& progress) {
  for (uint64_t done = 0; done < a.bytes;) {
    ASSIGN_OR_RETURN(const auto a_bytes, a_reader.From(a.image, a.offset_bytes + done));
    ASSIGN_OR_RETURN(const auto b_bytes, b_reader.From(b.image, b.offset_bytes + done));
    const uint64_t count =
        std::min({a.bytes - done, uint64_t{a_bytes.size()}, uint64_t{b_bytes.size()}});
    if (!std::equal(a_bytes.begin(), a_bytes.begin() + static_cast<ptrdiff_t>(count),
                    b_bytes.begin())) {
      return false;
    }
    done += count;
    if (!progress(2 * count)) return absl::CancelledError("the comparison was stopped");
  }
  return true;
}

class ByteDiff {
 public:
  ByteDiff(FileSystem& file_system, const ReadAt& read_at, const DiffInput& a, const DiffInput& b,
           Caching caching, const DiffOptions& options)
      : file_system_(file_system),
        read_at_(read_at),
        inputs_{&a, &b},
        caching_(caching),
        options_(options) {}

  absl::StatusOr<DiffReport> Run() {
    for (size_t i = 0; i < 2; ++i) {
      const DiffInput& input = *inputs_[i];
      if (absl::Status cover = CheckIndexCover(input.index); !cover.ok()) {
        return absl::Status(cover.code(),
                            absl::StrFormat("%s: %s", input.directory, cover.message()));
      }
      ASSIGN_OR_RETURN(readers_[i], BlockReader::Open(file_system_, read_at_, input.directory,
                                                      input.index, caching_));
    }
    std::vector<CommonState> common;
    DiffReport unused;
    AddStates(A(), B(), unused, [&](uint32_t i, uint32_t j, const TensorDifference&) {
      common.push_back({{i, j}});
      return true;
    });
    RETURN_IF_ERROR(CompareTensors(common));
    RETURN_IF_ERROR(CompareBlobs());
    report_.verdict = VerdictOf(report_);
    return std::move(report_);
  }

 private:
  const Index& A() const { return inputs_[0]->index; }
  const Index& B() const { return inputs_[1]->index; }
  bool GoesOn(uint64_t bytes_done) const {
    return !options_.progress || options_.progress(bytes_done, bytes_total_);
  }

  // Of the blobs that CompareBlobs compares, in both.
  uint64_t BlobBytes() const {
    uint64_t bytes = 0;
    DiffReport unused;
    using Kind = BlobDifference::Kind;
    CHECK_OK(
        AddBlobs(A(), B(), unused,
                 [&](const IndexBlob& a, const IndexBlob&) -> absl::StatusOr<std::optional<Kind>> {
                   bytes += 2 * a.bytes;
                   return std::optional<Kind>();
                 }));
    return bytes;
  }

  absl::Status CompareTensors(std::span<const CommonState> common) {
    ASSIGN_OR_RETURN(
        const DiffPlan plan,
        DiffPlan::Create(A(), B(), common, {.memory_bytes_max = options_.memory_bytes_max}));
    const uint64_t bytes = plan.schedule().bytes;
    bytes_total_ = bytes + BlobBytes();
    const auto progress = [&](uint64_t bytes_done) { return GoesOn(bytes_done); };
    ASSIGN_OR_RETURN(const std::vector<StateComparison> results,
                     CompareBytes(plan, common.size(), {readers_[0].get(), readers_[1].get()},
                                  options_.threads, progress));
    report_.bytes_read += bytes;
    size_t next = 0;
    AddStates(A(), B(), report_, [&](uint32_t i, uint32_t j, TensorDifference& difference) {
      const StateComparison& result = results[next++];
      CheckFingerprint(0, i, result.element_sum[0]);
      CheckFingerprint(1, j, result.element_sum[1]);
      if (result.differences.count == 0) return true;
      difference.kind = TensorDifference::Kind::kContents;
      difference.elements = result.differences;
      return false;
    });
    return absl::OkStatus();
  }

  void CheckFingerprint(size_t checkpoint, uint32_t number, const Fingerprint& element_sum) {
    const Index& index = inputs_[checkpoint]->index;
    const std::optional<Fingerprint>& expected = index.facts[number].fingerprint;
    if (!expected.has_value()) return;
    const TensorState& state = index.tensor_states[number];
    const Fingerprint found = FingerprintOfShape(state) + element_sum;
    ++report_.fingerprints_checked;
    if (found == *expected) return;
    ++report_.damage_count;
    if (report_.damage.size() == kFindingsMax) return;
    report_.damage.push_back(absl::StrFormat("%s: %s", inputs_[checkpoint]->directory,
                                             WrongFingerprintText(state, *expected, found)));
  }

  absl::Status CompareBlobs() {
    BlobReader a_reader(*readers_[0], A());
    BlobReader b_reader(*readers_[1], B());
    const uint64_t tensor_bytes = report_.bytes_read;
    const auto progress = [&](uint64_t bytes_compared) {
      blob_bytes_done_ += bytes_compared;
      return GoesOn(tensor_bytes + blob_bytes_done_);
    };
    using Kind = BlobDifference::Kind;
    RETURN_IF_ERROR(AddBlobs(
        A(), B(), report_,
        [&](const IndexBlob& a, const IndexBlob& b) -> absl::StatusOr<std::optional<Kind>> {
          const uint64_t before = blob_bytes_done_;
          ASSIGN_OR_RETURN(const bool equal, AreEqual(a, b, a_reader, b_reader, progress));
          // Of those that differ the rest is not read.
          blob_bytes_done_ = before + 2 * a.bytes;
          return equal ? std::nullopt : std::optional(Kind::kContents);
        }));
    report_.bytes_read += a_reader.bytes_read() + b_reader.bytes_read();
    return absl::OkStatus();
  }

  FileSystem& file_system_;
  const ReadAt& read_at_;
  const std::array<const DiffInput*, 2> inputs_;
  const Caching caching_;
  const DiffOptions& options_;
  std::array<std::unique_ptr<BlockReader>, 2> readers_;
  // For the progress.
  uint64_t bytes_total_ = 0;
  uint64_t blob_bytes_done_ = 0;
  DiffReport report_;
};

}  // namespace

DiffReport DiffFingerprints(const Index& a, const Index& b) {
  DiffReport report;
  AddStates(a, b, report, [&](uint32_t i, uint32_t j, TensorDifference& difference) {
    const std::optional<Fingerprint>& of_a = a.facts[i].fingerprint;
    const std::optional<Fingerprint>& of_b = b.facts[j].fingerprint;
    const bool known = of_a.has_value() && of_b.has_value();
    difference.kind =
        known ? TensorDifference::Kind::kContents : TensorDifference::Kind::kNotComparable;
    return known && *of_a == *of_b;
  });
  const absl::Status blobs = AddBlobs(
      a, b, report,
      [](const IndexBlob& blob,
         const IndexBlob&) -> absl::StatusOr<std::optional<BlobDifference::Kind>> {
        // Two of no bytes are equal.
        return blob.bytes == 0 ? std::nullopt : std::optional(BlobDifference::Kind::kNotCompared);
      });
  CHECK_OK(blobs);
  report.verdict = VerdictOf(report);
  return report;
}

absl::StatusOr<DiffReport> DiffBytes(FileSystem& file_system, const ReadAt& read_at,
                                     const DiffInput& a, const DiffInput& b, Caching caching,
                                     const DiffOptions& options) {
  return ByteDiff(file_system, read_at, a, b, caching, options).Run();
}

std::vector<uint64_t> CoordinatesOf(std::span<const uint64_t> shape, uint64_t element) {
  std::vector<uint64_t> coordinates(shape.size());
  for (size_t d = shape.size(); d-- > 0;) {
    coordinates[d] = element % shape[d];
    element /= shape[d];
  }
  return coordinates;
}

}  // namespace holdfast
