#include "converter/deepspeed_writer.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/deepspeed_experts.h"
#include "converter/deepspeed_output.h"
#include "converter/deepspeed_ranks.h"
#include "converter/zero_layout.h"

namespace holdfast::converter {
namespace {

// DeepSpeed's nccl_start_alignment_factor.
constexpr uint64_t kAlignmentFactor = 2;

// One flat buffer of a pipeline stage, the same on all of its ranks but for what it holds.
struct FlatBuffer {
  size_t group = 0;
  bool of_experts = false;                            // then of those that have the same experts
  uint64_t partitions = 1;                            // ranks that share it
  std::vector<const OptimizedParameter*> parameters;  // in the order of the optimizer
  std::vector<const OptimizedParameter*> flat;        // in the order of the buffer
  std::vector<std::string> keys;                      // of states that are cut as the masters
  std::vector<std::pair<std::string, uint32_t>> numbers;  // one for all parameters
  uint64_t elements = 0;       // of all ranks together, without padding at the end (stages 1, 2)
  uint64_t rank_elements = 0;  // of each rank, with padding
  // Of the masters; and of the states, which of Muon are whole parameters. FlatRun::parameter is an
  // index into flat.
  std::function<std::vector<FlatRun>(uint32_t partition)> runs;
  std::function<std::vector<FlatRun>(uint32_t partition)> state_runs;
};
using StageBuffers = std::vector<FlatBuffer>;

// One rank of the job: pipeline stage, tensor-parallel rank, data-parallel rank.
struct JobRank {
  uint64_t stage = 0;
  uint64_t tensor = 0;
  uint32_t data = 0;
};

class NativePlanner {
 public:
  NativePlanner(ConversionSource& source, const DeepSpeedOutput& output,
                const DeepSpeedRanks& ranks, const DeepSpeedExperts& experts,
                const DeepSpeedWriteOptions& options)
      : source_(source),
        output_(output),
        ranks_(ranks),
        experts_(experts),
        index_(source.index()),
        options_(options) {}

  absl::StatusOr<TorchFilesPlan> Run() {
    tag_ = absl::StrCat("global_step", index_.has_step ? index_.step : 0);
    for (uint64_t stage = 0; stage < ranks_.stages(); ++stage) {
      for (uint64_t expert = 0; expert < experts_.grid().expert_ranks; ++expert) {
        RETURN_IF_ERROR(MakeBuffers(stage, expert));
      }
    }
    ForEachModelRank([this](JobRank rank) {
      if (output_.groups().empty()) return;
      for (rank.data = 0; rank.data < options_.dp; ++rank.data) AddOptimizer(rank);
    });
    for (const DeepSpeedRanks::Layer& layer : ranks_.layers()) {
      for (uint64_t tensor = 0; tensor < ranks_.tensor_ranks(); ++tensor) AddLayer(layer, tensor);
    }
    for (size_t l = 0; l < experts_.layers().size(); ++l) AddExperts(l);
    ForEachModelRank([this](JobRank rank) {
      const uint64_t files = options_.stage == 3 ? options_.dp : 1;
      for (rank.data = 0; rank.data < files; ++rank.data) AddModel(rank);
    });
    plan_.AddText("latest", tag_);
    plan_.left_out = output_.LeftOut();
    plan_.tensor_count = output_.tensor_count();
    return std::move(plan_);
  }

 private:
  template <typename Function>
  void ForEachModelRank(const Function& function) {
    for (uint64_t stage = 0; stage < ranks_.stages(); ++stage) {
      for (uint64_t tensor = 0; tensor < ranks_.tensor_ranks(); ++tensor) {
        function(JobRank{.stage = stage, .tensor = tensor});
      }
    }
  }
  std::string ModelRankName(const JobRank& rank) const {
    return absl::StrFormat("mp_rank_%02d", rank.stage * ranks_.tensor_ranks() + rank.tensor);
  }

