// Makes hostile inputs out of good ones: everything that can be enumerated (cut off at every byte,
// every byte changed, every number an extreme one), then random edits. Whatever was done, the
// checksums fit again.
#ifndef HOLDFAST_TESTS_FUZZ_MUTATOR_H_
#define HOLDFAST_TESTS_FUZZ_MUTATOR_H_

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {

// The same with what a reader checks first put right: sizes in the frame and checksums. An input
// too short to have them stays as it is.
std::string Sealed(Form form, std::string input);

// Calls `visit` with every enumerated mutation of a seed; `what` says which.
using Visit = std::function<void(const std::string& input, const std::string& what)>;
void EnumerateMutations(Form form, const std::string& seed, const Visit& visit);

// Threads: one.
class Mutator {
 public:
  // `seeds` is not empty and outlives this.
  Mutator(Form form, const std::vector<std::string>& seeds, uint64_t random_seed)
      : form_(form), seeds_(seeds), random_(random_seed) {}

  // A seed with one or a few random edits.
  std::string Next();

 private:
  void Edit(std::string& input);
  void EditText(std::string& input);
  size_t Below(size_t limit) { return limit == 0 ? 0 : random_() % limit; }

  const Form form_;
  const std::vector<std::string>& seeds_;
  std::mt19937_64 random_;
};

}  // namespace holdfast::fuzz

#endif  // HOLDFAST_TESTS_FUZZ_MUTATOR_H_
