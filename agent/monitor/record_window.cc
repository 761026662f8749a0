#include "agent/monitor/record_window.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_format.h"
#include "agent/monitor/names.h"

namespace holdfast {
namespace {

using nlohmann::json;

// What a record's place is: a slot, else a communicator.
bool IsOfSlot(abi::RecordKind kind) {
  return kind >= abi::RecordKind::kTransferBegun && kind <= abi::RecordKind::kProxyThread;
}

void AddCommunicator(const abi::BoardView& view, uint32_t index, json& line) {
  if (index >= abi::kBoardCommunicators) return;
  abi::CommunicatorReading reading;
  if (!abi::ReadCommunicator(view.communicators[index], &reading)) return;
  line["communicator"] = absl::StrFormat("%016x", reading.hash);
}

}  // namespace

RecordWindow::RecordWindow(EventLoop& loop, const Clock& clock,
                           std::vector<std::shared_ptr<MappedBoard>> boards, absl::Duration length,
                           std::function<void(std::string lines)> done)
    : loop_(loop),
      clock_(clock),
      end_(clock.Elapsed() + std::min(length, kLengthMax)),
      done_(std::move(done)) {
  const double seconds = absl::ToDoubleSeconds(std::min(length, kLengthMax));
  for (std::shared_ptr<MappedBoard>& board : boards) {
    Source source;
    source.begin_ticks = board->NowTicks();
    for (uint32_t ring = 0; ring < abi::kBoardRings; ++ring) {
      source.next[ring] = board->view().rings[ring].written.load(std::memory_order_acquire);
    }
    const double rate = static_cast<double>(board->view().header->ticks_per_second);
    board->requests().window_until_ticks.store(
        source.begin_ticks + static_cast<uint64_t>(std::min(seconds * rate, 9e18)),
        std::memory_order_release);
    source.board = std::move(board);
    sources_.push_back(std::move(source));
  }
  timer_ = loop_.RunAfter(kCollectEvery, [this] { Collect(); });
}

RecordWindow::~RecordWindow() { loop_.CancelTimer(timer_); }

void RecordWindow::Collect() {
  // Before the last look: what was recorded until the end is in it.
  const bool over = clock_.Elapsed() >= end_;
  for (uint32_t i = 0; i < sources_.size(); ++i) {
    sources_[i].opened |=
        sources_[i].board->view().header->window.load(std::memory_order_acquire) != 0;
    for (uint32_t ring = 0; ring < abi::kBoardRings; ++ring) CollectRing(i, ring);
  }
  if (!over) {
    timer_ = loop_.RunAfter(kCollectEvery, [this] { Collect(); });
    return;
  }
  // It may destroy this.
  const std::function<void(std::string)> done = done_;
  done(Lines());
}

void RecordWindow::CollectRing(uint32_t index, uint32_t ring) {
  Source& source = sources_[index];
  const abi::BoardView& view = source.board->view();
  const uint64_t written = view.rings[ring].written.load(std::memory_order_acquire);
  uint64_t& next = source.next[ring];
  if (written < next) next = written;  // garbage
  const uint64_t fresh = written - next;
  if (fresh > abi::kRingRecords) {
    missed_ += fresh - abi::kRingRecords;
    next = written - abi::kRingRecords;
  }
  for (; next < written; ++next) {
    Kept kept;
    kept.source = index;
    kept.ring = ring;
    if (kept_.size() >= kRecordsMax || !abi::ReadRecord(view.rings[ring], next, &kept.record)) {
      ++missed_;
      continue;
    }
    source.opened = true;
    const uint64_t ticks = kept.record.ticks;
    const double since = ticks >= source.begin_ticks
                             ? source.board->Seconds(ticks - source.begin_ticks)
                             : -source.board->Seconds(source.begin_ticks - ticks);
    kept.us = since * 1e6;
    if (IsOfSlot(kept.record.kind) && kept.record.place < abi::kBoardSlots) {
      const uint64_t key = view.keys[kept.record.place].load(std::memory_order_acquire);
      if (key != abi::kBusyKey) kept.key = abi::DecodeSlotKey(key);
    }
    kept_.push_back(kept);
  }
}

std::string RecordWindow::Lines() {
  std::stable_sort(kept_.begin(), kept_.end(),
                   [](const Kept& a, const Kept& b) { return a.us < b.us; });
  std::string lines;
  const auto add = [&lines](const json& line) {
    lines += line.dump(-1, ' ', false, json::error_handler_t::replace);
    lines += '\n';
  };
  for (const Kept& kept : kept_) {
    const abi::BoardView& view = sources_[kept.source].board->view();
    const abi::RecordReading& record = kept.record;
    json line = {
        {"us", kept.us},
        {"kind", RecordName(record.kind)},
        {"writer", view.header->writer == abi::BoardWriter::kProfilerPlugin ? "nccl" : "hook"},
        {"thread", kept.ring}};
    if (record.operation != 0) line["operation"] = record.operation;
    if (IsOfSlot(record.kind)) {
      AddCommunicator(view, kept.key.communicator, line);
      line["direction"] = DirectionName(kept.key.direction);
      if (kept.key.channel != abi::kNoChannel) line["channel"] = kept.key.channel;
      if (kept.key.peer != abi::kNoPeer) line["peer"] = kept.key.peer;
    } else {
      AddCommunicator(view, record.place, line);
    }
    switch (record.kind) {
      case abi::RecordKind::kOperationEnqueued:
      case abi::RecordKind::kApiCall:
        line["operation_kind"] = OperationName(static_cast<abi::OperationKind>(record.detail));
        line["bytes"] = record.value;
        break;
      case abi::RecordKind::kTransferBegun:
        line["steps"] = record.step;
        break;
      case abi::RecordKind::kTransferEnded:
        line["steps_done"] = record.step;
        break;
      case abi::RecordKind::kStepState:
        line["bytes"] = record.value;
        line["state"] = StateName(static_cast<abi::WaitState>(record.detail));
        line["step"] = record.step;
        break;
      case abi::RecordKind::kStepBegun:
      case abi::RecordKind::kStepDone:
        line["step"] = record.step;
        break;
      case abi::RecordKind::kKernelStarted:
      case abi::RecordKind::kKernelStopped:
        line["gpu_ns"] = record.value;
        break;
      case abi::RecordKind::kProxyThread:
        line["state"] = StateName(static_cast<abi::WaitState>(record.detail));
        line["appended"] = record.value;
        break;
      default:
        break;
    }
    add(line);
  }
  const bool opened =
      std::any_of(sources_.begin(), sources_.end(), [](const Source& s) { return s.opened; });
  add({{"kind", "window"},
       {"schema_version", 1},
       {"boards", sources_.size()},
       {"opened", opened},
       {"records", kept_.size()},
       {"missed", missed_}});
  return lines;
}

}  // namespace holdfast
