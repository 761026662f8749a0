#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/megatron_dist.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kEmbedding = "embedding.word_embeddings.weight";
constexpr std::string_view kOutput = "output_layer.weight";

absl::Status In(const std::string& where, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(where, ": ", status.message()));
}

}  // namespace

// ------------------------------------------------------------------ what a rank has

uint32_t MegatronDistOptimizer::TensorRanks(bool expert) const {
  return static_cast<uint32_t>(expert ? dist_.arguments.expert_tensor_ranks
                                      : dist_.arguments.tensor_ranks);
}

// Model-parallel ranks count tensor-parallel ones first, then those of experts, then stages.
MegatronDistOptimizer::Place MegatronDistOptimizer::PlaceOf(uint32_t rank, bool expert) const {
  Place place{.expert = expert};
  place.tensor = rank % TensorRanks(expert);
  rank /= TensorRanks(expert);
  if (expert) {
    const auto experts = static_cast<uint32_t>(dist_.arguments.expert_ranks);
    place.expert_rank = rank % experts;
    rank /= experts;
  }
  place.stage = rank;
  return place;
}

std::vector<std::string> MegatronDistOptimizer::NamesOf(const Place& place, uint32_t chunk,
                                                        bool experts_apart,
                                                        const std::vector<uint64_t>& layers) const {
  const MegatronArguments& arguments = dist_.arguments;
  const size_t here = chunk * arguments.pipeline_ranks + place.stage;
  uint64_t begin = 0;
  for (size_t i = 0; i < here; ++i) begin += layers[i];
  const uint64_t end = begin + layers[here];
  const bool is_first = here == 0;
  const bool is_last = here + 1 == layers.size();
  std::map<std::string_view, uint64_t> experts;  // over all ranks, by what precedes the number
  for (const auto& [name, tensor] : dist_.weights) {
    if (const auto expert = ParseMegatronExpert(name); expert.has_value()) {
      uint64_t& count = experts[expert->before];
      count = std::max(count, expert->number + 1);
    }
  }
  std::vector<std::string> names;
  for (const auto& [name, tensor] : dist_.weights) {
    if (IsMegatronBuffer(name)) continue;
    const bool expert = IsMegatronExpert(name);
    if (experts_apart && expert != place.expert) continue;
    if (const auto layer = ParseMegatronLayer(name);
        layer.has_value() && layer->prefix.ends_with("decoder.layers.")) {
      if (layer->number < begin || layer->number >= end) continue;
    } else if (absl::StartsWith(name, "embedding.") ? !is_first : !is_last) {
      continue;
    }
    if (const auto number = ParseMegatronExpert(name); number.has_value() && place.expert) {
      const uint64_t per_rank = experts.at(number->before) / arguments.expert_ranks;
      if (per_rank == 0 || number->number / per_rank != place.expert_rank) continue;
    }
    names.push_back(name);
  }
  // The last stage has a copy of a tied embedding.
  if (is_last && !is_first && arguments.tied.value_or(false) && !place.expert &&
      dist_.weights.contains(std::string(kEmbedding)) &&
      !dist_.weights.contains(std::string(kOutput))) {
    names.emplace_back(kOutput);
  }
  if (dist_.names.empty()) {
    std::ranges::sort(names, MegatronModelOrder);
  } else {
    const auto order = [this](const std::string& name) {
      return std::ranges::find(dist_.names, name) - dist_.names.begin();
    };
    std::erase_if(names, [&](const std::string& name) {  // of no optimizer: frozen
      return order(name) == static_cast<ptrdiff_t>(dist_.names.size());
    });
    std::ranges::stable_sort(names, {}, order);
  }
  return names;
}