  absl::Status MakeBuffers(uint64_t stage, uint64_t expert_rank) {
    StageBuffers& buffers = buffers_.emplace_back();
    for (size_t g = 0; g < output_.groups().size(); ++g) {
      for (std::vector<const OptimizedParameter*>& parameters : SubGroups(g, stage, expert_rank)) {
        ASSIGN_OR_RETURN(FlatBuffer buffer, MakeBuffer(g, std::move(parameters)));
        buffers.push_back(std::move(buffer));
      }
    }
    return absl::OkStatus();
  }

  const StageBuffers& BuffersOf(const JobRank& rank) const {
    const ExpertGrid& grid = experts_.grid();
    return buffers_[rank.stage * grid.expert_ranks + grid.ExpertRank(rank.data)];
  }
  uint32_t PartitionOf(const FlatBuffer& buffer, const JobRank& rank) const {
    return buffer.of_experts ? static_cast<uint32_t>(experts_.grid().Partition(rank.data))
                             : rank.data;
  }

  // stage3.py, _create_fp16_sub_groups.
  std::vector<std::vector<const OptimizedParameter*>> SubGroups(size_t g, uint64_t stage,
                                                                uint64_t expert_rank) const {
    std::vector<std::vector<const OptimizedParameter*>> all(1);
    const uint64_t most = output_.sub_group_elements();
    uint64_t elements = 0;
    for (const auto* parameter : experts_.OfRank(output_.groups()[g], expert_rank)) {
      if (!ranks_.Has(parameter->weight, stage)) continue;
      if (options_.stage == 3 && elements >= most) {
        all.emplace_back();
        elements = 0;
      }
      all.back().push_back(parameter);
      elements += (ranks_.ElementCount(parameter->weight) + options_.dp - 1) / options_.dp;
    }
    return all;
  }

  absl::StatusOr<FlatBuffer> MakeBuffer(size_t g,
                                        std::vector<const OptimizedParameter*> parameters) {
    FlatBuffer buffer;
    buffer.group = g;
    buffer.of_experts = output_.groups()[g].Has(kOfExperts);
    buffer.partitions = buffer.of_experts ? experts_.grid().Partitions() : options_.dp;
    buffer.parameters = std::move(parameters);
    const bool dealt = options_.stage != 3 && output_.round_robin();
    for (const uint32_t place :
         RoundRobinOrder(static_cast<uint32_t>(buffer.parameters.size()),
                         dealt ? static_cast<uint32_t>(buffer.partitions) : 1)) {
      buffer.flat.push_back(buffer.parameters[place]);
    }
    std::vector<uint64_t> sizes;
    for (const OptimizedParameter* parameter : buffer.flat) {
      sizes.push_back(ranks_.ElementCount(parameter->weight));
    }
    if (options_.stage == 3) {
      ASSIGN_OR_RETURN(PartitionedParameters parts,
                       PartitionedParameters::Create(sizes, static_cast<uint32_t>(options_.dp)));
      buffer.rank_elements = parts.elements_per_rank();
      buffer.runs = [parts = std::move(parts)](uint32_t partition) {
        return parts.Partition(partition);
      };
      buffer.state_runs = buffer.runs;
    } else {
      ASSIGN_OR_RETURN(PackedGroup packed, PackedGroup::Create(sizes, {}));
      const uint64_t unit = kAlignmentFactor * buffer.partitions;
      buffer.elements = packed.elements();
      buffer.rank_elements = (buffer.elements + unit - 1) / unit * kAlignmentFactor;
      const uint64_t width = buffer.rank_elements;
      buffer.runs = [packed, width](uint32_t partition) {
        return packed.Partition(partition, width);
      };
      buffer.state_runs = buffer.runs;
      if (IsMuon(buffer)) {
        buffer.state_runs = [packed, width](uint32_t partition) {
          return packed.WholeParameters(partition, width);
        };
      }
    }
    RETURN_IF_ERROR(CollectStates(buffer));
    return buffer;
  }

