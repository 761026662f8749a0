#include "examples/tiny_lm/corpus.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <utility>

#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"
#include "examples/tiny_lm/random.h"

namespace tiny_lm {
namespace {

namespace fs = std::filesystem;

absl::StatusOr<std::vector<std::string>> FilesOf(const std::string& path) {
  std::error_code error;
  if (!fs::is_directory(path, error)) return std::vector<std::string>{path};
  std::vector<std::string> files;
  for (fs::recursive_directory_iterator entry(path, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (entry->is_directory(error) && (name.starts_with(".") || name == "build")) {
      entry.disable_recursion_pending();
    } else if (name.ends_with(".md") || name.ends_with(".h")) {
      files.push_back(entry->path().string());
    }
  }
  if (error) {
    return absl::NotFoundError(absl::StrFormat("corpus '%s': %s", path, error.message()));
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

uint8_t TokenOf(char c) {
  if (c >= ' ' && c <= '~') return static_cast<uint8_t>(c - ' ');
  return c == '\n' ? 95 : 96;
}

absl::StatusOr<Corpus> Corpus::Load(const std::vector<std::string>& paths, size_t window_size) {
  std::string text;
  for (const std::string& path : paths) {
    ASSIGN_OR_RETURN(const std::vector<std::string> files, FilesOf(path));
    for (const std::string& file : files) {
      std::ifstream stream(file, std::ios::binary);
      if (!stream) return absl::NotFoundError(absl::StrFormat("corpus: cannot read '%s'", file));
      text.append(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    }
  }
  return FromText(text, window_size);
}

absl::StatusOr<Corpus> Corpus::FromText(const std::string& text, size_t window_size) {
  if (text.size() < window_size) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "corpus: expected at least %d characters, found %d", window_size, text.size()));
  }
  std::vector<uint8_t> tokens(text.size());
  std::transform(text.begin(), text.end(), tokens.begin(), TokenOf);
  return Corpus(std::move(tokens), window_size);
}

Corpus::Corpus(std::vector<uint8_t> tokens, size_t window_size)
    : tokens_(std::move(tokens)), window_size_(window_size) {
  for (const uint8_t token : tokens_) digest_ = Mix(digest_ ^ token);
}

std::span<const uint8_t> Corpus::Window(size_t index) const {
  return std::span(tokens_).subspan(index * (window_size_ - 1), window_size_);
}

Sampler::Sampler(uint64_t seed, size_t window_count) : order_(window_count) {
  state_.shuffle_state = Mix(seed);
  Shuffle();
}

absl::Status Sampler::Restore(const State& state) {
  if (state.cursor > order_.size()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "sampler: cursor %d, but an epoch has %d windows", state.cursor, order_.size()));
  }
  state_ = state;
  Shuffle();
  return absl::OkStatus();
}

size_t Sampler::Next() {
  if (state_.cursor == order_.size()) {
    state_.shuffle_state = next_shuffle_state_;
    state_.cursor = 0;
    Shuffle();
  }
  ++state_.samples_consumed;
  return order_[state_.cursor++];
}

// Fisher and Yates.
void Sampler::Shuffle() {
  Random random(state_.shuffle_state);
  std::iota(order_.begin(), order_.end(), 0U);
  for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random.Below(i)]);
  next_shuffle_state_ = random.state();
}

}  // namespace tiny_lm
