// The optimizer's parameter groups, as whatever format has told them: which parameters, in which
// order, with which hyper-parameters.
//
// Readers put them into ForeignIndex::scalars, in the words of their format: "param_groups", the
// list of the groups, or "<prefix>param_groups.<number>.<key>", a fact for each value. Of both,
// "params" are names, or numbers where a file has no names. A conversion brings them into the first
// form, with names (converter/selection.h), so that they survive in every format.
#ifndef HOLDFAST_CONVERTER_OPTIMIZER_GROUPS_H_
#define HOLDFAST_CONVERTER_OPTIMIZER_GROUPS_H_

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_index.h"

namespace holdfast::converter {

inline constexpr char kParamGroups[] = "param_groups";
inline constexpr size_t kOptimizerGroupsMax = 65'536;

struct OptimizerGroup {
  std::vector<std::string> parameters;
  nlohmann::ordered_json values;  // an object: "lr", "betas", ...; without "params"
};

// Whether a state of this name belongs to the model, and not to an optimizer: param, buffer,
// tensor, other, ema, rng. And weights: those without rng.
bool IsOptimizerState(std::string_view state);
bool IsWeightState(std::string_view state);

// The groups of the parameters that have an optimizer's state (fp32 included), each exactly once:
// those that the scalars tell; Megatron's, which have no names, by its rule; what nothing tells,
// where one group is possible only: one of all of them, in the order of the index. Groups that the
// index has no parameters of are empty ones. Empty: no parameter has such a state. Errors:
// kFailedPrecondition (several groups, and nothing says which parameter is in which).
absl::StatusOr<std::vector<OptimizerGroup>> OptimizerGroupsOf(const ForeignIndex& index);

// In their place in the scalars.
void SetOptimizerGroups(const std::vector<OptimizerGroup>& groups, ForeignIndex& index);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_OPTIMIZER_GROUPS_H_
