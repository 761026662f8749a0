// A profiler plugin that writes down what NCCL calls: one JSON line per callback, in the form that
// recorded_stream_testing.h reads, so that what a real NCCL did can be given to our plugin again on
// a machine without GPU. Chained behind ours (HOLDFAST_PROFILER_CHAIN) it also shows what ours
// passes on.
//
// $HOLDFAST_RECORD_STREAM is a directory: rank R's first communicator goes to rank-R.jsonl there;
// later ones are not recorded, and with no directory none is. NCCL reports a wait without credit
// at every poll: a state that the handle is in already is not written again. Beyond kLinesMax lines
// nothing is written. It locks and writes on NCCL's threads, so times in it are its own.
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "hook/profiler/event_names_testing.h"
#include "hook/profiler/interface.h"

namespace holdfast::profiler {
namespace {

constexpr size_t kLinesMax = 400'000;

double NowUs() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) / 1e3;
}

// The file of this process. Its handles are numbers, from 1.
class Stream {
 public:
  // Null: nothing is recorded.
  static Stream* Open(int nodes, int ranks, int rank) {
    const char* directory = getenv("HOLDFAST_RECORD_STREAM");
    static std::atomic<bool> opened{false};
    if (directory == nullptr || opened.exchange(true)) return nullptr;
    std::FILE* file = std::fopen(
        (std::string(directory) + "/rank-" + std::to_string(rank) + ".jsonl").c_str(), "w");
    if (file == nullptr) return nullptr;
    auto* stream = new Stream(file);
    std::lock_guard<std::mutex> lock(stream->mutex_);
    stream->Line("\"call\":\"init\",\"nNodes\":%d,\"nranks\":%d,\"rank\":%d", nodes, ranks, rank);
    return stream;
  }

  uint64_t Start(const DescriptorV5& descriptor) {
    std::lock_guard<std::mutex> lock(mutex_);
    handles_.push_back({descriptor.type, -1});
    const uint64_t handle = handles_.size();
    Line("\"call\":\"start\",\"handle\":%" PRIu64 ",\"type\":\"%s\",\"parent\":%" PRIu64
         ",\"rank\":%d%s",
         handle, EventName(descriptor.type), Number(descriptor.parent), descriptor.rank,
         Members(descriptor).c_str());
    return handle;
  }
  void Stop(uint64_t handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (handle == 0 || handle > handles_.size()) return;
    Line("\"call\":\"stop\",\"handle\":%" PRIu64 ",\"type\":\"%s\"", handle,
         EventName(handles_[handle - 1].type));
  }
  void Record(uint64_t handle, int state, const StateArguments* arguments) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (handle == 0 || handle > handles_.size()) return;
    Handle& known = handles_[handle - 1];
    if (known.state == state && known.type == kProxyStep) return;
    known.state = state;
    char value[64] = "";
    if (arguments != nullptr && known.type == kProxyStep) {
      std::snprintf(value, sizeof(value), ",\"transSize\":%zu",
                    arguments->proxy_step.transfer_bytes);
    } else if (arguments != nullptr && known.type == kProxyCtrl) {
      std::snprintf(value, sizeof(value), ",\"appendedProxyOps\":%d",
                    arguments->proxy_ctrl.appended_proxy_ops);
    } else if (arguments != nullptr && known.type == kKernelCh) {
      std::snprintf(value, sizeof(value), ",\"pTimer\":%" PRIu64, arguments->kernel_ch.gpu_ns);
    }
    Line("\"call\":\"state\",\"handle\":%" PRIu64 ",\"type\":\"%s\",\"state\":%d%s", handle,
         EventName(known.type), state, value);
  }
  void Finalize() {
    std::lock_guard<std::mutex> lock(mutex_);
    Line("\"call\":\"finalize\"");
  }

 private:
  struct Handle {
    uint64_t type;
    int state;  // the last; -1: none
  };

  explicit Stream(std::FILE* file) : file_(file), start_us_(NowUs()) {}

  static uint64_t Number(const void* handle) { return reinterpret_cast<uint64_t>(handle); }

  static std::string Members(const DescriptorV5& descriptor) {
    char text[512] = "";
    switch (descriptor.type) {
      case kColl: {
        const CollV4& coll = descriptor.coll.v4;
        std::snprintf(text, sizeof(text),
                      ",\"func\":\"%s\",\"seqNumber\":%" PRIu64
                      ",\"count\":%zu,\"datatype\":\"%s\",\"root\":%d,\"algo\":\"%s\",\"proto\":"
                      "\"%s\",\"nChannels\":%d,\"nWarps\":%d,\"parentGroup\":%" PRIu64,
                      coll.function, coll.sequence, coll.count, coll.data_type, coll.root,
                      coll.algorithm, coll.protocol, coll.channels, coll.warps,
                      Number(descriptor.coll.parent_group));
        break;
      }
      case kP2p: {
        const P2pV4& p2p = descriptor.p2p.v4;
        std::snprintf(text, sizeof(text),
                      ",\"func\":\"%s\",\"count\":%zu,\"datatype\":\"%s\",\"peer\":%d,\"nChannels\""
                      ":%d,\"parentGroup\":%" PRIu64,
                      p2p.function, p2p.count, p2p.data_type, p2p.peer, p2p.channels,
                      Number(descriptor.p2p.parent_group));
        break;
      }
      case kCollApi:
        std::snprintf(text, sizeof(text),
                      ",\"func\":\"%s\",\"count\":%zu,\"datatype\":\"%s\",\"root\":%d,"
                      "\"graphCaptured\":%d",
                      descriptor.coll_api.function, descriptor.coll_api.count,
                      descriptor.coll_api.data_type, descriptor.coll_api.root,
                      descriptor.coll_api.graph_captured);
        break;
      case kP2pApi:
        std::snprintf(text, sizeof(text),
                      ",\"func\":\"%s\",\"count\":%zu,\"datatype\":\"%s\",\"graphCaptured\":%d",
                      descriptor.p2p_api.function, descriptor.p2p_api.count,
                      descriptor.p2p_api.data_type, descriptor.p2p_api.graph_captured);
        break;
      case kProxyOp:
        std::snprintf(text, sizeof(text),
                      ",\"channelId\":%d,\"peer\":%d,\"nSteps\":%d,\"chunkSize\":%d,\"isSend\":%d,"
                      "\"samePid\":%d",
                      descriptor.proxy_op.channel, descriptor.proxy_op.peer,
                      descriptor.proxy_op.steps, descriptor.proxy_op.chunk_bytes,
                      descriptor.proxy_op.is_send, descriptor.proxy_op.pid == getpid());
        break;
      case kProxyStep:
        std::snprintf(text, sizeof(text), ",\"step\":%d", descriptor.proxy_step.step);
        break;
      case kKernelCh:
        std::snprintf(text, sizeof(text), ",\"channelId\":%d,\"pTimer\":%" PRIu64,
                      descriptor.kernel_ch.channel, descriptor.kernel_ch.gpu_ns);
        break;
      default:
        break;
    }
    return text;
  }

  // In order of first call.
  size_t Thread() {
    const auto self = syscall(SYS_gettid);
    const auto found = std::find(threads_.begin(), threads_.end(), self);
    const size_t index = static_cast<size_t>(found - threads_.begin());
    if (found == threads_.end()) threads_.push_back(self);
    return index;
  }

  __attribute__((format(printf, 2, 3))) void Line(const char* format, ...) {
    if (++lines_ > kLinesMax) return;
    std::fprintf(file_, "{\"us\":%.1f,\"thread\":%zu,", NowUs() - start_us_, Thread());
    std::va_list arguments;
    va_start(arguments, format);
    std::vfprintf(file_, format, arguments);
    va_end(arguments);
    std::fputs("}\n", file_);
    // A process that is killed leaves what it has called.
    std::fflush(file_);
  }

  std::mutex mutex_;
  std::FILE* const file_;
  const double start_us_;
  size_t lines_ = 0;
  std::vector<long> threads_;
  std::vector<Handle> handles_;
};

