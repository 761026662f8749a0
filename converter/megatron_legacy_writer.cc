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
#include "absl/strings/str_replace.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/megatron_buffers.h"
#include "converter/megatron_layout.h"
#include "converter/megatron_tensors.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kEmbedding = "embedding.word_embeddings.weight";
constexpr std::string_view kOutput = "output_layer.weight";
constexpr std::string_view kOutputExtra = "output_layer._extra_state";
constexpr std::array<std::string_view, 3> kStates = {"param", "exp_avg", "exp_avg_sq"};
constexpr uint64_t kUsualBucketElements = 40'000'000;
constexpr uint64_t kUsualBucketElementsPerRank = 1'000'000;

// A parameter, or a buffer of the model, as one rank has it.
struct Local {
  std::string name;  // as the rank's model calls it
  const MegatronWeights* weights = nullptr;
  std::vector<uint64_t> shape = {};  // of the rank's shard
  MegatronCut cut = {};
  bool shared_embedding = false;
  bool trained = false;

  uint64_t ElementCount() const {
    uint64_t count = 1;
    for (const uint64_t size : shape) count *= size;
    return count;
  }
};

// Where in its dtype's buffer each trained parameter of a rank lies; locals in the buffer's order.
struct RankBuffer {
  Dtype dtype = Dtype::kFloat32;
  std::vector<const Local*> locals;
  BufferLayout layout;
};

class Planner {
 public:
  Planner(ConversionSource& source, MegatronTensors tensors, const MegatronDegrees& degrees)
      : index_(source.index()), tensors_(std::move(tensors)), degrees_(degrees) {}

  absl::StatusOr<TorchFilesPlan> Run() {
    RETURN_IF_ERROR(CheckStates());
    RETURN_IF_ERROR(CountLayers());
    RETURN_IF_ERROR(CheckHeads());
    const bool released = !index_.has_step;
    const std::string directory = released ? "release" : absl::StrFormat("iter_%07d", index_.step);
    for (uint64_t stage = 0; stage < degrees_.pipeline; ++stage) {
      for (uint64_t rank = 0; rank < degrees_.tensor; ++rank) {
        std::string path = absl::StrFormat("%s/mp_rank_%02d", directory, rank);
        if (degrees_.pipeline > 1) absl::StrAppendFormat(&path, "_%03d", stage);
        RETURN_IF_ERROR(AddRank(stage, rank, path));
      }
    }
    plan_.AddText("latest_checkpointed_iteration.txt",
                  released ? "release" : absl::StrCat(index_.step));
    plan_.tensor_count = index_.tensor_states.size();
    plan_.left_out = tensors_.left_out();
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

  absl::Status CountLayers() {
    for (const auto& [name, weights] : tensors_.weights()) {
      const auto layer = ParseMegatronLayer(name);
      if (layer.has_value()) layers_ = std::max(layers_, layer->number + 1);
    }
    if (layers_ % degrees_.pipeline == 0) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrFormat(
        "--to pp=%d: expected a divisor of the %d layers", degrees_.pipeline, layers_));
  }

