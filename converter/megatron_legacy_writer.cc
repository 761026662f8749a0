#include "converter/megatron_legacy_writer.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/megatron_arguments.h"
#include "converter/megatron_layout.h"
#include "converter/megatron_tensors.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

using Optimizer = MegatronShares::Optimizer;

constexpr std::string_view kOutputExtra = "output_layer._extra_state";
constexpr std::array<std::string_view, 3> kStates = {"param", "exp_avg", "exp_avg_sq"};

// A model chunk as a rank has it.
struct Chunk {
  std::vector<MegatronLocal> locals;
  std::vector<MegatronLocalBuffer> dense = {};  // they refer to `locals`
  std::vector<MegatronLocalBuffer> experts = {};
};

// An entry of args that says how a checkpoint is laid out, as these files are.
struct LayoutArgument {
  std::string_view name;
  std::optional<uint64_t> value;  // none: None
  std::optional<uint64_t> usual;  // without the entry
};

class Planner {
 public:
  Planner(ConversionSource& source, MegatronTensors tensors,
          std::optional<DerivedArguments> derived)
      : index_(source.index()), tensors_(std::move(tensors)), derived_(std::move(derived)) {}

  absl::StatusOr<TorchFilesPlan> Run(const MegatronDegrees& degrees) {
    RETURN_IF_ERROR(CheckStates());
    ASSIGN_OR_RETURN(const MegatronShares shares,
                     MegatronShares::Create(index_, tensors_, Arguments(), degrees));
    shares_ = &shares;
    const bool released = !index_.has_step;
    const std::string directory = released ? "release" : absl::StrFormat("iter_%07d", index_.step);
    for (const MegatronJobRank& rank : shares.Ranks()) {
      std::string path = absl::StrFormat("%s/mp_rank_%02d", directory, rank.tensor);
      if (degrees.pipeline > 1) absl::StrAppendFormat(&path, "_%03d", rank.stage);
      if (degrees.expert > 1) absl::StrAppendFormat(&path, "_%03d", rank.expert);
      RETURN_IF_ERROR(AddRank(rank, path));
    }
    plan_.AddText("latest_checkpointed_iteration.txt",
                  released ? "release" : absl::StrCat(index_.step));
    plan_.tensor_count = index_.tensor_states.size();
    plan_.left_out = tensors_.left_out();
    plan_.notes = tensors_.Notes();
    if (!HasRandomStates() && tensors_.state().random().present()) {
      plan_.left_out.push_back(
          "random states, which are those of ranks of other degrees: load with --no-load-rng");
    }
    return std::move(plan_);
  }

 private:
  const TensorState& StateOf(const MegatronWeights& weights) const {
    return index_.tensor_states[weights.tensor_state];
  }

  // Those of the checkpoint, or what a configuration and the tensors tell.
  MegatronArguments Arguments() const {
    if (tensors_.state().Common("args").present()) return tensors_.arguments();
    return derived_.has_value() ? derived_->layout : tensors_.ArgumentsByNames();
  }

  // The file has these three, of everything that is trained.
  absl::Status CheckStates() const {
    for (const auto& [name, weights] : tensors_.weights()) {
      for (const auto& [key, elements] : weights.states) {
        if (std::ranges::find(kStates, key) == kStates.end()) {
          return absl::FailedPreconditionError(absl::StrFormat(
              "%s: Megatron's distrib_optim.pt has the states exp_avg and exp_avg_sq only; --drop "
              "%s",
              Describe(index_.tensor_states[elements.tensor_state]), key));
        }
      }
      for (const std::string_view key : kStates) {
        if (weights.states.empty() || weights.states.contains(std::string(key))) continue;
        return absl::FailedPreconditionError(
            absl::StrFormat("%s: Megatron's distrib_optim.pt needs its %s, and there is none",
                            Describe(StateOf(weights)), key));
      }
      for (const auto& [key, elements] : weights.states) {
        if (!IsCastable(elements.dtype)) {
          return absl::FailedPreconditionError(
              absl::StrFormat("%s: expected a dtype that can be float32",
                              Describe(index_.tensor_states[elements.tensor_state])));
        }
      }
    }
    return absl::OkStatus();
  }

