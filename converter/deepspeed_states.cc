#include "converter/deepspeed_states.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/byte_source.h"
#include "converter/torch_index.h"

namespace holdfast::converter {
namespace {

constexpr size_t kGroupsMax = size_t{1} << 16;
constexpr size_t kFactBytesMax = size_t{1} << 16;
constexpr size_t kParametersMax = size_t{1} << 21;

// Keys of a model file that are tensors or about them, and so no facts.
constexpr std::array<std::string_view, 8> kModelKeys = {
    "module",        "buffer_names",           "param_shapes", "frozen_param_shapes",
    "shared_params", "frozen_param_fragments", "optimizer",    "universal_checkpoint_info"};
constexpr std::array<std::string_view, 8> kOptimizerKeys = {
    "base_optimizer_state", "single_partition_of_fp32_groups",
    "param_slice_mappings", "fp32_flat_groups",
    "optimizer_state_dict", "universal_checkpoint_info",
    "group_paddings",       "param_alignment_paddings"};

absl::Status In(std::string_view where, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(std::string(where), ": ", status.message()));
}

// The bytes of a number, as torch.tensor(number) would have them.
template <typename T>
StoredTensor InlineNumber(Dtype dtype, T number) {
  StoredTensor tensor;
  tensor.dtype = dtype;
  tensor.file = kInline;
  tensor.inline_bytes.resize(sizeof(number));
  std::memcpy(tensor.inline_bytes.data(), &number, sizeof(number));
  return tensor;
}

absl::StatusOr<std::vector<std::string>> Strings(const TorchValue& value) {
  std::vector<std::string> strings;
  if (!value.present() || value.Is(TorchValue::Kind::kNone)) return strings;
  ASSIGN_OR_RETURN(const size_t count, value.ArraySize());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view text, value[i].String());
    strings.emplace_back(text);
  }
  return strings;
}

absl::StatusOr<std::optional<uint64_t>> OptionalNumber(const TorchValue& value) {
  if (!value.present() || value.Is(TorchValue::Kind::kNone)) return std::nullopt;
  ASSIGN_OR_RETURN(const uint64_t number, value.Uint64());
  return number;
}

// True where a dict has this key and the value is True; anything else is not.
bool IsTrue(const TorchValue& value) {
  if (!value.Is(TorchValue::Kind::kBool)) return false;
  return value.Bool().value_or(false);
}

absl::StatusOr<std::vector<NamedShape>> Shapes(const TorchValue& value) {
  std::vector<NamedShape> shapes;
  if (!value.present() || value.Is(TorchValue::Kind::kNone)) return shapes;
  ASSIGN_OR_RETURN(const size_t count, value.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view name, value.Key(i).String());
    ASSIGN_OR_RETURN(Shape shape, value.Entry(i).Uint64s());
    RETURN_IF_ERROR(ElementCount(shape, std::string(name)).status());
    shapes.push_back({.name = std::string(name), .shape = std::move(shape)});
  }
  return shapes;
}

// Tensors of a state_dict; other values in it are named in a note.
absl::StatusOr<std::vector<NamedTensor>> Tensors(const TorchFile& torch, uint32_t file,
                                                 const TorchValue& dict, PieceTable& table) {
  std::vector<NamedTensor> tensors;
  if (!dict.present() || dict.Is(TorchValue::Kind::kNone)) return tensors;
  ASSIGN_OR_RETURN(const size_t count, dict.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    if (!dict.Key(i).Is(TorchValue::Kind::kString)) continue;
    ASSIGN_OR_RETURN(const std::string_view name, dict.Key(i).String());
    if (!dict.Entry(i).Is(TorchValue::Kind::kTensor)) {
      table.index().notes.push_back(absl::StrFormat("%s: \"%s\" is no tensor but %s", torch.name(),
                                                    std::string(name), dict.Entry(i).Describe()));
      continue;
    }
    ASSIGN_OR_RETURN(const TorchTensor* tensor, dict.Entry(i).Tensor());
    absl::StatusOr<StoredTensor> stored = Locate(torch, file, *tensor);
    if (stored.ok()) {
      tensors.push_back({.name = std::string(name), .tensor = *std::move(stored)});
    } else {
      table.index().unreadable.push_back(
          {std::string(name), std::string(stored.status().message())});
    }
  }
  return tensors;
}

