#include "converter/optimizer_groups.h"

#include <algorithm>
#include <array>
#include <compare>
#include <map>
#include <optional>
#include <unordered_set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<std::string_view, 6> kModelStates = {"param", "buffer", "tensor",
                                                          "other", "ema",    "rng"};

// "param_groups", or with something and a dot before it.
bool IsGroupList(std::string_view name) {
  return name == kParamGroups || name.ends_with(std::string(".") + kParamGroups);
}

struct GroupKey {
  std::string_view prefix;
  size_t group = 0;
  std::string_view key;
};

// "optim.param_groups.0.lr".
std::optional<GroupKey> ParseGroupKey(std::string_view name) {
  constexpr std::string_view kWord = "param_groups.";
  const size_t at = name.find(kWord);
  if (at == std::string_view::npos || (at > 0 && name[at - 1] != '.')) return std::nullopt;
  const std::string_view rest = name.substr(at + kWord.size());
  const size_t dot = rest.find('.');
  GroupKey key{.prefix = name.substr(0, at), .group = 0, .key = {}};
  if (dot == std::string_view::npos || dot == 0 ||
      !absl::SimpleAtoi(std::string(rest.substr(0, dot)), &key.group) ||
      key.group >= kOptimizerGroupsMax) {
    return std::nullopt;
  }
  key.key = rest.substr(dot + 1);
  return key;
}

Json Parsed(const std::string& json) {
  return Json::parse(json, nullptr, /*allow_exceptions=*/false);
}

OptimizerGroup GroupOf(const Json& json) {
  OptimizerGroup group;
  group.values = Json::object();
  for (const auto& [key, value] : json.items()) {
    // Named optimizers of PyTorch have the names beside the numbers.
    if (key == "params" || key == "param_names") {
      for (const Json& each : value) {
        if (each.is_string()) group.parameters.push_back(each.get<std::string>());
      }
    } else {
      group.values[key] = value;
    }
  }
  return group;
}

// What the scalars tell; of several optimizers the first one.
std::vector<OptimizerGroup> ToldGroups(const ForeignIndex& index) {
  for (const Fact& fact : index.scalars) {
    if (!IsGroupList(fact.name)) continue;
    const Json list = Parsed(fact.json);
    if (!list.is_array() || list.size() > kOptimizerGroupsMax) continue;
    std::vector<OptimizerGroup> groups;
    for (const Json& each : list) {
      if (!each.is_object()) break;
      groups.push_back(GroupOf(each));
    }
    if (!groups.empty() && groups.size() == list.size()) return groups;
  }
  std::optional<std::string_view> prefix;
  std::map<size_t, Json> by_number;
  for (const Fact& fact : index.scalars) {
    const std::optional<GroupKey> key = ParseGroupKey(fact.name);
    if (!key.has_value() || (prefix.has_value() && *prefix != key->prefix)) continue;
    prefix = key->prefix;
    Json& group = by_number.try_emplace(key->group, Json::object()).first->second;
    group[std::string(key->key)] = Parsed(fact.json);
  }
  std::vector<OptimizerGroup> groups;
  for (const auto& [number, json] : by_number) groups.push_back(GroupOf(json));
  return groups;
}

// Megatron's groups have no names. Its rule (megatron/core/optimizer:
// get_standard_config_overrides): vectors and biases without weight decay, everything else with it;
// what expert parallelism spreads is apart. Of all optimizers, of all ranks.
struct MegatronKey {
  bool decays = true;
  bool of_experts = false;
  friend auto operator<=>(const MegatronKey&, const MegatronKey&) = default;
};

