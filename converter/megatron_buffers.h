// Where Megatron's DistributedOptimizer has the elements of parameters: its buffers hold the
// parameters of a model chunk in reverse order, aligned, in buckets whose ends are padded. And
// what of a flat range is stored where, so that it can be compared and handed on.
//
// Rule: megatron/core/distributed/param_and_grad_buffer.py (0.16), optimizer/param_layout.py. All
// sizes are elements. What does not add up is an error, never a guess.
#ifndef HOLDFAST_CONVERTER_MEGATRON_BUFFERS_H_
#define HOLDFAST_CONVERTER_MEGATRON_BUFFERS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/piece_table.h"

namespace holdfast::converter {

struct BufferParameter {
  uint64_t elements = 0;
  bool shared_embedding = false;  // always alone in its bucket
};

struct BufferRule {
  std::optional<uint64_t> bucket_elements = {};  // a bucket is closed once it has as many
  uint64_t end_multiple = 128;                   // of the end of a bucket
};
// lcm(data_ranks, 128), or with wide padding lcm(data_ranks, 128, 65536); 0 if that overflows.
uint64_t BucketEndMultiple(uint64_t data_ranks, bool wide_padding);

// Where a parameter may begin that follows what ends at `end` (< 2^62).
uint64_t BufferStart(uint64_t end);

struct BufferLayout {
  struct Bucket {
    uint64_t begin = 0;     // in the padded buffer
    uint64_t elements = 0;  // without the padding at its end
    uint64_t padded = 0;
  };
  std::vector<uint64_t> begins;    // of each parameter, in the padded buffer
  std::vector<uint64_t> paddings;  // of each parameter: of all buckets before its own
  std::vector<uint32_t> bucket_of;
  std::vector<Bucket> buckets;

  uint64_t padded_elements() const;
  uint64_t elements() const;  // without the padding at the ends of buckets
};

// Parameters in the order of the buffer (the reverse of the model's).
// Errors: kInvalidArgument (more elements than fit; end_multiple is 0).
absl::StatusOr<BufferLayout> LayOutBuffer(std::span<const BufferParameter> parameters,
                                          const BufferRule& rule);

// The same where the buckets are known: each parameter in the first bucket into which it fits.
// Errors: kDataLoss (a bucket is not full at its end; parameters are left over), with both numbers.
absl::StatusOr<BufferLayout> FitBuffer(std::span<const BufferParameter> parameters,
                                       std::span<const uint64_t> bucket_elements,
                                       std::span<const uint64_t> bucket_padded);

// Parts of a flat range, as they are stored.
//
// Threads: one. Lifetime: owns its parts.
class FlatParts {
 public:
  // Elements [stored_begin, stored_begin + count) of `stored` (contiguous) are elements
  // [begin, begin + count).
  void Add(uint64_t begin, const StoredTensor& stored, uint64_t stored_begin, uint64_t count);
  bool empty() const { return parts_.empty(); }
  // Of any part; not empty().
  Dtype dtype() const { return stored_.front().dtype; }

  struct Run {
    uint64_t begin = 0;  // in the flat range
    uint64_t count = 0;
    const StoredTensor* stored = nullptr;
    uint64_t stored_begin = 0;
  };
  // What is stored of [begin, end), ascending and disjoint. Of parts that overlap the first in the
  // order of their beginnings counts.
  std::vector<Run> Find(uint64_t begin, uint64_t end) const;
  uint64_t CountIn(uint64_t begin, uint64_t end) const;

 private:
  struct Part {
    uint64_t begin = 0;
    uint64_t end = 0;
    size_t stored = 0;  // index into stored_
    uint64_t stored_begin = 0;
  };
  void Sort() const;

  std::vector<StoredTensor> stored_;
  mutable std::vector<Part> parts_;
  mutable bool sorted_ = true;
};

// Adds what `parts` have of [begin, begin + count) as elements [0, count) of the shard: the number
// of elements that they have.
absl::StatusOr<uint64_t> AddFlatParts(const FlatParts& parts, uint64_t begin, uint64_t count,
                                      const ShardMap& shard, uint32_t tensor_state,
                                      PieceTable& table);

// Whether the master weights at [master_begin, + count), rounded, are the weights at
// [weight_begin, + count), or those before they were cast to another of the dtypes that weights
// have (bfloat16, float16, float32: --dtype of a conversion). Of many elements only the first,
// middle and last 512 are looked at. kUnknown: not stored, or of dtypes that are not rounded into
// each other.
enum class MasterMatch : uint8_t { kEqual, kDifferent, kUnknown };
absl::StatusOr<MasterMatch> CompareMaster(const ForeignFolder& folder, const FlatParts& masters,
                                          uint64_t master_begin, const FlatParts& weights,
                                          uint64_t weight_begin, uint64_t count);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_BUFFERS_H_