// Everything of a dict that is not in `left_out`, as facts.
absl::Status AddFacts(const TorchValue& dict, std::span<const std::string_view> left_out,
                      PieceTable& table) {
  ASSIGN_OR_RETURN(const size_t count, dict.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    if (!dict.Key(i).Is(TorchValue::Kind::kString)) continue;
    ASSIGN_OR_RETURN(const std::string_view name, dict.Key(i).String());
    if (std::find(left_out.begin(), left_out.end(), name) != left_out.end()) continue;
    table.index().scalars.push_back({std::string(name), TorchJson(dict.Entry(i), kFactBytesMax)});
  }
  return absl::OkStatus();
}

void ReadConfiguration(const TorchValue& config, ModelStates& states) {
  if (!config.Is(TorchValue::Kind::kDict)) return;
  const auto enabled = [&config](std::string_view section) {
    return IsTrue(config.Find(section).Find("enabled"));
  };
  states.weight_dtype = enabled("bf16") || enabled("bfloat16") ? "bfloat16"
                        : enabled("fp16")                      ? "float16"
                                                               : "float32";
  const TorchValue zero = config.Find("zero_optimization");
  if (zero.Is(TorchValue::Kind::kDict)) {
    states.round_robin = IsTrue(zero.Find("round_robin_gradients"));
  }
  states.data_before_expert_parallel = IsTrue(config.Find("use_data_before_expert_parallelism"));
}

// State dicts of a torch optimizer: {'state': {id: {...}}, 'param_groups': [{'params': [id]}]}.
class BaseOptimizer {
 public:
  static absl::StatusOr<BaseOptimizer> Read(const TorchValue& dict) {
    BaseOptimizer optimizer;
    const TorchValue state = dict.Find("state");
    if (state.present()) {
      ASSIGN_OR_RETURN(const size_t count, state.EntryCount());
      for (size_t i = 0; i < count; ++i) {
        ASSIGN_OR_RETURN(const int64_t id, state.Key(i).Int64());
        optimizer.states_[id] = state.Entry(i);
      }
    }
    optimizer.groups_ = dict.Find("param_groups");
    if (optimizer.groups_.present()) {
      ASSIGN_OR_RETURN(optimizer.group_count_, optimizer.groups_.ArraySize());
      for (size_t g = 0; g < optimizer.group_count_; ++g) {
        ASSIGN_OR_RETURN(const TorchValue params, optimizer.groups_[g].Get("params"));
        ASSIGN_OR_RETURN(const size_t count, params.ArraySize());
        for (size_t i = 0; i < count; ++i) {
          ASSIGN_OR_RETURN(const int64_t id, params[i].Int64());
          optimizer.ids_.push_back(id);
        }
      }
    }
    return optimizer;
  }

  // The state of the flat buffer number `index`, in the order of the groups; absent if none.
  TorchValue StateOf(size_t index) const {
    const int64_t id = index < ids_.size() ? ids_[index] : static_cast<int64_t>(index);
    const auto found = states_.find(id);
    return found == states_.end() ? TorchValue() : found->second;
  }
  TorchValue Group(size_t index) const {
    return index < group_count_ ? groups_[index] : TorchValue();
  }
  TorchValue groups() const { return groups_; }
  size_t buffer_count() const { return ids_.size(); }

 private:
  std::map<int64_t, TorchValue> states_;
  TorchValue groups_;
  size_t group_count_ = 0;
  std::vector<int64_t> ids_;
};

absl::Status AddStates(const TorchFile& torch, uint32_t file, const TorchValue& dict,
                       OptimizerStates::Group& group, PieceTable& table) {
  if (!dict.present() || dict.Is(TorchValue::Kind::kNone)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const size_t count, dict.EntryCount());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view key, dict.Key(i).String());
    ASSIGN_OR_RETURN(std::optional<StoredTensor> tensor, StateTensor(torch, file, dict.Entry(i)));
    if (tensor.has_value()) {
      group.states.push_back({.key = std::string(key), .tensor = *std::move(tensor)});
    } else if (!dict.Entry(i).Is(TorchValue::Kind::kNone)) {
      table.index().notes.push_back(absl::StrFormat("%s: optimizer state \"%s\" is %s",
                                                    torch.name(), std::string(key),
                                                    dict.Entry(i).Describe()));
    }
  }
  return absl::OkStatus();
}

