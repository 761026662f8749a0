// DeepSpeed's own mixture of experts (`deepspeed_experts.<n>` in the names) in what is written:
// which expert-parallel rank has which experts, what it calls them, and the files that they have of
// their own, one for each expert:
//
//   <tag>/layer_<l>_expert_<n>_mp_rank_00_model_states.pt    l counts the layers with experts
//
// Files number experts globally; flat buffers, and whatever says what is in them, per rank.
//
// Sources: DeepSpeed runtime/engine.py (_save_moe_checkpoint), utils/groups.py
// (_create_expert_and_data_parallel), moe/utils.py.
#ifndef HOLDFAST_CONVERTER_DEEPSPEED_EXPERTS_H_
#define HOLDFAST_CONVERTER_DEEPSPEED_EXPERTS_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/deepspeed_output.h"
#include "converter/zero_layout.h"

namespace holdfast::converter {

// Threads: one. Lifetime: the output outlives it.
class DeepSpeedExperts {
 public:
  // Errors: kFailedPrecondition that names what does not fit: numbers of experts that the ranks do
  // not divide, or with gaps; experts that are not trained, or not in groups of their own (`moe`);
  // experts where there are none (expert_ranks above 1); layers of different numbers of experts
  // whose order nobody tells.
  static absl::StatusOr<DeepSpeedExperts> Create(const DeepSpeedOutput& output,
                                                 const ExpertGrid& grid);

  // By layer and expert, its tensors of the model.
  using Layer = std::vector<std::vector<uint32_t>>;
  std::span<const Layer> layers() const { return layers_; }
  const ExpertGrid& grid() const { return grid_; }

  // The parameters of the group that an expert-parallel rank has: of experts its share.
  std::vector<const OptimizedParameter*> OfRank(const OptimizedGroup& group,
                                                uint64_t expert_rank) const;
  // What the rank that has it calls it.
  std::string LocalName(const std::string& name) const;
  // Names that are no parameters, as the rank calls them.
  std::vector<std::string> BuffersOfRank(uint64_t expert_rank) const;
  // `num_experts`
  std::vector<uint64_t> Counts() const;

 private:
  DeepSpeedExperts(const DeepSpeedOutput& output, const ExpertGrid& grid)
      : output_(output), grid_(grid) {}
  absl::Status Collect();
  absl::Status OrderLayers();
  absl::Status CheckGroups() const;

  const DeepSpeedOutput& output_;
  ExpertGrid grid_;
  std::vector<Layer> layers_;
  std::unordered_map<std::string, size_t> layer_of_;  // by prefix
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DEEPSPEED_EXPERTS_H_