  // Queries, keys and values lie group by group: a rank has whole groups.
  absl::Status CheckHeads() const {
    if (degrees_.tensor == 1) return absl::OkStatus();
    const auto has_attention = [](const auto& entry) {
      return entry.first.find(".linear_qkv.") != std::string::npos ||
             entry.first.find(".query_key_value.") != std::string::npos;
    };
    if (std::ranges::none_of(tensors_.weights(), has_attention)) return absl::OkStatus();
    const TorchValue args = tensors_.state().Common("args");
    std::optional<uint64_t> groups;
    if (args.present()) {
      const TorchValue grouped = args.Find("group_query_attention");
      const bool is_grouped = grouped.Is(TorchValue::Kind::kBool) && grouped.Bool().value_or(false);
      const TorchValue count = args.Find(is_grouped ? "num_query_groups" : "num_attention_heads");
      if (count.Is(TorchValue::Kind::kInteger) && count.Uint64().ok()) groups = *count.Uint64();
    }
    if (!groups.has_value()) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "--to tp=%d: expected args that say how many attention heads there are, found none",
          degrees_.tensor));
    }
    if (*groups % degrees_.tensor == 0) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrFormat("--to tp=%d: expected a divisor of the %d groups of attention heads",
                        degrees_.tensor, *groups));
  }

  // ---------------------------------------------------------------- what a rank has

  // Gated layers have twice as many rows as the layer behind them has columns.
  bool IsGated(const std::string& name) const {
    const std::string second = absl::StrReplaceAll(
        name, {{"linear_fc1.bias", "linear_fc2.weight"}, {"linear_fc1.", "linear_fc2."}});
    const auto behind = tensors_.weights().find(second);
    const auto mine = tensors_.weights().find(name);
    if (second != name && behind != tensors_.weights().end()) {
      const std::vector<uint64_t>& columns = StateOf(behind->second).shape;
      const std::vector<uint64_t>& rows = StateOf(mine->second).shape;
      if (columns.size() == 2 && !rows.empty()) return rows[0] == 2 * columns[1];
    }
    return tensors_.arguments().gated.value_or(false);
  }

  absl::Status CutShape(const std::string& name, Local& local) const {
    local.shape = StateOf(*local.weights).shape;
    const uint64_t ranks = degrees_.tensor;
    if (ranks == 1) return absl::OkStatus();
    const std::optional<MegatronCut> cut = MegatronCutOf(name, IsGated(name));
    if (!cut.has_value()) {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: --to tp=%d: Megatron's names do not say how it is cut",
                          Describe(StateOf(*local.weights)), ranks));
    }
    local.cut = *cut;
    if (cut->kind == MegatronCut::Kind::kReplicated) return absl::OkStatus();
    const uint64_t parts = cut->kind == MegatronCut::Kind::kGated ? 2 * ranks : ranks;
    if (cut->dimension >= local.shape.size() || local.shape[cut->dimension] % parts != 0) {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: --to tp=%d: expected a multiple of %d along dimension %d",
                          Describe(StateOf(*local.weights)), ranks, parts, cut->dimension));
    }
    local.shape[cut->dimension] /= ranks;
    return absl::OkStatus();
  }

  absl::StatusOr<Local> LocalOf(const std::string& name, const std::string& local_name,
                                const MegatronWeights& weights) const {
    Local local{.name = local_name, .weights = &weights};
    RETURN_IF_ERROR(CutShape(name, local));
    const bool tied = tensors_.arguments().tied.value_or(false) && degrees_.pipeline > 1;
    local.shared_embedding = tied && name == kEmbedding;
    local.trained = !weights.states.empty();
    return local;
  }

  // The part of the model that a stage has, named as the stage names it, in the order of the model.
  absl::StatusOr<std::vector<Local>> LocalsOf(uint64_t stage) const {
    std::vector<Local> locals;
    for (const auto& [name, weights] : tensors_.weights()) {
      const std::optional<std::string> local_name = NameIn(name, stage);
      if (!local_name.has_value()) continue;
      ASSIGN_OR_RETURN(Local local, LocalOf(name, *local_name, weights));
      locals.push_back(std::move(local));
    }
    const auto embedding = tensors_.weights().find(std::string(kEmbedding));
    if (stage > 0 && stage + 1 == degrees_.pipeline && tensors_.arguments().tied.value_or(false) &&
        embedding != tensors_.weights().end()) {
      ASSIGN_OR_RETURN(Local copy,
                       LocalOf(embedding->first, std::string(kOutput), embedding->second));
      locals.push_back(std::move(copy));
    }
    std::ranges::sort(locals, MegatronModelOrder, &Local::name);
    return locals;
  }

  // What the stage calls it; nothing if it has it not.
  std::optional<std::string> NameIn(std::string_view name, uint64_t stage) const {
    const uint64_t of_stage = layers_ / degrees_.pipeline;
    if (const auto layer = ParseMegatronLayer(name); layer.has_value()) {
      if (layer->number / of_stage != stage) return std::nullopt;
      return absl::StrCat(std::string(layer->prefix), layer->number % of_stage,
                          std::string(layer->rest));
    }
    const uint64_t at = name.starts_with("embedding.") ? 0 : degrees_.pipeline - 1;
    if (at != stage) return std::nullopt;
    return std::string(name);
  }

  // The rank's elements of a tensor state of the parameter, in the order of its shard.
  void AppendRanges(const Local& local, uint32_t tensor_state, uint64_t rank,
                    std::vector<ElementRange>& ranges) const {
    const std::vector<uint64_t>& whole = StateOf(*local.weights).shape;
    if (degrees_.tensor == 1 || local.cut.kind == MegatronCut::Kind::kReplicated) {
      ranges.push_back({.tensor_state = tensor_state, .begin = 0, .end = local.ElementCount()});
      return;
    }
    const size_t d = local.cut.dimension;
    uint64_t inner = 1;
    for (size_t i = d + 1; i < whole.size(); ++i) inner *= whole[i];
    uint64_t outer = 1;
    for (size_t i = 0; i < d; ++i) outer *= whole[i];
    const uint64_t halves = local.cut.kind == MegatronCut::Kind::kGated ? 2 : 1;
    const uint64_t width = local.shape[d] / halves * inner;
    CHECK(halves == 1 || outer == 1);
    for (uint64_t half = 0; half < halves; ++half) {
      const uint64_t begin = half * (whole[d] / 2) * inner + rank * width;
      ranges.push_back({.tensor_state = tensor_state,
                        .begin = begin,
                        .end = begin + width,
                        .repeat_count = outer,
                        .repeat_stride = whole[d] * inner});
    }
  }

  BufferRule RuleOf(uint64_t stage) const {
    const MegatronArguments& arguments = tensors_.arguments();
    BufferRule rule{
        .bucket_elements = {},
        .end_multiple = BucketEndMultiple(arguments.data_ranks, arguments.wide_padding)};
    // Only the first chunk of the first stage has buckets: its communication is waited for.
    if (arguments.overlap_reduce && !arguments.one_bucket && stage == 0) {
      rule.bucket_elements = arguments.bucket_elements.value_or(
          std::max(kUsualBucketElements, kUsualBucketElementsPerRank * arguments.data_ranks));
    }
    return rule;
  }

  absl::StatusOr<std::vector<RankBuffer>> BuffersOf(const std::vector<Local>& locals,
                                                    uint64_t stage) const {
    std::vector<RankBuffer> buffers;  // by dtype, in the order of the model's first need
    for (const Local& local : locals) {
      if (!local.trained) continue;
      const Dtype dtype = StateOf(*local.weights).dtype;
      auto buffer = std::ranges::find(buffers, dtype, &RankBuffer::dtype);
      if (buffer == buffers.end()) {
        buffers.push_back({.dtype = dtype, .locals = {}, .layout = {}});
        buffer = buffers.end() - 1;
      }
      buffer->locals.push_back(&local);
    }
    for (RankBuffer& buffer : buffers) {
      std::ranges::reverse(buffer.locals);
      std::vector<BufferParameter> parameters;
      for (const Local* const local : buffer.locals) {
        parameters.push_back(
            {.elements = local->ElementCount(), .shared_embedding = local->shared_embedding});
      }
      ASSIGN_OR_RETURN(buffer.layout, LayOutBuffer(parameters, RuleOf(stage)));
    }
    return buffers;
  }

  // ---------------------------------------------------------------- files

  absl::Status AddRank(uint64_t stage, uint64_t rank, const std::string& path) {
    ASSIGN_OR_RETURN(const std::vector<Local> locals, LocalsOf(stage));
    std::vector<RankBuffer> buffers;
    if (tensors_.has_optimizer()) {
      ASSIGN_OR_RETURN(buffers, BuffersOf(locals, stage));
      plan_.Add(OptimizerFile(buffers, rank, path + "/distrib_optim.pt"));
    }
    ASSIGN_OR_RETURN(PlannedFile file,
                     ModelFile(locals, buffers, stage, rank, path + "/model_optim_rng.pt"));
    plan_.Add(std::move(file));
    return absl::OkStatus();
  }

  absl::StatusOr<PlannedFile> ModelFile(const std::vector<Local>& locals,
                                        const std::vector<RankBuffer>& buffers, uint64_t stage,
                                        uint64_t rank, std::string path) const {
    TorchDraft draft(index_, std::move(path));
    draft.out().EmptyDict();
    draft.out().Mark();
    RETURN_IF_ERROR(PushCommon(draft));
    draft.Key("model");
    RETURN_IF_ERROR(PushModel(locals, buffers, stage, rank, draft));
    if (tensors_.has_optimizer()) {
      draft.Key("optimizer");
      RETURN_IF_ERROR(PushOptimizer(draft));
    }
    if (HasRandomStates()) {
      const TorchValue random =
          tensors_.state().random().Find(absl::StrCat(stage, ".", rank, ".0"));
      if (random.present()) {
        draft.Key("rng_state");
        RETURN_IF_ERROR(PushKept(random, draft));
      }
    }
    draft.out().SetItems();
    return std::move(draft).Finish();
  }

  // Those of the source's ranks are those of these ranks, if the degrees are the same.
  bool HasRandomStates() const {
    const MegatronArguments& arguments = tensors_.arguments();
    return tensors_.state().random().present() && arguments.tensor_ranks == degrees_.tensor &&
           arguments.pipeline_ranks == degrees_.pipeline;
  }

  absl::Status PushCommon(TorchDraft& draft) const {
    const TorchValue common = tensors_.state().common();
    if (common.present()) {
      ASSIGN_OR_RETURN(const size_t count, common.EntryCount());
      for (size_t i = 0; i < count; ++i) {
        ASSIGN_OR_RETURN(const std::string_view key, common.Key(i).String());
        if (key == "content_metadata") continue;  // of torch_dist
        draft.Key(key);
        RETURN_IF_ERROR(key == "args" ? PushArguments(common.Entry(i), draft)
                                      : PushKept(common.Entry(i), draft));
      }
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

  // Those of the source, with the degrees of these files.
  absl::Status PushArguments(const TorchValue& args, TorchDraft& draft) const {
    const TorchValue attributes = args.attributes();
    if (!args.IsObject("argparse", "Namespace") || !attributes.present()) {
      return PushKept(args, draft);
    }
    const std::map<std::string_view, std::optional<uint64_t>> changed = {
        {"tensor_model_parallel_size", degrees_.tensor},
        {"pipeline_model_parallel_size", degrees_.pipeline},
        {"virtual_pipeline_model_parallel_size", std::nullopt},
        {"num_layers_per_virtual_pipeline_stage", std::nullopt},
        {"num_virtual_stages_per_pipeline_rank", std::nullopt},
        {"decoder_first_pipeline_num_layers", std::nullopt},
        {"decoder_last_pipeline_num_layers", std::nullopt},
        {"pipeline_model_parallel_layout", std::nullopt},
        {"expert_model_parallel_size", 1},
        {"expert_tensor_parallel_size", degrees_.tensor},
    };
    draft.pickle().Object("argparse", "Namespace");
    draft.out().EmptyDict();
    draft.out().Mark();
    ASSIGN_OR_RETURN(const size_t count, attributes.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view key, attributes.Key(i).String());
      draft.Key(key);
      const auto change = changed.find(key);
      if (change == changed.end()) {
        RETURN_IF_ERROR(PushKept(attributes.Entry(i), draft));
      } else if (change->second.has_value()) {
        draft.out().Int(static_cast<int64_t>(*change->second));
      } else {
        draft.out().None();
      }
    }
    draft.out().SetItems();
    draft.out().Build();
    return absl::OkStatus();
  }

  absl::Status PushModel(const std::vector<Local>& locals, const std::vector<RankBuffer>& buffers,
                         uint64_t stage, uint64_t rank, TorchDraft& draft) const {
    struct View {
      uint32_t storage;
      uint64_t begin;
    };
    std::map<const Local*, View> views;
    for (const RankBuffer& buffer : buffers) {
      const uint32_t storage =
          draft.Buffer(buffer.dtype, BufferRanges(buffer, "", rank, Padding::kKept));
      for (size_t i = 0; i < buffer.locals.size(); ++i) {
        views[buffer.locals[i]] = {.storage = storage, .begin = buffer.layout.begins[i]};
      }
    }
    PickleWriter& out = draft.out();
    out.Global("collections", "OrderedDict");
    out.Tuple(0);
    out.Reduce();
    out.Mark();
    for (const Local& local : locals) {
      draft.Key(local.name);
      if (const auto view = views.find(&local); view != views.end()) {
        draft.ViewOf(view->second.storage, local.shape, view->second.begin);
        continue;
      }
      std::vector<ElementRange> ranges;
      AppendRanges(local, local.weights->tensor_state, rank, ranges);
      draft.Ranges(StateOf(*local.weights).dtype, local.shape, std::move(ranges));
    }
    RETURN_IF_ERROR(PushExtras(stage, draft));
    out.SetItems();
    return absl::OkStatus();
  }

  // Extra states of the stage's modules.
  absl::Status PushExtras(uint64_t stage, TorchDraft& draft) const {
    const TorchValue extra = tensors_.state().extra();
    if (!extra.present()) return absl::OkStatus();
    ASSIGN_OR_RETURN(const size_t count, extra.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view name, extra.Key(i).String());
      const std::optional<std::string> local_name = NameIn(name, stage);
      if (!local_name.has_value()) continue;
      draft.Key(*local_name);
      RETURN_IF_ERROR(PushKept(extra.Entry(i), draft));
    }
    // That of the output layer is in no torch_dist; without it the model would not load.
    if (stage + 1 == degrees_.pipeline && !extra.Find(kOutputExtra).present()) {
      draft.Key(kOutputExtra);
      draft.out().None();
    }
    return absl::OkStatus();
  }

  absl::Status PushOptimizer(TorchDraft& draft) const {
    PickleWriter& out = draft.out();
    out.EmptyDict();
    out.Mark();
    RETURN_IF_ERROR(tensors_.PushOptimizerBegin(0, draft));
    out.SetItems();
    return absl::OkStatus();
  }

  // All of a buffer: weights (`state` ""), or a state of the optimizer; zero where no parameter is.
  enum class Padding { kKept, kStripped };  // at the ends of buckets
  std::vector<ElementRange> BufferRanges(const RankBuffer& buffer, const std::string& state,
                                         uint64_t rank, Padding padding) const {
    std::vector<ElementRange> ranges;
    uint64_t at = 0;
    const auto fill_to = [&](uint64_t end) {
      CHECK(at <= end);
      if (at < end) ranges.push_back({.tensor_state = kZeroElements, .begin = at, .end = end});
      at = end;
    };
    for (size_t i = 0; i < buffer.locals.size(); ++i) {
      const Local& local = *buffer.locals[i];
      fill_to(buffer.layout.begins[i] -
              (padding == Padding::kStripped ? buffer.layout.paddings[i] : 0));
      AppendRanges(local,
                   state.empty() ? local.weights->tensor_state
                                 : local.weights->states.at(state).tensor_state,
                   rank, ranges);
      at += local.ElementCount();
    }
    fill_to(padding == Padding::kStripped ? buffer.layout.elements()
                                          : buffer.layout.padded_elements());
    return ranges;
  }

  PlannedFile OptimizerFile(const std::vector<RankBuffer>& buffers, uint64_t rank,
                            std::string path) const {
    TorchDraft draft(index_, std::move(path));
    TorchPickle& pickle = draft.pickle();
    PickleWriter& out = draft.out();
    pickle.Dict([&] {
      draft.Key("buckets_coalesced");
      out.Bool(true);
      for (size_t number = 0; number < buffers.size(); ++number) {
        const RankBuffer& buffer = buffers[number];
        out.Int(static_cast<int64_t>(number));
        pickle.Dict([&] {
          out.Global("torch", DtypeName(buffer.dtype));
          out.Global("torch", DtypeName(GradientDtype(buffer.dtype)));
          out.Tuple(2);
          pickle.Dict([&] {
            const std::vector<uint64_t> shape = {buffer.layout.elements()};
            for (const std::string_view state : kStates) {
              draft.Key(state);
              draft.Ranges(Dtype::kFloat32, shape,
                           BufferRanges(buffer, std::string(state), rank, Padding::kStripped));
            }
            draft.Key("numel_unpadded");
            out.Int(static_cast<int64_t>(shape[0]));
          });
        });
      }
    });
    return std::move(draft).Finish();
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
  const MegatronDegrees degrees_;
  uint64_t layers_ = 0;
  TorchFilesPlan plan_;
};

}  // namespace

absl::StatusOr<TorchFilesPlan> PlanMegatronLegacy(ConversionSource& source,
                                                  const MegatronDegrees& degrees) {
  CHECK(degrees.tensor >= 1 && degrees.pipeline >= 1 &&
        degrees.tensor <= kMegatronRanksMax / degrees.pipeline);
  ASSIGN_OR_RETURN(MegatronTensors tensors, MegatronTensors::Sort(source));
  return Planner(source, std::move(tensors), degrees).Run();
}

}  // namespace holdfast::converter
