#include "converter/megatron_dist_writer.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/megatron_arguments.h"
#include "converter/megatron_files.h"
#include "converter/megatron_layout.h"
#include "converter/megatron_tensors.h"

namespace holdfast::converter {
namespace {

constexpr char kMetadataJson[] =
    "{\"sharded_backend\": \"torch_dist\", \"sharded_backend_version\": 1, "
    "\"common_backend\": \"torch\", \"common_backend_version\": 1}";
constexpr char kForm[] = "fully_reshardable";

// One key of the checkpoint, and what its tensor is made of.
struct KeyTensor {
  Dtype dtype = Dtype::kFloat32;
  std::vector<uint64_t> shape;  // of one part
  bool layer_axis = false;
  bool expert_axis = false;
  uint64_t layers = 1;
  uint64_t experts = 1;
  std::map<std::pair<uint64_t, uint64_t>, MegatronElements> parts;  // by layer and expert
};

// Arguments of models whose layers differ: Megatron then numbers them in keys.
bool LayersDiffer(const TorchValue& args) {
  if (!args.present()) return false;
  for (const std::string_view key : {"moe_layer_freq", "linear_attention_freq"}) {
    const TorchValue value = args.Find(key);
    if (value.Is(TorchValue::Kind::kList)) return true;
    if (value.Is(TorchValue::Kind::kInteger) && value.Int64().value_or(1) > 1) return true;
  }
  for (const std::string_view key :
       {"hetereogenous_dist_checkpoint", "heterogeneous_layers_config_path",
        "heterogeneous_layers_config_encoded_json"}) {
    const TorchValue value = args.Find(key);
    if (value.Is(TorchValue::Kind::kBool) ? value.Bool().value_or(false)
                                          : value.Is(TorchValue::Kind::kString)) {
      return true;
    }
  }
  return false;
}

// Keys of objects that are the buckets' or Megatron's common state, which is written anew.
bool IsOptimizerObject(std::string_view key) {
  return key.find("optimizer.distributed.") != std::string_view::npos ||
         key.starts_with("common_state/") || key.starts_with("optimizer.");
}

class Planner {
 public:
  Planner(ConversionSource& source, MegatronTensors tensors,
          std::optional<DerivedArguments> derived, const DcpWriteOptions& options)
      : index_(source.index()),
        tensors_(std::move(tensors)),
        derived_(std::move(derived)),
        builder_(index_, options),
        metadata_(builder_.metadata()) {}

  absl::StatusOr<MegatronDistPlan> Run() {
    const bool released = !index_.has_step;
    const std::string directory = released ? "release" : absl::StrFormat("iter_%07d", index_.step);
    ChooseNames();
    RETURN_IF_ERROR(CollectKeys());
    RETURN_IF_ERROR(CheckExperts());
    AddBlobs();
    RETURN_IF_ERROR(AddRandom());
    RETURN_IF_ERROR(AddExtras());
    for (const auto& [key, tensor] : keys_) RETURN_IF_ERROR(AddTensor(key, tensor));
    MegatronDistPlan plan;
    plan.prefix = directory + "/";
    plan.tensor_count = index_.tensor_states.size();
    plan.sharded = std::move(builder_).Finish();
    ASSIGN_OR_RETURN(PlannedFile common, Common(plan.prefix + "common.pt"));
    plan.others.Add(std::move(common));
    plan.others.AddText(plan.prefix + "metadata.json", kMetadataJson);
    plan.others.AddText("latest_checkpointed_iteration.txt",
                        released ? "release" : absl::StrCat(index_.step));
    plan.others.left_out = tensors_.left_out();
    plan.others.notes = tensors_.Notes();
    return plan;
  }

 private:
  // Whether layers are an axis, and whether norms are named as in TransformerEngine's modules.
  void ChooseNames() {
    std::map<std::string, uint64_t, std::less<>> layers;  // by prefix
    bool has_local_norm = false;
    for (const auto& [name, weights] : tensors_.weights()) {
      const auto layer = ParseMegatronLayer(name);
      if (!layer.has_value()) continue;
      uint64_t& count = layers[std::string(layer->prefix)];
      count = std::max(count, layer->number + 1);
      // Next to fused queries, keys and values TransformerEngine's norm is part of their module.
      if (layer->rest == ".input_layernorm.weight") {
        std::string attention(name);
        attention.replace(attention.size() - layer->rest.size(), layer->rest.size(),
                          ".self_attention.linear_qkv.weight");
        has_local_norm = has_local_norm || tensors_.weights().contains(attention);
      }
    }
    local_modules_ =
        tensors_.arguments().present ? tensors_.arguments().local_modules : has_local_norm;
    layer_counts_ = std::move(layers);
    if (LayersDiffer(tensors_.state().Common("args"))) layers_ = MegatronLayers::kNumbered;
    if (layers_ == MegatronLayers::kAxis && !LayersAreAlike()) {
      layers_ = MegatronLayers::kNumbered;
    }
  }