// Tensors of a list: the fp32 partitions.
absl::Status AddPartitions(const TorchFile& torch, uint32_t file, const TorchValue& list,
                           OptimizerStates& states) {
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count > kGroupsMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("expected at most %d flat groups, found %d", kGroupsMax, count));
  }
  states.groups.resize(count);
  for (size_t g = 0; g < count; ++g) {
    ASSIGN_OR_RETURN(const TorchTensor* tensor, list[g].Tensor());
    ASSIGN_OR_RETURN(states.groups[g].fp32, Locate(torch, file, *tensor));
  }
  return absl::OkStatus();
}

absl::Status ReadPackedGroups(const TorchFile& torch, uint32_t file, const TorchValue& dict,
                              ShowFacts facts, OptimizerStates& states, PieceTable& table) {
  ASSIGN_OR_RETURN(const TorchValue partitions, dict.Get("single_partition_of_fp32_groups"));
  RETURN_IF_ERROR(AddPartitions(torch, file, partitions, states));
  const TorchValue base = dict.Find("base_optimizer_state");
  if (base.Is(TorchValue::Kind::kList)) {  // elastic: a list of states, without param_groups
    ASSIGN_OR_RETURN(const size_t count, base.ArraySize());
    for (size_t g = 0; g < std::min(count, states.groups.size()); ++g) {
      RETURN_IF_ERROR(AddStates(torch, file, base[g], states.groups[g], table));
    }
  } else if (base.Is(TorchValue::Kind::kDict)) {
    ASSIGN_OR_RETURN(const BaseOptimizer optimizer, BaseOptimizer::Read(base));
    for (size_t g = 0; g < states.groups.size(); ++g) {
      RETURN_IF_ERROR(AddStates(torch, file, optimizer.StateOf(g), states.groups[g], table));
      const TorchValue of = optimizer.Group(g);
      if (!of.present()) continue;
      states.groups[g].expert = IsTrue(of.Find("moe"));
      states.groups[g].muon = IsTrue(of.Find("use_muon"));
    }
    if (facts == ShowFacts::kYes && optimizer.groups().present()) {
      table.index().scalars.push_back(
          {"param_groups", TorchJson(optimizer.groups(), kFactBytesMax)});
    }
  }
  const TorchValue paddings = dict.Find("group_paddings");
  const TorchValue alignment = dict.Find("param_alignment_paddings");
  const TorchValue counts = dict.Find("partition_count");
  const TorchValue mappings = dict.Find("param_slice_mappings");
  const auto of_group = [](const TorchValue& list, size_t g) {
    if (!list.Is(TorchValue::Kind::kList) && !list.Is(TorchValue::Kind::kTuple)) {
      return TorchValue();
    }
    return g < list.ArraySize().value_or(0) ? list[g] : TorchValue();
  };
  for (size_t g = 0; g < states.groups.size(); ++g) {
    OptimizerStates::Group& group = states.groups[g];
    ASSIGN_OR_RETURN(const std::optional<uint64_t> padding, OptionalNumber(of_group(paddings, g)));
    group.padding = padding.value_or(0);
    if (const TorchValue list = of_group(alignment, g); list.present()) {
      ASSIGN_OR_RETURN(group.alignment_paddings, list.Uint64s());
    }
    ASSIGN_OR_RETURN(
        group.partition_count,
        OptionalNumber(counts.Is(TorchValue::Kind::kInteger) ? counts : of_group(counts, g)));
    if (const TorchValue names = of_group(mappings, g); names.present()) {
      group.has_mappings = true;
      ASSIGN_OR_RETURN(const size_t count, names.EntryCount());
      for (size_t i = 0; i < count; ++i) {
        ASSIGN_OR_RETURN(const std::string_view name, names.Key(i).String());
        group.mapped.emplace_back(name);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ReadFlatGroups(const TorchFile& torch, uint32_t file, const TorchValue& dict,
                            ShowFacts facts, OptimizerStates& states, PieceTable& table) {
  ASSIGN_OR_RETURN(const TorchValue flat, dict.Get("fp32_flat_groups"));
  RETURN_IF_ERROR(AddPartitions(torch, file, flat, states));
  ASSIGN_OR_RETURN(states.partition_count, OptionalNumber(dict.Find("partition_count")));
  const TorchValue partition_groups = dict.Find("ds_zero_partition_groups");
  states.partition_groups =
      partition_groups.Is(TorchValue::Kind::kList) && partition_groups.ArraySize().value_or(0) > 0;
  const TorchValue inner = dict.Find("optimizer_state_dict");
  if (!inner.present() || inner.Is(TorchValue::Kind::kNone)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const BaseOptimizer optimizer, BaseOptimizer::Read(inner));
  for (size_t g = 0; g < states.groups.size(); ++g) {
    RETURN_IF_ERROR(AddStates(torch, file, optimizer.StateOf(g), states.groups[g], table));
  }
  if (facts == ShowFacts::kYes && optimizer.groups().present()) {
    table.index().scalars.push_back({"param_groups", TorchJson(optimizer.groups(), kFactBytesMax)});
  }
  return absl::OkStatus();
}

absl::StatusOr<OptimizerStates> ReadOptimizer(const TorchFile& torch, uint32_t file,
                                              const TorchValue& dict, ShowFacts facts,
                                              PieceTable& table) {
  OptimizerStates states;
  TorchValue stage = dict.Find("zero_stage");
  if (stage.Is(TorchValue::Kind::kOpaque)) stage = stage.EnumMember();
  if (stage.Is(TorchValue::Kind::kInteger)) {
    ASSIGN_OR_RETURN(states.stage, stage.Uint64());
  } else if (stage.Is(TorchValue::Kind::kString)) {  // the member's name: ZeroStageEnum.weights
    ASSIGN_OR_RETURN(const std::string_view name, stage.String());
    states.stage = name == "weights" ? 3 : name == "gradients" ? 2 : 1;
  } else if (dict.Find("fp32_flat_groups").present()) {
    states.stage = 3;
  }
  if (states.stage == 3) {
    RETURN_IF_ERROR(ReadFlatGroups(torch, file, dict, facts, states, table));
  } else {
    RETURN_IF_ERROR(ReadPackedGroups(torch, file, dict, facts, states, table));
  }
  if (const TorchValue info = dict.Find("universal_checkpoint_info");
      info.Is(TorchValue::Kind::kDict)) {
    ASSIGN_OR_RETURN(states.parallel, ReadParallelInfo(info));
  }
  if (facts == ShowFacts::kYes) RETURN_IF_ERROR(AddFacts(dict, kOptimizerKeys, table));
  return states;
}

absl::StatusOr<ModelStates> ReadModel(const TorchFile& torch, uint32_t file, ShowFacts facts,
                                      PieceTable& table) {
  ModelStates states;
  const TorchValue root = torch.root();
  const TorchValue module = root.Find("module");
  states.has_module = module.Is(TorchValue::Kind::kDict);
  states.has_optimizer = root.Find("optimizer").Is(TorchValue::Kind::kDict);
  if (states.has_module) {
    ASSIGN_OR_RETURN(states.module, Tensors(torch, file, module, table));
  }
  ASSIGN_OR_RETURN(states.buffer_names, Strings(root.Find("buffer_names")));
  const TorchValue shapes = root.Find("param_shapes");
  if (shapes.Is(TorchValue::Kind::kDict)) {  // one group, in old versions
    ASSIGN_OR_RETURN(std::vector<NamedShape> group, Shapes(shapes));
    states.param_shapes.push_back(std::move(group));
  } else if (shapes.present() && !shapes.Is(TorchValue::Kind::kNone)) {
    ASSIGN_OR_RETURN(const size_t count, shapes.ArraySize());
    size_t parameters = 0;
    for (size_t g = 0; g < count; ++g) {
      ASSIGN_OR_RETURN(std::vector<NamedShape> group, Shapes(shapes[g]));
      parameters += group.size();
      if (parameters > kParametersMax) {
        return absl::ResourceExhaustedError(absl::StrFormat(
            "param_shapes: expected at most %d parameters, found more", kParametersMax));
      }
      states.param_shapes.push_back(std::move(group));
    }
  }
  ASSIGN_OR_RETURN(states.frozen_shapes, Shapes(root.Find("frozen_param_shapes")));
  ASSIGN_OR_RETURN(states.frozen_fragments,
                   Tensors(torch, file, root.Find("frozen_param_fragments"), table));
  if (const TorchValue shared = root.Find("shared_params"); shared.Is(TorchValue::Kind::kDict)) {
    ASSIGN_OR_RETURN(const size_t count, shared.EntryCount());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view alias, shared.Key(i).String());
      ASSIGN_OR_RETURN(const std::string_view owner, shared.Entry(i).String());
      states.shared.emplace_back(alias, owner);
    }
  }
  ASSIGN_OR_RETURN(const std::optional<uint64_t> dp, OptionalNumber(root.Find("dp_world_size")));
  ASSIGN_OR_RETURN(const std::optional<uint64_t> mp, OptionalNumber(root.Find("mp_world_size")));
  states.dp_world_size = dp.value_or(0);
  states.mp_world_size = mp.value_or(0);
  if (const TorchValue degrees = root.Find("checkpoint_parallel_dimensions");
      degrees.Is(TorchValue::Kind::kDict)) {
    ASSIGN_OR_RETURN(const std::optional<uint64_t> pp, OptionalNumber(degrees.Find("pp_degree")));
    ASSIGN_OR_RETURN(const std::optional<uint64_t> tp, OptionalNumber(degrees.Find("tp_degree")));
    if (pp.has_value() && tp.has_value()) states.parallel_degrees = std::pair(*pp, *tp);
  }
  ASSIGN_OR_RETURN(states.global_steps, OptionalNumber(root.Find("global_steps")));
  // Old ones have one number there, and anything may be of client_state.
  if (const TorchValue experts = root.Find("num_experts"); experts.Is(TorchValue::Kind::kList)) {
    states.expert_counts = experts.Uint64s().value_or(std::vector<uint64_t>());
  }
  ReadConfiguration(root.Find("ds_config"), states);
  if (const TorchValue info = root.Find("universal_checkpoint_info");
      info.Is(TorchValue::Kind::kDict)) {
    ASSIGN_OR_RETURN(states.parallel, ReadParallelInfo(info));
  }
  if (facts == ShowFacts::kYes) RETURN_IF_ERROR(AddFacts(root, kModelKeys, table));
  return states;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TorchFile>> OpenTorch(const ForeignFolder& folder, uint32_t file,
                                                     PieceTable& table) {
  const FolderSource source(folder, file);
  ASSIGN_OR_RETURN(std::unique_ptr<TorchFile> torch, TorchFile::Open(source));
  AddTorchDescription(*torch, table.index());
  return torch;
}

absl::StatusOr<StoredTensor> Locate(const TorchFile& torch, uint32_t file,
                                    const TorchTensor& tensor) {
  const TorchStorage& storage = torch.storages()[tensor.storage];
  StoredTensor stored{.dtype = tensor.dtype,
                      .shape = tensor.shape,
                      .contiguous = tensor.IsContiguous(),
                      .strides = tensor.strides,
                      .file = file,
                      .offset_bytes = storage.offset + tensor.offset * ElementBytes(tensor.dtype),
                      .inline_bytes = {},
                      .byte_order = torch.big_endian() ? ByteOrder::kBig : ByteOrder::kLittle,
                      .negate = tensor.neg,
                      .conjugate = tensor.conj,
                      .storage_offset_bytes = storage.offset,
                      .storage_bytes = storage.bytes};
  if (tensor.ElementCount() > 0 && (storage.bytes == 0 || !storage.written)) {
    return absl::UnimplementedError(
        absl::StrFormat("a tensor whose bytes are not in the file (device %s)", storage.location));
  }
  return stored;
}

absl::StatusOr<std::optional<StoredTensor>> StateTensor(const TorchFile& torch, uint32_t file,
                                                        const TorchValue& value) {
  if (!value.present()) return std::nullopt;
  switch (value.kind()) {
    case TorchValue::Kind::kTensor: {
      ASSIGN_OR_RETURN(const TorchTensor* tensor, value.Tensor());
      ASSIGN_OR_RETURN(StoredTensor stored, Locate(torch, file, *tensor));
      return stored;
    }
    case TorchValue::Kind::kBool: {
      ASSIGN_OR_RETURN(const bool number, value.Bool());
      return InlineNumber(Dtype::kBool, static_cast<uint8_t>(number));
    }
    case TorchValue::Kind::kInteger: {
      ASSIGN_OR_RETURN(const int64_t number, value.Int64());
      return InlineNumber(Dtype::kInt64, number);
    }
    case TorchValue::Kind::kFloat: {
      ASSIGN_OR_RETURN(const double number, value.Double());
      return InlineNumber(Dtype::kFloat32, static_cast<float>(number));
    }
    default:
      return std::nullopt;
  }
}

absl::StatusOr<ModelStates> ReadModelStates(const ForeignFolder& folder, uint32_t file,
                                            ShowFacts facts, PieceTable& table) {
  ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch, OpenTorch(folder, file, table));
  absl::StatusOr<ModelStates> states = ReadModel(*torch, file, facts, table);
  if (!states.ok()) return In(torch->name(), states.status());
  return states;
}

absl::StatusOr<std::vector<NamedTensor>> ReadStateDict(const ForeignFolder& folder, uint32_t file,
                                                       PieceTable& table) {
  ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch, OpenTorch(folder, file, table));
  absl::StatusOr<std::vector<NamedTensor>> tensors = Tensors(*torch, file, torch->root(), table);
  if (!tensors.ok()) return In(torch->name(), tensors.status());
  return tensors;
}

absl::StatusOr<OptimizerStates> ReadOptimizerStates(const ForeignFolder& folder, uint32_t file,
                                                    ShowFacts facts, PieceTable& table) {
  ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch, OpenTorch(folder, file, table));
  const TorchValue dict = torch->root().Find("optimizer_state_dict");
  if (!dict.Is(TorchValue::Kind::kDict)) {
    return absl::DataLossError(
        absl::StrCat(torch->name(), ": expected a dict with optimizer_state_dict"));
  }
  absl::StatusOr<OptimizerStates> states = ReadOptimizer(*torch, file, dict, facts, table);
  if (!states.ok()) return In(torch->name(), states.status());
  return states;
}

