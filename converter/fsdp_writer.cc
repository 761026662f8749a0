#include "converter/fsdp_writer.h"

#include <algorithm>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/non_tensors.h"
#include "converter/optimizer_groups.h"
#include "converter/rounding.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kTensorModule = "torch.distributed.tensor";
constexpr std::string_view kSpecModule = "torch.distributed.tensor._dtensor_spec";
constexpr std::string_view kLayoutModule = "torch.distributed._mesh_layout";

// One rank's file: DTensors that share one mesh.
class RankFile {
 public:
  RankFile(const ForeignIndex& index, std::string path, uint64_t ranks, uint64_t rank)
      : draft_(index, std::move(path)), index_(index), ranks_(ranks), rank_(rank) {}

  TorchDraft& draft() { return draft_; }

  // The rank's rows of a tensor state, which has dimensions.
  void PushShard(uint32_t number) {
    const TensorState& state = index_.tensor_states[number];
    TorchPickle& pickle = draft_.pickle();
    PickleWriter& out = draft_.out();
    out.Global("torch._tensor", "_rebuild_from_type_v2");
    out.Mark();
    out.Global("torch._utils", "_rebuild_wrapper_subclass");
    out.Global(kTensorModule, "DTensor");
    out.Mark();
    out.Global(kTensorModule, "DTensor");
    out.Global("torch", DtypeName(state.dtype));
    pickle.Tuple(state.shape);
    pickle.Strides(state.shape);
    out.Int(0);
    Call("torch.serialization", "_get_layout", "torch.strided");
    Call("torch", "device", "cpu");
    out.Bool(false);
    out.Tuple();
    out.None();
    pickle.Dict([&] {
      draft_.Key("_local_tensor");
      PushLocal(number);
      draft_.Key("_spec");
      PushSpec(state);
    });
    out.Tuple(2);
    out.Tuple();
    out.Reduce();
  }

 private:
  void Call(std::string_view module, std::string_view name, std::string_view argument) {
    draft_.out().Global(module, name);
    draft_.out().String(argument);
    draft_.out().Tuple(1);
    draft_.out().Reduce();
  }

  void PushLocal(uint32_t number) {
    const TensorState& state = index_.tensor_states[number];
    const uint64_t rows = state.shape[0];
    const uint64_t width = (rows + ranks_ - 1) / ranks_;
    const uint64_t begin = std::min(rows, rank_ * width);
    const uint64_t end = std::min(rows, begin + width);
    std::vector<uint64_t> shape = state.shape;
    shape[0] = end - begin;
    const uint64_t row = rows == 0 ? 0 : state.ElementCount() / rows;
    draft_.Ranges(state.dtype, shape, {{number, begin * row, end * row}});
  }

  void PushSpec(const TensorState& state) {
    TorchPickle& pickle = draft_.pickle();
    PickleWriter& out = draft_.out();
    pickle.Object(kSpecModule, "DTensorSpec");
    pickle.State([&] {
      draft_.Key("mesh");
      PushMesh();
      draft_.Key("placements");
      pickle.Object("torch.distributed.tensor.placement_types", "Shard");
      pickle.State([&] {
        draft_.Key("dim");
        out.Int(0);
      });
      out.Tuple(1);
      draft_.Key("tensor_meta");
      out.Global(kSpecModule, "TensorMeta");
      pickle.Size(state.shape);
      pickle.Strides(state.shape);
      out.Global("torch", DtypeName(state.dtype));
      out.Tuple(3);
      out.NewObject();
      draft_.Key("shard_order");
      out.Global(kSpecModule, "ShardOrderEntry");
      out.Int(0);
      out.Int(0);
      out.Tuple(1);
      out.Tuple(2);
      out.NewObject();
      out.Tuple(1);
      draft_.Key("use_strided_shard_as_shard_order");
      out.Bool(false);
      draft_.Key("_hash");
      out.None();
    });
  }

  void PushMesh() {
    PickleWriter& out = draft_.out();
    if (mesh_.has_value()) return out.Recall(*mesh_);
    TorchPickle& pickle = draft_.pickle();
    std::vector<uint64_t> all(ranks_);
    std::string bytes;
    for (uint64_t r = 0; r < ranks_; ++r) {
      all[r] = r;
      for (int shift = 0; shift < 32; shift += 8) bytes.push_back(static_cast<char>(r >> shift));
    }
    pickle.Object("torch.distributed.device_mesh", "DeviceMesh");
    pickle.State([&] {
      draft_.Key("_device_type");
      out.String("cpu");
      draft_.Key("_layout");
      pickle.Object(kLayoutModule, "_MeshLayout");
      pickle.State([&] {
        draft_.Key("axes");
        pickle.Object(kLayoutModule, "_FlatLayout");
        pickle.State([&] {
          draft_.Key("shape");
          PushAxis(ranks_);
          draft_.Key("stride");
          PushAxis(1);
        });
        out.Tuple(1);
      });
      draft_.Key("_rank_map");
      draft_.Given(Dtype::kInt32, std::vector<uint64_t>{ranks_}, std::move(bytes));
      draft_.Key("_mesh_dim_names");
      out.String("fsdp");
      out.Tuple(1);
      draft_.Key("_root_mesh");
      out.None();
      draft_.Key("_flatten_rank_map");
      pickle.Tuple(all);
      draft_.Key("_thread_id");
      out.None();
      draft_.Key("_flatten_mapping");
      pickle.Dict([] {});
      draft_.Key("_dim_group_names");
      pickle.List([&] { out.String("0"); });
      draft_.Key("_rank");
      out.Int(static_cast<int64_t>(rank_));
      draft_.Key("_coordinate_on_dim");
      out.Int(static_cast<int64_t>(rank_));
      out.Tuple(1);
      draft_.Key("_hash");
      out.None();
    });
    mesh_ = out.Remember();
  }

