// A trainer's board, made and written by the hook library's own code.
#ifndef HOLDFAST_AGENT_MONITOR_BOARD_TESTING_H_
#define HOLDFAST_AGENT_MONITOR_BOARD_TESTING_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "agent/monitor/boards.h"
#include "agent/monitor/tick_clock.h"
#include "base/check.h"
#include "hook/abi/monitor_read.h"
#include "hook/monitor_events.h"

namespace holdfast {

class TrainerBoard {
 public:
  // `process_id`: as the process sees itself; 0: this one's. Its tokens have it.
  explicit TrainerBoard(hook::MonitorIdentity identity,
                        abi::BoardWriter writer = abi::BoardWriter::kHookApi,
                        abi::MonitorLevel level = abi::MonitorLevel::kLight,
                        uint32_t process_id = 0)
      : identity_(std::move(identity)) {
    auto board =
        hook::MonitorBoard::Create(writer, level, identity_, hook::MonitorBoard::Clock::kMonotonic);
    CHECK(board.ok());
    if (process_id != 0) board.value()->header().process_id = process_id;
    auto events = hook::MonitorEvents::Create(std::move(board.value()));
    CHECK(events.ok());
    events_ = std::move(events.value());
  }

  hook::MonitorEvents& events() { return *events_; }
  const hook::MonitorBoard& board() const { return events_->board(); }
  abi::BoardView view() const { return abi::ViewBoard(board().data(), abi::kBoardBytes); }
  TickInstant now() const { return {board().Now(), 1e-3}; }

  // As the trainer offers it; `process`: what its death is seen by.
  MonitorBoards::Offer Offer(UniqueFd process, uint32_t process_id) const {
    MonitorBoards::Offer offer;
    offer.job = identity_.job;
    offer.attempt_key = identity_.attempt_key;
    offer.node = identity_.node;
    offer.rank = identity_.rank;
    offer.process_id = process_id;
    offer.board_bytes = abi::kBoardBytes;
    offer.board = UniqueFd(dup(board().fd()));
    offer.process = std::move(process);
    return offer;
  }

 private:
  hook::MonitorIdentity identity_;
  std::unique_ptr<hook::MonitorEvents> events_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_BOARD_TESTING_H_
