// What Megatron-LM's names and arguments mean: how a parameter is cut by tensor parallelism, in
// which order a model has its parameters, which stage has which layers, and how the keys of a
// torch_dist checkpoint stand for the names of modules. Pure: no files.
//
// Rules of megatron-core: tensor_parallel/layers.py (column and row parallel), transformer/mlp.py
// (gated units), transformer/attention.py, transformer/moe/, models/gpt/gpt_model.py,
// models/gpt/gpt_layer_specs.py (sharded_state_dict_keys_map), transformer/transformer_block.py
// (layers of a stage).
#ifndef HOLDFAST_CONVERTER_MEGATRON_LAYOUT_H_
#define HOLDFAST_CONVERTER_MEGATRON_LAYOUT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/megatron_buffers.h"
#include "converter/shard_map.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

// The part of `args` (argparse.Namespace) that says how tensors are laid out. Of a checkpoint
// without them all is as it is by default.
struct MegatronArguments {
  bool present = false;
  uint64_t tensor_ranks = 1;
  uint64_t pipeline_ranks = 1;
  uint64_t virtual_stages = 1;  // model chunks per pipeline rank
  uint64_t expert_ranks = 1;
  uint64_t expert_tensor_ranks = 1;
  uint64_t data_ranks = 1;  // over which a dense buffer is cut: context parallel ranks included
  uint64_t expert_data_ranks = 1;
  std::optional<uint64_t> layers = {};
  std::optional<uint64_t> query_groups = {};  // of attention heads; as many as heads without groups
  std::optional<bool> gated = {};             // SwiGLU and its relatives
  std::optional<bool> tied = {};              // one embedding at both ends
  bool local_modules = false;                 // Megatron's own layers, not TransformerEngine's
  bool grouped_experts = false;               // one module for all experts (grouped GEMM)
  bool distributed_optimizer = false;
  // Of the buffers of DistributedDataParallel.
  std::optional<uint64_t> bucket_elements = {};  // none: its default
  bool overlap_reduce = false;                   // else there is one bucket per buffer
  bool one_bucket = false;                       // bucketing is off for another reason
  bool wide_padding = false;                     // pad_buckets_for_high_nccl_busbw
  // Of uneven pipelines.
  std::optional<uint64_t> first_stage_layers = {};
  std::optional<uint64_t> last_stage_layers = {};
  bool embedding_counts = false;  // as a layer, in the split
  bool loss_counts = false;
  bool free_layout = false;  // pipeline_model_parallel_layout
};
// Anything that is no number where a number should be is left at its default; kDataLoss for degrees
// beyond any world (2^20) or 0.
absl::StatusOr<MegatronArguments> ReadMegatronArguments(const TorchValue& arguments);

// How the buffers of a model chunk are cut into buckets: of the first chunk of the first stage, or
// of another one; over `data_ranks` ranks.
BufferRule BufferRuleOf(const MegatronArguments& arguments, uint64_t data_ranks, bool first_chunk);

// Layers of each model chunk, in the order of the model: counts[chunk * pipeline_ranks + stage].
// Nothing if the arguments do not say it.
std::optional<std::vector<uint64_t>> LayersOfStages(const MegatronArguments& arguments,
                                                    uint64_t layers);

// "decoder.layers.3.mlp...": the text before the number, the number, and the rest from its dot on.
// Nothing for a name of no layer, or of a layer that no stage numbers for itself (`mtp.layers`).
struct MegatronLayer {
  std::string_view prefix;  // "decoder.layers."
  uint64_t number = 0;
  std::string_view rest;  // ".mlp..."
};
std::optional<MegatronLayer> ParseMegatronLayer(std::string_view name);

// Experts in a name: "local_experts.3." of single ones, "linear_fc1.weight3" of grouped ones.
struct MegatronExpert {
  std::string_view before;  // up to the number
  uint64_t number = 0;
  std::string_view after;
};
std::optional<MegatronExpert> ParseMegatronExpert(std::string_view name);
// A parameter of an expert: cut by the expert's own tensor parallelism, over expert ranks. Shared
// experts are none.
bool IsMegatronExpert(std::string_view name);

// Tensors that no optimizer owns, by their names.
bool IsMegatronBuffer(std::string_view name);

// How the shards of a parameter make the whole one.
struct MegatronCut {
  enum class Kind : uint8_t { kReplicated, kJoined, kGated };  // kGated: halves, each cut
  Kind kind = Kind::kReplicated;
  size_t dimension = 0;
};
// By Megatron's names; `gated` only matters for the first layer of an MLP. Nothing for a name that
// is in no rule.
std::optional<MegatronCut> MegatronCutOf(std::string_view name, bool gated);
// The shard of each rank. Errors: kInvalidArgument (the shapes contradict the cut).
absl::StatusOr<std::vector<ShardMap>> MegatronShards(const MegatronCut& cut,
                                                     const std::vector<Shape>& shard_shapes);

// Compares names by the order in which the model's modules have them (named_parameters).
bool MegatronModelOrder(std::string_view a, std::string_view b);

// A key of a torch_dist checkpoint without its optimizer's prefix.
struct MegatronKey {
  bool layer_axis = false;   // the first dimension is the layer
  bool expert_axis = false;  // the next one is the expert
  std::string text = {};
};
MegatronKey ParseMegatronKey(std::string_view key);
// A sharded object's key: "rng_state/shard_0.1_1.2", of which the numbers are the shard's place and
// how many there are. Nothing for another key.
struct MegatronObjectKey {
  std::string_view key;  // "rng_state"
  Shape offsets;         // at least one, at most 8
  Shape shape;           // as many
};
std::optional<MegatronObjectKey> ParseMegatronObject(std::string_view key);

// The module's name: layer and expert put in, and the norms of Megatron's own layers named after
// their modules.
std::string MegatronNameOf(const MegatronKey& key, uint64_t layer, uint64_t expert,
                           const MegatronArguments& arguments);

// The inverse: the key, and where on its axes a tensor is that the model calls so.
struct MegatronPlace {
  MegatronKey key;
  uint64_t layer = 0;
  uint64_t expert = 0;
};
enum class MegatronLayers : uint8_t { kAxis, kNumbered };  // how keys say which layer it is
MegatronPlace MegatronPlaceOf(std::string_view name, MegatronLayers layers, bool local_modules);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MEGATRON_LAYOUT_H_
