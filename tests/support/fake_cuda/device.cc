#include "tests/support/fake_cuda/device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

namespace holdfast::fake {
namespace {

// CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
constexpr auto kCaptureUnsupported = static_cast<CuResult>(900);

uint64_t PageBytes(uint64_t bytes) {
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

constexpr uint64_t kAddressSpaceBytes = uint64_t{64} << 30;
// Of allocations; the rest is for virtual memory.
constexpr uint64_t kAllocationBytes = kAddressSpaceBytes / 2;

// The descriptor of memory; negative: there is none.
int MakeMemory(uint64_t bytes) {
  const int fd = memfd_create("fake-device", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) == 0) return fd;
  close(fd);
  return -1;
}

// Addresses without memory. `at`: where; nullptr: anywhere. 0: there are none.
uintptr_t Reserve(void* at, uint64_t bytes) {
  const int fixed = at == nullptr ? 0 : MAP_FIXED;
  void* const reserved =
      mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
  return reserved == MAP_FAILED ? 0 : reinterpret_cast<uintptr_t>(reserved);
}

}  // namespace

Device& TheDevice() {
  static Device device;
  return device;
}

Device::Device() : address_space_(Reserve(nullptr, kAddressSpaceBytes)) {
  for (int i = 0; i < kCount; ++i) primaries_[i].device = i;
  thread_ = std::jthread([this](const std::stop_token& stop) { Run(stop); });
}

Device::~Device() {
  thread_.request_stop();
  {
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
  thread_.join();
}

// ---- Control

void Device::Reset(uint32_t seed) {
  std::lock_guard lock(mutex_);
  random_.seed(seed);
  records_calls_ = true;
  calls_.clear();
  faults_.clear();
  hooks_.clear();
  copies_until_failure_ = -1;
  held_.reset();
  copies_permitted_ = 0;
  copies_begun_ = 0;
  stalled_ = false;
  bytes_per_second_ = 0;
  copies_executed_ = 0;
  for (Context& context : primaries_) context.failure = CuResult::kSuccess;
  for (const std::unique_ptr<Context>& context : made_) {
    if (context->failure != CuResult::kContextIsDestroyed) context->failure = CuResult::kSuccess;
  }
  changed_.notify_all();
}

std::vector<FakeCuda::Call> Device::calls() {
  std::lock_guard lock(mutex_);
  return calls_;
}

FakeCuda::Live Device::live() {
  std::lock_guard lock(mutex_);
  Live live;
  live.streams = static_cast<int>(streams_.size());
  live.events = static_cast<int>(events_.size());
  live.registered = static_cast<int>(registered_.size());
  live.host_allocations = static_cast<int>(host_allocations_.size());
  live.device_allocations = static_cast<int>(allocations_.size());
  for (const Context& context : primaries_) live.retained += context.retained;
  return live;
}

void Device::Fail(const std::string& name, int skipped, int result, bool for_good) {
  std::lock_guard lock(mutex_);
  faults_.push_back({name, skipped, result, for_good});
}

void Device::Before(const std::string& name, int skipped, std::function<void()> body) {
  std::lock_guard lock(mutex_);
  hooks_.push_back({name, skipped, std::move(body)});
}

std::function<void()> Device::TakeBefore(const std::string& name) {
  std::lock_guard lock(mutex_);
  for (auto hook = hooks_.begin(); hook != hooks_.end(); ++hook) {
    if (hook->name != name || hook->skipped-- > 0) continue;
    std::function<void()> body = std::move(hook->body);
    hooks_.erase(hook);
    return body;
  }
  return nullptr;
}

void Device::HoldCopies(Copies held) {
  std::lock_guard lock(mutex_);
  held_ = held;
  copies_permitted_ = 0;
}

void Device::PermitCopies(uint64_t count) {
  std::lock_guard lock(mutex_);
  copies_permitted_ += count;
  changed_.notify_all();
}

uint64_t Device::copies_arrived() {
  std::lock_guard lock(mutex_);
  const auto waits = [this](const auto& entry) {
    const std::deque<Operation>& operations = entry.second->operations;
    return !operations.empty() && IsHeld(operations.front());
  };
  return copies_begun_ +
         static_cast<uint64_t>(std::count_if(streams_.begin(), streams_.end(), waits) +
                               std::count_if(defaults_.begin(), defaults_.end(), waits));
}

void Device::FailCopy(int skipped, int result) {
  std::lock_guard lock(mutex_);
  copies_until_failure_ = skipped;
  copy_failure_ = static_cast<CuResult>(result);
}

void Device::Stall(bool stalled) {
  std::lock_guard lock(mutex_);
  stalled_ = stalled;
  changed_.notify_all();
}

void Device::SetCopyRate(uint64_t bytes_per_second) {
  std::lock_guard lock(mutex_);
  bytes_per_second_ = bytes_per_second;
}

uint64_t Device::copies_executed() {
  std::lock_guard lock(mutex_);
  return copies_executed_;
}

// ---- Entry points

CuResult Device::Enter(Call call, Context* context, bool unsafe_in_capture) {
  std::lock_guard lock(mutex_);
  call.thread = std::this_thread::get_id();
  CuResult result = CuResult::kSuccess;
  for (Fault& fault : faults_) {
    if (fault.name != call.name || (fault.used && !fault.for_good)) continue;
    if (fault.skipped-- > 0) continue;
    fault.skipped = 0;
    fault.used = true;
    result = static_cast<CuResult>(fault.result);
  }
  if (result == CuResult::kSuccess && context != nullptr) result = context->failure;
  if (result == CuResult::kSuccess && unsafe_in_capture) {
    for (const auto& [key, stream] : streams_) {
      if (stream->capturing) result = kCaptureUnsupported;
    }
  }
  call.result = static_cast<int>(result);
  if (records_calls_) calls_.push_back(std::move(call));
  return result;
}

CuResult Device::Retain(int device, Context** context) {
  std::lock_guard lock(mutex_);
  if (device < 0 || device >= kCount) return static_cast<CuResult>(101);
  ++primaries_[device].retained;
  *context = &primaries_[device];
  return CuResult::kSuccess;
}

CuResult Device::Release(int device) {
  std::lock_guard lock(mutex_);
  if (device < 0 || device >= kCount || primaries_[device].retained == 0) {
    return CuResult::kInvalidContext;
  }
  --primaries_[device].retained;
  return CuResult::kSuccess;
}

CuResult Device::MakeContext(int device, Context** context) {
  std::lock_guard lock(mutex_);
  if (device < 0 || device >= kCount) return static_cast<CuResult>(101);
  made_.push_back(std::make_unique<Context>());
  made_.back()->device = device;
  *context = made_.back().get();
  return CuResult::kSuccess;
}

CuResult Device::DestroyContext(Context* context) {
  std::unique_lock lock(mutex_);
  const auto is_it = [context](const auto& made) { return made.get() == context; };
  if (std::none_of(made_.begin(), made_.end(), is_it)) return CuResult::kInvalidContext;
  changed_.wait(lock, [&] { return IsIdle(context); });
  context->failure = CuResult::kContextIsDestroyed;
  const auto is_of_it = [context](const auto& entry) { return entry.second->context == context; };
  std::erase_if(streams_, is_of_it);
  std::erase_if(events_, is_of_it);
  defaults_.erase(context);
  std::erase_if(allocations_, [&](const auto& entry) {
    if (entry.second.context != context) return false;
    Unmap(entry.second);
    return true;
  });
  return CuResult::kSuccess;
}

bool Device::IsDestroyed(const Context* context) {
  std::lock_guard lock(mutex_);
  return context->failure == CuResult::kContextIsDestroyed;
}

Stream* Device::MakeStream(Context* context) {
  std::lock_guard lock(mutex_);
  auto stream = std::make_unique<Stream>();
  stream->context = context;
  Stream* const made = stream.get();
  streams_[made] = std::move(stream);
  return made;
}

// What is on it is executed all the same, as CUDA has it.
CuResult Device::DestroyStream(Stream* stream) {
  Drain(stream);
  std::lock_guard lock(mutex_);
  return streams_.erase(stream) == 1 ? CuResult::kSuccess : CuResult::kInvalidHandle;
}

Stream* Device::DefaultStream(Context* context) {
  std::lock_guard lock(mutex_);
  std::unique_ptr<Stream>& stream = defaults_[context];
  if (stream == nullptr) {
    stream = std::make_unique<Stream>();
    stream->context = context;
  }
  return stream.get();
}

Event* Device::MakeEvent(Context* context) {
  std::lock_guard lock(mutex_);
  auto event = std::make_shared<Event>();
  event->context = context;
  Event* const made = event.get();
  events_[made] = std::move(event);
  return made;
}

CuResult Device::DestroyEvent(Event* event) {
  std::lock_guard lock(mutex_);
  return events_.erase(event) == 1 ? CuResult::kSuccess : CuResult::kInvalidHandle;
}

CuResult Device::Record(Event* event, Stream* stream) {
  Operation operation;
  operation.kind = Operation::Kind::kRecord;
  {
    std::lock_guard lock(mutex_);
    const auto found = events_.find(event);
    if (found == events_.end()) return CuResult::kInvalidHandle;
    if (event->context != stream->context) return CuResult::kInvalidHandle;
    operation.event = found->second;
    operation.sequence = ++event->recorded;
  }
  return Enqueue(stream, operation);
}

CuResult Device::Query(Event* event) {
  std::lock_guard lock(mutex_);
  if (events_.count(event) == 0) return CuResult::kInvalidHandle;
  return event->completed == event->recorded ? CuResult::kSuccess : CuResult::kNotReady;
}

CuResult Device::SetCapturing(Stream* stream, bool capturing) {
  std::lock_guard lock(mutex_);
  stream->capturing = capturing;
  return CuResult::kSuccess;
}

bool Device::capturing(Stream* stream) {
  std::lock_guard lock(mutex_);
  return stream->capturing;
}

CuResult Device::Enqueue(Stream* stream, Operation operation) {
  std::lock_guard lock(mutex_);
  if (operation.width == 0 && operation.kind == Operation::Kind::kCopy) return CuResult::kSuccess;
  stream->operations.push_back(std::move(operation));
  changed_.notify_all();
  return CuResult::kSuccess;
}

CuResult Device::Drain(Stream* stream) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] {
    return stream->operations.empty() || stream->context->failure != CuResult::kSuccess;
  });
  return stream->context->failure;
}

