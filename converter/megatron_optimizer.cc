#include "converter/megatron_optimizer.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/deepspeed_states.h"

namespace holdfast::converter {
namespace {

constexpr size_t kOptimizersMax = 1024;
// Parameters of a buffer for which every size of buckets is tried.
constexpr size_t kParametersTriedMax = 4096;

bool IsArray(const TorchValue& value) {
  return value.Is(TorchValue::Kind::kList) || value.Is(TorchValue::Kind::kTuple);
}

size_t SizeOf(const TorchValue& value) {
  return IsArray(value) ? value.ArraySize().value_or(0) : 0;
}

bool IsTrue(const TorchValue& value) {
  return value.Is(TorchValue::Kind::kBool) && value.Bool().value_or(false);
}

// A number of a group; 1 where it says none.
double Multiplier(const TorchValue& group, std::string_view key) {
  const TorchValue value = group.Find(key);
  if (!value.Is(TorchValue::Kind::kFloat) && !value.Is(TorchValue::Kind::kInteger)) return 1;
  return value.Double().value_or(1);
}

bool IsHalf(Dtype dtype) { return dtype == Dtype::kBfloat16 || dtype == Dtype::kFloat16; }

// Megatron decays weights, but neither biases nor what has one dimension.
bool IsDecayed(const MegatronTensor& tensor) {
  return !tensor.global.ends_with(".bias") && tensor.stored.shape.size() != 1;
}

bool IsAtAnEnd(const MegatronTensor& tensor) {
  return absl::StrContains(tensor.global, "word_embeddings.") ||
         absl::StrContains(tensor.global, "output_layer.");
}

}  // namespace

std::vector<TorchValue> MegatronOptimizers(const TorchValue& optimizer) {
  std::vector<TorchValue> parts;
  if (IsArray(optimizer)) {
    for (size_t i = 0; i < std::min(SizeOf(optimizer), kOptimizersMax); ++i) {
      parts.push_back(optimizer[i]);
    }
    return parts;
  }
  if (!optimizer.Is(TorchValue::Kind::kDict)) return parts;
  const size_t count = std::min(optimizer.EntryCount().value_or(0), kOptimizersMax);
  bool numbered = count > 0;
  for (size_t i = 0; i < count; ++i) {
    numbered = numbered && optimizer.Key(i).Is(TorchValue::Kind::kInteger);
  }
  if (!numbered) return {optimizer};
  for (size_t i = 0; i < count; ++i) parts.push_back(optimizer.Entry(i));
  return parts;
}

TorchValue MegatronInnerOptimizer(const TorchValue& optimizer) {
  if (!optimizer.Is(TorchValue::Kind::kDict)) return {};
  if (optimizer.Find("param_groups").present()) return optimizer;
  const TorchValue inner = optimizer.Find("optimizer");
  if (!inner.Is(TorchValue::Kind::kDict)) return {};
  return inner.Find("param_groups").present() || inner.Find("state").present() ? inner
                                                                               : TorchValue();
}

std::optional<StoredTensor> MegatronStep(const TorchFile& torch, uint32_t file,
                                         const TorchValue& inner) {
  if (!inner.Is(TorchValue::Kind::kDict)) return std::nullopt;
  const auto stored = [&](const TorchValue& value) -> std::optional<StoredTensor> {
    absl::StatusOr<std::optional<StoredTensor>> tensor = StateTensor(torch, file, value);
    if (!tensor.ok()) return std::nullopt;
    return *std::move(tensor);
  };
  if (const TorchValue state = inner.Find("state"); state.Is(TorchValue::Kind::kDict)) {
    if (const TorchValue step = state.Find("common_step"); step.present()) return stored(step);
  }
  const TorchValue groups = inner.Find("param_groups");
  std::optional<StoredTensor> common;
  std::optional<double> number;
  for (size_t g = 0; g < SizeOf(groups); ++g) {
    const TorchValue step = groups[g].Find("step");
    if (!step.present() || step.Is(TorchValue::Kind::kNone)) continue;
    const absl::StatusOr<double> value = step.Double();
    if (number.has_value() && value.ok() && *value != *number) return std::nullopt;
    if (value.ok()) number = *value;
    if (!common.has_value()) common = stored(step);
  }
  return common;
}

bool HasExpertGroup(const TorchValue& inner) {
  const TorchValue groups =
      inner.Is(TorchValue::Kind::kDict) ? inner.Find("param_groups") : TorchValue();
  for (size_t g = 0; g < SizeOf(groups); ++g) {
    if (IsTrue(groups[g].Find("is_expert_parallel"))) return true;
  }
  return false;
}

void MegatronOptimizer::Unreadable(const MegatronRank& rank, const std::string& what,
                                   const absl::Status& why) {
  table_.index().unreadable.push_back(
      {absl::StrCat(rank.files->directory, ": ", what), std::string(why.message())});
}

// ------------------------------------------------------------------ numbered states

absl::Status MegatronOptimizer::FindStates() {
  for (const MegatronRank& rank : model_.ranks()) {
    const std::vector<TorchValue> optimizers =
        MegatronOptimizers(rank.torch->root().Find("optimizer"));
    bool has_experts = false;
    for (const TorchValue& optimizer : optimizers) {
      has_experts = has_experts || HasExpertGroup(MegatronInnerOptimizer(optimizer));
    }
    for (const TorchValue& optimizer : optimizers) {
      const size_t before = found_.size();
      const absl::Status status = FindNumbered(rank, optimizer, has_experts);
      if (status.ok()) continue;
      found_.erase(found_.begin() + static_cast<ptrdiff_t>(before), found_.end());
      Unreadable(rank, "optimizer", status);
    }
  }
  for (const Found& found : found_) {
    // Masters are copies that keep the attributes of tensor-parallel parameters.
    const TorchValue parallel = found.master.present()
                                    ? found.master.TensorAttribute("tensor_model_parallel")
                                    : TorchValue();
    if (!parallel.Is(TorchValue::Kind::kBool)) continue;
    MegatronCut cut;
    if (IsTrue(parallel)) {
      const TorchValue dimension = found.master.TensorAttribute("partition_dim");
      const TorchValue stride = found.master.TensorAttribute("partition_stride");
      if (!dimension.Is(TorchValue::Kind::kInteger)) continue;
      const absl::StatusOr<uint64_t> number = dimension.Uint64();
      if (!number.ok()) continue;  // -1: along none
      const int64_t halves = stride.Is(TorchValue::Kind::kInteger) ? stride.Int64().value_or(1) : 1;
      if (halves > 2) continue;
      cut.kind = halves == 2 ? MegatronCut::Kind::kGated : MegatronCut::Kind::kJoined;
      cut.dimension = *number;
    }
    model_.Tell(found.parameter->global, cut);
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> MegatronOptimizer::Fits(const MegatronTensor& parameter,
                                             const TorchValue& state,
                                             const TorchValue& master) const {
  const Shape& shape = parameter.stored.shape;
  ASSIGN_OR_RETURN(const size_t count, state.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    if (!state.Entry(i).Is(TorchValue::Kind::kTensor)) continue;
    ASSIGN_OR_RETURN(const TorchTensor* const tensor, state.Entry(i).Tensor());
    if (tensor->shape.size() == shape.size() && tensor->shape != shape) return false;
  }
  if (!master.present()) return true;
  ASSIGN_OR_RETURN(const TorchTensor* const tensor, master.Tensor());
  return tensor->shape == shape;
}

absl::Status MegatronOptimizer::FindNumbered(const MegatronRank& rank, const TorchValue& optimizer,
                                             bool has_experts) {
  const TorchValue inner = MegatronInnerOptimizer(optimizer);
  if (!inner.present()) return absl::OkStatus();
  const TorchValue states = inner.Find("state");
  if (!states.Is(TorchValue::Kind::kDict) || states.EntryCount().value_or(0) == 0) {
    return absl::OkStatus();  // DistributedOptimizer: its states are in the other file
  }
  std::map<int64_t, TorchValue> by_id;
  ASSIGN_OR_RETURN(const size_t state_count, states.EntryCount());
  for (size_t i = 0; i < state_count; ++i) {
    ASSIGN_OR_RETURN(const int64_t id, states.Key(i).Int64());
    by_id[id] = states.Entry(i);
  }
  const TorchValue groups = inner.Find("param_groups");
  const TorchValue masters = optimizer.Find("fp32_from_fp16_params");
  bool splits_decay = false;
  bool splits_ends = false;
  for (size_t g = 0; g < SizeOf(groups); ++g) {
    splits_decay = splits_decay || Multiplier(groups[g], "wd_mult") == 0;
    splits_ends = splits_ends || IsTrue(groups[g].Find("is_decoupled_lr"));
  }
  std::vector<const MegatronTensor*> named;  // of this rank, in the order of --names
  for (const std::string& name : names_) {
    const auto tensor = std::ranges::find(rank.tensors, name, &MegatronTensor::global);
    if (tensor != rank.tensors.end()) named.push_back(&*tensor);
  }
  size_t position = 0;  // over all groups
  for (size_t g = 0; g < SizeOf(groups); ++g) {
    const TorchValue group = groups[g];
    ASSIGN_OR_RETURN(const TorchValue ids, group.Get("params"));
    ASSIGN_OR_RETURN(const size_t id_count, ids.ArraySize());
    std::vector<const MegatronTensor*> candidates;
    for (size_t i = position; i < std::min(named.size(), position + id_count); ++i) {
      candidates.push_back(named[i]);
    }
    for (const MegatronTensor& tensor : rank.tensors) {
      if (tensor.buffer || !names_.empty()) continue;
      if (has_experts && tensor.expert != IsTrue(group.Find("is_expert_parallel"))) continue;
      if (splits_decay && IsDecayed(tensor) != (Multiplier(group, "wd_mult") != 0)) continue;
      if (splits_ends && IsAtAnEnd(tensor) != IsTrue(group.Find("is_decoupled_lr"))) continue;
      candidates.push_back(&tensor);
    }
    const TorchValue of_group = g < SizeOf(masters) ? masters[g] : TorchValue();
    size_t master_count = 0;  // of those that have been given out
    size_t next = 0;
    for (size_t i = 0; i < id_count; ++i, ++position) {
      ASSIGN_OR_RETURN(const int64_t id, ids[i].Int64());
      const auto known = by_id.find(id);
      const TorchValue state = known == by_id.end() ? TorchValue() : known->second;
      if (state.present() && !state.Is(TorchValue::Kind::kDict)) return state.Mismatch("a dict");
      Found found{.rank = &rank, .parameter = nullptr, .state = state, .master = {}};
      for (; next < candidates.size() && found.parameter == nullptr; ++next) {
        const MegatronTensor& candidate = *candidates[next];
        TorchValue master;
        if (IsHalf(candidate.stored.dtype) && master_count < SizeOf(of_group)) {
          master = of_group[master_count];
        }
        if (state.present()) {
          ASSIGN_OR_RETURN(const bool fits, Fits(candidate, state, master));
          if (!fits) continue;
        }
        if (master.present()) {
          ASSIGN_OR_RETURN(const TorchTensor* const tensor, master.Tensor());
          ASSIGN_OR_RETURN(const StoredTensor stored,
                           Locate(*rank.torch, rank.files->model, *tensor));
          if (!stored.contiguous || !candidate.stored.contiguous) {
            return absl::UnimplementedError("a master weight that is strided");
          }
          const uint64_t count = stored.ElementCount();
          FlatParts master_parts;
          FlatParts weight_parts;
          master_parts.Add(0, stored, 0, count);
          weight_parts.Add(0, candidate.stored, 0, candidate.stored.ElementCount());
          ASSIGN_OR_RETURN(const MasterMatch match,
                           CompareMaster(folder_, master_parts, 0, weight_parts, 0, count));
          if (match == MasterMatch::kDifferent) continue;
        }
        found.parameter = &candidate;
        found.master = master;
        if (master.present()) ++master_count;
      }
      if (found.parameter == nullptr) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "param_groups[%d]: expected a parameter of the model's, in its order, for state %d, "
            "found none of its shape and weights; --names FILE says which it is",
            g, id));
      }
      found_.push_back(std::move(found));
    }
    // Without masters nothing but the count tells that no parameter was left out in between.
    if (names_.empty() && master_count == 0 && id_count != candidates.size()) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "param_groups[%d]: expected states of %d parameters, found %d, and nothing tells whose "
          "they are; --names FILE says it",
          g, candidates.size(), id_count));
    }
  }
  return absl::OkStatus();
}

