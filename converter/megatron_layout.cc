#include "converter/megatron_layout.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <span>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/decimal.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kRanksMax = uint64_t{1} << 20;
constexpr uint64_t kLayersMax = uint64_t{1} << 20;
constexpr uint64_t kUsualBucketElements = 40'000'000;
constexpr uint64_t kUsualBucketElementsPerRank = 1'000'000;

bool Contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

std::vector<std::string_view> ComponentsOf(std::string_view name) {
  std::vector<std::string_view> components;
  for (;;) {
    const size_t dot = name.find('.');
    components.push_back(name.substr(0, dot));
    if (dot == std::string_view::npos) return components;
    name.remove_prefix(dot + 1);
  }
}

bool IsTrue(const TorchValue& value) {
  return value.Is(TorchValue::Kind::kBool) && value.Bool().value_or(false);
}

std::optional<uint64_t> Number(const TorchValue& value) {
  if (!value.Is(TorchValue::Kind::kInteger)) return std::nullopt;
  const absl::StatusOr<uint64_t> number = value.Uint64();
  if (!number.ok()) return std::nullopt;
  return *number;
}

absl::StatusOr<uint64_t> Degree(const TorchValue& arguments, std::string_view key,
                                uint64_t otherwise) {
  const std::optional<uint64_t> number = Number(arguments.Find(key));
  if (!number.has_value()) return otherwise;
  if (*number >= 1 && *number <= kRanksMax) return *number;
  return absl::DataLossError(absl::StrFormat(
      "args.%s: expected a number of ranks in [1, %d], found %d", key, kRanksMax, *number));
}

// Digits at the front.
std::string_view LeadingDigits(std::string_view text) {
  return text.substr(0, std::min(text.find_first_not_of("0123456789"), text.size()));
}

// The last two components: of "a.b.linear_fc1.weight" linear_fc1 and weight.
struct Leaf {
  std::string_view module;
  std::string_view parameter;
};
Leaf LeafOf(std::string_view name) {
  const size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) return {"", name};
  const std::string_view module = name.substr(0, dot);
  return {module.substr(module.rfind('.') + 1), name.substr(dot + 1)};
}

template <size_t N>
bool IsOneOf(std::string_view word, const std::array<std::string_view, N>& words) {
  return std::ranges::find(words, word) != words.end();
}

constexpr std::array<std::string_view, 13> kColumnParallel = {
    "linear_qkv",    "linear_fc1",       "word_embeddings",   "output_layer",
    "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "linear_q",
    "linear_kv",     "query_key_value",  "dense_h_to_4h",     "word_embeddings_for_head",
    "eh_proj"};
constexpr std::array<std::string_view, 3> kRowParallel = {"linear_proj", "linear_fc2",
                                                          "dense_4h_to_h"};
constexpr std::array<std::string_view, 3> kReplicated = {"position_embeddings",
                                                         "tokentype_embeddings", "router"};
constexpr std::array<std::string_view, 3> kReplicatedLeaves = {"expert_bias", "gate_weight",
                                                               "local_tokens_per_expert"};
constexpr std::array<std::string_view, 4> kBufferLeaves = {"expert_bias", "local_tokens_per_expert",
                                                           "inv_freq", "global_tokens_per_expert"};

// The place of a component among its siblings: where modules register their children and
// parameters. A module's own parameters come before its children.
constexpr std::array<std::string_view, 44> kOrder = {
    // a module's own parameters
    "gate_weight", "softmax_offset", "layer_norm_weight", "layer_norm_bias", "weight", "bias",
    // the model
    "embedding", "encoder", "decoder", "mtp", "output_layer",
    // the embedding
    "word_embeddings", "position_embeddings", "tokentype_embeddings",
    // a layer of multi-token prediction, before its norm
    "enorm", "hnorm", "eh_proj", "transformer_layer", "mtp_model_layer",
    // the block
    "layers", "final_layernorm",
    // a layer
    "input_layernorm", "self_attention", "pre_cross_attn_layernorm", "cross_attention",
    "pre_mlp_layernorm", "mlp",
    // attention
    "core_attention", "linear_proj", "linear_qkv", "linear_q", "linear_kv", "linear_q_proj",
    "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj",
    "q_layernorm", "k_layernorm", "kv_layernorm",
    // experts
    "router", "experts", "shared_experts", "local_experts"};

// (0, place) of a known word, (1, the number) of a number, (2, 0) of anything else; and the number
// behind a word ("weight12").
struct ComponentOrder {
  int kind = 2;
  uint64_t place = 0;
  std::string_view word;
  uint64_t number = 0;