// The lowest that is free: allocations lie side by side, as a caching allocator's often do.
uintptr_t Device::FreeAddress(uint64_t bytes) const {
  uintptr_t free = address_space_;
  const uintptr_t end = address_space_ + kAllocationBytes;
  for (const auto& [begin, allocation] : allocations_) {
    if (begin >= end || begin - free >= bytes) break;
    free = begin + PageBytes(allocation.bytes);
  }
  return end - free >= bytes ? free : 0;
}

CuResult Device::Allocate(uint64_t bytes, Context* context, bool managed,
                          CuDevicePointer* pointer) {
  const uint64_t size = PageBytes(bytes);
  std::lock_guard lock(mutex_);
  const uintptr_t free = address_space_ == 0 ? 0 : FreeAddress(size);
  if (free == 0) return CuResult::kOutOfMemory;
  const int fd = MakeMemory(size);
  if (fd < 0) return CuResult::kOutOfMemory;
  const CuResult result = MapAt(free, bytes, fd, context, managed);
  close(fd);
  *pointer = free;
  return result;
}

CuResult Device::MapAt(uintptr_t at, uint64_t bytes, int fd, Context* context, bool managed) {
  const uint64_t size = PageBytes(bytes);
  const int processor = managed ? PROT_READ | PROT_WRITE : PROT_NONE;
  void* const address =
      mmap(reinterpret_cast<void*>(at), size, processor, MAP_SHARED | MAP_FIXED, fd, 0);
  void* const view = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED || view == MAP_FAILED) return CuResult::kOutOfMemory;
  allocations_[at] = {at, bytes, static_cast<std::byte*>(view), context, managed};
  return CuResult::kSuccess;
}