absl::StatusOr<ShardMap> MegatronDistOptimizer::ShardOf(const std::string& name,
                                                        const MegatronDistTensor& tensor,
                                                        uint32_t rank, uint32_t ranks) const {
  std::vector<const MegatronFragment*> fragments;
  std::optional<size_t> cut;
  for (const MegatronFragment& fragment : tensor.fragments) {
    for (size_t d = 0; d < tensor.shape.size(); ++d) {
      if (fragment.size[d] == tensor.shape[d]) continue;
      if (cut.has_value() && *cut != d) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: expected chunks along one dimension, found them along %d and %d", name, *cut, d));
      }
      cut = d;
    }
    fragments.push_back(&fragment);
  }
  if (fragments.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(name, ": expected chunks, found none"));
  }
  if (!cut.has_value()) return WholeShard(tensor.shape);
  const size_t d = *cut;
  std::ranges::stable_sort(fragments, {}, [d](const auto* fragment) { return fragment->lo[d]; });
  const auto repeated = std::ranges::unique(
      fragments, {}, [d](const MegatronFragment* fragment) { return fragment->lo[d]; });
  fragments.erase(repeated.begin(), repeated.end());
  // One chunk per rank, or two of a gated layer: all the first halves, then all the second ones.
  const size_t halves = fragments.size() == ranks ? 1 : 2;
  if (fragments.size() != halves * ranks) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: expected %d chunks (or twice as many), one of each tensor-parallel rank, found %d",
        name, ranks, fragments.size()));
  }
  ShardMap map{.shape = tensor.shape, .shard_elements = 0, .blocks = {}};
  for (size_t half = 0; half < halves; ++half) {
    const MegatronFragment& fragment = *fragments[half * ranks + rank];
    ShardBlock block{.shard_begin = map.shard_elements, .lo = fragment.lo, .size = fragment.size};
    if (block.ElementCount() == 0) continue;
    map.shard_elements += block.ElementCount();
    map.blocks.push_back(std::move(block));
  }
  return map;
}

FlatParts MegatronDistOptimizer::ValuesOf(const MegatronDistTensor& tensor, const ShardMap& shard) {
  FlatParts parts;
  for (const MegatronFragment& fragment : tensor.fragments) {
    if (!fragment.stored.contiguous) continue;
    const uint64_t count = fragment.stored.ElementCount();
    // The whole tensor in two halves, where the shard is one block of it.
    const bool is_whole = shard.blocks.size() == 1 && shard.blocks[0].size == shard.shape;
    if (is_whole) {
      uint64_t begin = 0;
      bool rows = true;  // a range of rows of dimension 0 is one behind the other
      for (size_t d = 0; d < shard.shape.size(); ++d) {
        begin = begin * shard.shape[d] + fragment.lo[d];
        rows = rows && (d == 0 || fragment.size[d] == shard.shape[d]);
      }
      if (rows) parts.Add(begin + fragment.begin, fragment.stored, 0, count);
      continue;
    }
    for (const ShardBlock& block : shard.blocks) {
      if (block.lo != fragment.lo || block.size != fragment.size) continue;
      parts.Add(block.shard_begin + fragment.begin, fragment.stored, 0, count);
    }
  }
  return parts;
}

absl::StatusOr<MegatronDistOptimizer::Local> MegatronDistOptimizer::LocalOf(
    const std::string& name, const std::string& weights, const Place& place) const {
  const MegatronDistTensor& tensor = dist_.weights.at(weights);
  const bool expert = IsMegatronExpert(name);
  const uint32_t rank = expert == place.expert ? place.tensor : place.tensor % TensorRanks(expert);
  Local local{.name = name, .weights = weights, .shard = {}, .values = {}};
  ASSIGN_OR_RETURN(local.shard, ShardOf(name, tensor, rank, TensorRanks(expert)));
  local.values = ValuesOf(tensor, local.shard);
  local.shared_embedding = dist_.arguments.tied.value_or(false) &&
                           dist_.arguments.pipeline_ranks > 1 &&
                           (name == kEmbedding || name == kOutput);
  return local;
}

std::optional<std::vector<uint64_t>> MegatronDistOptimizer::FittedLayers(uint64_t layer_count,
                                                                         bool experts_apart) const {
  const auto stages = static_cast<uint32_t>(dist_.arguments.pipeline_ranks);
  const auto chunks = static_cast<uint32_t>(dist_.arguments.virtual_stages);
  std::vector<uint64_t> layers(size_t{stages} * chunks, 0);
  uint64_t left = layer_count;
  for (size_t here = 0; here < layers.size(); ++here) {
    const Place place{.stage = static_cast<uint32_t>(here % stages)};
    const auto chunk = static_cast<uint32_t>(here / stages);
    const auto buckets =
        dist_.buffers.find({.rank = place.stage * TensorRanks(false), .buffer = chunk});
    if (buckets == dist_.buffers.end()) return std::nullopt;
    std::vector<const MegatronBucket*> by_number;
    for (const auto& [number, bucket] : buckets->second) by_number.push_back(&bucket);
    for (layers[here] = 0;; ++layers[here]) {
      if (layers[here] > left) return std::nullopt;
      std::vector<std::string> names = NamesOf(place, chunk, experts_apart, layers);
      std::ranges::reverse(names);
      std::vector<BufferParameter> parameters;
      for (const std::string& name : names) {
        const bool is_copy = !dist_.weights.contains(name);
        const auto local = LocalOf(name, is_copy ? std::string(kEmbedding) : name, place);
        if (!local.ok()) return std::nullopt;
        parameters.push_back(
            {.elements = local->shard.shard_elements, .shared_embedding = local->shared_embedding});
      }
      if (LayoutOf(parameters, RuleOf(place, chunk), by_number).ok()) break;
    }
    left -= layers[here];
  }
  if (left > 0) return std::nullopt;
  return layers;
}

