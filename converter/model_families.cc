// Tables have the language of mapping files (converter/mapping_rules.h). Where a naming calls one
// tensor differently in two versions, the rule that stands first is the one that is written.
//
// Sources: Megatron-LM megatron/core/models/gpt/gpt_layer_specs.py (names of layers with and
// without TransformerEngine) and tools/checkpoint (the order of rows); Megatron-DeepSpeed
// megatron/model/language_model.py; torchtitan models/llama3; transformers
// models/{gpt2,llama,mixtral}.
#include "converter/model_families.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/suggestion.h"

namespace holdfast::converter {
namespace {

constexpr size_t kShownBytesMax = 200;

// What all Megatron models must be: other settings change numbers or their order, not names.
constexpr std::string_view kMegatronRequires = R"(
require args.rotary_interleaved false
require args.apply_layernorm_1p false
)";

// GPT-2. The family's names are Hugging Face's, with queries, keys and values apart, and weights as
// a linear layer has them: [out in].
constexpr std::string_view kGpt2Shapes = R"(
shape transformer.wte.weight [vocab hidden]
shape transformer.wpe.weight [positions hidden]
shape lm_head.weight [vocab hidden]
shape transformer.h.{n}.ln_1.weight [hidden]
shape transformer.h.{n}.ln_1.bias [hidden]
shape transformer.h.{n}.attn.q.weight [rows hidden]
shape transformer.h.{n}.attn.k.weight [rows hidden]
shape transformer.h.{n}.attn.v.weight [rows hidden]
shape transformer.h.{n}.attn.q.bias [rows]
shape transformer.h.{n}.attn.k.bias [rows]
shape transformer.h.{n}.attn.v.bias [rows]
shape transformer.h.{n}.attn.o.weight [hidden rows]
shape transformer.h.{n}.attn.o.bias [hidden]
shape transformer.h.{n}.ln_2.weight [hidden]
shape transformer.h.{n}.ln_2.bias [hidden]
shape transformer.h.{n}.mlp.up.weight [ffn hidden]
shape transformer.h.{n}.mlp.up.bias [ffn]
shape transformer.h.{n}.mlp.down.weight [hidden ffn]
shape transformer.h.{n}.mlp.down.bias [hidden]
shape transformer.ln_f.weight [hidden]
shape transformer.ln_f.bias [hidden]
)";

constexpr std::string_view kGpt2Hf = R"(
transformer.wte.weight = transformer.wte.weight
transformer.wpe.weight = transformer.wpe.weight
lm_head.weight = lm_head.weight
transformer.h.{n}.ln_1.weight = transformer.h.{n}.ln_1.weight
transformer.h.{n}.ln_1.bias = transformer.h.{n}.ln_1.bias
transpose(transformer.h.{n}.attn.c_attn.weight) =
  concat(transformer.h.{n}.attn.q.weight, transformer.h.{n}.attn.k.weight, transformer.h.{n}.attn.v.weight)
transformer.h.{n}.attn.c_attn.bias =
  concat(transformer.h.{n}.attn.q.bias, transformer.h.{n}.attn.k.bias, transformer.h.{n}.attn.v.bias)
transpose(transformer.h.{n}.attn.c_proj.weight) = transformer.h.{n}.attn.o.weight
transformer.h.{n}.attn.c_proj.bias = transformer.h.{n}.attn.o.bias
transformer.h.{n}.ln_2.weight = transformer.h.{n}.ln_2.weight
transformer.h.{n}.ln_2.bias = transformer.h.{n}.ln_2.bias
transpose(transformer.h.{n}.mlp.c_fc.weight) = transformer.h.{n}.mlp.up.weight
transformer.h.{n}.mlp.c_fc.bias = transformer.h.{n}.mlp.up.bias
transpose(transformer.h.{n}.mlp.c_proj.weight) = transformer.h.{n}.mlp.down.weight
transformer.h.{n}.mlp.c_proj.bias = transformer.h.{n}.mlp.down.bias
transformer.ln_f.weight = transformer.ln_f.weight
transformer.ln_f.bias = transformer.ln_f.bias
)";
// What older releases have saved beside the weights: masks.
constexpr std::string_view kGpt2HfDrops = R"(
drop transformer.h.{n}.attn.bias
drop transformer.h.{n}.attn.masked_bias
drop h.{n}.attn.bias
drop h.{n}.attn.masked_bias
)";