CuResult Device::ReserveVirtual(uint64_t bytes, CuDevicePointer* pointer) {
  std::lock_guard lock(mutex_);
  const uint64_t size = PageBytes(bytes);
  if (address_space_ == 0 || bytes != size) return CuResult::kInvalidValue;
  if (kAddressSpaceBytes - kAllocationBytes - virtual_bytes_ < size) return CuResult::kOutOfMemory;
  *pointer = address_space_ + kAllocationBytes + virtual_bytes_;
  virtual_bytes_ += size;
  return CuResult::kSuccess;
}

CuResult Device::MakeHandle(uint64_t bytes, uint64_t* handle) {
  std::lock_guard lock(mutex_);
  if (bytes == 0 || bytes != PageBytes(bytes)) return CuResult::kInvalidValue;
  const int fd = MakeMemory(bytes);
  if (fd < 0) return CuResult::kOutOfMemory;
  *handle = ++last_handle_;
  handles_[*handle] = fd;
  return CuResult::kSuccess;
}

CuResult Device::ReleaseHandle(uint64_t handle) {
  std::lock_guard lock(mutex_);
  const auto found = handles_.find(handle);
  if (found == handles_.end()) return CuResult::kInvalidValue;
  close(found->second);
  handles_.erase(found);
  return CuResult::kSuccess;
}

