#include "converter/ucp_writer.h"

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/deepspeed_output.h"

namespace holdfast::converter {
namespace {

constexpr size_t kFileNameBytesMax = 255;  // of Linux's file systems

// Whether `name` can be a directory, or directories in each other, below another one.
bool IsPath(std::string_view name) {
  if (name.empty() || name.find('\0') != std::string_view::npos) return false;
  for (size_t begin = 0; begin <= name.size();) {
    const size_t end = std::min(name.find('/', begin), name.size());
    const std::string_view part = name.substr(begin, end - begin);
    if (part.empty() || part == "." || part == ".." || part.size() > kFileNameBytesMax) {
      return false;
    }
    begin = end + 1;
  }
  return true;
}

class UniversalPlanner {
 public:
  UniversalPlanner(const DeepSpeedOutput& output, uint64_t stage)
      : output_(output), index_(output.index()), stage_(stage) {}

  absl::StatusOr<TorchFilesPlan> Run() {
    tag_ = absl::StrCat("global_step", index_.has_step ? index_.step : 0, "_universal");
    for (const OptimizedGroup& group : output_.groups()) {
      for (const OptimizedParameter& parameter : group.parameters) {
        RETURN_IF_ERROR(AddParameter(parameter));
      }
    }
    if (!output_.groups().empty()) AddOptimizer();
    AddModel();
    plan_.AddText("latest_universal", tag_);
    plan_.left_out = output_.LeftOut();
    plan_.tensor_count = output_.tensor_count();
    return std::move(plan_);
  }

 private:
  absl::Status AddParameter(const OptimizedParameter& parameter) {
    if (!IsPath(parameter.name)) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "tensor \"%s\": a universal folder has a directory of this name, and there can be none; "
          "--rename FILE gives it another",
          parameter.name));
    }
    const std::string directory = absl::StrFormat("%s/zero/%s", tag_, parameter.name);
    const auto add = [&](std::string_view key, uint32_t number, Dtype dtype) {
      TorchDraft draft(index_, absl::StrFormat("%s/%s.pt", directory, key));
      draft.pickle().Dict([&] {
        draft.Key("param");
        draft.WholeAs(number, dtype, TorchDraft::Form::kShaped);
      });
      plan_.Add(std::move(draft).Finish());
    };
    add("fp32", parameter.master, Dtype::kFloat32);
    for (const auto& [key, number] : parameter.states) {
      if (!IsPath(key) || key.find('/') != std::string::npos) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: a universal folder has a file of this state's name, and there can be none",
            Describe(index_.tensor_states[number])));
      }
      add(key, number, index_.tensor_states[number].dtype);
    }
    for (const auto& [key, number] : parameter.numbers) {
      if (key != "step") {
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: a universal folder holds one number of a parameter, its step; --drop %s",
            Describe(index_.tensor_states[number]), key));
      }
      if (!step_.has_value()) step_ = number;
      TorchDraft draft(index_, absl::StrCat(directory, "/step.pt"));
      draft.Whole(number);
      plan_.Add(std::move(draft).Finish());
    }
    return absl::OkStatus();
  }

  // What all parameters share. Stages 1 and 2 read `param_groups` and zip them with their own;
  // stage 3 reads `optimizer_state_dict`.
  void AddOptimizer() {
    TorchDraft draft(index_, absl::StrCat(tag_, "/zero/optimizer_state.pt"));
    std::vector<std::vector<uint64_t>> numbers;
    for (uint64_t g = 0; g < output_.groups().size(); ++g) numbers.push_back({g});
    draft.pickle().Dict([&] {
      output_.PushOptimizerFacts(draft, stage_);
      draft.Key("partition_count");
      draft.pickle().Ints(std::vector<uint64_t>(numbers.size(), 1));
      draft.Key("optimizer_state_dict");
      draft.pickle().Dict([&] {
        draft.Key("state");
        draft.pickle().Dict([&] {
          if (!step_.has_value()) return;
          draft.out().Int(0);
          draft.pickle().Dict([&] {
            draft.Key("step");
            draft.Whole(*step_);
          });
        });
        output_.PushParamGroups(draft, numbers);
      });
      output_.PushParamGroups(draft, numbers);
      output_.PushConfiguration(draft, stage_);
    });
    plan_.Add(std::move(draft).Finish());
  }

  void AddModel() {
    TorchDraft draft(index_, absl::StrCat(tag_, "/", stage_ == 3 ? "zero_pp_rank_0_" : "",
                                          "mp_rank_00_model_states.pt"));
    DeepSpeedOutput::FlatNames flat;
    for (const OptimizedGroup& group : output_.groups()) {
      flat.emplace_back();
      for (const OptimizedParameter& parameter : group.parameters) {
        flat.back().push_back(&parameter);
      }
    }
    output_.PushModel(draft, {.stage = stage_, .dp = 1, .rank = 0, .universal = true}, flat);
    plan_.Add(std::move(draft).Finish());
  }

  const DeepSpeedOutput& output_;
  const ForeignIndex& index_;
  const uint64_t stage_;
  std::string tag_;
  std::optional<uint32_t> step_;
  TorchFilesPlan plan_;
};

}  // namespace

absl::StatusOr<TorchFilesPlan> PlanUniversal(const ForeignIndex& index, uint64_t stage) {
  ASSIGN_OR_RETURN(const DeepSpeedOutput output,
                   DeepSpeedOutput::Create(index, DeepSpeedOutput::Buffers::kNone));
  if (output.groups().empty()) {
    return absl::FailedPreconditionError(
        "a universal folder is made of the optimizer's parameters, and this checkpoint has no "
        "optimizer states: --format deepspeed writes weights alone");
  }
  return UniversalPlanner(output, stage).Run();
}

}  // namespace holdfast::converter
