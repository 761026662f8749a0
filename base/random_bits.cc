#include "base/random_bits.h"

#include <sys/random.h>

#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {

uint64_t RandomBits() {
  uint64_t bits = 0;
  // Cannot fail for 8 bytes once the kernel's pool is seeded, and waits until it is.
  CHECK(getrandom(&bits, sizeof(bits), 0) == sizeof(bits));
  return bits;
}

std::string RandomUuid() {
  const uint64_t high = (RandomBits() & ~uint64_t{0xf000}) | 0x4000;
  const uint64_t low = (RandomBits() & ~(uint64_t{3} << 62)) | (uint64_t{2} << 62);
  return absl::StrFormat("%08x-%04x-%04x-%04x-%012x", high >> 32, (high >> 16) & 0xffff,
                         high & 0xffff, low >> 48, low & 0xffffffffffff);
}

}  // namespace holdfast