absl::Status MegatronOptimizer::AddState(const MegatronTensor& parameter, const MegatronRank& rank,
                                         const std::string& state, const StoredTensor& stored) {
  const ShardMap* const shard = model_.ShardOf(parameter, rank);
  if (shard == nullptr) return absl::OkStatus();  // named already
  if (stored.shape == parameter.stored.shape) {
    ASSIGN_OR_RETURN(const uint32_t number,
                     table_.State(parameter.global, state, stored.dtype, shard->shape));
    return table_.AddShard(number, *shard, stored);
  }
  if (stored.ElementCount() == 1) {  // `step`
    ASSIGN_OR_RETURN(const uint32_t number,
                     table_.State(parameter.global, state, stored.dtype, stored.shape));
    return table_.AddWhole(number, stored);
  }
  return absl::UnimplementedError(absl::StrFormat(
      "%s: expected the parameter's shape or one element, found another shape", parameter.global));
}

absl::Status MegatronOptimizer::AddFound(const Found& found) {
  const TorchFile& torch = *found.rank->torch;
  const uint32_t file = found.rank->files->model;
  if (found.master.present()) {
    ASSIGN_OR_RETURN(const TorchTensor* const tensor, found.master.Tensor());
    ASSIGN_OR_RETURN(const StoredTensor stored, Locate(torch, file, *tensor));
    RETURN_IF_ERROR(AddState(*found.parameter, *found.rank, "fp32", stored));
  }
  if (!found.state.present()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const size_t count, found.state.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view key, found.state.Key(i).String());
    ASSIGN_OR_RETURN(const std::optional<StoredTensor> stored,
                     StateTensor(torch, file, found.state.Entry(i)));
    if (!stored.has_value()) continue;
    RETURN_IF_ERROR(AddState(*found.parameter, *found.rank, std::string(key), *stored));
  }
  return absl::OkStatus();
}

