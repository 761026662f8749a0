// The optimizer of a legacy Megatron checkpoint, in both of its forms: a torch optimizer's state
// dict with fp32 masters beside it, numbered (`model_optim_rng.pt`), and the flat buffers of
// DistributedOptimizer (`distrib_optim.pt`). Neither names parameters; both are put together by
// Megatron's rules and proven against the weights: sizes add up, and masters, rounded, are the
// weights. What cannot be proven is `unreadable`, by name, and the weights are read without it.
//
// Sources: megatron/core/optimizer/optimizer.py (Float16OptimizerWithFloat16Params, FP32Optimizer,
// ChainedOptimizer), optimizer/__init__.py (_get_param_groups), distrib_optimizer.py
// (get_parameter_state_dp_zero).
#ifndef HOLDFAST_CONVERTER_MEGATRON_OPTIMIZER_H_
#define HOLDFAST_CONVERTER_MEGATRON_OPTIMIZER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "converter/foreign_folder.h"
#include "converter/megatron_buffers.h"
#include "converter/megatron_model.h"
#include "converter/piece_table.h"

namespace holdfast::converter {

// The parts of an `optimizer` entry: itself, or those of a ChainedOptimizer (a list, or a dict with
// the keys 0, 1, ...). Absent ones are None in the file.
std::vector<TorchValue> MegatronOptimizers(const TorchValue& optimizer);
// What has `param_groups` (and `state`): the entry itself or its `optimizer`. Absent if neither.
TorchValue MegatronInnerOptimizer(const TorchValue& optimizer);
// The steps that param_groups or common_step say, of groups of experts or of the others; nothing
// if none is said, or if they differ.
std::optional<StoredTensor> MegatronStep(const TorchFile& torch, uint32_t file,
                                         const TorchValue& inner);
// Whether a group says that its parameters are experts.
bool HasExpertGroup(const TorchValue& inner);

// Threads: one. Lifetime: all arguments outlive it.
class MegatronOptimizer {
 public:
  // `parameter_names`: those of the optimizer's parameters in its order (--names), or none.
  MegatronOptimizer(const ForeignFolder& folder, MegatronModel& model,
                    const std::vector<std::string>& parameter_names, PieceTable& table)
      : folder_(folder), model_(model), names_(parameter_names), table_(table) {}

  // Finds which numbered state is of which parameter, and tells the model what masters say of
  // their cuts. Before MegatronModel::AddWeights.
  absl::Status FindStates();
  // Adds states `fp32`, `step` and those of the optimizer by their own keys. After it.
  absl::Status AddStates();

 private:
  // A parameter's state in a state dict.
  struct Found {
    const MegatronRank* rank;
    const MegatronTensor* parameter;
    TorchValue state;   // a dict
    TorchValue master;  // absent: the parameter is its own
  };
  // A buffer of parameters: views of one storage.
  struct Buffer {
    bool expert = false;
    uint64_t elements = 0;                               // of the storage
    std::vector<const MegatronTensor*> parameters = {};  // by their place in it
    bool used = false;
  };

  absl::Status FindNumbered(const MegatronRank& rank, const TorchValue& optimizer,
                            bool has_experts);
  absl::StatusOr<bool> Fits(const MegatronTensor& parameter, const TorchValue& state,
                            const TorchValue& master) const;
  absl::Status AddFound(const Found& found);
  absl::Status AddDistributed(const MegatronRank& rank);
  absl::Status AddBuffer(const MegatronRank& rank, const TorchFile& torch, uint32_t file,
                         const TorchValue& entry, const std::optional<StoredTensor>& step,
                         std::vector<Buffer>& buffers);
  std::vector<Buffer> BuffersOf(const MegatronRank& rank) const;
  std::optional<BufferLayout> LayoutOf(const Buffer& buffer, const MegatronRank& rank,
                                       uint64_t elements) const;
  absl::Status AddState(const MegatronTensor& parameter, const MegatronRank& rank,
                        const std::string& state, const StoredTensor& stored);
  void Unreadable(const MegatronRank& rank, const std::string& what, const absl::Status& why);

  const ForeignFolder& folder_;
  MegatronModel& model_;
  const std::vector<std::string>& names_;
  PieceTable& table_;
  std::vector<Found> found_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_OPTIMIZER_H_
