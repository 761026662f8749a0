// Layout files (--layout-file) with their patterns, used on parameters of several shapes and
// numbers of ranks.
#include <string>

#include "base/check.h"
#include "converter/layout_file.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {

bool FuzzShardRules(Input input) {
  absl::StatusOr<converter::LayoutFile> layout =
      converter::ParseLayoutFile(std::string(input.begin(), input.end()));
  if (!layout.ok()) {
    CHECK(layout.status().code() == absl::StatusCode::kInvalidArgument);
    return false;
  }
  converter::ParallelInfo info;
  info.rules = std::move(layout->rules);
  info.pipeline_replicated = std::move(layout->pipeline_replicated);
  const auto rules = converter::ParallelRules::Create(std::move(info));
  if (!rules.ok()) {
    CHECK(rules.status().code() == absl::StatusCode::kUnimplemented ||
          rules.status().code() == absl::StatusCode::kResourceExhausted);
    return false;
  }
  const std::vector<std::vector<converter::Shape>> cases = {
      {{4, 6}}, {{4, 6}, {4, 6}}, {{4, 6}, {2, 6}, {1, 6}},
      {{}, {}}, {{0, 3}, {0, 3}}, {{uint64_t{1} << 40, 2}, {uint64_t{1} << 40, 2}}};
  bool any = false;
  for (const char* name : {"a.w", "b", ""}) {
    static_cast<void>(rules->PipelineReplicated(name));
    for (const auto& shapes : cases) {
      const auto maps = rules->Resolve(name, shapes);
      if (!maps.ok()) {
        CHECK(maps.status().code() == absl::StatusCode::kFailedPrecondition ||
              maps.status().code() == absl::StatusCode::kInvalidArgument ||
              maps.status().code() == absl::StatusCode::kResourceExhausted);
        continue;
      }
      any = true;
      CHECK(maps->size() == shapes.size());
      for (const converter::ShardMap& map : *maps) {
        uint64_t end = 0;
        for (const converter::ShardBlock& block : map.blocks) {
          CHECK(block.shard_begin >= end && block.ElementCount() > 0);
          end = block.shard_begin + block.ElementCount();
          for (size_t d = 0; d < map.shape.size(); ++d) {
            CHECK(block.lo[d] < map.shape[d] && block.size[d] <= map.shape[d] - block.lo[d]);
          }
        }
        CHECK(end <= map.shard_elements);
      }
    }
  }
  return any;
}

}  // namespace holdfast::fuzz
