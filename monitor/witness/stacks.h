// Stacks of all ranks: read from what made them, made comparable, and clustered, so that the rank
// that stands elsewhere stands out.
//
// Ranks that wait in a collective stand at many different places inside of its library, which means
// nothing; what tells them apart is the place of the program that called it. So a stack is compared
// from its outermost frame down to the first frame of a communication library, and that one is
// written as "(in a collective)". Addresses, offsets and the threads of libraries do not count.
#ifndef HOLDFAST_MONITOR_WITNESS_STACKS_H_
#define HOLDFAST_MONITOR_WITNESS_STACKS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "base/ids.h"
#include "monitor/testimony.h"

namespace holdfast::monitor {

inline constexpr size_t kStackBytesMax = size_t{1} << 20;  // of the text of one process
inline constexpr size_t kStackThreadsMax = 256;
inline constexpr size_t kStackFramesMax = 128;  // of a thread; of more the innermost
inline constexpr size_t kFrameBytesMax = 200;

struct ThreadStack {
  uint64_t thread = 0;              // its id, as the source numbers threads
  bool main = false;                // the program's first thread
  std::vector<std::string> frames;  // innermost first: "function (file:line)", "function (module)"
};

enum class StackKind : uint8_t { kNative, kPython };

struct RankStacks {
  Rank rank{};
  StackKind kind{};
  std::vector<ThreadStack> threads;
};

// The output of Python's faulthandler, behind a line "holdfast main thread 0x...": without the
// thread that wrote it. What is no such line is left out; never fails.
std::vector<ThreadStack> ParsePythonStacks(std::string_view text);

// What agent/witness/native_stacks.h writes: "thread ID", "main" behind the main one's, then one
// frame a line, indented. Never fails.
std::vector<ThreadStack> ParseNativeStacks(std::string_view text);

// What of the main thread's stack is compared, outermost first, one frame a line; empty: there is
// no main thread or no frame.
std::string StackSignature(const RankStacks& stacks);

struct StackCluster {
  std::string signature;
  std::vector<Rank> ranks;  // ascending
};
// Of one kind of stacks: the largest first, of equal ones that with the lowest rank.
std::vector<StackCluster> ClusterStacks(std::span<const RankStacks> stacks, StackKind kind);

// Names the ranks outside of the largest cluster, if that has more than half of them and there are
// three at least. Python stacks count where there are any of all ranks that have native ones.
std::vector<Testimony> TestifyStacks(std::span<const RankStacks> stacks);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_WITNESS_STACKS_H_
