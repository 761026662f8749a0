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
#include "converter/deepspeed_ranks.h"
#include "converter/layout_file.h"
#include "converter/parallel_facts.h"
#include "converter/parallel_rules.h"

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
  // `rules`: null if nothing says how tensor-parallel ranks cut parameters.
  UniversalPlanner(const DeepSpeedOutput& output, uint64_t stage, const ParallelRules* rules)
      : output_(output), index_(output.index()), stage_(stage), rules_(rules) {}

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
    ParameterCut cut;
    if (rules_ != nullptr) {
      const TensorState& owner = index_.tensor_states[output_.OwnerOf(parameter.weight)];
      ASSIGN_OR_RETURN(cut, rules_->HowToCut(owner.tensor, parameter.shape));
    }
    const std::string directory = absl::StrFormat("%s/zero/%s", tag_, parameter.name);
    const auto add = [&](std::string_view key, uint32_t number, Dtype dtype) {
      TorchDraft draft(index_, absl::StrFormat("%s/%s.pt", directory, key));
      draft.pickle().Dict([&] {
        draft.Key("param");
        draft.WholeAs(number, dtype, TorchDraft::Form::kShaped);
        PushCut(draft, parameter, cut);
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

  // How load_hp_checkpoint_state cuts it for tensor-parallel ranks (checkpoint/
  // universal_checkpoint.py). Without a word along dimension 0, or not at all, by its shape there.
  void PushCut(TorchDraft& draft, const OptimizedParameter& parameter,
               const ParameterCut& cut) const {
    if (cut.kind == ParameterCut::Kind::kJoined) {
      draft.Key("cat_dim");
      draft.out().Int(static_cast<int64_t>(cut.dimension));
    } else if (cut.kind == ParameterCut::Kind::kSubTensors) {
      draft.Key("sub_param_shape");
      draft.pickle().Object("deepspeed.checkpoint.universal_checkpoint", "SubparamShape");
      draft.pickle().State([&] { PushSubParameters(draft, parameter, cut); });
    }
    if (cut.vocabulary) {
      draft.Key("vocab_tensor");
      draft.out().Bool(true);
    }
  }

  static void PushSubParameters(TorchDraft& draft, const OptimizedParameter& parameter,
                                const ParameterCut& cut) {
    draft.Key("patterns");
    draft.pickle().List([&] { draft.out().String(ExactPattern({parameter.name})); });
    draft.Key("shape");
    draft.out().Mark();
    for (size_t d = 0; d < parameter.shape.size(); ++d) {
      if (d == cut.dimension) {
        draft.pickle().Tuple(cut.sizes);
      } else {
        draft.out().Int(static_cast<int64_t>(parameter.shape[d]));
      }
    }
    draft.out().Tuple();
    draft.Key("partition_dim");
    draft.out().Int(static_cast<int64_t>(cut.dimension));
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
        flat.back().push_back({parameter.name, &parameter});
      }
    }
    output_.PushModel(
        draft, {.ranks = DeepSpeedRanks::Whole(output_), .stage = stage_, .universal = true}, flat);
    plan_.Add(std::move(draft).Finish());
  }

  const DeepSpeedOutput& output_;
  const ForeignIndex& index_;
  const uint64_t stage_;
  const ParallelRules* const rules_;
  std::string tag_;
  std::optional<uint32_t> step_;
  TorchFilesPlan plan_;
};

}  // namespace

absl::StatusOr<TorchFilesPlan> PlanUniversal(const ForeignIndex& index,
                                             const UniversalWriteOptions& options) {
  ASSIGN_OR_RETURN(const DeepSpeedOutput output,
                   DeepSpeedOutput::Create(index, DeepSpeedOutput::Buffers::kNone));
  if (output.groups().empty()) {
    return absl::FailedPreconditionError(
        "a universal folder is made of the optimizer's parameters, and this checkpoint has no "
        "optimizer states: --format deepspeed writes weights alone");
  }
  ASSIGN_OR_RETURN(const LayoutFile layout, ParseLayoutFile(options.layout));
  ASSIGN_OR_RETURN(ParallelInfo info, ParallelInfoToWrite(index, options.preset, layout));
  // ZeRO-3 with tensor parallelism has files of its own: nothing is said there.
  const bool says = options.stage != 3 && (info.NamesShards() || !info.rules.empty());
  ASSIGN_OR_RETURN(const ParallelRules rules, ParallelRules::Create(std::move(info)));
  return UniversalPlanner(output, options.stage, says ? &rules : nullptr).Run();
}

}  // namespace holdfast::converter
