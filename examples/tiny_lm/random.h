// Random numbers that are the same everywhere and can be kept in a checkpoint.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_RANDOM_H_
#define HOLDFAST_EXAMPLES_TINY_LM_RANDOM_H_

#include <cstdint>

namespace tiny_lm {

// SplitMix64's finaliser: a bijection of 64-bit numbers that looks random.
inline uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// SplitMix64. Its state is one number, which is what a checkpoint keeps.
class Random {
 public:
  explicit Random(uint64_t state) : state_(state) {}
  uint64_t state() const { return state_; }
  uint64_t Next() {
    const uint64_t result = Mix(state_);
    state_ += 0x9e3779b97f4a7c15;
    return result;
  }
  // Uniform in [0, bound), without bias worth the name for a small bound.
  uint64_t Below(uint64_t bound) { return Next() % bound; }
  // Uniform in [0, 1).
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_RANDOM_H_
