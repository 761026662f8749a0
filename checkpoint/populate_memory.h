// How pages of a memfd are made present: the kernel's way, or one that a test lets fail.
#ifndef HOLDFAST_CHECKPOINT_POPULATE_MEMORY_H_
#define HOLDFAST_CHECKPOINT_POPULATE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "absl/status/status.h"

namespace holdfast {

// Makes the pages of `bytes`, which maps `fd` at `offset_bytes`, present and writable. Threads:
// any; runs on a WorkPool. Errors: kResourceExhausted.
using PopulateMemory =
    std::function<absl::Status(int fd, uint64_t offset_bytes, std::span<std::byte> bytes)>;

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_POPULATE_MEMORY_H_
