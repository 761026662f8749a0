#include "converter/deepspeed_ranks.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/pipeline_stages.h"
#include "converter/shard_ranges.h"

namespace holdfast::converter {
namespace {

constexpr double kInfoVersion = 0.4;

// The last of those that begin at or before the layer.
uint64_t StageOf(uint64_t layer, std::span<const uint64_t> first_layers) {
  const auto after = std::ranges::upper_bound(first_layers, layer);
  return static_cast<uint64_t>(after - first_layers.begin()) - 1;
}

}  // namespace

absl::StatusOr<DeepSpeedRanks> DeepSpeedRanks::Create(const DeepSpeedOutput& output,
                                                      const DeepSpeedDegrees& degrees) {
  DeepSpeedRanks ranks(output);
  if (!degrees.tensor.has_value() && !degrees.pipeline.has_value()) return ranks;
  ranks.tensor_ranks_ = degrees.tensor.value_or(1);
  ranks.stages_ = degrees.pipeline.value_or(1);
  ranks.pipeline_ = degrees.pipeline.has_value();
  ranks.says_info_ = true;
  CHECK(ranks.tensor_ranks_ > 0 && ranks.stages_ > 0);
  ASSIGN_OR_RETURN(const LayoutFile layout, ParseLayoutFile(degrees.layout));
  ASSIGN_OR_RETURN(ParallelInfo info, ParallelInfoToWrite(output.index(), degrees.preset, layout));
  const absl::Status cut = ranks.CutAll(std::move(info));
  if (!cut.ok()) {
    return absl::Status(cut.code(),
                        absl::StrFormat("--to tp=%d: %s", ranks.tensor_ranks_, cut.message()));
  }
  if (!ranks.pipeline_) return ranks;
  const absl::Status placed = ranks.PlaceLayers(layout);
  if (!placed.ok()) {
    return absl::Status(placed.code(),
                        absl::StrFormat("--to pp=%d: %s", ranks.stages_, placed.message()));
  }
  return ranks;
}

absl::Status DeepSpeedRanks::CutAll(ParallelInfo info) {
  ASSIGN_OR_RETURN(const ParallelRules rules, ParallelRules::Create(std::move(info)));
  const ForeignIndex& index = output_.index();
  for (const uint32_t number : output_.weights()) {
    const uint32_t owner = output_.OwnerOf(number);
    const TensorState& state = index.tensor_states[owner];
    if (output_.IsBuffer(number) || cuts_.contains(owner)) continue;
    const bool vocabulary = rules.IsVocabulary(state.tensor);
    if (tensor_ranks_ == 1 && !vocabulary) continue;
    ASSIGN_OR_RETURN(ParameterCut cut, rules.Cut(state.tensor, state.shape, tensor_ranks_));
    if (vocabulary) {
      const uint64_t padded = cut.kind != ParameterCut::Kind::kReplicated && cut.dimension == 0
                                  ? cut.shard_shape[0] * tensor_ranks_
                                  : cut.shard_shape[0];
      if (vocabulary_rows_.value_or(state.shape[0]) != state.shape[0]) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: DeepSpeed's files have one size of a vocabulary, and another parameter has %d "
            "rows without padding",
            Describe(state), *vocabulary_rows_));
      }
      vocabulary_rows_ = state.shape[0];
      padded_rows_ = padded;
    }
    cuts_.emplace(owner, std::move(cut));
  }
  return absl::OkStatus();
}

