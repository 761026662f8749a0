#include "converter/megatron_model.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "converter/decimal.h"
#include "converter/deepspeed_states.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kChunksMax = uint64_t{1} << 12;
constexpr size_t kNestingMax = 16;
constexpr std::string_view kExtraState = "_extra_state";

// Tensors, and extra states, of a dict of dicts (files before megatron-core nest them), names
// joined with dots.
absl::Status Flatten(const TorchFile& torch, const TorchValue& dict, const std::string& prefix,
                     size_t depth, std::vector<std::pair<std::string, TorchValue>>& tensors,
                     std::vector<std::string>& others) {
  if (depth > kNestingMax) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "%s: expected the model in at most %d dicts in dicts", torch.name(), kNestingMax));
  }
  ASSIGN_OR_RETURN(const size_t count, dict.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    if (!dict.Key(i).Is(TorchValue::Kind::kString)) continue;
    ASSIGN_OR_RETURN(const std::string_view key, dict.Key(i).String());
    const std::string name =
        prefix.empty() ? std::string(key) : absl::StrCat(prefix, ".", std::string(key));
    const TorchValue value = dict.Entry(i);
    if (value.Is(TorchValue::Kind::kDict)) {
      RETURN_IF_ERROR(Flatten(torch, value, name, depth + 1, tensors, others));
    } else if (value.Is(TorchValue::Kind::kTensor) || name.ends_with(kExtraState)) {
      tensors.emplace_back(name, value);
    } else if (!value.Is(TorchValue::Kind::kNone)) {
      others.push_back(name);
    }
  }
  return absl::OkStatus();
}

// The gated layer of an MLP and the layer behind it.
std::optional<std::string> SecondLayerOf(const std::string& name) {
  std::string second = absl::StrReplaceAll(name, {{"linear_fc1.bias", "linear_fc2.weight"},
                                                  {"linear_fc1.", "linear_fc2."},
                                                  {"dense_h_to_4h.bias", "dense_4h_to_h.weight"},
                                                  {"dense_h_to_4h.", "dense_4h_to_h."}});
  if (second == name) return std::nullopt;
  return second;
}

}  // namespace

absl::StatusOr<std::unique_ptr<MegatronModel>> MegatronModel::Read(const ForeignFolder& folder,
                                                                   const MegatronFiles& files,
                                                                   PieceTable& table) {
  auto model = std::unique_ptr<MegatronModel>(new MegatronModel(table));
  for (const MegatronRankFiles& rank_files : files.ranks) {
    MegatronRank rank{.files = &rank_files};
    ASSIGN_OR_RETURN(rank.torch, OpenTorch(folder, rank_files.model, table));
    if (!rank.torch->root().Is(TorchValue::Kind::kDict)) {
      return rank.torch->root().Mismatch("a dict");
    }
    RETURN_IF_ERROR(model->CollectTensors(rank));
    model->ranks_.push_back(std::move(rank));
  }
  const TorchValue root = model->ranks_.front().torch->root();
  ASSIGN_OR_RETURN(model->arguments_, ReadMegatronArguments(root.Find("args")));
  const TorchValue version = root.Find("checkpoint_version");
  model->old_attention_ =
      (version.Is(TorchValue::Kind::kFloat) || version.Is(TorchValue::Kind::kInteger)) &&
      version.Double().value_or(3) < 2;
  RETURN_IF_ERROR(model->PlaceRanks());
  RETURN_IF_ERROR(model->CheckComplete());
  RETURN_IF_ERROR(model->NameGlobally());
  return model;
}