absl::Status MegatronOptimizer::AddStates() {
  for (const Found& found : found_) {
    const absl::Status status = AddFound(found);
    if (absl::IsUnimplemented(status)) {
      Unreadable(*found.rank, found.parameter->global, status);
    } else if (!status.ok()) {
      return absl::Status(status.code(),
                          absl::StrCat(found.rank->torch->name(), ": ", status.message()));
    }
  }
  for (const MegatronRank& rank : model_.ranks()) {
    if (!rank.files->optimizer.has_value()) continue;
    const absl::Status status = AddDistributed(rank);
    if (status.ok()) continue;
    const std::string& name = folder_.files()[*rank.files->optimizer].path;
    return absl::Status(status.code(), absl::StrCat(name, ": ", status.message()));
  }
  return absl::OkStatus();
}

// ------------------------------------------------------------------ DistributedOptimizer

std::vector<MegatronOptimizer::Buffer> MegatronOptimizer::BuffersOf(
    const MegatronRank& rank) const {
  // Chunk by chunk, and in a chunk in the order in which the model's parameters need them.
  std::vector<Buffer> buffers;
  std::map<std::pair<uint32_t, uint64_t>, size_t> number_of;  // by chunk and storage
  for (const MegatronTensor& tensor : rank.tensors) {
    if (tensor.buffer || !tensor.stored.contiguous || tensor.stored.ElementCount() == 0) continue;
    const auto [known, added] = number_of.try_emplace(
        std::pair(tensor.chunk, tensor.stored.storage_offset_bytes), buffers.size());
    if (added) {
      buffers.push_back(
          {.expert = tensor.expert,
           .elements = tensor.stored.storage_bytes / ElementBytes(tensor.stored.dtype)});
    }
    buffers[known->second].parameters.push_back(&tensor);
  }
  for (Buffer& buffer : buffers) {
    std::ranges::stable_sort(buffer.parameters, {}, [](const MegatronTensor* tensor) {
      return tensor->stored.offset_bytes;
    });
  }
  return buffers;
}

