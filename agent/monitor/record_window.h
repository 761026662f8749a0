// The records of one rank for a while: asked for on its boards' request pages, collected from the
// rings before they are overwritten, told as JSON lines.
//
// The process opens the window when it next enqueues an operation or its proxy thread changes
// state; it closes it by itself when the time is over, whatever has become of this agent. What it
// writes in its rings is its claim: so much is taken, in so many steps, and no more.
#ifndef HOLDFAST_AGENT_MONITOR_RECORD_WINDOW_H_
#define HOLDFAST_AGENT_MONITOR_RECORD_WINDOW_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/monitor/mapped_board.h"
#include "base/clock.h"
#include "base/executor.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: loop and clock outlive it. Destroyed before it is over, it
//   calls nobody, and the processes go on recording to the time that they were asked for.
class RecordWindow {
 public:
  static constexpr absl::Duration kLengthMax = absl::Seconds(abi::kWindowSecondsMax);
  // Rings hold 2048 records: at 200,000 a second and thread none is missed.
  static constexpr absl::Duration kCollectEvery = absl::Milliseconds(10);
  // Records beyond are counted as missed.
  static constexpr size_t kRecordsMax = 100'000;

  // `boards`: of one rank. Calls `done` once, with JSON lines (docs/MONITOR.md, "A window of
  // records"): a record each, in order of time, and one of the whole at the end.
  RecordWindow(EventLoop& loop, const Clock& clock,
               std::vector<std::shared_ptr<MappedBoard>> boards, absl::Duration length,
               std::function<void(std::string lines)> done);
  ~RecordWindow();
  RecordWindow(const RecordWindow&) = delete;
  RecordWindow& operator=(const RecordWindow&) = delete;

 private:
  struct Source {
    std::shared_ptr<MappedBoard> board;
    uint64_t begin_ticks = 0;
    bool opened = false;
    uint64_t next[abi::kBoardRings] = {};  // the record of each ring that is collected next
  };
  struct Kept {
    double us = 0;  // since the window was asked for
    uint32_t source = 0;
    uint32_t ring = 0;
    abi::SlotKey key = {};  // of a record of a slot, looked up while it was fresh
    abi::RecordReading record;
  };

  void Collect();
  void CollectRing(uint32_t source, uint32_t ring);
  std::string Lines();

  EventLoop& loop_;
  const Clock& clock_;
  const absl::Duration end_;
  const std::function<void(std::string)> done_;
  std::vector<Source> sources_;
  std::vector<Kept> kept_;
  uint64_t missed_ = 0;
  EventLoop::TimerId timer_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_RECORD_WINDOW_H_