  // ---------------------------------------------------------------- files

  absl::Status AddRank(const MegatronJobRank& rank, const std::string& path) {
    std::vector<Chunk> chunks;
    for (uint64_t c = 0; c < shares_->degrees().virtual_stages; ++c) {
      ASSIGN_OR_RETURN(std::vector<MegatronLocal> locals, shares_->LocalsOf(rank, c));
      chunks.push_back({.locals = std::move(locals)});
      Chunk& chunk = chunks.back();
      if (!tensors_.has_optimizer()) continue;
      ASSIGN_OR_RETURN(chunk.dense, shares_->BuffersOf(chunk.locals, rank, c, Optimizer::kDense));
      ASSIGN_OR_RETURN(chunk.experts,
                       shares_->BuffersOf(chunk.locals, rank, c, Optimizer::kExpert));
    }
    if (tensors_.has_optimizer())
      plan_.Add(OptimizerFile(chunks, rank, path + "/distrib_optim.pt"));
    ASSIGN_OR_RETURN(PlannedFile file, ModelFile(chunks, rank, path + "/model_optim_rng.pt"));
    plan_.Add(std::move(file));
    return absl::OkStatus();
  }

  absl::StatusOr<PlannedFile> ModelFile(const std::vector<Chunk>& chunks,
                                        const MegatronJobRank& rank, std::string path) const {
    TorchDraft draft(index_, std::move(path));
    draft.out().EmptyDict();
    draft.out().Mark();
    RETURN_IF_ERROR(PushCommon(draft));
    for (size_t c = 0; c < chunks.size(); ++c) {
      draft.Key(chunks.size() > 1 ? absl::StrCat("model", c) : "model");
      RETURN_IF_ERROR(PushModel(chunks[c], rank, c, draft));
    }
    if (tensors_.has_optimizer()) {
      draft.Key("optimizer");
      RETURN_IF_ERROR(PushOptimizer(draft));
    }
    if (HasRandomStates()) {
      const TorchValue random = tensors_.state().random();
      const std::string of_rank = absl::StrCat(rank.stage, ".", rank.tensor, ".");
      TorchValue states = random.Find(absl::StrCat(of_rank, rank.expert));
      // Of checkpoints whose states are not told apart by expert-parallel ranks.
      if (!states.present()) states = random.Find(absl::StrCat(of_rank, 0));
      if (states.present()) {
        draft.Key("rng_state");
        RETURN_IF_ERROR(PushKept(states, draft));
      }
    }
    draft.out().SetItems();
    return std::move(draft).Finish();
  }

  // Those of the source's ranks are those of these ranks, if the degrees are the same.
  bool HasRandomStates() const {
    const MegatronArguments& arguments = tensors_.arguments();
    const MegatronDegrees& degrees = shares_->degrees();
    return tensors_.state().random().present() && arguments.tensor_ranks == degrees.tensor &&
           arguments.pipeline_ranks == degrees.pipeline && arguments.expert_ranks == degrees.expert;
  }

  absl::Status PushCommon(TorchDraft& draft) const {
    const TorchValue common = tensors_.state().common();
    bool has_args = false;
    if (common.present()) {
      ASSIGN_OR_RETURN(const size_t count, common.EntryCount());
      for (size_t i = 0; i < count; ++i) {
        ASSIGN_OR_RETURN(const std::string_view key, common.Key(i).String());
        if (key == "content_metadata") continue;  // of torch_dist
        draft.Key(key);
        has_args = has_args || key == "args";
        RETURN_IF_ERROR(key == "args" ? PushArguments(common.Entry(i), draft)
                                      : PushKept(common.Entry(i), draft));
      }
    }
    if (!has_args && derived_.has_value()) {
      draft.Key("args");
      PushDerived(draft);
    }
    if (!tensors_.state().Common("checkpoint_version").present()) {
      draft.Key("checkpoint_version");
      draft.out().Float(3.0);
    }
    if (!tensors_.state().Common("iteration").present()) {
      draft.Key("iteration");
      draft.out().Int(index_.has_step ? static_cast<int64_t>(index_.step) : 0);
    }
    return absl::OkStatus();
  }

