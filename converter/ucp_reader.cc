// DeepSpeed's universal folders: `zero/<parameter>/<state>.pt`, one file for each whole parameter
// and state, beside copies of the model-state files. Written by checkpoint/ds_to_universal.py.
//
// What the converter did not know is mended here: the steps of ZeRO-3 (they stand in
// optimizer_state.pt, by sub-group), and the damage of round-robin gradients, where it cut the flat
// buffers by the wrong map. All bytes of the flat buffers are in the folder, so they can be joined
// in the order in which they were cut, and cut again in the true one.
#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "converter/deepspeed_model.h"
#include "converter/rounding.h"
#include "converter/zero_layout.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kFileEnd = ".pt";
constexpr size_t kProbeElementsMax = size_t{1} << 16;
constexpr size_t kNotedNamesMax = 8;
constexpr size_t kKindsMax = 64;

// States of one parameter, by key.
using StateFiles = std::map<std::string, uint32_t>;

class UniversalReader {
 public:
  UniversalReader(const ForeignFolder& folder, const DeepSpeedFiles& files, DeepSpeedModel* model,
                  PieceTable& table)
      : folder_(folder), files_(files), model_(model), table_(table) {}

  absl::Status Read() {
    FindStates();
    NameLostFiles();
    for (const auto& [name, states] : parameters_) {
      const absl::Status status = ReadStates(name, states);
      if (!status.ok()) {
        return absl::Status(status.code(), absl::StrFormat("zero/%s: %s", name, status.message()));
      }
    }
    RETURN_IF_ERROR(ReadOptimizer());
    RETURN_IF_ERROR(AddTensors());
    NoteRounded();
    table_.index().layout.push_back({"universal", "true"});
    return absl::OkStatus();
  }

 private:
  void FindStates() {
    const std::string prefix =
        files_.directory.empty() ? "zero/" : absl::StrCat(files_.directory, "/zero/");
    for (uint32_t i = 0; i < folder_.files().size(); ++i) {
      const std::string& path = folder_.files()[i].path;
      if (!path.starts_with(prefix) || !path.ends_with(kFileEnd)) continue;
      const std::string_view rest = std::string_view(path).substr(prefix.size());
      const size_t slash = rest.rfind('/');
      if (slash == std::string_view::npos) {
        if (rest == "optimizer_state.pt") optimizer_file_ = i;
        continue;
      }
      const std::string_view state = rest.substr(slash + 1);
      parameters_[std::string(rest.substr(0, slash))]
                 [std::string(state.substr(0, state.size() - kFileEnd.size()))] = i;
    }
  }

  // Whether the optimizer owns it. ds_to_universal gives everything else a lone fp32.pt, which is
  // no master but the rounded weight (or the buffer, even of integers).
  bool IsMaster(const std::string& name, const StateFiles& states) const {
    return states.size() > 1 || model_ == nullptr || model_->IsOptimized(name);
  }

  using Keys = std::set<std::string>;

  // The optimizer's group of every parameter that shares one with others: of the model's files.
  std::map<std::string_view, size_t> SharedGroups() const {
    std::map<std::string_view, size_t> groups;
    for (uint32_t mp = 0; model_ != nullptr && mp < model_->ranks(); ++mp) {
      const std::vector<std::vector<NamedShape>>& shapes = model_->states(mp).param_shapes;
      for (size_t g = 0; g < shapes.size(); ++g) {
        if (shapes[g].size() < 2) continue;
        for (const NamedShape& entry : shapes[g]) groups.emplace(entry.name, g);
      }
    }
    return groups;
  }

