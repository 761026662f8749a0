#include "converter/deepspeed_writer.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/deepspeed_output.h"
#include "converter/zero_layout.h"

namespace holdfast::converter {
namespace {

// DeepSpeed's nccl_start_alignment_factor.
constexpr uint64_t kAlignmentFactor = 2;

// One flat buffer, the same on every rank but for what it holds.
struct FlatBuffer {
  size_t group = 0;
  std::vector<const OptimizedParameter*> parameters;      // in the order of the optimizer
  std::vector<const OptimizedParameter*> flat;            // in the order of the buffer
  std::vector<std::string> keys;                          // of states that are cut as the masters
  std::vector<std::pair<std::string, uint32_t>> numbers;  // one for all parameters
  uint64_t elements = 0;       // of all ranks together, without padding at the end (stages 1, 2)
  uint64_t rank_elements = 0;  // of each rank, with padding
  std::function<std::vector<FlatRun>(uint32_t rank)> runs;  // `parameter` is an index into flat
};

class NativePlanner {
 public:
  NativePlanner(ConversionSource& source, const DeepSpeedOutput& output,
                const DeepSpeedWriteOptions& options)
      : source_(source), output_(output), index_(source.index()), options_(options) {}

  absl::StatusOr<TorchFilesPlan> Run() {
    tag_ = absl::StrCat("global_step", index_.has_step ? index_.step : 0);
    for (size_t g = 0; g < output_.groups().size(); ++g) {
      for (std::vector<const OptimizedParameter*>& parameters : SubGroups(g)) {
        RETURN_IF_ERROR(AddBuffer(g, std::move(parameters)));
      }
    }
    for (uint32_t rank = 0; rank < options_.dp && !buffers_.empty(); ++rank) AddOptimizer(rank);
    for (uint32_t rank = 0; rank < (options_.stage == 3 ? options_.dp : 1); ++rank) AddModel(rank);
    plan_.AddText("latest", tag_);
    plan_.left_out = output_.LeftOut();
    plan_.tensor_count = output_.tensor_count();
    return std::move(plan_);
  }

 private:
  // stage3.py, _create_fp16_sub_groups.
  std::vector<std::vector<const OptimizedParameter*>> SubGroups(size_t g) const {
    std::vector<std::vector<const OptimizedParameter*>> all(1);
    const uint64_t most = output_.sub_group_elements();
    uint64_t elements = 0;
    for (const OptimizedParameter& parameter : output_.groups()[g].parameters) {
      if (options_.stage == 3 && elements >= most) {
        all.emplace_back();
        elements = 0;
      }
      all.back().push_back(&parameter);
      elements += (parameter.ElementCount() + options_.dp - 1) / options_.dp;
    }
    return all;
  }

