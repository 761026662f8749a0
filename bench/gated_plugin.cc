// A profiler plugin for A/B measurements inside one process: the one that $GATED_PLUGIN names,
// asked for its events every other $GATED_MS milliseconds only, by the mask that NCCL lets a plugin
// change at any time. So both sides have the same process, memory and threads, and a slow second of
// the machine hits both.
//
// The blocks are those of the monotonic clock, so all ranks of a machine change at once. Each
// change is a line of standard output, between those of the program (which writes each of its own
// at once, too):
//
//   {"event":"gate","rank":0,"on":true}
//
// While it is on, calls go to the other plugin directly. Interface version 6, for
// examples/collectives.
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "hook/profiler/interface.h"

namespace {

using namespace holdfast::profiler;

constexpr int64_t kNsPerMs = 1'000'000;
constexpr int64_t kNsPerSecond = 1'000'000'000;

NcclResult Init(void** context, uint64_t id, int* mask, const char* name, int nodes, int ranks,
                int rank, NcclLogger logger);
NcclResult Finalize(void* context);

// Of the process, as NCCL's interface is one of plain functions.
struct Gate {
  std::mutex mutex;
  const ProfilerV5* plugin = nullptr;
  int open_communicators = 0;
  std::atomic<bool> over{false};
  std::thread thread;
};
Gate gate;

void Tell(bool on) {
  const char* const rank = getenv("RANK");
  char line[64];
  const int length = snprintf(line, sizeof(line), "{\"event\":\"gate\",\"rank\":%s,\"on\":%s}\n",
                              rank == nullptr ? "0" : rank, on ? "true" : "false");
  // A lost line makes a block longer, which its reader sees by two of one kind in a row.
  (void)!write(STDOUT_FILENO, line, static_cast<size_t>(length));
}

void OpenAndClose(std::atomic<int>& mask, int asked, int64_t block_ns) {
  timespec now{};
  while (!gate.over.load()) {
    clock_gettime(CLOCK_MONOTONIC, &now);
    const int64_t block = (now.tv_sec * kNsPerSecond + now.tv_nsec) / block_ns;
    const bool on = block % 2 == 0;
    mask.store(on ? asked : 0);
    Tell(on);
    const int64_t next_ns = (block + 1) * block_ns;
    const timespec next{next_ns / kNsPerSecond, next_ns % kNsPerSecond};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, nullptr) != 0) {
    }
  }
}

}  // namespace

extern "C" {
// Filled in by the first init.
__attribute__((visibility("default")))
ProfilerV5 ncclProfiler_v6 = {"Gated", &Init, nullptr, nullptr, nullptr, &Finalize};
}

namespace {

NcclResult Init(void** context, uint64_t id, int* mask, const char* name, int nodes, int ranks,
                int rank, NcclLogger logger) {
  const std::lock_guard<std::mutex> lock(gate.mutex);
  if (gate.plugin == nullptr) {
    const char* const path = getenv("GATED_PLUGIN");
    void* const library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_LOCAL);
    gate.plugin = library == nullptr
                      ? nullptr
                      : static_cast<const ProfilerV5*>(dlsym(library, "ncclProfiler_v6"));
    if (gate.plugin == nullptr) {
      fprintf(stderr, "gated plugin: $GATED_PLUGIN: expected a profiler plugin, found '%s': %s\n",
              path == nullptr ? "" : path, dlerror());
      return kNcclSystemError;
    }
    ncclProfiler_v6.start = gate.plugin->start;
    ncclProfiler_v6.stop = gate.plugin->stop;
    ncclProfiler_v6.record = gate.plugin->record;
  }
  const NcclResult result = gate.plugin->init(context, id, mask, name, nodes, ranks, rank, logger);
  if (result != kNcclSuccess || gate.open_communicators++ > 0) return result;
  const char* const block = getenv("GATED_MS");
  const long block_ms = block == nullptr ? 0 : strtol(block, nullptr, 10);
  if (block_ms <= 0) {
    fprintf(stderr, "gated plugin: $GATED_MS: expected milliseconds, found '%s'\n",
            block == nullptr ? "" : block);
    return kNcclSystemError;
  }
  auto& shared_mask = *reinterpret_cast<std::atomic<int>*>(mask);
  gate.over.store(false);
  gate.thread = std::thread([&shared_mask, asked = *mask, block_ms] {
    OpenAndClose(shared_mask, asked, block_ms * kNsPerMs);
  });
  return result;
}

NcclResult Finalize(void* context) {
  const std::lock_guard<std::mutex> lock(gate.mutex);
  if (--gate.open_communicators == 0) {
    gate.over.store(true);
    gate.thread.join();
  }
  return gate.plugin->finalize(context);
}

}  // namespace
