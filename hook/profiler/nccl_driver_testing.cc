#include "hook/profiler/nccl_driver_testing.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

namespace holdfast::profiler {
namespace {

// NCCL logs through this; a test looks at what the plugin did, not at what it said.
void IgnoreLog(NcclLogLevel, unsigned long, const char*, int, const char*, ...) {}

template <typename D>
void FillV4Members(const Event& event, D* descriptor) {
  switch (event.type) {
    case kProxyOp:
      descriptor->proxy_op = event.proxy_op;
      break;
    case kProxyStep:
      descriptor->proxy_step.step = event.step;
      break;
    case kKernelCh:
      descriptor->kernel_ch.channel = event.channel;
      descriptor->kernel_ch.gpu_ns = event.gpu_ns;
      break;
    default:
      break;
  }
}

void FillColl(const Event& event, CollV4* coll) {
  *coll = {event.sequence,  event.function, nullptr, nullptr, event.count, event.root,
           event.data_type, event.channels, 9,       "RING",  "SIMPLE"};
}

void FillP2p(const Event& event, P2pV4* p2p) {
  *p2p = {event.function, nullptr, event.data_type, event.count, event.peer, event.channels};
}

DescriptorV4 MakeV4(const Event& event) {
  DescriptorV4 descriptor;
  // NCCL's shims leave what an event does not use as it was on the stack.
  std::memset(static_cast<void*>(&descriptor), 0xa5, sizeof(descriptor));
  descriptor.type = static_cast<uint8_t>(event.type);
  descriptor.parent = event.parent;
  descriptor.rank = event.rank;
  if (event.type == kColl) FillColl(event, &descriptor.coll);
  if (event.type == kP2p) FillP2p(event, &descriptor.p2p);
  FillV4Members(event, &descriptor);
  return descriptor;
}

template <typename D>
D MakeV5(const Event& event) {
  D descriptor;
  std::memset(static_cast<void*>(&descriptor), 0xa5, sizeof(descriptor));
  descriptor.type = event.type;
  descriptor.parent = event.parent;
  descriptor.rank = event.rank;
  if constexpr (D::kVersion >= 7) {
    if (event.type == kColl) {
      FillColl(event, &descriptor.coll.v5.v4);
      descriptor.coll.v5.parent_group = event.parent_group;
      descriptor.coll.kernel_variant = "ring";
      descriptor.coll.symmetric = false;
      descriptor.coll.user_tag = 0;
    }
    if (event.type == kP2p) {
      FillP2p(event, &descriptor.p2p.v5.v4);
      descriptor.p2p.v5.parent_group = event.parent_group;
    }
    if (event.type == kCollApi) {
      descriptor.coll_api.v5 = {event.function, event.count, event.data_type,
                                event.root,     nullptr,     false};
    }
    if (event.type == kP2pApi) {
      descriptor.p2p_api.v5 = {event.function, event.count, event.data_type, nullptr, false};
    }
  } else {
    if (event.type == kColl) {
      FillColl(event, &descriptor.coll.v4);
      descriptor.coll.parent_group = event.parent_group;
    }
    if (event.type == kP2p) {
      FillP2p(event, &descriptor.p2p.v4);
      descriptor.p2p.parent_group = event.parent_group;
    }
    if (event.type == kCollApi) {
      descriptor.coll_api = {event.function, event.count, event.data_type,
                             event.root,     nullptr,     false};
    }
    if (event.type == kP2pApi) {
      descriptor.p2p_api = {event.function, event.count, event.data_type, nullptr, false};
    }
  }
  if (event.type == kCeColl) {
    descriptor.ce_coll = {
        event.sequence, event.function, nullptr, nullptr, event.count, event.root, event.data_type,
        "MC",           false,          0,       0,       0,           nullptr};
  }
  FillV4Members(event, &descriptor);
  return descriptor;
}

}  // namespace

uint64_t Delivered(uint64_t mask, int version) {
  if ((mask & kNetPlugin) != 0) mask |= kProxyStep;
  if ((mask & kProxyStep) != 0) mask |= kProxyOp;
  if ((mask & (kProxyOp | kKernelCh)) != 0) mask |= kColl | kP2p;
  if ((mask & (kColl | kP2p)) != 0) mask |= kGroup | kCollApi | kP2pApi;
  if ((mask & (kCollApi | kP2pApi | kKernelLaunch)) != 0) mask |= kGroupApi;
  return mask & KnownEvents(version);
}

Library::Library(const std::string& path, int version)
    : version_(version), library_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (library_ == nullptr) {
    ADD_FAILURE() << dlerror();
    return;
  }
  const void* symbol = dlsym(library_, ("ncclProfiler_v" + std::to_string(version)).c_str());
  if (symbol == nullptr) ADD_FAILURE() << dlerror();
  if (version == 4) {
    v4_ = static_cast<const ProfilerV4*>(symbol);
  } else {
    v5_ = static_cast<const ProfilerV5*>(symbol);
  }
}

