#include "converter/megatron_dist.h"

#include <algorithm>
#include <memory>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/dcp_items.h"
#include "converter/dcp_metadata.h"
#include "converter/decimal.h"
#include "converter/deepspeed_states.h"
#include "converter/megatron_optimizer.h"
#include "converter/megatron_reader.h"
#include "converter/megatron_state.h"
#include "converter/names_file.h"
#include "converter/torch_index.h"

namespace holdfast::converter {
namespace {

constexpr uint64_t kObjectBytesMax = uint64_t{64} << 20;
constexpr size_t kShownBytesMax = size_t{64} << 10;
constexpr uint64_t kItemOverheadBytesMax = uint64_t{1} << 20;
constexpr uint64_t kBuffersMax = uint64_t{1} << 20;  // of a rank
constexpr std::string_view kBuckets = "optimizer.distributed.dp_group_idx_";
constexpr std::string_view kStates = "optimizer.state.";
constexpr std::string_view kCommon = "common_state/";

bool Contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Takes `prefix` from the front, if it is there.
bool TakeText(std::string_view prefix, std::string_view& text) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// Takes `prefix` and a number behind it from the front.
std::optional<uint32_t> TakeNumber(std::string_view prefix, std::string_view& text) {
  if (!TakeText(prefix, text)) return std::nullopt;
  const size_t end = std::min(text.find_first_not_of("0123456789"), text.size());
  const auto number = ParseDecimal(text.substr(0, end));
  if (!number.has_value() || *number > UINT32_MAX) return std::nullopt;
  text.remove_prefix(end);
  return static_cast<uint32_t>(*number);
}

// "chained_1.": the number of the optimizer, which is taken from the front.
uint32_t TakeOptimizer(std::string_view& key) {
  std::string_view rest = key;
  const auto number = TakeNumber("chained_", rest);
  if (!number.has_value() || !rest.starts_with('.')) return 0;
  key = rest.substr(1);
  return *number;
}

struct BucketKey {
  MegatronBufferKey buffer;
  uint32_t bucket = 0;
  std::string state;
};
// "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(..).bucket_idx_0.exp_avg".
std::optional<BucketKey> ParseBucketKey(std::string_view key) {
  BucketKey parsed;
  parsed.buffer.optimizer = TakeOptimizer(key);
  const auto rank = TakeNumber(kBuckets, key);
  const auto buffer = TakeNumber(".gbuf_idx_", key);
  if (!rank.has_value() || !buffer.has_value()) return std::nullopt;
  const size_t at = key.find(".bucket_idx_");
  if (at == std::string_view::npos) return std::nullopt;
  key.remove_prefix(at);
  const auto bucket = TakeNumber(".bucket_idx_", key);
  if (!bucket.has_value() || !TakeText(".", key) || key.empty()) return std::nullopt;
  parsed.buffer.rank = *rank;
  parsed.buffer.buffer = *buffer;
  parsed.bucket = *bucket;
  parsed.state = std::string(key);
  return parsed;
}

// A tensor's key: of which parameter which state; "" of its weights.
struct TensorKey {
  std::string state;
  std::string model;  // the key of the model's tensor
};
TensorKey ParseTensorKey(std::string_view key, bool dtensors) {
  const std::string_view whole = key;
  TakeOptimizer(key);
  if (!TakeText(kStates, key)) {
    if (dtensors && TakeText("model.", key)) {
      while (TakeText("module.", key)) {
      }
      return {.state = "", .model = std::string(key)};
    }
    return {.state = "", .model = std::string(whole)};
  }
  const size_t dot = dtensors ? key.rfind('.') : key.find('.');
  if (dot == std::string_view::npos) return {.state = "", .model = std::string(whole)};
  std::string_view state = key.substr(0, dot);
  std::string_view model = key.substr(dot + 1);
  if (dtensors) {
    std::swap(state, model);
    while (TakeText("module.", model)) {
    }
  }
  if (state == "param" || state == "fp32_param" || state == "master_param") state = "fp32";
  return {.state = std::string(state), .model = std::string(model)};
}

// What a tensor that is no state of the optimizer is.
std::string RoleOf(std::string_view name) {
  if (name.starts_with("rng_state.")) return "rng";
  return IsMegatronBuffer(name) ? "buffer" : "param";
}

class Reader {
 public:
  Reader(const ForeignFolder& folder, const MegatronFiles& files, const ReadOptions& options)
      : folder_(folder),
        files_(files),
        options_(options),
        dtensors_(files.kind == MegatronFiles::Kind::kFsdpDTensor),
        keeper_(folder) {}