absl::StatusOr<std::vector<uint64_t>> MegatronDistOptimizer::Layers(bool experts_apart) const {
  if (layers_.has_value()) return *layers_;
  uint64_t layer_count = 0;
  for (const auto& [name, tensor] : dist_.weights) {
    if (const auto layer = ParseMegatronLayer(name);
        layer.has_value() && layer->prefix.ends_with("decoder.layers.")) {
      layer_count = std::max(layer_count, layer->number + 1);
    }
  }
  // A chunk has layers, but for those of embeddings and losses.
  const MegatronArguments& arguments = dist_.arguments;
  const uint64_t places_max = layer_count + 2;
  if (arguments.present && arguments.pipeline_ranks <= places_max / arguments.virtual_stages) {
    layers_ = LayersOfStages(arguments, layer_count);
    if (!layers_.has_value()) layers_ = FittedLayers(layer_count, experts_apart);
  }
  if (layers_.has_value()) return *layers_;
  return absl::FailedPreconditionError(
      absl::StrFormat("expected arguments that say which of %d pipeline stages has which of %d "
                      "layers, found none",
                      arguments.pipeline_ranks, layer_count));
}

absl::StatusOr<std::vector<MegatronDistOptimizer::LocalBuffer>> MegatronDistOptimizer::BuffersOf(
    const Place& place, bool experts_apart) const {
  ASSIGN_OR_RETURN(const std::vector<uint64_t> layers, Layers(experts_apart));
  if (place.stage >= dist_.arguments.pipeline_ranks) {
    return absl::FailedPreconditionError(
        absl::StrFormat("expected one of %d pipeline stages, found %d",
                        dist_.arguments.pipeline_ranks, place.stage));
  }
  std::vector<LocalBuffer> buffers;
  for (uint32_t chunk = 0; chunk < dist_.arguments.virtual_stages; ++chunk) {
    std::map<Dtype, size_t> number_of;  // one buffer of each, in the order of first need
    for (const std::string& name : NamesOf(place, chunk, experts_apart, layers)) {
      const bool is_copy = !dist_.weights.contains(name);
      ASSIGN_OR_RETURN(Local local, LocalOf(name, is_copy ? std::string(kEmbedding) : name, place));
      const Dtype dtype = dist_.weights.at(local.weights).dtype;
      const auto [known, added] = number_of.try_emplace(dtype, buffers.size());
      if (added) buffers.push_back({.chunk = chunk});
      buffers[known->second].locals.push_back(std::move(local));
    }
  }
  for (LocalBuffer& buffer : buffers) std::ranges::reverse(buffer.locals);
  return buffers;
}

// ------------------------------------------------------------------ dp_reshardable, gathered

absl::Status MegatronDistOptimizer::AddBuckets() {
  // Buffers of one optimizer and rank belong together.
  std::map<std::pair<uint32_t, uint32_t>, std::vector<MegatronBufferKey>> of_rank;
  for (const auto& [key, buckets] : dist_.buffers) {
    of_rank[{key.optimizer, key.rank}].push_back(key);
  }
  const bool experts_apart = !dist_.expert_optimizers.empty();
  for (const auto& [where, keys] : of_rank) {
    const Place place = PlaceOf(where.second, dist_.expert_optimizers.contains(where.first));
    const absl::Status status = AddRankBuckets(place, keys, experts_apart);
    const std::string what = absl::StrFormat("buckets of optimizer %d, model-parallel rank %d",
                                             where.first, where.second);
    if (absl::IsFailedPrecondition(status)) {
      table_.index().unreadable.push_back(
          {what, absl::StrCat(status.message(), "; --names FILE says the order of parameters")});
    } else if (!status.ok()) {
      return In(what, status);
    }
  }
  return absl::OkStatus();
}

