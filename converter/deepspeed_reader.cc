// Native ZeRO checkpoints: from the flat partitions of all ranks to master weights and optimizer
// states of whole parameters.
//
// Stages 1 and 2 (and BF16_Optimizer): the parameters of a group stand one behind the other, cut in
// equal partitions over the data-parallel ranks. Where the model file's weights are views of the
// flat buffer, their storage offsets are its true layout and win over every record of it: that is
// what repairs round-robin gradients, whose `param_slice_mappings` are wrong
// (stage_1_and_2.py, _link_all_hp_params). Else the order is that of `param_shapes`.
//
// Stage 3: every parameter is cut over the ranks, and there are no weights in the files but the
// masters: the model's are those rounded to its dtype, as DeepSpeed makes them.
#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/deepspeed_model.h"
#include "converter/zero_layout.h"

namespace holdfast::converter {
namespace {

// A flat buffer's parameters, and what one rank of it has stored.
struct FlatParameters {
  std::vector<std::string> names;  // global
  std::vector<std::string> local;  // as the files have them
};

class ZeroReader {
 public:
  ZeroReader(const ForeignFolder& folder, const DeepSpeedFiles& files, DeepSpeedModel& model,
             PieceTable& table)
      : folder_(folder), files_(files), model_(model), table_(table) {}

  absl::Status Read() {
    ASSIGN_OR_RETURN(const RankKey counts,
                     DeepSpeedFiles::Counts(files_.optimizers, "optimizer states"));
    const uint64_t said = model_.states(0).dp_world_size;
    if (counts.mp != model_.ranks() || (said != 0 && said != counts.dp)) {
      return absl::DataLossError(absl::StrFormat(
          "optimizer states: expected files of %d data-parallel ranks on each of %d model-parallel "
          "ranks, found %d on %d",
          said != 0 ? said : counts.dp, model_.ranks(), counts.dp, counts.mp));
    }
    for (uint32_t mp = 0; mp < counts.mp; ++mp) {
      std::vector<OptimizerStates> ranks;
      for (uint32_t dp = 0; dp < counts.dp; ++dp) {
        ASSIGN_OR_RETURN(
            OptimizerStates states,
            ReadOptimizerStates(folder_, files_.optimizers.at({.mp = mp, .dp = dp}),
                                mp == 0 && dp == 0 ? ShowFacts::kYes : ShowFacts::kNo, table_));
        if (!ranks.empty() &&
            (states.stage != ranks[0].stage || states.groups.size() != ranks[0].groups.size())) {
          return absl::DataLossError(absl::StrFormat(
              "optimizer states of data-parallel rank %d: expected stage %d with %d groups, found "
              "stage %d with %d",
              dp, ranks[0].stage, ranks[0].groups.size(), states.stage, states.groups.size()));
        }
        ranks.push_back(std::move(states));
      }
      stage_ = ranks[0].stage;
      RETURN_IF_ERROR(stage_ == 3 ? ReadPartitioned(mp, ranks) : ReadPacked(mp, ranks));
    }
    table_.index().variant = absl::StrCat("ZeRO-", stage_);
    AddLayout(counts);
    return absl::OkStatus();
  }

 private:
  void AddLayout(const RankKey& counts) {
    const auto fact = [this](const char* name, uint64_t number) {
      table_.index().layout.push_back({name, absl::StrCat(number)});
    };
    fact("zero_stage", stage_);
    fact("dp", counts.dp);
    fact("tp", model_.tensor_ranks());
    fact("pp", model_.pipeline_ranks());
    if (expert_ranks_ > 1) fact("ep", expert_ranks_);
  }

  absl::Status ReadPacked(uint32_t mp, const std::vector<OptimizerStates>& ranks) {
    const std::vector<std::vector<NamedShape>>& groups = model_.states(mp).param_shapes;
    if (groups.size() != ranks[0].groups.size()) {
      return absl::DataLossError(
          absl::StrFormat("model-parallel rank %d: expected %d parameter groups, as in "
                          "param_shapes, found flat partitions of %d",
                          mp, groups.size(), ranks[0].groups.size()));
    }
    for (size_t g = 0; g < groups.size(); ++g) {
      const absl::Status status = ReadPackedGroup(mp, g, ranks);
      if (!status.ok()) {
        return absl::Status(status.code(), absl::StrFormat("model-parallel rank %d, group %d: %s",
                                                           mp, g, status.message()));
      }
    }
    return absl::OkStatus();
  }

