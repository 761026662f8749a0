// What a layout costs those who ask it for all ranks (Layout::HolderLoads, HeldByRank), known
// before anything is made. A document of 200 bytes can name a million ranks, and a few of its
// operations can give every one of them other holders, or cut a pack at other elements. Inside of
// format/layout*.
#ifndef HOLDFAST_FORMAT_LAYOUT_COST_H_
#define HOLDFAST_FORMAT_LAYOUT_COST_H_

#include "absl/status/status.h"
#include "format/layout_program.h"

namespace holdfast {

// kInvalidArgument, with the limit, for a document that is too large in one of these ways. What it
// lowers to then takes some 100 MB and seconds, whatever it says; sums of bytes do not overflow.
absl::Status CheckLayoutCost(const LayoutProgram& program);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LAYOUT_COST_H_
