#include "converter/deepspeed_experts.h"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/decimal.h"
#include "converter/deepspeed_model.h"

namespace holdfast::converter {
namespace {

// A name without its numbers, and these.
struct NumberedName {
  std::string text;
  std::vector<uint64_t> numbers;
  explicit NumberedName(std::string_view name) {
    for (size_t at = 0; at < name.size();) {
      const size_t begin = at;
      while (at < name.size() && absl::ascii_isdigit(static_cast<unsigned char>(name[at]))) ++at;
      const auto number = ParseDecimal(name.substr(begin, at - begin));
      if (number.has_value()) {
        numbers.push_back(*number);
        text += '#';
      } else {  // no digit, or more of them than a number has
        at = std::max(at, begin + 1);
        text.append(name.substr(begin, at - begin));
      }
    }
  }
};

}  // namespace

absl::StatusOr<DeepSpeedExperts> DeepSpeedExperts::Create(const DeepSpeedOutput& output,
                                                          const ExpertGrid& grid) {
  CHECK(grid.expert_ranks > 0 && grid.data_ranks % grid.expert_ranks == 0);
  DeepSpeedExperts experts(output, grid);
  RETURN_IF_ERROR(experts.Collect());
  RETURN_IF_ERROR(experts.CheckGroups());
  return experts;
}

absl::Status DeepSpeedExperts::Collect() {
  std::vector<std::map<uint64_t, std::vector<uint32_t>>> found;  // of layers, by number
  for (const uint32_t weight : output_.weights()) {
    const TensorState& state = output_.index().tensor_states[weight];
    const std::optional<ExpertName> name = ParseExpertName(state.tensor);
    if (!name.has_value()) continue;
    if (name->number >= kExpertsMax) {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: expected experts numbered below %d", Describe(state), kExpertsMax));
    }
    if (!output_.groups().empty() && !output_.IsBuffer(weight) &&
        !output_.IsTrained(state.tensor)) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: DeepSpeed's files have no place for an expert that is not trained, and this one has "
          "no optimizer states",
          Describe(state)));
    }
    const auto [at, is_new] = layer_of_.emplace(std::string(name->prefix), found.size());
    if (is_new) found.emplace_back();
    found[at->second][name->number].push_back(weight);
  }
  for (auto& experts : found) {
    Layer& layer = layers_.emplace_back();
    for (auto& [number, weights] : experts) {
      if (number != layer.size()) break;  // a gap, which is refused below
      layer.push_back(std::move(weights));
    }
  }
  if (layers_.empty() && grid_.expert_ranks > 1) {
    return absl::FailedPreconditionError(
        absl::StrFormat("--to ep=%d: the model has no experts of DeepSpeed's "
                        "(deepspeed_experts.<number> in their names)",
                        grid_.expert_ranks));
  }
  for (const auto& [prefix, number] : layer_of_) {
    const Layer& layer = layers_[number];
    const bool whole = layer.size() == found[number].size() &&
                       std::ranges::all_of(layer, [&](const std::vector<uint32_t>& weights) {
                         return weights.size() == layer.front().size();
                       });
    if (whole && layer.size() % grid_.expert_ranks == 0) continue;
    return absl::FailedPreconditionError(absl::StrFormat(
        "--to ep=%d: \"%s<number>\": expected as many tensors of each expert, and a "
        "number of experts that %d ranks divide, found %d experts",
        grid_.expert_ranks, prefix, grid_.expert_ranks, found[number].size()));
  }
  return OrderLayers();
}