  // Data-parallel ranks that share a flat buffer, in the order of their partitions.
  absl::StatusOr<std::vector<std::vector<uint32_t>>> Members(
      const OptimizerStates::Group& group, const std::vector<NamedShape>& parameters,
      uint64_t dp_count) const {
    const uint64_t partitions = group.partition_count.value_or(dp_count);
    if (partitions == 0 || partitions > dp_count || dp_count % partitions != 0) {
      return absl::DataLossError(
          absl::StrFormat("partition_count: expected a divisor of %d data-parallel ranks, found %d",
                          dp_count, partitions));
    }
    const uint64_t buffers = dp_count / partitions;
    const bool experts =
        group.expert ||
        std::any_of(parameters.begin(), parameters.end(), [](const NamedShape& entry) {
          return ParseExpertName(entry.name).has_value();
        });
    if (buffers > 1 && !experts) {
      return absl::UnimplementedError(absl::StrFormat(
          "%d partitions over %d data-parallel ranks, and its parameters are no experts",
          partitions, dp_count));
    }
    const ExpertGrid grid{.data_ranks = dp_count,
                          .expert_ranks = buffers,
                          .data_first = model_.states(0).data_before_expert_parallel};
    std::vector<std::vector<uint32_t>> members(buffers);
    for (uint32_t dp = 0; dp < dp_count; ++dp) members[grid.ExpertRank(dp)].push_back(dp);
    return members;
  }

  absl::Status ReadPackedGroup(uint32_t mp, size_t g, const std::vector<OptimizerStates>& ranks) {
    const std::vector<NamedShape>& parameters = model_.states(mp).param_shapes[g];
    ASSIGN_OR_RETURN(const std::vector<std::vector<uint32_t>> buffers,
                     Members(ranks[0].groups[g], parameters, ranks.size()));
    expert_ranks_ = std::max<uint64_t>(expert_ranks_, buffers.size());
    model_.SetExpertRanks(mp, g, buffers.size());
    for (uint32_t expert_rank = 0; expert_rank < buffers.size(); ++expert_rank) {
      FlatParameters flat;
      for (const NamedShape& entry : parameters) {
        flat.local.push_back(entry.name);
        flat.names.push_back(model_.GlobalExpertName(entry.name, mp, expert_rank));
      }
      std::vector<uint64_t> stored;
      std::vector<const OptimizerStates::Group*> groups;
      for (uint32_t dp : buffers[expert_rank]) {
        groups.push_back(&ranks[dp].groups[g]);
        stored.push_back(groups.back()->fp32.ElementCount());
      }
      ASSIGN_OR_RETURN(const PackedGroup packed, FlatLayout(mp, g, parameters, groups));
      ASSIGN_OR_RETURN(const uint64_t width, packed.PartitionElements(stored));
      for (uint32_t i = 0; i < groups.size(); ++i) {
        RETURN_IF_ERROR(AddPartition(mp, g, flat, packed, width, i, *groups[i]));
      }
    }
    return absl::OkStatus();
  }

  // Where the parameters stand in the flat buffer of the group.
  absl::StatusOr<PackedGroup> FlatLayout(uint32_t mp, size_t g,
                                         const std::vector<NamedShape>& parameters,
                                         const std::vector<const OptimizerStates::Group*>& groups) {
    std::vector<uint64_t> sizes;
    for (const NamedShape& entry : parameters) {
      ASSIGN_OR_RETURN(const uint64_t size, ElementCount(entry.shape, entry.name));
      sizes.push_back(size);
    }
    absl::StatusOr<PackedGroup> said = PackedGroup::Create(sizes, groups[0]->alignment_paddings);
    const std::optional<std::vector<uint64_t>> offsets = StorageOffsets(mp, parameters, sizes);
    if (!offsets.has_value()) {
      if (said.ok() && MappingsAreWrong(parameters, groups)) NoteRoundRobin(mp, g);
      return said;
    }
    ASSIGN_OR_RETURN(PackedGroup true_layout, PackedGroup::AtOffsets(sizes, *offsets));
    if (!said.ok() || !std::equal(said->offsets().begin(), said->offsets().end(),
                                  true_layout.offsets().begin())) {
      table_.index().repairs.push_back(absl::StrFormat(
          "model-parallel rank %d, group %d: the flat buffer is in another order than "
          "param_shapes says; taken from the storage of the weights",
          mp, g));
    } else if (MappingsAreWrong(parameters, groups)) {
      NoteRoundRobin(mp, g);
    }
    return true_layout;
  }

