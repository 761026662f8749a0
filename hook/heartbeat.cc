#include "hook/heartbeat.h"

#include <cstring>

#include "hook/deadline.h"
#include "hook/error.h"

namespace holdfast::hook {

void Heartbeat::Beat(abi::RankPage& page, uint64_t step) {
  page.heartbeat_step.store(step, std::memory_order_relaxed);
  page.heartbeat_ns.store(MonotonicNs(), std::memory_order_relaxed);
  // Release: who reads the count reads this beat's step and time, or later ones.
  page.heartbeat_count.fetch_add(1, std::memory_order_release);
}

void Heartbeat::BeginSection(abi::RankPage& page, const char* name) {
  MutexLock lock(mutex_);
  if (depth_ < abi::kSectionDepthMax) {
    char* kept = names_[depth_];
    std::memset(kept, 0, abi::kSectionNameBytes);
    if (name != nullptr) {
      const size_t length = strnlen(name, abi::kSectionNameBytes);
      std::memcpy(kept, name, Utf8PrefixBytes(name, length, abi::kSectionNameBytes - 1));
    }
    WriteName(page, depth_);
  }
  ++depth_;
  page.section_depth.store(depth_, std::memory_order_release);
}

void Heartbeat::EndSection(abi::RankPage& page) {
  MutexLock lock(mutex_);
  if (depth_ == 0) return;
  --depth_;
  page.section_depth.store(depth_, std::memory_order_release);
}

void Heartbeat::BeginHeld() {
  MutexLock lock(mutex_);
  if (held_depth_++ == 0) held_since_ns_ = MonotonicNs();
}

void Heartbeat::EndHeld() {
  MutexLock lock(mutex_);
  if (--held_depth_ > 0) return;
  held_ns_ += static_cast<uint64_t>(MonotonicNs() - held_since_ns_);
  held_since_ns_ = 0;
}

void Heartbeat::WriteHeld(abi::RankPage& page) {
  MutexLock lock(mutex_);
  WriteHeldTimes(page);
}

void Heartbeat::WriteHeldTimes(abi::RankPage& page) const {
  // In this order: who sees a call open sees a sum without it.
  page.held_since_ns.store(held_since_ns_, std::memory_order_release);
  page.held_ns.store(held_ns_, std::memory_order_release);
}

void Heartbeat::Rewrite(abi::RankPage& page) {
  MutexLock lock(mutex_);
  WriteHeldTimes(page);
  for (uint32_t depth = 0; depth < depth_ && depth < abi::kSectionDepthMax; ++depth) {
    WriteName(page, depth);
  }
  page.section_depth.store(depth_, std::memory_order_release);
}

void Heartbeat::WriteName(abi::RankPage& page, uint32_t depth) {
  // The agent reads names at any time, and takes a torn one for what it is: a name for people.
  for (size_t i = 0; i < abi::kSectionNameBytes; ++i) {
    std::atomic_ref<char>(page.section_names[depth][i])
        .store(names_[depth][i], std::memory_order_relaxed);
  }
}

}  // namespace holdfast::hook