absl::Status MegatronModel::CollectTensors(MegatronRank& rank) {
  const TorchFile& torch = *rank.torch;
  std::map<uint64_t, TorchValue> chunks;
  ASSIGN_OR_RETURN(const size_t count, torch.root().EntryCount());
  for (size_t i = 0; i < count; ++i) {
    const TorchValue key = torch.root().Key(i);
    if (!key.Is(TorchValue::Kind::kString)) continue;
    ASSIGN_OR_RETURN(const std::string_view name, key.String());
    if (!name.starts_with("model") || !torch.root().Entry(i).Is(TorchValue::Kind::kDict)) continue;
    const auto number = name == "model" ? std::optional<uint64_t>(0) : ParseDecimal(name.substr(5));
    if (number.has_value() && *number < kChunksMax) chunks[*number] = torch.root().Entry(i);
  }
  if (chunks.empty()) {
    return absl::DataLossError(
        absl::StrCat(torch.name(), ": expected a dict \"model\" or \"model0\", found neither"));
  }
  for (const auto& [chunk, dict] : chunks) {
    std::vector<std::pair<std::string, TorchValue>> tensors;
    std::vector<std::string> others;
    RETURN_IF_ERROR(Flatten(torch, dict, "", 0, tensors, others));
    for (auto& [name, value] : tensors) {
      // TransformerEngine's own state, of its FP8 recipe: bytes of a pickle, not numbers.
      if (name.ends_with(kExtraState)) {
        const bool nothing = value.Is(TorchValue::Kind::kTensor)
                                 ? (*value.Tensor())->ElementCount() == 0
                                 : value.Is(TorchValue::Kind::kNone);
        if (!nothing) others.push_back(name);
        rank.extras.push_back({.local = std::move(name),
                               .global = {},
                               .chunk = static_cast<uint32_t>(chunk),
                               .value = value});
        continue;
      }
      ASSIGN_OR_RETURN(const TorchTensor* const tensor, value.Tensor());
      absl::StatusOr<StoredTensor> stored = Locate(torch, rank.files->model, *tensor);
      if (!stored.ok()) {
        table_.index().unreadable.push_back({absl::StrCat(rank.files->directory, ": ", name),
                                             std::string(stored.status().message())});
        continue;
      }
      rank.tensors.push_back({.local = std::move(name),
                              .global = {},
                              .chunk = static_cast<uint32_t>(chunk),
                              .stored = *std::move(stored)});
    }
    if (!others.empty()) {
      table_.index().notes.push_back(
          absl::StrFormat("%s: %d values of the model are no tensors, \"%s\" the first",
                          torch.name(), others.size(), others.front()));
    }
  }
  return absl::OkStatus();
}

absl::Status MegatronModel::PlaceRanks() {
  // One number behind the tensor-parallel rank: a stage, or an expert-parallel rank.
  const bool one_is_expert = arguments_.pipeline_ranks == 1 && arguments_.expert_ranks > 1;
  for (MegatronRank& rank : ranks_) {
    const std::vector<uint32_t>& numbers = rank.files->numbers;
    rank.tensor = numbers[0];
    if (numbers.size() == 2) (one_is_expert ? rank.expert : rank.stage) = numbers[1];
    if (numbers.size() == 3) {
      rank.stage = numbers[1];
      rank.expert = numbers[2];
    }
    tensor_ranks_ = std::max(tensor_ranks_, rank.tensor + 1);
    expert_ranks_ = std::max(expert_ranks_, rank.expert + 1);
  }
  expert_tensor_ranks_ = tensor_ranks_;
  if (!arguments_.present) return absl::OkStatus();
  if (arguments_.tensor_ranks != tensor_ranks_) {
    return absl::DataLossError(
        absl::StrFormat("expected files of %d tensor-parallel ranks, as args says, found %d",
                        arguments_.tensor_ranks, tensor_ranks_));
  }
  if (tensor_ranks_ % arguments_.expert_tensor_ranks == 0) {
    expert_tensor_ranks_ = static_cast<uint32_t>(arguments_.expert_tensor_ranks);
  } else {
    return absl::UnimplementedError(absl::StrFormat(
        "expert_tensor_parallel_size: expected a divisor of the %d tensor-parallel ranks, found %d",
        tensor_ranks_, arguments_.expert_tensor_ranks));
  }
  return absl::OkStatus();
}