// Of Megatron-Core; other projects spell these settings in other ways.
constexpr std::string_view kGpt2MegatronRequires = R"(
require args.swiglu false
require args.normalization LayerNorm
require args.position_embedding_type learned_absolute
)";
constexpr std::string_view kGpt2Megatron = R"(
embedding.word_embeddings.weight = pad(transformer.wte.weight)
embedding.position_embeddings.weight = transformer.wpe.weight
output_layer.weight = pad(lm_head.weight)
NORM_1.weight = transformer.h.{n}.ln_1.weight
NORM_1.bias = transformer.h.{n}.ln_1.bias
LAYER.self_attention.linear_qkv.weight = interleave(heads,
  transformer.h.{n}.attn.q.weight, transformer.h.{n}.attn.k.weight, transformer.h.{n}.attn.v.weight)
LAYER.self_attention.linear_qkv.bias = interleave(heads,
  transformer.h.{n}.attn.q.bias, transformer.h.{n}.attn.k.bias, transformer.h.{n}.attn.v.bias)
LAYER.self_attention.linear_proj.weight = transformer.h.{n}.attn.o.weight
LAYER.self_attention.linear_proj.bias = transformer.h.{n}.attn.o.bias
NORM_2.weight = transformer.h.{n}.ln_2.weight
NORM_2.bias = transformer.h.{n}.ln_2.bias
LAYER.mlp.linear_fc1.weight = transformer.h.{n}.mlp.up.weight
LAYER.mlp.linear_fc1.bias = transformer.h.{n}.mlp.up.bias
LAYER.mlp.linear_fc2.weight = transformer.h.{n}.mlp.down.weight
LAYER.mlp.linear_fc2.bias = transformer.h.{n}.mlp.down.bias
decoder.final_layernorm.weight = transformer.ln_f.weight
decoder.final_layernorm.bias = transformer.ln_f.bias
)";

// Of Llama and Mixtral: embeddings, norms, attention.
constexpr std::string_view kLlamaCommonShapes = R"(
shape model.embed_tokens.weight [vocab hidden]
shape model.layers.{n}.input_layernorm.weight [hidden]
shape model.layers.{n}.self_attn.q_proj.weight [rows hidden]
shape model.layers.{n}.self_attn.k_proj.weight [kv_rows hidden]
shape model.layers.{n}.self_attn.v_proj.weight [kv_rows hidden]
shape model.layers.{n}.self_attn.q_proj.bias [rows]
shape model.layers.{n}.self_attn.k_proj.bias [kv_rows]
shape model.layers.{n}.self_attn.v_proj.bias [kv_rows]
shape model.layers.{n}.self_attn.o_proj.weight [hidden rows]
shape model.layers.{n}.self_attn.o_proj.bias [hidden]
shape model.layers.{n}.post_attention_layernorm.weight [hidden]
shape model.norm.weight [hidden]
shape lm_head.weight [vocab hidden]
)";
constexpr std::string_view kLlamaShapes = R"(
shape model.layers.{n}.mlp.gate_proj.weight [ffn hidden]
shape model.layers.{n}.mlp.up_proj.weight [ffn hidden]
shape model.layers.{n}.mlp.down_proj.weight [hidden ffn]
shape model.layers.{n}.mlp.gate_proj.bias [ffn]
shape model.layers.{n}.mlp.up_proj.bias [ffn]
shape model.layers.{n}.mlp.down_proj.bias [hidden]
)";
constexpr std::string_view kMixtralShapes = R"(
shape model.layers.{n}.block_sparse_moe.gate.weight [experts hidden]
shape model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight [ffn hidden]
shape model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight [ffn hidden]
shape model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight [hidden ffn]
)";
// Computed from the configuration.
constexpr std::string_view kLlamaHfDrops = R"(
drop model.layers.{n}.self_attn.rotary_emb.inv_freq
drop model.rotary_emb.inv_freq
)";
constexpr std::string_view kMixtralHfFused = R"(
model.layers.{n}.mlp.gate.weight = model.layers.{n}.block_sparse_moe.gate.weight
model.layers.{n}.mlp.experts.gate_up_proj = stack(e, concat(
  model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight, model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight))
