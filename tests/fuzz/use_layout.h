// Everything that is asked of a layout that was accepted, by whoever accepts one.
#ifndef HOLDFAST_TESTS_FUZZ_USE_LAYOUT_H_
#define HOLDFAST_TESTS_FUZZ_USE_LAYOUT_H_

#include "format/layout.h"

namespace holdfast::fuzz {

// CHECKs that ranks hold pieces of their tensors within their buffers; that together they hold
// every byte, each stored by exactly one of them; and that what they store fills every buffer.
void UseLayout(const Layout& layout);

}  // namespace holdfast::fuzz

#endif  // HOLDFAST_TESTS_FUZZ_USE_LAYOUT_H_
