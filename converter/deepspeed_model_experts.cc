// Experts of a DeepSpeed checkpoint: their files, one for each expert of each layer that has some,
// and which of those there should be. (How they are written: converter/deepspeed_experts.h.)
//
// `num_experts` of the model states says how many experts each layer has, and so which files there
// must be; without it the numbers in the files' names show gaps only. Masters are not in these
// files: where the optimizer's are there, an expert's weights are lost with its file only as far as
// it was not trained.
//
// Sources: DeepSpeed runtime/engine.py (_save_moe_checkpoint, load_moe_state_dict).
#include <algorithm>
#include <iterator>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/decimal.h"
#include "converter/deepspeed_model.h"
#include "converter/pipeline_stages.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kExperts = "deepspeed_experts.";
constexpr std::string_view kExpertGroup = "ep_size_";  // names of groups, and how many ranks it has
constexpr size_t kNamesShownMax = 20;

// The names of a list that are of experts, for people.
std::string Shown(const std::set<std::string>& names) {
  std::vector<std::string> shown;
  for (const std::string& name : names) {
    if (shown.size() == kNamesShownMax) break;
    shown.push_back(name);
  }
  const size_t more = names.size() - shown.size();
  return absl::StrCat(absl::StrJoin(shown, ", "),
                      more > 0 ? absl::StrFormat(" and %d others", more) : "");
}

// Of numbers below `count`, the first that is not there, and how many besides.
std::string Missing(const std::set<uint32_t>& there, uint64_t count) {
  uint64_t first = 0;
  for (const uint32_t number : there) {
    if (number != first) break;
    ++first;
  }
  const uint64_t missing = count - there.size();
  return absl::StrCat(first, missing > 1 ? absl::StrFormat(" and %d others", missing - 1) : "");
}

// How many ranks share the experts, by the names of the groups in such a rank's file; 0: not said.
absl::StatusOr<uint64_t> ExpertRanksOf(const ForeignFolder& folder, uint32_t file,
                                       PieceTable& table) {
  ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch, OpenTorch(folder, file, table));
  const TorchValue optimizer = torch->root().Find("optimizer");
  TorchValue groups = optimizer.Find("param_groups");
  if (!groups.present()) groups = optimizer.Find("optimizer_state_dict").Find("param_groups");
  uint64_t ranks = 0;
  const size_t count = groups.Is(TorchValue::Kind::kList) ? groups.ArraySize().value_or(0) : 0;
  for (size_t g = 0; g < count; ++g) {
    std::string_view name = groups[g].Find("name").String().value_or("");
    const size_t at = name.find(kExpertGroup);
    if (at == std::string_view::npos) continue;
    name.remove_prefix(at + kExpertGroup.size());
    ranks = std::max(ranks, ParseDecimal(name).value_or(0));
  }
  return std::min(ranks, kExpertsMax);
}

}  // namespace

std::optional<ExpertName> ParseExpertName(std::string_view name) {
  const size_t at = name.find(kExperts);
  if (at == std::string_view::npos || (at > 0 && name[at - 1] != '.')) return std::nullopt;
  const size_t begin = at + kExperts.size();
  size_t end = begin;
  while (end < name.size() && absl::ascii_isdigit(static_cast<unsigned char>(name[end]))) ++end;
  ExpertName expert{.prefix = name.substr(0, begin), .number = 0, .suffix = name.substr(end)};
  if (end == begin || end - begin > 7 || expert.suffix.empty() || expert.suffix[0] != '.') {
    return std::nullopt;
  }
  for (char digit : name.substr(begin, end - begin)) {
    expert.number = expert.number * 10 + static_cast<uint64_t>(digit - '0');
  }
  return expert;
}

std::string DeepSpeedModel::GlobalExpertName(const std::string& local, uint32_t mp,
                                             uint32_t expert_rank) const {
  const auto expert = ParseExpertName(local);
  if (!expert.has_value()) return local;
  const auto count = local_experts_[mp].find(expert->prefix);
  CHECK(count != local_experts_[mp].end());
  return absl::StrCat(std::string(expert->prefix), expert->number + expert_rank * count->second,
                      std::string(expert->suffix));
}

void DeepSpeedModel::SetExpertRanks(uint32_t mp, size_t group, uint64_t expert_ranks) {
  expert_ranks_[{mp, group}] = expert_ranks;
}

