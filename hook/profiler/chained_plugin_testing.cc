// A profiler plugin as a stranger writes one: its contexts and handles are pointers that it
// dereferences, so a handle that is not its own, or was freed, is a crash or a count. It exports
// versions 4 to 6, and asks for what HOLDFAST_TEST_CHAINED_MASK says.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "hook/profiler/interface.h"

namespace holdfast::profiler {
namespace {

constexpr uint64_t kAlive = 0x600df00d;
constexpr uint64_t kStopped = 0x5709;  // may still be a parent
constexpr uint64_t kDead = 0xdeadbeef;

struct Object {
  uint64_t magic = kAlive;
  uint64_t type = 0;
};

// By event type's bit.
std::atomic<uint64_t> starts[16];
std::atomic<uint64_t> stops[16];
std::atomic<uint64_t> records[16];
std::atomic<uint64_t> parents[16];  // starts that had one
std::atomic<uint64_t> mistakes;
std::atomic<int> contexts;
std::atomic<int*> mask_word;

uint32_t BitOf(uint64_t type) { return static_cast<uint32_t>(__builtin_ctzll(type)) & 15; }

Object* Check(void* pointer) {
  Object* object = static_cast<Object*>(pointer);
  if (object == nullptr || object->magic != kAlive) {
    mistakes.fetch_add(1);
    return nullptr;
  }
  return object;
}

// NCCL stops API calls, groups and operations before it starts their children.
Object* CheckParent(void* pointer) {
  Object* object = static_cast<Object*>(pointer);
  constexpr uint64_t kOutliveTheirStop = kGroup | kColl | kP2p | kGroupApi | kCollApi | kP2pApi;
  if (object != nullptr && object->magic == kStopped && (object->type & kOutliveTheirStop) != 0) {
    return object;
  }
  return Check(pointer);
}

NcclResult Open(void** context, int* mask) {
  const char* asked = getenv("HOLDFAST_TEST_CHAINED_MASK");
  *mask = asked == nullptr ? 0x7fff : atoi(asked);
  mask_word.store(mask);
  contexts.fetch_add(1);
  *context = new Object();
  return kNcclSuccess;
}

NcclResult InitFour(void** context, int* mask, const char*, uint64_t, int, int, int, NcclLogger) {
  return Open(context, mask);
}
NcclResult InitFive(void** context, uint64_t, int* mask, const char*, int, int, int, NcclLogger) {
  return Open(context, mask);
}

template <typename D>
NcclResult Start(void* context, void** handle, void* untyped) {
  Check(context);
  const D& descriptor = *static_cast<const D*>(untyped);
  const uint64_t type = descriptor.type;
  if (descriptor.parent != nullptr && CheckParent(descriptor.parent) != nullptr) {
    parents[BitOf(type)].fetch_add(1);
  }
  if constexpr (D::kVersion >= 5) {
    if (type == kColl && descriptor.coll.parent_group != nullptr) {
      const Object* group = CheckParent(descriptor.coll.parent_group);
      if (group != nullptr && group->type != kGroup) mistakes.fetch_add(1);
    }
  }
  Object* object = new Object();
  object->type = type;
  starts[BitOf(type)].fetch_add(1);
  *handle = object;
  return kNcclSuccess;
}

// Never freed: whoever comes with it again must be noticed, not served by chance.
NcclResult Stop(void* handle) {
  Object* object = Check(handle);
  if (object == nullptr) return kNcclSuccess;
  stops[BitOf(object->type)].fetch_add(1);
  object->magic = kStopped;
  return kNcclSuccess;
}

NcclResult Record(void* handle, int, StateArguments*) {
  const Object* object = Check(handle);
  if (object != nullptr) records[BitOf(object->type)].fetch_add(1);
  return kNcclSuccess;
}

NcclResult Finalize(void* context) {
  Object* object = Check(context);
  if (object != nullptr) object->magic = kDead;
  contexts.fetch_sub(1);
  return kNcclSuccess;
}

}  // namespace
}  // namespace holdfast::profiler

#define HOLDFAST_TEST_EXPORT extern "C" __attribute__((visibility("default")))

HOLDFAST_TEST_EXPORT const holdfast::profiler::ProfilerV4 ncclProfiler_v4 = {
    "Chained",
    &holdfast::profiler::InitFour,
    &holdfast::profiler::Start<holdfast::profiler::DescriptorV4>,
    &holdfast::profiler::Stop,
    &holdfast::profiler::Record,
    &holdfast::profiler::Finalize};
HOLDFAST_TEST_EXPORT const holdfast::profiler::ProfilerV5 ncclProfiler_v5 = {
    "Chained",
    &holdfast::profiler::InitFive,
    &holdfast::profiler::Start<holdfast::profiler::DescriptorV5>,
    &holdfast::profiler::Stop,
    &holdfast::profiler::Record,
    &holdfast::profiler::Finalize};
HOLDFAST_TEST_EXPORT const holdfast::profiler::ProfilerV5 ncclProfiler_v6 = {
    "Chained",
    &holdfast::profiler::InitFive,
    &holdfast::profiler::Start<holdfast::profiler::DescriptorV5>,
    &holdfast::profiler::Stop,
    &holdfast::profiler::Record,
    &holdfast::profiler::Finalize};

HOLDFAST_TEST_EXPORT uint64_t chained_starts(uint64_t type) {
  return holdfast::profiler::starts[holdfast::profiler::BitOf(type)].load();
}
HOLDFAST_TEST_EXPORT uint64_t chained_stops(uint64_t type) {
  return holdfast::profiler::stops[holdfast::profiler::BitOf(type)].load();
}
HOLDFAST_TEST_EXPORT uint64_t chained_records(uint64_t type) {
  return holdfast::profiler::records[holdfast::profiler::BitOf(type)].load();
}
HOLDFAST_TEST_EXPORT uint64_t chained_parents(uint64_t type) {
  return holdfast::profiler::parents[holdfast::profiler::BitOf(type)].load();
}
HOLDFAST_TEST_EXPORT uint64_t chained_mistakes() { return holdfast::profiler::mistakes.load(); }
HOLDFAST_TEST_EXPORT int chained_contexts() { return holdfast::profiler::contexts.load(); }
HOLDFAST_TEST_EXPORT void chained_set_mask(int mask) {
  *holdfast::profiler::mask_word.load() = mask;
}
