#include "checkpoint/memory_budget.h"

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {

MemoryReservation& MemoryReservation::operator=(MemoryReservation&& other) noexcept {
  if (this != &other) {
    if (budget_ != nullptr) budget_->used_bytes_ -= bytes_;
    budget_ = std::exchange(other.budget_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

MemoryReservation::~MemoryReservation() {
  if (budget_ != nullptr) budget_->used_bytes_ -= bytes_;
}

MemoryBudget::~MemoryBudget() { CHECK(used_bytes_ == 0); }

absl::StatusOr<MemoryReservation> MemoryBudget::Reserve(uint64_t bytes,
                                                        const std::string& purpose) {
  if (bytes > free_bytes()) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("host memory: %s needs %d bytes, %d are free of --host-memory %d", purpose,
                        bytes, free_bytes(), bytes_max_));
  }
  return ReserveExisting(bytes);
}

MemoryReservation MemoryBudget::ReserveExisting(uint64_t bytes) {
  used_bytes_ += bytes;
  return MemoryReservation(this, bytes);
}

}  // namespace holdfast