absl::StatusOr<UniversalOptimizer> ReadUniversalOptimizer(const ForeignFolder& folder,
                                                          uint32_t file, PieceTable& table) {
  ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch, OpenTorch(folder, file, table));
  const TorchValue dict = torch->root();
  const auto read = [&]() -> absl::StatusOr<UniversalOptimizer> {
    UniversalOptimizer optimizer;
    if (!dict.Is(TorchValue::Kind::kDict)) return dict.Mismatch("a dict");
    if (dict.Find("fp32_flat_groups").present()) {
      ASSIGN_OR_RETURN(OptimizerStates states,
                       ReadOptimizer(*torch, file, dict, ShowFacts::kYes, table));
      optimizer.groups = std::move(states.groups);
      optimizer.partition_count = states.partition_count;
      return optimizer;
    }
    if (const TorchValue counts = dict.Find("partition_count");
        counts.Is(TorchValue::Kind::kList)) {
      ASSIGN_OR_RETURN(optimizer.group_partition_counts, counts.Uint64s());
    }
    if (const TorchValue paddings = dict.Find("param_alignment_paddings");
        paddings.Is(TorchValue::Kind::kList)) {
      ASSIGN_OR_RETURN(const size_t count, paddings.ArraySize());
      for (size_t g = 0; g < count; ++g) {
        ASSIGN_OR_RETURN(std::vector<uint64_t> of_group, paddings[g].Uint64s());
        optimizer.group_alignment_paddings.push_back(std::move(of_group));
      }
    }
    RETURN_IF_ERROR(AddFacts(dict, kOptimizerKeys, table));
    return optimizer;
  };
  absl::StatusOr<UniversalOptimizer> optimizer = read();
  if (!optimizer.ok()) return In(torch->name(), optimizer.status());
  return optimizer;
}

}  // namespace holdfast::converter
