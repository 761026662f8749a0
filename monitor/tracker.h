// Gives findings an identity over time: one id from the first suspicion to the end of the incident,
// a verdict that does not change its mind, and no flapping.
#ifndef HOLDFAST_MONITOR_TRACKER_H_
#define HOLDFAST_MONITOR_TRACKER_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "monitor/candidates.h"
#include "monitor/thresholds.h"

namespace holdfast::monitor {

// Threads: one at a time. Lifetime: owns all it refers to.
class Tracker {
 public:
  explicit Tracker(const Thresholds& thresholds) : thresholds_(thresholds) {}

  // The open incidents after these candidates, in order of id. A verdict stays a verdict, keeps its
  // suspects (new ones are added behind) and gives up its explanation only for one that knows more.
  std::vector<Finding> Update(absl::Duration now, std::vector<Candidate> candidates);

  // Whether an incident of standing still or ending is open.
  bool IsStanding() const;

 private:
  struct Incident {
    Finding finding;
    absl::Duration last_seen;
    bool known = false;  // has an id
    bool open = false;
  };
  void Merge(Incident& incident, Finding finding) const;

  const Thresholds thresholds_;
  // By key; closed ones are kept for as long as they would be known again.
  std::map<std::string, Incident> incidents_;
  uint64_t begun_ = 0;  // incidents ever: the same key gets another id the next time
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_TRACKER_H_