// Nothing, unless the groups are Megatron's and no two have the same key.
std::map<MegatronKey, OptimizerGroup> MegatronGroups(const ForeignIndex& index) {
  std::map<MegatronKey, OptimizerGroup> groups;
  for (const Fact& fact : index.scalars) {
    Json list;
    if (IsGroupList(fact.name)) list = Parsed(fact.json);
    if (fact.name.find(".optimizer/shard_") != std::string::npos) {  // of dp_reshardable
      const Json object = Parsed(fact.json);
      if (object.is_object()) list = object.value(kParamGroups, Json());
    }
    if (!list.is_array()) continue;
    for (const Json& each : list) {
      if (!each.is_object() || !each.value("wd_mult", Json()).is_number() ||
          !each.value("is_expert_parallel", Json()).is_boolean()) {
        return {};
      }
      const MegatronKey key{.decays = each["wd_mult"] != 0,
                            .of_experts = each["is_expert_parallel"].get<bool>()};
      OptimizerGroup group = GroupOf(each);
      const auto [place, is_new] = groups.emplace(key, group);
      if (!is_new && place->second.values != group.values) return {};
    }
  }
  return groups;
}

// The parameters in Megatron's groups; nothing if one of them fits none.
std::vector<OptimizerGroup> NamedByMegatronsRule(const ForeignIndex& index,
                                                 const std::vector<std::string>& optimized) {
  std::map<MegatronKey, OptimizerGroup> groups = MegatronGroups(index);
  if (groups.empty()) return {};
  std::map<std::string_view, size_t> dims;
  for (const TensorState& state : index.tensor_states) {
    size_t& most = dims[state.tensor];
    most = std::max(most, state.shape.size());
  }
  const bool apart = std::any_of(groups.begin(), groups.end(),
                                 [](const auto& group) { return group.first.of_experts; });
  for (const std::string& name : optimized) {
    const bool of_experts = name.find(".experts.") != std::string::npos;
    const auto group = groups.find(
        {.decays = dims[name] > 1 && !name.ends_with(".bias"), .of_experts = apart && of_experts});
    if (group == groups.end()) return {};
    group->second.parameters.push_back(name);
  }
  std::vector<OptimizerGroup> named;
  for (auto group = groups.rbegin(); group != groups.rend(); ++group) {  // with decay first
    named.push_back(std::move(group->second));
  }
  return named;
}

}  // namespace

bool IsOptimizerState(std::string_view state) {
  return std::find(kModelStates.begin(), kModelStates.end(), state) == kModelStates.end();
}

bool IsWeightState(std::string_view state) { return !IsOptimizerState(state) && state != "rng"; }

absl::StatusOr<std::vector<OptimizerGroup>> OptimizerGroupsOf(const ForeignIndex& index) {
  std::vector<std::string> optimized;  // in the order of the index
  std::unordered_set<std::string_view> seen;
  for (const TensorState& state : index.tensor_states) {
    if (IsOptimizerState(state.state) && seen.insert(state.tensor).second) {
      optimized.push_back(state.tensor);
    }
  }
  if (optimized.empty()) return std::vector<OptimizerGroup>();
  std::vector<OptimizerGroup> groups = ToldGroups(index);
  std::unordered_set<std::string_view> left(optimized.begin(), optimized.end());
  for (OptimizerGroup& group : groups) {
    std::erase_if(group.parameters, [&](const std::string& name) { return left.erase(name) == 0; });
  }
  if (left.empty()) return groups;
  if (left.size() == optimized.size()) {
    std::vector<OptimizerGroup> named = NamedByMegatronsRule(index, optimized);
    if (!named.empty()) return named;
  }
  if (groups.size() > 1) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "the optimizer has %d parameter groups, and nothing says in which of them \"%s\" and %d "
        "others are",
        groups.size(),
        *std::find_if(optimized.begin(), optimized.end(),
                      [&](const std::string& name) { return left.contains(name); }),
        left.size() - 1));
  }
  if (groups.empty()) groups.push_back({.parameters = {}, .values = Json::object()});
  groups[0].parameters = std::move(optimized);
  return groups;
}

void SetOptimizerGroups(const std::vector<OptimizerGroup>& groups, ForeignIndex& index) {
  std::erase_if(index.scalars, [](const Fact& fact) {
    return IsGroupList(fact.name) || ParseGroupKey(fact.name).has_value();
  });
  Json list = Json::array();
  for (const OptimizerGroup& group : groups) {
    Json json = group.values;
    json["params"] = group.parameters;
    list.push_back(std::move(json));
  }
  index.scalars.push_back(
      {kParamGroups, list.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)});
}

}  // namespace holdfast::converter