  absl::Status CollectStates(FlatBuffer& buffer) {
    if (buffer.parameters.empty()) return absl::OkStatus();
    const OptimizedParameter& first = *buffer.parameters.front();
    for (const OptimizedParameter* parameter : buffer.parameters) {
      if (parameter->states.size() != first.states.size() ||
          parameter->numbers.size() != first.numbers.size()) {
        return Uneven(first, *parameter);
      }
    }
    for (const auto& [key, number] : first.states) {
      const Dtype dtype = index_.tensor_states[number].dtype;
      for (const OptimizedParameter* parameter : buffer.parameters) {
        const std::optional<uint32_t> other = parameter->Find(key);
        if (!other.has_value()) return Uneven(first, *parameter);
        if (index_.tensor_states[*other].dtype != dtype) {
          return absl::FailedPreconditionError(absl::StrFormat(
              "%s: expected %s, as the other parameters of its group have, found %s; --dtype %s=%s",
              Describe(index_.tensor_states[*other]), DtypeName(dtype),
              DtypeName(index_.tensor_states[*other].dtype), key, DtypeName(dtype)));
        }
      }
      buffer.keys.push_back(key);
    }
    for (const auto& [key, number] : first.numbers) {
      ASSIGN_OR_RETURN(const std::string value, Number(number));
      for (const OptimizedParameter* parameter : buffer.parameters) {
        const std::optional<uint32_t> other = parameter->Find(key);
        if (!other.has_value()) return Uneven(first, *parameter);
        ASSIGN_OR_RETURN(const std::string found, Number(*other));
        if (found != value) {
          return absl::FailedPreconditionError(absl::StrFormat(
              "%s: a flat buffer has one %s for all of its parameters, and that of \"%s\" is "
              "another",
              Describe(index_.tensor_states[*other]), key, first.name));
        }
      }
      buffer.numbers.emplace_back(key, number);
    }
    return absl::OkStatus();
  }

  bool IsMuon(const FlatBuffer& buffer) const {
    return output_.groups()[buffer.group].Has(kUsesMuon);
  }