model.layers.{n}.mlp.experts.down_proj = stack(e, model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight)
)";

constexpr std::string_view kLlamaMegatronRequires = R"(
require args.swiglu true
require args.normalization RMSNorm
require args.position_embedding_type rope
)";
constexpr std::string_view kLlamaCommonMegatron = R"(
drop rotary_pos_emb.inv_freq
embedding.word_embeddings.weight = pad(model.embed_tokens.weight)
output_layer.weight = pad(lm_head.weight)
NORM_1.weight = model.layers.{n}.input_layernorm.weight
LAYER.self_attention.linear_qkv.weight = interleave(groups, heads * model.layers.{n}.self_attn.q_proj.weight,
  groups * model.layers.{n}.self_attn.k_proj.weight, groups * model.layers.{n}.self_attn.v_proj.weight)
LAYER.self_attention.linear_qkv.bias = interleave(groups, heads * model.layers.{n}.self_attn.q_proj.bias,
  groups * model.layers.{n}.self_attn.k_proj.bias, groups * model.layers.{n}.self_attn.v_proj.bias)
LAYER.self_attention.linear_proj.weight = model.layers.{n}.self_attn.o_proj.weight
LAYER.self_attention.linear_proj.bias = model.layers.{n}.self_attn.o_proj.bias
NORM_2.weight = model.layers.{n}.post_attention_layernorm.weight
decoder.final_layernorm.weight = model.norm.weight
)";
constexpr std::string_view kLlamaMegatron = R"(
LAYER.mlp.linear_fc1.weight = concat(model.layers.{n}.mlp.gate_proj.weight, model.layers.{n}.mlp.up_proj.weight)
LAYER.mlp.linear_fc1.bias = concat(model.layers.{n}.mlp.gate_proj.bias, model.layers.{n}.mlp.up_proj.bias)
LAYER.mlp.linear_fc2.weight = model.layers.{n}.mlp.down_proj.weight
LAYER.mlp.linear_fc2.bias = model.layers.{n}.mlp.down_proj.bias
)";
constexpr std::string_view kMixtralRouter = R"(
LAYER.mlp.router.weight = model.layers.{n}.block_sparse_moe.gate.weight
)";
constexpr std::string_view kMixtralSequentialExperts = R"(
LAYER.mlp.experts.local_experts.{e}.linear_fc1.weight = concat(
  model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight, model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight)
LAYER.mlp.experts.local_experts.{e}.linear_fc2.weight = model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight
)";
constexpr std::string_view kMixtralGroupedExperts = R"(
LAYER.mlp.experts.linear_fc1.weight{e} = concat(
  model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight, model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight)
LAYER.mlp.experts.linear_fc2.weight{e} = model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight
)";

// torchtitan's, which are Meta's: rotary pairs beside each other.
constexpr std::string_view kLlamaTitan = R"(
tok_embeddings.weight = model.embed_tokens.weight
layers.{n}.attention_norm.weight = model.layers.{n}.input_layernorm.weight
rotary(heads, layers.{n}.attention.wq.weight) = model.layers.{n}.self_attn.q_proj.weight
rotary(groups, layers.{n}.attention.wk.weight) = model.layers.{n}.self_attn.k_proj.weight
layers.{n}.attention.wv.weight = model.layers.{n}.self_attn.v_proj.weight
layers.{n}.attention.wo.weight = model.layers.{n}.self_attn.o_proj.weight
layers.{n}.ffn_norm.weight = model.layers.{n}.post_attention_layernorm.weight
layers.{n}.feed_forward.w1.weight = model.layers.{n}.mlp.gate_proj.weight
layers.{n}.feed_forward.w3.weight = model.layers.{n}.mlp.up_proj.weight
layers.{n}.feed_forward.w2.weight = model.layers.{n}.mlp.down_proj.weight
norm.weight = model.norm.weight
output.weight = lm_head.weight
drop rope.freqs
drop freqs_cis
)";

