// Goal: a save that is made due is made by every rank at one and the same step, which none of them
// has asked for yet; where that cannot be, nothing is made due.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <vector>

#include "checkpoint/engine_testing.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::HasSubstr;

// hf_due, as hook/job.cc does it.
class Asking {
 public:
  explicit Asking(abi::RankPage& page) : page_(page) {}
  bool Due(uint64_t step) {
    page_.due_asked_step.store(step, std::memory_order_seq_cst);
    const uint64_t wanted = page_.due_step.load(std::memory_order_seq_cst);
    if (wanted != wanted_ && step >= wanted) {
      wanted_ = wanted;
      return wanted != 0;
    }
    return false;
  }

 private:
  abi::RankPage& page_;
  uint64_t wanted_ = 0;
};

TEST(MakeDue, AllRanksSaveAtOneStepThatNoneHasAskedForYet) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "a"));
  Asking first(trainers[0]->script->page()), second(trainers[1]->script->page());
  for (uint64_t step = 1; step <= 7; ++step) EXPECT_FALSE(first.Due(step));
  for (uint64_t step = 1; step <= 5; ++step) EXPECT_FALSE(second.Due(step));
  ASSERT_OK_AND_ASSIGN(const Step due, harness.engine().MakeDue("job", "a"));
  EXPECT_GT(due, Step{7});
  for (Asking* rank : {&first, &second}) {
    for (uint64_t step = 8; step < 30; ++step) EXPECT_EQ(rank->Due(step), step == Value(due));
  }
  // Again, of another step.
  ASSERT_OK_AND_ASSIGN(const Step next, harness.engine().MakeDue("job", "a"));
  EXPECT_GT(next, Step{29});
}

TEST(MakeDue, WhereNotEveryRankCanBeToldNoneIs) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  const auto refused = [&](const std::string& key, const std::string& text) {
    EXPECT_THAT(harness.engine().MakeDue("job", key).status(),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(text)));
  };
  refused("a", "found 0");
  ASSERT_OK_AND_ASSIGN(TestTrainer* const first, harness.Open(Rank{0}, 2, "a"));
  ASSERT_OK(harness.Register(*first));
  refused("a", "rank 0 has not asked");
  first->script->page().due_asked_step.store(3);
  refused("a", "all 2 ranks to be open, found 1");
  ASSERT_OK_AND_ASSIGN(TestTrainer* const second, harness.Open(Rank{1}, 2, "a"));
  ASSERT_OK(harness.Register(*second));
  refused("a", "rank 1 has not asked");
  second->script->page().due_asked_step.store(3);
  refused("b", "found 0");  // of another attempt
  EXPECT_EQ(first->script->page().due_step.load(), 0u);
  // A rank may write there what it likes.
  second->script->page().due_asked_step.store(UINT64_MAX - 1);
  EXPECT_THAT(harness.engine().MakeDue("job", "a").status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("too fast")));
  second->script->page().due_asked_step.store(3);
  EXPECT_OK(harness.engine().MakeDue("job", "a").status());
  harness.Close(*second);
  refused("a", "found 1");
}

TEST(OpenSessions, AreToldByTheNamesThatTheyWereOpenedWith) {
  SimDisk disk;
  EngineHarness harness(disk, {});
  EXPECT_TRUE(harness.engine().open_sessions().empty());
  ASSERT_OK_AND_ASSIGN(const auto trainers, harness.Launch(2, "a"));
  std::map<uint32_t, Engine::OpenSession> open;  // by process
  for (const Engine::OpenSession& session : harness.engine().open_sessions()) {
    open[session.process_id] = session;
  }
  ASSERT_EQ(open.size(), 2u);
  for (const TestTrainer* trainer : trainers) {
    const Engine::OpenSession& session = open[trainer->process_id];
    EXPECT_EQ(session.job, "job");
    EXPECT_EQ(session.attempt_key, "a");
    EXPECT_EQ(session.rank, trainer->rank);
    EXPECT_EQ(session.world_size, 2u);
  }
  harness.Close(*trainers[1]);
  const std::vector<Engine::OpenSession> left = harness.engine().open_sessions();
  ASSERT_EQ(left.size(), 1u);
  EXPECT_EQ(left[0].process_id, trainers[0]->process_id);
}

}  // namespace
}  // namespace holdfast
