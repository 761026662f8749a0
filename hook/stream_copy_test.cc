// Every byte arrives, and none beside: all alignments around the sizes where the copy changes.
#include "hook/stream_copy.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace holdfast::hook {
namespace {

TEST(StreamCopyTest, CopiesExactlyTheBytesAtEveryAlignment) {
  constexpr uint64_t kRoom = kStreamBytesMin + 1024;
  constexpr std::byte kGuard{0xa5};
  std::vector<std::byte> source(kRoom);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 31 >> 3);
  std::vector<std::byte> target(kRoom);
  for (const uint64_t bytes :
       {uint64_t{0}, uint64_t{1}, kStreamBytesMin - 1, kStreamBytesMin, kStreamBytesMin + 1,
        kStreamBytesMin + 63, kStreamBytesMin + 64, kStreamBytesMin + 127}) {
    for (uint64_t from = 0; from < 64; from += 7) {
      for (uint64_t to = 0; to < 66; ++to) {
        std::fill(target.begin(), target.end(), kGuard);
        StreamCopy(target.data() + 64 + to, source.data() + from, bytes);
        ASSERT_EQ(std::memcmp(target.data() + 64 + to, source.data() + from, bytes), 0)
            << bytes << " " << from << " " << to;
        for (uint64_t i = 0; i < 64 + to; ++i) ASSERT_EQ(target[i], kGuard);
        for (uint64_t i = 64 + to + bytes; i < kRoom; ++i) ASSERT_EQ(target[i], kGuard);
      }
    }
  }
}

}  // namespace
}  // namespace holdfast::hook
