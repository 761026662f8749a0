#include "converter/megatron_shares.h"

#include <algorithm>
#include <array>
#include <span>
#include <string_view>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kEmbedding = "embedding.word_embeddings.weight";
constexpr std::string_view kOutput = "output_layer.weight";
// Modules whose rows are those of attention heads.
constexpr std::array<const char*, 7> kOfHeads = {
    ".linear_qkv.",    ".query_key_value.",  ".linear_q.",         ".linear_kv.",
    ".linear_q_proj.", ".linear_q_up_proj.", ".linear_kv_up_proj."};

bool IsEmbedding(std::string_view name) {
  return name.starts_with("embedding.") || name.find(".embedding.") != std::string_view::npos;
}

}  // namespace

absl::StatusOr<MegatronShares> MegatronShares::Create(const ForeignIndex& index,
                                                      const MegatronTensors& tensors,
                                                      const MegatronArguments& arguments,
                                                      const MegatronDegrees& degrees) {
  MegatronShares shares(index, tensors, arguments, degrees);
  RETURN_IF_ERROR(shares.CheckDegrees());
  RETURN_IF_ERROR(shares.CountLayers());
  RETURN_IF_ERROR(shares.CountExperts());
  RETURN_IF_ERROR(shares.CheckHeads());
  shares.SortByPlace();
  return shares;
}

// ------------------------------------------------------------------ degrees

absl::Status MegatronShares::CheckDegrees() const {
  const MegatronDegrees& d = degrees_;
  CHECK(d.tensor >= 1 && d.pipeline >= 1 && d.expert >= 1 && d.virtual_stages >= 1);
  CHECK(d.tensor * d.pipeline * d.expert <= kMegatronRanksMax && d.ExpertTensor() >= 1);
  if (d.pipeline == 1 && (d.virtual_stages > 1 || d.IsUneven())) {
    return absl::FailedPreconditionError(
        absl::StrFormat("--to %s: expected pp=2 or more, of which stages are",
                        d.IsUneven() ? "first, last" : "vpp"));
  }
  if (d.tensor % d.ExpertTensor() != 0) {
    return absl::FailedPreconditionError(
        absl::StrFormat("--to etp=%d: expected a divisor of the %d tensor-parallel ranks",
                        d.ExpertTensor(), d.tensor));
  }
  // Only the first ranks of experts' data parallelism save: the others' tensor-parallel ranks would
  // be in no file.
  if (d.ExpertTensor() * d.expert % d.tensor != 0) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "--to etp=%d,ep=%d: expected a multiple of the %d tensor-parallel ranks as their product: "
        "else Megatron's legacy files lack some of these ranks",
        d.ExpertTensor(), d.expert, d.tensor));
  }
  if (d.virtual_stages > 1 && arguments_.one_bucket) {
    return absl::FailedPreconditionError(
        "--to vpp: args say overlap_param_gather_with_optimizer_step, by which Megatron splits the "
        "optimizer by chunks in another way");
  }
  return absl::OkStatus();
}

// Queries, keys and values lie group by group, or head by head: a rank has whole groups. Those of
// multi-latent attention, too, whose projections up from the latent are cut by heads.
absl::Status MegatronShares::CheckHeads() const {
  if (degrees_.tensor == 1) return absl::OkStatus();
  const auto has_attention = [](const auto& entry) {
    return std::ranges::any_of(
        kOfHeads, [&](const char* module) { return absl::StrContains(entry.first, module); });
  };
  if (std::ranges::none_of(tensors_->weights(), has_attention)) return absl::OkStatus();
  if (!arguments_.query_groups.has_value()) {
    return absl::FailedPreconditionError(
        absl::StrFormat("--to tp=%d: expected args that say how many attention heads there are, or "
                        "--model DIR with "
                        "num_attention_heads in its config.json, found neither",
                        degrees_.tensor));
  }
  if (*arguments_.query_groups % degrees_.tensor == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrFormat("--to tp=%d: expected a divisor of the %d groups of attention heads",
                      degrees_.tensor, *arguments_.query_groups));
}

