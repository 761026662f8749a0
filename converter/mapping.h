// Applies a mapping to what a checkpoint holds: every tensor of the index under its new name, put
// together and taken apart as the rules say, in every state. Nothing is read but the numbers that
// several tensors must agree in (an optimizer's step); what the index says afterwards of where
// bytes lie is what the writers go on from, as of any other source.
//
// A state that has its tensor's shape (exp_avg, fp32, ...) is mapped as the tensor is. One of a
// single element goes to every tensor that is made. Another one is refused, unless the tensor is
// only renamed.
#ifndef HOLDFAST_CONVERTER_MAPPING_H_
#define HOLDFAST_CONVERTER_MAPPING_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/mapping_rules.h"
#include "converter/model_numbers.h"

namespace holdfast::converter {

enum class MappingDirection { kLeftToRight, kRightToLeft };
enum class Unmapped { kRefuse, kLeaveOut };

// Tensors of the index whose names stand on the side that is read.
size_t CountMapped(const MappingRules& rules, MappingDirection direction,
                   const ForeignIndex& index);

struct MappingRequest {
  const MappingRules& rules;
  MappingDirection direction = MappingDirection::kLeftToRight;
  std::string_view where;  // for errors: "--map llama:hf"
  Unmapped unmapped = Unmapped::kRefuse;
};

// Replaces the index. `left_out` grows by what is no longer there, in words. Each new tensor state
// is proven to have every element exactly once. After an error the index is as it was.
// Errors, naming the tensor and the line of the rule: kFailedPrecondition (no rule for it, a part
// is missing, two tensors for one name; shapes, dtypes or steps that do not fit; a number that
// nobody gives, with the option that gives it), kDataLoss (the source has a hole),
// kResourceExhausted (too many pieces), those of reading.
absl::Status ApplyMapping(const MappingRequest& request, const ForeignFolder& folder,
                          ModelNumbers& numbers, ForeignIndex& index,
                          std::vector<std::string>& left_out);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MAPPING_H_