absl::Status MegatronDistOptimizer::AddRankBuckets(const Place& place,
                                                   const std::vector<MegatronBufferKey>& keys,
                                                   bool experts_apart) {
  ASSIGN_OR_RETURN(const std::vector<LocalBuffer> buffers, BuffersOf(place, experts_apart));
  if (buffers.size() != keys.size()) {
    return absl::FailedPreconditionError(
        absl::StrFormat("expected %d buffers, one of each model chunk and dtype, found %d",
                        buffers.size(), keys.size()));
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto& buckets = dist_.buffers.at(keys[i]);
    const BufferRule rule = RuleOf(place, buffers[i].chunk);
    absl::Status status = AddBuffer(buffers[i].locals, rule, buckets);
    if (absl::IsFailedPrecondition(status)) {
      // Frozen parameters are in no buffer, and nothing but the masters tells which they are.
      ASSIGN_OR_RETURN(const std::vector<Local> trained, TrainedOf(buffers[i].locals, buckets));
      if (!trained.empty() && trained.size() < buffers[i].locals.size() &&
          AddBuffer(trained, rule, buckets).ok()) {
        status = absl::OkStatus();
      }
    }
    if (!status.ok()) return In(absl::StrCat("buffer ", i), status);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<MegatronDistOptimizer::Local>> MegatronDistOptimizer::TrainedOf(
    const std::vector<Local>& locals, const std::map<uint32_t, MegatronBucket>& buckets) const {
  std::vector<Local> trained;
  auto bucket = buckets.begin();
  uint64_t cursor = 0;
  for (const Local& local : locals) {
    const uint64_t count = local.shard.shard_elements;
    if (bucket != buckets.end() && BufferStart(cursor) >= bucket->second.elements) {
      ++bucket;
      cursor = 0;
    }
    if (bucket == buckets.end()) break;
    const uint64_t start = BufferStart(cursor);
    const auto masters = bucket->second.states.find("param");
    if (count > bucket->second.elements - start || masters == bucket->second.states.end()) continue;
    ASSIGN_OR_RETURN(const MasterMatch match,
                     CompareMaster(folder_, masters->second, start, local.values, 0, count));
    if (match != MasterMatch::kEqual) continue;
    trained.push_back(local);
    cursor = start + count;
  }
  return trained;
}

BufferRule MegatronDistOptimizer::RuleOf(const Place& place, uint32_t chunk) const {
  const MegatronArguments& arguments = dist_.arguments;
  return BufferRuleOf(arguments, place.expert ? arguments.expert_data_ranks : arguments.data_ranks,
                      place.stage == 0 && chunk == 0);
}

// Begins are those within a bucket; of coalesced ones, within all of them.
absl::StatusOr<BufferLayout> MegatronDistOptimizer::LayoutOf(
    const std::vector<BufferParameter>& parameters, const BufferRule& rule,
    const std::vector<const MegatronBucket*>& buckets) {
  std::vector<uint64_t> elements;
  for (const MegatronBucket* const bucket : buckets) elements.push_back(bucket->elements);
  if (buckets.size() != 1 || !buckets[0]->coalesced) {
    ASSIGN_OR_RETURN(BufferLayout layout, FitBuffer(parameters, elements, elements));
    for (size_t i = 0; i < parameters.size(); ++i) {
      layout.begins[i] -= layout.buckets[layout.bucket_of[i]].begin;
    }
    return layout;
  }
  ASSIGN_OR_RETURN(BufferLayout layout, LayOutBuffer(parameters, rule));
  if (layout.elements() != elements[0]) {
    return absl::FailedPreconditionError(
        absl::StrFormat("expected the %d elements that parameters have by the arguments, found %d",
                        layout.elements(), elements[0]));
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    layout.begins[i] -= layout.paddings[i];
    layout.bucket_of[i] = 0;
  }
  return layout;
}

absl::Status MegatronDistOptimizer::AddBuffer(const std::vector<Local>& locals,
                                              const BufferRule& rule,
                                              const std::map<uint32_t, MegatronBucket>& buckets) {
  std::vector<BufferParameter> parameters;
  for (const Local& local : locals) {
    parameters.push_back(
        {.elements = local.shard.shard_elements, .shared_embedding = local.shared_embedding});
  }
  std::vector<const MegatronBucket*> by_number;
  for (const auto& [number, bucket] : buckets) {
    if (number != by_number.size()) {
      return absl::DataLossError(
          absl::StrFormat("expected bucket %d, found none", by_number.size()));
    }
    by_number.push_back(&bucket);
  }
  const absl::StatusOr<BufferLayout> layout = LayoutOf(parameters, rule, by_number);
  if (!layout.ok()) return absl::FailedPreconditionError(layout.status().message());
  for (size_t i = 0; i < locals.size(); ++i) {
    const MegatronBucket& bucket = *by_number[layout->bucket_of[i]];
    const auto masters = bucket.states.find("param");
    if (masters == bucket.states.end()) continue;
    ASSIGN_OR_RETURN(const MasterMatch match,
                     CompareMaster(folder_, masters->second, layout->begins[i], locals[i].values, 0,
                                   parameters[i].elements));
    if (match == MasterMatch::kDifferent) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "expected %s at element %d of bucket %d, found masters that are not its weights",
          locals[i].name, layout->begins[i], layout->bucket_of[i]));
    }
  }
  for (size_t i = 0; i < locals.size(); ++i) {
    const Local& local = locals[i];
    for (const auto& [key, parts] : by_number[layout->bucket_of[i]]->states) {
      ASSIGN_OR_RETURN(const uint32_t number,
                       table_.State(local.name, key == "param" ? "fp32" : key, parts.dtype(),
                                    local.shard.shape));
      RETURN_IF_ERROR(AddFlatParts(parts, layout->begins[i], parameters[i].elements, local.shard,
                                   number, table_)
                          .status());
    }
  }
  return absl::OkStatus();
}