  auto operator<=>(const ComponentOrder&) const = default;
};
ComponentOrder OrderOf(std::string_view component) {
  if (const auto number = ParseDecimal(component); number.has_value()) {
    return {.kind = 1, .place = *number, .word = "", .number = 0};
  }
  const size_t digits = TrailingDigits(component);
  const std::string_view word = component.substr(0, digits);
  const uint64_t number = ParseDecimal(component.substr(digits)).value_or(0);
  // linear_fc1 and linear_fc2 end in digits themselves: the number orders them.
  const auto found = std::ranges::find(kOrder, word);
  if (found == kOrder.end()) return {.kind = 2, .place = 0, .word = word, .number = number};
  return {.kind = 0,
          .place = static_cast<uint64_t>(found - kOrder.begin()),
          .word = "",
          .number = number};
}

}  // namespace

absl::StatusOr<MegatronArguments> ReadMegatronArguments(const TorchValue& arguments) {
  MegatronArguments read;
  if (!arguments.present() || arguments.Is(TorchValue::Kind::kNone)) return read;
  if (!arguments.Is(TorchValue::Kind::kOpaque) && !arguments.Is(TorchValue::Kind::kDict)) {
    return read;
  }
  const auto find = [&](std::string_view key) { return arguments.Find(key); };
  read.present = find("tensor_model_parallel_size").present();
  ASSIGN_OR_RETURN(read.tensor_ranks, Degree(arguments, "tensor_model_parallel_size", 1));
  ASSIGN_OR_RETURN(read.pipeline_ranks, Degree(arguments, "pipeline_model_parallel_size", 1));
  ASSIGN_OR_RETURN(read.virtual_stages,
                   Degree(arguments, "virtual_pipeline_model_parallel_size", 1));
  ASSIGN_OR_RETURN(read.expert_ranks, Degree(arguments, "expert_model_parallel_size", 1));
  ASSIGN_OR_RETURN(read.expert_tensor_ranks,
                   Degree(arguments, "expert_tensor_parallel_size", read.tensor_ranks));
  ASSIGN_OR_RETURN(const uint64_t data, Degree(arguments, "data_parallel_size", 1));
  ASSIGN_OR_RETURN(const uint64_t context, Degree(arguments, "context_parallel_size", 1));
  ASSIGN_OR_RETURN(const uint64_t instances,
                   Degree(arguments, "num_distributed_optimizer_instances", 1));
  read.data_ranks = std::max<uint64_t>(1, data * context / instances);
  const uint64_t stage_ranks = data * context * read.tensor_ranks;
  read.expert_data_ranks = std::max<uint64_t>(
      1, stage_ranks / (read.expert_ranks * read.expert_tensor_ranks) / instances);
  if (const auto layers = Number(find("num_layers")); layers.has_value() && *layers <= kLayersMax) {
    read.layers = *layers;
  }
  read.query_groups = Number(
      find(IsTrue(find("group_query_attention")) ? "num_query_groups" : "num_attention_heads"));
  if (find("swiglu").Is(TorchValue::Kind::kBool)) {
    read.gated = IsTrue(find("swiglu")) || IsTrue(find("gated_linear_unit")) ||
                 IsTrue(find("quick_geglu")) || IsTrue(find("geglu"));
  }
  const TorchValue untied = find("untie_embeddings_and_output_weights");
  if (untied.Is(TorchValue::Kind::kBool)) read.tied = !IsTrue(untied);
  const TorchValue modules = find("transformer_impl");
  read.local_modules =
      modules.Is(TorchValue::Kind::kString) && modules.String().value_or("") == "local";
  read.grouped_experts = IsTrue(find("moe_grouped_gemm"));
  read.distributed_optimizer = IsTrue(find("use_distributed_optimizer"));
  read.bucket_elements = Number(find("ddp_bucket_size"));
  read.overlap_reduce = IsTrue(find("overlap_grad_reduce"));
  read.one_bucket = IsTrue(find("overlap_param_gather_with_optimizer_step"));
  read.wide_padding = IsTrue(find("ddp_pad_buckets_for_high_nccl_busbw"));
  read.first_stage_layers = Number(find("decoder_first_pipeline_num_layers"));
  read.last_stage_layers = Number(find("decoder_last_pipeline_num_layers"));
  read.embedding_counts = IsTrue(find("account_for_embedding_in_pipeline_split"));
  read.loss_counts = IsTrue(find("account_for_loss_in_pipeline_split"));
  const TorchValue layout = find("pipeline_model_parallel_layout");
  read.free_layout = layout.present() && !layout.Is(TorchValue::Kind::kNone);
  return read;
}