Library::~Library() {
  if (library_ != nullptr) dlclose(library_);
}

NcclResult Library::Init(void** context, uint64_t id, const char* name, int nodes, int ranks,
                         int rank) {
  int* const mask = reinterpret_cast<int*>(&mask_);
  if (v4_ != nullptr) return v4_->init(context, mask, name, id, nodes, ranks, rank, &IgnoreLog);
  return v5_->init(context, id, mask, name, nodes, ranks, rank, &IgnoreLog);
}

void* Library::Start(void* context, const Event& event) {
  void* handle = nullptr;
  if (version_ == 4) {
    DescriptorV4 descriptor = MakeV4(event);
    EXPECT_EQ(v4_->start(context, &handle, &descriptor), kNcclSuccess);
  } else if (version_ >= 7) {
    DescriptorV7 descriptor = MakeV5<DescriptorV7>(event);
    EXPECT_EQ(v5_->start(context, &handle, &descriptor), kNcclSuccess);
  } else {
    DescriptorV5 descriptor = MakeV5<DescriptorV5>(event);
    EXPECT_EQ(v5_->start(context, &handle, &descriptor), kNcclSuccess);
  }
  return handle;
}

void Library::Stop(void* handle) {
  // NCCL does not stop what has no handle.
  if (handle == nullptr) return;
  EXPECT_EQ(v4_ != nullptr ? v4_->stop(handle) : v5_->stop(handle), kNcclSuccess);
}

void Library::Record(void* handle, int state, StateArguments* arguments) {
  if (handle == nullptr) return;
  EXPECT_EQ(v4_ != nullptr ? v4_->record(handle, state, arguments)
                           : v5_->record(handle, state, arguments),
            kNcclSuccess);
}

NcclResult Library::Finalize(void* context) {
  // Only if init left a context.
  if (context == nullptr) return kNcclSuccess;
  return v4_ != nullptr ? v4_->finalize(context) : v5_->finalize(context);
}

// ---- One rank

DriverRank::DriverRank(Library& library, Job& job, int rank)
    : library_(library), job_(job), rank_(rank) {
  EXPECT_EQ(library_.Init(&context_, job.options().id, nullptr, job.options().ranks,
                          job.options().ranks, rank),
            kNcclSuccess);
  ProxyCtrl(kStateProxyIdle, 0, false);
  ProxyCtrl(kStateProxySleep, 0, true);
}

DriverRank::~DriverRank() { Finalize(); }

void DriverRank::Finalize() {
  if (finalized_ || dead_) return;
  finalized_ = true;
  if (sleep_.number != 0) {
    Record(1, sleep_, kStateProxyWakeup, 0, 0);
    Stop(1, sleep_);
  }
  EXPECT_EQ(library_.Finalize(context_), kNcclSuccess);
}

bool DriverRank::Wants(uint64_t mask, uint64_t type) const {
  return (Delivered(mask, library_.version()) & type) != 0;
}

