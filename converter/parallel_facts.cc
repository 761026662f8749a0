#include "converter/parallel_facts.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

using Json = nlohmann::ordered_json;

// The lists of patterns, by DeepSpeed's words (checkpoint/constants.py).
struct PatternList {
  const char* key;
  std::vector<std::string> ParallelInfo::*patterns;
};
constexpr PatternList kPatternLists[] = {
    {"vocabulary_parameter_patterns", &ParallelInfo::vocabulary},
    {"tp_replicated_parameter_patterns", &ParallelInfo::replicated},
    {"parameter_to_average_patterns", &ParallelInfo::averaged},
    {"parameter_with_row_parallelism_patterns", &ParallelInfo::row},
    {"parameter_with_2_sub_params_cat_dim_0", &ParallelInfo::two_sub_parameters},
    {"pipeline_replicated_parameter_patterns", &ParallelInfo::pipeline_replicated},
};

// At most one of a name; an index that somebody else has made may hold anything.
absl::StatusOr<Json> FactOf(const ForeignIndex& index, std::string_view name) {
  for (const Fact& fact : index.scalars) {
    if (fact.name != name) continue;
    Json json = Json::parse(fact.json, nullptr, /*allow_exceptions=*/false);
    if (json.is_object()) return json;
    return absl::FailedPreconditionError(
        absl::StrFormat("%s: expected an object, found other JSON", std::string(name)));
  }
  return Json::object();
}

absl::Status Malformed(std::string_view fact, std::string_view what) {
  return absl::FailedPreconditionError(absl::StrFormat("%s: %s is not what was expected there",
                                                       std::string(fact), std::string(what)));
}

std::optional<std::vector<uint64_t>> Numbers(const Json& list) {
  if (!list.is_array()) return std::nullopt;
  std::vector<uint64_t> numbers;
  for (const Json& each : list) {
    if (!each.is_number_unsigned()) return std::nullopt;
    numbers.push_back(each.get<uint64_t>());
  }
  return numbers;
}

std::optional<std::vector<std::string>> Strings(const Json& list) {
  if (!list.is_array()) return std::nullopt;
  std::vector<std::string> strings;
  for (const Json& each : list) {
    if (!each.is_string()) return std::nullopt;
    strings.push_back(each.get<std::string>());
  }
  return strings;
}

Json ToJson(const SubParameters& rule) {
  Json shape = rule.shape;
  if (!rule.sizes.empty()) shape[rule.dimension] = rule.sizes;
  return {{"patterns", rule.patterns}, {"shape", shape}, {"partition_dim", rule.dimension}};
}

std::optional<SubParameters> SubParametersOf(const Json& json) {
  if (!json.is_object() || !json.contains("patterns") || !json.contains("shape") ||
      !json.contains("partition_dim")) {
    return std::nullopt;
  }
  SubParameters rule;
  std::optional<std::vector<std::string>> patterns = Strings(json["patterns"]);
  const Json& shape = json["shape"];
  if (!patterns.has_value() || !shape.is_array() || shape.size() > kTensorDimsMax ||
      !json["partition_dim"].is_number_unsigned() ||
      json["partition_dim"].get<uint64_t>() >= shape.size()) {
    return std::nullopt;
  }
  rule.patterns = *std::move(patterns);
  rule.dimension = json["partition_dim"].get<size_t>();
  for (size_t d = 0; d < shape.size(); ++d) {
    if (shape[d].is_number_integer()) {
      rule.shape.push_back(shape[d].get<int64_t>());
      continue;
    }
    std::optional<std::vector<uint64_t>> sizes = Numbers(shape[d]);
    if (!sizes.has_value() || d != rule.dimension) return std::nullopt;
    rule.shape.push_back(-1);  // the sizes count
    rule.sizes = *std::move(sizes);
  }
  return rule;
}

void Put(const char* name, const Json& json, ForeignIndex& index) {
  std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() <= kTextBytesMax) index.scalars.push_back({name, std::move(text)});
}

}  // namespace