BufferRule BufferRuleOf(const MegatronArguments& arguments, uint64_t data_ranks, bool first_chunk) {
  BufferRule rule{.bucket_elements = {},
                  .end_multiple = BucketEndMultiple(data_ranks, arguments.wide_padding)};
  // Only there are buckets: its communication is waited for.
  if (first_chunk && arguments.overlap_reduce && !arguments.one_bucket) {
    rule.bucket_elements = arguments.bucket_elements.value_or(
        std::max(kUsualBucketElements, kUsualBucketElementsPerRank * arguments.data_ranks));
  }
  return rule;
}

std::optional<std::vector<uint64_t>> LayersOfStages(const MegatronArguments& arguments,
                                                    uint64_t layers) {
  const uint64_t stages = arguments.pipeline_ranks;
  const uint64_t chunks = arguments.virtual_stages;
  if (arguments.free_layout || stages > kRanksMax / chunks || layers > kLayersMax) {
    return std::nullopt;
  }
  std::vector<uint64_t> of_stage(stages, 0);  // all chunks together
  if (arguments.first_stage_layers.has_value() || arguments.last_stage_layers.has_value()) {
    const uint64_t first = arguments.first_stage_layers.value_or(0);
    const uint64_t last = arguments.last_stage_layers.value_or(0);
    const uint64_t begin = arguments.first_stage_layers.has_value() ? 1 : 0;
    const uint64_t end = stages - (arguments.last_stage_layers.has_value() ? 1 : 0);
    if (first > layers || last > layers - first || begin > end) return std::nullopt;
    const uint64_t rest = layers - first - last;
    if (begin == end ? rest != 0 : rest % (end - begin) != 0) return std::nullopt;
    for (uint64_t s = begin; s < end; ++s) of_stage[s] = rest / (end - begin);
    if (begin == 1) of_stage.front() = first;
    if (end < stages) of_stage.back() = last;
  } else {
    const uint64_t counted =
        layers + (arguments.embedding_counts ? 1 : 0) + (arguments.loss_counts ? 1 : 0);
    if (counted % stages != 0) return std::nullopt;
    std::ranges::fill(of_stage, counted / stages);
  }
  std::vector<uint64_t> counts(stages * chunks, 0);
  for (uint64_t s = 0; s < stages; ++s) {
    if (of_stage[s] % chunks != 0) return std::nullopt;
    for (uint64_t c = 0; c < chunks; ++c) counts[c * stages + s] = of_stage[s] / chunks;
  }
  if (arguments.embedding_counts && counts.front() > 0) --counts.front();
  if (arguments.loss_counts && counts.back() > 0) --counts.back();
  if (std::accumulate(counts.begin(), counts.end(), uint64_t{0}) != layers) return std::nullopt;
  return counts;
}

std::optional<MegatronLayer> ParseMegatronLayer(std::string_view name) {
  constexpr std::string_view kLayers = "layers.";
  for (size_t at = name.find(kLayers); at != std::string_view::npos;
       at = name.find(kLayers, at + 1)) {
    if (at > 0 && name[at - 1] != '.') continue;
    const size_t begin = at + kLayers.size();
    const std::string_view digits = LeadingDigits(name.substr(begin));
    const auto number = ParseDecimal(digits);
    if (!number.has_value() || *number >= kLayersMax) continue;
    const std::string_view rest = name.substr(begin + digits.size());
    if (!rest.starts_with('.')) continue;
    // Layers of multi-token prediction are all on the last stage.
    if (Contains(name.substr(0, at), "mtp.")) return std::nullopt;
    return MegatronLayer{.prefix = name.substr(0, begin), .number = *number, .rest = rest};
  }
  return std::nullopt;
}

std::optional<MegatronExpert> ParseMegatronExpert(std::string_view name) {
  constexpr std::string_view kSingle = ".local_experts.";
  if (const size_t at = name.find(kSingle); at != std::string_view::npos) {
    const size_t begin = at + kSingle.size();
    const std::string_view digits = LeadingDigits(name.substr(begin));
    const auto number = ParseDecimal(digits);
    if (!number.has_value() || *number >= kRanksMax) return std::nullopt;
    return MegatronExpert{.before = name.substr(0, begin),
                          .number = *number,
                          .after = name.substr(begin + digits.size())};
  }
  if (!Contains(name, ".experts.linear_fc")) return std::nullopt;
  const size_t digits = TrailingDigits(name);
  const auto number = ParseDecimal(name.substr(digits));
  if (!number.has_value() || *number >= kRanksMax) return std::nullopt;
  return MegatronExpert{.before = name.substr(0, digits), .number = *number, .after = ""};
}

