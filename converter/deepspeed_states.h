// What the files of a DeepSpeed checkpoint say, one by one, as plain data: `*_model_states.pt`
// (weights, names and shapes in flat order, buffers, what is frozen or tied, the training's
// counters) and `*_optim_states.pt` (flat partitions and the optimizer's states). How they fit
// together is converter/deepspeed_reader.cc.
//
// Keys: DeepSpeed checkpoint/constants.py; runtime/engine.py (_save_checkpoint);
// runtime/zero/stage_1_and_2.py and stage3.py (state_dict).
#ifndef HOLDFAST_CONVERTER_DEEPSPEED_STATES_H_
#define HOLDFAST_CONVERTER_DEEPSPEED_STATES_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/parallel_rules.h"
#include "converter/piece_table.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

// Opens a torch file of the folder; what it warns of, and its opaque classes, go into the table.
absl::StatusOr<std::unique_ptr<TorchFile>> OpenTorch(const ForeignFolder& folder, uint32_t file,
                                                     PieceTable& table);
// Where a tensor of this file lies. kUnimplemented: a dtype or form that a tensor state has not.
absl::StatusOr<StoredTensor> Locate(const TorchFile& torch, uint32_t file,
                                    const TorchTensor& tensor);

struct NamedTensor {
  std::string name;
  StoredTensor tensor;
};
struct NamedShape {
  std::string name;
  Shape shape;
};

struct ModelStates {
  bool has_module = false;     // false: None, the weights are in layer files
  bool has_optimizer = false;  // without ZeRO its state is here
  std::vector<NamedTensor> module;
  std::vector<std::string> buffer_names;
  std::vector<std::vector<NamedShape>> param_shapes;  // of each group (ZeRO-3: or sub-group)
  std::vector<NamedShape> frozen_shapes;
  std::vector<NamedTensor> frozen_fragments;
  std::vector<std::pair<std::string, std::string>> shared;  // alias, owner
  uint64_t dp_world_size = 0;                               // 0: not said
  uint64_t mp_world_size = 0;
  std::optional<std::pair<uint64_t, uint64_t>> parallel_degrees;  // pipeline, tensor
  std::optional<uint64_t> global_steps;
  std::vector<uint64_t>
      expert_counts;  // `num_experts`, of every layer with experts; empty: not said
  // Of ds_config, where it says so.
  std::string weight_dtype;  // "bfloat16", "float16", "float32"; empty: not said
  bool round_robin = false;
  bool data_before_expert_parallel = false;
  std::optional<ParallelInfo> parallel;
};

// `facts`: whether counters, client state and configuration are put into the table's index (of one
// of the files; the others have the same).
enum class ShowFacts : uint8_t { kNo, kYes };
absl::StatusOr<ModelStates> ReadModelStates(const ForeignFolder& folder, uint32_t file,
                                            ShowFacts facts, PieceTable& table);

// A layer or expert file: a state_dict. Its tensors, by their names in the file.
absl::StatusOr<std::vector<NamedTensor>> ReadStateDict(const ForeignFolder& folder, uint32_t file,
                                                       PieceTable& table);

// A state of the optimizer, of one flat partition: a tensor, or a Python number as one.
struct OptimizerState {
  std::string key;
  StoredTensor tensor;
};

struct OptimizerStates {
  uint64_t stage = 1;
  // Stages 1 and 2: of each group. Stage 3: of each sub-group.
  struct Group {
    StoredTensor fp32;
    std::vector<OptimizerState> states;
    uint64_t padding = 0;                      // at the end of this rank's partition
    std::vector<uint64_t> alignment_paddings;  // empty: none
    std::optional<uint64_t> partition_count;
    std::vector<std::string> mapped;  // names of param_slice_mappings, in its order
    bool has_mappings = false;
    bool expert = false;  // `moe`
    bool muon = false;    // `use_muon`
  };
  std::vector<Group> groups;
  std::optional<uint64_t> partition_count;  // stage 3
  bool partition_groups = false;            // stage 3 with AutoEP: ds_zero_partition_groups
  std::optional<ParallelInfo> parallel;
};

absl::StatusOr<OptimizerStates> ReadOptimizerStates(const ForeignFolder& folder, uint32_t file,
                                                    ShowFacts facts, PieceTable& table);

// A value as a tensor, if it is one or a Python number (as torch.tensor would make it).
absl::StatusOr<std::optional<StoredTensor>> StateTensor(const TorchFile& torch, uint32_t file,
                                                        const TorchValue& value);

// A universal folder's optimizer_state.pt: rank 0's dict. Of stages 1 and 2 without the flat
// buffers; of ZeRO-3 with them, 1/dp of the whole.
struct UniversalOptimizer {
  std::vector<OptimizerStates::Group> groups;  // of ZeRO-3
  std::optional<uint64_t> partition_count;     // of ZeRO-3
  std::vector<uint64_t> group_partition_counts;
  std::vector<std::vector<uint64_t>> group_alignment_paddings;
};
absl::StatusOr<UniversalOptimizer> ReadUniversalOptimizer(const ForeignFolder& folder,
                                                          uint32_t file, PieceTable& table);

// `universal_checkpoint_info`. kInvalidArgument, kUnimplemented (a scale, a newer affine map).
absl::StatusOr<ParallelInfo> ReadParallelInfo(const TorchValue& info);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DEEPSPEED_STATES_H_