CuResult Device::MapHandle(CuDevicePointer pointer, uint64_t bytes, uint64_t handle) {
  std::lock_guard lock(mutex_);
  const auto found = handles_.find(handle);
  const uintptr_t at = static_cast<uintptr_t>(pointer);
  const uintptr_t begin = address_space_ + kAllocationBytes;
  if (found == handles_.end() || at < begin || at + bytes > begin + virtual_bytes_ ||
      bytes != PageBytes(bytes) || allocations_.count(at) != 0) {
    return CuResult::kInvalidValue;
  }
  return MapAt(at, bytes, found->second, nullptr, false);
}

CuResult Device::UnmapVirtual(CuDevicePointer pointer, uint64_t bytes) {
  std::unique_lock lock(mutex_);
  const uintptr_t begin = static_cast<uintptr_t>(pointer);
  // In CUDA it is the caller who has to wait. Here, too, nobody shall write to what is gone.
  changed_.wait(lock, [&] { return IsIdle(nullptr); });
  const auto first = allocations_.lower_bound(begin);
  const auto last = allocations_.lower_bound(begin + bytes);
  if (first == last) return CuResult::kInvalidValue;
  for (auto mapping = first; mapping != last; ++mapping) Unmap(mapping->second);
  allocations_.erase(first, last);
  return CuResult::kSuccess;
}

CuResult Device::Free(CuDevicePointer pointer) {
  std::unique_lock lock(mutex_);
  const auto found = allocations_.find(static_cast<uintptr_t>(pointer));
  if (found == allocations_.end()) return CuResult::kInvalidValue;
  // As cuMemFree: waits for what is on the streams.
  changed_.wait(lock, [&] { return IsIdle(nullptr); });
  Unmap(found->second);
  allocations_.erase(found);
  return CuResult::kSuccess;
}

void Device::Unmap(const Allocation& allocation) {
  const uint64_t size = PageBytes(allocation.bytes);
  munmap(allocation.device_view, size);
  Reserve(reinterpret_cast<void*>(allocation.begin), size);
}

