#include "converter/fsdp_reader.h"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/byte_source.h"
#include "converter/decimal.h"
#include "converter/flat_parameters.h"
#include "converter/fsdp_files.h"
#include "converter/names_file.h"
#include "converter/shard_pieces.h"
#include "converter/sharded_value.h"
#include "converter/state_names.h"
#include "converter/torch_file.h"
#include "converter/torch_index.h"
#include "converter/torch_leaves.h"

namespace holdfast::converter {
namespace {

using Content = FsdpGroup::Content;
using Path = std::vector<std::string>;

constexpr std::string_view kFlatParameter = "_flat_param";
// Of what is shown of a value that is no tensor.
constexpr size_t kShownBytesMax = size_t{64} << 10;
constexpr size_t kNamesBytesMax = size_t{16} << 20;
constexpr size_t kLayoutsMax = 64;  // that are shown

// The names of an optimizer group's parameters are needed whole: conversions go by them.
size_t ShownBytesMax(std::string_view key) {
  return key.ends_with(".params") ? kNamesBytesMax : kShownBytesMax;
}

// What all ranks' values under one key are together.
struct Tensor {
  Content content = Content::kModel;
  StateKey key = {};
  ShardedValue::Kind kind = ShardedValue::Kind::kPlain;
  Dtype dtype = Dtype::kFloat32;
  std::vector<uint64_t> shape = {};
  bool shapes_differ = false;  // plain ones, of which each rank has its own
  StateName name = {};
  std::optional<uint32_t> number = {};  // of its state in the index
};

// The first part of every key, so that the keys of different groups differ, and what they are can
// be seen (converter/state_names.h).
std::string_view RootOf(Content content) {
  return content == Content::kModel ? "model" : content == Content::kOptimizer ? "optim" : "rank";
}

class Reader {
 public:
  Reader(const ForeignFolder& folder, const NamesFile& names)
      : folder_(folder), names_(names), flat_(names, index_) {}

  absl::StatusOr<ForeignIndex> Read() {
    ASSIGN_OR_RETURN(groups_, FindFsdpGroups(folder_));
    RETURN_IF_ERROR(
        ForEachFile([this](const FsdpGroup& group, const FsdpFile& file, const TorchFile& torch) {
          return Meet(group, file, torch);
        }));
    FindOutWhatIsFlat();
    RETURN_IF_ERROR(Name());
    RETURN_IF_ERROR(
        ForEachFile([this](const FsdpGroup& group, const FsdpFile& file, const TorchFile& torch) {
          return Add(group, file, torch);
        }));
    Describe();
    KeepOtherFiles();
    return std::move(index_);
  }

 private:
  template <typename Function>
  absl::Status ForEachFile(Function function) {
    for (const FsdpGroup& group : groups_) {
      for (const FsdpFile& file : group.files) {
        const FolderSource source(folder_, file.file);
        ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch, TorchFile::Open(source));
        RETURN_IF_ERROR(function(group, file, *torch));
      }
    }
    return absl::OkStatus();
  }

  template <typename Function>
  absl::Status ForEachTensor(const FsdpGroup& group, const FsdpFile& file, const TorchFile& torch,
                             Function function) {
    const auto visit = [&](const Path& path, TorchValue leaf) -> absl::Status {
      absl::StatusOr<std::optional<ShardedValue>> value = ReadShardedValue(leaf);
      if (!value.ok()) {
        return absl::Status(value.status().code(),
                            absl::StrFormat("%s: %s: %s", torch.name(), absl::StrJoin(path, "."),
                                            value.status().message()));
      }
      return function(KeyOf(group, file, path), *value, leaf);
    };
    return VisitTorchLeaves(torch.root(), visit);
  }

  // Each rank's own values have the rank at the end of their keys.
  static StateKey KeyOf(const FsdpGroup& group, const FsdpFile& file, const Path& path) {
    StateKey key;
    key.path.emplace_back(RootOf(group.content));
    key.path.insert(key.path.end(), path.begin(), path.end());
    if (group.content == Content::kRankLocal) key.path.push_back(absl::StrCat("rank_", file.rank));
    key.key = absl::StrJoin(key.path, ".");
    return key;
  }