void AddParallelFact(const ParallelInfo& info, ForeignIndex& index) {
  Json json = Json::object();
  json["universal_checkpoint_version"] = info.version;
  for (const PatternList& list : kPatternLists) {
    if (!(info.*list.patterns).empty()) json[list.key] = info.*list.patterns;
  }
  for (const SubParameters& rule : info.sub_parameters) {
    json["parameter_with_sub_params"].push_back(ToJson(rule));
  }
  if (info.original_vocabulary.has_value()) json["original_vocab_size"] = *info.original_vocabulary;
  if (info.padded_vocabulary.has_value()) json["padded_vocab_size"] = *info.padded_vocabulary;
  for (const auto& [pattern, reason] : info.unsupported) {
    json["autotp_unsupported_parameter_patterns"][pattern] = reason;
  }
  Put(kParallelInfoFact, json, index);
}

void AddPipelineFact(const PipelineFacts& facts, ForeignIndex& index) {
  Json json = {{"stages", facts.first_layers}, {"tied", Json::object()}};
  for (const auto& [key, tied] : facts.tied) {
    json["tied"][key] = {{"layers", tied.layers}, {"stages", tied.stages}};
  }
  Put(kPipelineFact, json, index);
}

absl::StatusOr<ParallelInfo> ParallelInfoOf(const ForeignIndex& index) {
  absl::StatusOr<Json> json = FactOf(index, kParallelInfoFact);
  if (!json.ok()) return json.status();
  ParallelInfo info;
  for (const PatternList& list : kPatternLists) {
    const auto found = json->find(list.key);
    if (found == json->end()) continue;
    std::optional<std::vector<std::string>> patterns = Strings(*found);
    if (!patterns.has_value()) return Malformed(kParallelInfoFact, list.key);
    info.*list.patterns = *std::move(patterns);
  }
  for (const Json& each : json->value("parameter_with_sub_params", Json::array())) {
    std::optional<SubParameters> rule = SubParametersOf(each);
    if (!rule.has_value()) return Malformed(kParallelInfoFact, "parameter_with_sub_params");
    info.sub_parameters.push_back(*std::move(rule));
  }
  const auto number = [&](const char* key, std::optional<uint64_t>& value) {
    const auto found = json->find(key);
    if (found != json->end() && found->is_number_unsigned()) value = found->get<uint64_t>();
  };
  number("original_vocab_size", info.original_vocabulary);
  number("padded_vocab_size", info.padded_vocabulary);
  const Json unsupported = json->value("autotp_unsupported_parameter_patterns", Json::object());
  for (const auto& [pattern, reason] : unsupported.items()) {
    info.unsupported.emplace_back(pattern, reason.is_string() ? reason.get<std::string>() : "");
  }
  return info;
}

absl::StatusOr<PipelineFacts> PipelineFactsOf(const ForeignIndex& index) {
  absl::StatusOr<Json> json = FactOf(index, kPipelineFact);
  if (!json.ok()) return json.status();
  PipelineFacts facts;
  std::optional<std::vector<uint64_t>> stages = Numbers(json->value("stages", Json::array()));
  if (!stages.has_value() || !std::ranges::is_sorted(*stages)) {
    return Malformed(kPipelineFact, "stages");
  }
  facts.first_layers = *std::move(stages);
  const Json tied = json->value("tied", Json::object());
  for (const auto& [key, each] : tied.items()) {
    std::optional<std::vector<uint64_t>> layers, of_stages;
    if (each.is_object()) {
      layers = Numbers(each.value("layers", Json()));
      of_stages = Numbers(each.value("stages", Json()));
    }
    if (!layers.has_value() || !of_stages.has_value()) return Malformed(kPipelineFact, key);
    facts.tied[key] = {.layers = *std::move(layers), .stages = *std::move(of_stages)};
  }
  return facts;
}

absl::StatusOr<ParallelInfo> ParallelInfoToWrite(const ForeignIndex& index,
                                                 const std::string& preset,
                                                 const LayoutFile& layout) {
  ASSIGN_OR_RETURN(ParallelInfo info, ParallelInfoOf(index));
  if (!preset.empty()) {
    ASSIGN_OR_RETURN(ParallelInfo of_family, ParallelPreset(preset));
    if (!info.NamesShards()) info = std::move(of_family);
  }
  info.rules = layout.rules;
  return info;
}

void ForgetParallelFacts(ForeignIndex& index) {
  std::erase_if(index.scalars, [](const Fact& fact) {
    return fact.name == kParallelInfoFact || fact.name == kPipelineFact;
  });
}

}  // namespace holdfast::converter