  absl::StatusOr<ForeignIndex> Read() {
    ASSIGN_OR_RETURN(const NamesFile names, ParseNamesFile(options_.names));
    dist_.names = names.parameters;
    const std::string& path = folder_.files()[*files_.metadata].path;
    ASSIGN_OR_RETURN(std::string bytes, folder_.ReadAll(*files_.metadata, kDcpMetadataBytesMax));
    ASSIGN_OR_RETURN(metadata_, ParseDcpMetadata(std::move(bytes), path));
    DcpItems items(folder_, metadata_, files_.directory, path, table_.index());
    NameLostFiles();
    RETURN_IF_ERROR(ReadCommon());
    for (const DcpObject& object : metadata_.objects) {
      RETURN_IF_ERROR(ReadObject(items, object));
    }
    // Weights first: they tell of flattened states what they are states of.
    for (const bool weights : {true, false}) {
      for (const DcpTensor& tensor : metadata_.tensors) {
        if (ParseTensorKey(tensor.key, dtensors_).state.empty() != weights) continue;
        const absl::Status status = ReadTensor(items, tensor);
        if (!status.ok()) {
          return absl::Status(status.code(),
                              absl::StrFormat("%s: %s: %s", path, tensor.key, status.message()));
        }
      }
    }
    // Also those of which no state will be left have a step.
    for (const auto& [key, tensor] : dist_.states) optimized_.insert(key.first);
    MegatronDistOptimizer optimizer(folder_, dist_, table_);
    RETURN_IF_ERROR(optimizer.AddBuckets());
    RETURN_IF_ERROR(optimizer.MendShiftedStates());
    for (const auto& [name, tensor] : dist_.weights) {
      RETURN_IF_ERROR(AddTensor(name, RoleOf(name), tensor));
    }
    for (const auto& [key, tensor] : dist_.states) {
      RETURN_IF_ERROR(AddTensor(key.first, key.second, tensor));
    }
    RETURN_IF_ERROR(AddSteps());
    RETURN_IF_ERROR(AddTied());
    keeper_.Finish(table_.index());
    Describe();
    return table_.Take();
  }

 private:
  // ---------------------------------------------------------------- objects

  // Without these two Megatron loads nothing.
  void NameLostFiles() {
    if (dtensors_) return;
    const auto is_common = [](const DcpObject& object) {  // since 2026
      return object.item != kNoItem && object.key.starts_with(kCommon);
    };
    const bool has_object = std::ranges::any_of(metadata_.objects, is_common);
    if (!files_.common.has_value() && !has_object) {
      table_.index().losses.push_back(
          "common.pt: expected it beside .metadata, found none: arguments, groups of the optimizer "
          "and its step are not known");
    }
    if (!files_.json.has_value()) {
      table_.index().repairs.push_back("metadata.json: expected it beside .metadata, found none");
    }
  }

  absl::Status ReadCommon() {
    if (!files_.common.has_value()) return absl::OkStatus();
    ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch,
                     OpenTorch(folder_, *files_.common, table_));
    return TakeCommon(*torch, torch->root(), *files_.common, 0);
  }

  // What all ranks share: arguments, steps. `begin_bytes`: of the torch file in its file.
  absl::Status TakeCommon(const TorchFile& torch, const TorchValue& root, uint32_t file,
                          uint64_t begin_bytes) {
    if (!root.Is(TorchValue::Kind::kDict)) return root.Mismatch("a dict of what ranks share");
    ASSIGN_OR_RETURN(dist_.arguments, ReadMegatronArguments(root.Find("args")));
    const MegatronKeptFrom from{.torch = &torch, .file = file, .begin_bytes = begin_bytes};
    keeper_.AddCommon(from, root);
    uint32_t number = 0;
    for (const TorchValue& optimizer : MegatronOptimizers(root.Find("optimizer"))) {
      TakeStep(torch, MegatronInnerOptimizer(optimizer), file, begin_bytes);
      keeper_.AddOptimizer(from, number++, optimizer);
    }
    return AddMegatronFacts(root, table_.index());
  }