absl::Status DeepSpeedRanks::PlaceLayers(const LayoutFile& layout) {
  const ForeignIndex& index = output_.index();
  ASSIGN_OR_RETURN(const PipelineFacts facts, PipelineFactsOf(index));
  ASSIGN_OR_RETURN(const std::vector<uint64_t> first_layers, FirstLayers(layout, facts));
  // A stage may begin with the use of a tied module, which has no name to tell it.
  const bool of_source = layout.stages.empty() && stages_ > 1 && first_layers == facts.first_layers;
  std::map<uint64_t, Layer> layers;
  std::set<uint64_t> tied_layers, numbered;
  for (const uint32_t weight : output_.weights()) {
    const TensorState& state = index.tensor_states[weight];
    const std::optional<PipelineName> name = ParsePipelineName(state.tensor);
    CHECK(name.has_value());  // FirstLayers has seen all
    const auto add = [&](uint64_t layer) {
      Layer& file = layers[layer];
      file.number = layer;
      file.weights.emplace_back(name->rest, weight);
    };
    if (name->layer.has_value()) {
      numbered.insert(*name->layer);
      add(*name->layer);
      stages_of_[weight] = {StageOf(*name->layer, first_layers)};
      continue;
    }
    const std::string key(name->tied);
    const auto said = layout.tied.find(key);
    const auto fact = facts.tied.find(key);
    std::vector<uint64_t> files = said != layout.tied.end()  ? said->second
                                  : fact != facts.tied.end() ? fact->second.layers
                                                             : std::vector<uint64_t>();
    std::vector<uint64_t> on;
    if (of_source && fact != facts.tied.end()) {
      on = fact->second.stages;
    } else if (said != layout.tied.end() || stages_ == 1) {
      for (const uint64_t layer : files) on.push_back(StageOf(layer, first_layers));
    }
    if (files.empty() || on.empty() || *std::ranges::max_element(on) >= stages_) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: the source does not say which layers use this tied module; a layout file does: "
          "{\"pipeline\": {\"tied\": {\"%s\": [0, 9]}}}",
          Describe(state), key));
    }
    for (const uint64_t layer : files) add(layer);
    tied_layers.insert(files.begin(), files.end());
    stages_of_[weight] = on;
    if (std::set<uint64_t>(on.begin(), on.end()).size() > 1 &&
        std::ranges::find(replicated_keys_, key) == replicated_keys_.end()) {
      replicated_keys_.push_back(key);
    }
  }
  for (const uint64_t layer : tied_layers) {
    if (!numbered.contains(layer)) continue;
    return absl::FailedPreconditionError(absl::StrFormat(
        "layer %d is said to be a tied module's, and has parameters of its own", layer));
  }
  for (auto& [number, layer] : layers) layers_.push_back(std::move(layer));
  for (const uint32_t weight : output_.weights()) {
    const uint32_t owner = output_.OwnerOf(weight);
    if (stages_of_[owner] == stages_of_[weight]) continue;
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: is tied to \"%s\" on another stage: what stages share is a tied module of both, "
        "called tied_modules.<key>.<name>",
        Describe(index.tensor_states[weight]), index.tensor_states[owner].tensor));
  }
  return CheckStages();
}

absl::StatusOr<std::vector<uint64_t>> DeepSpeedRanks::FirstLayers(
    const LayoutFile& layout, const PipelineFacts& facts) const {
  const ForeignIndex& index = output_.index();
  std::vector<uint64_t> weights;  // trained elements by layer
  std::map<std::string, uint64_t> of_tied;
  for (const uint32_t weight : output_.weights()) {
    const TensorState& state = index.tensor_states[weight];
    const std::optional<PipelineName> name = ParsePipelineName(state.tensor);
    if (!name.has_value()) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: a pipeline's tensors are called <layer>.<name> or tied_modules.<key>.<name>, with "
          "layers numbered from 0 to %d; --rename FILE gives them such names",
          Describe(state), kPipelineLayersMax - 1));
    }
    const bool trained = output_.groups().empty() || output_.IsTrained(state.tensor);
    if (output_.IsBuffer(weight) || !trained) continue;
    if (name->layer.has_value()) {
      if (weights.size() <= *name->layer) weights.resize(*name->layer + 1);
      weights[*name->layer] += ElementCount(weight);
    } else {
      of_tied[std::string(name->tied)] += ElementCount(weight);
    }
  }
  if (!layout.stages.empty()) {
    if (layout.stages.size() == stages_) return layout.stages;
    return absl::FailedPreconditionError(
        absl::StrFormat("expected as many first layers in the layout file's \"stages\", found %d",
                        layout.stages.size()));
  }
  if (stages_ == 1) return std::vector<uint64_t>{0};
  if (facts.first_layers.size() == stages_ && facts.first_layers.front() == 0) {
    return facts.first_layers;
  }
  for (const auto& [key, elements] : of_tied) {
    const auto said = layout.tied.find(key);
    if (said == layout.tied.end()) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "the source does not say which layers use the tied module \"%s\", which stages are "
          "balanced by; a layout file does: {\"pipeline\": {\"tied\": {\"%s\": [0, 9]}}}",
          key, key));
    }
    for (const uint64_t layer : said->second) {
      if (weights.size() <= layer) weights.resize(layer + 1);
      weights[layer] += elements;
    }
  }
  return BalancedStages(weights, stages_);
}