bool IsMegatronExpert(std::string_view name) { return Contains(name, ".experts."); }

bool IsMegatronBuffer(std::string_view name) {
  return IsOneOf(LeafOf(name).parameter, kBufferLeaves);
}

std::optional<MegatronCut> MegatronCutOf(std::string_view name, bool gated) {
  using Kind = MegatronCut::Kind;
  const Leaf leaf = LeafOf(name);
  if (IsOneOf(leaf.parameter, kReplicatedLeaves) || Contains(leaf.parameter, "norm") ||
      Contains(leaf.module, "norm") || IsOneOf(leaf.module, kReplicated)) {
    return MegatronCut{.kind = Kind::kReplicated};
  }
  // "weight", or "weight3" of grouped experts.
  const std::string_view parameter = leaf.parameter.substr(0, TrailingDigits(leaf.parameter));
  if (parameter != "weight" && parameter != "bias") return std::nullopt;
  if (IsOneOf(leaf.module, kColumnParallel)) {
    const bool halves = gated && (leaf.module == "linear_fc1" || leaf.module == "dense_h_to_4h");
    return MegatronCut{.kind = halves ? Kind::kGated : Kind::kJoined, .dimension = 0};
  }
  // Of attention, before megatron-core; a head has a `dense` that is not cut.
  const bool is_attention = leaf.module == "dense" && Contains(name, "attention.dense.");
  if (IsOneOf(leaf.module, kRowParallel) || is_attention) {
    if (parameter == "bias") return MegatronCut{.kind = Kind::kReplicated};
    return MegatronCut{.kind = Kind::kJoined, .dimension = 1};
  }
  return std::nullopt;
}

absl::StatusOr<std::vector<ShardMap>> MegatronShards(const MegatronCut& cut,
                                                     const std::vector<Shape>& shard_shapes) {
  CHECK(!shard_shapes.empty());
  std::vector<ShardMap> maps;
  if (cut.kind == MegatronCut::Kind::kReplicated || shard_shapes.size() == 1) {
    for (const Shape& shape : shard_shapes) {
      if (shape != shard_shapes[0]) {
        return absl::InvalidArgumentError(
            absl::StrFormat("expected one shape on all tensor-parallel ranks, found [%s] and [%s]",
                            absl::StrJoin(shard_shapes[0], ", "), absl::StrJoin(shape, ", ")));
      }
      ASSIGN_OR_RETURN(ShardMap map, WholeShard(shape));
      maps.push_back(std::move(map));
    }
    return maps;
  }
  if (cut.kind == MegatronCut::Kind::kJoined) {
    for (size_t rank = 0; rank < shard_shapes.size(); ++rank) {
      ASSIGN_OR_RETURN(ShardMap map, JoinedShard(shard_shapes, rank, cut.dimension));
      maps.push_back(std::move(map));
    }
    return maps;
  }
  Shape whole = shard_shapes[0];
  if (cut.dimension >= whole.size()) {
    return absl::InvalidArgumentError(absl::StrFormat("halves along dimension %d: found shape [%s]",
                                                      cut.dimension, absl::StrJoin(whole, ", ")));
  }
  Shape widths;
  whole[cut.dimension] = 0;
  for (const Shape& shape : shard_shapes) {
    Shape elsewhere = shape;
    const uint64_t rows = shape.size() == whole.size() ? shape[cut.dimension] : 1;
    if (shape.size() == whole.size()) elsewhere[cut.dimension] = whole[cut.dimension];
    if (rows % 2 != 0 || elsewhere != whole || rows > kTensorBytesMax / shard_shapes.size()) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "halves along dimension %d: expected even sizes there and equal ones elsewhere, found "
          "[%s] and [%s]",
          cut.dimension, absl::StrJoin(shard_shapes[0], ", "), absl::StrJoin(shape, ", ")));
    }
    widths.push_back(rows / 2);
  }
  // In the loop above `whole` has 0 at the cut, to compare by.
  whole[cut.dimension] = 2 * std::accumulate(widths.begin(), widths.end(), uint64_t{0});
  for (size_t rank = 0; rank < shard_shapes.size(); ++rank) {
    ASSIGN_OR_RETURN(ShardMap map, SubTensorShard(whole, cut.dimension, {widths, widths}, rank));
    maps.push_back(std::move(map));
  }
  return maps;
}