absl::Status MegatronModel::CheckComplete() const {
  uint64_t stages = arguments_.pipeline_ranks;
  uint64_t experts = arguments_.expert_ranks;
  std::set<std::pair<uint32_t, uint32_t>> dense;
  std::set<uint32_t> expert_ranks;
  for (const MegatronRank& rank : ranks_) {
    dense.insert({rank.stage, rank.tensor});
    expert_ranks.insert(rank.expert);
    stages = std::max<uint64_t>(stages, rank.stage + 1);
    experts = std::max<uint64_t>(experts, rank.expert + 1);
  }
  if (stages * tensor_ranks_ > kFolderFilesMax || experts > kFolderFilesMax) {
    return absl::DataLossError(absl::StrFormat(
        "expected files of %d stages, %d tensor-parallel and %d expert-parallel ranks, found %d",
        stages, tensor_ranks_, experts, ranks_.size()));
  }
  for (uint32_t s = 0; s < stages; ++s) {
    for (uint32_t t = 0; t < tensor_ranks_; ++t) {
      if (dense.contains({s, t})) continue;
      return absl::DataLossError(absl::StrFormat(
          "expected model_optim_rng.pt of tensor-parallel rank %d of pipeline stage %d, found none",
          t, s));
    }
  }
  for (uint32_t e = 0; e < experts; ++e) {
    if (expert_ranks.contains(e)) continue;
    return absl::DataLossError(
        absl::StrFormat("expected model_optim_rng.pt of expert-parallel rank %d, found none", e));
  }
  return absl::OkStatus();
}

absl::Status MegatronModel::NameGlobally() {
  // Layers of each chunk of each stage, in the order of the model; all ranks of a stage agree.
  std::map<std::string, std::map<std::pair<uint32_t, uint32_t>, uint64_t>, std::less<>> layers;
  for (const MegatronRank& rank : ranks_) {
    for (const MegatronTensor& tensor : rank.tensors) {
      if (const auto layer = ParseMegatronLayer(tensor.local); layer.has_value()) {
        auto& of_prefix = layers[std::string(layer->prefix)];
        uint64_t& count = of_prefix[{tensor.chunk, rank.stage}];
        count = std::max(count, layer->number + 1);
      }
    }
  }
  for (auto& [prefix, of_chunks] : layers) {
    uint64_t before = 0;
    for (auto& [place, count] : of_chunks) before += std::exchange(count, before);
    if (arguments_.layers.has_value() && prefix == "decoder.layers." &&
        before != *arguments_.layers) {
      return absl::DataLossError(
          absl::StrFormat("%s: expected %d layers over all stages, as args says, found %d", prefix,
                          *arguments_.layers, before));
    }
  }
  for (MegatronRank& rank : ranks_) {
    std::map<std::string, uint64_t> counts;
    for (const MegatronTensor& tensor : rank.tensors) {
      const auto expert = ParseMegatronExpert(tensor.local);
      if (!expert.has_value()) continue;
      uint64_t& count = counts[absl::StrCat(tensor.chunk, " ", std::string(expert->before))];
      count = std::max(count, expert->number + 1);
    }
    const auto global_of = [&](const std::string& local_name, uint32_t chunk) {
      std::string name = local_name;
      if (const auto layer = ParseMegatronLayer(local_name); layer.has_value()) {
        const auto of_prefix = layers.find(layer->prefix);
        uint64_t before = 0;
        if (of_prefix != layers.end()) {
          const auto place = of_prefix->second.find({chunk, rank.stage});
          if (place != of_prefix->second.end()) before = place->second;
        }
        name = absl::StrCat(std::string(layer->prefix), before + layer->number,
                            std::string(layer->rest));
      }
      if (const auto local = ParseMegatronExpert(local_name); local.has_value()) {
        const auto global = ParseMegatronExpert(name);
        const uint64_t count = counts[absl::StrCat(chunk, " ", std::string(local->before))];
        name = absl::StrCat(std::string(global->before), rank.expert * count + local->number,
                            std::string(global->after));
      }
      return name;
    };
    for (MegatronExtra& extra : rank.extras) extra.global = global_of(extra.local, extra.chunk);
    for (MegatronTensor& tensor : rank.tensors) {
      tensor.global = global_of(tensor.local, tensor.chunk);
      tensor.expert = IsMegatronExpert(tensor.global);
      tensor.buffer = IsMegatronBuffer(tensor.global);
      shapes_[tensor.global][ShardRank(tensor.expert, rank.tensor)] = tensor.stored.shape;
    }
  }
  return absl::OkStatus();
}

uint32_t MegatronModel::ShardRank(bool expert, uint32_t tensor_rank) const {
  return expert ? tensor_rank % expert_tensor_ranks_ : tensor_rank;
}