  static absl::Status Uneven(const OptimizedParameter& a, const OptimizedParameter& b) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "parameters \"%s\" and \"%s\" share a flat buffer, and have not the same optimizer states",
        a.name, b.name));
  }

  // Dtype and bytes of a single number.
  absl::StatusOr<std::string> Number(uint32_t number) {
    std::string bytes(DtypeName(index_.tensor_states[number].dtype));
    RETURN_IF_ERROR(source_.Read(number, [&](std::span<const std::byte> read) {
      bytes.append(reinterpret_cast<const char*>(read.data()), read.size());
      return absl::OkStatus();
    }));
    return bytes;
  }

  // Elements of `runs`, and zeros where padding is, up to `elements` in all. Zeros at the end are
  // the last range.
  using NumberOf = std::function<uint32_t(const OptimizedParameter&)>;
  std::vector<ElementRange> RangesOf(const FlatBuffer& buffer, const JobRank& rank,
                                     std::span<const FlatRun> runs, uint64_t elements,
                                     const NumberOf& number) const {
    std::vector<ElementRange> ranges;
    uint64_t at = 0;
    const auto pad_to = [&](uint64_t end) {
      if (end > at) ranges.push_back({kZeroElements, at, end});
      at = end;
    };
    for (const FlatRun& run : runs) {
      pad_to(run.buffer_begin);
      const OptimizedParameter& parameter = *buffer.flat[run.parameter];
      ranks_.Append(parameter.weight, number(parameter), rank.tensor, run.parameter_begin,
                    run.parameter_begin + run.count, ranges);
      at += run.count;
    }
    pad_to(elements);
    return ranges;
  }

  std::vector<ElementRange> MastersOf(const FlatBuffer& buffer, const JobRank& rank) const {
    return RangesOf(buffer, rank, buffer.runs(PartitionOf(buffer, rank)), buffer.rank_elements,
                    [](const OptimizedParameter& parameter) { return parameter.master; });
  }

  // At the end of a rank's partition (stages 1 and 2).
  uint64_t PaddingOf(const FlatBuffer& buffer, const JobRank& rank) const {
    const uint64_t begin = PartitionOf(buffer, rank) * buffer.rank_elements;
    const uint64_t real = std::min(begin + buffer.rank_elements, buffer.elements);
    return buffer.rank_elements - (real - std::min(real, begin));
  }

  void PushState(TorchDraft& draft, const JobRank& rank) const {
    draft.Key("state");
    draft.pickle().Dict([&] {
      const StageBuffers& buffers = BuffersOf(rank);
      for (size_t b = 0; b < buffers.size(); ++b) PushStateOf(draft, buffers[b], b, rank);
    });
  }

  // Of one flat buffer; nothing where it has none.
  void PushStateOf(TorchDraft& draft, const FlatBuffer& buffer, size_t number,
                   const JobRank& rank) const {
    const std::vector<FlatRun> runs = buffer.state_runs(PartitionOf(buffer, rank));
    uint64_t elements = buffer.rank_elements;
    if (IsMuon(buffer)) {
      elements = 0;
      for (const FlatRun& run : runs) elements += run.count;
      if (elements == 0) return;
    }
    if (buffer.keys.empty() && buffer.numbers.empty()) return;
    draft.out().Int(static_cast<int64_t>(number));
    draft.pickle().Dict([&] {
      for (const auto& [key, state] : buffer.numbers) {
        draft.Key(key);
        draft.Whole(state);
      }
      for (const std::string& key : buffer.keys) {
        draft.Key(key);
        const Dtype dtype = index_.tensor_states[*buffer.parameters.front()->Find(key)].dtype;
        draft.Ranges(
            dtype, std::vector<uint64_t>{elements},
            RangesOf(buffer, rank, runs, elements,
                     [&](const OptimizedParameter& parameter) { return *parameter.Find(key); }));
      }
    });
  }

  void PushParamGroups(TorchDraft& draft, const JobRank& rank) const {
    std::vector<std::vector<uint64_t>> numbers(output_.groups().size());
    const StageBuffers& buffers = BuffersOf(rank);
    for (uint64_t b = 0; b < buffers.size(); ++b) numbers[buffers[b].group].push_back(b);
    output_.PushParamGroups(draft, numbers, experts_.grid().expert_ranks);
  }

  void AddOptimizer(const JobRank& rank) {
    const bool bf16 = output_.weight_dtype() == Dtype::kBfloat16;
    TorchDraft draft(index_, absl::StrFormat("%s/%szero_pp_rank_%d_%s_optim_states.pt", tag_,
                                             bf16 ? "bf16_" : "", rank.data, ModelRankName(rank)));
    draft.pickle().Dict([&] {
      draft.Key("optimizer_state_dict");
      draft.pickle().Dict([&] {
        output_.PushOptimizerFacts(draft, options_.stage);
        if (options_.stage == 3) {
          PushPartitioned(draft, rank);
        } else {
          PushPacked(draft, rank);
        }
      });
      output_.PushConfiguration(draft, options_.stage);
    });
    plan_.Add(std::move(draft).Finish());
  }

  void PushPacked(TorchDraft& draft, const JobRank& rank) const {
    TorchPickle& pickle = draft.pickle();
    draft.Key("base_optimizer_state");
    pickle.Dict([&] {
      PushState(draft, rank);
      PushParamGroups(draft, rank);
    });
    draft.Key("single_partition_of_fp32_groups");
    pickle.List([&] {
      for (const FlatBuffer& buffer : BuffersOf(rank)) {
        std::vector<ElementRange> ranges = MastersOf(buffer, rank);
        // Without the padding at the end.
        if (PaddingOf(buffer, rank) > 0) ranges.pop_back();
        draft.Ranges(Dtype::kFloat32,
                     std::vector<uint64_t>{buffer.rank_elements - PaddingOf(buffer, rank)},
                     std::move(ranges), /*requires_grad=*/true);
      }
    });
    draft.Key("group_paddings");
    pickle.List([&] {
      for (const FlatBuffer& buffer : BuffersOf(rank)) {
        draft.out().Int(static_cast<int64_t>(PaddingOf(buffer, rank)));
      }
    });
    draft.Key("param_alignment_paddings");
    pickle.List([&] {
      for (const FlatBuffer& buffer : BuffersOf(rank)) {
        pickle.Ints(std::vector<uint64_t>(buffer.flat.size(), 0));
      }
    });
    draft.Key("partition_count");
    pickle.List([&] {
      for (const FlatBuffer& buffer : BuffersOf(rank)) {
        draft.out().Int(static_cast<int64_t>(buffer.partitions));
      }
    });
    draft.Key("ds_version");
    draft.out().String(output_.version());
    draft.Key("param_slice_mappings");
    pickle.List([&] {
      for (const FlatBuffer& buffer : BuffersOf(rank)) {
        pickle.OrderedDict([&] { PushMappings(draft, buffer, rank); });
      }
    });
  }

  void PushMappings(TorchDraft& draft, const FlatBuffer& buffer, const JobRank& rank) const {
    for (const FlatRun& run : buffer.runs(PartitionOf(buffer, rank))) {
      draft.Key(experts_.LocalName(buffer.flat[run.parameter]->name));
      draft.pickle().Object("deepspeed.utils.tensor_fragment", "fragment_address");
      draft.pickle().State([&] {
        draft.Key("numel");
        draft.out().Int(static_cast<int64_t>(run.count));
        draft.Key("start");
        draft.out().Int(static_cast<int64_t>(run.buffer_begin));
      });
    }
  }

  void PushPartitioned(TorchDraft& draft, const JobRank& rank) const {
    TorchPickle& pickle = draft.pickle();
    draft.Key("partition_count");
    draft.out().Int(static_cast<int64_t>(options_.dp));
    draft.Key("optimizer_state_dict");
    pickle.Dict([&] {
      PushState(draft, rank);
      PushParamGroups(draft, rank);
    });
    draft.Key("fp32_flat_groups");
    pickle.List([&] {
      for (const FlatBuffer& buffer : BuffersOf(rank)) {
        draft.Ranges(Dtype::kFloat32, std::vector<uint64_t>{buffer.rank_elements},
                     MastersOf(buffer, rank), /*requires_grad=*/true);
      }
    });
  }

  // The weights of one layer, as its module calls them.
  void AddLayer(const DeepSpeedRanks::Layer& layer, uint64_t tensor_rank) {
    // A job without the axis of tensor parallelism has no name for it, and finds either.
    std::string axis;
    if (ranks_.tensor_ranks() > 1) axis = absl::StrFormat("-model_%02d", tensor_rank);
    TorchDraft draft(index_,
                     absl::StrFormat("%s/layer_%02d%s-model_states.pt", tag_, layer.number, axis));
    DeepSpeedRanks::Storages storages;
    draft.pickle().OrderedDict([&] {
      for (const auto& [name, weight] : layer.weights) {
        draft.Key(name);
        ranks_.Push(weight, tensor_rank, draft, storages);
      }
    });
    plan_.Add(std::move(draft).Finish());
  }

  // A file for each expert of a layer, under the names that all ranks have.
  void AddExperts(size_t layer) {
    const DeepSpeedExperts::Layer& experts = experts_.layers()[layer];
    for (size_t number = 0; number < experts.size(); ++number) {
      TorchDraft draft(index_, absl::StrFormat("%s/layer_%d_expert_%d_mp_rank_00_model_states.pt",
                                               tag_, layer, number));
      draft.pickle().Dict([&] {
        for (const uint32_t weight : experts[number]) {
          draft.Key(index_.tensor_states[weight].tensor);
          draft.Whole(weight);
        }
      });
      plan_.Add(std::move(draft).Finish());
    }
  }

  void AddModel(const JobRank& rank) {
    const std::string partition =
        options_.stage == 3 ? absl::StrFormat("zero_pp_rank_%d_", rank.data) : "";
    TorchDraft draft(
        index_, absl::StrFormat("%s/%s%s_model_states.pt", tag_, partition, ModelRankName(rank)));
    DeepSpeedOutput::FlatNames flat;
    for (const FlatBuffer& buffer : BuffersOf(rank)) {
      flat.emplace_back();
      for (const OptimizedParameter* parameter : buffer.flat) {
        flat.back().push_back({experts_.LocalName(parameter->name), parameter});
      }
    }
    output_.PushModel(draft,
                      {.ranks = ranks_,
                       .stage = options_.stage,
                       .dp = options_.dp,
                       .rank = rank.data,
                       .tensor_rank = rank.tensor,
                       .pipeline_stage = rank.stage,
                       .expert_counts = experts_.Counts(),
                       .expert_buffers = experts_.BuffersOfRank(0)},
                      flat);
    plan_.Add(std::move(draft).Finish());
  }

  ConversionSource& source_;
  const DeepSpeedOutput& output_;
  const DeepSpeedRanks& ranks_;
  const DeepSpeedExperts& experts_;
  const ForeignIndex& index_;
  const DeepSpeedWriteOptions& options_;
  std::string tag_;
  std::vector<StageBuffers> buffers_;  // by pipeline stage and expert-parallel rank
  TorchFilesPlan plan_;
};

}  // namespace