// The files count layers in the order of the model's modules. Those of as many experts may change
// places: DeepSpeed loads them all, by the names in them.
absl::Status DeepSpeedExperts::OrderLayers() {
  const std::vector<uint64_t> counts = Counts();
  if (std::ranges::adjacent_find(counts, std::not_equal_to<>()) == counts.end()) {
    return absl::OkStatus();
  }
  if (counts == output_.expert_counts()) return absl::OkStatus();  // as the source had them
  std::vector<std::pair<NumberedName, std::string>> names;
  for (const auto& [prefix, number] : layer_of_) names.emplace_back(NumberedName(prefix), prefix);
  for (const auto& [name, prefix] : names) {
    if (name.text == names.front().first.text) continue;
    return absl::FailedPreconditionError(absl::StrFormat(
        "\"%s<number>\" and \"%s<number>\": layers of different numbers of experts are written in "
        "the order of the model's modules, and neither the source (num_experts) nor numbers in "
        "the names say which comes first",
        names.front().second, prefix));
  }
  std::ranges::sort(names, {}, [](const auto& each) { return each.first.numbers; });
  std::vector<Layer> in_order;
  for (const auto& [name, prefix] : names) {
    size_t& number = layer_of_.at(prefix);
    in_order.push_back(std::move(layers_[number]));
    number = in_order.size() - 1;
  }
  layers_ = std::move(in_order);
  return absl::OkStatus();
}

absl::Status DeepSpeedExperts::CheckGroups() const {
  for (const OptimizedGroup& group : output_.groups()) {
    for (const OptimizedParameter& parameter : group.parameters) {
      if (ParseExpertName(parameter.name).has_value() == group.Has(kOfExperts)) continue;
      return absl::FailedPreconditionError(absl::StrFormat(
          "parameter \"%s\": DeepSpeed has experts in groups of their own, marked \"moe\", and "
          "this "
          "one is %s",
          parameter.name, group.Has(kOfExperts) ? "no expert in such a group" : "in another"));
    }
    if (!group.Has(kOfExperts)) continue;
    // Every rank has buffers of one layout, under the names of the first.
    const std::vector<const OptimizedParameter*> first = OfRank(group, 0);
    for (uint64_t rank = 1; rank < grid_.expert_ranks; ++rank) {
      const std::vector<const OptimizedParameter*> other = OfRank(group, rank);
      const bool alike = std::ranges::equal(first, other, [this](const auto* a, const auto* b) {
        return a->shape == b->shape && LocalName(a->name) == LocalName(b->name);
      });
      if (alike) continue;
      return absl::FailedPreconditionError(
          absl::StrFormat("--to ep=%d: expected experts that are alike, and in the same order in "
                          "their group: those "
                          "of ranks 0 and %d are not (\"%s\", ...)",
                          grid_.expert_ranks, rank, first.empty() ? "" : first.front()->name));
    }
  }
  return absl::OkStatus();
}

std::vector<const OptimizedParameter*> DeepSpeedExperts::OfRank(const OptimizedGroup& group,
                                                                uint64_t expert_rank) const {
  std::vector<const OptimizedParameter*> parameters;
  for (const OptimizedParameter& parameter : group.parameters) {
    if (const std::optional<ExpertName> name = ParseExpertName(parameter.name); name.has_value()) {
      const Layer& layer = layers_[layer_of_.at(std::string(name->prefix))];
      if (name->number / (layer.size() / grid_.expert_ranks) != expert_rank) continue;
    }
    parameters.push_back(&parameter);
  }
  return parameters;
}

std::string DeepSpeedExperts::LocalName(const std::string& name) const {
  const std::optional<ExpertName> expert = ParseExpertName(name);
  if (!expert.has_value()) return name;
  const Layer& layer = layers_[layer_of_.at(std::string(expert->prefix))];
  return absl::StrCat(std::string(expert->prefix),
                      expert->number % (layer.size() / grid_.expert_ranks),
                      std::string(expert->suffix));
}

std::vector<std::string> DeepSpeedExperts::BuffersOfRank(uint64_t expert_rank) const {
  std::vector<std::string> names;
  for (const Layer& layer : layers_) {
    const uint64_t share = layer.size() / grid_.expert_ranks;
    for (uint64_t expert = expert_rank * share; expert < (expert_rank + 1) * share; ++expert) {
      for (const uint32_t weight : layer[expert]) {
        if (!output_.IsBuffer(weight)) continue;
        names.push_back(LocalName(output_.index().tensor_states[weight].tensor));
      }
    }
  }
  return names;
}

std::vector<uint64_t> DeepSpeedExperts::Counts() const {
  std::vector<uint64_t> counts;
  for (const Layer& layer : layers_) counts.push_back(layer.size());
  return counts;
}

}  // namespace holdfast::converter