std::optional<BufferLayout> MegatronOptimizer::LayoutOf(const Buffer& buffer,
                                                        const MegatronRank& rank,
                                                        uint64_t elements) const {
  const MegatronArguments& arguments = model_.arguments();
  const MegatronTensor& first = *buffer.parameters.front();
  const uint64_t element_bytes = ElementBytes(first.stored.dtype);
  std::vector<uint64_t> begins;
  std::vector<BufferParameter> parameters;
  uint64_t last_end = 0;
  for (const MegatronTensor* const tensor : buffer.parameters) {
    const uint64_t bytes = tensor->stored.offset_bytes - tensor->stored.storage_offset_bytes;
    if (tensor->stored.dtype != first.stored.dtype || bytes % element_bytes != 0) {
      return std::nullopt;
    }
    begins.push_back(bytes / element_bytes);
    parameters.push_back({.elements = tensor->stored.ElementCount()});
    last_end = begins.back() + parameters.back().elements;
  }
  // A tied embedding on the first and the last stage stands alone in its bucket.
  const bool tied = arguments.tied.value_or(true) && arguments.pipeline_ranks > 1;
  for (size_t i = 0; tied && i < parameters.size(); ++i) {
    const std::string& name = buffer.parameters[i]->global;
    parameters[i].shared_embedding =
        name == "embedding.word_embeddings.weight" || name == "output_layer.weight";
  }
  const auto fitting = [&](const BufferRule& rule) -> std::optional<BufferLayout> {
    absl::StatusOr<BufferLayout> layout = LayOutBuffer(parameters, rule);
    if (!layout.ok() || layout->begins != begins || layout->padded_elements() != buffer.elements ||
        layout->elements() != elements) {
      return std::nullopt;
    }
    return *std::move(layout);
  };
  const uint64_t ranks = first.expert ? arguments.expert_data_ranks : arguments.data_ranks;
  const BufferRule said = BufferRuleOf(arguments, ranks, rank.stage == 0 && first.chunk == 0);
  if (auto layout = fitting(said); layout.has_value()) return layout;
  // The arguments do not say it (a number of buckets instead of a size, another world): one bucket,
  // or a size that closes the first bucket behind some parameter.
  for (const uint64_t end_multiple : {said.end_multiple, uint64_t{128}, uint64_t{65536}}) {
    if (auto layout = fitting({.bucket_elements = {}, .end_multiple = end_multiple});
        layout.has_value()) {
      return layout;
    }
    if (parameters.size() > kParametersTriedMax) continue;
    for (size_t i = 0; i + 1 < parameters.size(); ++i) {
      const uint64_t end = begins[i] + parameters[i].elements;
      if (end >= last_end) break;
      if (auto layout = fitting({.bucket_elements = end, .end_multiple = end_multiple});
          layout.has_value()) {
        return layout;
      }
    }
  }
  return std::nullopt;
}