  void TakeStep(const TorchFile& torch, const TorchValue& inner, uint32_t file,
                uint64_t begin_bytes) {
    std::optional<StoredTensor> step = MegatronStep(torch, file, inner);
    if (!step.has_value()) return;
    if (step->file != kInline) {
      step->offset_bytes += begin_bytes;
      step->storage_offset_bytes += begin_bytes;
    }
    std::optional<StoredTensor>& of = HasExpertGroup(inner) ? dist_.expert_step : dist_.step;
    if (!of.has_value()) of = std::move(step);
  }

  absl::Status ReadObject(DcpItems& items, const DcpObject& object) {
    std::optional<uint32_t> file;
    if (object.item != kNoItem) {
      ASSIGN_OR_RETURN(file, items.FileOf(metadata_.items[object.item]));
    }
    if (!objects_.insert(object.key).second) return absl::OkStatus();
    if (!file.has_value()) {
      const std::string& path = folder_.files()[*files_.metadata].path;
      table_.index().losses.push_back(LostObject(metadata_, path, object));
      return absl::OkStatus();
    }
    const DcpItem& item = metadata_.items[object.item];
    ASSIGN_OR_RETURN(const OpenedItem opened, items.Open(item, *file, kObjectBytesMax));
    TorchValue value = opened.torch->root();
    // Megatron's sharded objects are lists of one.
    if (value.Is(TorchValue::Kind::kList) && value.ArraySize().value_or(0) == 1) value = value[0];
    if (Contains(object.key, ".param_state/shard_")) {
      const absl::Status status = TakeGathered(opened, *file, object.key, value);
      if (!absl::IsUnimplemented(status)) return status;
      table_.index().unreadable.push_back({object.key, std::string(status.message())});
      return absl::OkStatus();
    }
    table_.index().blobs.push_back({object.key, opened.extent});
    AddTorchDescription(*opened.torch, table_.index());
    if (object.key.starts_with(kCommon)) {
      return TakeCommon(*opened.torch, value, *file, opened.place.begin_bytes);
    }
    Keep({.torch = opened.torch.get(), .file = *file, .begin_bytes = opened.place.begin_bytes},
         object.key, value);
    if (dtensors_ && object.key == "args") {
      ASSIGN_OR_RETURN(dist_.arguments, ReadMegatronArguments(value));
    }
    if (dtensors_ && object.key == "iteration" && value.Uint64().ok()) {
      table_.index().has_step = true;
      table_.index().step = *value.Uint64();
    }
    if (std::string_view key = object.key; Contains(key, ".optimizer/shard_")) {
      const uint32_t number = TakeOptimizer(key);
      const TorchValue inner = MegatronInnerOptimizer(value);
      if (HasExpertGroup(inner)) dist_.expert_optimizers.insert(number);
      TakeStep(*opened.torch, inner, *file, opened.place.begin_bytes);
    }
    if (Contains(object.key, ".per_bucket_numel_unpadded/shard_")) {
      RETURN_IF_ERROR(TakeBucketSizes(object.key, value));
    }
    const TorchValue attributes = value.attributes();  // of argparse.Namespace
    table_.index().scalars.push_back(
        {object.key, TorchJson(attributes.present() ? attributes : value, kShownBytesMax)});
    return absl::OkStatus();
  }

  // What writers need of an object beside its bytes.
  void Keep(const MegatronKeptFrom& from, std::string_view key, const TorchValue& value) {
    if (dtensors_ && !Contains(key, ".") && !Contains(key, "/")) {
      return keeper_.AddCommonEntry(from, key, value);
    }
    const auto sharded = ParseMegatronObject(key);
    if (!sharded.has_value()) return;
    if (sharded->key == "rng_state" && sharded->offsets.size() >= 2) {
      const uint64_t expert = sharded->offsets.size() > 2 ? sharded->offsets[2] : 0;
      return keeper_.AddRandom(
          from, absl::StrCat(sharded->offsets[0], ".", sharded->offsets[1], ".", expert), value);
    }
    if (sharded->key.ends_with("_extra_state")) {
      const MegatronKey model = ParseMegatronKey(sharded->key);
      // Grouped experts have one state together, cut by ranks.
      if (model.expert_axis && dist_.arguments.grouped_experts) return;
      const uint64_t first = sharded->offsets.front();
      return keeper_.AddExtra(
          from,
          MegatronNameOf(model, model.layer_axis ? first : 0,
                         model.expert_axis ? sharded->offsets.back() : 0, dist_.arguments),
          value);
    }
    if (std::string_view of = key; Contains(key, ".optimizer/shard_")) {
      keeper_.AddOptimizer(from, TakeOptimizer(of), value);
    }
  }

