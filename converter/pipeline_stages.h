// Which layers of a DeepSpeed pipeline stand on which of its stages, and what its parameters are
// called. Pure: names and numbers.
//
// Sources: DeepSpeed runtime/pipe/module.py (_partition_layers, _build); runtime/utils.py
// (partition_uniform, partition_balanced).
#ifndef HOLDFAST_CONVERTER_PIPELINE_STAGES_H_
#define HOLDFAST_CONVERTER_PIPELINE_STAGES_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace holdfast::converter {

inline constexpr uint64_t kPipelineLayersMax = 10'000;
// What the names of tied modules' parameters begin with, before the key.
inline constexpr char kTiedModules[] = "tied_modules.";

// "4.norm.weight", "tied_modules.embed.weight".
struct PipelineName {
  std::optional<uint64_t> layer;  // below kPipelineLayersMax; none: it is tied
  std::string_view tied;          // the key of the tied module
  std::string_view rest;          // "norm.weight", "weight": its name in the layer's file
};
std::optional<PipelineName> ParsePipelineName(std::string_view name);

// PipelineModule's partition_method "parameters", which is its default: the first layer of each of
// `stages` stages. weights: trained elements of each layer, those that are tied at each use.
// kResourceExhausted where the search would take more than some seconds.
absl::StatusOr<std::vector<uint64_t>> BalancedStages(std::span<const uint64_t> weights,
                                                     uint64_t stages);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_PIPELINE_STAGES_H_
