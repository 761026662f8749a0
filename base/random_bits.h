// The kernel's random numbers: for names that must never come twice. What a test must be able to
// repeat takes its bits from whoever makes it.
#ifndef HOLDFAST_BASE_RANDOM_BITS_H_
#define HOLDFAST_BASE_RANDOM_BITS_H_

#include <cstdint>
#include <string>

namespace holdfast {

// Threads: any. May wait early in the machine's boot.
uint64_t RandomBits();

// A UUID of RFC 4122, version 4, in small letters.
std::string RandomUuid();

}  // namespace holdfast

#endif  // HOLDFAST_BASE_RANDOM_BITS_H_