  std::vector<LayoutArgument> LayoutArguments() const {
    const MegatronDegrees& degrees = shares_->degrees();
    const bool chunks = degrees.virtual_stages > 1;
    const auto of_chunks =
        chunks ? std::optional<uint64_t>(degrees.virtual_stages) : std::optional<uint64_t>();
    return {
        {"tensor_model_parallel_size", degrees.tensor, 1},
        {"pipeline_model_parallel_size", degrees.pipeline, 1},
        {"virtual_pipeline_model_parallel_size", of_chunks, std::nullopt},
        {"num_virtual_stages_per_pipeline_rank", of_chunks, std::nullopt},
        {"num_layers_per_virtual_pipeline_stage", std::nullopt, std::nullopt},
        {"decoder_first_pipeline_num_layers", degrees.first_layers, std::nullopt},
        {"decoder_last_pipeline_num_layers", degrees.last_layers, std::nullopt},
        {"pipeline_model_parallel_layout", std::nullopt, std::nullopt},
        {"expert_model_parallel_size", degrees.expert, 1},
        {"expert_tensor_parallel_size", degrees.ExpertTensor(), degrees.tensor},
    };
  }

  static void PushNumber(const std::optional<uint64_t>& number, TorchDraft& draft) {
    if (number.has_value()) {
      draft.out().Int(static_cast<int64_t>(*number));
    } else {
      draft.out().None();
    }
  }

