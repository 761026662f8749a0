#include "hook/stream_copy.h"

#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace holdfast::hook {

#ifdef __SSE2__

void StreamCopy(std::byte* target, const std::byte* source, uint64_t bytes) {
  if (bytes < kStreamBytesMin) {
    if (bytes > 0) std::memcpy(target, source, bytes);
    return;
  }
  constexpr uint64_t kLine = 64;
  constexpr uint64_t kAhead = 1024;  // of prefetching, which may reach behind the end: it is a hint
  const uint64_t head = (kLine - reinterpret_cast<uintptr_t>(target) % kLine) % kLine;
  std::memcpy(target, source, head);
  uint64_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
    const char* from = reinterpret_cast<const char*>(source + at);
    const __m128i* in = reinterpret_cast<const __m128i*>(from);
    __m128i* out = reinterpret_cast<__m128i*>(target + at);
    _mm_prefetch(from + kAhead, _MM_HINT_NTA);
    const __m128i a = _mm_loadu_si128(in);
    const __m128i b = _mm_loadu_si128(in + 1);
    const __m128i c = _mm_loadu_si128(in + 2);
    const __m128i d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  std::memcpy(target + at, source + at, bytes - at);
  _mm_sfence();
}

#else

void StreamCopy(std::byte* target, const std::byte* source, uint64_t bytes) {
  if (bytes > 0) std::memcpy(target, source, bytes);
}

#endif

}  // namespace holdfast::hook
