#include "tests/support/allocation_meter.h"

#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "base/check.h"

namespace {
std::atomic<size_t> g_bytes{0};
std::atomic<size_t> g_peak{0};
std::atomic<size_t> g_limit{holdfast::AllocationMeter::kNoLimit};
std::atomic<bool> g_is_metered{false};
}  // namespace

void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  if (g_bytes + bytes > g_limit) return nullptr;
  void* block = std::malloc(bytes == 0 ? 1 : bytes);
  if (block == nullptr) return nullptr;
  const size_t now = g_bytes += malloc_usable_size(block);
  if (now > g_peak) g_peak = now;
  return block;
}
void* operator new(size_t bytes) {
  void* block = operator new(bytes, std::nothrow);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
void operator delete(void* block) noexcept {
  if (block != nullptr) g_bytes -= malloc_usable_size(block);
  std::free(block);
}
void operator delete(void* block, size_t) noexcept { operator delete(block); }
void operator delete(void* block, const std::nothrow_t&) noexcept { operator delete(block); }

namespace holdfast {

AllocationMeter::AllocationMeter(size_t growth_bytes_max) {
  CHECK(!g_is_metered.exchange(true));
  before_ = g_bytes;
  g_peak = before_;
  if (growth_bytes_max != kNoLimit) g_limit = before_ + growth_bytes_max;
}

AllocationMeter::~AllocationMeter() {
  g_limit = kNoLimit;
  g_is_metered = false;
}

size_t AllocationMeter::GrowthPeak() const { return g_peak - before_; }

}  // namespace holdfast
