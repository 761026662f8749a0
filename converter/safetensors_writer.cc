#include "converter/safetensors_writer.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "converter/non_tensors.h"
#include "converter/optimizer_groups.h"
#include "converter/safetensors.h"

namespace holdfast::converter {
namespace {

// Far below the library's limit; names of 4096 bytes and their numbers fit many times.
constexpr uint64_t kHeaderBytesMax = 90'000'000;
constexpr size_t kAlignmentBytes = 8;

class Planner {
 public:
  Planner(const ForeignIndex& index, const SafetensorsExportOptions& options)
      : index_(index), options_(options) {}

  absl::StatusOr<SafetensorsPlan> Run() {
    std::set<uint32_t> aliases;
    for (const Alias& alias : index_.aliases) {
      if (!IsWeightState(index_.tensor_states[alias.tensor_state].state)) continue;
      if (aliases.contains(alias.of)) continue;  // a chain: its end is written
      aliases.insert(alias.tensor_state);
      tied_.emplace_back(index_.tensor_states[alias.tensor_state].tensor,
                         index_.tensor_states[alias.of].tensor);
    }
    for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
      const TensorState& state = index_.tensor_states[i];
      if (!IsWeightState(state.state)) return Refuse(state);
      if (!aliases.contains(i)) RETURN_IF_ERROR(Add(i));
    }
    plan_.left_out = NonTensorsWithoutPlace(index_, [](const Fact&) { return false; });
    Close();
    NameShards();
    return std::move(plan_);
  }

 private:
  static absl::Status Refuse(const TensorState& state) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: safetensors holds weights, and has no place for the state \"%s\"; --drop %s leaves it "
        "out, --drop '*' all that are no weights",
        Describe(state), state.state, state.state));
  }

  absl::Status Add(uint32_t number) {
    const TensorState& state = index_.tensor_states[number];
    if (!SafetensorsDtype(state.dtype).has_value()) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: safetensors has no dtype for %s", Describe(state), DtypeName(state.dtype)));
    }
    if (state.tensor == "__metadata__") {
      return absl::FailedPreconditionError(
          "a tensor is called __metadata__, which safetensors keeps for itself");
    }
    if (const auto [place, is_new] = names_.emplace(state.tensor, number); !is_new) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: the weights have two tensors of this name (%s and %s); --drop one of the states",
          Describe(state), index_.tensor_states[place->second].state, state.state));
    }
    const uint64_t header_bytes =
        2 * JsonQuote(state.tensor).size() + 24 * state.shape.size() + 128;
    const bool full =
        shard_bytes_ > 0 &&
        state.Bytes() > options_.shard_bytes - std::min(shard_bytes_, options_.shard_bytes);
    if (full || header_bytes_ + header_bytes > kHeaderBytesMax) Close();
    shard_.push_back(number);
    shard_bytes_ += state.Bytes();
    header_bytes_ += header_bytes;
    return absl::OkStatus();
  }

  // The reference writer's order: the widest first, so that all are aligned; then by name.
  void Close() {
    if (shard_.empty() && !plan_.shards.empty()) return;
    std::sort(shard_.begin(), shard_.end(), [&](uint32_t a, uint32_t b) {
      const TensorState& x = index_.tensor_states[a];
      const TensorState& y = index_.tensor_states[b];
      const uint64_t x_bytes = ElementBytes(x.dtype);
      const uint64_t y_bytes = ElementBytes(y.dtype);
      if (x_bytes != y_bytes) return x_bytes > y_bytes;
      return std::pair(y.dtype, std::string_view(x.tensor)) <
             std::pair(x.dtype, std::string_view(y.tensor));
    });
    SafetensorsShard shard;
    std::string json = R"({"__metadata__":{"format":"pt")";
    if (plan_.shards.empty()) {
      for (const auto& [dropped, kept] : tied_) {
        absl::StrAppend(&json, ",", JsonQuote(dropped), ":", JsonQuote(kept));
      }
    }
    json += "}";
    uint64_t offset = 0;
    for (const uint32_t number : shard_) {
      const TensorState& state = index_.tensor_states[number];
      std::vector<uint64_t> shape = state.shape;
      if (state.dtype == Dtype::kFloat4E2m1fnX2 && !shape.empty()) shape.back() *= 2;
      absl::StrAppendFormat(&json, ",%s:{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%d,%d]}",
                            JsonQuote(state.tensor), *SafetensorsDtype(state.dtype),
                            absl::StrJoin(shape, ","), offset, offset + state.Bytes());
      offset += state.Bytes();
    }
    json += "}";
    json.resize((json.size() + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes, ' ');
    for (size_t i = 0; i < 8; ++i) shard.header += static_cast<char>(json.size() >> (8 * i));
    shard.header += json;
    shard.bytes = shard.header.size() + offset;
    shard.states = std::move(shard_);
    plan_.shards.push_back(std::move(shard));
    shard_.clear();
    shard_bytes_ = 0;
    header_bytes_ = 0;
  }

  void NameShards() {
    if (plan_.shards.size() == 1) {
      plan_.shards[0].name = "model.safetensors";
      plan_.bytes = plan_.shards[0].bytes;
      return;
    }
    uint64_t total = 0;
    std::map<std::string_view, std::string_view> weight_map;
    for (size_t i = 0; i < plan_.shards.size(); ++i) {
      SafetensorsShard& shard = plan_.shards[i];
      shard.name = absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, plan_.shards.size());
      plan_.bytes += shard.bytes;
      total += shard.bytes - shard.header.size();
      for (const uint32_t number : shard.states) {
        weight_map[index_.tensor_states[number].tensor] = shard.name;
      }
    }
    plan_.index_json = absl::StrFormat(
        "{\n  \"metadata\": {\n    \"total_size\": %d\n  },\n  \"weight_map\": {", total);
    const char* separator = "\n";
    for (const auto& [tensor, file] : weight_map) {
      absl::StrAppend(&plan_.index_json, separator, "    ", JsonQuote(tensor), ": ",
                      JsonQuote(file));
      separator = ",\n";
    }
    plan_.index_json += "\n  }\n}\n";
    plan_.bytes += plan_.index_json.size();
  }

  const ForeignIndex& index_;
  const SafetensorsExportOptions& options_;
  SafetensorsPlan plan_;
  std::map<std::string_view, uint32_t> names_;
  std::vector<std::pair<std::string, std::string>> tied_;
  std::vector<uint32_t> shard_;
  uint64_t shard_bytes_ = 0;
  uint64_t header_bytes_ = 0;
};

}  // namespace

absl::StatusOr<SafetensorsPlan> PlanSafetensors(const ForeignIndex& index,
                                                const SafetensorsExportOptions& options) {
  return Planner(index, options).Run();
}

absl::Status WriteSafetensors(FileSystem& file_system, const std::string& directory,
                              ConversionSource& source, const SafetensorsPlan& plan,
                              const ConversionProgress& progress) {
  OutputFiles files(file_system, directory, plan.bytes, progress);
  for (const SafetensorsShard& shard : plan.shards) {
    RETURN_IF_ERROR(files.Open(shard.name));
    RETURN_IF_ERROR(files.Append(shard.header));
    for (const uint32_t number : shard.states) {
      RETURN_IF_ERROR(source.Read(
          number, [&](std::span<const std::byte> bytes) { return files.Append(bytes); }));
    }
    RETURN_IF_ERROR(files.Close());
  }
  if (!plan.index_json.empty()) {
    RETURN_IF_ERROR(files.WriteWhole(kSafetensorsIndexName, plan.index_json));
  }
  return files.Finish();
}

}  // namespace holdfast::converter