// Whether every stage has something to train: DeepSpeed's optimizers have no empty ranks.
absl::Status DeepSpeedRanks::CheckStages() const {
  std::set<uint64_t> met;
  const bool trained = !output_.groups().empty();
  for (const uint32_t weight : output_.weights()) {
    if (trained && !output_.IsTrained(output_.index().tensor_states[weight].tensor)) continue;
    const std::vector<uint64_t>& on = stages_of_.at(weight);
    met.insert(on.begin(), on.end());
  }
  for (uint64_t stage = 0; stage < stages_; ++stage) {
    if (met.contains(stage)) continue;
    return absl::FailedPreconditionError(absl::StrFormat(
        "stage %d would have no parameters%s: fewer stages, or other ones (\"stages\" of a layout "
        "file)",
        stage, trained ? " to train" : ""));
  }
  return absl::OkStatus();
}

const ParameterCut* DeepSpeedRanks::CutOf(uint32_t weight) const {
  const auto cut = cuts_.find(output_.OwnerOf(weight));
  return cut == cuts_.end() ? nullptr : &cut->second;
}

bool DeepSpeedRanks::Has(uint32_t weight, uint64_t stage) const {
  if (!pipeline_) return true;
  return std::ranges::find(stages_of_.at(weight), stage) != stages_of_.at(weight).end();
}

const std::vector<uint64_t>& DeepSpeedRanks::ShapeOf(uint32_t weight) const {
  const ParameterCut* cut = CutOf(weight);
  return cut == nullptr ? output_.index().tensor_states[weight].shape : cut->shard_shape;
}

uint64_t DeepSpeedRanks::ElementCount(uint32_t weight) const { return Product(ShapeOf(weight)); }

void DeepSpeedRanks::Append(uint32_t weight, uint32_t tensor_state, uint64_t tensor_rank,
                            uint64_t begin, uint64_t end, std::vector<ElementRange>& ranges) const {
  const ParameterCut* cut = CutOf(weight);
  if (cut == nullptr) {
    ranges.push_back({.tensor_state = tensor_state, .begin = begin, .end = end});
  } else {
    AppendShard(cut->maps[tensor_rank], tensor_state, begin, end, ranges);
  }
}

void DeepSpeedRanks::Push(uint32_t weight, uint64_t tensor_rank, TorchDraft& draft,
                          Storages& storages) const {
  const uint32_t owner = output_.OwnerOf(weight);
  if (CutOf(weight) == nullptr) return draft.Whole(owner);
  auto known = storages.find(owner);
  if (known == storages.end()) {
    std::vector<ElementRange> ranges;
    Append(owner, owner, tensor_rank, 0, ElementCount(owner), ranges);
    const Dtype dtype = output_.index().tensor_states[owner].dtype;
    known = storages.emplace(owner, draft.Buffer(dtype, std::move(ranges))).first;
  }
  draft.ViewOf(known->second, ShapeOf(owner), 0);
}

