#include "io/thread_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "io/epoll_loop.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

// Opens once.
class Gate {
 public:
  void Open() {
    {
      MutexLock lock(mutex_);
      open_ = true;
    }
    changed_.SignalAll();
  }
  void Wait() {
    MutexLock lock(mutex_);
    while (!open_) changed_.Wait(mutex_);
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool open_ ABSL_GUARDED_BY(mutex_) = false;
};

class ThreadPoolTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_OK_AND_ASSIGN(loop_, EpollLoop::Create(RealClock())); }
  std::unique_ptr<EpollLoop> loop_;
};

TEST_F(ThreadPoolTest, DoneRunsOnTheLoopsThreadAfterItsWork) {
  ASSERT_OK_AND_ASSIGN(const auto pool, ThreadPool::Create(*loop_, 3));
  constexpr int kCount = 1000;
  const std::thread::id loop_thread = std::this_thread::get_id();
  int done_count = 0;
  for (int i = 0; i < kCount; ++i) {
    const auto worked = std::make_shared<int>(0);  // not atomic: TSan checks the hand-over
    pool->Run(
        [worked, loop_thread] {
          EXPECT_NE(std::this_thread::get_id(), loop_thread);
          *worked = 1;
        },
        [&, worked] {
          EXPECT_EQ(std::this_thread::get_id(), loop_thread);
          EXPECT_EQ(*worked, 1);
          if (++done_count == kCount) loop_->Stop();
        });
  }
  loop_->Run();
  EXPECT_EQ(done_count, kCount);
}

TEST_F(ThreadPoolTest, AsMuchRunsAtOnceAsThereAreThreads) {
  constexpr int kThreads = 4;
  ASSERT_OK_AND_ASSIGN(const auto pool, ThreadPool::Create(*loop_, kThreads));
  std::atomic<int> inside = 0;
  Gate all_inside;
  int done_count = 0;
  for (int i = 0; i < kThreads; ++i) {
    pool->Run(
        [&] {
          if (++inside == kThreads) all_inside.Open();
          all_inside.Wait();  // for ever, if they do not run together
        },
        [&] {
          if (++done_count == kThreads) loop_->Stop();
        });
  }
  loop_->Run();
  EXPECT_EQ(inside, kThreads);
}

TEST_F(ThreadPoolTest, DestructionWaitsForWorkThatBeganAndDropsTheRest) {
  Gate begun;
  Gate go_on;
  bool first_done = false;
  const auto token = std::make_shared<int>(0);
  {
    ASSERT_OK_AND_ASSIGN(auto pool, ThreadPool::Create(*loop_, 1));
    pool->Run(
        [&] {
          begun.Open();
          go_on.Wait();
        },
        [&] {
          first_done = true;
          loop_->Stop();
        });
    pool->Run([token] { FAIL(); }, [token] { FAIL(); });
    begun.Wait();
    std::thread opener([&] {
      // Opens once the destructor has dropped what had not begun.
      while (token.use_count() > 1) std::this_thread::yield();
      go_on.Open();
    });
    pool.reset();
    opener.join();
  }
  EXPECT_EQ(token.use_count(), 1);
  EXPECT_FALSE(first_done);
  loop_->Run();
  EXPECT_TRUE(first_done);
}

TEST_F(ThreadPoolTest, WorkWithoutDone) {
  ASSERT_OK_AND_ASSIGN(const auto pool, ThreadPool::Create(*loop_, 1));
  bool ran = false;
  pool->Run([&] { ran = true; }, nullptr);
  pool->Run([] {}, [&] { loop_->Stop(); });
  loop_->Run();
  EXPECT_TRUE(ran);
}

}  // namespace
}  // namespace holdfast