  // A rank's buffers in one object (`dp_zero_gather_scatter`), as distrib_optim.pt has them: by
  // number and dtypes, flat states without the padding of buckets.
  absl::Status TakeGathered(const OpenedItem& opened, uint32_t file, std::string_view key,
                            const TorchValue& value) {
    MegatronBufferKey buffer{.optimizer = TakeOptimizer(key)};
    const auto rank = TakeNumber(kBuckets, key);
    const TorchValue coalesced =
        value.Is(TorchValue::Kind::kDict) ? value.Find("buckets_coalesced") : TorchValue();
    if (!rank.has_value() || !coalesced.present() || opened.place.extent.has_value()) {
      return absl::UnimplementedError(absl::StrCat(
          "expected a dict of coalesced buckets, stored as it is, found ", value.Describe()));
    }
    buffer.rank = *rank;
    ASSIGN_OR_RETURN(const size_t count, value.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      if (!value.Key(i).Is(TorchValue::Kind::kInteger)) continue;
      ASSIGN_OR_RETURN(const uint64_t number, value.Key(i).Uint64());
      ASSIGN_OR_RETURN(const size_t dtypes, value.Entry(i).EntryCount());
      if (dtypes != 1 || number > kBuffersMax) {
        return absl::UnimplementedError(absl::StrFormat(
            "buffer %d: expected states of one pair of dtypes, found %d", number, dtypes));
      }
      buffer.buffer = static_cast<uint32_t>(number);
      RETURN_IF_ERROR(
          TakeGatheredBuffer(opened, file, value.Entry(i).Entry(0), dist_.buffers[buffer][0]));
    }
    return absl::OkStatus();
  }

  static absl::Status TakeGatheredBuffer(const OpenedItem& opened, uint32_t file,
                                         const TorchValue& states, MegatronBucket& bucket) {
    bucket.coalesced = true;
    ASSIGN_OR_RETURN(const size_t count, states.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      if (!states.Entry(i).Is(TorchValue::Kind::kTensor)) continue;
      ASSIGN_OR_RETURN(const std::string_view state, states.Key(i).String());
      ASSIGN_OR_RETURN(const TorchTensor* const tensor, states.Entry(i).Tensor());
      ASSIGN_OR_RETURN(StoredTensor stored, Locate(*opened.torch, file, *tensor));
      stored.offset_bytes += opened.place.begin_bytes;
      stored.storage_offset_bytes += opened.place.begin_bytes;
      const uint64_t elements = stored.ElementCount();
      if (!stored.contiguous || (!bucket.states.empty() && elements != bucket.elements)) {
        return absl::UnimplementedError(
            absl::StrFormat("\"%s\": expected %d elements, as the other states have, found %d",
                            TorchText(state), bucket.elements, elements));
      }
      bucket.elements = elements;
      bucket.states[std::string(state)].Add(0, stored, 0, elements);
    }
    return absl::OkStatus();
  }

  // A list of dicts, one per buffer, of lists, one number per bucket.
  absl::Status TakeBucketSizes(std::string_view key, const TorchValue& value) {
    MegatronBufferKey buffer{.optimizer = TakeOptimizer(key)};
    const auto rank = TakeNumber(kBuckets, key);
    if (!rank.has_value()) return absl::OkStatus();
    buffer.rank = *rank;
    ASSIGN_OR_RETURN(const size_t count, value.ArraySize());
    for (size_t b = 0; b < count; ++b) {
      buffer.buffer = static_cast<uint32_t>(b);
      ASSIGN_OR_RETURN(const size_t dtypes, value[b].EntryCount());
      for (size_t d = 0; d < dtypes; ++d) {
        ASSIGN_OR_RETURN(std::vector<uint64_t> sizes, value[b].Entry(d).Uint64s());
        bucket_sizes_[buffer].push_back(std::move(sizes));
      }
    }
    return absl::OkStatus();
  }

  // ---------------------------------------------------------------- tensors

