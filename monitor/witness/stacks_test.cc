#include "monitor/witness/stacks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace holdfast::monitor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// As Python 3.11's faulthandler prints it.
constexpr char kPython[] = R"(holdfast main thread 0x00007f1122334455
Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f0000000002 (most recent call first):
  File "/venv/site-packages/holdfast/witness.py", line 88 in _stacks

Thread 0x00007f1122334455 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3245 in all_reduce
  File "/home/somebody/train/loop.py", line 77 in train_step
  File "/home/somebody/train/main.py", line 12 in <module>
)";

RankStacks Python(uint32_t rank, const std::string& text) {
  return {Rank{rank}, StackKind::kPython, ParsePythonStacks(text)};
}

// A main thread of native code, innermost frame first.
RankStacks Native(uint32_t rank, const std::vector<std::string>& frames) {
  std::string text = absl::StrCat("thread ", 100 + rank, " main\n");
  for (const std::string& frame : frames) absl::StrAppend(&text, "  ", frame, "\n");
  absl::StrAppend(&text, "thread ", 200 + rank, "\n  poll (libc.so.6)\n");
  return {Rank{rank}, StackKind::kNative, ParseNativeStacks(text)};
}

TEST(StacksTest, PythonStacksAreRead) {
  const std::vector<ThreadStack> threads = ParsePythonStacks(kPython);
  ASSERT_EQ(threads.size(), 2u);  // without the one that wrote it
  EXPECT_FALSE(threads[0].main);
  EXPECT_TRUE(threads[1].main);
  EXPECT_THAT(threads[0].frames, ElementsAre("wait (python3.11/threading.py:331)",
                                             "_bootstrap (python3.11/threading.py:1002)"));
  EXPECT_THAT(threads[1].frames[1], "train_step (train/loop.py:77)");
  EXPECT_EQ(StackSignature({Rank{0}, StackKind::kPython, threads}),
            "<module> (train/main.py:12)\ntrain_step (train/loop.py:77)\n(in a collective)");
}

TEST(StacksTest, PlacesInsideACollectiveDoNotCount) {
  const std::vector<std::string> poll = {
      "poll (libc.so.6)", "gloo::transport::wait (libtorch_cpu.so)", "c10d::work (libtorch_cpu.so)",
      "step (app)", "main (app)"};
  const std::vector<std::string> futex = {"futex (libc.so.6)", "c10d::work (libtorch_cpu.so)",
                                          "step (app)", "main (app)"};
  EXPECT_EQ(StackSignature(Native(0, poll)), StackSignature(Native(1, futex)));
  EXPECT_EQ(StackSignature(Native(0, poll)), "main (app)\nstep (app)\n(in a collective)");
}

// One of n stands elsewhere, at every place, in every form of being elsewhere.
TEST(StacksTest, TheOddOneIsNamed) {
  const std::vector<std::string> waiting = {"poll (libc.so.6)", "ncclAllReduce (libnccl.so.2)",
                                            "step (app)", "main (app)"};
  const std::vector<std::vector<std::string>> elsewhere = {
      {"read (libc.so.6)", "load_batch (app)", "main (app)"},
      {"step (app)", "main (app)"},
      {"poll (libc.so.6)", "ncclAllReduce (libnccl.so.2)", "other_step (app)", "main (app)"},
      {"nanosleep (libc.so.6)", "step (app)", "main (app)"}};
  // Where it leaves the others, and what it does there.
  const std::vector<std::string> places = {"load_batch (app), at read (libc.so.6)", "step (app)",
                                           "other_step (app) (in a collective)",
                                           "nanosleep (libc.so.6)"};
  for (uint32_t count = 3; count <= 8; ++count) {
    for (uint32_t odd = 0; odd < count; ++odd) {
      for (size_t i = 0; i < elsewhere.size(); ++i) {
        const std::vector<std::string>& frames = elsewhere[i];
        std::vector<RankStacks> stacks;
        for (uint32_t rank = 0; rank < count; ++rank) {
          stacks.push_back(Native(rank, rank == odd ? frames : waiting));
        }
        const std::vector<Testimony> said = TestifyStacks(stacks);
        ASSERT_EQ(said.size(), 1u);
        EXPECT_EQ(said[0].claim, Claim::kOddStack);
        EXPECT_THAT(said[0].ranks, ElementsAre(Rank{odd}));
        EXPECT_EQ(said[0].sentence,
                  absl::StrCat("rank ", odd, " stands in ", places[i], ", the ", count - 1,
                               " others in step (app) (in a collective)"));
      }
    }
  }
}

