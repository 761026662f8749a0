// A second profiler plugin behind ours: NCCL loads one only, and users want two.
//
// It is named in HOLDFAST_PROFILER_CHAIN and found as NCCL would find it. It gets what it asked
// for: its own contexts, parents and handles, kept beside our tokens. It does not get: events of
// other processes (PXN), whose contexts are not its own; events that come after their communicator
// was finalized or after their handle was stopped; anything for which our own tables had no room.
// It is never unloaded.
#ifndef HOLDFAST_HOOK_PROFILER_CHAIN_H_
#define HOLDFAST_HOOK_PROFILER_CHAIN_H_

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>

#include "hook/error.h"
#include "hook/monitor_events.h"
#include "hook/profiler/interface.h"

namespace holdfast::profiler {

struct InitCall {
  int version = 0;  // that NCCL uses
  uint64_t id = 0;
  const char* name = nullptr;
  int nodes = 0;
  int ranks = 0;
  int rank = 0;
  NcclLogger logger = nullptr;
};

// Threads: any, as NCCL's calls.
// Lifetime: the process's.
class Chain {
 public:
  // `value`: name or path; `own`: one of our exported structs, which must not be chained to itself.
  // Needs the interface of `version`, or, from 6 and 7, an older one down to 5: what only the newer
  // one has is left out then. Errors: HF_NOT_FOUND, HF_INVALID_ARGUMENT, HF_RESOURCE_EXHAUSTED.
  static hook::Result<std::unique_ptr<Chain>> Load(const char* value, int version, const void* own);
  ~Chain();

  int version() const { return version_; }
  const char* name() const { return name_; }
  // The events that it asked for, and those above them.
  uint64_t mask() const;

  // Keeps its context under `communicator`. False: it refused.
  bool Init(const InitCall& call, hook::Token communicator);
  void Finalize(hook::Token communicator);

  // `descriptor` is NCCL's: parents in it are our tokens.
  template <typename D>
  void Start(const hook::MonitorEvents& events, hook::Token communicator, hook::Token token,
             const D& descriptor) {
    Forget(token);
    if ((descriptor.type & mask()) == 0) return;
    D copy = descriptor;
    copy.parent = HandleOf(events, TokenOf(descriptor.parent), Use::kParent);
    if constexpr (D::kVersion >= 5) {
      const auto patch = [&](void** group) {
        *group = HandleOf(events, TokenOf(*group), Use::kParent);
      };
      if constexpr (D::kVersion >= 7) {
        if (copy.type == kColl) patch(&copy.coll.v5.parent_group);
        if (copy.type == kP2p) patch(&copy.p2p.v5.parent_group);
      } else {
        if (copy.type == kColl) patch(&copy.coll.parent_group);
        if (copy.type == kP2p) patch(&copy.p2p.parent_group);
      }
    }
    StartCopy(communicator, token, &copy);
  }
  void Record(const hook::MonitorEvents& events, hook::Token token, int state,
              StateArguments* arguments);
  void Stop(const hook::MonitorEvents& events, hook::Token token);

 private:
  // Its handle of an event of ours, by the place in our tables.
  struct Held {
    std::atomic<void*> handle;
    std::atomic<hook::Token> token;  // whose it is; 0: nobody's
    std::atomic<hook::Token> communicator;
    std::atomic<bool> stopped;
  };
  enum class Use { kStopOrRecord, kParent };
  struct Tables;

  Chain() = default;
  static hook::Token TokenOf(const void* handle) { return reinterpret_cast<hook::Token>(handle); }
  Held* Find(hook::Token token) const;
  // The place's last owner may never have been stopped.
  void Forget(hook::Token token);
  // NULL if it has none, or must not see it any more. NCCL stops API calls and operations before it
  // starts their children: as parents they stay.
  void* HandleOf(const hook::MonitorEvents& events, hook::Token token, Use use) const;
  void StartCopy(hook::Token communicator, hook::Token token, void* descriptor);

  int version_ = 0;
  const char* name_ = "";
  const ProfilerV4* v4_ = nullptr;  // if version_ is 4
  const ProfilerV5* v5_ = nullptr;
  StartEvent start_ = nullptr;
  StopEvent stop_ = nullptr;
  RecordEventState record_ = nullptr;
  FinalizeContext finalize_ = nullptr;
  // Where it keeps its mask: it may change it at any time.
  std::atomic<int> mask_{0};
  Tables* tables_ = nullptr;
};

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_CHAIN_H_
