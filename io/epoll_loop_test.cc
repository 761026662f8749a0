#include "io/epoll_loop.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/mutex.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using ::testing::ElementsAre;

// Moves only when told.
class ManualClock final : public Clock {
 public:
  absl::Duration Elapsed() const override {
    MutexLock lock(mutex_);
    return now_;
  }
  absl::Time WallTime() const override { return absl::UnixEpoch(); }
  void Advance(absl::Duration duration) {
    MutexLock lock(mutex_);
    now_ += duration;
  }

 private:
  mutable Mutex mutex_;
  absl::Duration now_ ABSL_GUARDED_BY(mutex_) = absl::Seconds(1);
};

struct Pipe {
  Pipe() {
    int fds[2];
    CHECK(pipe(fds) == 0);
    reader.Reset(fds[0]);
    writer.Reset(fds[1]);
  }
  void WriteByte() const { CHECK(write(writer.get(), "x", 1) == 1); }
  void ReadByte() const {
    char byte;
    CHECK(read(reader.get(), &byte, 1) == 1);
  }
  UniqueFd reader;
  UniqueFd writer;
};

class EpollLoopTest : public testing::Test {
 protected:
  static std::unique_ptr<EpollLoop> Make(const Clock& clock) {
    auto loop = EpollLoop::Create(clock);
    CHECK_OK(loop.status());
    return *std::move(loop);
  }
  // Runs what is ready now: a few rounds, the last of which stops.
  void RunRounds(int count) {
    std::function<void()> next = [&] {
      if (--count == 0) {
        loop_->Stop();
      } else {
        loop_->Post(next);
      }
    };
    loop_->Post(next);
    loop_->Run();
  }

  ManualClock clock_;
  std::unique_ptr<EpollLoop> loop_ = Make(clock_);
};

TEST_F(EpollLoopTest, PostedFunctionsRunInOrder) {
  std::vector<int> ran;
  loop_->Post([&] {
    ran.push_back(1);
    loop_->Post([&] {
      ran.push_back(3);
      loop_->Stop();
    });
  });
  loop_->Post([&] { ran.push_back(2); });
  loop_->Run();
  EXPECT_THAT(ran, ElementsAre(1, 2, 3));
}

TEST_F(EpollLoopTest, StopEndsAfterTheFunctionThatRunsAndNothingIsLost) {
  std::vector<int> ran;
  loop_->Post([&] {
    ran.push_back(1);
    loop_->Post([&] { ran.push_back(3); });
    loop_->Stop();
  });
  loop_->Post([&] { ran.push_back(2); });
  loop_->Run();
  EXPECT_THAT(ran, ElementsAre(1));
  loop_->Stop();
  loop_->Run();  // returns at once
  EXPECT_THAT(ran, ElementsAre(1));
  loop_->Post([&] { loop_->Stop(); });
  loop_->Run();
  EXPECT_THAT(ran, ElementsAre(1, 2, 3));
}

TEST_F(EpollLoopTest, WhatHasNotRunIsDestroyedWithTheLoop) {
  const auto token = std::make_shared<int>(0);
  loop_->Post([token] { FAIL(); });
  loop_->RunAfter(absl::Seconds(1), [token] { FAIL(); });
  loop_.reset();
  EXPECT_EQ(token.use_count(), 1);
}

TEST_F(EpollLoopTest, TimersRunInOrderOfTheirTimesByTheInjectedClock) {
  std::vector<int> ran;
  loop_->RunAfter(absl::Milliseconds(20), [&] { ran.push_back(20); });
  loop_->RunAfter(absl::Milliseconds(10), [&] { ran.push_back(10); });
  loop_->RunAfter(absl::ZeroDuration(), [&] { ran.push_back(0); });
  const auto cancelled = loop_->RunAfter(absl::Milliseconds(15), [&] { ran.push_back(15); });
  const auto by_another = loop_->RunAfter(absl::Milliseconds(20), [&] { ran.push_back(21); });
  loop_->RunAfter(absl::Milliseconds(20), [&] { ran.push_back(22); });
  loop_->RunAfter(absl::Milliseconds(20) - absl::Nanoseconds(1),
                  [&] { loop_->CancelTimer(by_another); });
  loop_->CancelTimer(cancelled);
  loop_->CancelTimer(cancelled);
  loop_->CancelTimer(12345);
  RunRounds(3);
  EXPECT_THAT(ran, ElementsAre(0));
  clock_.Advance(absl::Milliseconds(10) - absl::Nanoseconds(1));
  RunRounds(3);
  EXPECT_THAT(ran, ElementsAre(0));
  clock_.Advance(absl::Nanoseconds(1));
  RunRounds(3);
  EXPECT_THAT(ran, ElementsAre(0, 10));
  clock_.Advance(absl::Seconds(1));
  RunRounds(3);
  EXPECT_THAT(ran, ElementsAre(0, 10, 20, 22));
}