Opened DriverRank::Start(int thread, uint64_t mask, const Opened& parent, Event event) {
  if (dead_ || !Wants(mask, event.type)) return Opened();
  event.parent = parent.handle;
  Opened opened{.handle = library_.Start(context_, event), .type = event.type};
  CallRecord record{.thread = thread, .call = "start", .type = event.type};
  record.parent_type = parent.type;
  record.parent = parent.number;
  record.proxy_op = event.proxy_op;
  record.step = event.step;
  std::lock_guard<std::mutex> lock(calls_mutex_);
  opened.number = ++started_;
  record.handle = opened.number;
  calls_.push_back(record);
  return opened;
}

void DriverRank::Stop(int thread, const Opened& opened) {
  if (dead_ || opened.number == 0) return;
  library_.Stop(opened.handle);
  std::lock_guard<std::mutex> lock(calls_mutex_);
  calls_.push_back(
      {.thread = thread, .call = "stop", .type = opened.type, .handle = opened.number});
}

void DriverRank::Record(int thread, const Opened& opened, int state, size_t bytes, int appended) {
  if (dead_ || opened.number == 0) return;
  StateArguments arguments = {};
  if (state >= kStateProxyIdle && state <= kStateProxyAppendEnd) {
    arguments.proxy_ctrl.appended_proxy_ops = appended;
  } else if (state == kStateKernelChStop) {
    arguments.kernel_ch.gpu_ns = ++gpu_ns_;
  } else {
    arguments.proxy_step.transfer_bytes = bytes;
  }
  library_.Record(opened.handle, state, &arguments);
  std::lock_guard<std::mutex> lock(calls_mutex_);
  calls_.push_back({.thread = thread,
                    .call = "state",
                    .type = opened.type,
                    .state = state,
                    .handle = opened.number,
                    .bytes = bytes});
}

void DriverRank::ProxyCtrl(int state, int appended, bool keep_open) {
  // The mask is read live.
  const uint64_t mask = job_.options().forced_mask != 0
                            ? job_.options().forced_mask
                            : static_cast<uint64_t>(library_.mask().load());
  const Opened handle = Start(1, mask, Opened(), {.type = kProxyCtrl});
  Record(1, handle, state, 0, appended);
  if (keep_open) {
    sleep_ = handle;
  } else {
    Stop(1, handle);
  }
}

void DriverRank::Enqueue() {
  Operation operation;
  operation.number = enqueued_++;
  operation.mask = job_.options().forced_mask != 0 ? job_.options().forced_mask
                                                   : static_cast<uint64_t>(library_.mask().load());
  const uint64_t mask = operation.mask;
  const size_t count = job_.options().count;
  const Opened group_api = Start(0, mask, Opened(), {.type = kGroupApi});
  Record(0, group_api, 23, 0, 0);
  const Opened api = Start(0, mask, group_api, {.type = kCollApi, .count = count});
  Stop(0, api);
  Record(0, group_api, 24, 0, 0);
  Stop(0, Start(0, mask, group_api, {.type = kKernelLaunch}));
  const Opened group = Start(0, mask, Opened(), {.type = kGroup});
  operation.coll = Start(0, mask, library_.version() == 4 ? group : api,
                         {.type = kColl,
                          .rank = rank_,
                          .count = count,
                          .sequence = static_cast<uint64_t>(operation.number),
                          .channels = static_cast<uint8_t>(job_.options().channels),
                          .parent_group = group.handle});
  Stop(0, operation.coll);
  Stop(0, group);
  const auto channels = static_cast<size_t>(job_.options().channels);
  operation.sends.resize(channels);
  operation.receives.resize(channels);
  operation.kernels.resize(channels);
  operation.consumed.resize(channels);
  operation.kernel_over.resize(channels);
  unfinished_.fetch_add(1);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    inbox_.push_back(std::move(operation));
  }
  Stop(0, group_api);
}

bool DriverRank::done() const { return unfinished_.load() == 0; }

