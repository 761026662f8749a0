// What DeepSpeed's own files say, as our writers of them say it: the optimizer's parameters in
// their groups, the dictionaries of model-state and optimizer files. Native checkpoints
// (converter/deepspeed_writer.h) and universal folders (converter/ucp_writer.h) are made of it.
//
// Keys: DeepSpeed checkpoint/constants.py; runtime/engine.py (_common_checkpoint_state);
// runtime/zero/stage_1_and_2.py and stage3.py (state_dict).
#ifndef HOLDFAST_CONVERTER_DEEPSPEED_OUTPUT_H_
#define HOLDFAST_CONVERTER_DEEPSPEED_OUTPUT_H_

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/conversion_source.h"
#include "converter/foreign_index.h"
#include "converter/torch_output.h"

namespace holdfast::converter {

// Flags of groups.
inline constexpr char kUsesMuon[] = "use_muon";
inline constexpr char kOfExperts[] = "moe";

// A parameter of the optimizer.
struct OptimizedParameter {
  std::string name;
  std::vector<uint64_t> shape;
  uint32_t weight = 0;  // tensor state of the model's
  uint32_t master = 0;  // tensor state of its master weights: fp32, or the weights themselves
  // Further states by key, in the order of the index: those of its own shape, and single numbers.
  std::vector<std::pair<std::string, uint32_t>> states;
  std::vector<std::pair<std::string, uint32_t>> numbers;

  uint64_t ElementCount() const;
  std::optional<uint32_t> Find(std::string_view key) const;
};

struct OptimizedGroup {
  std::vector<OptimizedParameter> parameters;
  nlohmann::ordered_json values;  // lr, betas, ...

  bool Has(const char* flag) const;  // "use_muon": it is there, and true
};

class DeepSpeedRanks;

// Threads: one. Lifetime: the index outlives it.
class DeepSpeedOutput {
 public:
  // Flat buffers have no place for parameters without elements: kFlat leaves their states out, as
  // DeepSpeed does, and LeftOut says so.
  enum class Buffers { kFlat, kNone };
  // Errors: kFailedPrecondition that names what DeepSpeed's files have no place for: a state of
  // another shape than its parameter's, masters that are no float32, groups that are not told, two
  // weights of one name.
  static absl::StatusOr<DeepSpeedOutput> Create(const ForeignIndex& index, Buffers buffers);

  const ForeignIndex& index() const { return index_; }
  const std::vector<OptimizedGroup>& groups() const { return groups_; }
  // The model's tensors (numbers of tensor states), in the order of the index.
  const std::vector<uint32_t>& weights() const { return weights_; }
  // The weight that this one is tied to and alike; else itself.
  uint32_t OwnerOf(uint32_t weight) const;
  bool IsBuffer(uint32_t weight) const;  // no parameter
  bool IsExpert(uint32_t weight) const;  // of DeepSpeed's, which have files of their own
  bool IsTrained(std::string_view tensor) const { return optimized_.contains(tensor); }
  // The dtype of the model's weights: of most of them.
  Dtype weight_dtype() const { return weight_dtype_; }
  // Of ds_config.
  bool round_robin() const;
  bool data_before_experts() const;
  uint64_t sub_group_elements() const;
  // Of every layer with experts, as the source said (`num_experts`); empty: it did not.
  std::vector<uint64_t> expert_counts() const;

  std::string version() const;  // DeepSpeed's, that the files say they are of

  // kFailedPrecondition if the parameter's weights are not its masters, rounded. Reads both.
  absl::Status CheckWeightIsMaster(ConversionSource& source,
                                   const OptimizedParameter& parameter) const;

  // What is not in the files, in words.
  std::vector<std::string> LeftOut() const;
  // Tensor states that are in the files.
  uint64_t tensor_count() const { return tensor_count_; }

  // Pushes the dict of a model-state file. `flat`: names and shapes of every flat buffer, in its
  // order (param_shapes).
  struct FlatParameter {
    std::string name;  // of an expert: as its rank calls it
    const OptimizedParameter* parameter = nullptr;
  };
  using FlatNames = std::vector<std::vector<FlatParameter>>;
  struct ModelFile {
    const DeepSpeedRanks& ranks;
    uint64_t stage = 1;  // of ZeRO
    uint64_t dp = 1;
    uint64_t rank = 0;  // data-parallel; of stage 3
    bool universal = false;
    uint64_t tensor_rank = 0;
    uint64_t pipeline_stage = 0;
    std::vector<uint64_t> expert_counts = {};      // of every layer with experts
    std::vector<std::string> expert_buffers = {};  // as their rank calls them
  };
  void PushModel(TorchDraft& draft, const ModelFile& file, const FlatNames& flat) const;
  // Pushes keys and values that every optimizer file has: loss scaler, clipping, stage.
  void PushOptimizerFacts(TorchDraft& draft, uint64_t stage) const;
  // Pushes a key and the list of the groups with these numbers of flat buffers.
  void PushParamGroups(TorchDraft& draft, const std::vector<std::vector<uint64_t>>& numbers,
                       uint64_t expert_ranks = 1) const;
  // ds_config and ds_version.
  void PushConfiguration(TorchDraft& draft, uint64_t stage) const;

 private:
  DeepSpeedOutput(const ForeignIndex& index, Buffers buffers) : index_(index), buffers_(buffers) {}

  absl::Status CollectWeights();
  absl::Status CollectGroups();
  absl::StatusOr<OptimizedParameter> Parameter(const std::string& name,
                                               const std::vector<uint32_t>& states) const;
  const Fact* FindFact(std::string_view name) const;
  nlohmann::ordered_json FactOr(std::string_view name, nlohmann::ordered_json otherwise) const;
  nlohmann::ordered_json Configuration(uint64_t stage) const;
  void PushWeights(TorchDraft& draft, const ModelFile& file) const;
  void PushFrozen(TorchDraft& draft, const ModelFile& file) const;

  const ForeignIndex& index_;
  const Buffers buffers_;
  std::vector<OptimizedGroup> groups_;
  std::vector<std::string> without_elements_;  // parameters whose states are left out
  std::vector<uint32_t> weights_;              // tensor states, in the order of the index
  std::unordered_map<std::string_view, uint32_t> weight_of_;
  std::unordered_map<uint32_t, uint32_t> owners_;  // by alias
  std::unordered_map<std::string_view, bool> optimized_;
  Dtype weight_dtype_ = Dtype::kFloat32;
  uint64_t tensor_count_ = 0;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DEEPSPEED_OUTPUT_H_