constexpr std::string_view kHf = "hf";  // every family has it
constexpr std::array<std::string_view, 3> kFamilies = {"gpt2", "llama", "mixtral"};
constexpr std::array<std::string_view, 4> kGpt2Namings = {"hf", "megatron", "megatron-local",
                                                          "megatron-deepspeed"};
constexpr std::array<std::string_view, 5> kLlamaNamings = {"hf", "megatron", "megatron-local",
                                                           "megatron-deepspeed", "titan"};
constexpr std::array<std::string_view, 5> kMixtralNamings = {"hf", "hf-fused", "megatron",
                                                             "megatron-local", "megatron-grouped"};

std::string Listed(std::span<const std::string_view> words) {
  return absl::StrJoin(std::vector<std::string>(words.begin(), words.end()), ", ");
}

std::string Together(std::initializer_list<std::string_view> texts) {
  std::string all;
  for (const std::string_view text : texts) all += text;
  return all;
}

// All of each first text become the second one.
std::string Replaced(std::string_view text,
                     const std::vector<std::pair<std::string, std::string>>& pairs) {
  return absl::StrReplaceAll(std::string(text), pairs);
}

// Every name of the family for itself.
std::string Identity(std::string_view shapes) {
  std::string table = "\n";
  const absl::StatusOr<MappingRules> rules = ParseMappingRules(shapes, "a family");
  CHECK(rules.ok());
  for (const MappingShape& shape : rules->shapes) {
    table += Together({shape.name.text(), " = ", shape.name.text(), "\n"});
  }
  return table;
}

// The equations of a table for names that lack this prefix on the left.
std::string WithoutPrefix(std::string_view table, const std::string& prefix) {
  return Replaced(table, {{"\n" + prefix, "\n"}, {"\ntranspose(" + prefix, "\ntranspose("}});
}

// LAYER, NORM_1 and NORM_2 of a Megatron table in the words of one kind of layer.
std::string WithLayers(std::string_view table, const std::string& norm_1,
                       const std::string& norm_2) {
  const std::string layer = "decoder.layers.{n}";
  return Replaced(
      table,
      {{"NORM_1.", layer + "." + norm_1}, {"NORM_2.", layer + "." + norm_2}, {"LAYER", layer}});
}

// TransformerEngine's layers hold the norm before a linear layer with that; Megatron's own ones,
// and all layers of experts, by itself.
enum class NormsAre { kFused, kFusedButBeforeExperts, kApart };
std::string WithNorms(std::string_view table, NormsAre norms) {
  return WithLayers(
      table,
      norms == NormsAre::kApart ? "input_layernorm." : "self_attention.linear_qkv.layer_norm_",
      norms == NormsAre::kFused ? "mlp.linear_fc1.layer_norm_" : "pre_mlp_layernorm.");
}

// A naming writes its own words, which stand first, and reads the others' too.
std::string MegatronTable(std::string_view settings, std::string_view table, NormsAre norms) {
  std::string all = Together({kMegatronRequires, settings, WithNorms(table, norms)});
  for (const NormsAre other :
       {NormsAre::kFused, NormsAre::kFusedButBeforeExperts, NormsAre::kApart}) {
    if (other != norms) all += WithNorms(table, other);
  }
  return all;
}

// Megatron's names of before Megatron-Core.
std::string MegatronDeepSpeedTable(std::string_view table) {
  const std::string names =
      Replaced(WithLayers(table, "input_layernorm.", "post_attention_layernorm."),
               {{"decoder.", "language_model.encoder."},
                {"self_attention.linear_qkv", "self_attention.query_key_value"},
                {"self_attention.linear_proj", "self_attention.dense"},
                {"mlp.linear_fc1", "mlp.dense_h_to_4h"},
                {"mlp.linear_fc2", "mlp.dense_4h_to_h"},
                {"\nembedding.", "\nlanguage_model.embedding."},
                {"\noutput_layer.", "\nlanguage_model.output_layer."}});
  return Together({kMegatronRequires, names});
}