std::optional<Allocation> Device::Find(CuDevicePointer pointer, uint64_t bytes, std::byte** view) {
  std::lock_guard lock(mutex_);
  auto after = allocations_.upper_bound(static_cast<uintptr_t>(pointer));
  if (after == allocations_.begin()) return std::nullopt;
  const auto& [begin, allocation] = *--after;
  const uint64_t offset = pointer - begin;
  if (offset >= allocation.bytes || bytes > allocation.bytes - offset) return std::nullopt;
  if (view != nullptr) *view = allocation.device_view + offset;
  return allocation;
}

CuResult Device::RegisterHost(void* data, uint64_t bytes) {
  std::lock_guard lock(mutex_);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (bytes == 0) return CuResult::kInvalidValue;
  for (const auto& [other, other_bytes] : registered_) {
    if (begin < other + other_bytes && other < begin + bytes) {
      return CuResult::kHostMemoryAlreadyRegistered;
    }
  }
  registered_[begin] = bytes;
  return CuResult::kSuccess;
}

// Waits for copies to or from it, as CUDA does.
CuResult Device::UnregisterHost(void* data) {
  std::unique_lock lock(mutex_);
  const auto found = registered_.find(reinterpret_cast<uintptr_t>(data));
  if (found == registered_.end()) return static_cast<CuResult>(713);
  changed_.wait(lock, [&] { return !IsUsed(data, found->second); });
  registered_.erase(found);
  return CuResult::kSuccess;
}

void* Device::AllocateHost(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  auto memory = std::make_unique<std::byte[]>(bytes);
  void* const data = memory.get();
  host_allocations_[reinterpret_cast<uintptr_t>(data)] = std::move(memory);
  host_bytes_[reinterpret_cast<uintptr_t>(data)] = bytes;
  return data;
}

CuResult Device::FreeHost(void* data) {
  std::unique_lock lock(mutex_);
  const auto found = host_bytes_.find(reinterpret_cast<uintptr_t>(data));
  if (found == host_bytes_.end()) return CuResult::kInvalidValue;
  changed_.wait(lock, [&] { return !IsUsed(data, found->second); });
  host_bytes_.erase(found);
  host_allocations_.erase(reinterpret_cast<uintptr_t>(data));
  return CuResult::kSuccess;
}

bool Device::IsPinned(const void* data, uint64_t bytes) {
  std::lock_guard lock(mutex_);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  for (const std::map<uintptr_t, uint64_t>* map : {&registered_, &host_bytes_}) {
    const auto after = map->upper_bound(begin);
    if (after == map->begin()) continue;
    const auto& [first, size] = *std::prev(after);
    if (begin + bytes <= first + size) return true;
  }
  return false;
}

// ---- The thread that executes

bool Device::IsIdle(const Context* context) const {
  const auto is_idle = [context](const auto& entry) {
    const Stream& stream = *entry.second;
    return (context != nullptr && stream.context != context) || stream.operations.empty() ||
           stream.context->failure != CuResult::kSuccess;
  };
  return std::all_of(streams_.begin(), streams_.end(), is_idle) &&
         std::all_of(defaults_.begin(), defaults_.end(), is_idle);
}

bool Device::IsUsed(const void* data, uint64_t bytes) const {
  const std::byte* const begin = static_cast<const std::byte*>(data);
  const auto lies_in = [&](const std::byte* at) { return at >= begin && at < begin + bytes; };
  const auto uses = [&](const Operation& operation) {
    return operation.kind == Operation::Kind::kCopy &&
           (lies_in(operation.target) || lies_in(operation.source));
  };
  return std::any_of(streams_.begin(), streams_.end(), [&](const auto& entry) {
    const Stream& stream = *entry.second;
    return stream.context->failure == CuResult::kSuccess &&
           std::any_of(stream.operations.begin(), stream.operations.end(), uses);
  });
}