  // Every tensor of a layer is in all layers, in one shape and dtype.
  bool LayersAreAlike() const {
    struct Seen {
      uint64_t count = 0;
      uint32_t first = 0;
    };
    std::map<std::string, Seen> seen;  // names without the layer
    std::map<std::string, uint64_t> layers;
    for (const auto& [name, weights] : tensors_.weights()) {
      const auto layer = ParseMegatronLayer(name);
      if (!layer.has_value()) continue;
      const std::string rest = absl::StrCat(std::string(layer->prefix), std::string(layer->rest));
      const auto [known, is_new] =
          seen.emplace(rest, Seen{.count = 0, .first = weights.tensor_state});
      ++known->second.count;
      layers[rest] = layer_counts_.find(layer->prefix)->second;
      const TensorState& first = index_.tensor_states[known->second.first];
      const TensorState& mine = index_.tensor_states[weights.tensor_state];
      if (first.shape != mine.shape || first.dtype != mine.dtype) return false;
    }
    return std::ranges::all_of(
        seen, [&](const auto& each) { return each.second.count == layers.at(each.first); });
  }

  MegatronPlace PlaceOf(std::string_view name) const {
    return MegatronPlaceOf(name, layers_, local_modules_);
  }

  absl::Status CollectKeys() {
    for (const auto& [name, weights] : tensors_.weights()) {
      const TensorState& state = index_.tensor_states[weights.tensor_state];
      const MegatronPlace place = PlaceOf(name);
      RETURN_IF_ERROR(Collect(place.key.text, name, place,
                              {.tensor_state = weights.tensor_state, .dtype = state.dtype}));
      for (const auto& [state_key, elements] : weights.states) {
        RETURN_IF_ERROR(Collect(absl::StrCat("optimizer.state.", state_key, ".", place.key.text),
                                name, place, elements));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Collect(std::string key, const std::string& name, const MegatronPlace& place,
                       const MegatronElements& elements) {
    const TensorState& state = index_.tensor_states[elements.tensor_state];
    const auto [known, is_new] = keys_.try_emplace(std::move(key));
    KeyTensor& tensor = known->second;
    if (is_new) {
      tensor.dtype = elements.dtype;
      tensor.shape = state.shape;
      tensor.layer_axis = place.key.layer_axis;
      tensor.expert_axis = place.key.expert_axis;
      if (tensor.layer_axis) {
        tensor.layers = layer_counts_.find(ParseMegatronLayer(name)->prefix)->second;
      }
    }
    if (tensor.expert_axis) tensor.experts = std::max(tensor.experts, place.expert + 1);
    const std::pair at(tensor.layer_axis ? place.layer : 0, place.expert);
    if (tensor.dtype != elements.dtype || tensor.shape != state.shape ||
        tensor.expert_axis != place.key.expert_axis || !tensor.parts.emplace(at, elements).second) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: Megatron's key \"%s\" is that of another tensor too, or of one of another shape or "
          "dtype (%s of shape [%s]); --rename or --drop one",
          Describe(state), known->first, std::string(DtypeName(tensor.dtype)),
          absl::StrJoin(tensor.shape, ", ")));
    }
    return absl::OkStatus();
  }

  // Where there is one expert of a layer, all are there.
  absl::Status CheckExperts() const {
    for (const auto& [key, tensor] : keys_) {
      if (!tensor.expert_axis || key.starts_with("optimizer.state.")) continue;
      if (tensor.parts.size() == tensor.layers * tensor.experts) continue;
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: expected all of %d experts in each of %d layers, found %d of them",
                          key, tensor.experts, tensor.layers, tensor.parts.size()));
    }
    return absl::OkStatus();
  }

  absl::Status AddTensor(const std::string& key, const KeyTensor& tensor) {
    if (!taken_.insert(key).second) return Taken(key);
    const uint32_t axes = (tensor.layer_axis ? 1 : 0) + (tensor.expert_axis ? 1 : 0);
    std::vector<uint64_t> shape;
    if (tensor.layer_axis) shape.push_back(tensor.layers);
    if (tensor.expert_axis) shape.push_back(tensor.experts);
    shape.insert(shape.end(), tensor.shape.begin(), tensor.shape.end());
    DcpTensor planned{.key = key,
                      .dtype = std::string(DtypeName(tensor.dtype)),
                      .shape = std::move(shape),
                      .chunks_begin = metadata_.chunks.size()};
    for (const auto& [at, elements] : tensor.parts) {
      metadata_.chunks.push_back(
          {.offsets = metadata_.numbers.size(),
           .item = builder_.Add(
               {.number = elements.tensor_state, .dtype = elements.dtype, .leading_axes = axes})});
      std::vector<uint64_t>& numbers = metadata_.numbers;
      if (tensor.layer_axis) numbers.push_back(at.first);
      if (tensor.expert_axis) numbers.push_back(at.second);
      numbers.insert(numbers.end(), tensor.shape.size(), 0);
      numbers.insert(numbers.end(), axes, 1);
      numbers.insert(numbers.end(), tensor.shape.begin(), tensor.shape.end());
    }
    planned.chunks_end = metadata_.chunks.size();
    metadata_.tensors.push_back(std::move(planned));
    return absl::OkStatus();
  }

