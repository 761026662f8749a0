// Where a test's reports go.
#ifndef HOLDFAST_AGENT_MONITOR_REPORT_TESTING_H_
#define HOLDFAST_AGENT_MONITOR_REPORT_TESTING_H_

#include <span>
#include <utility>
#include <vector>

#include "base/check.h"
#include "monitor/node_report.h"
#include "monitor/summary.h"

namespace holdfast {

// What arrived, through the bytes.
class ReportCollector final : public monitor::ReportSink {
 public:
  struct Arrived {
    monitor::NodeReport report;
    monitor::NodeSummary summary;
  };
  void Deliver(monitor::NodeReport report) override {
    auto summary = monitor::DecodeSummary(std::as_bytes(std::span(report.summary)));
    CHECK_OK(summary.status());
    arrived.push_back({std::move(report), *std::move(summary)});
  }
  std::vector<Arrived> arrived;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_REPORT_TESTING_H_
