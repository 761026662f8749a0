// One communicator and its board, for tests that call the plugin event by event.
#ifndef HOLDFAST_HOOK_PROFILER_EVENTS_TESTING_H_
#define HOLDFAST_HOOK_PROFILER_EVENTS_TESTING_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <memory>

#include "hook/profiler/board_testing.h"
#include "hook/profiler/nccl_driver_testing.h"

namespace holdfast::profiler {

inline constexpr int kVersions[] = {4, 5, 6, 7};

inline uint64_t NewId() {
  static uint64_t last = 0xc0000;
  return ++last;
}

inline ProxyOp MakeProxyOp(bool send, int channel = 0, int peer = 1, int steps = 4) {
  static const pid_t self = getpid();  // no system call later on
  return {self, static_cast<uint8_t>(channel), peer, steps, 1 << 20, send ? 1 : 0};
}

inline void RecordBytes(Library& library, void* handle, int state, size_t bytes) {
  StateArguments arguments = {};
  arguments.proxy_step.transfer_bytes = bytes;
  library.Record(handle, state, &arguments);
}

// One communicator of two ranks, of which this process is rank 0.
class Fixture {
 public:
  explicit Fixture(Library& library) : library_(library), id_(NewId()) {
    EXPECT_EQ(library.Init(&context_, id_, "a communicator", 2, 2, 0), kNcclSuccess);
    board_ = MappedBoard::Find(getpid());
    if (board_ == nullptr || context_ == nullptr) {
      ADD_FAILURE() << "no board";
      return;
    }
    index_ = board_->FindCommunicator(id_, 0).value_or(0);
  }
  ~Fixture() {
    if (context_ != nullptr) library_.Finalize(context_);
  }

  void* context() { return context_; }
  void Finalize() {
    EXPECT_EQ(library_.Finalize(context_), kNcclSuccess);
    context_ = nullptr;
  }
  uint64_t id() const { return id_; }
  uint32_t index() const { return index_; }
  MappedBoard& board() { return *board_; }
  abi::CommunicatorReading reading() const { return board_->communicator(index_); }
  // The slot of channel 0 with peer 1. Without one: state kNone, and the test fails.
  abi::SlotReading Slot(abi::SlotDirection direction, uint32_t channel = 0) const {
    const auto slot = board_->FindSlot(index_, channel, 1, direction);
    EXPECT_TRUE(slot.has_value());
    return slot.value_or(abi::SlotReading());
  }

  void* StartColl(void* parent = nullptr) {
    return library_.Start(context_, {.type = kColl, .parent = parent, .count = 100, .sequence = 7});
  }
  void* StartOp(void* parent, bool send, int channel = 0) {
    return library_.Start(
        context_, {.type = kProxyOp, .parent = parent, .proxy_op = MakeProxyOp(send, channel)});
  }
  void* StartStep(void* op, int step) {
    return library_.Start(context_, {.type = kProxyStep, .parent = op, .step = step});
  }

 private:
  Library& library_;
  const uint64_t id_;
  void* context_ = nullptr;
  std::unique_ptr<MappedBoard> board_;
  uint32_t index_ = 0;
};

}  // namespace holdfast::profiler

#endif  // HOLDFAST_HOOK_PROFILER_EVENTS_TESTING_H_
