// What an event costs in an NCCL profiler plugin: nanoseconds per call, in the calls of all-reduces
// over the network as NCCL makes them (4 channels, a send and a receive each, 8 steps each; of what
// the plugin's mask asks for, with what stands above it).
//
// bench_profiler PLUGIN.so MIX CACHES
//   MIX     pipeline: up to 8 steps open at once, as NCCL has them
//           serial: one step open at a time, so that every state is news to whoever shows the
//           oldest polls: a step without credit, reported again and again
//   CACHES  hot, or cold: the caches of the core are filled with something else before every call
//           (the first two levels), or far: the last level, too
// Prints one JSON object. Each call is made through the plugin's table of functions, like NCCL's.
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "hook/profiler/interface.h"

namespace {

using namespace holdfast::profiler;

constexpr int kChannels = 4;
constexpr int kSteps = 8;

struct Call {
  enum Kind { kStart, kStop, kRecord } kind;
  int handle = 0;  // index: written by start, read by the others
  int parent = -1;
  int group = -1;  // of kColl
  int state = 0;
  DescriptorV5 descriptor;
};

// The calls of one all-reduce; handles are numbered.
class Script {
 public:
  explicit Script(bool serial) {
    const int group_api = Start(kGroupApi, -1);
    const int coll_api = Start(kCollApi, group_api);
    calls_.back().descriptor.coll_api = {"AllReduce", 1 << 20, "ncclFloat32", 0, nullptr, false};
    Stop(coll_api);
    const int launch = Start(kKernelLaunch, group_api);
    Stop(launch);
    const int group = Start(kGroup, -1);
    const int coll = Start(kColl, coll_api);
    calls_.back().descriptor.coll.v4 = {0, "AllReduce", nullptr, nullptr, 1 << 20, 0, "ncclFloat32",
                                        4, 8,           "RING",  "SIMPLE"};
    calls_.back().group = group;
    Stop(coll);
    Stop(group);
    Stop(group_api);
    struct Op {
      int handle;
      bool send;
      std::vector<int> steps;
    };
    std::vector<Op> ops;
    for (int channel = 0; channel < kChannels; ++channel) {
      for (const bool send : {false, true}) {
        const int op = Start(kProxyOp, coll);
        calls_.back().descriptor.proxy_op = {
            getpid(), static_cast<uint8_t>(channel), send ? 1 : 3, kSteps, 1 << 20, send ? 1 : 0};
        ops.push_back({op, send, {}});
      }
    }
    for (const Op& op : ops) Record(op.handle, kStateProxyOpInProgress);
    if (serial) {
      for (int step = 0; step < kSteps; ++step) {
        for (const Op& op : ops) Finish(op.send, Open(op.handle, op.send, step));
      }
    } else {
      for (int step = 0; step < kSteps; ++step) {
        for (Op& op : ops) op.steps.push_back(Open(op.handle, op.send, step));
      }
      for (int step = 0; step < kSteps; ++step) {
        for (const Op& op : ops) Finish(op.send, op.steps[static_cast<size_t>(step)]);
      }
    }
    for (const Op& op : ops) Stop(op.handle);
  }

  // Those of the types in `mask`.
  std::vector<Call> Delivered(uint64_t mask) const {
    std::vector<Call> delivered;
    for (const Call& call : calls_) {
      if ((types_[static_cast<size_t>(call.handle)] & mask) != 0) delivered.push_back(call);
    }
    return delivered;
  }
  int handle_count() const { return handle_count_; }

 private:
  int Start(uint64_t type, int parent) {
    Call call{Call::kStart, handle_count_, parent, -1, 0, {}};
    call.descriptor.type = type;
    call.descriptor.rank = 0;
    calls_.push_back(call);
    types_.push_back(type);
    return handle_count_++;
  }
  void Stop(int handle) { calls_.push_back({Call::kStop, handle, -1, -1, 0, {}}); }
  void Record(int handle, int state) {
    calls_.push_back({Call::kRecord, handle, -1, -1, state, {}});
  }
  int Open(int op, bool send, int step) {
    const int handle = Start(kProxyStep, op);
    calls_.back().descriptor.proxy_step.step = step;
    Record(handle, send ? kStateSendGpuWait : kStateReceiveWait);
    return handle;
  }
  void Finish(bool send, int step) {
    if (send) {
      Record(step, kStateSendPeerWait);
      Record(step, kStateSendWait);
    } else {
      Record(step, kStateReceiveFlushWait);
      Record(step, kStateReceiveGpuWait);
    }
    Stop(step);
  }

  std::vector<Call> calls_;
  std::vector<uint64_t> types_;  // by handle
  int handle_count_ = 0;
};

class Plugin {
 public:
  bool Load(const char* path) {
    void* library = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      return false;
    }
    for (const char* name : {"ncclProfiler_v6", "ncclProfiler_v5"}) {
      profiler_ = static_cast<const ProfilerV5*>(dlsym(library, name));
      if (profiler_ != nullptr) break;
    }
    return profiler_ != nullptr &&
           profiler_->init(&context_, 0x1234, &mask_, "bench", 2, 4, 0, &Log) == kNcclSuccess;
  }
  uint64_t mask() const { return WithAncestors(static_cast<uint32_t>(mask_)) & KnownEvents(5); }
  void Make(Call& call, std::vector<void*>& handles) const {
    void*& handle = handles[static_cast<size_t>(call.handle)];
    switch (call.kind) {
      case Call::kStart:
        call.descriptor.parent = HandleOf(call.parent, handles);
        if (call.group >= 0) call.descriptor.coll.parent_group = HandleOf(call.group, handles);
        // Left NULL: NCCL reports nothing more of it.
        handle = nullptr;
        profiler_->start(context_, &handle, &call.descriptor);
        break;
      case Call::kStop:
        if (handle != nullptr) profiler_->stop(handle);
        break;
      case Call::kRecord: {
        if (handle == nullptr) break;
        StateArguments arguments;
        arguments.proxy_step.transfer_bytes = 1 << 18;
        profiler_->record(handle, call.state, &arguments);
        break;
      }
    }
  }