absl::Status MegatronOptimizer::AddBuffer(const MegatronRank& rank, const TorchFile& torch,
                                          uint32_t file, const TorchValue& entry,
                                          const std::optional<StoredTensor>& step,
                                          std::vector<Buffer>& buffers) {
  std::map<std::string, StoredTensor> states;
  ASSIGN_OR_RETURN(const size_t count, entry.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    if (!entry.Entry(i).Is(TorchValue::Kind::kTensor)) continue;
    ASSIGN_OR_RETURN(const std::string_view key, entry.Key(i).String());
    ASSIGN_OR_RETURN(const TorchTensor* const tensor, entry.Entry(i).Tensor());
    ASSIGN_OR_RETURN(states[std::string(key)], Locate(torch, file, *tensor));
  }
  const auto master = states.find("param");
  if (master == states.end()) {
    return absl::FailedPreconditionError("expected a tensor \"param\" in a buffer, found none");
  }
  const uint64_t elements = master->second.ElementCount();
  FlatParts masters;
  masters.Add(0, master->second, 0, elements);
  for (Buffer& buffer : buffers) {
    if (buffer.used) continue;
    const std::optional<BufferLayout> layout = LayoutOf(buffer, rank, elements);
    if (!layout.has_value()) continue;
    bool proven = true;
    for (size_t i = 0; i < buffer.parameters.size() && proven; ++i) {
      const StoredTensor& weight = buffer.parameters[i]->stored;
      FlatParts weights;
      weights.Add(0, weight, 0, weight.ElementCount());
      ASSIGN_OR_RETURN(const MasterMatch match,
                       CompareMaster(folder_, masters, layout->begins[i] - layout->paddings[i],
                                     weights, 0, weight.ElementCount()));
      proven = match != MasterMatch::kDifferent;
    }
    if (!proven) continue;
    buffer.used = true;
    for (const auto& [key, stored] : states) {
      if (stored.ElementCount() != elements || !stored.contiguous) {
        return absl::FailedPreconditionError(
            absl::StrFormat("expected \"%s\" of %d elements, as \"param\" has, found %d", key,
                            elements, stored.ElementCount()));
      }
      FlatParts parts;
      parts.Add(0, stored, 0, elements);
      for (size_t i = 0; i < buffer.parameters.size(); ++i) {
        const MegatronTensor& parameter = *buffer.parameters[i];
        const ShardMap* const shard = model_.ShardOf(parameter, rank);
        if (shard == nullptr) continue;
        ASSIGN_OR_RETURN(const uint32_t number,
                         table_.State(parameter.global, key == "param" ? "fp32" : key, stored.dtype,
                                      shard->shape));
        RETURN_IF_ERROR(AddFlatParts(parts, layout->begins[i] - layout->paddings[i],
                                     parameter.stored.ElementCount(), *shard, number, table_)
                            .status());
      }
    }
    for (const MegatronTensor* const parameter : buffer.parameters) {
      if (step.has_value()) RETURN_IF_ERROR(AddState(*parameter, rank, "step", *step));
    }
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrFormat(
      "expected a buffer of %d elements whose parameters, by their places in model_optim_rng.pt, "
      "are the masters in it, found none",
      elements));
}

