// How bytes of tensors in host memory are read, and how those of tensors anywhere are compared with
// their image. (Device memory is not read but copied by the device: device_queue.h.)
#ifndef HOLDFAST_HOOK_SOURCE_READER_H_
#define HOLDFAST_HOOK_SOURCE_READER_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hook/error.h"
#include "hook/stream_copy.h"

namespace holdfast::hook {

class SourceComparer {
 public:
  virtual ~SourceComparer() = default;
  // True if the bytes at `copy` are those of the runs that SourceReader::Read would copy. Errors:
  // the source could not be read.
  virtual Result<bool> Equal(const std::byte* copy, const std::byte* source, uint64_t run_bytes,
                             uint64_t count, uint64_t stride) = 0;
};

// Threads: any, at the same time.
class SourceReader : public SourceComparer {
 public:
  // Copies `count` runs of `run_bytes`, `stride` bytes apart in the source, to `target`, where they
  // lie one behind the other. Returns after completion.
  virtual void Read(std::byte* target, const std::byte* source, uint64_t run_bytes, uint64_t count,
                    uint64_t stride) = 0;
};

class HostSourceReader final : public SourceReader {
 public:
  void Read(std::byte* target, const std::byte* source, uint64_t run_bytes, uint64_t count,
            uint64_t stride) override {
    for (uint64_t run = 0; run < count; ++run) {
      StreamCopy(target + run * run_bytes, source + run * stride, run_bytes);
    }
  }
  Result<bool> Equal(const std::byte* copy, const std::byte* source, uint64_t run_bytes,
                     uint64_t count, uint64_t stride) override {
    for (uint64_t run = 0; run < count; ++run) {
      if (std::memcmp(copy + run * run_bytes, source + run * stride, run_bytes) != 0) return false;
    }
    return true;
  }
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_SOURCE_READER_H_