  static absl::Status Taken(const std::string& key) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "two tensors or objects would have the key %s; --rename or --drop one", JsonQuote(key)));
  }

  // ---------------------------------------------------------------- objects

  void AddObject(std::string key, uint32_t item) {
    taken_.insert(key);
    metadata_.objects.push_back({.key = std::move(key), .item = item});
  }

  // Sharded objects of a torch_dist source, byte for byte.
  void AddBlobs() {
    for (uint32_t i = 0; i < index_.blobs.size(); ++i) {
      const std::string& name = index_.blobs[i].name;
      if (IsMegatronStateBlob(name) || IsOptimizerObject(name) ||
          !ParseMegatronObject(name).has_value() || taken_.contains(name)) {
        continue;
      }
      AddObject(name, builder_.Add({.kind = DcpPlannedItem::Kind::kBlob, .number = i}));
    }
  }

  // A list of one, as Megatron stores an object.
  absl::StatusOr<std::string> Stored(const TorchValue& value) const {
    TorchDraft draft(index_, "");
    draft.out().EmptyList();
    draft.out().Mark();
    RETURN_IF_ERROR(PushKept(value, draft));
    draft.out().Appends();
    return TorchFileBytes(std::move(draft).Finish());
  }

  // Random states of a legacy source: those of each rank.
  absl::Status AddRandom() {
    const TorchValue random = tensors_.state().random();
    if (!random.present()) return absl::OkStatus();
    const MegatronArguments& arguments = tensors_.arguments();
    ASSIGN_OR_RETURN(const size_t count, random.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view rank, random.Key(i).String());
      std::string name = absl::StrCat("mp_rank_", std::string(rank));
      std::ranges::replace(name, '.', '_');
      const auto numbers = ParseMegatronRank(name);
      if (!numbers.has_value() || numbers->size() != 3) continue;
      const bool with_experts = arguments.expert_ranks > 1;
      std::string key = absl::StrCat("rng_state/shard_", (*numbers)[0], ".", (*numbers)[1]);
      if (with_experts) absl::StrAppend(&key, ".", (*numbers)[2]);
      absl::StrAppend(&key, "_", arguments.pipeline_ranks, ".", arguments.tensor_ranks);
      if (with_experts) absl::StrAppend(&key, ".", arguments.expert_ranks);
      if (taken_.contains(key)) continue;
      ASSIGN_OR_RETURN(std::string object, Stored(random.Entry(i)));
      AddObject(std::move(key), builder_.AddGiven(std::move(object)));
    }
    return absl::OkStatus();
  }

  // Extra states of a legacy source's modules, layer by layer and expert by expert.
  absl::Status AddExtras() {
    const TorchValue extra = tensors_.state().extra();
    if (!extra.present()) return absl::OkStatus();
    ASSIGN_OR_RETURN(const size_t count, extra.EntryCount());
    std::map<std::string, uint64_t> experts;  // by key
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view name, extra.Key(i).String());
      const MegatronPlace place = PlaceOf(name);
      uint64_t& of_key = experts[place.key.text];
      of_key = std::max(of_key, place.expert + 1);
    }
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view name, extra.Key(i).String());
      // The output layer's is none of torch_dist's; grouped experts have one together.
      if (name == "output_layer._extra_state" ||
          name.find(".experts.linear_fc") != std::string_view::npos) {
        continue;
      }
      const MegatronPlace place = PlaceOf(name);
      std::vector<uint64_t> at;
      std::vector<uint64_t> of;
      if (place.key.layer_axis) {
        const auto layers = layer_counts_.find(ParseMegatronLayer(name)->prefix);
        if (layers == layer_counts_.end() || place.layer >= layers->second) continue;
        at.push_back(place.layer);
        of.push_back(layers->second);
      }
      if (place.key.expert_axis) {
        at.push_back(place.expert);
        of.push_back(experts.at(place.key.text));
      }
      if (at.empty()) {
        at = {0};
        of = {1};
      }
      std::string key = absl::StrCat(place.key.text, "/shard_", absl::StrJoin(at, "."), "_",
                                     absl::StrJoin(of, "."));
      if (taken_.contains(key)) continue;
      ASSIGN_OR_RETURN(std::string object, Stored(extra.Entry(i)));
      AddObject(std::move(key), builder_.AddGiven(std::move(object)));
    }
    return absl::OkStatus();
  }

  // ---------------------------------------------------------------- common.pt

  absl::StatusOr<PlannedFile> Common(std::string path) const {
    TorchDraft draft(index_, std::move(path));
    PickleWriter& out = draft.out();
    const TorchValue common = tensors_.state().common();
    out.EmptyDict();
    out.Mark();
    if (common.present()) {
      ASSIGN_OR_RETURN(const size_t count, common.EntryCount());
      for (size_t i = 0; i < count; ++i) {
        ASSIGN_OR_RETURN(const std::string_view key, common.Key(i).String());
        if (key == "content_metadata") continue;
        draft.Key(key);
        RETURN_IF_ERROR(PushKept(common.Entry(i), draft));
      }
    }
    if (derived_.has_value()) {
      draft.Key("args");
      PushMegatronArguments(
          *derived_, [] {}, draft);
    }
    if (!tensors_.state().Common("checkpoint_version").present()) {
      draft.Key("checkpoint_version");
      out.Float(3.0);
    }
    if (!tensors_.state().Common("iteration").present()) {
      draft.Key("iteration");
      out.Int(index_.has_step ? static_cast<int64_t>(index_.step) : 0);
    }
    if (tensors_.has_optimizer()) {
      draft.Key("optimizer");
      RETURN_IF_ERROR(PushOptimizers(draft));
    }
    draft.Key("content_metadata");
    draft.pickle().Dict([&] {
      if (tensors_.has_optimizer()) {
        draft.Key("distrib_optim_sharding_type");
        out.String(kForm);
        draft.Key("distrib_optim_fully_reshardable_mem_efficient");
        out.Bool(false);
      }
      draft.Key("singleton_local_shards");
      out.Bool(false);
      draft.Key("chained_optim_avoid_prefix");
      out.Bool(true);
    });
    out.SetItems();
    return std::move(draft).Finish();
  }

  // One optimizer as it is; of several, a dict by their numbers.
  absl::Status PushOptimizers(TorchDraft& draft) const {
    const uint32_t count = tensors_.OptimizerCount();
    if (count == 1) return PushOptimizer(0, draft);
    draft.out().EmptyDict();
    draft.out().Mark();
    for (uint32_t number = 0; number < count; ++number) {
      draft.out().Int(number);
      RETURN_IF_ERROR(PushOptimizer(number, draft));
    }
    draft.out().SetItems();
    return absl::OkStatus();
  }

  absl::Status PushOptimizer(uint32_t number, TorchDraft& draft) const {
    PickleWriter& out = draft.out();
    out.EmptyDict();
    out.Mark();
    RETURN_IF_ERROR(tensors_.PushOptimizerBegin(number, draft));
    draft.Key("param_state_sharding_type");
    out.String(kForm);
    out.SetItems();
    return absl::OkStatus();
  }

  const ForeignIndex& index_;
  const MegatronTensors tensors_;
  const std::optional<DerivedArguments> derived_;  // where the source has none
  MegatronLayers layers_ = MegatronLayers::kAxis;
  bool local_modules_ = false;
  std::map<std::string, uint64_t, std::less<>> layer_counts_;  // by prefix
  std::map<std::string, KeyTensor> keys_;
  std::unordered_set<std::string> taken_;
  DcpPlanBuilder builder_;
  DcpMetadata& metadata_;
};

}  // namespace

absl::StatusOr<MegatronDistPlan> PlanMegatronDist(ConversionSource& source,
                                                  const DcpWriteOptions& options,
                                                  const std::string& config) {
  ASSIGN_OR_RETURN(MegatronTensors tensors, MegatronTensors::Sort(source));
  ASSIGN_OR_RETURN(std::optional<DerivedArguments> derived,
                   DeriveMegatronArguments(source.index(), tensors, config));
  return Planner(source, std::move(tensors), std::move(derived), options).Run();
}

absl::Status WriteMegatronDist(FileSystem& file_system, const std::string& directory,
                               ConversionSource& source, const MegatronDistPlan& plan,
                               const ConversionProgress& progress) {
  OutputFiles files(file_system, directory, plan.bytes(), progress);
  RETURN_IF_ERROR(WriteDcpFiles(files, plan.prefix, source, plan.sharded));
  for (const PlannedFile& file : plan.others.files) {
    RETURN_IF_ERROR(WriteTorchFile(files, source, file));
  }
  return files.Finish();
}

}  // namespace holdfast::converter