absl::Status MegatronOptimizer::AddDistributed(const MegatronRank& rank) {
  const uint32_t file = *rank.files->optimizer;
  ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch, OpenTorch(folder_, file, table_));
  std::vector<Buffer> buffers = BuffersOf(rank);
  const std::vector<TorchValue> described =
      MegatronOptimizers(rank.torch->root().Find("optimizer"));
  std::vector<TorchValue> parts;
  if (IsArray(torch->root())) {
    parts = MegatronOptimizers(torch->root());
  } else {
    parts = {torch->root()};
  }
  for (size_t p = 0; p < parts.size(); ++p) {
    if (parts[p].Is(TorchValue::Kind::kNone)) continue;  // another rank has it
    const TorchValue inner =
        p < described.size() ? MegatronInnerOptimizer(described[p]) : TorchValue();
    const std::optional<StoredTensor> step = MegatronStep(*rank.torch, rank.files->model, inner);
    ASSIGN_OR_RETURN(const size_t count, parts[p].EntryCount());
    for (size_t i = 0; i < count; ++i) {
      if (!parts[p].Key(i).Is(TorchValue::Kind::kInteger)) continue;  // buckets_coalesced
      const TorchValue of_dtypes = parts[p].Entry(i);
      ASSIGN_OR_RETURN(const size_t dtypes, of_dtypes.EntryCount());
      for (size_t d = 0; d < dtypes; ++d) {
        const TorchValue entry = of_dtypes.Entry(d);
        const absl::Status status =
            entry.Is(TorchValue::Kind::kDict)
                ? AddBuffer(rank, *torch, file, entry, step, buffers)
                : absl::UnimplementedError(absl::StrCat(
                      "expected a dict of coalesced buckets, found ", entry.Describe()));
        if (status.ok()) continue;
        if (!absl::IsFailedPrecondition(status) && !absl::IsUnimplemented(status)) return status;
        Unreadable(rank,
                   absl::StrFormat("distrib_optim.pt, optimizer %d, buffer %s", p,
                                   absl::StrCat(parts[p].Key(i).Int64().value_or(0))),
                   status);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
