// What must hold of an index before a mapping and after it.
#ifndef HOLDFAST_CONVERTER_MAPPING_CHECKS_H_
#define HOLDFAST_CONVERTER_MAPPING_CHECKS_H_

#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "converter/foreign_index.h"
#include "converter/mapping_rules.h"

namespace holdfast::converter {

// That weights have the dimensions, and one another's sizes, which these lines say.
// kFailedPrecondition that names both tensors, and `where`.
absl::Status CheckShapes(std::span<const MappingShape> shapes, std::string_view where,
                         const ForeignIndex& index);

// That every tensor state has each element exactly once (copies of the same piece count once).
// kDataLoss, naming it and the first missing element; kResourceExhausted. After Finish.
absl::Status CheckCover(const ForeignIndex& index);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MAPPING_CHECKS_H_