  void NoteRoundRobin(uint32_t mp, size_t g) {
    table_.index().repairs.push_back(absl::StrFormat(
        "model-parallel rank %d, group %d: round-robin gradients: param_slice_mappings are in "
        "another order than the flat buffer (DeepSpeed's ds_to_universal and safe_get_* follow "
        "them and are wrong); read by the true order",
        mp, g));
  }

  // Whether param_slice_mappings of all partitions together name the parameters in another order.
  // With parameter_alignment they do, and are right: they were made from the true offsets.
  static bool MappingsAreWrong(const std::vector<NamedShape>& parameters,
                               const std::vector<const OptimizerStates::Group*>& groups) {
    for (uint64_t padding : groups[0]->alignment_paddings) {
      if (padding != 0) return false;
    }
    std::vector<std::string> mapped;
    for (const OptimizerStates::Group* group : groups) {
      if (!group->has_mappings) return false;
      for (const std::string& name : group->mapped) {
        if (mapped.empty() || mapped.back() != name) mapped.push_back(name);
      }
    }
    const std::set<std::string> there(mapped.begin(), mapped.end());
    size_t at = 0;
    for (const NamedShape& entry : parameters) {
      if (!there.contains(entry.name)) continue;
      if (at >= mapped.size() || mapped[at++] != entry.name) return true;
    }
    return at != mapped.size();
  }

  // Offsets in the flat buffer, if all weights of the group are views of one storage.
  std::optional<std::vector<uint64_t>> StorageOffsets(uint32_t mp,
                                                      const std::vector<NamedShape>& parameters,
                                                      const std::vector<uint64_t>& sizes) const {
    if (model_.partitioned()) return std::nullopt;
    const auto& module = model_.module(mp);
    std::vector<uint64_t> offsets;
    const StoredTensor* first = nullptr;
    uint64_t all = 0;
    for (size_t i = 0; i < parameters.size(); ++i) {
      all += sizes[i];
      const auto found = module.find(parameters[i].name);
      if (found == module.end()) return std::nullopt;
      const StoredTensor& tensor = *found->second;
      if (first == nullptr) first = &tensor;
      if (tensor.storage_offset_bytes != first->storage_offset_bytes || !tensor.contiguous ||
          tensor.dtype != first->dtype || tensor.ElementCount() != sizes[i]) {
        return std::nullopt;
      }
      offsets.push_back((tensor.offset_bytes - tensor.storage_offset_bytes) /
                        ElementBytes(tensor.dtype));
    }
    // A group of one parameter may be saved by itself: then its offset says nothing.
    if (first == nullptr || first->storage_bytes / ElementBytes(first->dtype) < all ||
        parameters.size() < 2) {
      return std::nullopt;
    }
    return offsets;
  }

  absl::Status AddPartition(uint32_t mp, size_t g, const FlatParameters& flat,
                            const PackedGroup& packed, uint64_t width, uint32_t partition,
                            const OptimizerStates::Group& group) {
    const std::vector<FlatRun> runs = packed.Partition(partition, width);
    const std::vector<FlatRun> whole = packed.WholeParameters(partition, width);
    uint64_t whole_elements = 0;
    for (const FlatRun& run : whole) whole_elements += run.count;
    const uint64_t real = group.fp32.ElementCount();
    RETURN_IF_ERROR(AddMasters(mp, flat, runs, group.fp32));
    for (const OptimizerState& state : group.states) {
      const uint64_t elements = state.tensor.ElementCount();
      const bool cut_alike =
          !state.tensor.shape.empty() &&
          (elements == real || elements == real + group.padding || elements == width);
      const bool is_whole = !state.tensor.shape.empty() && elements == whole_elements;
      if (is_whole && (group.muon || !cut_alike)) {
        RETURN_IF_ERROR(AddRuns(mp, flat, whole, state.key, state.tensor));
      } else if (cut_alike) {
        RETURN_IF_ERROR(AddRuns(mp, flat, runs, state.key, state.tensor));
      } else if (elements == 1) {
        RETURN_IF_ERROR(AddScalar(flat, runs, state));
      } else {
        table_.index().unreadable.push_back(
            {absl::StrFormat("group %d, partition %d, %s", g, partition, state.key),
             absl::StrFormat("has %d elements: neither the %d of its partition nor the %d of the "
                             "parameters in it",
                             elements, width, whole_elements)});
      }
    }
    return absl::OkStatus();
  }