TEST_F(EpollLoopTest, ATimerThatStartsItselfAgainDoesNotStarveTheRest) {
  int ticks = 0;
  std::function<void()> tick = [&] {
    ++ticks;
    loop_->RunAfter(absl::ZeroDuration(), tick);
  };
  tick();
  RunRounds(10);
  EXPECT_GE(ticks, 9);
  EXPECT_LE(ticks, 12);
}

TEST_F(EpollLoopTest, TheRealClockWakesALoopThatWaits) {
  loop_ = Make(RealClock());
  const absl::Duration begin = RealClock().Elapsed();
  absl::Duration ran_after;
  loop_->RunAfter(absl::Milliseconds(5), [&] {
    ran_after = RealClock().Elapsed() - begin;
    loop_->Stop();
  });
  loop_->Run();
  EXPECT_GE(ran_after, absl::Milliseconds(5));
}

TEST_F(EpollLoopTest, AReadyDescriptorIsReportedUntilItIsServed) {
  const Pipe pipe;
  int count = 0;
  pipe.WriteByte();
  loop_->Watch(pipe.reader.get(), EventLoop::FdEvents::kReadable, [&] {
    if (++count == 3) {
      pipe.ReadByte();
      loop_->Stop();
    }
  });
  loop_->Run();
  RunRounds(5);
  EXPECT_EQ(count, 3);
  pipe.WriteByte();
  RunRounds(2);
  EXPECT_GE(count, 4);
  loop_->Unwatch(pipe.reader.get());
  const int before = count;
  RunRounds(5);
  EXPECT_EQ(count, before);
}

TEST_F(EpollLoopTest, WritableAndHangUpAreReported) {
  Pipe pipe;
  std::string events;
  loop_->Watch(pipe.writer.get(), EventLoop::FdEvents::kWritable, [&] {
    events += 'w';
    loop_->Unwatch(pipe.writer.get());
  });
  loop_->Watch(pipe.reader.get(), EventLoop::FdEvents::kReadable, [&] {
    events += 'h';
    loop_->Unwatch(pipe.reader.get());
  });
  RunRounds(3);
  EXPECT_EQ(events, "w");
  pipe.writer.Reset();
  RunRounds(3);
  EXPECT_EQ(events, "wh");
}

TEST_F(EpollLoopTest, WatchingAgainReplaces) {
  const Pipe pipe;
  pipe.WriteByte();
  int second = 0;
  loop_->Watch(pipe.reader.get(), EventLoop::FdEvents::kReadable, [] { FAIL(); });
  loop_->Watch(pipe.reader.get(), EventLoop::FdEvents::kReadable, [&] { ++second; });
  RunRounds(3);
  EXPECT_GE(second, 1);
}

TEST_F(EpollLoopTest, AWatchRemovedInTheSameRoundIsNotCalledEvenIfItsNumberIsTakenAgain) {
  // Both are ready at once; whichever comes first removes the other one, closes it and watches a
  // new descriptor of the same number that is not ready.
  Pipe pipes[2];
  Pipe quiet;
  int calls = 0;
  for (int i = 0; i < 2; ++i) {
    pipes[i].WriteByte();
    loop_->Watch(pipes[i].reader.get(), EventLoop::FdEvents::kReadable, [&, i] {
      ++calls;
      pipes[i].ReadByte();
      Pipe& other = pipes[1 - i];
      const int number = other.reader.get();
      loop_->Unwatch(number);
      CHECK(dup2(quiet.reader.get(), number) == number);
      loop_->Watch(number, EventLoop::FdEvents::kReadable, [] { FAIL(); });
    });
  }
  RunRounds(5);
  EXPECT_EQ(calls, 1);
}

TEST_F(EpollLoopTest, AFunctionThatUnwatchesItselfKeepsWhatItHoldsWhileItRuns) {
  const Pipe pipe;
  pipe.WriteByte();
  const auto token = std::make_shared<int>(42);
  int seen = 0;
  loop_->Watch(pipe.reader.get(), EventLoop::FdEvents::kReadable, [&, token] {
    loop_->Unwatch(pipe.reader.get());
    seen = *token;
  });
  RunRounds(3);
  EXPECT_EQ(seen, 42);
  EXPECT_EQ(token.use_count(), 1);
}

TEST_F(EpollLoopTest, PostsOfManyThreadsAllRunOnTheLoopsThread) {
  constexpr int kThreads = 4;
  constexpr int kPosts = 2000;
  int ran = 0;  // the loop's thread only: TSan would see another
  std::vector<int> last(kThreads, -1);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kPosts; ++i) {
        loop_->Post([&, t, i] {
          EXPECT_EQ(last[t], i - 1);  // in order per thread
          last[t] = i;
          if (++ran == kThreads * kPosts) loop_->Stop();
        });
      }
    });
  }
  loop_->Run();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ran, kThreads * kPosts);
}

TEST_F(EpollLoopTest, StopFromAnotherThreadWakesALoopThatWaits) {
  std::thread stopper([&] { loop_->Stop(); });
  loop_->Run();
  stopper.join();
}

}  // namespace
}  // namespace holdfast
