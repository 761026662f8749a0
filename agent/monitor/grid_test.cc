// Reports and the steps that take them: side by side, whenever either began.
#include "agent/monitor/grid.h"

#include <fcntl.h>

#include <optional>
#include <string>
#include <utility>

#include "agent/monitor/board_testing.h"
#include "agent/monitor/node_aggregator.h"
#include "agent/monitor/service.h"
#include "agent/monitor/table_keeper_testing.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/sim_disk.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

TEST(GridTest, TheNextMomentIsTheFirstOneBehind) {
  constexpr absl::Duration kEvery = absl::Milliseconds(100);
  for (const int lead_ms : {0, 1, 50, 99}) {
    for (int now_ms = 0; now_ms < 250; ++now_ms) {
      int expected_ms = now_ms + 1;
      while ((expected_ms + lead_ms) % 100 != 0) ++expected_ms;
      EXPECT_EQ(NextOnGrid(absl::Milliseconds(now_ms), kEvery, absl::Milliseconds(lead_ms)),
                absl::Milliseconds(expected_ms))
          << now_ms << " " << lead_ms;
    }
  }
}

// Passes reports on, and knows when the last one came.
class NotingSink final : public monitor::ReportSink {
 public:
  NotingSink(monitor::ReportSink& sink, const Clock& clock) : sink_(sink), clock_(clock) {}
  void Deliver(monitor::NodeReport report) override {
    last = clock_.Elapsed();
    sink_.Deliver(std::move(report));
  }
  std::optional<absl::Duration> last;

 private:
  monitor::ReportSink& sink_;
  const Clock& clock_;
};

TEST(GridTest, AReportIsAnalysedAMomentAfterItWasMade) {
  for (const int service_ms : {0, 1, 49, 50, 330, 999}) {
    for (const int board_ms : {0, 1, 620, 949, 950, 951}) {
      SimExecutor executor;
      SimDisk disk;
      ASSERT_OK(disk.CreateDirectory("/state"));
      MonitorService::Options options;
      options.directory = "/state/monitor";
      std::optional<absl::Duration> reported;
      int analysed = 0;
      NotingSink* noting = nullptr;
      options.on_sight = [&](const std::string&, const std::string&, const monitor::Sight&) {
        if (noting->last == reported) return;  // nothing new
        reported = noting->last;
        ++analysed;
        EXPECT_EQ(executor.Elapsed() - *noting->last, kReportLead) << service_ms << " " << board_ms;
      };
      executor.AdvanceTime(absl::Milliseconds(service_ms));
      MonitorService service(options, disk, executor, executor, executor);
      service.Start();
      NotingSink sink(service, executor);
      noting = &sink;
      TableKeeper keeper;
      MonitorBoards boards(executor, executor, keeper);
      const NodeAggregator aggregator(
          boards, executor, executor,
          [](const std::string&, const std::string&) { return Engine::Activity(); }, 1, sink);
      executor.AdvanceTime(absl::Milliseconds(board_ms));
      const TrainerBoard board(
          {.job = "job", .attempt_key = "k:0", .node = "n0", .rank = 0, .world_size = 1});
      ASSERT_OK(boards.Adopt(board.Offer(UniqueFd(open("/dev/null", O_RDONLY | O_CLOEXEC)), 7)));
      executor.AdvanceTime(absl::Seconds(5));
      EXPECT_GE(analysed, 4);
    }
  }
}

}  // namespace
}  // namespace holdfast
