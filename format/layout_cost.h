// What a layout costs those who ask it for all ranks (Layout::HolderLoads, HeldByRank), known
// before anything is made. A document of 200 bytes can name a million ranks, and a few of its
// operations can give every one of them other holders, or cut a pack at other elements. Inside of
// format/layout*.
#ifndef HOLDFAST_FORMAT_LAYOUT_COST_H_
#define HOLDFAST_FORMAT_LAYOUT_COST_H_

#include "absl/status/status.h"
#include "format/layout_program.h"

namespace holdfast {

// kInvalidArgument, with the limit, for a document that asks for too much (the list is in
// docs/layout-grammar.md, "Limits"). What another one lowers to takes at most 512 MiB and 128 times
// its bytes, and seconds, whatever it says; sums of bytes do not overflow.
absl::Status CheckLayoutCost(const LayoutProgram& program);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LAYOUT_COST_H_