  // A file that is not there leaves no hole that anybody could see. But the optimizer has the same
  // states of all parameters of a kind, so none has fewer than another one of its group (an
  // optimizer's options may differ by group: momentum, amsgrad), or if it is alone, than any.
  void NameLostFiles() {
    const std::map<std::string_view, size_t> groups = SharedGroups();
    const auto group_of = [&](const std::string& name) {
      const auto group = groups.find(name);
      return group == groups.end() ? std::nullopt : std::optional<size_t>(group->second);
    };
    std::map<std::optional<size_t>, std::set<Keys>> kinds;  // by group; those of all
    const auto keys_of = [](const StateFiles& states) {
      Keys keys;
      for (const auto& [key, file] : states) keys.insert(key);
      return keys;
    };
    for (const auto& [name, states] : parameters_) {
      if (!IsMaster(name, states)) continue;
      const Keys keys = keys_of(states);
      kinds[std::nullopt].insert(keys);
      if (const auto group = group_of(name); group.has_value()) kinds[group].insert(keys);
    }
    if (kinds[std::nullopt].size() > kKindsMax) kinds.clear();  // of no optimizer
    for (const auto& [name, states] : parameters_) {
      // Without the model's files nothing tells a lone rounded weight from a master.
      if (!IsMaster(name, states) || (model_ == nullptr && states.size() == 1)) continue;
      const Keys keys = keys_of(states);
      Keys lost;
      for (const Keys& kind : kinds[group_of(name)]) {
        if (std::ranges::includes(kind, keys)) lost.insert(kind.begin(), kind.end());
      }
      for (const std::string& key : keys) lost.erase(key);
      for (const std::string& key : lost) {
        table_.index().losses.push_back(
            absl::StrFormat("zero/%s: expected %s%s, as other parameters have it, found none", name,
                            key, kFileEnd));
      }
    }
    for (uint32_t mp = 0; model_ != nullptr && mp < model_->ranks(); ++mp) {
      for (const std::vector<NamedShape>& group : model_->states(mp).param_shapes) {
        for (const NamedShape& entry : group) {
          if (parameters_.contains(entry.name) || !absent_.insert(entry.name).second) continue;
          table_.index().losses.push_back(absl::StrFormat(
              "zero/%s: expected the states of this parameter, found none", entry.name));
        }
      }
    }
  }

