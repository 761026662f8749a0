// A node's summary on its way to whoever analyses the job: the seam behind which the analysis may
// be in this process or, with several nodes, somewhere else.
//
// Nothing here assumes that there is one agent, one node or one job: reports of one job come from
// any number of senders, in any order, late, twice or never.
#ifndef HOLDFAST_MONITOR_NODE_REPORT_H_
#define HOLDFAST_MONITOR_NODE_REPORT_H_

#include <cstdint>
#include <string>

namespace holdfast::monitor {

struct NodeReport {
  std::string job;          // HOLDFAST_JOB; never empty
  std::string attempt_key;  // HOLDFAST_ATTEMPT_KEY or torchrun's; may be empty
  uint32_t world_size = 0;  // of the job, as its ranks say; 0: none has said
  std::string node;         // as its ranks name it (HOLDFAST_NODE, else the host's name)
  // EncodeSummary's bytes. NodeSummary::node is 0 there: the receiver numbers nodes by their names.
  std::string summary;
};

// Threads: the caller's.
class ReportSink {
 public:
  virtual ~ReportSink() = default;
  virtual void Deliver(NodeReport report) = 0;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_NODE_REPORT_H_
