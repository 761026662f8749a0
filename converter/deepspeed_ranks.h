// Which model-parallel rank of a DeepSpeed job holds what of a model that is written for it: the
// shard of every tensor on a tensor-parallel rank, the layers of a pipeline stage and what their
// files are called. Where nobody says how a parameter is cut, or which layers a tied module has,
// the conversion is refused by its name.
//
// Tensor parallelism is cut by what the source said of itself (converter/parallel_facts.h), else by
// a preset; a layout file comes before both (converter/parallel_rules.h).
// Pipelines are PipelineModule's: layers are numbered through all stages, and a stage is a run of
// them (converter/pipeline_stages.h): those that the layout file says; those of the source, where
// it had as many stages; else DeepSpeed's default.
#ifndef HOLDFAST_CONVERTER_DEEPSPEED_RANKS_H_
#define HOLDFAST_CONVERTER_DEEPSPEED_RANKS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/deepspeed_output.h"
#include "converter/layout_file.h"
#include "converter/parallel_facts.h"
#include "converter/parallel_rules.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

// What the target is, and what the user says of it.
struct DeepSpeedDegrees {
  // Neither: every rank has the whole model, and files say nothing of parallelism. One: the other
  // is 1. A pipeline's weights are in layer files, also of one stage.
  std::optional<uint64_t> tensor = {};
  std::optional<uint64_t> pipeline = {};
  std::string preset = {};  // ReadOptions::preset
  std::string layout = {};  // contents of a layout file
};

// Threads: one. Lifetime: the output outlives it.
class DeepSpeedRanks {
 public:
  // One rank that has everything.
  static DeepSpeedRanks Whole(const DeepSpeedOutput& output) { return DeepSpeedRanks(output); }
  // Errors: kFailedPrecondition that names a parameter or a module; kInvalidArgument,
  // kUnimplemented (preset, layout file); those of ParallelRules.
  static absl::StatusOr<DeepSpeedRanks> Create(const DeepSpeedOutput& output,
                                               const DeepSpeedDegrees& degrees);

  uint64_t tensor_ranks() const { return tensor_ranks_; }
  uint64_t stages() const { return stages_; }
  bool has_layer_files() const { return pipeline_; }
  bool says_info() const { return says_info_; }  // universal_checkpoint_info is in the files

  // `weight`: the number of a tensor of the model. Whether the stage has it.
  bool Has(uint32_t weight, uint64_t stage) const;
  // The shape of its shard, the same on every tensor-parallel rank.
  const std::vector<uint64_t>& ShapeOf(uint32_t weight) const;
  uint64_t ElementCount(uint32_t weight) const;
  // Appends elements [begin, end) of its shard: of `tensor_state`, which has the weight's shape.
  void Append(uint32_t weight, uint32_t tensor_state, uint64_t tensor_rank, uint64_t begin,
              uint64_t end, std::vector<ElementRange>& ranges) const;
  // Pushes the shard; what is tied to another weight is a view of its storage. `storages`: of one
  // file, empty before its first one.
  using Storages = std::map<uint32_t, uint32_t>;
  void Push(uint32_t weight, uint64_t tensor_rank, TorchDraft& draft, Storages& storages) const;

  struct Layer {
    uint64_t number = 0;
    std::vector<std::pair<std::string, uint32_t>> weights;  // names in the layer, in model order
  };
  std::span<const Layer> layers() const { return layers_; }

  // Pushes the value of universal_checkpoint_info, of exact names.
  void PushInfo(TorchDraft& draft) const;

 private:
  explicit DeepSpeedRanks(const DeepSpeedOutput& output) : output_(output) {}

  absl::Status CutAll(ParallelInfo info);
  absl::Status PlaceLayers(const LayoutFile& layout);
  absl::StatusOr<std::vector<uint64_t>> FirstLayers(const LayoutFile& layout,
                                                    const PipelineFacts& facts) const;
  absl::Status CheckStages() const;
  const ParameterCut* CutOf(uint32_t weight) const;

  const DeepSpeedOutput& output_;
  uint64_t tensor_ranks_ = 1;
  uint64_t stages_ = 1;
  bool pipeline_ = false;
  bool says_info_ = false;
  std::unordered_map<uint32_t, ParameterCut> cuts_;  // by the owner's number; not of what is whole
  std::optional<uint64_t> vocabulary_rows_;
  uint64_t padded_rows_ = 0;
  std::unordered_map<uint32_t, std::vector<uint64_t>> stages_of_;  // of a pipeline, by weight
  std::vector<Layer> layers_;
  std::vector<std::string> replicated_keys_;  // of tied modules on several stages
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DEEPSPEED_RANKS_H_
