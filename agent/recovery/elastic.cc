#include "agent/recovery/elastic.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "format/layout_rules.h"

namespace holdfast::recovery {

uint64_t BytesOfGreatestRank(const Layout& layout) {
  std::vector<uint64_t> bytes(layout.world_size(), 0);
  for (const HolderLoad& load : layout.HolderLoads()) {
    for (const uint32_t rank : load.ranks) bytes[rank] += load.bytes;
  }
  return *std::max_element(bytes.begin(), bytes.end());
}

absl::Status MeasureLayouts(const std::string& document, Settings& settings) {
  for (ElasticLayout& elastic : settings.layouts) {
    const std::string name =
        absl::StrFormat("elastic.layouts: %d = \"%s\"", elastic.world_size, elastic.layout);
    absl::StatusOr<std::string> resized = ResizeLayout(document, elastic.layout);
    absl::StatusOr<std::unique_ptr<const Layout>> layout =
        resized.ok() ? Layout::Parse(*std::move(resized)) : resized.status();
    if (!layout.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": ", std::string(layout.status().message())));
    }
    if ((*layout)->world_size() != elastic.world_size) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: expected a layout of %d ranks, found one of %d", name,
                          elastic.world_size, (*layout)->world_size()));
    }
    elastic.bytes_per_rank = BytesOfGreatestRank(**layout);
    if (settings.rank_bytes_max.has_value() && *elastic.bytes_per_rank > *settings.rank_bytes_max) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: a rank would hold %d bytes; elastic.rank_bytes_max is %d", name,
                          *elastic.bytes_per_rank, *settings.rank_bytes_max));
    }
  }
  return absl::OkStatus();
}

}  // namespace holdfast::recovery
