// Recorded event streams of NCCL, one JSON line per callback (the format is described in
// docs/MONITOR.md), and how they are given to a plugin again.
#ifndef HOLDFAST_HOOK_PROFILER_RECORDED_STREAM_TESTING_H_
#define HOLDFAST_HOOK_PROFILER_RECORDED_STREAM_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "hook/profiler/nccl_driver_testing.h"

namespace holdfast::profiler {

struct RecordedCall {
  double us = 0;
  int thread = 0;
  std::string call;
  uint64_t handle = 0;
  uint64_t parent = 0;
  uint64_t parent_group = 0;
  int state = 0;
  size_t bytes = 0;     // transSize of a state
  int appended = 0;     // appendedProxyOps of a state
  uint64_t gpu_ns = 0;  // pTimer
  int nodes = 0;        // of init, as the next
  int ranks = 0;
  Event event;
};

// The stream of one rank. Fails the test on a line that cannot be read.
std::vector<RecordedCall> ReadStream(const std::string& path);

// The lines of a stream as CallRecords (those of start, stop and state).
std::vector<CallRecord> ToRecords(const std::vector<RecordedCall>& stream);
// And the other way round, as text.
std::string ToJson(const std::vector<CallRecord>& calls, int ranks, int rank, size_t count);

// One rank's stream, given to a plugin.
class Replay {
 public:
  Replay(Library& library, uint64_t id, const std::vector<RecordedCall>& stream)
      : library_(library), id_(id), stream_(stream) {}
  // Gives the calls up to `end`, from where it is.
  void RunTo(size_t end);
  void* context() const { return context_; }

 private:
  Library& library_;
  const uint64_t id_;
  const std::vector<RecordedCall>& stream_;
  size_t next_ = 0;
  void* context_ = nullptr;
  std::map<uint64_t, void*> handles_;
};

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_RECORDED_STREAM_TESTING_H_
