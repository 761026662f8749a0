#include "converter/deepspeed_model.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/layout_file.h"
#include "converter/parallel_facts.h"
#include "converter/pipeline_stages.h"
#include "converter/zero_layout.h"

namespace holdfast::converter {
namespace {

// Of an expert, what comes before its number; of all else nothing.
std::string_view PrefixOf(std::string_view name) {
  const auto expert = ParseExpertName(name);
  return expert.has_value() ? expert->prefix : std::string_view();
}

// The tied modules of a pipeline (`tied_modules.<key>.`), in the order in which they were built:
// names below the key, and shapes.
struct TiedModule {
  std::string key;
  std::map<std::string, Shape> shapes;
};

}  // namespace

absl::StatusOr<DeepSpeedModel> DeepSpeedModel::Read(const ForeignFolder& folder,
                                                    const DeepSpeedFiles& files,
                                                    const ReadOptions& options, PieceTable& table) {
  DeepSpeedModel model(folder, files, table);
  std::vector<uint32_t> numbers;
  if (!files.partitioned_models.empty()) {
    model.partitioned_ = true;
    ASSIGN_OR_RETURN(const RankKey counts,
                     DeepSpeedFiles::Counts(files.partitioned_models, "model states"));
    for (uint32_t mp = 0; mp < counts.mp; ++mp) {
      numbers.push_back(files.partitioned_models.at({.mp = mp, .dp = 0}));
    }
  } else {
    for (const auto& [mp, file] : files.models) {
      if (mp != numbers.size()) {
        return absl::DataLossError(
            absl::StrFormat("model states: found none of model-parallel rank %d", numbers.size()));
      }
      numbers.push_back(file);
    }
  }
  if (numbers.empty()) {
    return absl::DataLossError(
        "expected mp_rank_00_model_states.pt or "
        "zero_pp_rank_0_mp_rank_00_model_states.pt, found neither");
  }
  for (size_t mp = 0; mp < numbers.size(); ++mp) {
    ASSIGN_OR_RETURN(
        ModelStates states,
        ReadModelStates(folder, numbers[mp], mp == 0 ? ShowFacts::kYes : ShowFacts::kNo, table));
    model.states_.push_back(std::move(states));
  }
  const ModelStates& first = model.states_.front();
  if (first.mp_world_size > model.states_.size()) {
    return absl::DataLossError(
        absl::StrFormat("model states: expected files of %d model-parallel ranks, found %d",
                        first.mp_world_size, model.states_.size()));
  }
  if (first.global_steps.has_value()) {
    table.index().has_step = true;
    table.index().step = *first.global_steps;
  }
  RETURN_IF_ERROR(model.FindDegrees());
  ParallelInfo info;
  if (first.parallel.has_value()) info = *first.parallel;
  if (!info.NamesShards() && model.tensor_ranks_ > 1 && !files.optimizers.empty()) {
    // AutoTP writes it into the optimizer's files too.
    ASSIGN_OR_RETURN(
        const OptimizerStates states,
        ReadOptimizerStates(folder, files.optimizers.begin()->second, ShowFacts::kNo, table));
    if (states.parallel.has_value()) info = *states.parallel;
  }
  const ParallelInfo told = info;
  if (!info.NamesShards() && !options.preset.empty()) {
    const std::vector<std::string> pipeline = info.pipeline_replicated;
    ASSIGN_OR_RETURN(info, ParallelPreset(options.preset));
    info.pipeline_replicated = pipeline;
  }
  ASSIGN_OR_RETURN(LayoutFile layout, ParseLayoutFile(options.layout));
  info.rules = std::move(layout.rules);
  info.pipeline_replicated.insert(info.pipeline_replicated.end(),
                                  layout.pipeline_replicated.begin(),
                                  layout.pipeline_replicated.end());
  ASSIGN_OR_RETURN(model.rules_, ParallelRules::Create(std::move(info)));
  RETURN_IF_ERROR(model.CollectShapes());
  if (told.NamesShards()) model.AddParallelFacts(told);
  return model;
}

absl::Status DeepSpeedModel::NotEverywhere(const std::string& name) const {
  return absl::DataLossError(
      absl::StrFormat("\"%s\": expected it on all %d tensor-parallel ranks, found it on some", name,
                      tensor_ranks_));
}

// With the padded size of a vocabulary that the shards show: a job that is written for as many
// ranks has it.
void DeepSpeedModel::AddParallelFacts(const ParallelInfo& told) {
  ParallelInfo info = told;
  for (const auto& [name, by_stage] : shapes_) {
    if (!rules_->IsVocabulary(name)) continue;
    const std::vector<std::optional<Shape>>& shards = by_stage.begin()->second;
    if (!shards.front().has_value() || shards.front()->empty()) break;
    const absl::StatusOr<ParameterCut> cut = rules_->HowToCut(name, *shards.front());
    if (!cut.ok()) break;
    uint64_t rows = shards.front()->front();
    if (cut->kind != ParameterCut::Kind::kReplicated && cut->dimension == 0) {
      rows = 0;
      for (const std::optional<Shape>& shape : shards) {
        if (shape.has_value() && !shape->empty()) rows += std::min(shape->front(), kTensorBytesMax);
      }
    }
    info.padded_vocabulary = rows;
    break;
  }
  AddParallelFact(info, table_.index());
}

// What is in no name: where stages begin, and which layers a tied module stands in.
void DeepSpeedModel::AddPipelineFacts() {
  if (partitioned_ || states_.front().has_module) return;
  PipelineFacts facts;
  std::vector<std::optional<uint64_t>> first(pipeline_ranks_);
  for (uint32_t mp = 0; mp < ranks(); ++mp) {
    const uint32_t stage = mp / tensor_ranks_;
    for (const std::vector<NamedShape>& group : states_[mp].param_shapes) {
      for (const NamedShape& entry : group) {
        const std::optional<PipelineName> name = ParsePipelineName(entry.name);
        if (!name.has_value()) continue;
        if (name->layer.has_value()) {
          first[stage] = std::min(first[stage].value_or(*name->layer), *name->layer);
          continue;
        }
        std::vector<uint64_t>& stages = facts.tied[std::string(name->tied)].stages;
        if (stages.empty() || stages.back() != stage) stages.push_back(stage);
      }
    }
  }
  first[0] = 0;
  const auto known = [](const std::optional<uint64_t>& layer) { return layer.has_value(); };
  if (std::all_of(first.begin(), first.end(), known) &&
      std::is_sorted(first.begin(), first.end())) {
    for (const std::optional<uint64_t>& layer : first) facts.first_layers.push_back(*layer);
  }
  for (const auto& [key, layers] : tied_layers_) facts.tied[key].layers = layers;
  AddPipelineFact(facts, table_.index());
}

absl::Status DeepSpeedModel::FindDegrees() {
  const auto ranks = static_cast<uint32_t>(states_.size());
  const auto& said = states_.front().parallel_degrees;
  if (said.has_value() && said->second != 0 && said->second <= ranks &&
      said->first == ranks / said->second && ranks % said->second == 0) {
    tensor_ranks_ = static_cast<uint32_t>(said->second);
  } else if (said.has_value() && (said->first != 1 || said->second != 1)) {
    return absl::DataLossError(absl::StrFormat(
        "checkpoint_parallel_dimensions: pipeline %d, tensor %d, found model states of %d ranks",
        said->first, said->second, ranks));
  } else if (files_.layers.empty()) {
    tensor_ranks_ = ranks;
  } else {
    // As many files of a layer as there are tensor-parallel ranks.
    const uint32_t layer = files_.layers.begin()->first.layer;
    tensor_ranks_ = 0;
    for (const auto& [key, file] : files_.layers) tensor_ranks_ += key.layer == layer ? 1 : 0;
    if (tensor_ranks_ > ranks || ranks % tensor_ranks_ != 0) {
      return absl::DataLossError(absl::StrFormat(
          "layer %d has %d files, found model states of %d ranks", layer, tensor_ranks_, ranks));
    }
  }
  pipeline_ranks_ = ranks / tensor_ranks_;
  return absl::OkStatus();
}

absl::Status DeepSpeedModel::CollectShapes() {
  local_experts_.resize(states_.size());
  modules_.resize(states_.size());
  for (uint32_t mp = 0; mp < ranks(); ++mp) {
    const uint32_t stage = mp / tensor_ranks_;
    const auto add = [&](const std::string& name, const Shape& shape) {
      auto& by_rank = shapes_[name][stage];
      by_rank.resize(tensor_ranks_);
      by_rank[TensorRank(mp)] = shape;
    };
    const ModelStates& states = states_[mp];
    buffers_.insert(states.buffer_names.begin(), states.buffer_names.end());
    for (const auto& [alias, owner] : states.shared) {
      if (owners_.emplace(alias, owner).second) aliases_[owner].push_back(alias);
    }
    for (const NamedTensor& entry : states.module) {
      modules_[mp].emplace(entry.name, &entry.tensor);
      dtypes_.emplace(entry.name, entry.tensor.dtype);
      if (!partitioned_ && !buffers_.contains(entry.name)) add(entry.name, entry.tensor.shape);
    }
    for (const NamedShape& entry : states.frozen_shapes) add(entry.name, entry.shape);
    for (const std::vector<NamedShape>& group : states.param_shapes) {
      for (const NamedShape& entry : group) {
        const auto expert = ParseExpertName(entry.name);
        if (expert.has_value()) {
          uint64_t& count = local_experts_[mp][std::string(expert->prefix)];
          count = std::max(count, expert->number + 1);
        }
        add(entry.name, entry.shape);
        optimized_.insert(entry.name);
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<const ShardMap*> DeepSpeedModel::Shard(const std::string& parameter, uint32_t mp) {
  return ExpertShard(parameter, parameter, mp);
}

absl::StatusOr<const ShardMap*> DeepSpeedModel::ExpertShard(const std::string& local,
                                                            const std::string& global,
                                                            uint32_t mp) {
  const uint32_t stage = mp / tensor_ranks_;
  const auto known = shards_.find({global, stage});
  if (known != shards_.end()) return &known->second[TensorRank(mp)];
  const auto found = shapes_.find(local);
  if (found == shapes_.end() || !found->second.contains(stage)) {
    return absl::DataLossError(
        absl::StrFormat("\"%s\": found no shape of it on model-parallel rank %d", local, mp));
  }
  if (found->second.size() > 1 && !local.starts_with(kTiedModules) &&
      !rules_->PipelineReplicated(local)) {
    return absl::DataLossError(
        absl::StrFormat("\"%s\": found on %d pipeline stages; expected one, or a pattern in "
                        "pipeline_replicated_parameter_patterns that says that they share it",
                        local, found->second.size()));
  }
  std::vector<Shape> shapes;
  for (const std::optional<Shape>& shape : found->second.at(stage)) {
    if (!shape.has_value()) return NotEverywhere(local);
    shapes.push_back(*shape);
  }
  ASSIGN_OR_RETURN(std::vector<ShardMap> maps, rules_->Resolve(OwnerOf(local), shapes));
  const auto [made, inserted] = shards_.emplace(std::pair(global, stage), std::move(maps));
  return &made->second[TensorRank(mp)];
}

std::string DeepSpeedModel::OwnerOf(const std::string& name) const {
  const auto owner = owners_.find(name);
  return owner == owners_.end() ? name : owner->second;
}

std::vector<std::string> DeepSpeedModel::NamesOf(const std::string& owner) const {
  std::vector<std::string> names = {owner};
  if (const auto found = aliases_.find(owner); found != aliases_.end()) {
    names.insert(names.end(), found->second.begin(), found->second.end());
  }
  return names;
}

absl::Status DeepSpeedModel::AddRoundedWeights(const std::string& parameter) {
  const auto master = table_.Find(parameter, "fp32");
  const std::optional<Dtype> dtype = WeightDtype(parameter);
  if (!master.has_value() || !dtype.has_value()) return absl::OkStatus();
  for (const std::string& name : NamesOf(parameter)) {
    if (table_.Find(name, "param").has_value()) continue;
    RETURN_IF_ERROR(table_.AddRounded(name, "param", *dtype, *master));
  }
  return absl::OkStatus();
}

std::optional<Dtype> DeepSpeedModel::WeightDtype(const std::string& parameter) const {
  if (const auto found = dtypes_.find(parameter); found != dtypes_.end()) return found->second;
  if (const auto state = table_.Find(parameter, "param"); state.has_value()) {
    return table_.index().tensor_states[*state].dtype;
  }
  return DtypeFromName(states_.front().weight_dtype);
}

void DeepSpeedModel::NameParameterGroups() {
  using Json = nlohmann::ordered_json;
  // By number of the flat buffer, which param_shapes counts too; of all pipeline stages.
  std::vector<std::vector<std::string>> names(states_.front().param_shapes.size());
  std::set<std::string, std::less<>> seen;
  size_t bytes = 0;
  for (uint32_t mp = 0; mp < ranks(); ++mp) {
    const ModelStates& states = states_[mp];
    for (size_t g = 0; g < std::min(names.size(), states.param_shapes.size()); ++g) {
      const std::vector<NamedShape>& flat = states.param_shapes[g];
      uint64_t expert_ranks = 1;
      for (const NamedShape& entry : flat) {
        expert_ranks = std::max(expert_ranks, ExpertRanks(entry.name, mp, g));
      }
      // Round-robin gradients: param_shapes has the order of the flat buffer.
      const uint64_t sharers = states.dp_world_size / expert_ranks;
      const bool dealt =
          !partitioned_ && states.round_robin && sharers > 0 && sharers <= kZeroRanksMax;
      const std::vector<uint32_t> order = RoundRobinOrder(
          static_cast<uint32_t>(flat.size()), dealt ? static_cast<uint32_t>(sharers) : 1);
      std::vector<std::string> in_order(flat.size());
      for (size_t place = 0; place < flat.size(); ++place) {
        in_order[order[place]] = flat[place].name;
      }
      // A job has the experts of one layer together, whatever its ranks: layer by layer.
      for (size_t begin = 0, end = 0; begin < in_order.size(); begin = end) {
        const uint64_t sharing = ExpertRanks(in_order[begin], mp, g);
        const auto layer = PrefixOf(in_order[begin]);
        while (end < in_order.size() && PrefixOf(in_order[end]) == layer) ++end;
        for (uint32_t expert_rank = 0; expert_rank < sharing; ++expert_rank) {
          for (size_t i = begin; i < end; ++i) {
            std::string name = GlobalExpertName(in_order[i], mp, expert_rank);
            if ((bytes += name.size()) > kTextBytesMax) return;  // nor would the fact have room
            if (seen.insert(name).second) names[g].push_back(std::move(name));
          }
        }
      }
    }
  }
  std::vector<Fact>& facts = table_.index().scalars;
  auto fact = std::find_if(facts.begin(), facts.end(),
                           [](const Fact& each) { return each.name == "param_groups"; });
  Json groups = Json::array();
  if (fact != facts.end()) groups = Json::parse(fact->json, nullptr, /*allow_exceptions=*/false);
  if (!groups.is_array()) return;
  if (groups.empty()) {  // elastic checkpoints have the states only
    for (size_t g = 0; g < names.size(); ++g) {
      groups.push_back(Json::object({{"params", Json::array({g})}}));
    }
  }
  for (Json& group : groups) {
    if (!group.is_object() || !group.contains("params")) return;
    Json named = Json::array();
    for (const Json& number : group["params"]) {
      if (!number.is_number_unsigned() || number.get<uint64_t>() >= names.size()) return;
      for (const std::string& name : names[number.get<uint64_t>()]) named.push_back(name);
    }
    group["params"] = std::move(named);
  }
  std::string json = groups.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (json.size() > kTextBytesMax) return;
  if (fact == facts.end()) {
    facts.push_back({"param_groups", std::move(json)});
  } else {
    fact->json = std::move(json);
  }
}

bool DeepSpeedModel::IsPlaceholder(const std::string& name) const {
  return partitioned_ && !buffers_.contains(name);
}

absl::Status DeepSpeedModel::AddModule(uint32_t mp) {
  for (const NamedTensor& entry : states_[mp].module) {
    if (IsPlaceholder(entry.name)) continue;
    if (buffers_.contains(entry.name)) {
      // Ranks may count differently; the model has those of the first one.
      if (table_.Find(entry.name, "buffer").has_value()) continue;
      ASSIGN_OR_RETURN(const uint32_t state,
                       table_.State(entry.name, "buffer", entry.tensor.dtype, entry.tensor.shape));
      RETURN_IF_ERROR(table_.AddWhole(state, entry.tensor));
      continue;
    }
    ASSIGN_OR_RETURN(const ShardMap* shard, Shard(entry.name, mp));
    ASSIGN_OR_RETURN(const uint32_t state,
                     table_.State(entry.name, "param", entry.tensor.dtype, shard->shape));
    RETURN_IF_ERROR(table_.AddShard(state, *shard, entry.tensor));
  }
  return absl::OkStatus();
}

// A pipeline's modules are in files of their own, one for each layer and tensor-parallel rank. The
// optimizer's masters have the values of what it owns, too; buffers are nowhere else.
void DeepSpeedModel::NameMissingLayers(const std::set<std::string>& found_tied) {
  const bool has_masters = files_.universal || !files_.optimizers.empty();
  const auto say = [&](const std::string& what, bool is_partly_there,
                       const std::vector<std::string>& buffers) {
    if (!has_masters) {
      table_.index().losses.push_back(
          absl::StrCat(what, "; no file has masters of its weights either"));
    } else if (!buffers.empty() && !is_partly_there) {
      table_.index().losses.push_back(
          absl::StrCat(what, "; its buffers are nowhere else: ", absl::StrJoin(buffers, ", ")));
    } else {
      table_.index().repairs.push_back(
          absl::StrCat(what,
                       "; its weights are taken from their masters (frozen ones have none), but "
                       "DeepSpeed does not load the folder"));
    }
  };
  std::map<uint64_t, std::vector<std::string>> layers;  // and their buffers
  std::map<std::string, std::vector<std::string>> tied;
  const auto buffers_of = [&](const std::string& name) -> std::vector<std::string>* {
    const std::optional<PipelineName> parsed = ParsePipelineName(name);
    if (!parsed.has_value()) return nullptr;  // of no pipeline
    return parsed->layer.has_value() ? &layers[*parsed->layer] : &tied[std::string(parsed->tied)];
  };
  for (const std::string& name : optimized_) buffers_of(name);
  for (const std::string& name : buffers_) {
    if (std::vector<std::string>* const buffers = buffers_of(name)) buffers->push_back(name);
  }
  for (const auto& [layer, buffers] : layers) {
    std::vector<uint32_t> missing;
    for (uint32_t tp = 0; tp < tensor_ranks_; ++tp) {
      const LayerKey key{.layer = static_cast<uint32_t>(layer), .tp = tp};
      if (!files_.layers.contains(key)) missing.push_back(tp);
    }
    for (const uint32_t tp : missing) {
      say(absl::StrFormat("layer %d: expected its file of tensor-parallel rank %d, found none",
                          layer, tp),
          missing.size() < tensor_ranks_, buffers);
    }
  }
  for (const auto& [key, buffers] : tied) {
    if (found_tied.contains(key)) continue;
    say(absl::StrCat(kTiedModules, key, ": expected a file of its layer, found none"), false,
        buffers);
  }
}

absl::Status DeepSpeedModel::AddLayers() {
  const bool is_elsewhere = files_.universal || partitioned_ || states_.front().has_module;
  if (files_.layers.empty() && is_elsewhere) {
    return absl::OkStatus();
  }
  // Layer files have the names of their layer: `norm.weight` is `4.norm.weight` elsewhere, and what
  // is tied `tied_modules.<key>.weight`. Which layer is which key is told by their order.
  std::vector<TiedModule> tied;
  for (const ModelStates& states : states_) {
    for (const std::vector<NamedShape>& group : states.param_shapes) {
      for (const NamedShape& entry : group) {
        const std::optional<PipelineName> name = ParsePipelineName(entry.name);
        if (!name.has_value() || name->layer.has_value()) continue;
        const std::string key(name->tied);
        auto module = std::find_if(tied.begin(), tied.end(),
                                   [&key](const TiedModule& t) { return t.key == key; });
        if (module == tied.end()) module = tied.insert(tied.end(), {.key = key, .shapes = {}});
        module->shapes[std::string(name->rest)] = entry.shape;
      }
    }
  }
  std::set<std::string> used;
  for (auto at = files_.layers.begin(); at != files_.layers.end();) {
    const uint32_t layer = at->first.layer;
    std::vector<std::vector<NamedTensor>> on_ranks(tensor_ranks_);
    const uint32_t first = at->first.tp;
    uint32_t file_count = 0;
    for (; at != files_.layers.end() && at->first.layer == layer; ++at, ++file_count) {
      if (at->first.tp >= tensor_ranks_) {
        return absl::DataLossError(absl::StrFormat("%s: expected files of %d tensor-parallel ranks",
                                                   folder_.files()[at->second].path,
                                                   tensor_ranks_));
      }
      ASSIGN_OR_RETURN(on_ranks[at->first.tp], ReadStateDict(folder_, at->second, table_));
    }
    const std::vector<NamedTensor>& there = on_ranks[first];  // of the first rank with a file
    std::string prefix = absl::StrCat(layer, ".");
    const bool plain = std::any_of(there.begin(), there.end(), [&](const NamedTensor& entry) {
      return shapes_.contains(prefix + entry.name);
    });
    if (!plain) {
      const auto fits = [&there](const TiedModule& module) {
        return !module.shapes.empty() &&
               std::all_of(module.shapes.begin(), module.shapes.end(), [&](const auto& entry) {
                 return std::any_of(there.begin(), there.end(), [&](const NamedTensor& tensor) {
                   return tensor.name == entry.first && tensor.tensor.shape == entry.second;
                 });
               });
      };
      const TiedModule* match = nullptr;
      for (const TiedModule& module : tied) {
        if (fits(module) &&
            (match == nullptr || (used.contains(match->key) && !used.contains(module.key)))) {
          match = &module;
        }
      }
      if (match != nullptr) {
        prefix = absl::StrCat(kTiedModules, match->key, ".");
        used.insert(match->key);
        tied_layers_[match->key].push_back(layer);
      }
    }
    for (const NamedTensor& entry : there) {
      const std::string name = prefix + entry.name;
      if (buffers_.contains(name)) {
        if (table_.Find(name, "buffer").has_value()) continue;
        ASSIGN_OR_RETURN(const uint32_t state,
                         table_.State(name, "buffer", entry.tensor.dtype, entry.tensor.shape));
        RETURN_IF_ERROR(table_.AddWhole(state, entry.tensor));
        continue;
      }
      if (file_count < tensor_ranks_) continue;  // NameMissingLayers() says so
      std::vector<Shape> shapes;
      std::vector<const StoredTensor*> tensors;
      for (const std::vector<NamedTensor>& of_rank : on_ranks) {
        for (const NamedTensor& other : of_rank) {
          if (other.name == entry.name) {
            shapes.push_back(other.tensor.shape);
            tensors.push_back(&other.tensor);
          }
        }
      }
      if (tensors.size() != tensor_ranks_) return NotEverywhere(name);
      ASSIGN_OR_RETURN(const std::vector<ShardMap> maps, rules_->Resolve(name, shapes));
      ASSIGN_OR_RETURN(const uint32_t state,
                       table_.State(name, "param", entry.tensor.dtype, maps[0].shape));
      for (uint32_t tp = 0; tp < tensor_ranks_; ++tp) {
        RETURN_IF_ERROR(table_.AddShard(state, maps[tp], *tensors[tp]));
      }
    }
  }
  NameMissingLayers(used);
  return absl::OkStatus();
}

absl::Status DeepSpeedModel::AddFrozenFragments() {
  if (!partitioned_) return absl::OkStatus();
  ASSIGN_OR_RETURN(const RankKey counts,
                   DeepSpeedFiles::Counts(files_.partitioned_models, "model states"));
  for (uint32_t mp = 0; mp < ranks(); ++mp) {
    if (states_[mp].frozen_shapes.empty()) continue;
    std::map<std::string, uint64_t> elements;
    for (const NamedShape& entry : states_[mp].frozen_shapes) {
      ASSIGN_OR_RETURN(elements[entry.name], ElementCount(entry.shape, entry.name));
    }
    for (uint32_t dp = 0; dp < counts.dp; ++dp) {
      std::optional<ModelStates> other;
      if (dp > 0) {
        ASSIGN_OR_RETURN(
            other, ReadModelStates(folder_, files_.partitioned_models.at({.mp = mp, .dp = dp}),
                                   ShowFacts::kNo, table_));
      }
      for (const NamedTensor& entry : (dp > 0 ? *other : states_[mp]).frozen_fragments) {
        const auto size = elements.find(entry.name);
        if (size == elements.end()) {
          return absl::DataLossError(absl::StrFormat(
              "\"%s\": a fragment of it, and no shape in frozen_param_shapes", entry.name));
        }
        ASSIGN_OR_RETURN(const ShardMap* shard, Shard(entry.name, mp));
        ASSIGN_OR_RETURN(const uint32_t state,
                         table_.State(entry.name, "param", entry.tensor.dtype, shard->shape));
        ASSIGN_OR_RETURN(const PartitionedParameters parts,
                         PartitionedParameters::Create({size->second}, counts.dp));
        for (const FlatRun& run : parts.Partition(dp)) {
          RETURN_IF_ERROR(
              table_.AddShardRange(state, *shard, run.parameter_begin, entry.tensor, 0, run.count));
        }
      }
    }
  }
  return absl::OkStatus();
}

absl::Status DeepSpeedModel::AddWeights() {
  for (uint32_t mp = 0; mp < ranks(); ++mp) RETURN_IF_ERROR(AddModule(mp));
  RETURN_IF_ERROR(AddLayers());
  AddPipelineFacts();
  RETURN_IF_ERROR(AddExperts());
  NameMissingExperts();
  NameMissingExpertOptimizers();
  return AddFrozenFragments();
}

void DeepSpeedModel::AddAliases() {
  for (const auto& [alias, owner] : owners_) {
    const auto state = table_.Find(alias, "param");
    const auto of = table_.Find(owner, "param");
    if (state.has_value() && of.has_value()) {
      table_.AddAlias(*state, *of);
    } else if (!of.has_value()) {
      table_.index().notes.push_back(absl::StrFormat(
          "\"%s\" is tied to \"%s\", which the checkpoint does not hold%s", alias, owner,
          state.has_value() ? "; its weights are here under the other name only" : ""));
    }
  }
}

}  // namespace holdfast::converter
