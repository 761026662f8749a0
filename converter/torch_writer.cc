#include "converter/torch_writer.h"

#include <array>
#include <set>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/non_tensors.h"
#include "converter/optimizer_groups.h"
#include "converter/torch_file.h"

namespace holdfast::converter {
namespace {

constexpr std::array<std::string_view, 4> kSections = {"model", "optimizer", "ema", "global_step"};

class TorchPlanner {
 public:
  TorchPlanner(const ForeignIndex& index, const std::string& file_name)
      : index_(index), draft_(index, file_name) {}

  absl::StatusOr<TorchFilesPlan> Run() {
    RETURN_IF_ERROR(Sort());
    ASSIGN_OR_RETURN(groups_, OptimizerGroupsOf(index_));
    if (optimizer_.empty() && ema_.empty() && others_.empty()) {
      StateDict(model_);
    } else {
      PushAll();
    }
    TorchFilesPlan plan;
    plan.Add(std::move(draft_).Finish());
    plan.tensor_count = index_.tensor_states.size();
    plan.left_out = NonTensorsWithoutPlace(index_, [this](const Fact& fact) {
      return fact.name == kParamGroups || IsStep(fact, index_);
    });
    return plan;
  }

 private:
  absl::Status Sort() {
    for (const Alias& alias : index_.aliases) owners_[alias.tensor_state] = alias.of;
    std::set<std::string_view> model;
    std::set<std::string_view> top(kSections.begin(), kSections.end());
    for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
      const TensorState& state = index_.tensor_states[i];
      if (state.shape.size() > kTorchDimsMax) {
        return absl::FailedPreconditionError(
            absl::StrFormat("%s: torch has at most %d dimensions, found %d", Describe(state),
                            kTorchDimsMax, state.shape.size()));
      }
      if (IsOptimizerState(state.state)) {
        optimizer_[state.tensor].push_back(i);
      } else if (state.state == "ema") {
        ema_.push_back(i);
      } else if (state.state == "rng" || state.state == "other") {
        if (!top.insert(state.tensor).second) return Twice(state);
        others_.push_back(i);
      } else {
        if (!model.insert(state.tensor).second) return Twice(state);
        model_.push_back(i);
      }
    }
    return absl::OkStatus();
  }

  static absl::Status Twice(const TensorState& state) {
    return absl::FailedPreconditionError(
        absl::StrFormat("%s: the file would have two entries of this name; --drop a state, or "
                        "rename one",
                        Describe(state)));
  }

  // Of tied tensors that are stored as one: the number of the one that has the storage.
  uint32_t StorageOf(uint32_t number) const {
    uint32_t at = number;
    for (size_t steps = 0; steps < 8; ++steps) {
      const auto owner = owners_.find(at);
      if (owner == owners_.end()) break;
      const TensorState& a = index_.tensor_states[number];
      const TensorState& b = index_.tensor_states[owner->second];
      if (a.dtype != b.dtype || a.shape != b.shape) break;
      at = owner->second;
    }
    return at;
  }

  void StateDict(const std::vector<uint32_t>& numbers) {
    draft_.pickle().OrderedDict([&] {
      for (const uint32_t number : numbers) {
        draft_.Key(index_.tensor_states[number].tensor);
        draft_.Whole(StorageOf(number));
      }
    });
  }

  void PushAll() {
    draft_.pickle().Dict([&] {
      if (!model_.empty()) {
        draft_.Key("model");
        StateDict(model_);
      }
      if (!optimizer_.empty()) {
        draft_.Key("optimizer");
        Optimizer();
      }
      if (!ema_.empty()) {
        draft_.Key("ema");
        StateDict(ema_);
      }
      for (const uint32_t number : others_) {
        draft_.Key(index_.tensor_states[number].tensor);
        draft_.Whole(StorageOf(number));
      }
      if (index_.has_step) {
        draft_.Key("global_step");
        draft_.out().Int(static_cast<int64_t>(index_.step));
      }
    });
  }

  void Optimizer() {
    TorchPickle& pickle = draft_.pickle();
    pickle.Dict([&] {
      draft_.Key("state");
      pickle.Dict([&] {
        int64_t id = 0;
        for (const OptimizerGroup& group : groups_) {
          for (const std::string& name : group.parameters) States(id++, name);
        }
      });
      draft_.Key(kParamGroups);
      pickle.List([&] {
        uint64_t id = 0;
        for (const OptimizerGroup& group : groups_) {
          pickle.Dict([&] {
            for (const auto& [key, value] : group.values.items()) {
              draft_.Key(key);
              pickle.Json(value, TorchPickle::Sequences::kTuples);  // betas are one
            }
            draft_.Key("params");
            std::vector<uint64_t> ids;
            for (size_t i = 0; i < group.parameters.size(); ++i) ids.push_back(id++);
            pickle.Ints(ids);
            draft_.Key("param_names");
            pickle.List([&] {
              for (const std::string& name : group.parameters) draft_.out().String(name);
            });
          });
        }
      });
    });
  }

  void States(int64_t id, const std::string& name) {
    draft_.out().Int(id);
    draft_.pickle().Dict([&] {
      for (const uint32_t number : optimizer_.at(name)) {
        draft_.Key(index_.tensor_states[number].state);
        draft_.Whole(number);
      }
    });
  }

  const ForeignIndex& index_;
  TorchDraft draft_;
  std::vector<OptimizerGroup> groups_;
  std::vector<uint32_t> model_;
  std::vector<uint32_t> ema_;
  std::vector<uint32_t> others_;
  std::unordered_map<std::string, std::vector<uint32_t>> optimizer_;  // by tensor
  std::unordered_map<uint32_t, uint32_t> owners_;                     // by alias
};

}  // namespace

absl::StatusOr<TorchFilesPlan> PlanTorch(const ForeignIndex& index, const std::string& file_name) {
  return TorchPlanner(index, file_name).Run();
}

}  // namespace holdfast::converter
