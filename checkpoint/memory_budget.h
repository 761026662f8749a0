// The hard limit on the bytes of all rank memories of an agent together (--host-memory).
#ifndef HOLDFAST_CHECKPOINT_MEMORY_BUDGET_H_
#define HOLDFAST_CHECKPOINT_MEMORY_BUDGET_H_

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/statusor.h"

namespace holdfast {

class MemoryBudget;

// Bytes taken from a budget; gives them back in the destructor. Move-only.
//
// Threads: the event loop's. Lifetime: the budget outlives it.
class MemoryReservation {
 public:
  MemoryReservation() = default;
  MemoryReservation(MemoryReservation&& other) noexcept
      : budget_(std::exchange(other.budget_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  MemoryReservation& operator=(MemoryReservation&& other) noexcept;
  ~MemoryReservation();
  uint64_t bytes() const { return bytes_; }

 private:
  friend class MemoryBudget;
  MemoryReservation(MemoryBudget* budget, uint64_t bytes) : budget_(budget), bytes_(bytes) {}
  MemoryBudget* budget_ = nullptr;
  uint64_t bytes_ = 0;
};

// Threads: the event loop's.
class MemoryBudget {
 public:
  explicit MemoryBudget(uint64_t bytes_max) : bytes_max_(bytes_max) {}
  ~MemoryBudget();  // CHECKs that everything was given back
  MemoryBudget(const MemoryBudget&) = delete;
  MemoryBudget& operator=(const MemoryBudget&) = delete;

  // Errors: kResourceExhausted, with what it was for, asked, free and the limit.
  absl::StatusOr<MemoryReservation> Reserve(uint64_t bytes, const std::string& purpose);
  // For memory that exists already (a former worker reserved it): may exceed the limit, if the
  // limit was lowered between the two; nothing more is granted then.
  MemoryReservation ReserveExisting(uint64_t bytes);

  uint64_t bytes_max() const { return bytes_max_; }
  uint64_t used_bytes() const { return used_bytes_; }
  uint64_t free_bytes() const { return used_bytes_ < bytes_max_ ? bytes_max_ - used_bytes_ : 0; }

 private:
  friend class MemoryReservation;
  const uint64_t bytes_max_;
  uint64_t used_bytes_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_MEMORY_BUDGET_H_