  // The tensor of a chunk's item; nothing if it has none, or its file is missing.
  absl::StatusOr<std::optional<StoredTensor>> ReadItem(DcpItems& items, const DcpTensor& tensor,
                                                       const DcpChunk& chunk) {
    if (chunk.item == kNoItem) return std::nullopt;
    const DcpItem& item = metadata_.items[chunk.item];
    ASSIGN_OR_RETURN(const std::optional<uint32_t> file, items.FileOf(item));
    if (!file.has_value()) return std::nullopt;
    const std::span<const uint64_t> sizes = metadata_.SizesOf(tensor, chunk);
    ASSIGN_OR_RETURN(const uint64_t elements, ElementCount(sizes, "a chunk"));
    if (elements == 0) return std::nullopt;
    ASSIGN_OR_RETURN(
        const OpenedItem opened,
        items.Open(item, *file,
                   elements * ElementBytes(*DtypeFromName(tensor.dtype)) + kItemOverheadBytesMax));
    if (opened.place.extent.has_value()) {
      return absl::UnimplementedError("expected items as they are, found compressed ones");
    }
    ASSIGN_OR_RETURN(const TorchTensor* const found, opened.torch->root().Tensor());
    ASSIGN_OR_RETURN(StoredTensor stored, Locate(*opened.torch, *file, *found));
    if (!std::ranges::equal(stored.shape, sizes) ||
        DtypeName(stored.dtype) != std::string_view(tensor.dtype)) {
      return absl::DataLossError(
          absl::StrFormat("expected a part of shape [%s] and dtype %s in %s, found [%s] and %s",
                          absl::StrJoin(sizes, ", "), tensor.dtype, opened.torch->name(),
                          absl::StrJoin(stored.shape, ", "), std::string(DtypeName(stored.dtype))));
    }
    stored.offset_bytes += opened.place.begin_bytes;
    stored.storage_offset_bytes += opened.place.begin_bytes;
    return stored;
  }

  absl::Status ReadTensor(DcpItems& items, const DcpTensor& tensor) {
    const std::optional<Dtype> dtype = DtypeFromName(tensor.dtype);
    if (!dtype.has_value()) {
      table_.index().unreadable.push_back(
          {tensor.key, absl::StrCat("is of dtype torch.", tensor.dtype)});
      return absl::OkStatus();
    }
    if (const auto bucket = ParseBucketKey(tensor.key); bucket.has_value()) {
      return ReadBucket(items, tensor, *bucket);
    }
    const TensorKey key = ParseTensorKey(tensor.key, dtensors_);
    const MegatronKey model = ParseMegatronKey(key.model);
    if (const auto whole = WeightsOf(key.model);
        !key.state.empty() && whole.has_value() && IsFlattened(tensor.shape, *whole)) {
      return ReadFlattened(items, tensor, *dtype, key, model, *whole);
    }
    if (key.state.empty()) weights_[key.model] = tensor.shape;
    const size_t axes = (model.layer_axis ? 1 : 0) + (model.expert_axis ? 1 : 0);
    if (tensor.shape.size() < axes) {
      return absl::DataLossError(
          absl::StrFormat("expected at least %d dimensions, of layers and experts, found [%s]",
                          axes, absl::StrJoin(tensor.shape, ", ")));
    }
    const uint64_t layers = model.layer_axis ? tensor.shape[0] : 1;
    const uint64_t experts = model.expert_axis ? tensor.shape[axes - 1] : 1;
    const size_t chunks = tensor.chunks_end - tensor.chunks_begin;
    // Of states of the optimizer those of frozen layers are not there.
    const bool whole = key.state.empty();
    if (whole && (layers > chunks || experts > chunks || layers * experts > chunks)) {
      return absl::DataLossError(
          absl::StrFormat("expected a chunk of each of %d layers and %d experts, found %d", layers,
                          experts, chunks));
    }
    const Shape shape(tensor.shape.begin() + static_cast<ptrdiff_t>(axes), tensor.shape.end());
    RETURN_IF_ERROR(ElementCount(shape, "a tensor").status());
    for (uint64_t l = 0; whole && l < layers; ++l) {
      for (uint64_t e = 0; e < experts; ++e) {
        RETURN_IF_ERROR(TensorOf(key, model, l, e, *dtype, shape).status());
      }
    }
    for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
      const DcpChunk& chunk = metadata_.chunks[c];
      const std::span<const uint64_t> offsets = metadata_.OffsetsOf(tensor, chunk);
      const std::span<const uint64_t> sizes = metadata_.SizesOf(tensor, chunk);
      for (size_t d = 0; d < axes; ++d) {
        if (sizes[d] == 1) continue;
        return absl::UnimplementedError(
            absl::StrFormat("expected chunks of one layer and expert, found one of [%s]",
                            absl::StrJoin(sizes, ", ")));
      }
      // Before its bytes: if they are missing, the tensor lacks them.
      ASSIGN_OR_RETURN(MegatronDistTensor* const of,
                       TensorOf(key, model, model.layer_axis ? offsets[0] : 0,
                                model.expert_axis ? offsets[axes - 1] : 0, *dtype, shape));
      ASSIGN_OR_RETURN(std::optional<StoredTensor> stored, ReadItem(items, tensor, chunk));
      if (!stored.has_value()) continue;
      const auto cut = static_cast<ptrdiff_t>(axes);
      stored->shape.erase(stored->shape.begin(), stored->shape.begin() + cut);
      stored->strides.erase(stored->strides.begin(), stored->strides.begin() + cut);
      MegatronFragment fragment{.lo = Shape(offsets.begin() + cut, offsets.end()),
                                .size = Shape(sizes.begin() + cut, sizes.end()),
                                .begin = 0,
                                .stored = *std::move(stored)};
      if (IsSecondHalf(key.model) && !shape.empty()) fragment.lo[0] += shape[0];
      of->fragments.push_back(std::move(fragment));
    }
    return absl::OkStatus();
  }

