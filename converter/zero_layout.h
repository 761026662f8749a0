// Where DeepSpeed's ZeRO puts the elements of parameters in the flat buffers of its ranks: the
// arithmetic of stages 1, 2 and 3, of Muon's momentum and of round-robin order, from what the files
// say of groups and sizes. Pure: no files, no names. All sizes are elements.
//
// Rules: DeepSpeed runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py. A flat buffer that
// does not add up is an error, never a guess.
#ifndef HOLDFAST_CONVERTER_ZERO_LAYOUT_H_
#define HOLDFAST_CONVERTER_ZERO_LAYOUT_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast::converter {

inline constexpr uint32_t kZeroRanksMax = 1u << 20;

// A range of one parameter in the flat buffer of one rank.
struct FlatRun {
  uint32_t parameter = 0;        // index
  uint64_t parameter_begin = 0;  // first element, of the parameter in row-major order
  uint64_t buffer_begin = 0;     // where it lies in the buffer
  uint64_t count = 0;            // > 0
};

// Stages 1 and 2: the parameters of a group one behind the other, cut in equal partitions.
class PackedGroup {
 public:
  // paddings: elements behind each parameter (`param_alignment_paddings`), or empty.
  // Errors: kInvalidArgument (another number of paddings; more elements than fit).
  static absl::StatusOr<PackedGroup> Create(std::vector<uint64_t> parameter_elements,
                                            std::span<const uint64_t> paddings);
  // The same from where each parameter begins, in any order, as storage offsets tell it.
  // kInvalidArgument if two overlap.
  static absl::StatusOr<PackedGroup> AtOffsets(std::vector<uint64_t> parameter_elements,
                                               std::vector<uint64_t> offsets);

  // Without the padding behind the last parameter.
  uint64_t elements() const { return elements_; }
  std::span<const uint64_t> offsets() const { return offsets_; }

  // The size of every partition, from how many elements each rank has stored: those of a whole
  // partition, or without the padding at the end of the buffer. kDataLoss if no size fits.
  absl::StatusOr<uint64_t> PartitionElements(std::span<const uint64_t> stored_by_rank) const;

  // What `rank` of partitions of this size holds, in the order of its buffer.
  std::vector<FlatRun> Partition(uint32_t rank, uint64_t partition_elements) const;
  // Muon: every parameter that touches the partition, whole, one behind the other.
  std::vector<FlatRun> WholeParameters(uint32_t rank, uint64_t partition_elements) const;

 private:
  std::vector<uint64_t> sizes_;
  std::vector<uint64_t> offsets_;
  std::vector<uint32_t> order_;  // parameters by offset, those without elements left out
  uint64_t elements_ = 0;
};

// Stage 3: of every parameter ceil(elements / ranks) on each rank, one behind the other.
class PartitionedParameters {
 public:
  // kInvalidArgument: ranks is 0 or beyond kZeroRanksMax; more elements than fit.
  static absl::StatusOr<PartitionedParameters> Create(std::vector<uint64_t> parameter_elements,
                                                      uint32_t ranks);

  uint64_t elements_per_rank() const { return elements_per_rank_; }
  // Where each parameter begins in the buffer of every rank.
  std::span<const uint64_t> offsets() const { return offsets_; }
  // The real elements of `rank`; the rest of its buffer is padding.
  std::vector<FlatRun> Partition(uint32_t rank) const;

 private:
  std::vector<uint64_t> sizes_;
  std::vector<uint64_t> offsets_;
  uint64_t elements_per_rank_ = 0;
  uint32_t ranks_ = 1;
};

// Stage 3's buffer is stored in several tensors (sub-groups), which may cut a parameter: a run of
// the concatenated buffer as runs of its parts. CHECKs that they lie inside.
struct PartRun {
  uint32_t part = 0;
  FlatRun run;  // buffer_begin: in that part
};
std::vector<PartRun> SplitAtParts(std::span<const FlatRun> runs,
                                  std::span<const uint64_t> part_elements);

// `round_robin_gradients`: of `count` parameters in model order, which stands where in the flat
// buffer: result[i] is the parameter at place i. (stage_1_and_2.py, _round_robin_reorder.)
std::vector<uint32_t> RoundRobinOrder(uint32_t count, uint32_t ranks);

// A job's ranks, as far as experts are concerned: data-parallel ranks, some of which have the same
// experts (DeepSpeed utils/groups.py, _create_expert_and_data_parallel).
struct ExpertGrid {
  uint64_t data_ranks = 1;
  uint64_t expert_ranks = 1;  // a divisor of data_ranks
  bool data_first = false;    // `use_data_before_expert_parallelism`

  uint64_t Partitions() const { return data_ranks / expert_ranks; }  // of experts' flat buffers
  uint64_t ExpertRank(uint64_t data_rank) const {
    return data_first ? data_rank / Partitions() : data_rank % expert_ranks;
  }
  uint64_t Partition(uint64_t data_rank) const {
    return data_first ? data_rank % Partitions() : data_rank / expert_ranks;
  }
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_ZERO_LAYOUT_H_
