// Which part of a model each rank of a Megatron job has whose degrees of parallelism are chosen:
// which layers and experts, what it calls them, how they are cut, and where in the flat buffers of
// DistributedOptimizer they lie. Pure: no files. The inverse of what converter/megatron_model.h
// and converter/megatron_optimizer.h put together.
//
// Sources: megatron/core of 0.16.1: transformer/transformer_block.py (get_num_layers_to_build),
// parallel_state.py (RankGenerator: the order of ranks), optimizer/__init__.py
// (get_megatron_optimizer: experts have an optimizer of their own where they are parallel),
// distributed/distributed_data_parallel.py; Megatron-LM training/checkpointing.py.
#ifndef HOLDFAST_CONVERTER_MEGATRON_SHARES_H_
#define HOLDFAST_CONVERTER_MEGATRON_SHARES_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/megatron_buffers.h"
#include "converter/megatron_layout.h"
#include "converter/megatron_tensors.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

inline constexpr uint64_t kMegatronRanksMax = 4096;  // in all

struct MegatronDegrees {
  uint64_t tensor = 1;
  uint64_t pipeline = 1;
  uint64_t virtual_stages = 1;  // model chunks of each stage
  uint64_t expert = 1;
  std::optional<uint64_t> expert_tensor = {};  // none: `tensor`
  // Layers of the first and the last stage, all their chunks together. None: as many as the others.
  std::optional<uint64_t> first_layers = {};
  std::optional<uint64_t> last_layers = {};

  uint64_t ExpertTensor() const { return expert_tensor.value_or(tensor); }
  bool IsUneven() const { return first_layers.has_value() || last_layers.has_value(); }
};

// A rank whose state is in a file of its own. Those of other data-parallel ranks are the same.
struct MegatronJobRank {
  uint64_t stage = 0;
  uint64_t tensor = 0;
  uint64_t expert = 0;
  bool has_dense_states = true;  // of the optimizer: the first data-parallel rank writes them
};

// A parameter, or a buffer of the model, as one rank has it.
struct MegatronLocal {
  std::string name;  // as the rank's model calls it
  const MegatronWeights* weights = nullptr;
  std::vector<uint64_t> shape = {};  // of the rank's shard
  MegatronCut cut = {};
  uint64_t rank = 0;   // among those that cut it
  uint64_t ranks = 1;  // that cut it
  bool expert = false;
  bool shared_embedding = false;
  bool trained = false;

  uint64_t ElementCount() const {
    uint64_t count = 1;
    for (const uint64_t size : shape) count *= size;
    return count;
  }
};

// Where in its dtype's buffer each trained parameter lies; locals in the buffer's order.
struct MegatronLocalBuffer {
  Dtype dtype = Dtype::kFloat32;
  std::vector<const MegatronLocal*> locals;
  BufferLayout layout;
};

// Threads: any. Lifetime: index and tensors outlive it.
class MegatronShares {
 public:
  // `arguments`: those of the model, whose degrees do not count; where its pipeline is not told to
  // be uneven, what they count as layers does (account_for_embedding_in_pipeline_split). Errors:
  // kFailedPrecondition that names the degree which does not divide layers, experts or groups of
  // attention heads, or which Megatron itself does not have.
  static absl::StatusOr<MegatronShares> Create(const ForeignIndex& index,
                                               const MegatronTensors& tensors,
                                               const MegatronArguments& arguments,
                                               const MegatronDegrees& degrees);

  const MegatronDegrees& degrees() const { return degrees_; }
  // Stage by stage.
  std::vector<MegatronJobRank> Ranks() const;
  // Whether the job has two optimizers: of dense parameters, and of experts.
  bool has_expert_optimizer() const { return has_expert_optimizer_; }

  // What the model of this rank and chunk has, in its order. Errors: kFailedPrecondition (nothing
  // says how a parameter is cut; a dimension that its ranks do not divide).
  absl::StatusOr<std::vector<MegatronLocal>> LocalsOf(const MegatronJobRank& rank,
                                                      uint64_t chunk) const;
  // What that model calls a module's parameter or state; nothing if it has it not.
  std::optional<std::string> NameOn(std::string_view name, const MegatronJobRank& rank,
                                    uint64_t chunk) const;
  bool IsLast(const MegatronJobRank& rank, uint64_t chunk) const {
    return Place(rank, chunk) + 1 == PlaceCount();
  }

  // The buffers of these locals, one of each dtype, of one of the job's optimizers.
  enum class Optimizer : uint8_t { kDense, kExpert };
  absl::StatusOr<std::vector<MegatronLocalBuffer>> BuffersOf(
      const std::vector<MegatronLocal>& locals, const MegatronJobRank& rank, uint64_t chunk,
      Optimizer optimizer) const;

  // Appends the rank's elements of a tensor state of the parameter, in the order of its shard.
  void AppendRanges(const MegatronLocal& local, uint32_t tensor_state,
                    std::vector<ElementRange>& ranges) const;

 private:
  using Named = std::pair<const std::string, MegatronWeights>;

  MegatronShares(const ForeignIndex& index, const MegatronTensors& tensors,
                 const MegatronArguments& arguments, const MegatronDegrees& degrees)
      : index_(&index), tensors_(&tensors), arguments_(arguments), degrees_(degrees) {}

  absl::Status CheckDegrees() const;
  absl::Status CheckHeads() const;
  absl::Status CountLayers();
  absl::Status CountExperts();
  void SortByPlace();
  bool IsTied() const;
  // A model chunk of a stage, in the order of the model.
  uint64_t Place(const MegatronJobRank& rank, uint64_t chunk) const {
    return chunk * degrees_.pipeline + rank.stage;
  }
  uint64_t PlaceCount() const { return degrees_.pipeline * degrees_.virtual_stages; }
  uint64_t PlaceOf(std::string_view name) const;
  const TensorState& StateOf(const MegatronWeights& weights) const {
    return index_->tensor_states[weights.tensor_state];
  }
  bool IsGated(const std::string& name) const;
  absl::Status Cut(const std::string& name, const MegatronJobRank& rank,
                   MegatronLocal& local) const;
  absl::StatusOr<MegatronLocal> LocalOf(const std::string& name, std::string local_name,
                                        const MegatronWeights& weights,
                                        const MegatronJobRank& rank) const;
  BufferRule RuleOf(const MegatronJobRank& rank, uint64_t chunk, Optimizer optimizer) const;

  const ForeignIndex* index_;
  const MegatronTensors* tensors_;
  MegatronArguments arguments_;
  MegatronDegrees degrees_;
  std::vector<uint64_t> begins_;  // the first layer of each place; and the end
  std::map<std::string, uint64_t, std::less<>> experts_;  // how many, by what precedes the number
  std::vector<std::vector<const Named*>> by_place_;
  bool has_expert_optimizer_ = false;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_SHARES_H_
