// Kills while tensors are captured from devices and restored to them, by the driver without a GPU:
// an image is void or whole, what was committed before stays, and a worker's death is not noticed.
// Every trainer checks what it restored bit for bit itself (exit code 3 if it differs).
#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kill/drill.h"

namespace holdfast {
namespace {

using Trainers = std::vector<std::unique_ptr<Trainer>>;
constexpr absl::Duration kDeadline = absl::Seconds(120);

class DeviceEndToEnd : public ::testing::Test {
 protected:
  DeviceEndToEnd() {
    drill_.Set("LD_LIBRARY_PATH", HOLDFAST_TEST_FAKE_CUDA);
    drill_.Set("HOLDFAST_DRILL_DEVICE", "1");
    drill_.Set("HOLDFAST_BLOCK_BYTES", "4KiB");
  }

  // All end with code 0 and had no trouble.
  void ExpectFinished(Trainers& trainers) {
    for (const auto& trainer : trainers) {
      EXPECT_EQ(trainer->Wait(kDeadline), 0) << trainer->output() << "\n" << drill_.Log();
      EXPECT_FALSE(trainer->HasSaid("trouble")) << trainer->output();
    }
  }

  // Both ranks kill themselves in their last save, of step 4.
  Trainers RunToTheDeathOf(const std::string& drill) {
    drill_.Set("HOLDFAST_DRILL", drill);
    Trainers trainers = drill_.StartTrainers(2, 4, 2);
    for (const auto& trainer : trainers) {
      EXPECT_EQ(trainer->Wait(kDeadline), 128 + SIGKILL) << trainer->output() << drill_.Log();
      EXPECT_FALSE(trainer->HasSaid("trouble")) << trainer->output();
    }
    EXPECT_TRUE(drill_.WaitAgentGone(kDeadline));
    drill_.Set("HOLDFAST_DRILL", "");
    return trainers;
  }

  Drill drill_;
};

TEST_F(DeviceEndToEnd, RanksThatDieInTheMiddleOfACaptureLeaveTheImageBefore) {
  const Trainers dead = RunToTheDeathOf("midway");
  for (const auto& trainer : dead) {
    const std::string& said = trainer->output();
    const size_t at = said.find("midway ");
    ASSERT_NE(at, std::string::npos) << said;
    int captured = 0;
    int blocks = 0;
    ASSERT_EQ(sscanf(said.c_str() + at, "midway %d %d", &captured, &blocks), 2) << said;
    EXPECT_LT(captured, blocks);
  }
  Trainers next = drill_.StartTrainers(2, 2, 2);
  ExpectFinished(next);
  for (const auto& trainer : next) {
    EXPECT_TRUE(trainer->HasSaid("restored 2 1")) << trainer->output();
  }
}

// The optimizer's update is on its way to the device beside the capture. Whether it met it, nobody
// says: it is the copier that compares, and it may be through before.
TEST_F(DeviceEndToEnd, AnImageThatMayBeTornIsVoidOrWhole) {
  drill_.Set("HOLDFAST_CHECK_SOURCE", "all");
  const Trainers dead = RunToTheDeathOf("torn");
  for (const auto& trainer : dead) EXPECT_TRUE(trainer->HasSaid("torn 4")) << trainer->output();
  Trainers next = drill_.StartTrainers(2, 2, 2);
  ExpectFinished(next);
  EXPECT_THAT(next[0]->LastNumber("restored"), testing::AnyOf(2u, 4u)) << next[0]->output();
  EXPECT_EQ(next[0]->LastNumber("restored"), next[1]->LastNumber("restored"));
}

TEST_F(DeviceEndToEnd, AWorkerThatIsKilledInACaptureOrARestoreIsNotNoticed) {
  uint64_t step = 0;
  // The first world is undisturbed: the next has something to restore.
  for (const std::string point :
       {"", "capture.begun", "capture.block_checksummed", "restore.piece_delivered"}) {
    SCOPED_TRACE(point);
    ASSERT_TRUE(drill_.WaitAgentGone(kDeadline)) << drill_.Log();
    drill_.ClearLog();
    drill_.Set("HOLDFAST_KILL_AT", point);
    Trainers trainers = drill_.StartTrainers(2, 4, 2);
    ExpectFinished(trainers);
    for (const auto& trainer : trainers) {
      EXPECT_EQ(trainer->LastNumber("restored").value_or(0), step) << trainer->output();
    }
    if (!point.empty()) {
      EXPECT_THAT(drill_.Log(), testing::HasSubstr(absl::StrCat("kill point ", point, " reached")));
    }
    step += 4;
  }
}

}  // namespace
}  // namespace holdfast
