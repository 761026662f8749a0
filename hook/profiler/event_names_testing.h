// NCCL's names of event types, as recorded streams have them.
#ifndef HOLDFAST_HOOK_PROFILER_EVENT_NAMES_TESTING_H_
#define HOLDFAST_HOOK_PROFILER_EVENT_NAMES_TESTING_H_

#include <cstdint>
#include <string_view>

#include "hook/profiler/interface.h"

namespace holdfast::profiler {

struct NamedEvent {
  const char* name;
  uint64_t type;
};
inline constexpr NamedEvent kNamedEvents[] = {
    {"Group", kGroup},       {"Coll", kColl},           {"P2p", kP2p},
    {"ProxyOp", kProxyOp},   {"ProxyStep", kProxyStep}, {"ProxyCtrl", kProxyCtrl},
    {"KernelCh", kKernelCh}, {"NetPlugin", kNetPlugin}, {"GroupApi", kGroupApi},
    {"CollApi", kCollApi},   {"P2pApi", kP2pApi},       {"KernelLaunch", kKernelLaunch},
};

inline const char* EventName(uint64_t type) {
  for (const NamedEvent& event : kNamedEvents) {
    if (event.type == type) return event.name;
  }
  return "?";
}

// 0: no such event.
inline uint64_t EventType(std::string_view name) {
  for (const NamedEvent& event : kNamedEvents) {
    if (event.name == name) return event.type;
  }
  return 0;
}

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_EVENT_NAMES_TESTING_H_