absl::Status MegatronShares::CountLayers() {
  uint64_t layers = 0;
  std::string prefix;
  for (const auto& [name, weights] : tensors_->weights()) {
    if (PlaceCount() > 1 && (name.starts_with("mtp.") || absl::StrContains(name, ".mtp."))) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: --to pp=%d: the stage of multi-token prediction has a copy of the embedding, which "
          "is not written",
          Describe(StateOf(weights)), degrees_.pipeline));
    }
    const auto layer = ParseMegatronLayer(name);
    if (!layer.has_value()) continue;
    if (PlaceCount() > 1 && !prefix.empty() && prefix != layer->prefix) {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: --to pp=%d: expected layers of one kind, found others in %s",
                          Describe(StateOf(weights)), degrees_.pipeline, prefix));
    }
    prefix = layer->prefix;
    layers = std::max(layers, layer->number + 1);
  }
  MegatronArguments job = arguments_;
  job.pipeline_ranks = degrees_.pipeline;
  job.virtual_stages = degrees_.virtual_stages;
  job.first_stage_layers = degrees_.first_layers;
  job.last_stage_layers = degrees_.last_layers;
  job.free_layout = false;
  if (degrees_.IsUneven()) job.embedding_counts = job.loss_counts = false;
  std::optional<std::vector<uint64_t>> counts;
  // A place has layers, but for those of embedding and loss.
  if (PlaceCount() <= layers + 2) counts = LayersOfStages(job, layers);
  if (!counts.has_value() && degrees_.IsUneven()) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "--to first, last: expected %d layers that %d stages of %d chunks share equally besides, "
        "found first=%d and last=%d",
        layers, degrees_.pipeline, degrees_.virtual_stages, degrees_.first_layers.value_or(0),
        degrees_.last_layers.value_or(0)));
  }
  if (!counts.has_value()) {
    const uint64_t counted = (job.embedding_counts ? 1 : 0) + (job.loss_counts ? 1 : 0);
    return absl::FailedPreconditionError(absl::StrFormat(
        "--to pp=%d%s: expected a divisor of the %d layers%s", degrees_.pipeline,
        degrees_.virtual_stages > 1 ? absl::StrCat(",vpp=", degrees_.virtual_stages) : "", layers,
        counted > 0 ? absl::StrFormat(" and the %d that args count as such", counted) : ""));
  }
  begins_ = {0};
  for (const uint64_t count : *counts) begins_.push_back(begins_.back() + count);
  return absl::OkStatus();
}

absl::Status MegatronShares::CountExperts() {
  const bool apart = degrees_.expert > 1;
  for (const auto& [name, weights] : tensors_->weights()) {
    if (!IsMegatronExpert(name)) continue;
    const auto expert = ParseMegatronExpert(name);
    if (expert.has_value()) {
      uint64_t& count = experts_.try_emplace(std::string(expert->before), 0).first->second;
      count = std::max(count, expert->number + 1);
    } else if (apart) {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s: --to ep=%d: its name does not say of which expert it is",
                          Describe(StateOf(weights)), degrees_.expert));
    }
    has_expert_optimizer_ = has_expert_optimizer_ || (apart && !weights.states.empty());
  }
  if (!apart) return absl::OkStatus();
  if (experts_.empty()) {
    return absl::FailedPreconditionError(
        absl::StrFormat("--to ep=%d: expected experts, found none", degrees_.expert));
  }
  for (const auto& [before, count] : experts_) {
    if (count % degrees_.expert == 0) continue;
    return absl::FailedPreconditionError(absl::StrFormat(
        "--to ep=%d: expected a divisor of the %d experts of %s", degrees_.expert, count, before));
  }
  return absl::OkStatus();
}

std::vector<MegatronJobRank> MegatronShares::Ranks() const {
  // Ranks of a stage count tensor-parallel ones first; and so do, over the same ranks, those of
  // experts, which then count expert-parallel ones. The first of each combination saves it.
  const uint64_t of_stage = degrees_.ExpertTensor() * degrees_.expert;
  std::vector<MegatronJobRank> ranks;
  for (uint64_t stage = 0; stage < degrees_.pipeline; ++stage) {
    for (uint64_t rank = 0; rank < of_stage; ++rank) {
      ranks.push_back({.stage = stage,
                       .tensor = rank % degrees_.tensor,
                       .expert = rank / degrees_.ExpertTensor(),
                       .has_dense_states = rank < degrees_.tensor});
    }
  }
  return ranks;
}

// ------------------------------------------------------------------ what a rank has