// ------------------------------------------------------------------ fully_reshardable, shifted

absl::Status MegatronDistOptimizer::MendShiftedStates() {
  const MegatronArguments& arguments = dist_.arguments;
  if (!arguments.present || !arguments.distributed_optimizer) return absl::OkStatus();
  const bool experts_apart = arguments.expert_ranks > 1;
  uint64_t chunks = 0;  // every rank has one at least
  for (const auto& [name, tensor] : dist_.weights) chunks += tensor.fragments.size();
  for (const bool expert : {false, true}) {
    if (expert && !experts_apart) continue;
    const uint64_t ranks =
        arguments.pipeline_ranks * TensorRanks(expert) * (expert ? arguments.expert_ranks : 1);
    if (ranks > chunks) return absl::OkStatus();
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      RETURN_IF_ERROR(MendRank(PlaceOf(rank, expert), experts_apart));
    }
  }
  return AddMended();
}

absl::Status MegatronDistOptimizer::MendRank(const Place& place, bool experts_apart) {
  const absl::StatusOr<std::vector<LocalBuffer>> buffers = BuffersOf(place, experts_apart);
  if (absl::IsFailedPrecondition(buffers.status())) return absl::OkStatus();  // nothing to compare
  RETURN_IF_ERROR(buffers.status());
  for (const LocalBuffer& buffer : *buffers) {
    // Frozen parameters have no states, and no place in the buffer.
    std::vector<Local> locals;
    std::vector<BufferParameter> parameters;
    for (const Local& local : buffer.locals) {
      if (!dist_.states.contains({local.weights, "fp32"})) continue;
      locals.push_back(local);
      parameters.push_back(
          {.elements = local.shard.shard_elements, .shared_embedding = local.shared_embedding});
    }
    const absl::StatusOr<BufferLayout> layout =
        LayOutBuffer(parameters, RuleOf(place, buffer.chunk));
    if (layout.ok()) RETURN_IF_ERROR(MendBuffer(locals, *layout));
  }
  return absl::OkStatus();
}