  absl::Status ReadStates(const std::string& name, const StateFiles& states) {
    if (!IsMaster(name, states)) {
      rounded_.push_back(name);
      return absl::OkStatus();
    }
    for (const auto& [key, file] : states) {
      ASSIGN_OR_RETURN(const std::unique_ptr<TorchFile> torch, OpenTorch(folder_, file, table_));
      TorchValue value = torch->root();
      const bool bare = !value.Is(TorchValue::Kind::kDict);
      if (!bare) {
        ASSIGN_OR_RETURN(value, value.Get("param"));
      }
      ASSIGN_OR_RETURN(std::optional<StoredTensor> tensor, StateTensor(*torch, file, value));
      if (!tensor.has_value()) {
        return absl::DataLossError(
            absl::StrFormat("%s: expected a tensor, found %s", key, value.Describe()));
      }
      if (bare && !tensor->shape.empty()) {
        // ZeRO-3: flat; the shape stands in the model's files.
        ASSIGN_OR_RETURN(const Shape shape, ShapeOf(name, *tensor));
        ASSIGN_OR_RETURN(const uint64_t expected, ElementCount(shape, name));
        if (expected != tensor->ElementCount()) {
          return absl::DataLossError(absl::StrFormat("%s: expected %d elements, found %d", key,
                                                     expected, tensor->ElementCount()));
        }
        tensor->shape = shape;
      }
      tensors_[name].emplace(key, *std::move(tensor));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Shape> ShapeOf(const std::string& name, const StoredTensor& tensor) {
    if (model_ == nullptr || !model_->IsOptimized(name)) return tensor.shape;
    for (uint32_t mp = 0; mp < model_->ranks(); ++mp) {
      const absl::StatusOr<const ShardMap*> shard = model_->Shard(name, mp);
      if (shard.ok()) return (*shard)->shape;
      if (mp + 1 == model_->ranks()) return shard.status();
    }
    return tensor.shape;
  }

  // Steps that have no files of their own, and what there is to show.
  absl::Status ReadOptimizer() {
    if (!optimizer_file_.has_value()) return absl::OkStatus();
    ASSIGN_OR_RETURN(optimizer_, ReadUniversalOptimizer(folder_, *optimizer_file_, table_));
    if (model_ == nullptr || optimizer_.groups.empty()) return absl::OkStatus();
    const uint64_t ranks =
        optimizer_.partition_count.value_or(std::max<uint64_t>(model_->states(0).dp_world_size, 1));
    std::vector<std::string> names;
    std::vector<uint64_t> sizes;
    for (const std::vector<NamedShape>& group : model_->states(0).param_shapes) {
      for (const NamedShape& entry : group) {
        names.push_back(entry.name);
        ASSIGN_OR_RETURN(const uint64_t size, ElementCount(entry.shape, entry.name));
        sizes.push_back(size);
      }
    }
    if (ranks > kZeroRanksMax) {
      return absl::DataLossError(absl::StrFormat("partition_count: found %d", ranks));
    }
    ASSIGN_OR_RETURN(const PartitionedParameters parameters,
                     PartitionedParameters::Create(sizes, static_cast<uint32_t>(ranks)));
    size_t part = 0;
    uint64_t part_end = optimizer_.groups[0].fp32.ElementCount();
    for (size_t i = 0; i < names.size(); ++i) {
      while (parameters.offsets()[i] >= part_end && part + 1 < optimizer_.groups.size()) {
        part_end += optimizer_.groups[++part].fp32.ElementCount();
      }
      const auto found = tensors_.find(names[i]);
      if (found == tensors_.end()) continue;
      for (const OptimizerState& state : optimizer_.groups[part].states) {
        if (state.tensor.shape.empty()) found->second.emplace(state.key, state.tensor);
      }
    }
    return absl::OkStatus();
  }

  absl::Status AddTensors() {
    if (model_ != nullptr && model_->states(0).round_robin) RETURN_IF_ERROR(MendRoundRobin());
    for (const auto& [name, states] : tensors_) {
      for (const auto& [key, tensor] : states) {
        std::vector<std::string> names = {name};
        std::string state = key;
        if (key == "fp32" && model_ != nullptr) {
          const std::optional<Dtype> weights = model_->WeightDtype(name);
          if (weights.has_value() && *weights == tensor.dtype) {  // its own master
            if (table_.Find(name, "param").has_value()) continue;
            state = "param";
            names = model_->NamesOf(name);
          }
        }
        for (const std::string& of : names) {
          ASSIGN_OR_RETURN(const uint32_t number,
                           table_.State(of, state, tensor.dtype, tensor.shape));
          if (const auto mended = mended_.find({name, key}); mended != mended_.end()) {
            RETURN_IF_ERROR(AddMended(number, mended->second, key));
          } else {
            RETURN_IF_ERROR(table_.AddWhole(number, tensor));
          }
        }
      }
      if (model_ != nullptr) RETURN_IF_ERROR(model_->AddRoundedWeights(name));
    }
    return absl::OkStatus();
  }

  // ------------------------------------------------------------------ round-robin gradients

  // Elements of a parameter, in the order of the parameter: where they really are.
  struct Source {
    std::string name;
    FlatRun in_parameter;  // of the true parameter
    uint64_t in_file = 0;  // first element in the file of `name`
  };

  absl::Status MendRoundRobin() {
    const std::vector<std::vector<NamedShape>>& groups = model_->states(0).param_shapes;
    for (size_t g = 0; g < groups.size(); ++g) {
      uint64_t ranks = model_->states(0).dp_world_size;
      if (g < optimizer_.group_partition_counts.size()) {
        ranks = optimizer_.group_partition_counts[g];
      }
      bool aligned = false;  // then ds_to_universal has the true offsets
      if (g < optimizer_.group_alignment_paddings.size()) {
        for (uint64_t padding : optimizer_.group_alignment_paddings[g]) aligned |= padding != 0;
      }
      if (ranks < 2 || ranks > kZeroRanksMax || aligned || groups[g].size() < 2) continue;
      RETURN_IF_ERROR(MendGroup(g, groups[g], static_cast<uint32_t>(ranks)));
    }
    return absl::OkStatus();
  }

  absl::Status MendGroup(size_t g, const std::vector<NamedShape>& parameters, uint32_t ranks) {
    std::vector<uint64_t> true_sizes;
    for (const NamedShape& entry : parameters) {
      ASSIGN_OR_RETURN(const uint64_t size, ElementCount(entry.shape, entry.name));
      true_sizes.push_back(size);
    }
    const std::vector<uint32_t> order =
        RoundRobinOrder(static_cast<uint32_t>(parameters.size()), ranks);
    std::vector<uint32_t> plain(parameters.size());  // the parameter that stands at a plain place
    for (uint32_t i = 0; i < order.size(); ++i) plain[order[i]] = i;
    std::vector<uint64_t> plain_sizes;
    for (uint32_t i : plain) plain_sizes.push_back(true_sizes[i]);
    ASSIGN_OR_RETURN(const PackedGroup true_group, PackedGroup::Create(true_sizes, {}));
    ASSIGN_OR_RETURN(const PackedGroup plain_group, PackedGroup::Create(plain_sizes, {}));

    // Both cover the same elements of the flat buffer, so one walk finds what overlaps.
    std::map<std::string, std::vector<Source>> sources;
    for (uint32_t i = 0, p = 0; i < parameters.size() && p < plain.size();) {
      const uint64_t true_end = true_group.offsets()[i] + true_sizes[i];
      const uint64_t plain_end = plain_group.offsets()[p] + plain_sizes[p];
      const uint64_t begin = std::max(true_group.offsets()[i], plain_group.offsets()[p]);
      const uint64_t end = std::min(true_end, plain_end);
      if (begin < end) {
        sources[parameters[i].name].push_back(
            {.name = parameters[plain[p]].name,
             .in_parameter = {.parameter = i,
                              .parameter_begin = begin - true_group.offsets()[i],
                              .buffer_begin = 0,
                              .count = end - begin},
             .in_file = begin - plain_group.offsets()[p]});
      }
      if (true_end <= plain_end) ++i;
      if (plain_end <= true_end) ++p;
    }
    ASSIGN_OR_RETURN(const Verdict verdict, Judge(parameters, sources));
    if (verdict == Verdict::kSound) return absl::OkStatus();
    if (verdict == Verdict::kLost || model_->ranks() > 1) {
      table_.index().losses.push_back(absl::StrFormat(
          "group %d: ds_to_universal cut the flat buffer of round-robin gradients by the wrong "
          "map, "
          "and it cannot be put together again: master weights and optimizer states of its "
          "parameters are wrong",
          g));
      return absl::OkStatus();
    }
    for (const NamedShape& entry : parameters) {
      const auto found = tensors_.find(entry.name);
      if (found == tensors_.end()) continue;
      for (const auto& [key, tensor] : found->second) {
        if (tensor.ElementCount() > 1 || !tensor.shape.empty()) {
          mended_[{entry.name, key}] = sources[entry.name];
        }
      }
    }
    table_.index().repairs.push_back(absl::StrFormat(
        "group %d: ds_to_universal cut the flat buffer of round-robin gradients by the wrong map; "
        "its %d parameters are put together again by the true one",
        g, parameters.size()));
    return absl::OkStatus();
  }

  enum class Verdict : uint8_t { kSound, kMendable, kLost };

  // Compares masters, rounded, with the model's weights, in the parameter that shows it best: one
  // whose bytes are elsewhere. Sound if they are equal as they stand, mendable if they are equal
  // when put together.
  absl::StatusOr<Verdict> Judge(const std::vector<NamedShape>& parameters,
                                const std::map<std::string, std::vector<Source>>& sources) {
    for (const NamedShape& entry : parameters) {
      const auto found = sources.find(entry.name);
      if (found == sources.end() ||
          (found->second.size() == 1 && found->second[0].name == entry.name &&
           found->second[0].in_file == 0)) {
        continue;  // it stands where it belongs either way
      }
      const StoredTensor* weights = nullptr;
      for (const NamedTensor& tensor : model_->states(0).module) {
        if (tensor.name == entry.name && tensor.tensor.contiguous) weights = &tensor.tensor;
      }
      const auto here = tensors_.find(entry.name);
      if (weights == nullptr || here == tensors_.end() || !here->second.contains("fp32") ||
          !CanRound(here->second.at("fp32").dtype, weights->dtype)) {
        continue;
      }
      const StoredTensor& master = here->second.at("fp32");
      const uint64_t count = std::min<uint64_t>(weights->ElementCount(), kProbeElementsMax);
      ASSIGN_OR_RETURN(const std::string expected, Bytes(*weights, 0, count));
      ASSIGN_OR_RETURN(const std::string as_is,
                       Rounded(master, 0, std::min(count, master.ElementCount()), weights->dtype));
      if (as_is == expected) return Verdict::kSound;
      std::string together;
      for (const Source& source : found->second) {
        const auto other = tensors_.find(source.name);
        if (other == tensors_.end() || !other->second.contains("fp32")) return Verdict::kLost;
        const uint64_t left =
            count - std::min(count, together.size() / ElementBytes(weights->dtype));
        if (left == 0) break;
        ASSIGN_OR_RETURN(const std::string part,
                         Rounded(other->second.at("fp32"), source.in_file,
                                 std::min(left, source.in_parameter.count), weights->dtype));
        together += part;
      }
      return together == expected ? Verdict::kMendable : Verdict::kLost;
    }
    return Verdict::kSound;
  }

  absl::StatusOr<std::string> Bytes(const StoredTensor& tensor, uint64_t begin, uint64_t count) {
    const uint64_t size = ElementBytes(tensor.dtype);
    if (begin > tensor.ElementCount() || count > tensor.ElementCount() - begin ||
        tensor.file == kInline || tensor.byte_order != ByteOrder::kLittle) {
      return absl::DataLossError("round-robin gradients: a file that is too short");
    }
    std::string bytes(count * size, '\0');
    RETURN_IF_ERROR(folder_.ReadAt(tensor.file, tensor.offset_bytes + begin * size,
                                   std::as_writable_bytes(std::span(bytes.data(), bytes.size()))));
    return bytes;
  }

  absl::StatusOr<std::string> Rounded(const StoredTensor& tensor, uint64_t begin, uint64_t count,
                                      Dtype dtype) {
    ASSIGN_OR_RETURN(const std::string bytes, Bytes(tensor, begin, count));
    if (!CanRound(tensor.dtype, dtype)) return bytes;
    std::string rounded(count * ElementBytes(dtype), '\0');
    RoundElements(tensor.dtype, dtype, std::as_bytes(std::span(bytes.data(), bytes.size())),
                  std::as_writable_bytes(std::span(rounded.data(), rounded.size())));
    return rounded;
  }

  absl::Status AddMended(uint32_t state, const std::vector<Source>& sources,
                         const std::string& key) {
    ASSIGN_OR_RETURN(const ShardMap whole, WholeShard(table_.index().tensor_states[state].shape));
    for (const Source& source : sources) {
      const auto tensors = tensors_.find(source.name);
      if (tensors == tensors_.end() || !tensors->second.contains(key)) {
        return absl::DataLossError(absl::StrFormat(
            "round-robin gradients: found no state \"%s\" of \"%s\"", key, source.name));
      }
      RETURN_IF_ERROR(table_.AddShardRange(state, whole, source.in_parameter.parameter_begin,
                                           tensors->second.at(key), source.in_file,
                                           source.in_parameter.count));
    }
    return absl::OkStatus();
  }

  void NoteRounded() {
    if (rounded_.empty()) return;
    std::string names;
    for (size_t i = 0; i < std::min(rounded_.size(), kNotedNamesMax); ++i) {
      absl::StrAppend(&names, i == 0 ? "" : ", ", rounded_[i]);
    }
    if (rounded_.size() > kNotedNamesMax) names += ", ...";
    table_.index().notes.push_back(absl::StrFormat(
        "fp32.pt of %d tensors that the optimizer does not own (%s) is their rounded value, not a "
        "master: left out",
        rounded_.size(), names));
  }

  const ForeignFolder& folder_;
  const DeepSpeedFiles& files_;
  DeepSpeedModel* model_;  // null: the folder has no model-state files
  PieceTable& table_;
  std::map<std::string, StateFiles> parameters_;
  std::set<std::string> absent_;  // of which there are none
  std::map<std::string, std::map<std::string, StoredTensor>> tensors_;
  std::optional<uint32_t> optimizer_file_;
  UniversalOptimizer optimizer_;
  std::map<std::pair<std::string, std::string>, std::vector<Source>> mended_;
  std::vector<std::string> rounded_;
};

}  // namespace

absl::StatusOr<ForeignIndex> ReadUniversalFiles(const ForeignFolder& folder,
                                                const DeepSpeedFiles& files,
                                                const ReadOptions& options) {
  PieceTable table;
  table.index().format = "ucp";
  std::optional<DeepSpeedModel> model;
  if (!files.models.empty() || !files.partitioned_models.empty()) {
    ASSIGN_OR_RETURN(DeepSpeedModel read, DeepSpeedModel::Read(folder, files, options, table));
    model.emplace(std::move(read));
    RETURN_IF_ERROR(model->AddWeights());
  } else {
    table.index().notes.push_back("no model states: master weights and optimizer states only");
  }
  if (!files.tag.empty()) table.index().layout.push_back({"tag", JsonQuote(files.tag)});
  UniversalReader reader(folder, files, model.has_value() ? &*model : nullptr, table);
  RETURN_IF_ERROR(reader.Read());
  if (model.has_value()) {
    model->AddAliases();
    model->NameParameterGroups();
  }
  return table.Take();
}

absl::StatusOr<bool> RecognizesUniversal(const ForeignFolder& folder) {
  return HoldsUniversal(folder);
}

}  // namespace holdfast::converter