  // Megatron FSDP, and torch_dist with singleton_local_shards, store gated layers as two tensors,
  // `<name>_w` and `<name>_v`.
  bool IsHalf(std::string_view model) const {
    return (model.ends_with("_w") || model.ends_with("_v")) && Contains(model, "linear_fc1.");
  }
  bool IsSecondHalf(std::string_view model) const { return IsHalf(model) && model.ends_with("_v"); }

  // Where the tensor of a key, layer and expert is collected.
  absl::StatusOr<MegatronDistTensor*> TensorOf(const TensorKey& key, const MegatronKey& model,
                                               uint64_t layer, uint64_t expert, Dtype dtype,
                                               Shape shape) {
    std::string name =
        dtensors_ ? key.model : MegatronNameOf(model, layer, expert, dist_.arguments);
    if (IsHalf(key.model)) {
      name.resize(name.size() - 2);
      if (!shape.empty()) shape[0] *= 2;
    }
    MegatronDistTensor& tensor =
        key.state.empty() ? dist_.weights[name] : dist_.states[{name, key.state}];
    if (++tensors_ > kStatesMax * 4) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("expected at most %d tensors, found more", kStatesMax));
    }
    if (tensor.fragments.empty()) {
      tensor.dtype = dtype;
      tensor.shape = std::move(shape);
    } else if (tensor.dtype != dtype || tensor.shape != shape) {
      return absl::DataLossError(absl::StrFormat(
          "%s: expected %s of shape [%s], as another key has it, found %s of [%s]", name,
          std::string(DtypeName(tensor.dtype)), absl::StrJoin(tensor.shape, ", "),
          std::string(DtypeName(dtype)), absl::StrJoin(shape, ", ")));
    }
    return &tensor;
  }

  // ---------------------------------------------------------------- flattened states

  std::optional<Shape> WeightsOf(const std::string& model) const {
    const auto found = weights_.find(model);
    if (found == weights_.end()) return std::nullopt;
    return found->second;
  }

  // megatron-core <= 0.13 keeps states as [grid of shards..., elements of a shard].
  static bool IsFlattened(const Shape& shape, const Shape& whole) {
    if (shape.size() != whole.size() + 1 || whole.empty()) return false;
    uint64_t elements = 1;
    for (size_t d = 0; d < whole.size(); ++d) {
      if (shape[d] == 0 || whole[d] % shape[d] != 0) return false;
      if (__builtin_mul_overflow(elements, whole[d] / shape[d], &elements)) return false;
    }
    return shape.back() == elements;
  }

  absl::Status ReadFlattened(DcpItems& items, const DcpTensor& tensor, Dtype dtype,
                             const TensorKey& key, const MegatronKey& model, const Shape& whole) {
    const size_t axes = (model.layer_axis ? 1 : 0) + (model.expert_axis ? 1 : 0);
    if (whole.size() < axes) return absl::OkStatus();  // its weights said so already
    const Shape shape(whole.begin() + static_cast<ptrdiff_t>(axes), whole.end());
    for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
      const DcpChunk& chunk = metadata_.chunks[c];
      ASSIGN_OR_RETURN(std::optional<StoredTensor> stored, ReadItem(items, tensor, chunk));
      if (!stored.has_value()) continue;
      const std::span<const uint64_t> offsets = metadata_.OffsetsOf(tensor, chunk);
      const std::span<const uint64_t> sizes = metadata_.SizesOf(tensor, chunk);
      MegatronFragment fragment;
      fragment.begin = offsets.back();
      for (size_t d = 0; d < whole.size(); ++d) {
        if (sizes[d] != 1 || (d < axes && tensor.shape[d] != whole[d])) {
          return absl::UnimplementedError(
              absl::StrFormat("expected chunks of one flattened shard, found one of [%s]",
                              absl::StrJoin(sizes, ", ")));
        }
        if (d < axes) continue;
        const uint64_t rows = whole[d] / tensor.shape[d];
        fragment.lo.push_back(offsets[d] * rows);
        fragment.size.push_back(rows);
      }
      stored->shape = {stored->ElementCount()};
      if (!stored->contiguous) {
        return absl::UnimplementedError("a flattened shard that is strided");
      }
      fragment.stored = *std::move(stored);
      ASSIGN_OR_RETURN(MegatronDistTensor* const of,
                       TensorOf(key, model, model.layer_axis ? offsets[0] : 0,
                                model.expert_axis ? offsets[axes - 1] : 0, dtype, shape));
      of->fragments.push_back(std::move(fragment));
    }
    return absl::OkStatus();
  }

  absl::Status ReadBucket(DcpItems& items, const DcpTensor& tensor, const BucketKey& key) {
    if (tensor.shape.size() != 1) {
      return absl::DataLossError(absl::StrFormat("expected a bucket of one dimension, found [%s]",
                                                 absl::StrJoin(tensor.shape, ", ")));
    }
    MegatronBucket& bucket = dist_.buffers[key.buffer][key.bucket];
    if (!bucket.states.empty() && bucket.elements != tensor.shape[0]) {
      return absl::DataLossError(
          absl::StrFormat("expected %d elements, as other states of the bucket have, found %d",
                          bucket.elements, tensor.shape[0]));
    }
    bucket.elements = tensor.shape[0];
    RETURN_IF_ERROR(CheckBucketSize(key, bucket.elements));
    FlatParts& parts = bucket.states[key.state];
    for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
      const DcpChunk& chunk = metadata_.chunks[c];
      ASSIGN_OR_RETURN(const std::optional<StoredTensor> stored, ReadItem(items, tensor, chunk));
      if (!stored.has_value()) continue;
      if (!stored->contiguous) return absl::UnimplementedError("a bucket that is strided");
      parts.Add(metadata_.OffsetsOf(tensor, chunk)[0], *stored, 0, stored->ElementCount());
    }
    // Without a byte there is no dtype to tell, and no state.
    if (parts.empty()) bucket.states.erase(key.state);
    return absl::OkStatus();
  }

  absl::Status CheckBucketSize(const BucketKey& key, uint64_t elements) const {
    const auto recorded = bucket_sizes_.find(key.buffer);
    if (recorded == bucket_sizes_.end()) return absl::OkStatus();
    for (const std::vector<uint64_t>& sizes : recorded->second) {
      if (key.bucket < sizes.size() && sizes[key.bucket] == elements) return absl::OkStatus();
    }
    return absl::DataLossError(absl::StrFormat(
        "expected a size that per_bucket_numel_unpadded records of bucket %d, found %d", key.bucket,
        elements));
  }

  // ---------------------------------------------------------------- states of the index

  absl::Status AddTensor(const std::string& name, const std::string& state,
                         const MegatronDistTensor& tensor) {
    ASSIGN_OR_RETURN(const uint32_t number, table_.State(name, state, tensor.dtype, tensor.shape));
    for (const MegatronFragment& fragment : tensor.fragments) {
      ShardMap shard{.shape = tensor.shape, .shard_elements = 1, .blocks = {}};
      for (const uint64_t size : fragment.size) shard.shard_elements *= size;
      shard.blocks.push_back({.shard_begin = 0, .lo = fragment.lo, .size = fragment.size});
      const uint64_t count = fragment.stored.ElementCount();
      RETURN_IF_ERROR(
          count == shard.shard_elements && !fragment.stored.contiguous
              ? table_.AddShard(number, shard, fragment.stored)
              : table_.AddShardRange(number, shard, fragment.begin, fragment.stored, 0, count));
    }
    return absl::OkStatus();
  }

  // Steps are kept once for all parameters; each that has a state has one.
  absl::Status AddSteps() {
    for (const TensorState& state : table_.index().tensor_states) {
      if (state.state != RoleOf(state.tensor)) optimized_.insert(state.tensor);
    }
    for (const std::string& name : optimized_) {
      if (table_.Find(name, "step").has_value()) continue;
      const std::optional<StoredTensor>& step =
          IsMegatronExpert(name) && dist_.expert_step.has_value() ? dist_.expert_step : dist_.step;
      if (!step.has_value()) continue;
      ASSIGN_OR_RETURN(const uint32_t number, table_.State(name, "step", step->dtype, step->shape));
      RETURN_IF_ERROR(table_.AddWhole(number, *step));
    }
    return absl::OkStatus();
  }

  // With several stages the last one has a copy of a tied embedding, which is stored once.
  absl::Status AddTied() {
    const std::string embedding = "embedding.word_embeddings.weight";
    const std::string output = "output_layer.weight";
    if (!dist_.arguments.tied.value_or(false) || dist_.arguments.pipeline_ranks < 2 || dtensors_ ||
        table_.Find(output, "param").has_value() || !table_.Find(embedding, "param").has_value()) {
      return absl::OkStatus();
    }
    RETURN_IF_ERROR(AddTensor(output, "param", dist_.weights.at(embedding)));
    table_.AddAlias(*table_.Find(output, "param"), *table_.Find(embedding, "param"));
    for (const auto& [key, tensor] : dist_.states) {
      if (key.first != embedding || table_.Find(output, key.second).has_value()) continue;
      RETURN_IF_ERROR(AddTensor(output, key.second, tensor));
      table_.AddAlias(*table_.Find(output, key.second), *table_.Find(embedding, key.second));
    }
    if (dist_.step.has_value() && table_.Find(embedding, "step").has_value() &&
        !table_.Find(output, "step").has_value()) {
      ASSIGN_OR_RETURN(const uint32_t number,
                       table_.State(output, "step", dist_.step->dtype, dist_.step->shape));
      RETURN_IF_ERROR(table_.AddWhole(number, *dist_.step));
      table_.AddAlias(number, *table_.Find(embedding, "step"));
    }
    return absl::OkStatus();
  }

  void Describe() {
    const bool buckets = !dist_.buffers.empty();
    const bool gathered = buckets && !dist_.buffers.begin()->second.empty() &&
                          dist_.buffers.begin()->second.begin()->second.coalesced;
    table_.index().variant = dtensors_  ? "fsdp_dtensor"
                             : gathered ? "torch_dist, dp_zero_gather_scatter"
                             : buckets  ? "torch_dist, dp_reshardable"
                                        : "torch_dist";
    DescribeMegatron(files_, dist_.arguments, table_.index());
    table_.index().layout.push_back({"chunks", absl::StrCat(metadata_.chunks.size())});
  }

  const ForeignFolder& folder_;
  const MegatronFiles& files_;
  const ReadOptions& options_;
  const bool dtensors_;
  DcpMetadata metadata_;
  PieceTable table_;
  MegatronDist dist_;
  MegatronKeeper keeper_;
  std::map<std::string, Shape> weights_;  // shapes as stored, by key
  std::map<MegatronBufferKey, std::vector<std::vector<uint64_t>>> bucket_sizes_;
  std::set<std::string> objects_;
  std::set<std::string> optimized_;  // names of parameters that the optimizer has states of
  uint64_t tensors_ = 0;
};

}  // namespace

absl::StatusOr<ForeignIndex> ReadMegatronDist(const ForeignFolder& folder,
                                              const MegatronFiles& files,
                                              const ReadOptions& options) {
  return Reader(folder, files, options).Read();
}

}  // namespace holdfast::converter
