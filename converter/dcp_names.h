// Names of the files in which torch.distributed.checkpoint says what a folder holds: `.metadata`,
// or one of each rank, `__3.metadata`.
#ifndef HOLDFAST_CONVERTER_DCP_NAMES_H_
#define HOLDFAST_CONVERTER_DCP_NAMES_H_

#include <cstdint>
#include <optional>
#include <string_view>

#include "converter/decimal.h"

namespace holdfast::converter {

inline constexpr std::string_view kDcpMetadataName = ".metadata";

// Of a file's name, without its directory; nothing: it is of no rank.
inline std::optional<uint64_t> RankOfDcpMetadata(std::string_view name) {
  constexpr std::string_view kBegin = "__";
  if (!name.starts_with(kBegin) || !name.ends_with(kDcpMetadataName) ||
      name.size() < kBegin.size() + kDcpMetadataName.size()) {
    return std::nullopt;
  }
  name.remove_prefix(kBegin.size());
  name.remove_suffix(kDcpMetadataName.size());
  return ParseDecimal(name);
}

inline bool IsDcpMetadataName(std::string_view name) {
  return name == kDcpMetadataName || RankOfDcpMetadata(name).has_value();
}

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DCP_NAMES_H_