void DriverRank::Append(Operation& operation) {
  const int ranks = job_.options().ranks;
  const uint64_t mask = operation.mask;
  for (int channel = 0; channel < job_.options().channels; ++channel) {
    const auto at = static_cast<size_t>(channel);
    for (const bool send : {false, true}) {
      Side& side = send ? operation.sends[at] : operation.receives[at];
      const int peer = send ? (rank_ + 1) % ranks : (rank_ + ranks - 1) % ranks;
      side.op = Start(1, mask, operation.coll,
                      {.type = kProxyOp,
                       .rank = rank_,
                       .proxy_op = {.pid = getpid(),
                                    .channel = static_cast<uint8_t>(channel),
                                    .peer = peer,
                                    .steps = job_.options().steps,
                                    .chunk_bytes = 4 << 20,
                                    .is_send = send ? 1 : 0}});
    }
  }
  operation.appended = true;
}

bool DriverRank::Progress() {
  if (dead_) return false;
  bool moved = false;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!inbox_.empty()) {
      std::deque<Operation> taken;
      taken.swap(inbox_);
      lock.unlock();
      if (sleep_.number != 0) {
        Record(1, sleep_, kStateProxyWakeup, 0, 0);
        Stop(1, sleep_);
        sleep_ = Opened();
      }
      const uint64_t mask = job_.options().forced_mask != 0
                                ? job_.options().forced_mask
                                : static_cast<uint64_t>(library_.mask().load());
      const Opened control = Start(1, mask, Opened(), {.type = kProxyCtrl});
      Record(1, control, kStateProxyAppend, 0, 0);
      int appended = 0;
      for (Operation& operation : taken) {
        Append(operation);
        appended += 2 * job_.options().channels + 2;
        running_.push_back(std::move(operation));
      }
      Record(1, control, kStateProxyAppendEnd, 0, appended);
      Stop(1, control);
      moved = true;
    }
  }
  if (!running_.empty()) {
    // A connection does one operation after the other; so does the kernel.
    Operation& operation = running_.front();
    bool over = true;
    for (int channel = 0; channel < job_.options().channels; ++channel) {
      moved |= MoveReceive(operation, channel);
      moved |= MoveSend(operation, channel);
      moved |= MoveKernel(operation, channel);
      const auto at = static_cast<size_t>(channel);
      over = over && operation.sends[at].over && operation.receives[at].over &&
             operation.kernel_over[at];
    }
    if (over) {
      running_.pop_front();
      unfinished_.fetch_sub(1);
      finished_.fetch_add(1);
      if (running_.empty()) ProxyCtrl(kStateProxySleep, 0, true);
      moved = true;
    }
  }
  return moved;
}

bool DriverRank::Frozen(const Operation& operation, int channel, int slice) const {
  const Freeze& freeze = job_.freeze();
  return freeze.rank == rank_ && (freeze.channel < 0 || freeze.channel == channel) &&
         (operation.number > freeze.operation ||
          (operation.number == freeze.operation && slice >= freeze.slice));
}

size_t DriverRank::StepBytes() const {
  return job_.options().count * 4 / static_cast<size_t>(job_.options().steps);
}

bool DriverRank::MoveSend(Operation& operation, int channel) {
  Side& side = operation.sends[static_cast<size_t>(channel)];
  if (side.over) return false;
  const int steps = job_.options().steps;
  Job::Wire& wire = job_.wire(operation.number, channel, (rank_ + 1) % job_.options().ranks);
  bool moved = false;
  if (!side.in_progress) {
    side.in_progress = true;
    Record(1, side.op, kStateProxyOpInProgress, 0, 0);
    moved = true;
  }
  if (side.posted < steps && side.posted < side.done + 8) {
    side.steps[static_cast<size_t>(side.posted % 8)] =
        Start(1, operation.mask, side.op, {.type = kProxyStep, .rank = rank_, .step = side.posted});
    Record(1, side.steps[static_cast<size_t>(side.posted % 8)], kStateSendGpuWait, 0, 0);
    ++side.posted;
    moved = true;
  }
  if (side.middle < side.posted) {
    const int slice = side.middle;
    const bool produced =
        (slice < 2 || operation.consumed[static_cast<size_t>(channel)] > slice - 2) &&
        !Frozen(operation, channel, slice);
    if (produced) {
      const Opened& step = side.steps[static_cast<size_t>(slice % 8)];
      // At every poll without credit, as NCCL does.
      Record(1, step, kStateSendPeerWait, 0, 0);
      if (wire.posted.load() > slice) {
        Record(1, step, kStateSendWait, StepBytes(), 0);
        ++side.middle;
        wire.transmitted.store(side.middle);
        moved = true;
      } else if (!side.told_credit_wait) {
        side.told_credit_wait = true;
        moved = true;
      }
    }
  }
  if (side.done < side.middle && wire.received.load() > side.done) {
    Stop(1, side.steps[static_cast<size_t>(side.done % 8)]);
    ++side.done;
    side.told_credit_wait = false;
    moved = true;
    if (side.done == steps) {
      Stop(1, side.op);
      side.over = true;
    }
  }
  return moved;
}

