// Copying much memory once: past the cache.
//
// A plain memcpy of a block-sized piece goes through the cache, because only memcpy's of about the
// size of the cache do not: every line of the target is read before it is written, and the training
// loop's working set is evicted. Measured on one core, 256 MiB in pieces of 1 MiB: memcpy 7.8 GB/s,
// streaming stores 11.9 GB/s, one memcpy of all of it 11.8 GB/s.
#ifndef HOLDFAST_HOOK_STREAM_COPY_H_
#define HOLDFAST_HOOK_STREAM_COPY_H_

#include <cstddef>
#include <cstdint>

namespace holdfast::hook {

// Shorter copies are plain: they may well be in the cache.
inline constexpr uint64_t kStreamBytesMin = uint64_t{64} << 10;

// Copies `bytes` bytes; the areas do not overlap. When it returns, a store with release publishes
// them like any other (streaming stores alone are not ordered: it ends with a fence).
void StreamCopy(std::byte* target, const std::byte* source, uint64_t bytes);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_STREAM_COPY_H_