absl::StatusOr<TorchFilesPlan> PlanDeepSpeed(ConversionSource& source,
                                             const DeepSpeedWriteOptions& options) {
  CHECK(options.stage >= 1 && options.stage <= 3);
  CHECK(options.dp >= 1 && options.dp <= kZeroRanksMax);
  CHECK(options.stage == 1 || !options.degrees.pipeline.has_value());
  ASSIGN_OR_RETURN(const DeepSpeedOutput output,
                   DeepSpeedOutput::Create(source.index(), DeepSpeedOutput::Buffers::kFlat));
  if (options.stage == 3 && output.groups().empty()) {
    return absl::FailedPreconditionError(
        "ZeRO-3 has weights as the optimizer's masters only, and this checkpoint has no optimizer "
        "states: --to zero=1 writes weights");
  }
  const auto is_muon = [](const OptimizedGroup& group) { return group.Has(kUsesMuon); };
  if (options.stage == 3 && std::ranges::any_of(output.groups(), is_muon)) {
    return absl::FailedPreconditionError(
        "the optimizer is Muon, whose momentum ZeRO-3 has in a way of its own: --to zero=1 or "
        "zero=2 writes it");
  }
  ASSIGN_OR_RETURN(const DeepSpeedRanks ranks, DeepSpeedRanks::Create(output, options.degrees));
  const ExpertGrid grid{.data_ranks = options.dp,
                        .expert_ranks = options.ep,
                        .data_first = output.data_before_experts()};
  ASSIGN_OR_RETURN(const DeepSpeedExperts experts, DeepSpeedExperts::Create(output, grid));
  if (!experts.layers().empty() && (options.stage == 3 || ranks.says_info())) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: experts of DeepSpeed's are written for ZeRO-1 and ZeRO-2, without tp and pp",
        Describe(output.index().tensor_states[experts.layers()[0][0][0]])));
  }
  return NativePlanner(source, output, ranks, experts, options).Run();
}

absl::Status CheckWeightsAreMasters(ConversionSource& source) {
  ASSIGN_OR_RETURN(const DeepSpeedOutput output,
                   DeepSpeedOutput::Create(source.index(), DeepSpeedOutput::Buffers::kNone));
  for (const OptimizedGroup& group : output.groups()) {
    for (const OptimizedParameter& parameter : group.parameters) {
      RETURN_IF_ERROR(output.CheckWeightIsMaster(source, parameter));
    }
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