  // First pass: which keys there are, and of what kind.
  absl::Status Meet(const FsdpGroup& group, const FsdpFile& file, const TorchFile& torch) {
    AddTorchDescription(torch, index_);
    std::set<uint32_t> flat_storages;
    std::vector<std::pair<size_t, uint32_t>> plain;  // number in tensors_, storage
    RETURN_IF_ERROR(ForEachTensor(
        group, file, torch,
        [&](StateKey key, const std::optional<ShardedValue>& value, TorchValue leaf) {
          if (value.has_value()) {
            const bool is_flat = key.path.back().ends_with(kFlatParameter);
            ASSIGN_OR_RETURN(const size_t number, MeetTensor(group, torch, std::move(key), *value));
            for (const ShardedPart& part : value->parts) {
              if (is_flat) flat_storages.insert(part.local->storage);
              if (value->kind == ShardedValue::Kind::kPlain) {
                plain.emplace_back(number, part.local->storage);
              }
            }
            return absl::OkStatus();
          }
          if (file.rank == 0 || group.content == Content::kRankLocal) {
            index_.scalars.push_back(
                {Shown(key.key), TorchJson(leaf, ShownBytesMax(Shown(key.key)))});
          }
          if (group.content == Content::kOptimizer) CountParameters(key, leaf);
          if (file.rank == 0) others_.push_back(std::move(key));
          return absl::OkStatus();
        }));
    // Of use_orig_params=True: the parameters' slices beside the flat parameter that they lie in.
    for (const auto& [number, storage] : plain) {
      if (flat_storages.contains(storage)) tensors_[number].shapes_differ = true;
    }
    return absl::OkStatus();
  }

  // Numbers of the optimizer's parameters: those that it has, with states or without.
  void CountParameters(const StateKey& key, TorchValue leaf) {
    const Path& path = key.path;  // optim, param_groups, <group>, params
    if (path.size() != 4 || path[1] != "param_groups" || path[3] != "params") return;
    const size_t count = leaf.ArraySize().value_or(0);
    for (size_t i = 0; i < count; ++i) {
      const absl::StatusOr<uint64_t> number = leaf[i].Uint64();
      if (number.ok() && *number < kTorchLeavesMax) {
        parameter_count_ = std::max(parameter_count_, *number + 1);
      }
    }
  }

  // The number in tensors_.
  absl::StatusOr<size_t> MeetTensor(const FsdpGroup& group, const TorchFile& torch, StateKey key,
                                    const ShardedValue& value) {
    if (value.kind != ShardedValue::Kind::kPlain) {
      (group.content == Content::kOptimizer ? optimizer_wraps_ : model_wraps_) = true;
      if (!value.layout.empty() && layouts_.size() < kLayoutsMax) layouts_.insert(value.layout);
    }
    const auto [known, added] = number_of_.try_emplace(key.key, tensors_.size());
    if (added) {
      tensors_.push_back({.content = group.content,
                          .key = std::move(key),
                          .kind = value.kind,
                          .dtype = value.dtype,
                          .shape = value.shape});
      return known->second;
    }
    Tensor& first = tensors_[known->second];
    if (first.kind == value.kind && first.dtype == value.dtype && first.shape == value.shape) {
      return known->second;
    }
    if (first.kind == ShardedValue::Kind::kPlain && value.kind == first.kind &&
        first.dtype == value.dtype) {
      first.shapes_differ = true;
      return known->second;
    }
    return absl::DataLossError(absl::StrFormat(
        "%s: %s: expected dtype %s and shape [%s], as another rank has, found %s and [%s]",
        torch.name(), Shown(first.key.key), DtypeName(first.dtype),
        absl::StrJoin(first.shape, ", "), DtypeName(value.dtype),
        absl::StrJoin(value.shape, ", ")));
  }

