// How bytes of tensors are read: the seam between capture and the kind of memory that tensors live
// in. Host memory here.
#ifndef HOLDFAST_HOOK_SOURCE_READER_H_
#define HOLDFAST_HOOK_SOURCE_READER_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hook/stream_copy.h"

namespace holdfast::hook {

// Threads: any, at the same time.
class SourceReader {
 public:
  virtual ~SourceReader() = default;
  // Copies `count` runs of `run_bytes`, `stride` bytes apart in the source, to `target`, where they
  // lie one behind the other. Returns after completion.
  virtual void Read(std::byte* target, const std::byte* source, uint64_t run_bytes, uint64_t count,
                    uint64_t stride) = 0;
  // True if the bytes that Read would copy are those at `copy`.
  virtual bool Equal(const std::byte* copy, const std::byte* source, uint64_t run_bytes,
                     uint64_t count, uint64_t stride) = 0;
};

class HostSourceReader final : public SourceReader {
 public:
  void Read(std::byte* target, const std::byte* source, uint64_t run_bytes, uint64_t count,
            uint64_t stride) override {
    for (uint64_t run = 0; run < count; ++run) {
      StreamCopy(target + run * run_bytes, source + run * stride, run_bytes);
    }
  }
  bool Equal(const std::byte* copy, const std::byte* source, uint64_t run_bytes, uint64_t count,
             uint64_t stride) override {
    for (uint64_t run = 0; run < count; ++run) {
      if (std::memcmp(copy + run * run_bytes, source + run * stride, run_bytes) != 0) return false;
    }
    return true;
  }
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_SOURCE_READER_H_