void DeepSpeedRanks::PushInfo(TorchDraft& draft) const {
  using Kind = ParameterCut::Kind;
  using Names = std::vector<std::string>;
  TorchPickle& pickle = draft.pickle();
  Names replicated, rows, first, vocabulary, tied;
  // One pattern for each class: of a list in which one fits no optimized parameter ds_to_universal
  // makes an error, and frozen parameters have no list of their own.
  std::map<std::tuple<Shape, size_t, std::vector<uint64_t>>, Names> parts;
  for (const uint32_t number : output_.weights()) {
    const ParameterCut* cut = CutOf(number);
    if (cut == nullptr) continue;
    const std::string& name = output_.index().tensor_states[number].tensor;
    if (cut->vocabulary) vocabulary.push_back(name);
    if (tensor_ranks_ == 1) continue;
    if (cut->kind == Kind::kReplicated) {
      replicated.push_back(name);
    } else if (cut->kind == Kind::kJoined && cut->dimension <= 1) {
      (cut->dimension == 0 ? first : rows).push_back(name);
    } else {
      const Shape& whole = output_.index().tensor_states[number].shape;
      const std::vector<uint64_t> sizes =
          cut->sizes.empty() ? std::vector<uint64_t>{whole[cut->dimension]} : cut->sizes;
      parts[{whole, cut->dimension, sizes}].push_back(name);
    }
  }
  // What no pattern names is cut along dimension 0, but only beside others that are named.
  if (replicated.empty() && rows.empty() && parts.empty() && vocabulary.empty()) {
    for (const uint32_t number : output_.weights()) {
      const TensorState& state = output_.index().tensor_states[number];
      if (std::ranges::find(first, state.tensor) == first.end()) continue;
      parts[{state.shape, 0, {state.shape[0]}}].push_back(state.tensor);
    }
  }
  for (const std::string& key : replicated_keys_) {
    tied.push_back(ExactPrefix(absl::StrCat(kTiedModules, key, ".")));
  }
  const auto list = [&](const char* key, const Names& patterns) {
    draft.Key(key);
    pickle.List([&] {
      for (const std::string& pattern : patterns) draft.out().String(pattern);
    });
  };
  const auto one_pattern = [&](const char* key, const Names& names) {
    list(key, names.empty() ? Names() : Names{ExactPattern(names)});
  };
  pickle.Dict([&] {
    draft.Key("universal_checkpoint_version");
    draft.out().Float(kInfoVersion);
    one_pattern("tp_replicated_parameter_patterns", replicated);
    one_pattern("parameter_with_row_parallelism_patterns", rows);
    one_pattern("vocabulary_parameter_patterns", vocabulary);
    list("pipeline_replicated_parameter_patterns", tied);
    draft.Key("parameter_with_sub_params");
    pickle.List([&] {
      for (const auto& [of, names] : parts) {
        const auto& [shape, dimension, sizes] = of;
        pickle.Dict([&] {
          list("patterns", {ExactPattern(names)});
          draft.Key("shape");
          draft.out().Mark();
          for (size_t d = 0; d < shape.size(); ++d) {
            if (d == dimension) {
              pickle.Tuple(sizes);
            } else {
              draft.out().Int(static_cast<int64_t>(shape[d]));
            }
          }
          draft.out().Tuple();
          draft.Key("partition_dim");
          draft.out().Int(static_cast<int64_t>(dimension));
        });
      }
    });
    draft.Key("sub_param_shard_widths");
    pickle.Dict([&] {
      for (const auto& [of, names] : parts) {
        draft.Key(ExactPattern(names));
        pickle.List([&] {
          for (const uint64_t size : std::get<2>(of)) {
            pickle.Ints(std::vector<uint64_t>(tensor_ranks_, size / tensor_ranks_));
          }
        });
      }
    });
    if (vocabulary_rows_.has_value()) {
      draft.Key("original_vocab_size");
      draft.out().Int(static_cast<int64_t>(*vocabulary_rows_));
      draft.Key("padded_vocab_size");
      draft.out().Int(static_cast<int64_t>(padded_rows_));
    }
  });
}

}  // namespace holdfast::converter