uint64_t MegatronShares::PlaceOf(std::string_view name) const {
  const auto layer = ParseMegatronLayer(name);
  if (!layer.has_value()) return IsEmbedding(name) ? 0 : PlaceCount() - 1;
  // Of places without a layer, which begin where the next one does, it is in none.
  const auto next = std::ranges::upper_bound(begins_, layer->number);
  return std::min<uint64_t>(static_cast<uint64_t>(next - begins_.begin()) - 1, PlaceCount() - 1);
}

void MegatronShares::SortByPlace() {
  by_place_.resize(PlaceCount());
  for (const Named& named : tensors_->weights()) {
    by_place_[PlaceOf(named.first)].push_back(&named);
  }
}

std::optional<std::string> MegatronShares::NameOn(std::string_view name,
                                                  const MegatronJobRank& rank,
                                                  uint64_t chunk) const {
  const uint64_t here = Place(rank, chunk);
  if (PlaceOf(name) != here) return std::nullopt;
  std::string local(name);
  if (const auto layer = ParseMegatronLayer(name); layer.has_value()) {
    if (layer->number >= begins_[here + 1]) return std::nullopt;  // beyond the model's
    local = absl::StrCat(std::string(layer->prefix), layer->number - begins_[here],
                         std::string(layer->rest));
  }
  if (degrees_.expert == 1) return local;
  const auto global = ParseMegatronExpert(name);
  if (!global.has_value()) return local;
  const auto count = experts_.find(global->before);
  if (count == experts_.end()) return std::nullopt;
  const uint64_t per_rank = count->second / degrees_.expert;
  if (global->number / per_rank != rank.expert) return std::nullopt;
  const auto expert = ParseMegatronExpert(local);
  return absl::StrCat(std::string(expert->before), global->number % per_rank,
                      std::string(expert->after));
}

// Gated layers have twice as many rows as the layer behind them has columns.
bool MegatronShares::IsGated(const std::string& name) const {
  const std::string second = absl::StrReplaceAll(
      name, {{"linear_fc1.bias", "linear_fc2.weight"}, {"linear_fc1.", "linear_fc2."}});
  const auto behind = tensors_->weights().find(second);
  const auto mine = tensors_->weights().find(name);
  if (second != name && behind != tensors_->weights().end()) {
    const std::vector<uint64_t>& columns = StateOf(behind->second).shape;
    const std::vector<uint64_t>& rows = StateOf(mine->second).shape;
    if (columns.size() == 2 && !rows.empty()) return rows[0] == 2 * columns[1];
  }
  return arguments_.gated.value_or(false);
}

absl::Status MegatronShares::Cut(const std::string& name, const MegatronJobRank& rank,
                                 MegatronLocal& local) const {
  local.shape = StateOf(*local.weights).shape;
  const uint64_t ranks = local.expert ? degrees_.ExpertTensor() : degrees_.tensor;
  if (ranks == 1) return absl::OkStatus();
  const char* const axis = local.expert && degrees_.expert_tensor.has_value() ? "etp" : "tp";
  const std::optional<MegatronCut> cut = MegatronCutOf(name, IsGated(name));
  if (!cut.has_value()) {
    return absl::FailedPreconditionError(
        absl::StrFormat("%s: --to %s=%d: Megatron's names do not say how it is cut",
                        Describe(StateOf(*local.weights)), axis, ranks));
  }
  local.cut = *cut;
  if (cut->kind == MegatronCut::Kind::kReplicated) return absl::OkStatus();
  const uint64_t parts = cut->kind == MegatronCut::Kind::kGated ? 2 * ranks : ranks;
  if (cut->dimension >= local.shape.size() || local.shape[cut->dimension] % parts != 0) {
    return absl::FailedPreconditionError(
        absl::StrFormat("%s: --to %s=%d: expected a multiple of %d along dimension %d",
                        Describe(StateOf(*local.weights)), axis, ranks, parts, cut->dimension));
  }
  local.shape[cut->dimension] /= ranks;
  local.ranks = ranks;
  local.rank = rank.tensor % ranks;
  return absl::OkStatus();
}

// The first and the last place have the embedding.
bool MegatronShares::IsTied() const { return PlaceCount() > 1 && arguments_.tied.value_or(false); }

absl::StatusOr<MegatronLocal> MegatronShares::LocalOf(const std::string& name,
                                                      std::string local_name,
                                                      const MegatronWeights& weights,
                                                      const MegatronJobRank& rank) const {
  MegatronLocal local{.name = std::move(local_name),
                      .weights = &weights,
                      .expert = IsMegatronExpert(name),
                      .shared_embedding = IsTied() && name == kEmbedding,
                      .trained = !weights.states.empty()};
  RETURN_IF_ERROR(Cut(name, rank, local));
  return local;
}

