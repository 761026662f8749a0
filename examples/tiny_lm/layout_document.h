// The job's layout as it is said to Holdfast: the layout document (docs/layout-grammar.md) that all
// ranks register, written from the same options as everything else. The one place that knows the
// grammar.
//
// All three axes are named, of whatever size. A parameter's placement is put together from three
// rules, each for an axis:
//   tp  nothing (replicated), or a `shard` of the dimension that tensor parallelism cuts;
//   pp  a `place` on the stages that hold it;
//   dp  `zero`, by the stage in the document: nothing (replicated), a pack (ZeRO-1,2), or a flat
//   cut
//       (ZeRO-3).
#ifndef HOLDFAST_EXAMPLES_TINY_LM_LAYOUT_DOCUMENT_H_
#define HOLDFAST_EXAMPLES_TINY_LM_LAYOUT_DOCUMENT_H_

#include <string>

#include "examples/tiny_lm/parallel.h"
#include "examples/tiny_lm/parameters.h"

namespace tiny_lm {

// JSON. The same text on all ranks.
std::string LayoutDocument(const ParameterTable& table, const JobLayout& layout);

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_LAYOUT_DOCUMENT_H_