TEST(StacksTest, WithoutAMajorityNobodyIsNamed) {
  const std::vector<std::string> a = {"a (app)", "main (app)"}, b = {"b (app)", "main (app)"};
  EXPECT_THAT(TestifyStacks(std::vector<RankStacks>{}), IsEmpty());
  EXPECT_THAT(TestifyStacks(std::vector<RankStacks>{Native(0, a), Native(1, b)}), IsEmpty());
  EXPECT_THAT(TestifyStacks(
                  std::vector<RankStacks>{Native(0, a), Native(1, a), Native(2, b), Native(3, b)}),
              IsEmpty());
  EXPECT_THAT(TestifyStacks(std::vector<RankStacks>{Native(0, a), Native(1, a), Native(2, a)}),
              IsEmpty());
}

TEST(StacksTest, ManyOddOnesCountLess) {
  std::vector<RankStacks> stacks;
  for (uint32_t rank = 0; rank < 8; ++rank) {
    stacks.push_back(Native(
        rank, {rank < 5 ? "same (app)" : absl::StrCat("other", rank, " (app)"), "main (app)"}));
  }
  const std::vector<Testimony> said = TestifyStacks(stacks);
  ASSERT_EQ(said.size(), 3u);
  for (const Testimony& testimony : said) EXPECT_LT(testimony.certainty, 0.5);
}

TEST(StacksTest, WherePythonSpeaksItsStacksCount) {
  std::vector<RankStacks> stacks;
  for (uint32_t rank = 0; rank < 4; ++rank) {
    std::string text = kPython;
    if (rank == 2) text.replace(text.find("loop.py\", line 77"), 17, "loop.py\", line 99");
    stacks.push_back(Python(rank, text));
    // The interpreter's own frames say nothing, here even the contrary.
    stacks.push_back(Native(rank, {rank == 0 ? "gc (python)" : "eval (python)", "main (python)"}));
  }
  const std::vector<Testimony> said = TestifyStacks(stacks);
  ASSERT_EQ(said.size(), 1u);
  EXPECT_THAT(said[0].ranks, ElementsAre(Rank{2}));
  EXPECT_THAT(said[0].sentence, HasSubstr("train_step (train/loop.py:99)"));
}

// Whatever a process writes: bounded, and nothing that could control a terminal.
TEST(StacksTest, HostileTextIsBounded) {
  std::mt19937 random(3);
  const std::string pieces[] = {
      "thread ", "Thread 0x1 (", "  File \"", "\", line ", " in ",
      "\n",      "\x1b[2J",      " main",     "9",         "holdfast main thread 0x1",
      "\xff"};
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (int i = 0; i < 60; ++i) text += pieces[random() % std::size(pieces)];
    for (const auto& threads : {ParsePythonStacks(text), ParseNativeStacks(text)}) {
      for (const ThreadStack& thread : threads) {
        for (const std::string& frame : thread.frames) {
          EXPECT_LE(frame.size(), kFrameBytesMax);
          EXPECT_EQ(frame.find('\x1b'), std::string::npos);
        }
      }
    }
  }
  std::string deep = "thread 1 main\n";
  for (int i = 0; i < 100'000; ++i) deep += "  f (app)\n";
  EXPECT_EQ(ParseNativeStacks(deep).at(0).frames.size(), kStackFramesMax);
  std::string many;
  for (int i = 0; i < 10'000; ++i) absl::StrAppend(&many, "thread ", i, "\n");
  EXPECT_EQ(ParseNativeStacks(many).size(), kStackThreadsMax);
}

}  // namespace
}  // namespace holdfast::monitor