  // An axis of one rank has neither shape nor stride.
  void PushAxis(uint64_t value) {
    if (ranks_ == 1) return draft_.out().Tuple(0);
    draft_.out().Int(static_cast<int64_t>(value));
    draft_.out().Tuple(1);
  }

  TorchDraft draft_;
  const ForeignIndex& index_;
  const uint64_t ranks_;
  const uint64_t rank_;
  std::optional<uint32_t> mesh_;
};

class FsdpPlanner {
 public:
  FsdpPlanner(const ForeignIndex& index, uint64_t ranks) : index_(index), ranks_(ranks) {}

  absl::StatusOr<TorchFilesPlan> Run() {
    RETURN_IF_ERROR(Sort());
    ASSIGN_OR_RETURN(groups_, OptimizerGroupsOf(index_));
    for (uint64_t rank = 0; rank < ranks_; ++rank) {
      AddModel(rank);
      if (!groups_.empty()) AddOptimizer(rank);
    }
    plan_.tensor_count = index_.tensor_states.size();
    plan_.left_out =
        NonTensorsWithoutPlace(index_, [](const Fact& fact) { return fact.name == kParamGroups; });
    return std::move(plan_);
  }

 private:
  absl::Status Sort() {
    sharded_.resize(index_.tensor_states.size());
    std::set<std::string_view> names;
    std::unordered_map<std::string_view, const std::vector<uint64_t>*> shapes;
    for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
      const TensorState& state = index_.tensor_states[i];
      if (IsOptimizerState(state.state)) {
        states_[state.tensor].push_back(i);
        continue;
      }
      if (state.state == "ema" || state.state == "rng") {
        return absl::FailedPreconditionError(
            absl::StrFormat("%s: FSDP's rank files have no place for the state \"%s\"; --drop %s",
                            Describe(state), state.state, state.state));
      }
      if (!names.insert(state.tensor).second) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: the model has two tensors of this name; --drop a state, or rename one",
            Describe(state)));
      }
      weights_.push_back(i);
      shapes[state.tensor] = &state.shape;
      sharded_[i] = state.state != "buffer" && !state.shape.empty() && IsCastable(state.dtype);
    }
    for (const auto& [name, states] : states_) {
      const auto shape = shapes.find(name);
      if (shape == shapes.end()) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "tensor \"%s\" has optimizer states and no weights: --only or --drop has left them "
            "out, or the optimizer's names are not the model's (--names FILE, --rename FILE)",
            name));
      }
      if (shape->second->empty()) {
        return absl::FailedPreconditionError(absl::StrFormat(
            "tensor \"%s\": FSDP2 shards dimension 0, and this parameter has none", name));
      }
      for (const uint32_t number : states) {
        sharded_[number] = index_.tensor_states[number].shape == *shape->second;
      }
    }
    return absl::OkStatus();
  }

  std::string PathOf(std::string_view what, uint64_t rank) const {
    return absl::StrFormat("%s_world_size_%d_rank_%d.pt", what, ranks_, rank);
  }

  void Push(RankFile& file, uint32_t number) const {
    if (sharded_[number]) {
      file.PushShard(number);
    } else {
      file.draft().Whole(number);
    }
  }

  void AddModel(uint64_t rank) {
    RankFile file(index_, PathOf("model", rank), ranks_, rank);
    file.draft().pickle().OrderedDict([&] {
      for (const uint32_t number : weights_) {
        file.draft().Key(index_.tensor_states[number].tensor);
        Push(file, number);
      }
    });
    plan_.Add(std::move(file.draft()).Finish());
  }

  void AddOptimizer(uint64_t rank) {
    RankFile file(index_, PathOf("optim", rank), ranks_, rank);
    TorchPickle& pickle = file.draft().pickle();
    pickle.Dict([&] {
      file.draft().Key("state");
      pickle.Dict([&] {
        for (const OptimizerGroup& group : groups_) {
          for (const std::string& name : group.parameters) {
            file.draft().Key(name);
            pickle.Dict([&] {
              for (const uint32_t number : states_.at(name)) {
                file.draft().Key(index_.tensor_states[number].state);
                Push(file, number);
              }
            });
          }
        }
      });
      file.draft().Key(kParamGroups);
      pickle.List([&] {
        for (const OptimizerGroup& group : groups_) PushGroup(file, group);
      });
    });
    plan_.Add(std::move(file.draft()).Finish());
  }

  static void PushGroup(RankFile& file, const OptimizerGroup& group) {
    TorchPickle& pickle = file.draft().pickle();
    pickle.Dict([&] {
      for (const auto& [key, value] : group.values.items()) {
        file.draft().Key(key);
        pickle.Json(value, TorchPickle::Sequences::kTuples);  // betas are one
      }
      file.draft().Key("params");
      pickle.List([&] {
        for (const std::string& name : group.parameters) file.draft().out().String(name);
      });
    });
  }

  const ForeignIndex& index_;
  const uint64_t ranks_;
  std::vector<OptimizerGroup> groups_;
  std::vector<uint32_t> weights_;
  // By tensor state: parameters, and states of a parameter's shape. Buffers and numbers are whole
  // on every rank.
  std::vector<bool> sharded_;
  std::unordered_map<std::string, std::vector<uint32_t>> states_;  // by tensor
  TorchFilesPlan plan_;
};

}  // namespace

absl::StatusOr<TorchFilesPlan> PlanFsdp(const ForeignIndex& index, uint64_t ranks) {
  CHECK(ranks >= 1 && ranks <= kFsdpRanksMax);
  return FsdpPlanner(index, ranks).Run();
}

}  // namespace holdfast::converter