  absl::Status AddRuns(uint32_t mp, const FlatParameters& flat, std::span<const FlatRun> runs,
                       const std::string& key, const StoredTensor& tensor) {
    for (const FlatRun& run : runs) {
      RETURN_IF_ERROR(AddRun(mp, flat, run, flat.names[run.parameter], key, tensor));
    }
    return absl::OkStatus();
  }

  absl::Status AddRun(uint32_t mp, const FlatParameters& flat, const FlatRun& run,
                      const std::string& name, const std::string& key, const StoredTensor& tensor) {
    ASSIGN_OR_RETURN(const ShardMap* shard,
                     model_.ExpertShard(flat.local[run.parameter], flat.names[run.parameter], mp));
    ASSIGN_OR_RETURN(const uint32_t state, table_.State(name, key, tensor.dtype, shard->shape));
    return table_.AddShardRange(state, *shard, run.parameter_begin, tensor, run.buffer_begin,
                                run.count);
  }

  // One number of the whole partition (`step`) is one of each parameter in it.
  absl::Status AddScalar(const FlatParameters& flat, std::span<const FlatRun> runs,
                         const OptimizerState& state) {
    for (const FlatRun& run : runs) {
      ASSIGN_OR_RETURN(const uint32_t number, table_.State(flat.names[run.parameter], state.key,
                                                           state.tensor.dtype, state.tensor.shape));
      RETURN_IF_ERROR(table_.AddWhole(number, state.tensor));
    }
    return absl::OkStatus();
  }

