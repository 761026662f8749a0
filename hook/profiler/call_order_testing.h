// What may be compared of two streams of calls to a profiler plugin, whatever their timing.
#ifndef HOLDFAST_HOOK_PROFILER_CALL_ORDER_TESTING_H_
#define HOLDFAST_HOOK_PROFILER_CALL_ORDER_TESTING_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "hook/profiler/nccl_driver_testing.h"

namespace holdfast::profiler {

using Kind = std::tuple<int, std::string, uint64_t, int, uint64_t>;

inline Kind KindOf(const CallRecord& record) {
  return {record.thread, record.call, record.type, record.state, record.parent_type};
}

inline std::vector<Kind> OfThread(const std::vector<CallRecord>& calls, int thread) {
  std::vector<Kind> kinds;
  for (const CallRecord& call : calls) {
    if (call.thread == thread) kinds.push_back(KindOf(call));
  }
  return kinds;
}

// What happened to each event of a type, in order: start and stop as such, states by number.
// The same state again counts once: how often NCCL polls is a matter of time.
inline std::multiset<std::vector<std::string>> Lives(const std::vector<CallRecord>& calls,
                                                     uint64_t type) {
  std::map<uint64_t, std::vector<std::string>> by_handle;
  for (const CallRecord& call : calls) {
    if (call.type != type) continue;
    const std::string word = call.call == "state" ? std::to_string(call.state) : call.call;
    std::vector<std::string>& life = by_handle[call.handle];
    if (life.empty() || life.back() != word) life.push_back(word);
  }
  std::multiset<std::vector<std::string>> lives;
  for (const auto& [handle, life] : by_handle) lives.insert(life);
  return lives;
}

// (channel, send, steps, parent) of each proxy operation, in order of start.
inline std::vector<std::tuple<int, int, int, uint64_t>> ProxyOps(
    const std::vector<CallRecord>& calls) {
  std::vector<std::tuple<int, int, int, uint64_t>> ops;
  for (const CallRecord& call : calls) {
    if (call.call != "start" || call.type != kProxyOp) continue;
    ops.emplace_back(call.proxy_op.channel, call.proxy_op.is_send, call.proxy_op.steps,
                     call.parent_type);
  }
  return ops;
}

inline int MostOpenSteps(const std::vector<CallRecord>& calls) {
  std::map<uint64_t, uint64_t> parents;
  std::map<uint64_t, int> open;
  int most = 0;
  for (const CallRecord& call : calls) {
    if (call.type != kProxyStep) continue;
    if (call.call == "start") {
      parents[call.handle] = call.parent;
      most = std::max(most, ++open[call.parent]);
    } else if (call.call == "stop") {
      --open[parents[call.handle]];
    }
  }
  return most;
}

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_CALL_ORDER_TESTING_H_