uint64_t DeepSpeedModel::ExpertRanks(std::string_view local, uint32_t mp, size_t group) const {
  const auto expert = ParseExpertName(local);
  if (!expert.has_value()) return 1;
  if (const auto said = expert_ranks_.find({mp, group}); said != expert_ranks_.end()) {
    return said->second;
  }
  const auto all = experts_.find(expert->prefix);
  const auto here = local_experts_[mp].find(expert->prefix);
  if (all == experts_.end() || here == local_experts_[mp].end()) return 1;
  return std::max<uint64_t>(all->second.size() / here->second, 1);
}

// Whether each has a number that there can be.
absl::Status DeepSpeedModel::CheckExpertFiles() const {
  for (const auto& [key, file] : files_.experts) {
    const std::string& path = folder_.files()[file].path;
    if (key.mp >= ranks()) {
      return absl::DataLossError(
          absl::StrFormat("%s: expected files of %d model-parallel ranks", path, ranks()));
    }
    const std::vector<uint64_t>& said = states_[key.mp].expert_counts;
    if (said.empty() && (key.layer >= kPipelineLayersMax || key.expert >= kExpertsMax)) {
      return absl::DataLossError(
          absl::StrFormat("%s: expected layers numbered below %d, and experts below %d", path,
                          kPipelineLayersMax, kExpertsMax));
    }
    if (said.empty() || (key.layer < said.size() && key.expert < said[key.layer])) continue;
    return absl::DataLossError(
        absl::StrFormat("%s: num_experts of the model states says that there are %d layers with "
                        "experts, and %d experts in this one",
                        path, said.size(), key.layer < said.size() ? said[key.layer] : 0));
  }
  return absl::OkStatus();
}

// Of the folders in which DeepSpeed looks for them.
void DeepSpeedModel::NameMissingExperts() {
  if (files_.universal || partitioned_) return;
  std::map<std::pair<uint32_t, uint64_t>, std::set<uint32_t>> there;  // by mp and layer
  for (const auto& [key, file] : files_.experts) there[{key.mp, key.layer}].insert(key.expert);
  for (uint32_t mp = 0; mp < ranks(); ++mp) {
    const std::vector<uint64_t>& said = states_[mp].expert_counts;
    uint64_t layers = said.size();
    if (const auto after = there.lower_bound({mp + 1, 0});
        said.empty() && after != there.begin() && std::prev(after)->first.first == mp) {
      layers = std::prev(after)->first.second + 1;
    }
    std::set<std::string> nowhere_else;
    for (const std::string& name : buffers_) {
      if (ParseExpertName(name).has_value()) nowhere_else.insert(name);
    }
    for (const NamedShape& entry : states_[mp].frozen_shapes) {
      if (ParseExpertName(entry.name).has_value()) nowhere_else.insert(entry.name);
    }
    for (uint64_t layer = 0; layer < layers; ++layer) {
      const std::set<uint32_t>& found = there[{mp, layer}];
      // Of a layer that is not there nobody knows how many it has.
      const uint64_t count = !said.empty() ? said[layer] : found.empty() ? 1 : *found.rbegin() + 1;
      if (found.size() >= count) continue;
      const std::string what = absl::StrFormat(
          "layer %d with experts%s: expected a file of each of %s, found none of expert %s", layer,
          ranks() > 1 ? absl::StrFormat(", model-parallel rank %d", mp) : "",
          said.empty() && found.empty() ? "them" : absl::StrFormat("its %d", count),
          Missing(found, count));
      if (files_.optimizers.empty()) {
        table_.index().losses.push_back(
            absl::StrCat(what, "; no file has masters of its weights either"));
      } else if (!nowhere_else.empty()) {
        table_.index().losses.push_back(absl::StrCat(
            what, "; what is not trained of experts is nowhere else: ", Shown(nowhere_else)));
      } else {
        table_.index().repairs.push_back(absl::StrCat(
            what,
            "; its weights are taken from their masters, but DeepSpeed does not load the "
            "folder"));
      }
    }
  }
}