absl::Status MegatronDistOptimizer::MendBuffer(const std::vector<Local>& locals,
                                               const BufferLayout& layout) {
  if (std::ranges::all_of(layout.paddings, [](uint64_t padding) { return padding == 0; })) {
    return absl::OkStatus();
  }
  // Masters as they stand, and as they are if they were shifted.
  bool shifted = false;
  bool edited = false;  // the weights: they differ where nothing can have shifted the masters
  std::map<std::string, std::shared_ptr<FlatParts>> arrays;  // by state: without bucket padding
  for (size_t i = 0; i < locals.size(); ++i) {
    const Local& local = locals[i];
    const uint64_t count = local.shard.shard_elements;
    for (auto state = dist_.states.lower_bound({local.weights, ""});
         state != dist_.states.end() && state->first.first == local.weights; ++state) {
      if (state->second.shape != local.shard.shape) continue;
      const FlatParts saved = ValuesOf(state->second, local.shard);
      if (saved.empty()) continue;
      // The copy of a tied embedding is not stored: its elements are the first stage's.
      if (local.name == local.weights && layout.begins[i] < layout.elements()) {
        const uint64_t inside = std::min(count, layout.elements() - layout.begins[i]);
        for (const FlatParts::Run& run : saved.Find(0, inside)) {
          std::shared_ptr<FlatParts>& array = arrays[state->first.second];
          if (array == nullptr) array = std::make_shared<FlatParts>();
          array->Add(layout.begins[i] + run.begin, *run.stored, run.stored_begin, run.count);
        }
      }
      if (state->first.second != "fp32" || local.name != local.weights) continue;
      ASSIGN_OR_RETURN(const MasterMatch match,
                       CompareMaster(folder_, saved, 0, local.values, 0, count));
      bool& differs = layout.paddings[i] == 0 ? edited : shifted;
      differs = differs || match == MasterMatch::kDifferent;
    }
  }
  if (!shifted) return absl::OkStatus();
  const auto masters = arrays.find("fp32");
  bool proven = masters != arrays.end();
  for (size_t i = 0; i < locals.size() && proven; ++i) {
    ASSIGN_OR_RETURN(const MasterMatch match,
                     CompareMaster(folder_, *masters->second, layout.begins[i] - layout.paddings[i],
                                   locals[i].values, 0, locals[i].shard.shard_elements));
    proven = match != MasterMatch::kDifferent;
  }
  if (!proven && edited) {
    table_.index().notes.push_back(absl::StrFormat(
        "%s and %d other parameters: their weights are not their master weights, rounded: whether "
        "Megatron has cut the optimizer's states of several buckets at the right places cannot be "
        "told",
        locals.front().name, locals.size() - 1));
    return absl::OkStatus();
  }
  if (!proven) {
    table_.index().losses.push_back(absl::StrFormat(
        "%s and %d other parameters: their master weights are not their weights, and shifting them "
        "back by the padding of buckets does not mend it: the optimizer's states are wrong",
        locals.front().name, locals.size() - 1));
    return absl::OkStatus();
  }
  for (size_t i = 0; i < locals.size(); ++i) {
    if (layout.paddings[i] == 0 || locals[i].name != locals[i].weights) continue;
    for (const auto& [state, parts] : arrays) {
      if (!dist_.states.contains({locals[i].name, state})) continue;
      mended_[{locals[i].name, state}].push_back({.shard = locals[i].shard,
                                                  .parts = parts,
                                                  .begin = layout.begins[i] - layout.paddings[i],
                                                  .count = locals[i].shard.shard_elements});
      mended_names_.insert(locals[i].name);
    }
  }
  return absl::OkStatus();
}

absl::Status MegatronDistOptimizer::AddMended() {
  std::set<std::string> lost_names;
  for (const auto& [key, shards] : mended_) {
    const auto& [name, state] = key;
    const MegatronDistTensor tensor = dist_.states.at(key);
    dist_.states.erase(key);
    uint64_t missing = 0;
    uint64_t all = 0;
    for (const Mended& mended : shards) {
      missing += mended.count - mended.parts->CountIn(mended.begin, mended.begin + mended.count);
      all += mended.count;
    }
    if (missing > 0) {
      table_.index().losses.push_back(
          absl::StrFormat("%s %s: %d of its %d elements were never written: Megatron cut the "
                          "states of buffers with "
                          "several buckets at the wrong places (Megatron-LM#5077)",
                          name, state, missing, all));
      lost_names.insert(name);
      continue;
    }
    ASSIGN_OR_RETURN(const uint32_t number, table_.State(name, state, tensor.dtype, tensor.shape));
    for (const Mended& mended : shards) {
      RETURN_IF_ERROR(
          AddFlatParts(*mended.parts, mended.begin, mended.count, mended.shard, number, table_)
              .status());
    }
  }
  for (const std::string& name : lost_names) mended_names_.erase(name);
  if (!mended_names_.empty()) {
    table_.index().repairs.push_back(absl::StrFormat(
        "%d parameters, %s the first: Megatron cut the optimizer's states of buffers with several "
        "buckets at the wrong places (Megatron-LM#5077); they are put together again",
        mended_names_.size(), *mended_names_.begin()));
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