 private:
  static void* HandleOf(int index, const std::vector<void*>& handles) {
    return index < 0 ? nullptr : handles[static_cast<size_t>(index)];
  }
  static void Log(NcclLogLevel, unsigned long, const char*, int, const char*, ...) {}
  const ProfilerV5* profiler_ = nullptr;
  void* context_ = nullptr;
  int mask_ = 0;
};

// Processor time: others on the machine must not count.
double ThreadNs() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e9 + static_cast<double>(now.tv_nsec);
}

// The median of batches.
double Hot(const Plugin& plugin, std::vector<Call>& calls, std::vector<void*>& handles) {
  constexpr int kBatches = 21;
  constexpr int kRounds = 1000;
  std::vector<double> batches;
  for (int batch = 0; batch < kBatches; ++batch) {
    const double start = ThreadNs();
    for (int round = 0; round < kRounds; ++round) {
      for (Call& call : calls) plugin.Make(call, handles);
    }
    batches.push_back((ThreadNs() - start) / kRounds / static_cast<double>(calls.size()));
  }
  std::nth_element(batches.begin(), batches.begin() + kBatches / 2, batches.end());
  return batches[kBatches / 2];
}

// Mean of single calls, less that of an empty pair of clock readings.
double Cold(const Plugin& plugin, std::vector<Call>& calls, std::vector<void*>& handles,
            size_t evict_bytes, int rounds) {
  std::vector<uint64_t> other(evict_bytes / 8);
  const auto evict = [&] {
    for (size_t i = 0; i < other.size(); i += 8) other[i] += i;
  };
  const auto ns_per_tick = [] {
    const auto start = std::chrono::steady_clock::now();
    const uint64_t ticks = __rdtsc();
    std::chrono::duration<double, std::nano> passed{};
    while (passed.count() < 2e7) passed = std::chrono::steady_clock::now() - start;
    return passed.count() / static_cast<double>(__rdtsc() - ticks);
  }();
  std::vector<uint64_t> empty;
  std::vector<uint64_t> took;
  unsigned core = 0;
  for (int round = 0; round < rounds; ++round) {
    for (Call& call : calls) {
      // What belongs to the caller is warm: it has just been at work.
      evict();
      Call warm = call;
      volatile int touch = 0;
      for (void* handle : handles) touch = touch + (handle != nullptr);
      uint64_t start = __rdtscp(&core);
      empty.push_back(__rdtscp(&core) - start);
      start = __rdtscp(&core);
      plugin.Make(warm, handles);
      took.push_back(__rdtscp(&core) - start);
    }
  }
  const auto mean = [](std::vector<uint64_t>& values) {
    // Without the slowest hundredth: interrupts.
    std::sort(values.begin(), values.end());
    const size_t kept = values.size() * 99 / 100;
    double sum = 0;
    for (size_t i = 0; i < kept; ++i) sum += static_cast<double>(values[i]);
    return sum / static_cast<double>(kept);
  };
  return (mean(took) - mean(empty)) * ns_per_tick;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: bench_profiler PLUGIN.so pipeline|serial|polls hot|cold|far\n");
    return 2;
  }
  const std::string mix = argv[2];
  const std::string caches = argv[3];
  Plugin plugin;
  if (!plugin.Load(argv[1])) return 1;
  const Script script(mix != "pipeline");
  std::vector<Call> calls = script.Delivered(plugin.mask());
  if (calls.empty()) {
    std::fprintf(stderr, "%s asks for none of these events\n", argv[1]);
    return 1;
  }
  std::vector<void*> handles(static_cast<size_t>(script.handle_count()));
  for (int round = 0; round < 10; ++round) {
    for (Call& call : calls) plugin.Make(call, handles);
  }
  if (mix == "polls") {
    // Into the middle of the first send, and then the same report again and again.
    size_t at = 0;
    while (calls[at].kind != Call::kRecord || calls[at].state != kStateSendPeerWait) ++at;
    for (size_t i = 0; i <= at; ++i) plugin.Make(calls[i], handles);
    calls = std::vector<Call>(100, calls[at]);
  }
  const size_t event_count = calls.size();
  size_t missing = 0;
  for (const Call& call : calls) {
    missing += call.kind == Call::kStart && handles[static_cast<size_t>(call.handle)] == nullptr;
  }
  double ns = 0;
  if (caches == "hot") ns = Hot(plugin, calls, handles);
  if (caches == "cold") ns = Cold(plugin, calls, handles, 4 << 20, 4);
  if (caches == "far") ns = Cold(plugin, calls, handles, 96 << 20, 1);
  // A plugin that left handles out was not asked much.
  std::printf("{\"nanoseconds_per_event\": %.2f, \"events\": %zu, \"left_out\": %zu}\n", ns,
              event_count, missing);
  return 0;
}
