#include "preflight/measure_node.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <functional>
#include <latch>
#include <memory>
#include <numeric>
#include <span>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "preflight/clocks.h"

namespace holdfast::preflight {
namespace {

constexpr size_t kSliceCount = 8;
constexpr size_t kCopyBytes = size_t{1} << 20;
constexpr uint64_t kStepsAtOnce = 50'000;
constexpr size_t kCpusMax = 16384;

// Amounts of work by slice, of one thread.
using Slices = std::array<double, kSliceCount>;

std::vector<int> AllowedCpus() {
  std::vector<int> cpus;
  const size_t set_bytes = CPU_ALLOC_SIZE(kCpusMax);
  std::vector<unsigned long> storage(set_bytes / sizeof(unsigned long));
  auto* set = reinterpret_cast<cpu_set_t*>(storage.data());
  if (sched_getaffinity(0, set_bytes, set) == 0) {
    for (size_t cpu = 0; cpu < kCpusMax; ++cpu) {
      if (CPU_ISSET_S(cpu, set_bytes, set)) cpus.push_back(static_cast<int>(cpu));
    }
  }
  if (cpus.empty()) cpus.push_back(-1);  // not known: one thread, wherever it runs
  return cpus;
}

// At most `count_max` of them, evenly spread over nodes of memory and sockets.
std::vector<int> Spread(const std::vector<int>& cpus, size_t count_max) {
  const size_t count = std::min(cpus.size(), count_max);
  std::vector<int> chosen;
  for (size_t i = 0; i < count; ++i) chosen.push_back(cpus[i * cpus.size() / count]);
  return chosen;
}

// If it is refused the thread runs where it may: the measurement is the node's all the same.
void BindTo(int cpu) {
  if (cpu < 0) return;
  const size_t set_bytes = CPU_ALLOC_SIZE(kCpusMax);
  std::vector<unsigned long> storage(set_bytes / sizeof(unsigned long));
  auto* set = reinterpret_cast<cpu_set_t*>(storage.data());
  CPU_SET_S(static_cast<size_t>(cpu), set_bytes, set);
  static_cast<void>(sched_setaffinity(0, set_bytes, set));
}

// Runs `work(thread)`, which does a little and returns how much, again and again on all `cpus` for
// `duration`; `prepare(thread)` on the same thread before. All threads begin together.
absl::StatusOr<std::vector<Slices>> RunOn(const std::vector<int>& cpus, absl::Duration duration,
                                          const std::function<void(size_t)>& prepare,
                                          const std::function<double(size_t)>& work) {
  const int64_t slice_ns =
      std::max<int64_t>(absl::ToInt64Nanoseconds(duration) / int64_t{kSliceCount}, 1);
  std::vector<Slices> slices(cpus.size(), Slices{});
  std::latch prepared(static_cast<std::ptrdiff_t>(cpus.size()));
  std::atomic<bool> given_up = false;
  std::vector<std::thread> threads;
  const auto run = [&](size_t thread) {
    BindTo(cpus[thread]);
    prepare(thread);
    prepared.arrive_and_wait();
    const int64_t begun_ns = MonotonicNs();
    Slices own = {};
    while (!given_up) {
      const double amount = work(thread);
      const int64_t slice = (MonotonicNs() - begun_ns) / slice_ns;
      if (slice >= int64_t{kSliceCount}) break;
      own[static_cast<size_t>(slice)] += amount;
    }
    slices[thread] = own;
  };
  for (size_t thread = 0; thread < cpus.size(); ++thread) {
    try {
      threads.emplace_back(run, thread);
    } catch (const std::system_error&) {
      given_up = true;
      prepared.count_down(static_cast<std::ptrdiff_t>(cpus.size() - thread));
      break;
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (given_up) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("only %d of %d threads could be started", threads.size(), cpus.size()));
  }
  const double seconds = static_cast<double>(slice_ns) * 1e-9;
  for (Slices& own : slices) {
    for (double& amount : own) amount /= seconds;
  }
  return slices;
}

double BestSliceOfAll(const std::vector<Slices>& slices) {
  Slices total = {};
  for (const Slices& own : slices) {
    for (size_t slice = 0; slice < kSliceCount; ++slice) total[slice] += own[slice];
  }
  return *std::max_element(total.begin(), total.end());
}

// Memory of its own, in whole pages, not touched yet.
class Pages {
 public:
  explicit Pages(size_t bytes)
      : bytes_(bytes),
        memory_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {}
  ~Pages() {
    if (ok()) munmap(memory_, bytes_);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  bool ok() const { return memory_ != MAP_FAILED; }
  std::byte* data() const { return static_cast<std::byte*>(memory_); }

 private:
  const size_t bytes_;
  void* const memory_;
};

// The fixed work. Its result seeds the next, so that no compiler leaves it out.
uint64_t Steps(uint64_t seed, uint64_t count) {
  uint64_t integer = seed | 1;
  std::array<double, 4> real = {1.0, 2.0, 3.0, 4.0};
  for (uint64_t i = 0; i < count; ++i) {
    integer ^= integer << 13;
    integer ^= integer >> 7;
    integer ^= integer << 17;
    for (double& value : real) value = value * 0.999 + 0.25;
  }
  return integer + static_cast<uint64_t>(std::accumulate(real.begin(), real.end(), 0.0));
}

}  // namespace

uint32_t CpuCount() { return static_cast<uint32_t>(AllowedCpus().size()); }

absl::StatusOr<double> MeasureMemory(absl::Duration duration) {
  const std::vector<int> cpus = Spread(AllowedCpus(), kMemoryThreadsMax);
  std::vector<std::unique_ptr<Pages>> memory;
  for (size_t thread = 0; thread < cpus.size(); ++thread) {
    memory.push_back(std::make_unique<Pages>(kMemoryBytesPerThread));
    if (!memory.back()->ok()) {
      return absl::ResourceExhaustedError(absl::StrFormat("%d MiB of memory for thread %d of %d",
                                                          kMemoryBytesPerThread >> 20, thread + 1,
                                                          cpus.size()));
    }
  }
  constexpr size_t kHalfBytes = kMemoryBytesPerThread / 2;
  std::vector<size_t> positions(cpus.size(), 0);
  const absl::StatusOr<std::vector<Slices>> slices = RunOn(
      cpus, duration,
      // Touched by the thread that uses it: its pages are then near its CPU.
      [&](size_t thread) { std::memset(memory[thread]->data(), 1, kMemoryBytesPerThread); },
      [&](size_t thread) {
        std::byte* const from = memory[thread]->data() + positions[thread];
        std::memcpy(from + kHalfBytes, from, kCopyBytes);
        positions[thread] = (positions[thread] + kCopyBytes) % kHalfBytes;
        return 2.0 * kCopyBytes;
      });
  if (!slices.ok()) return slices.status();
  return BestSliceOfAll(*slices);
}

absl::StatusOr<CpuSpeed> MeasureCpus(absl::Duration duration) {
  const std::vector<int> cpus = Spread(AllowedCpus(), kCpuThreadsMax);
  std::vector<uint64_t> results(cpus.size(), 0);
  const absl::StatusOr<std::vector<Slices>> slices = RunOn(
      cpus, duration, [&](size_t thread) { results[thread] = thread + 1; },
      [&](size_t thread) {
        results[thread] = Steps(results[thread], kStepsAtOnce);
        return static_cast<double>(kStepsAtOnce);
      });
  if (!slices.ok()) return slices.status();
  CpuSpeed speed{BestSliceOfAll(*slices), BestSliceOfAll(*slices)};
  for (const Slices& own : *slices) {
    speed.slowest_steps_per_second =
        std::min(speed.slowest_steps_per_second, *std::max_element(own.begin(), own.end()));
  }
  return speed;
}

}  // namespace holdfast::preflight