  // The optimizer of a sharded model that wraps nothing has states of flat parameters: of use_orig_
  // params=False one per unit, of True one per parameter, of which each rank has its slice.
  void FindOutWhatIsFlat() {
    flat_optimizer_ = model_wraps_ && !optimizer_wraps_ && WorldSize() > 1;
    original_parameters_ = parameter_count_ != names_.units.size();
    if (flat_.empty()) return;
    if (!names_.parameters.empty()) {
      parameters_ = names_.parameters;
      return;
    }
    // Optimizers number the model's parameters in its own order, and so does its dictionary.
    for (const Tensor& tensor : tensors_) {
      if (tensor.content != Content::kModel) continue;
      const std::string name = std::string(Shown(tensor.key.key));
      if (flat_.FindPiece(name).second != nullptr) parameters_.push_back(name);
    }
  }

  bool IsFlatParameter(const Tensor& tensor) const {
    return tensor.content == Content::kModel && tensor.key.path.back().ends_with(kFlatParameter);
  }

  bool IsFlatSlice(const Tensor& tensor) const {
    return flat_optimizer_ && tensor.name.parameter_number.has_value();
  }

  // A slice of a parameter beside the flat parameter that has all of it.
  bool IsSliceOfParameter(const Tensor& tensor) const {
    return tensor.content == Content::kModel && tensor.kind == ShardedValue::Kind::kPlain &&
           has_flat_ && flat_.FindPiece(Shown(tensor.key.key)).second != nullptr;
  }

  absl::Status Name() {
    std::vector<StateKey> keys;
    for (const Tensor& tensor : tensors_) {
      keys.push_back(tensor.key);
      has_flat_ = has_flat_ || IsFlatParameter(tensor);
    }
    std::vector<StateName> names = NameStates(keys, others_);
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Tensor& tensor = tensors_[i];
      tensor.name = std::move(names[i]);
      if (tensor.name.name == tensor.key.key || tensor.name.parameter_number.has_value()) {
        tensor.name.name = Shown(tensor.name.name);
      }
      if (tensor.content == Content::kRankLocal) tensor.name.state = "other";
      if (!flat_.empty() &&
          (IsFlatParameter(tensor) || IsFlatSlice(tensor) || IsSliceOfParameter(tensor))) {
        continue;  // FlatParameters adds its states
      }
      if (tensor.name.parameter_number.has_value()) RETURN_IF_ERROR(NameNumbered(tensor));
      if (tensor.shapes_differ || IsFlatSlice(tensor)) {
        if (!tensor.shape.empty() || tensor.shapes_differ) continue;  // per rank: AddRankLocal
      }
      ASSIGN_OR_RETURN(tensor.number, AddState(tensor.name, tensor));
    }
    if (flat_optimizer_ && flat_.empty()) {
      index_.notes.push_back(
          "the optimizer has slices of flat parameters, whose names and shapes are not in the "
          "files: --names FILE has them (units)");
    }
    return absl::OkStatus();
  }