  absl::Status AddBuffer(size_t g, std::vector<const OptimizedParameter*> parameters) {
    FlatBuffer buffer;
    buffer.group = g;
    buffer.parameters = std::move(parameters);
    const bool dealt = options_.stage != 3 && output_.round_robin();
    for (const uint32_t place : RoundRobinOrder(static_cast<uint32_t>(buffer.parameters.size()),
                                                dealt ? static_cast<uint32_t>(options_.dp) : 1)) {
      buffer.flat.push_back(buffer.parameters[place]);
    }
    std::vector<uint64_t> sizes;
    for (const OptimizedParameter* parameter : buffer.flat) {
      sizes.push_back(parameter->ElementCount());
    }
    if (options_.stage == 3) {
      ASSIGN_OR_RETURN(PartitionedParameters parts,
                       PartitionedParameters::Create(sizes, static_cast<uint32_t>(options_.dp)));
      buffer.rank_elements = parts.elements_per_rank();
      buffer.runs = [parts = std::move(parts)](uint32_t rank) { return parts.Partition(rank); };
    } else {
      ASSIGN_OR_RETURN(PackedGroup packed, PackedGroup::Create(sizes, {}));
      const uint64_t unit = kAlignmentFactor * options_.dp;
      buffer.elements = packed.elements();
      buffer.rank_elements = (buffer.elements + unit - 1) / unit * kAlignmentFactor;
      buffer.runs = [packed = std::move(packed), width = buffer.rank_elements](uint32_t rank) {
        return packed.Partition(rank, width);
      };
    }
    RETURN_IF_ERROR(CollectStates(buffer));
    buffers_.push_back(std::move(buffer));
    return absl::OkStatus();
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

  // What `rank` holds of one state of the buffer: its elements, and zeros where padding is.
  std::vector<ElementRange> RangesOf(
      const FlatBuffer& buffer, uint32_t rank,
      const std::function<uint32_t(const OptimizedParameter&)>& number) const {
    std::vector<ElementRange> ranges;
    uint64_t at = 0;
    const auto pad_to = [&](uint64_t end) {
      if (end > at) ranges.push_back({kZeroElements, at, end});
      at = end;
    };
    for (const FlatRun& run : buffer.runs(rank)) {
      pad_to(run.buffer_begin);
      ranges.push_back({number(*buffer.flat[run.parameter]), run.parameter_begin,
                        run.parameter_begin + run.count});
      at += run.count;
    }
    pad_to(buffer.rank_elements);
    return ranges;
  }

  // At the end of a rank's partition (stages 1 and 2).
  uint64_t PaddingOf(const FlatBuffer& buffer, uint32_t rank) const {
    const uint64_t begin = rank * buffer.rank_elements;
    const uint64_t real = std::min(begin + buffer.rank_elements, buffer.elements);
    return buffer.rank_elements - (real - std::min(real, begin));
  }

  void PushState(TorchDraft& draft, uint32_t rank) const {
    TorchPickle& pickle = draft.pickle();
    draft.Key("state");
    pickle.Dict([&] {
      for (size_t b = 0; b < buffers_.size(); ++b) {
        const FlatBuffer& buffer = buffers_[b];
        if (buffer.keys.empty() && buffer.numbers.empty()) continue;
        draft.out().Int(static_cast<int64_t>(b));
        pickle.Dict([&] {
          for (const auto& [key, number] : buffer.numbers) {
            draft.Key(key);
            draft.Whole(number);
          }
          for (const std::string& key : buffer.keys) {
            draft.Key(key);
            const Dtype dtype = index_.tensor_states[*buffer.parameters.front()->Find(key)].dtype;
            draft.Ranges(dtype, std::vector<uint64_t>{buffer.rank_elements},
                         RangesOf(buffer, rank, [&](const OptimizedParameter& parameter) {
                           return *parameter.Find(key);
                         }));
          }
        });
      }
    });
  }

  void PushParamGroups(TorchDraft& draft) const {
    std::vector<std::vector<uint64_t>> numbers(output_.groups().size());
    for (uint64_t b = 0; b < buffers_.size(); ++b) numbers[buffers_[b].group].push_back(b);
    output_.PushParamGroups(draft, numbers);
  }

  static uint32_t MasterOf(const OptimizedParameter& parameter) { return parameter.master; }

  void AddOptimizer(uint32_t rank) {
    const bool bf16 = output_.weight_dtype() == Dtype::kBfloat16;
    TorchDraft draft(index_, absl::StrFormat("%s/%szero_pp_rank_%d_mp_rank_00_optim_states.pt",
                                             tag_, bf16 ? "bf16_" : "", rank));
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

  void PushPacked(TorchDraft& draft, uint32_t rank) const {
    TorchPickle& pickle = draft.pickle();
    draft.Key("base_optimizer_state");
    pickle.Dict([&] {
      PushState(draft, rank);
      PushParamGroups(draft);
    });
    draft.Key("single_partition_of_fp32_groups");
    pickle.List([&] {
      for (const FlatBuffer& buffer : buffers_) {
        std::vector<ElementRange> ranges = RangesOf(buffer, rank, MasterOf);
        // Without the padding at the end, which is the last range.
        if (!ranges.empty() && ranges.back().tensor_state == kZeroElements) ranges.pop_back();
        draft.Ranges(Dtype::kFloat32,
                     std::vector<uint64_t>{buffer.rank_elements - PaddingOf(buffer, rank)},
                     std::move(ranges), /*requires_grad=*/true);
      }
    });
    draft.Key("group_paddings");
    pickle.List([&] {
      for (const FlatBuffer& buffer : buffers_) {
        draft.out().Int(static_cast<int64_t>(PaddingOf(buffer, rank)));
      }
    });
    draft.Key("param_alignment_paddings");
    pickle.List([&] {
      for (const FlatBuffer& buffer : buffers_) {
        pickle.Ints(std::vector<uint64_t>(buffer.flat.size(), 0));
      }
    });
    draft.Key("partition_count");
    pickle.Ints(std::vector<uint64_t>(buffers_.size(), options_.dp));
    draft.Key("ds_version");
    draft.out().String(output_.version());
    draft.Key("param_slice_mappings");
    pickle.List([&] {
      for (const FlatBuffer& buffer : buffers_) {
        pickle.OrderedDict([&] { PushMappings(draft, buffer, rank); });
      }
    });
  }

  void PushMappings(TorchDraft& draft, const FlatBuffer& buffer, uint32_t rank) const {
    for (const FlatRun& run : buffer.runs(rank)) {
      draft.Key(buffer.flat[run.parameter]->name);
      draft.pickle().Object("deepspeed.utils.tensor_fragment", "fragment_address");
      draft.pickle().State([&] {
        draft.Key("numel");
        draft.out().Int(static_cast<int64_t>(run.count));
        draft.Key("start");
        draft.out().Int(static_cast<int64_t>(run.buffer_begin));
      });
    }
  }

  void PushPartitioned(TorchDraft& draft, uint32_t rank) const {
    TorchPickle& pickle = draft.pickle();
    draft.Key("partition_count");
    draft.out().Int(static_cast<int64_t>(options_.dp));
    draft.Key("optimizer_state_dict");
    pickle.Dict([&] {
      PushState(draft, rank);
      PushParamGroups(draft);
    });
    draft.Key("fp32_flat_groups");
    pickle.List([&] {
      for (const FlatBuffer& buffer : buffers_) {
        draft.Ranges(Dtype::kFloat32, std::vector<uint64_t>{buffer.rank_elements},
                     RangesOf(buffer, rank, MasterOf), /*requires_grad=*/true);
      }
    });
  }

  void AddModel(uint32_t rank) {
    TorchDraft draft(
        index_, options_.stage == 3
                    ? absl::StrFormat("%s/zero_pp_rank_%d_mp_rank_00_model_states.pt", tag_, rank)
                    : absl::StrCat(tag_, "/mp_rank_00_model_states.pt"));
    DeepSpeedOutput::FlatNames flat;
    for (const FlatBuffer& buffer : buffers_) flat.push_back(buffer.flat);
    output_.PushModel(
        draft, {.stage = options_.stage, .dp = options_.dp, .rank = rank, .universal = false},
        flat);
    plan_.Add(std::move(draft).Finish());
  }

  ConversionSource& source_;
  const DeepSpeedOutput& output_;
  const ForeignIndex& index_;
  const DeepSpeedWriteOptions& options_;
  std::string tag_;
  std::vector<FlatBuffer> buffers_;
  TorchFilesPlan plan_;
};

}  // namespace

absl::StatusOr<TorchFilesPlan> PlanDeepSpeed(ConversionSource& source,
                                             const DeepSpeedWriteOptions& options) {
  CHECK(options.stage >= 1 && options.stage <= 3);
  CHECK(options.dp >= 1 && options.dp <= kZeroRanksMax);
  ASSIGN_OR_RETURN(const DeepSpeedOutput output,
                   DeepSpeedOutput::Create(source.index(), DeepSpeedOutput::Buffers::kFlat));
  if (options.stage == 3 && output.groups().empty()) {
    return absl::FailedPreconditionError(
        "ZeRO-3 has weights as the optimizer's masters only, and this checkpoint has no optimizer "
        "states: --to zero=1 writes weights");
  }
  return NativePlanner(source, output, options).Run();
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
