// Reads the segments that a layout document lists for a tensor state: what no pipeline of
// operations says, such as affine maps, and key-value heads that several ranks share. Inside of
// format/layout*.
#ifndef HOLDFAST_FORMAT_LISTED_SEGMENTS_H_
#define HOLDFAST_FORMAT_LISTED_SEGMENTS_H_

#include <string>

#include "absl/status/statusor.h"
#include "base/json_reader.h"
#include "format/layout_program.h"
#include "format/placement_parser.h"

namespace holdfast {

// `buffer`: where those lie that name none. `copy_count`: of the document so far, segments times
// their ranks; grows. Errors: kInvalidArgument; also if two boxes overlap
// without being equal, or an element of the tensor is in none.
absl::StatusOr<ListedState> ParseListedSegments(const JsonValue& list,
                                                const TensorState& tensor_state,
                                                const std::string& buffer,
                                                PlacementParser& placements, size_t& copy_count);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LISTED_SEGMENTS_H_
