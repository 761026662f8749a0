// Goal: sample i is a function of the seed and i, wherever a run was interrupted.
// Method: one long run against runs that are cut at every place and go on from the state alone.
#include "examples/tiny_lm/corpus.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

std::vector<size_t> Take(Sampler& sampler, size_t count) {
  std::vector<size_t> windows(count);
  for (size_t& window : windows) window = sampler.Next();
  return windows;
}

TEST(Sampler, EveryEpochVisitsEveryWindowOnceInAnotherOrder) {
  constexpr size_t kWindows = 17;
  Sampler sampler(1, kWindows);
  std::vector<std::vector<size_t>> epochs;
  for (int epoch = 0; epoch < 4; ++epoch) {
    epochs.push_back(Take(sampler, kWindows));
    std::vector<size_t> sorted = epochs.back();
    std::sort(sorted.begin(), sorted.end());
    for (size_t i = 0; i < kWindows; ++i) EXPECT_EQ(sorted[i], i);
    for (int other = 0; other < epoch; ++other) {
      EXPECT_NE(epochs[static_cast<size_t>(other)], epochs.back());
    }
  }
  EXPECT_EQ(sampler.state().samples_consumed, 4 * kWindows);
}

TEST(Sampler, ARunThatIsInterruptedAnywhereGoesOnWithTheSameSamples) {
  constexpr size_t kWindows = 7;
  constexpr size_t kSamples = 30;  // more than four epochs
  Sampler whole(3, kWindows);
  const std::vector<size_t> expected = Take(whole, kSamples);
  for (size_t cut = 0; cut <= kSamples; ++cut) {
    Sampler before(3, kWindows);
    std::vector<size_t> found = Take(before, cut);
    // The seed of the new process does not matter: the state says all.
    Sampler after(99, kWindows);
    ASSERT_TRUE(after.Restore(before.state()).ok());
    const std::vector<size_t> rest = Take(after, kSamples - cut);
    found.insert(found.end(), rest.begin(), rest.end());
    EXPECT_EQ(found, expected) << "cut at " << cut;
    EXPECT_EQ(after.state(), whole.state()) << "cut at " << cut;
  }
}

TEST(Sampler, SeedsDifferAndAWrongCursorIsRefused) {
  Sampler one(1, 50);
  Sampler two(2, 50);
  EXPECT_NE(Take(one, 50), Take(two, 50));
  EXPECT_TRUE(absl::IsInvalidArgument(one.Restore({60, 1, 51})));
}

TEST(Corpus, WindowsOverlapByTheOneTokenThatIsOnlyPredicted) {
  const Corpus corpus = *Corpus::FromText("abcdefghij", 4);
  EXPECT_EQ(corpus.window_count(), 3U);
  for (size_t i = 0; i < 3; ++i) {
    for (size_t k = 0; k < 4; ++k) {
      EXPECT_EQ(corpus.Window(i)[k], TokenOf(static_cast<char>('a' + 3 * i + k)));
    }
  }
  EXPECT_TRUE(absl::IsInvalidArgument(Corpus::FromText("abc", 4).status()));
}

TEST(Corpus, EveryByteHasATokenAndPrintableOnesTheirOwn) {
  std::vector<int> uses(kVocabularySize, 0);
  for (int c = 0; c < 256; ++c) {
    const uint8_t token = TokenOf(static_cast<char>(c));
    ASSERT_LT(token, kVocabularySize);
    ++uses[token];
  }
  for (size_t token = 0; token < 96; ++token) EXPECT_EQ(uses[token], 1) << token;
  EXPECT_EQ(uses[96], 256 - 96);
}

TEST(Corpus, ADirectoryGivesItsDocumentsInOrderAndNothingElse) {
  const std::filesystem::path directory = std::filesystem::path(testing::TempDir()) / "corpus";
  std::filesystem::remove_all(directory);
  std::filesystem::create_directories(directory / "a");
  std::filesystem::create_directories(directory / "build");
  std::ofstream(directory / "b.md") << "bbbb";
  std::ofstream(directory / "a" / "x.h") << "aaaa";
  std::ofstream(directory / "c.txt") << "cccc";
  std::ofstream(directory / "build" / "d.md") << "dddd";
  const Corpus corpus = *Corpus::Load({directory.string()}, 4);
  EXPECT_EQ(corpus.digest(), Corpus::FromText("aaaabbbb", 4)->digest());
  EXPECT_NE(corpus.digest(), Corpus::FromText("aaaabbba", 4)->digest());
  EXPECT_TRUE(absl::IsNotFound(Corpus::Load({(directory / "none.md").string()}, 4).status()));
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace tiny_lm