absl::StatusOr<std::vector<MegatronLocal>> MegatronShares::LocalsOf(const MegatronJobRank& rank,
                                                                    uint64_t chunk) const {
  std::vector<MegatronLocal> locals;
  for (const Named* const named : by_place_[Place(rank, chunk)]) {
    std::optional<std::string> local_name = NameOn(named->first, rank, chunk);
    if (!local_name.has_value()) continue;
    ASSIGN_OR_RETURN(MegatronLocal local,
                     LocalOf(named->first, *std::move(local_name), named->second, rank));
    locals.push_back(std::move(local));
  }
  const auto embedding = tensors_->weights().find(std::string(kEmbedding));
  if (IsTied() && IsLast(rank, chunk) && embedding != tensors_->weights().end()) {
    ASSIGN_OR_RETURN(MegatronLocal copy,
                     LocalOf(embedding->first, std::string(kOutput), embedding->second, rank));
    locals.push_back(std::move(copy));
  }
  std::ranges::sort(locals, MegatronModelOrder, &MegatronLocal::name);
  return locals;
}

void MegatronShares::AppendRanges(const MegatronLocal& local, uint32_t tensor_state,
                                  std::vector<ElementRange>& ranges) const {
  const std::vector<uint64_t>& whole = StateOf(*local.weights).shape;
  if (local.ranks == 1) {
    ranges.push_back({.tensor_state = tensor_state, .begin = 0, .end = local.ElementCount()});
    return;
  }
  const size_t d = local.cut.dimension;
  const std::span<const uint64_t> sizes(whole);
  const uint64_t inner = Product(sizes.subspan(d + 1));
  const uint64_t outer = Product(sizes.first(d));
  const uint64_t halves = local.cut.kind == MegatronCut::Kind::kGated ? 2 : 1;
  const uint64_t width = local.shape[d] / halves * inner;
  CHECK(halves == 1 || outer == 1);
  for (uint64_t half = 0; half < halves; ++half) {
    const uint64_t begin = half * (whole[d] / 2) * inner + local.rank * width;
    ranges.push_back({.tensor_state = tensor_state,
                      .begin = begin,
                      .end = begin + width,
                      .repeat_count = outer,
                      .repeat_stride = whole[d] * inner});
  }
}

// ------------------------------------------------------------------ buffers

BufferRule MegatronShares::RuleOf(const MegatronJobRank& rank, uint64_t chunk,
                                  Optimizer optimizer) const {
  const uint64_t ranks =
      optimizer == Optimizer::kDense
          ? arguments_.data_ranks
          : std::max<uint64_t>(1, arguments_.data_ranks * degrees_.tensor /
                                      (degrees_.expert * degrees_.ExpertTensor()));
  return BufferRuleOf(arguments_, ranks, Place(rank, chunk) == 0);
}

absl::StatusOr<std::vector<MegatronLocalBuffer>> MegatronShares::BuffersOf(
    const std::vector<MegatronLocal>& locals, const MegatronJobRank& rank, uint64_t chunk,
    Optimizer optimizer) const {
  std::vector<MegatronLocalBuffer> buffers;  // by dtype, in the order of the model's first need
  for (const MegatronLocal& local : locals) {
    const bool is_apart = has_expert_optimizer_ && local.expert;
    if (!local.trained || is_apart != (optimizer == Optimizer::kExpert)) continue;
    const Dtype dtype = StateOf(*local.weights).dtype;
    auto buffer = std::ranges::find(buffers, dtype, &MegatronLocalBuffer::dtype);
    if (buffer == buffers.end()) {
      buffers.push_back({.dtype = dtype, .locals = {}, .layout = {}});
      buffer = buffers.end() - 1;
    }
    buffer->locals.push_back(&local);
  }
  for (MegatronLocalBuffer& buffer : buffers) {
    std::ranges::reverse(buffer.locals);
    std::vector<BufferParameter> parameters;
    for (const MegatronLocal* const local : buffer.locals) {
      parameters.push_back(
          {.elements = local->ElementCount(), .shared_embedding = local->shared_embedding});
    }
    ASSIGN_OR_RETURN(buffer.layout, LayOutBuffer(parameters, RuleOf(rank, chunk, optimizer)));
  }
  return buffers;
}

}  // namespace holdfast::converter