bool DriverRank::MoveReceive(Operation& operation, int channel) {
  Side& side = operation.receives[static_cast<size_t>(channel)];
  if (side.over) return false;
  const int steps = job_.options().steps;
  Job::Wire& wire = job_.wire(operation.number, channel, rank_);
  bool moved = false;
  if (!side.in_progress) {
    side.in_progress = true;
    Record(1, side.op, kStateProxyOpInProgress, 0, 0);
    moved = true;
  }
  const auto step_at = [&](int step) { return side.steps[static_cast<size_t>(step % 8)]; };
  // Buffers are free once the kernel has consumed them: that is the sender's credit.
  if (side.posted < steps && side.posted < side.done + 4) {
    side.steps[static_cast<size_t>(side.posted % 8)] =
        Start(1, operation.mask, side.op, {.type = kProxyStep, .rank = rank_, .step = side.posted});
    Record(1, step_at(side.posted), kStateReceiveWait, 0, 0);
    ++side.posted;
    wire.posted.store(side.posted);
    moved = true;
  }
  if (side.middle < side.posted && wire.transmitted.load() > side.middle) {
    Record(1, step_at(side.middle), kStateReceiveFlushWait, StepBytes(), 0);
    ++side.middle;
    wire.received.store(side.middle);
    moved = true;
  } else if (side.flushed < side.middle) {
    Record(1, step_at(side.flushed), kStateReceiveGpuWait, StepBytes(), 0);
    ++side.flushed;
    moved = true;
  }
  if (side.done < side.flushed && operation.consumed[static_cast<size_t>(channel)] > side.done) {
    Stop(1, step_at(side.done));
    ++side.done;
    moved = true;
    if (side.done == steps) {
      Stop(1, side.op);
      side.over = true;
    }
  }
  return moved;
}

bool DriverRank::MoveKernel(Operation& operation, int channel) {
  const auto at = static_cast<size_t>(channel);
  if (operation.kernel_over[at]) return false;
  bool moved = false;
  if (operation.kernels[at].number == 0 && Wants(operation.mask, kKernelCh)) {
    operation.kernels[at] =
        Start(1, operation.mask, operation.coll,
              {.type = kKernelCh, .channel = static_cast<uint8_t>(channel), .gpu_ns = ++gpu_ns_});
    moved = true;
  }
  int& consumed = operation.consumed[at];
  if (consumed < operation.receives[at].flushed && !Frozen(operation, channel, consumed)) {
    ++consumed;
    moved = true;
  }
  if (consumed == job_.options().steps && operation.sends[at].middle == job_.options().steps) {
    Record(1, operation.kernels[at], kStateKernelChStop, 0, 0);
    Stop(1, operation.kernels[at]);
    operation.kernel_over[at] = true;
    moved = true;
  }
  return moved;
}

// ---- The job

Job::Job(Library& library, const JobOptions& options)
    : options_(options),
      wires_(static_cast<size_t>(kOperationsMax * options.channels * options.ranks)) {
  for (int rank = 0; rank < options.ranks; ++rank) {
    ranks_.push_back(std::make_unique<DriverRank>(library, *this, rank));
  }
}

bool Job::RunUntilNothingMoves() {
  bool moved = true;
  while (moved) {
    moved = false;
    for (auto& rank : ranks_) moved |= rank->Progress();
  }
  return std::all_of(ranks_.begin(), ranks_.end(), [](const auto& rank) { return rank->done(); });
}

}  // namespace holdfast::profiler