std::string Gpt2Table(std::string_view naming) {
  if (naming == "hf") {
    return Together({kGpt2Hf, WithoutPrefix(kGpt2Hf, "transformer."), kGpt2HfDrops});
  }
  if (naming == "megatron-deepspeed") return MegatronDeepSpeedTable(kGpt2Megatron);
  return MegatronTable(kGpt2MegatronRequires, kGpt2Megatron,
                       naming == "megatron" ? NormsAre::kFused : NormsAre::kApart);
}

std::string LlamaTable(std::string_view naming) {
  if (naming == "hf") {
    const std::string table = Identity(Together({kLlamaCommonShapes, kLlamaShapes}));
    return Together({table, WithoutPrefix(table, "model."), kLlamaHfDrops});
  }
  if (naming == "titan") return std::string(kLlamaTitan);
  const std::string megatron = Together({kLlamaCommonMegatron, kLlamaMegatron});
  if (naming == "megatron-deepspeed") return MegatronDeepSpeedTable(megatron);
  return MegatronTable(kLlamaMegatronRequires, megatron,
                       naming == "megatron" ? NormsAre::kFused : NormsAre::kApart);
}

std::string MixtralTable(std::string_view naming) {
  if (naming == "hf") {
    return Together({Identity(Together({kLlamaCommonShapes, kMixtralShapes})), kLlamaHfDrops});
  }
  if (naming == "hf-fused") {
    return Together({kMixtralHfFused, Identity(kLlamaCommonShapes), kLlamaHfDrops});
  }
  const bool grouped = naming == "megatron-grouped";
  const std::string table =
      Together({kLlamaCommonMegatron, kMixtralRouter,
                grouped ? kMixtralGroupedExperts : kMixtralSequentialExperts,
                grouped ? kMixtralSequentialExperts : kMixtralGroupedExperts});
  return MegatronTable(
      kLlamaMegatronRequires, table,
      naming == "megatron-local" ? NormsAre::kApart : NormsAre::kFusedButBeforeExperts);
}

std::string_view ShapesBesides(std::string_view family) {
  return family == "llama" ? kLlamaShapes : kMixtralShapes;
}

// "llama:megatron".
struct Chosen {
  std::string_view family;
  std::string_view naming;
};

absl::StatusOr<Chosen> ParseFamily(std::string_view text, std::string_view naming) {
  const size_t colon = text.find(':');
  Chosen chosen{.family = text.substr(0, colon),
                .naming = colon == std::string_view::npos ? naming : text.substr(colon + 1)};
  if (std::find(kFamilies.begin(), kFamilies.end(), chosen.family) == kFamilies.end()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--map %s: expected a family (%s) or a file, found neither%s",
        text.substr(0, kShownBytesMax), Listed(kFamilies), DidYouMean(chosen.family, kFamilies)));
  }
  const std::vector<std::string_view> known = NamingsOf(chosen.family);
  if (std::find(known.begin(), known.end(), chosen.naming) == known.end()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--map %s: expected %s:NAMES with names of %s, found \"%s\"%s",
                        text.substr(0, kShownBytesMax), chosen.family, Listed(known),
                        chosen.naming.substr(0, kShownBytesMax), DidYouMean(chosen.naming, known)));
  }
  return chosen;
}

absl::StatusOr<MappingRules> ParseTable(std::string_view family, std::string_view naming,
                                        std::string_view where) {
  return ParseMappingRules(FamilyTable(family, naming), where);
}