std::atomic<Stream*> the_stream{nullptr};

NcclResult Init(void** context, uint64_t, int* mask, const char*, int nodes, int ranks, int rank,
                NcclLogger) {
  *context = nullptr;
  Stream* const stream = Stream::Open(nodes, ranks, rank);
  if (stream == nullptr) return kNcclSuccess;
  the_stream.store(stream);
  *mask = static_cast<int>(KnownEvents(5));
  *context = stream;
  return kNcclSuccess;
}

// NCCL has one mask for all communicators: those without a stream get no handles.
NcclResult Start(void* context, void** handle, void* descriptor) {
  *handle = nullptr;
  if (context == nullptr) return kNcclSuccess;
  *handle = reinterpret_cast<void*>(
      static_cast<Stream*>(context)->Start(*static_cast<const DescriptorV5*>(descriptor)));
  return kNcclSuccess;
}

NcclResult Stop(void* handle) {
  if (handle != nullptr) the_stream.load()->Stop(reinterpret_cast<uint64_t>(handle));
  return kNcclSuccess;
}

NcclResult Record(void* handle, int state, StateArguments* arguments) {
  if (handle != nullptr) {
    the_stream.load()->Record(reinterpret_cast<uint64_t>(handle), state, arguments);
  }
  return kNcclSuccess;
}

NcclResult Finalize(void* context) {
  if (context != nullptr) static_cast<Stream*>(context)->Finalize();
  return kNcclSuccess;
}

}  // namespace
}  // namespace holdfast::profiler

#define HOLDFAST_TEST_EXPORT extern "C" __attribute__((visibility("default")))

HOLDFAST_TEST_EXPORT const holdfast::profiler::ProfilerV5 ncclProfiler_v5 = {
    "Recorder",
    &holdfast::profiler::Init,
    &holdfast::profiler::Start,
    &holdfast::profiler::Stop,
    &holdfast::profiler::Record,
    &holdfast::profiler::Finalize};
