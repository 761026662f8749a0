#include "converter/layout_file.h"

#include <array>
#include <memory>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "converter/pipeline_stages.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

constexpr std::string_view kReplicated = "replicated";

// A size of a tensor: sums of kLayoutBlocksMax of them do not overflow.
absl::StatusOr<uint64_t> ReadSize(const JsonValue& value) {
  constexpr uint64_t kMax = kTensorBytesMax / kLayoutBlocksMax;
  ASSIGN_OR_RETURN(const uint64_t size, value.Uint64());
  if (size == 0 || size > kMax) return value.Mismatch(absl::StrCat("a size from 1 to ", kMax));
  return size;
}

absl::Status ReadCut(const JsonValue& cut, ShardRule& rule) {
  if (cut.type() == JsonValue::Type::kString) {
    ASSIGN_OR_RETURN(const std::string_view word, cut.String());
    if (word == kReplicated) return absl::OkStatus();
    const std::array<std::string_view, 1> known = {kReplicated};
    const absl::Status wrong = cut.Mismatch("a dimension or \"replicated\"");
    return absl::Status(wrong.code(), absl::StrCat(wrong.message(), DidYouMean(word, known)));
  }
  ASSIGN_OR_RETURN(const uint64_t dimension, cut.Uint64());
  if (dimension >= kTensorDimsMax) {
    return cut.Mismatch(absl::StrCat("a dimension below ", kTensorDimsMax));
  }
  rule.dimension = dimension;
  return absl::OkStatus();
}

absl::Status ReadBlocks(const JsonValue& blocks, ShardRule& rule) {
  if (!rule.dimension.has_value()) return blocks.Mismatch("no blocks of what is replicated");
  if (blocks.type() != JsonValue::Type::kArray) {
    ASSIGN_OR_RETURN(rule.equal_blocks, ReadSize(blocks));
    if (rule.equal_blocks > kLayoutBlocksMax) {
      return blocks.Mismatch(absl::StrCat("at most ", kLayoutBlocksMax, " blocks"));
    }
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const size_t count, blocks.ArraySize());
  if (count == 0 || count > kLayoutBlocksMax) {
    return blocks.Mismatch(absl::StrCat("from 1 to ", kLayoutBlocksMax, " blocks"));
  }
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const uint64_t size, ReadSize(blocks[i]));
    rule.blocks.push_back(size);
  }
  return absl::OkStatus();
}

absl::StatusOr<ShardRule> ReadRule(const JsonValue& value) {
  RETURN_IF_ERROR(value.ExpectKeys({"parameters", "cut", "blocks", "rows"}));
  ShardRule rule;
  ASSIGN_OR_RETURN(const JsonValue parameters, value.Get("parameters"));
  ASSIGN_OR_RETURN(rule.pattern, parameters.String());
  ASSIGN_OR_RETURN(const JsonValue cut, value.Get("cut"));
  RETURN_IF_ERROR(ReadCut(cut, rule));
  if (const JsonValue blocks = value.Find("blocks"); blocks.present()) {
    RETURN_IF_ERROR(ReadBlocks(blocks, rule));
  }
  if (const JsonValue rows = value.Find("rows"); rows.present()) {
    ASSIGN_OR_RETURN(rule.rows, ReadSize(rows));
  }
  return rule;
}

// Numbers of layers, ascending.
absl::StatusOr<std::vector<uint64_t>> ReadLayers(const JsonValue& list) {
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count == 0) return list.Mismatch("at least one layer");
  std::vector<uint64_t> layers;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const uint64_t layer, list[i].Uint64());
    if (layer >= kPipelineLayersMax || (i > 0 && layer <= layers.back())) {
      return list[i].Mismatch(
          absl::StrCat("layers in ascending order, all below ", kPipelineLayersMax));
    }
    layers.push_back(layer);
  }
  return layers;
}

absl::Status ReadPipeline(const JsonValue& pipeline, LayoutFile& layout) {
  RETURN_IF_ERROR(pipeline.ExpectKeys({"stages", "tied"}));
  if (const JsonValue stages = pipeline.Find("stages"); stages.present()) {
    ASSIGN_OR_RETURN(layout.stages, ReadLayers(stages));
    if (layout.stages.front() != 0) return stages[0].Mismatch("0, the first layer of all");
  }
  const JsonValue tied = pipeline.Find("tied");
  if (!tied.present()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::vector<std::string_view> keys, tied.Keys());
  for (const std::string_view key : keys) {
    ASSIGN_OR_RETURN(layout.tied[std::string(key)], ReadLayers(tied.Find(key)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LayoutFile> ParseLayoutFile(std::string json) {
  LayoutFile layout;
  if (json.empty()) return layout;
  ASSIGN_OR_RETURN(const std::unique_ptr<JsonDocument> document,
                   JsonDocument::Parse(std::move(json)));
  const JsonValue root = document->root();
  RETURN_IF_ERROR(root.ExpectKeys({"rules", "pipeline_replicated", "pipeline"}));
  if (const JsonValue rules = root.Find("rules"); rules.present()) {
    ASSIGN_OR_RETURN(const size_t count, rules.ArraySize());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(ShardRule rule, ReadRule(rules[i]));
      layout.rules.push_back(std::move(rule));
    }
  }
  if (const JsonValue patterns = root.Find("pipeline_replicated"); patterns.present()) {
    ASSIGN_OR_RETURN(const size_t count, patterns.ArraySize());
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view pattern, patterns[i].String());
      layout.pipeline_replicated.emplace_back(pattern);
    }
  }
  if (const JsonValue pipeline = root.Find("pipeline"); pipeline.present()) {
    RETURN_IF_ERROR(ReadPipeline(pipeline, layout));
  }
  return layout;
}

}  // namespace holdfast::converter
