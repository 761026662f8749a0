// `on_verdict`: the operator's command, run for each verdict without waiting for it.
#ifndef HOLDFAST_AGENT_MONITOR_VERDICT_COMMAND_H_
#define HOLDFAST_AGENT_MONITOR_VERDICT_COMMAND_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/process.h"
#include "base/executor.h"
#include "monitor/finding_log.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: loop outlives it; what runs when it goes is left to itself.
class VerdictCommand {
 public:
  struct Options {
    std::string command;                         // for /bin/sh -c
    absl::Duration timeout = absl::Seconds(30);  // then it is killed, with all of its group
    size_t running_max = 4;                      // further ones wait
    size_t waiting_max = 64;                     // beyond, one is dropped, counted and said
    std::function<void(const std::string&)> warn;
  };
  VerdictCommand(Options options, EventLoop& loop);
  ~VerdictCommand();
  VerdictCommand(const VerdictCommand&) = delete;
  VerdictCommand& operator=(const VerdictCommand&) = delete;

  // The record as JSON, in one line, on standard input; in the environment HOLDFAST_EVENT (the
  // change), HOLDFAST_FINDING, HOLDFAST_JOB, HOLDFAST_ATTEMPT_KEY, HOLDFAST_GRADE, HOLDFAST_FAULT,
  // HOLDFAST_SCOPE, HOLDFAST_RANKS (those of the suspects, with commas), HOLDFAST_CONFIDENCE and
  // HOLDFAST_SENTENCE.
  void Run(const monitor::FindingRecord& record, const monitor::FindingEvent& event);

  size_t running_count() const { return running_.size(); }
  uint64_t run_count() const { return run_count_; }
  // Not started, ended with another status than 0, or killed; and those that were never begun.
  uint64_t failure_count() const { return failure_count_; }
  uint64_t dropped_count() const { return dropped_count_; }

 private:
  struct Call {
    std::string id;
    std::string json;
    std::vector<std::string> variables;
  };
  struct Running {
    Call call;
    Child child;
    EventLoop::TimerId timer = 0;
    bool killed = false;
  };

  void Start(Call call);
  void OnTimeout(uint64_t number);
  void OnEnd(uint64_t number);
  void Warn(const std::string& text) const;

  const Options options_;
  EventLoop& loop_;
  uint64_t next_ = 1;
  std::map<uint64_t, Running> running_;
  std::deque<Call> waiting_;
  uint64_t run_count_ = 0;
  uint64_t failure_count_ = 0;
  uint64_t dropped_count_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_VERDICT_COMMAND_H_