  // Those of the source, with the degrees of these files.
  absl::Status PushArguments(const TorchValue& args, TorchDraft& draft) const {
    const TorchValue attributes = args.attributes();
    if (!args.IsObject("argparse", "Namespace") || !attributes.present()) {
      return PushKept(args, draft);
    }
    // Uneven stages that are told count neither embedding nor loss.
    const std::set<std::string_view> unset =
        shares_->degrees().IsUneven()
            ? std::set<std::string_view>{"account_for_embedding_in_pipeline_split",
                                         "account_for_loss_in_pipeline_split"}
            : std::set<std::string_view>{};
    std::vector<LayoutArgument> layout = LayoutArguments();
    draft.pickle().Object("argparse", "Namespace");
    draft.out().EmptyDict();
    draft.out().Mark();
    ASSIGN_OR_RETURN(const size_t count, attributes.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view key, attributes.Key(i).String());
      draft.Key(key);
      const auto change = std::ranges::find(layout, key, &LayoutArgument::name);
      if (change != layout.end()) {
        PushNumber(change->value, draft);
        layout.erase(change);
      } else if (unset.contains(key)) {
        draft.out().Bool(false);
      } else {
        RETURN_IF_ERROR(PushKept(attributes.Entry(i), draft));
      }
    }
    for (const LayoutArgument& missing : layout) {
      if (missing.value == missing.usual) continue;
      draft.Key(missing.name);
      PushNumber(missing.value, draft);
    }
    draft.out().SetItems();
    draft.out().Build();
    return absl::OkStatus();
  }

  void PushDerived(TorchDraft& draft) const {
    const auto push_more = [&] {
      draft.Key("ckpt_format");
      draft.out().String("torch");
      for (const LayoutArgument& argument : LayoutArguments()) {
        draft.Key(argument.name);
        PushNumber(argument.value, draft);
      }
    };
    PushMegatronArguments(*derived_, push_more, draft);
  }

  absl::Status PushModel(const Chunk& chunk, const MegatronJobRank& rank, size_t number,
                         TorchDraft& draft) const {
    struct View {
      uint32_t storage;
      uint64_t begin;
    };
    std::map<const MegatronLocal*, View> views;
    for (const auto* const buffers : {&chunk.dense, &chunk.experts}) {
      for (const MegatronLocalBuffer& buffer : *buffers) {
        const uint32_t storage =
            draft.Buffer(buffer.dtype, BufferRanges(buffer, "", Padding::kKept));
        for (size_t i = 0; i < buffer.locals.size(); ++i) {
          views[buffer.locals[i]] = {.storage = storage, .begin = buffer.layout.begins[i]};
        }
      }
    }
    PickleWriter& out = draft.out();
    out.Global("collections", "OrderedDict");
    out.Tuple(0);
    out.Reduce();
    out.Mark();
    for (const MegatronLocal& local : chunk.locals) {
      draft.Key(local.name);
      if (const auto view = views.find(&local); view != views.end()) {
        draft.ViewOf(view->second.storage, local.shape, view->second.begin);
        continue;
      }
      std::vector<ElementRange> ranges;
      shares_->AppendRanges(local, local.weights->tensor_state, ranges);
      draft.Ranges(StateOf(*local.weights).dtype, local.shape, std::move(ranges));
    }
    RETURN_IF_ERROR(PushExtras(rank, number, draft));
    out.SetItems();
    return absl::OkStatus();
  }

  // Extra states of the chunk's modules.
  absl::Status PushExtras(const MegatronJobRank& rank, size_t chunk, TorchDraft& draft) const {
    const TorchValue extra = tensors_.state().extra();
    if (!extra.present()) return absl::OkStatus();
    ASSIGN_OR_RETURN(const size_t count, extra.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view name, extra.Key(i).String());
      const std::optional<std::string> local_name = shares_->NameOn(name, rank, chunk);
      if (!local_name.has_value()) continue;
      draft.Key(*local_name);
      RETURN_IF_ERROR(PushKept(extra.Entry(i), draft));
    }
    // That of the output layer is in no torch_dist; without it the model would not load.
    if (shares_->IsLast(rank, chunk) && !extra.Find(kOutputExtra).present()) {
      draft.Key(kOutputExtra);
      draft.out().None();
    }
    return absl::OkStatus();
  }

  // One, or where experts have another one, a list of both.
  absl::Status PushOptimizer(TorchDraft& draft) const {
    if (!shares_->has_expert_optimizer()) return PushOptimizerOf(Optimizer::kDense, draft);
    draft.out().EmptyList();
    draft.out().Mark();
    RETURN_IF_ERROR(PushOptimizerOf(Optimizer::kDense, draft));
    RETURN_IF_ERROR(PushOptimizerOf(Optimizer::kExpert, draft));
    draft.out().Appends();
    return absl::OkStatus();
  }

  absl::Status PushOptimizerOf(Optimizer optimizer, TorchDraft& draft) const {
    draft.out().EmptyDict();
    draft.out().Mark();
    RETURN_IF_ERROR(tensors_.PushOptimizerOf(optimizer == Optimizer::kExpert
                                                 ? MegatronTensors::Part::kExpert
                                                 : MegatronTensors::Part::kDense,
                                             draft));
    draft.out().SetItems();
    return absl::OkStatus();
  }

  // All of a buffer: weights (`state` ""), or a state of the optimizer; zero where no parameter is.
  enum class Padding { kKept, kStripped };  // at the ends of buckets
  std::vector<ElementRange> BufferRanges(const MegatronLocalBuffer& buffer,
                                         const std::string& state, Padding padding) const {
    std::vector<ElementRange> ranges;
    uint64_t at = 0;
    const auto fill_to = [&](uint64_t end) {
      CHECK(at <= end);
      if (at < end) ranges.push_back({.tensor_state = kZeroElements, .begin = at, .end = end});
      at = end;
    };
    for (size_t i = 0; i < buffer.locals.size(); ++i) {
      const MegatronLocal& local = *buffer.locals[i];
      fill_to(buffer.layout.begins[i] -
              (padding == Padding::kStripped ? buffer.layout.paddings[i] : 0));
      shares_->AppendRanges(local,
                            state.empty() ? local.weights->tensor_state
                                          : local.weights->states.at(state).tensor_state,
                            ranges);
      at += local.ElementCount();
    }
    fill_to(padding == Padding::kStripped ? buffer.layout.elements()
                                          : buffer.layout.padded_elements());
    return ranges;
  }

  PlannedFile OptimizerFile(const std::vector<Chunk>& chunks, const MegatronJobRank& rank,
                            std::string path) const {
    TorchDraft draft(index_, std::move(path));
    if (!shares_->has_expert_optimizer()) {
      PushBuffers(chunks, &Chunk::dense, draft);
    } else {
      draft.pickle().List([&] {
        if (rank.has_dense_states) {
          PushBuffers(chunks, &Chunk::dense, draft);
        } else {
          draft.out().None();
        }
        PushBuffers(chunks, &Chunk::experts, draft);
      });
    }
    return std::move(draft).Finish();
  }

  // What one optimizer has saved: its buffers are numbered over all chunks.
  void PushBuffers(const std::vector<Chunk>& chunks,
                   std::vector<MegatronLocalBuffer> Chunk::*buffers, TorchDraft& draft) const {
    TorchPickle& pickle = draft.pickle();
    PickleWriter& out = draft.out();
    pickle.Dict([&] {
      draft.Key("buckets_coalesced");
      out.Bool(true);
      int64_t number = 0;
      for (const Chunk& chunk : chunks) {
        for (const MegatronLocalBuffer& buffer : chunk.*buffers) {
          out.Int(number++);
          pickle.Dict([&] {
            out.Global("torch", DtypeName(buffer.dtype));
            out.Global("torch", DtypeName(GradientDtype(buffer.dtype)));
            out.Tuple(2);
            PushBuffer(buffer, draft);
          });
        }
      }
    });
  }

  void PushBuffer(const MegatronLocalBuffer& buffer, TorchDraft& draft) const {
    draft.pickle().Dict([&] {
      const std::vector<uint64_t> shape = {buffer.layout.elements()};
      for (const std::string_view state : kStates) {
        draft.Key(state);
        draft.Ranges(Dtype::kFloat32, shape,
                     BufferRanges(buffer, std::string(state), Padding::kStripped));
      }
      draft.Key("numel_unpadded");
      draft.out().Int(static_cast<int64_t>(shape[0]));
    });
  }

  // Of the buffer that the gradients have: float32, unless args say that it is the weights'.
  Dtype GradientDtype(Dtype weights) const {
    const TorchValue args = tensors_.state().Common("args");
    const TorchValue wide =
        args.present() ? args.Find("accumulate_allreduce_grads_in_fp32") : TorchValue();
    const bool narrow = wide.Is(TorchValue::Kind::kBool) && !wide.Bool().value_or(true);
    return narrow ? weights : Dtype::kFloat32;
  }

  const ForeignIndex& index_;
  const MegatronTensors tensors_;
  const std::optional<DerivedArguments> derived_;
  const MegatronShares* shares_ = nullptr;  // while Run
  TorchFilesPlan plan_;
};

}  // namespace

absl::StatusOr<TorchFilesPlan> PlanMegatronLegacy(ConversionSource& source,
                                                  const MegatronDegrees& degrees,
                                                  const std::string& config) {
  ASSIGN_OR_RETURN(MegatronTensors tensors, MegatronTensors::Sort(source));
  ASSIGN_OR_RETURN(std::optional<DerivedArguments> derived,
                   DeriveMegatronArguments(source.index(), tensors, config));
  return Planner(source, std::move(tensors), std::move(derived)).Run(degrees);
}

}  // namespace holdfast::converter
