// Takes an input apart into numbers and texts, for targets whose argument is no bytes. Behind its
// end everything is 0 and empty.
#ifndef HOLDFAST_TESTS_FUZZ_INPUT_READER_H_
#define HOLDFAST_TESTS_FUZZ_INPUT_READER_H_

#include <algorithm>
#include <cstdint>
#include <string>

#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {

class InputReader {
 public:
  explicit InputReader(Input input) : rest_(input) {}

  bool empty() const { return rest_.empty(); }
  uint8_t Byte() {
    if (rest_.empty()) return 0;
    const uint8_t byte = rest_[0];
    rest_ = rest_.subspan(1);
    return byte;
  }
  // Small ones, and by chance one that is near a power of two.
  uint64_t Number() {
    const uint8_t kind = Byte();
    if (kind < 0xC0) return kind % 16;
    return (uint64_t{1} << (Byte() % 64)) + Byte() - 1;
  }
  // Begins with its length.
  std::string Text() {
    const size_t bytes = std::min<size_t>(rest_.size(), Byte());
    std::string text(rest_.begin(),
                     rest_.begin() + static_cast<ptrdiff_t>(std::min(bytes, rest_.size())));
    rest_ = rest_.subspan(text.size());
    return text;
  }

 private:
  Input rest_;
};

}  // namespace holdfast::fuzz

#endif  // HOLDFAST_TESTS_FUZZ_INPUT_READER_H_