absl::Status MapFamily(const MapOption& option, std::string_view naming,
                       const ForeignFolder& folder, ModelNumbers& numbers, Unmapped unmapped,
                       ForeignIndex& index, std::vector<std::string>& left_out) {
  ASSIGN_OR_RETURN(const Chosen chosen, ParseFamily(option.text, naming));
  std::optional<MappingRules> from;
  std::string from_where;
  size_t most = 0;
  for (const std::string_view each : NamingsOf(chosen.family)) {
    const std::string where = absl::StrFormat("--map %s:%s", chosen.family, each);
    ASSIGN_OR_RETURN(MappingRules rules, ParseTable(chosen.family, each, where));
    const size_t count = CountMapped(rules, MappingDirection::kLeftToRight, index);
    if (count <= most) continue;
    most = count;
    from = std::move(rules);
    from_where = where;
  }
  if (!from.has_value()) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "--map %s: expected names of %s (%s), found none; --rename brings others into their form",
        option.text, chosen.family, Listed(NamingsOf(chosen.family))));
  }
  RETURN_IF_ERROR(ApplyMapping({.rules = *from,
                                .direction = MappingDirection::kLeftToRight,
                                .where = from_where,
                                .unmapped = unmapped},
                               folder, numbers, index, left_out));
  const std::string where = absl::StrFormat("--map %s:%s", chosen.family, chosen.naming);
  ASSIGN_OR_RETURN(const MappingRules to, ParseTable(chosen.family, chosen.naming, where));
  return ApplyMapping({.rules = to,
                       .direction = MappingDirection::kRightToLeft,
                       .where = where,
                       .unmapped = unmapped},
                      folder, numbers, index, left_out);
}

std::string FileWhere(const MapOption& option) {
  return "--map " + option.text.substr(0, kShownBytesMax);
}

absl::StatusOr<MappingRules> ParseFile(const MapOption& option) {
  return ParseMappingRules(*option.contents, FileWhere(option));
}

absl::Status MapFile(const MapOption& option, const ForeignFolder& folder, ModelNumbers& numbers,
                     Unmapped unmapped, ForeignIndex& index, std::vector<std::string>& left_out) {
  const std::string where = FileWhere(option);
  ASSIGN_OR_RETURN(const MappingRules rules, ParseFile(option));
  const size_t left = CountMapped(rules, MappingDirection::kLeftToRight, index);
  const size_t right = CountMapped(rules, MappingDirection::kRightToLeft, index);
  return ApplyMapping(
      {.rules = rules,
       .direction = right > left ? MappingDirection::kRightToLeft : MappingDirection::kLeftToRight,
       .where = where,
       .unmapped = unmapped},
      folder, numbers, index, left_out);
}

}  // namespace

std::span<const std::string_view> FamilyNames() { return kFamilies; }

std::vector<std::string_view> NamingsOf(std::string_view family) {
  if (family == "gpt2") return {kGpt2Namings.begin(), kGpt2Namings.end()};
  if (family == "llama") return {kLlamaNamings.begin(), kLlamaNamings.end()};
  return {kMixtralNamings.begin(), kMixtralNamings.end()};
}

std::string FamilyTable(std::string_view family, std::string_view naming) {
  if (family == "gpt2") return Together({Gpt2Table(naming), kGpt2Shapes});
  return Together({family == "llama" ? LlamaTable(naming) : MixtralTable(naming),
                   kLlamaCommonShapes, ShapesBesides(family)});
}

bool NamesFamily(std::string_view text) {
  const std::string_view family = text.substr(0, text.find(':'));
  return std::find(kFamilies.begin(), kFamilies.end(), family) != kFamilies.end();
}

absl::Status CheckMap(const MapOption& option) {
  if (!option.contents.has_value()) return ParseFamily(option.text, kHf).status();
  return ParseFile(option).status();
}

absl::Status MapIndex(std::span<const MapOption> options, std::string_view naming,
                      const ForeignFolder& folder, ModelNumbers& numbers, Unmapped unmapped,
                      ForeignIndex& index, std::vector<std::string>& left_out) {
  for (const MapOption& option : options) {
    RETURN_IF_ERROR(option.contents.has_value()
                        ? MapFile(option, folder, numbers, unmapped, index, left_out)
                        : MapFamily(option, naming, folder, numbers, unmapped, index, left_out));
  }
  return numbers.CheckAllUsed();
}

}  // namespace holdfast::converter