absl::StatusOr<std::optional<MegatronCut>> MegatronModel::CutOf(const std::string& global) const {
  if (const auto told = told_.find(global); told != told_.end()) return told->second;
  if (old_attention_ && absl::StrContains(global, "query_key_value.")) return std::nullopt;
  bool gated = arguments_.gated.value_or(false);
  bool known = arguments_.gated.has_value();
  const auto second = SecondLayerOf(global);
  if (!second.has_value()) return MegatronCutOf(global, gated);
  // The layer behind it has as many columns as the gated units have rows, twice.
  if (const auto other = shapes_.find(*second); other != shapes_.end()) {
    const Shape& mine = shapes_.at(global).begin()->second;
    const Shape& behind = other->second.begin()->second;
    if (behind.size() == 2 && !mine.empty() && behind[1] > 0) {
      if (mine[0] != behind[1] && mine[0] != 2 * behind[1]) {
        return absl::DataLossError(absl::StrFormat(
            "%s: expected as many rows as \"%s\" has columns, %d, or twice as many, found %d",
            global, *second, behind[1], mine[0]));
      }
      gated = mine[0] != behind[1];
      known = true;
    }
  }
  if (!known) return std::nullopt;
  return MegatronCutOf(global, gated);
}

absl::Status MegatronModel::ResolveShards() {
  for (const auto& [global, by_rank] : shapes_) {
    const uint32_t ranks = IsMegatronExpert(global) ? expert_tensor_ranks_ : tensor_ranks_;
    std::vector<Shape> shapes;
    for (uint32_t r = 0; r < ranks; ++r) {
      const auto shape = by_rank.find(r);
      if (shape == by_rank.end()) {
        return absl::DataLossError(absl::StrFormat(
            "%s: expected it on all %d tensor-parallel ranks, found none on rank %d", global, ranks,
            r));
      }
      shapes.push_back(shape->second);
    }
    // Experts in one tensor of a rank (`experts.weight1` of the old grouped GEMM): each rank has
    // others, under one name.
    if (expert_ranks_ > 1 && IsMegatronExpert(global) && !ParseMegatronExpert(global).has_value()) {
      shards_[global];
      table_.index().unreadable.push_back(
          {global, absl::StrFormat("is on %d expert-parallel ranks, and its name does not say of "
                                   "which experts it is",
                                   expert_ranks_)});
      continue;
    }
    std::optional<MegatronCut> cut = MegatronCut{};
    if (ranks > 1) {
      ASSIGN_OR_RETURN(cut, CutOf(global));
    }
    if (!cut.has_value()) {
      shards_[global];
      table_.index().unreadable.push_back(
          {global, absl::StrFormat("is on %d tensor-parallel ranks, and neither the files nor "
                                   "Megatron's names say how it was cut",
                                   ranks)});
      continue;
    }
    absl::StatusOr<std::vector<ShardMap>> maps = MegatronShards(*cut, shapes);
    if (!maps.ok()) {
      return absl::DataLossError(absl::StrCat(global, ": ", maps.status().message()));
    }
    shards_[global] = *std::move(maps);
  }
  return absl::OkStatus();
}

absl::Status MegatronModel::AddWeights() {
  RETURN_IF_ERROR(ResolveShards());
  for (const MegatronRank& rank : ranks_) {
    for (const MegatronTensor& tensor : rank.tensors) {
      const ShardMap* const shard = ShardOf(tensor, rank);
      if (shard == nullptr) continue;
      const auto add = [&]() -> absl::Status {
        ASSIGN_OR_RETURN(const uint32_t state,
                         table_.State(tensor.global, tensor.buffer ? "buffer" : "param",
                                      tensor.stored.dtype, shard->shape));
        return table_.AddShard(state, *shard, tensor.stored);
      };
      if (const absl::Status status = add(); !status.ok()) {
        return absl::Status(status.code(),
                            absl::StrCat(rank.torch->name(), ": ", status.message()));
      }
    }
  }
  return absl::OkStatus();
}

const ShardMap* MegatronModel::ShardOf(const MegatronTensor& tensor,
                                       const MegatronRank& rank) const {
  const auto found = shards_.find(tensor.global);
  if (found == shards_.end() || found->second.empty()) return nullptr;
  return &found->second[ShardRank(tensor.expert, rank.tensor)];
}

}  // namespace holdfast::converter
