// Counts what the program has allocated through operator new, which whoever links this replaces:
// for promises of bounded memory.
//
// Model: usable sizes of blocks, as malloc gives them. Not modelled: malloc called directly (C
// libraries), over-aligned blocks, fragmentation.
#ifndef HOLDFAST_TESTS_SUPPORT_ALLOCATION_METER_H_
#define HOLDFAST_TESTS_SUPPORT_ALLOCATION_METER_H_

#include <cstddef>

namespace holdfast {

// Watches from its construction to its destruction; one at a time (CHECKed).
//
// Threads: allocations of all threads count.
class AllocationMeter {
 public:
  static constexpr size_t kNoLimit = static_cast<size_t>(-1);

  // An allocation that would bring the growth above `growth_bytes_max` throws std::bad_alloc.
  explicit AllocationMeter(size_t growth_bytes_max = kNoLimit);
  ~AllocationMeter();
  AllocationMeter(const AllocationMeter&) = delete;
  AllocationMeter& operator=(const AllocationMeter&) = delete;

  // The most that was allocated at once, without what had been there before.
  size_t GrowthPeak() const;

 private:
  size_t before_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_SUPPORT_ALLOCATION_METER_H_
