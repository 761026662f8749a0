// Which file of a DeepSpeed checkpoint is what, from the names alone: the tag that counts, the grid
// of data-parallel and model-parallel ranks, pipeline layers, experts.
//
// Names: DeepSpeed runtime/engine.py (_get_ckpt_name, _get_zero_ckpt_name, _get_expert_ckpt_name),
// runtime/pipe/module.py (ckpt_layer_path), checkpoint/ds_to_universal.py.
#ifndef HOLDFAST_CONVERTER_DEEPSPEED_FILES_H_
#define HOLDFAST_CONVERTER_DEEPSPEED_FILES_H_

#include <compare>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"

namespace holdfast::converter {

// Numbers of files (of a ForeignFolder) by rank.
struct RankKey {
  uint32_t mp = 0;  // model parallel: pipeline stage * tensor-parallel ranks + tensor-parallel rank
  uint32_t dp = 0;
  friend auto operator<=>(const RankKey&, const RankKey&) = default;
};
struct LayerKey {
  uint32_t layer = 0;
  uint32_t tp = 0;
  friend auto operator<=>(const LayerKey&, const LayerKey&) = default;
};
struct ExpertKey {
  uint32_t layer = 0;   // counts the MoE layers
  uint32_t expert = 0;  // global
  uint32_t mp = 0;
  friend auto operator<=>(const ExpertKey&, const ExpertKey&) = default;
};

struct DeepSpeedFileName {
  enum class Role : uint8_t {
    kModel,             // mp_rank_00_model_states.pt
    kPartitionedModel,  // zero_pp_rank_0_mp_rank_00_model_states.pt
    kOptimizer,         // bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt
    kLayer,             // layer_00-model_00-model_states.pt
    kExpert,            // layer_0_expert_0_mp_rank_00_model_states.pt
    kExpertOptimizer,   // expp_rank_0_mp_rank_00_optim_states.pt
  };
  Role role = Role::kModel;
  uint32_t dp = 0;
  uint32_t mp = 0;  // of a layer its tensor-parallel rank
  uint32_t layer = 0;
  uint32_t expert = 0;
};
// Nothing for a name that is none of these.
std::optional<DeepSpeedFileName> ParseDeepSpeedFileName(std::string_view name);

struct DeepSpeedFiles {
  std::string directory;                // relative to the folder; "": the folder itself
  std::string tag;                      // its last component; empty: unknown
  bool universal = false;               // a universal folder: states are in zero/
  std::map<uint32_t, uint32_t> models;  // by mp
  std::map<RankKey, uint32_t> partitioned_models;
  std::map<RankKey, uint32_t> optimizers;
  std::map<LayerKey, uint32_t> layers;
  std::map<ExpertKey, uint32_t> experts;
  // Of an optimizer without ZeRO, by mp and expert-parallel rank (`dp`): no reader knows them.
  std::map<RankKey, uint32_t> expert_optimizers;

  // Ranks 0..n-1 of a map's keys, all of them there; kDataLoss names the first that is missing.
  static absl::StatusOr<RankKey> Counts(const std::map<RankKey, uint32_t>& files,
                                        std::string_view what);
};

// Whether the folder holds a DeepSpeed checkpoint, in itself or under a tag.
bool HoldsDeepSpeed(const ForeignFolder& folder);
// Whether the checkpoint that would be read without a tag is a universal folder.
bool HoldsUniversal(const ForeignFolder& folder);

// The files of `tag`; without one: of the folder itself, of what `latest` (then `latest_universal`)
// names, of the only tag, or of the one with the greatest number at its end. Errors: kNotFound (no
// such tag; the text lists those there are), kDataLoss (`latest` names none).
absl::StatusOr<DeepSpeedFiles> FindDeepSpeedFiles(const ForeignFolder& folder,
                                                  const std::string& tag);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DEEPSPEED_FILES_H_
