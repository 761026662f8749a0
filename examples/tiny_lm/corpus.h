// The data: characters of text files, cut into windows and visited in a shuffled order.
//
// Sample i is a function of the seed and i alone, whatever the number of ranks. How far the job has
// come is the sampler's state, three values that belong to a checkpoint: nothing is derived from
// the step.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_CORPUS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_CORPUS_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tiny_lm {

// Printable ASCII, newline, and one token for everything else.
inline constexpr uint32_t kVocabularySize = 97;
uint8_t TokenOf(char c);

class Corpus {
 public:
  // Reads the files; of a directory all *.md and *.h below it, in the order of their paths. A
  // window is `window_size` tokens, and begins `window_size - 1` after the one before it. Errors:
  // kNotFound, kInvalidArgument (not enough text for one window).
  static absl::StatusOr<Corpus> Load(const std::vector<std::string>& paths, size_t window_size);
  static absl::StatusOr<Corpus> FromText(const std::string& text, size_t window_size);

  size_t window_count() const { return (tokens_.size() - 1) / (window_size_ - 1); }
  std::span<const uint8_t> Window(size_t index) const;
  // Of all tokens: two runs with different texts must not be compared.
  uint64_t digest() const { return digest_; }

 private:
  Corpus(std::vector<uint8_t> tokens, size_t window_size);
  std::vector<uint8_t> tokens_;
  size_t window_size_;
  uint64_t digest_ = 0;
};

// Visits all windows once per epoch, each epoch in another order.
//
// Threads: one at a time.
class Sampler {
 public:
  struct State {
    uint64_t samples_consumed = 0;
    uint64_t shuffle_state = 0;  // of the generator, before it shuffled this epoch
    uint64_t cursor = 0;         // windows of this epoch that were consumed
    bool operator==(const State&) const = default;
  };

  Sampler(uint64_t seed, size_t window_count);
  // Errors: kInvalidArgument (a cursor beyond the windows).
  absl::Status Restore(const State& state);
  const State& state() const { return state_; }
  // The window of the next sample.
  size_t Next();

 private:
  void Shuffle();
  State state_;
  uint64_t next_shuffle_state_ = 0;
  std::vector<uint32_t> order_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_CORPUS_H_
