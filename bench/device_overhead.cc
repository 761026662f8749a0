// What our own code costs when tensors are captured from devices: on a driver that does nothing
// (tests/support/null_cuda), so that neither a bus nor a GPU is in it. One copier thread.
//
// Usage: bench_device_overhead LIBCUDA. Prints microseconds, each the median of 21 saves:
//   save    hf_save's, of 10,000 tensors
//   chunk   from the first to the last of 4096 blocks with one copy each, per block
//   tensor  the same of 10,000 small tensors that are not joined, per tensor
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "base/check.h"
#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {
namespace {

constexpr int kSaves = 21;

struct Cost {
  double save_us = 0;
  double capture_us = 0;
};

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + kSaves / 2, values.end());
  return values[kSaves / 2];
}

// `count` tensors of `bytes`, `gap_bytes` apart in the image.
Cost Measure(uint32_t count, uint64_t bytes, uint64_t gap_bytes, uint64_t block_bytes) {
  TestAgent agent;
  HostSourceReader host;
  Settings settings = TestSettings(agent);
  settings.copy_threads = 1;
  Result<std::unique_ptr<Job>> job = OpenTestJob(settings, &host);
  CHECK(job.ok());
  std::mt19937 random(1);
  TestBuffers buffers;
  TestPlan plan;
  plan.block_bytes = block_bytes;
  for (uint32_t i = 0; i < count; ++i) {
    buffers.Add("t" + std::to_string(i), bytes, 0, random);
    plan.ops.push_back({i * (bytes + gap_bytes), 0, bytes, 1, 0, i, 0});
  }
  plan.block_count =
      static_cast<uint32_t>((count * (bytes + gap_bytes) + block_bytes - 1) / block_bytes);
  agent.SetPlan([plan](const TestDocument&) { return plan; });
  CHECK(RegisterAll(*job.value(), buffers).ok());
  std::vector<double> saves;
  std::vector<double> captures;
  for (uint64_t step = 1; step <= kSaves; ++step) {
    const int64_t begun_ns = MonotonicNs();
    CHECK(job.value()->Save(step, NoOptions()).ok());
    saves.push_back(static_cast<double>(MonotonicNs() - begun_ns) / 1e3);
    CHECK(job.value()->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
    hf_save_report report = {};
    CHECK(job.value()->Report(step, &report).ok());
    CHECK(report.device_bytes == count * bytes);
    captures.push_back(static_cast<double>(report.device_ns) / 1e3);
    for (uint32_t slot = 0; slot < 2; ++slot) {
      if (agent.shared().slots[slot].step.load() == step) agent.Grant(slot);
    }
  }
  return {Median(saves), Median(captures)};
}

int Main(const char* driver) {
  if (dlopen(driver, RTLD_NOW | RTLD_LOCAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  constexpr uint32_t kBlocks = 4096;
  constexpr uint32_t kTensors = 10'000;
  const Cost blocks = Measure(kBlocks, 4096, 0, 4096);
  const Cost tensors = Measure(kTensors, 64, 64, uint64_t{1} << 20);
  std::printf("{\"save\": %.2f, \"chunk\": %.3f, \"tensor\": %.3f}\n", tensors.save_us,
              blocks.capture_us / kBlocks, tensors.capture_us / kTensors);
  return 0;
}

}  // namespace
}  // namespace holdfast::hook

int main(int argc, char** argv) {
  if (argc == 2) return holdfast::hook::Main(argv[1]);
  std::fprintf(stderr, "usage: %s LIBCUDA\n", argv[0]);
  return 2;
}
