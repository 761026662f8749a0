// Liveness of the training loop, as stores to the rank page: heartbeats, the stack of sections, and
// the time that calls of the library take from it.
//
// Stack and time are kept here too, because a new agent brings a new page.
#ifndef HOLDFAST_HOOK_HEARTBEAT_H_
#define HOLDFAST_HOOK_HEARTBEAT_H_

#include <cstdint>

#include "hook/abi/shared_memory.h"
#include "hook/annotations.h"

namespace holdfast::hook {

// Threads: any. No system call unless two threads meet.
class Heartbeat {
 public:
  void Beat(abi::RankPage& page, uint64_t step);
  // Deeper than kSectionDepthMax is counted, but not named.
  void BeginSection(abi::RankPage& page, const char* name) HOOK_EXCLUDES(mutex_);
  // Without an open section: nothing.
  void EndSection(abi::RankPage& page) HOOK_EXCLUDES(mutex_);
  // The training loop is in a call that holds it up; calls nest. Told by WriteHeld, to the page
  // that is the newest after the change.
  void BeginHeld() HOOK_EXCLUDES(mutex_);
  void EndHeld() HOOK_EXCLUDES(mutex_);
  void WriteHeld(abi::RankPage& page) HOOK_EXCLUDES(mutex_);
  // Writes the sections that are open, and what WriteHeld does, to a page that does not have them
  // yet.
  void Rewrite(abi::RankPage& page) HOOK_EXCLUDES(mutex_);

 private:
  void WriteName(abi::RankPage& page, uint32_t depth) HOOK_REQUIRES(mutex_);
  void WriteHeldTimes(abi::RankPage& page) const HOOK_REQUIRES(mutex_);

  Mutex mutex_;
  uint32_t held_depth_ HOOK_GUARDED_BY(mutex_) = 0;
  int64_t held_since_ns_ HOOK_GUARDED_BY(mutex_) = 0;
  uint64_t held_ns_ HOOK_GUARDED_BY(mutex_) = 0;
  uint32_t depth_ HOOK_GUARDED_BY(mutex_) = 0;
  char names_[abi::kSectionDepthMax][abi::kSectionNameBytes] HOOK_GUARDED_BY(mutex_) = {};
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_HEARTBEAT_H_