// Without ZeRO every expert-parallel rank has a file of the optimizer's states.
void DeepSpeedModel::NameMissingExpertOptimizers() {
  if (files_.universal || !files_.optimizers.empty()) return;
  for (uint32_t mp = 0; mp < ranks(); ++mp) {
    std::set<uint32_t> there;
    std::optional<uint32_t> first;
    for (const auto& [key, file] : files_.expert_optimizers) {
      if (key.mp != mp) continue;
      there.insert(key.dp);
      if (!first.has_value()) first = file;
    }
    uint64_t count = there.empty() ? 0 : uint64_t{*there.rbegin()} + 1;
    if (first.has_value()) {
      const absl::StatusOr<uint64_t> said = ExpertRanksOf(folder_, *first, table_);
      if (!said.ok()) table_.index().losses.emplace_back(said.status().message());
      count = std::max(count, said.value_or(0));
    } else if (states_[mp].has_optimizer && !states_[mp].expert_counts.empty()) {
      count = 1;  // or more: who knows
    }
    if (there.size() >= count) continue;
    table_.index().losses.push_back(absl::StrFormat(
        "expp_rank_<n>_mp_rank_%02d_optim_states.pt: expected the optimizer's states of each of %s "
        "expert-parallel ranks, found none of rank %s",
        mp, there.empty() ? "the" : absl::StrCat(count), Missing(there, count)));
  }
}

absl::Status DeepSpeedModel::AddExperts() {
  RETURN_IF_ERROR(CheckExpertFiles());
  struct Found {
    std::vector<std::optional<StoredTensor>> tensors;  // by tensor-parallel rank
  };
  for (auto at = files_.experts.begin(); at != files_.experts.end();) {
    const auto [layer, expert, unused] = at->first;
    std::map<std::pair<std::string, uint32_t>, Found> by_name;  // and pipeline stage
    std::map<uint32_t, uint32_t> file_counts;                   // by pipeline stage
    for (; at != files_.experts.end() && at->first.layer == layer && at->first.expert == expert;
         ++at) {
      const uint32_t stage = at->first.mp / tensor_ranks_;
      ++file_counts[stage];
      ASSIGN_OR_RETURN(std::vector<NamedTensor> tensors,
                       ReadStateDict(folder_, at->second, table_));
      for (NamedTensor& entry : tensors) {
        const auto parsed = ParseExpertName(entry.name);
        if (parsed.has_value() && parsed->number != expert) {
          return absl::DataLossError(
              absl::StrFormat("%s: expected tensors of expert %d, as the file's name says, found "
                              "\"%s\"",
                              folder_.files()[at->second].path, expert, entry.name));
        }
        Found& found = by_name[{entry.name, stage}];
        found.tensors.resize(tensor_ranks_);
        found.tensors[TensorRank(at->first.mp)] = std::move(entry.tensor);
      }
    }
    for (const auto& [key, found] : by_name) {
      const auto& [name, stage] = key;
      const bool is_whole = files_.universal || partitioned_ || file_counts[stage] == tensor_ranks_;
      if (!is_whole) continue;  // NameMissingExperts() says so
      if (const auto parsed = ParseExpertName(name); parsed.has_value()) {
        experts_[std::string(parsed->prefix)].insert(parsed->number);
        // buffer_names has local numbers, and every rank has a number 0.
        if (buffers_.contains(
                absl::StrCat(std::string(parsed->prefix), "0", std::string(parsed->suffix)))) {
          if (!found.tensors.front().has_value()) return NotEverywhere(name);
          const StoredTensor& tensor = *found.tensors.front();
          ASSIGN_OR_RETURN(const uint32_t state,
                           table_.State(name, "buffer", tensor.dtype, tensor.shape));
          RETURN_IF_ERROR(table_.AddWhole(state, tensor));
          continue;
        }
      }
      std::vector<Shape> shapes;
      for (const std::optional<StoredTensor>& tensor : found.tensors) {
        if (!tensor.has_value()) return NotEverywhere(name);
        shapes.push_back(tensor->shape);
      }
      ASSIGN_OR_RETURN(const std::vector<ShardMap> maps, rules_->Resolve(name, shapes));
      ASSIGN_OR_RETURN(const uint32_t state,
                       table_.State(name, "param", found.tensors[0]->dtype, maps[0].shape));
      for (uint32_t tp = 0; tp < tensor_ranks_; ++tp) {
        RETURN_IF_ERROR(table_.AddShard(state, maps[tp], *found.tensors[tp]));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
