// Whether the layouts that a job declares for fewer ranks exist and fit: what each rank would hold,
// by the layout algebra (format/layout.h).
#ifndef HOLDFAST_AGENT_RECOVERY_ELASTIC_H_
#define HOLDFAST_AGENT_RECOVERY_ELASTIC_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "agent/recovery/settings.h"
#include "format/layout.h"

namespace holdfast::recovery {

// Of the rank that holds most. Without the padding of its buffers.
uint64_t BytesOfGreatestRank(const Layout& layout);

// Sets bytes_per_rank of each declared layout: `document`, as the job's ranks have registered it
// (or a checkpoint holds it), resized as the layout says ("dp=3,tp=1": format/layout_rules.h).
// Errors: kInvalidArgument, naming the layout: it cannot be made of the document, or is for another
// number of ranks. kResourceExhausted: it needs more than rank_bytes_max. After an error those
// before it are set.
absl::Status MeasureLayouts(const std::string& document, Settings& settings);

}  // namespace holdfast::recovery

#endif  // HOLDFAST_AGENT_RECOVERY_ELASTIC_H_