bool Device::IsHeld(const Operation& operation) const {
  return held_.has_value() && operation.to_host && operation.done == 0 &&
         (*held_ == Copies::kToHost || !operation.is_registered);
}

bool Device::MayRun(const Operation& operation) const {
  switch (operation.kind) {
    case Operation::Kind::kCopy:
      return !IsHeld(operation) || copies_permitted_ > 0;
    case Operation::Kind::kWaitEvent:
      return operation.event->completed >= operation.sequence;
    case Operation::Kind::kWaitValue:
      return __atomic_load_n(operation.word, __ATOMIC_ACQUIRE) >= operation.value;
    default:
      return true;
  }
}

void Device::StepCopy(Stream& stream, Operation& operation) {
  const uint64_t total = operation.width * operation.height;
  if (operation.done == 0 && copies_until_failure_ >= 0 && copies_until_failure_-- == 0) {
    stream.context->failure = copy_failure_;
    changed_.notify_all();
    return;
  }
  if (IsHeld(operation)) {
    ++copies_begun_;
    --copies_permitted_;
  }
  // A few pieces, cut anywhere.
  uint64_t step = std::min(total - operation.done, total / (1 + random_() % 3) + 1);
  while (step > 0) {
    const uint64_t row = operation.done / operation.width;
    const uint64_t column = operation.done % operation.width;
    const uint64_t piece = std::min(step, operation.width - column);
    std::byte* const target = operation.target + row * operation.target_pitch + column;
    if (operation.kind == Operation::Kind::kSet) {
      std::memset(target, operation.value8, piece);
    } else {
      std::memcpy(target, operation.source + row * operation.source_pitch + column, piece);
    }
    operation.done += piece;
    step -= piece;
  }
}

void Device::Step(Stream& stream, std::unique_lock<std::mutex>& lock) {
  Operation& operation = stream.operations.front();
  if (operation.kind == Operation::Kind::kCopy || operation.kind == Operation::Kind::kSet) {
    const uint64_t before = operation.done;
    StepCopy(stream, operation);
    if (stream.context->failure != CuResult::kSuccess) return;
    const uint64_t bytes = operation.done - before;
    if (operation.kind == Operation::Kind::kCopy && bytes_per_second_ > 0) {
      const auto until = std::chrono::steady_clock::now() +
                         std::chrono::nanoseconds(bytes * 1'000'000'000 / bytes_per_second_);
      // Other streams wait too: there is one thread.
      changed_.wait_until(lock, until, [&] {
        return std::chrono::steady_clock::now() >= until || bytes_per_second_ == 0;
      });
    }
    if (operation.done < operation.width * operation.height) return;
    if (operation.kind == Operation::Kind::kCopy) ++copies_executed_;
  } else if (operation.kind == Operation::Kind::kRecord) {
    operation.event->completed = std::max(operation.event->completed, operation.sequence);
  }
  stream.operations.pop_front();
  changed_.notify_all();
}

void Device::Run(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (!stop.stop_requested()) {
    std::vector<Stream*> ready;
    bool waits_for_value = false;
    const auto look = [&](Stream& stream) {
      if (stream.operations.empty() || stream.context->failure != CuResult::kSuccess) return;
      if (MayRun(stream.operations.front())) {
        ready.push_back(&stream);
      } else {
        waits_for_value |= stream.operations.front().kind == Operation::Kind::kWaitValue;
      }
    };
    if (!stalled_) {
      for (const auto& [key, stream] : streams_) look(*stream);
      for (const auto& [key, stream] : defaults_) look(*stream);
    }
    if (!ready.empty()) {
      Step(*ready[random_() % ready.size()], lock);
    } else if (waits_for_value) {
      // Nobody says when the word changes.
      changed_.wait_for(lock, std::chrono::microseconds(50));
    } else {
      changed_.wait(lock);
    }
  }
}

}  // namespace holdfast::fake