bool MegatronModelOrder(std::string_view a, std::string_view b) {
  const std::vector<std::string_view> left = ComponentsOf(a);
  const std::vector<std::string_view> right = ComponentsOf(b);
  return std::ranges::lexicographical_compare(left, right, {}, OrderOf, OrderOf);
}

MegatronKey ParseMegatronKey(std::string_view key) {
  MegatronKey parsed{.text = std::string(key)};
  constexpr std::string_view kLayers = "layers.";
  const size_t at = key.find(kLayers);
  parsed.layer_axis = at != std::string_view::npos && (at == 0 || key[at - 1] == '.') &&
                      LeadingDigits(key.substr(at + kLayers.size())).empty();
  parsed.expert_axis = Contains(key, ".experts.experts.");
  return parsed;
}

std::string MegatronNameOf(const MegatronKey& key, uint64_t layer, uint64_t expert,
                           const MegatronArguments& arguments) {
  std::string name = key.text;
  if (key.layer_axis) {
    constexpr std::string_view kLayers = "layers.";
    name.insert(name.find(kLayers) + kLayers.size(), absl::StrCat(layer, "."));
  }
  if (key.expert_axis) {
    constexpr std::string_view kExperts = ".experts.experts.";
    const size_t at = name.find(kExperts);
    if (arguments.grouped_experts) {
      name.replace(at, kExperts.size(), ".experts.");
      absl::StrAppend(&name, expert);
    } else {
      name.replace(at, kExperts.size(), absl::StrCat(".experts.local_experts.", expert, "."));
    }
  }
  if (arguments.local_modules) {
    absl::StrReplaceAll({{".self_attention.linear_qkv.layer_norm_", ".input_layernorm."},
                         {".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."}},
                        &name);
  }
  return name;
}

std::optional<MegatronObjectKey> ParseMegatronObject(std::string_view key) {
  constexpr std::string_view kShard = "/shard_";
  constexpr size_t kNumbersMax = 8;
  const size_t at = key.rfind(kShard);
  if (at == std::string_view::npos) return std::nullopt;
  MegatronObjectKey parsed{.key = key.substr(0, at), .offsets = {}, .shape = {}};
  std::string_view rest = key.substr(at + kShard.size());
  const size_t middle = rest.find('_');
  if (middle == std::string_view::npos) return std::nullopt;
  for (const auto& [text, numbers] : {std::pair(rest.substr(0, middle), &parsed.offsets),
                                      std::pair(rest.substr(middle + 1), &parsed.shape)}) {
    for (const std::string_view digits : ComponentsOf(text)) {
      const auto number = ParseDecimal(digits);
      if (!number.has_value() || numbers->size() == kNumbersMax) return std::nullopt;
      numbers->push_back(*number);
    }
  }
  if (parsed.offsets.size() != parsed.shape.size()) return std::nullopt;
  return parsed;
}

MegatronPlace MegatronPlaceOf(std::string_view name, MegatronLayers layers, bool local_modules) {
  MegatronPlace place{.key = {.text = std::string(name)}};
  std::string& text = place.key.text;
  if (const auto expert = ParseMegatronExpert(text); expert.has_value()) {
    constexpr std::string_view kLocal = "local_experts.";
    std::string before(expert->before);
    std::string after(expert->after);
    if (before.ends_with(kLocal)) {
      before.replace(before.size() - kLocal.size(), kLocal.size(), "experts.");
      after.erase(0, after.starts_with('.') ? 1 : 0);
    } else {
      before.replace(before.find(".experts."), 9, ".experts.experts.");
    }
    place.expert = expert->number;
    place.key.expert_axis = true;
    text = before + after;
  }
  if (local_modules) {  // also in the layers of multi-token prediction
    absl::StrReplaceAll({{".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"},
                         {".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"}},
                        &text);
  }
  const auto layer = ParseMegatronLayer(text);
  if (!layer.has_value()) return place;
  const std::string rest(layer->rest);
  place.layer = layer->number;
  place.key.layer_axis = layers == MegatronLayers::kAxis;
  // The prefix ends in a dot, the rest begins with one.
  text = place.key.layer_axis ? absl::StrCat(std::string(layer->prefix), rest.substr(1))
                              : absl::StrCat(std::string(layer->prefix), layer->number, rest);
  return place;
}

}  // namespace holdfast::converter
