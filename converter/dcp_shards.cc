#include "converter/dcp_shards.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "converter/safetensors.h"
#include "converter/shard_pieces.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kShardingInfo = "DCP_SHARDING_INFO";

// "shard-00001-model-00001-of-00002.safetensors".
bool IsShardName(std::string_view name) {
  return name.starts_with("shard-") && name.ends_with(".safetensors");
}

std::vector<uint32_t> ShardsIn(const ForeignFolder& folder) {
  std::vector<uint32_t> files;
  for (const uint32_t file : folder.FilesIn("")) {
    if (IsShardName(folder.files()[file].path)) files.push_back(file);
  }
  return files;
}

// A box of a tensor as one file has it.
struct StoredBox {
  uint32_t file = 0;
  SafetensorsTensor stored;
  std::vector<uint64_t> offsets;
};

struct Whole {
  std::string name = {};
  std::string dtype = {};
  std::vector<uint64_t> shape = {};
  std::vector<StoredBox> boxes = {};
};

class ShardReader {
 public:
  explicit ShardReader(const ForeignFolder& folder) : folder_(folder) {}

  absl::StatusOr<ForeignIndex> Read() {
    const std::vector<uint32_t> files = ShardsIn(folder_);
    for (const uint32_t file : files) RETURN_IF_ERROR(ReadFile(file));
    for (const Whole& whole : wholes_) RETURN_IF_ERROR(AddWhole(whole));
    index_.variant = "safetensors files";
    index_.layout.push_back({"shard files", absl::StrCat(files.size())});
    return std::move(index_);
  }

 private:
  absl::Status ReadFile(uint32_t file) {
    const std::string& path = folder_.files()[file].path;
    ASSIGN_OR_RETURN(SafetensorsHeader header, ReadSafetensorsHeader(folder_, file));
    std::unique_ptr<JsonDocument> document;
    for (const auto& [key, value] : header.metadata) {
      if (key != kShardingInfo) continue;
      auto parsed = JsonDocument::Parse(value);
      if (!parsed.ok()) {
        return absl::DataLossError(
            absl::StrFormat("%s: %s: %s", path, kShardingInfo, parsed.status().message()));
      }
      document = *std::move(parsed);
    }
    for (SafetensorsTensor& tensor : header.tensors) {
      const JsonValue entry =
          document == nullptr ? JsonValue() : document->root().Find(tensor.name);
      RETURN_IF_ERROR(AddBox(file, std::move(tensor), entry));
    }
    return absl::OkStatus();
  }

  absl::Status AddBox(uint32_t file, SafetensorsTensor tensor, const JsonValue& entry) {
    const std::string& path = folder_.files()[file].path;
    const auto broken = [&](const absl::Status& status) {
      return absl::DataLossError(
          absl::StrFormat("%s: %s: %s", path, kShardingInfo, status.message()));
    };
    // Without an entry the file has the whole tensor, as PyTorch's reader takes it.
    std::vector<uint64_t> offsets(tensor.shape.size());
    std::string name = tensor.name;
    if (entry.present()) {
      const auto saved = entry.Get("saved_offsets");
      if (!saved.ok()) return broken(saved.status());
      const auto count = saved->ArraySize();
      if (!count.ok()) return broken(count.status());
      if (*count != offsets.size()) {
        return broken(saved->Mismatch(absl::StrCat(offsets.size(), " offsets")));
      }
      for (size_t d = 0; d < *count; ++d) {
        const auto offset = (*saved)[d].Uint64();
        if (!offset.ok()) return broken(offset.status());
        if (*offset > kTensorBytesMax || tensor.shape[d] > kTensorBytesMax) {
          return broken((*saved)[d].Mismatch(absl::StrCat("at most ", kTensorBytesMax)));
        }
        offsets[d] = *offset;
      }
      // Newer versions store several boxes of a tensor under keys that differ from its name.
      if (const JsonValue logical = entry.Find("logical_fqn"); logical.present()) {
        const auto text = logical.String();
        if (!text.ok()) return broken(text.status());
        name = *text;
      }
    }
    const auto [known, added] = number_of_.try_emplace(name, wholes_.size());
    if (added) {
      wholes_.push_back({.name = name,
                         .dtype = tensor.dtype,
                         .shape = std::vector<uint64_t>(tensor.shape.size())});
    }
    Whole& whole = wholes_[known->second];
    if (whole.dtype != tensor.dtype || whole.shape.size() != tensor.shape.size()) {
      return absl::DataLossError(absl::StrFormat(
          "%s: %s: expected dtype %s and %d dimensions, as another file has, found %s and %d", path,
          JsonQuote(name), whole.dtype, whole.shape.size(), tensor.dtype, tensor.shape.size()));
    }
    for (size_t d = 0; d < offsets.size(); ++d) {
      whole.shape[d] = std::max(whole.shape[d], offsets[d] + tensor.shape[d]);
    }
    whole.boxes.push_back({file, std::move(tensor), std::move(offsets)});
    return absl::OkStatus();
  }

  absl::Status AddWhole(const Whole& whole) {
    const std::optional<Dtype> dtype = DtypeOfSafetensors(whole.dtype);
    // Two float4 are one element, so that boxes of them would have to be counted in halves.
    if (!dtype.has_value() || dtype == Dtype::kFloat4E2m1fnX2) {
      index_.unreadable.push_back({whole.name, absl::StrCat("is in boxes of dtype ", whole.dtype)});
      return absl::OkStatus();
    }
    if (whole.shape.size() > kTensorDimsMax) {
      return absl::ResourceExhaustedError(absl::StrFormat("%s: expected at most %d dimensions",
                                                          JsonQuote(whole.name), kTensorDimsMax));
    }
    RETURN_IF_ERROR(CheckShape(kShardingInfo, {whole.name, "param", *dtype, whole.shape}));
    const uint32_t state = index_.AddState({whole.name, "param", *dtype, whole.shape});
    for (const StoredBox& box : whole.boxes) {
      if (box.stored.bytes == 0) continue;
      ForeignPiece piece;
      piece.piece = {
          .tensor_state = state, .begin = 0, .end = box.stored.bytes / ElementBytes(*dtype)};
      if (box.stored.shape != whole.shape) {
        piece.piece.box = index_.boxes.Add(box.offsets, box.stored.shape);
        piece.piece = AsRange(piece.piece, index_.tensor_states[state], index_.boxes);
      }
      piece.extent = index_.AddRaw(box.file, box.stored.offset_bytes, box.stored.bytes);
      index_.pieces.push_back(piece);
    }
    return absl::OkStatus();
  }

  const ForeignFolder& folder_;
  std::vector<Whole> wholes_;
  std::unordered_map<std::string, size_t> number_of_;  // by name
  ForeignIndex index_;
};

}  // namespace

bool HoldsDcpShards(const ForeignFolder& folder) {
  return !folder.single_file() && !ShardsIn(folder).empty();
}

absl::StatusOr<ForeignIndex> ReadDcpShards(const ForeignFolder& folder) {
  return ShardReader(folder).Read();
}

}  // namespace holdfast::converter