  absl::Status NameNumbered(Tensor& tensor) {
    const uint64_t number = *tensor.name.parameter_number;
    if (names_.parameters.empty()) {
      if (!noted_numbers_) {
        index_.notes.push_back(
            "the optimizer numbers its parameters and the files do not name them: --names FILE "
            "has them (parameters)");
      }
      noted_numbers_ = true;
      return absl::OkStatus();
    }
    if (number >= names_.parameters.size()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("--names: expected a name of the optimizer's parameter %d, found %d "
                          "names",
                          number, names_.parameters.size()));
    }
    tensor.name.name = names_.parameters[number];
    return absl::OkStatus();
  }

  absl::StatusOr<uint32_t> AddState(const StateName& name, const Tensor& tensor) {
    TensorState state{name.name, name.state, tensor.dtype, tensor.shape};
    RETURN_IF_ERROR(CheckShape(tensor.key.key, state));
    return index_.AddState(std::move(state));
  }

  // Second pass: where the bytes are.
  absl::Status Add(const FsdpGroup& group, const FsdpFile& file, const TorchFile& torch) {
    if (group.content == Content::kRankLocal) {
      const FolderFile& info = folder_.files()[file.file];
      index_.blobs.push_back({info.path, index_.AddRaw(file.file, 0, info.bytes)});
    }
    return ForEachTensor(
        group, file, torch,
        [&](const StateKey& key, const std::optional<ShardedValue>& value, TorchValue) {
          if (!value.has_value()) return absl::OkStatus();
          return AddTensor(tensors_[number_of_.at(key.key)], *value, file, torch);
        });
  }

  absl::Status AddTensor(const Tensor& tensor, const ShardedValue& value, const FsdpFile& file,
                         const TorchFile& torch) {
    const TorchPlace place{.file = file.file};
    if (tensor.number.has_value()) {
      for (const ShardedPart& part : value.parts) {
        RETURN_IF_ERROR(AddShard(torch, *part.local, place, part.runs, *tensor.number, index_));
      }
      return absl::OkStatus();
    }
    if (!flat_.empty()) {
      if (IsFlatParameter(tensor)) return AddFlatParameter(tensor, value, torch, place);
      if (IsFlatSlice(tensor)) return AddFlatState(tensor, value, file, torch, place);
      if (IsSliceOfParameter(tensor)) return absl::OkStatus();
    }
    // What only this rank has, and nothing says of which whole it is a part.
    StateName name = tensor.name;
    absl::StrAppend(&name.name, ".rank_", file.rank);
    Tensor own = tensor;
    own.shape = value.shape;
    ASSIGN_OR_RETURN(const uint32_t number, AddState(name, own));
    return AddWholeShard(torch, *value.parts[0].local, place, number, index_);
  }

  absl::Status AddFlatParameter(const Tensor& tensor, const ShardedValue& value,
                                const TorchFile& torch, const TorchPlace& place) {
    const FlatUnit* const unit = flat_.Find(Shown(tensor.key.key));
    if (unit == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrFormat("--names: expected a unit whose flat parameter is %s, found none",
                          Shown(tensor.key.key)));
    }
    if (value.shape.size() != 1 || value.shape[0] < unit->end) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "--names: expected pieces of %s within its elements [%s], found the last one to end at "
          "%d",
          Shown(tensor.key.key), absl::StrJoin(value.shape, ", "), unit->end));
    }
    for (const ShardedPart& part : value.parts) {
      if (part.runs[0].empty()) continue;
      if (part.runs[0].size() != 1 || part.local->shape != std::vector{part.runs[0][0].size}) {
        return absl::DataLossError(
            absl::StrFormat("%s: %s: expected a shard of one run", torch.name(), tensor.key.key));
      }
      RETURN_IF_ERROR(flat_.AddSlice(*unit, tensor.name.state, part.runs[0][0].begin, torch,
                                     *part.local, place));
    }
    return absl::OkStatus();
  }

  // A state of a flat parameter (use_orig_params=False), or of a parameter's slice (True).
  absl::Status AddFlatState(const Tensor& tensor, const ShardedValue& value, const FsdpFile& file,
                            const TorchFile& torch, const TorchPlace& place) {
    const uint64_t number = *tensor.name.parameter_number;
    const FlatUnit* unit = nullptr;
    const FlatPiece* piece = nullptr;
    if (!original_parameters_) {
      unit = number < flat_.units().size() ? &flat_.units()[number] : nullptr;
    } else if (number < parameters_.size()) {
      std::tie(unit, piece) = flat_.FindPiece(parameters_[number]);
    }
    if (unit == nullptr) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "--names: expected units that name parameter %d of the optimizer, found %d units and %d "
          "parameters",
          number, flat_.units().size(), parameters_.size()));
    }
    const TorchTensor& local = *value.parts[0].local;
    const std::string& state = tensor.name.state;
    if (local.shape.empty()) {
      return piece == nullptr ? flat_.AddShared(*unit, state, torch, local, place)
                              : flat_.AddShared(*piece, state, torch, local, place);
    }
    // Every rank of a shard group has as much of the unit, the last one less or padding.
    const uint64_t world = WorldSize();
    const uint64_t shard =
        piece == nullptr ? local.ElementCount() : (unit->end + world - 1) / world;
    if (shard == 0) return absl::OkStatus();
    const uint64_t shards = (unit->end + shard - 1) / shard;
    const uint64_t begin = (file.rank % std::max<uint64_t>(shards, 1)) * shard;
    if (piece == nullptr) return flat_.AddSlice(*unit, state, begin, torch, local, place);
    const uint64_t lo = std::max(begin, piece->offset);
    const uint64_t hi = std::min(begin + shard, piece->offset + piece->count);
    if (local.ElementCount() != (lo < hi ? hi - lo : 0)) {
      return absl::DataLossError(absl::StrFormat(
          "%s: %s of %s: expected %d elements on rank %d, as --names says, found %d", torch.name(),
          state, piece->name, lo < hi ? hi - lo : 0, file.rank, local.ElementCount()));
    }
    return lo < hi ? flat_.AddSlice(*unit, state, lo, torch, local, place) : absl::OkStatus();
  }

  // The key without what RootOf put before it.
  static std::string Shown(std::string_view key) {
    const size_t dot = key.find('.');
    return std::string(dot == std::string_view::npos ? key : key.substr(dot + 1));
  }

  uint64_t WorldSize() const {
    size_t ranks = 0;
    for (const FsdpGroup& group : groups_) ranks = std::max(ranks, group.files.size());
    return ranks;
  }

  void Describe() {
    index_.variant = has_flat_          ? "flat parameters"
                     : layouts_.empty() ? (model_wraps_ ? "ShardedTensor" : "whole tensors")
                                        : "DTensor";
    index_.layout.push_back({"ranks", absl::StrCat(WorldSize())});
    for (const std::string& layout : layouts_)
      index_.layout.push_back({"placement", JsonQuote(layout)});
  }

  // Schedulers, random states, what the trainer says of itself: no tensors of the job, not lost.
  void KeepOtherFiles() {
    std::set<uint32_t> read;
    for (const FsdpGroup& group : groups_) {
      for (const FsdpFile& file : group.files) read.insert(file.file);
    }
    for (const uint32_t file : folder_.FilesIn("")) {
      const FolderFile& info = folder_.files()[file];
      if (!read.contains(file))
        index_.blobs.push_back({info.path, index_.AddRaw(file, 0, info.bytes)});
    }
  }

  const ForeignFolder& folder_;
  const NamesFile& names_;
  std::vector<FsdpGroup> groups_;
  std::vector<Tensor> tensors_;
  std::unordered_map<std::string, size_t> number_of_;  // in tensors_, by key
  std::vector<StateKey> others_;
  uint64_t parameter_count_ = 0;
  std::vector<std::string> parameters_;  // of the optimizer, where slices have to be named
  bool model_wraps_ = false;             // the model has DTensors or ShardedTensors
  bool optimizer_wraps_ = false;
  bool has_flat_ = false;
  bool flat_optimizer_ = false;
  bool original_parameters_ = false;
  bool noted_numbers_ = false;
  std::set<std::string> layouts_;
  ForeignIndex index_;
  FlatParameters flat_;
};

}  // namespace

absl::StatusOr<bool> RecognizesFsdp(const ForeignFolder& folder) { return HasFsdpGroups(folder); }

absl::StatusOr<ForeignIndex> ReadFsdp(const ForeignFolder& folder, const ReadOptions& options) {
  ASSIGN_OR_RETURN(const NamesFile names, ParseNamesFile(options.names));
  return Reader(folder, names).Read();
}

}  // namespace holdfast::converter