  // Master weights: a state of their own where the model's weights are of another dtype, else the
  // weights themselves.
  absl::Status AddMasters(uint32_t mp, const FlatParameters& flat, std::span<const FlatRun> runs,
                          const StoredTensor& fp32) {
    for (const FlatRun& run : runs) {
      const std::string& name = flat.names[run.parameter];
      const std::optional<Dtype> weights = model_.WeightDtype(name);
      if (weights.has_value() && *weights == fp32.dtype) {
        if (in_files_.contains(name)) continue;
        for (const std::string& alias : model_.NamesOf(name)) {
          RETURN_IF_ERROR(AddRun(mp, flat, run, alias, "param", fp32));
        }
      } else {
        RETURN_IF_ERROR(AddRun(mp, flat, run, name, "fp32", fp32));
        RETURN_IF_ERROR(model_.AddRoundedWeights(name));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadPartitioned(uint32_t mp, const std::vector<OptimizerStates>& ranks) {
    if (ranks[0].partition_groups) {
      return absl::UnimplementedError(
          "ds_zero_partition_groups: ZeRO-3 with expert groups of their own partitions (AutoEP)");
    }
    const uint64_t partitions = ranks[0].partition_count.value_or(ranks.size());
    if (partitions == 0 || partitions > ranks.size() || ranks.size() % partitions != 0) {
      return absl::DataLossError(
          absl::StrFormat("partition_count: expected a divisor of %d data-parallel ranks, found %d",
                          ranks.size(), partitions));
    }
    FlatParameters flat;
    std::vector<uint64_t> sizes;
    for (const std::vector<NamedShape>& group : model_.states(mp).param_shapes) {
      for (const NamedShape& entry : group) {
        flat.local.push_back(entry.name);
        ASSIGN_OR_RETURN(const uint64_t size, ElementCount(entry.shape, entry.name));
        sizes.push_back(size);
      }
    }
    flat.names = flat.local;
    ASSIGN_OR_RETURN(const PartitionedParameters parameters,
                     PartitionedParameters::Create(sizes, static_cast<uint32_t>(partitions)));
    for (uint32_t dp = 0; dp < ranks.size(); ++dp) {
      std::vector<uint64_t> parts;
      uint64_t stored = 0;
      for (const OptimizerStates::Group& group : ranks[dp].groups) {
        parts.push_back(group.fp32.ElementCount());
        stored += parts.back();
      }
      if (stored != parameters.elements_per_rank()) {
        return absl::DataLossError(absl::StrFormat(
            "model-parallel rank %d, data-parallel rank %d: fp32_flat_groups: expected %d elements "
            "for the %d parameters in param_shapes over %d ranks, found %d",
            mp, dp, parameters.elements_per_rank(), sizes.size(), partitions, stored));
      }
      // Ranks of several partition groups (MiCS) hold replicas.
      const auto partition = static_cast<uint32_t>(dp % partitions);
      std::vector<std::vector<FlatRun>> by_part(parts.size());
      for (const PartRun& run : SplitAtParts(parameters.Partition(partition), parts)) {
        by_part[run.part].push_back(run.run);
      }
      for (size_t part = 0; part < parts.size(); ++part) {
        RETURN_IF_ERROR(AddPart(mp, flat, part, by_part[part], ranks[dp].groups[part]));
      }
    }
    return absl::OkStatus();
  }

  absl::Status AddPart(uint32_t mp, const FlatParameters& flat, size_t part,
                       std::span<const FlatRun> runs, const OptimizerStates::Group& group) {
    RETURN_IF_ERROR(AddMasters(mp, flat, runs, group.fp32));
    for (const OptimizerState& state : group.states) {
      const uint64_t elements = state.tensor.ElementCount();
      if (!state.tensor.shape.empty() && elements == group.fp32.ElementCount()) {
        RETURN_IF_ERROR(AddRuns(mp, flat, runs, state.key, state.tensor));
      } else if (elements == 1) {
        RETURN_IF_ERROR(AddScalar(flat, runs, state));
      } else {
        table_.index().unreadable.push_back(
            {absl::StrFormat("sub-group %d, %s", part, state.key),
             absl::StrFormat("has %d elements: not the %d of the sub-group", elements,
                             group.fp32.ElementCount())});
      }
    }
    return absl::OkStatus();
  }

 public:
  // Names whose weights the model files hold: to be called between AddWeights and Read.
  void TakeWeightsInFiles() {
    for (const TensorState& state : table_.index().tensor_states) {
      if (state.state == "param") in_files_.insert(state.tensor);
    }
  }

 private:
  const ForeignFolder& folder_;
  const DeepSpeedFiles& files_;
  DeepSpeedModel& model_;
  PieceTable& table_;
  std::set<std::string> in_files_;
  uint64_t stage_ = 1;
  uint64_t expert_ranks_ = 1;
};

absl::StatusOr<ForeignIndex> ReadNative(const ForeignFolder& folder, const DeepSpeedFiles& files,
                                        const ReadOptions& options) {
  PieceTable table;
  table.index().format = "deepspeed";
  ASSIGN_OR_RETURN(DeepSpeedModel model, DeepSpeedModel::Read(folder, files, options, table));
  RETURN_IF_ERROR(model.AddWeights());
  if (!files.tag.empty()) table.index().layout.push_back({"tag", JsonQuote(files.tag)});
  if (files.optimizers.empty()) {
    if (model.partitioned()) {
      return absl::DataLossError(
          "optimizer states: found none, and the weights of ZeRO-3 are nowhere else");
    }
    table.index().notes.push_back("no optimizer states of ZeRO: weights and buffers only");
    if (model.states(0).has_optimizer) {
      table.index().unreadable.push_back(
          {"optimizer",
           "is the state of an optimizer without ZeRO, whose parameters have no names"});
    }
  } else {
    ZeroReader reader(folder, files, model, table);
    reader.TakeWeightsInFiles();
    RETURN_IF_ERROR(reader.Read());
  }
  for (const auto& [rank, file] : files.expert_optimizers) {
    table.index().unreadable.push_back(
        {folder.files()[file].path,
         "is the optimizer state of experts without ZeRO, which no reader here knows"});
  }
  model.AddAliases();
  model.NameParameterGroups();
  return table.Take();
}

}  // namespace

absl::StatusOr<bool> RecognizesDeepSpeed(const ForeignFolder& folder) {
  return HoldsDeepSpeed(folder) && !HoldsUniversal(folder);
}

absl::StatusOr<ForeignIndex> ReadDeepSpeed(const ForeignFolder& folder,
                                           const ReadOptions& options) {
  ASSIGN_OR_RETURN(const DeepSpeedFiles files, FindDeepSpeedFiles(folder, options.tag));
  if (files.universal) return ReadUniversalFiles(folder, files, options);
  return ReadNative(folder, files, options);
}

absl::StatusOr<ForeignIndex> ReadUniversal(const ForeignFolder& folder,
                                           const ReadOptions& options) {
  ASSIGN_OR_RETURN(const DeepSpeedFiles files, FindDeepSpeedFiles(folder, options.tag));
  if (files.universal) return ReadUniversalFiles(folder, files, options);
  return ReadNative(folder, files, options);
}

}  // namespace holdfast::converter
