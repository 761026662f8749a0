// What the monitor's analysis was told of a job lately, in memory: so that an incident's folder has
// a recording that replays to the same findings (monitor/recording.h), from the job's begin on as
// far as it fits. Nothing is written before something has happened.
#ifndef HOLDFAST_AGENT_RUN_RUN_RECORDER_H_
#define HOLDFAST_AGENT_RUN_RUN_RECORDER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "agent/monitor/service.h"
#include "monitor/job_analysis.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: the monitor outlives it.
class RunRecorder {
 public:
  // Of steps as the analysis gets them, one a second: 40 minutes of 8 ranks in 10 communicators.
  // Beyond, the oldest go.
  static constexpr size_t kBytesMax = size_t{16} << 20;

  // Records from now on. If the monitor has too many subscribers nothing is (status()).
  RunRecorder(MonitorService& monitor, const std::string& job, size_t bytes_max = kBytesMax);
  RunRecorder(const RunRecorder&) = delete;
  RunRecorder& operator=(const RunRecorder&) = delete;

  const absl::Status& status() const { return status_; }

  // Values, so that another thread can make a file of them.
  struct Kept {
    std::vector<std::shared_ptr<const std::string>> steps;  // monitor::EncodeRecorded
    std::vector<monitor::RankRole> roles;                   // that the steps before these have told
    uint64_t lost = 0;                                      // steps that have gone
  };
  Kept Keep() const;

  // The bytes of a recording's file. Threads: any.
  static std::string FileOf(const Kept& kept);

 private:
  void Take();

  const size_t bytes_max_;
  absl::Status status_;
  std::shared_ptr<MonitorStream> stream_;
  std::deque<std::shared_ptr<const std::string>> steps_;
  size_t bytes_ = 0;
  uint64_t lost_ = 0;
  std::vector<monitor::RankRole> roles_;  // of what has gone
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_RUN_RECORDER_H_
