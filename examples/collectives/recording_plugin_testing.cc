// A profiler plugin that writes down every call, in the format of the streams that NCCL's own calls
// were recorded in: one JSON line per call, in $COLLECTIVES_TEST_STREAMS/rank-RANK.jsonl. It asks
// for everything. It reads what it is given with the declarations of hook/profiler, not with those
// of the caller.
#include <pthread.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>

#include "hook/profiler/event_names_testing.h"
#include "hook/profiler/interface.h"

namespace holdfast::profiler {
namespace {

using Json = nlohmann::json;

struct Recorder;
struct Handle {
  Recorder* recorder = nullptr;
  uint64_t number = 0;
  uint64_t type = 0;
};

// One communicator of one rank.
struct Recorder {
  std::mutex mutex;
  std::FILE* file = nullptr;
  std::deque<Handle> handles;
  std::map<pthread_t, int> threads;

  void Write(Json line) {
    line["thread"] = threads.try_emplace(pthread_self(), threads.size()).first->second;
    std::fprintf(file, "%s\n", line.dump().c_str());
    std::fflush(file);
  }
};

uint64_t NumberOf(const void* handle) {
  return handle == nullptr ? 0 : static_cast<const Handle*>(handle)->number;
}

NcclResult Init(void** context, uint64_t, int* mask, const char* name, int nodes, int ranks,
                int rank, NcclLogger) {
  const char* const directory = std::getenv("COLLECTIVES_TEST_STREAMS");
  if (directory == nullptr) return kNcclSystemError;
  auto recorder = std::make_unique<Recorder>();
  const std::string path = std::string(directory) + "/rank-" + std::to_string(rank) + ".jsonl";
  recorder->file = std::fopen(path.c_str(), "w");
  if (recorder->file == nullptr) return kNcclSystemError;
  recorder->Write(
      {{"call", "init"}, {"commName", name}, {"nNodes", nodes}, {"nranks", ranks}, {"rank", rank}});
  *mask = (1 << 15) - 1;
  *context = recorder.release();
  return kNcclSuccess;
}

NcclResult Start(void* context, void** handle, void* untyped) {
  auto* const recorder = static_cast<Recorder*>(context);
  const auto& descriptor = *static_cast<const DescriptorV5*>(untyped);
  std::lock_guard<std::mutex> lock(recorder->mutex);
  recorder->handles.push_back({recorder, recorder->handles.size() + 1, descriptor.type});
  *handle = &recorder->handles.back();
  Json line = {{"call", "start"},
               {"handle", NumberOf(*handle)},
               {"type", EventName(descriptor.type)},
               {"parent", NumberOf(descriptor.parent)},
               {"rank", descriptor.rank}};
  if (descriptor.type == kColl) {
    const CollV4& coll = descriptor.coll.v4;
    line.update({{"func", coll.function},
                 {"seqNumber", coll.sequence},
                 {"count", coll.count},
                 {"datatype", coll.data_type},
                 {"root", coll.root},
                 {"nChannels", coll.channels},
                 {"parentGroup", NumberOf(descriptor.coll.parent_group)}});
  } else if (descriptor.type == kP2p) {
    const P2pV4& p2p = descriptor.p2p.v4;
    line.update({{"func", p2p.function},
                 {"count", p2p.count},
                 {"datatype", p2p.data_type},
                 {"peer", p2p.peer},
                 {"parentGroup", NumberOf(descriptor.p2p.parent_group)}});
  } else if (descriptor.type == kProxyOp) {
    const ProxyOp& op = descriptor.proxy_op;
    line.update({{"channelId", op.channel},
                 {"peer", op.peer},
                 {"nSteps", op.steps},
                 {"chunkSize", op.chunk_bytes},
                 {"isSend", op.is_send},
                 {"samePid", op.pid == getpid() ? 1 : 0}});
  } else if (descriptor.type == kProxyStep) {
    line["step"] = descriptor.proxy_step.step;
  } else if (descriptor.type == kKernelCh) {
    line["channelId"] = descriptor.kernel_ch.channel;
    line["pTimer"] = descriptor.kernel_ch.gpu_ns;
  }
  recorder->Write(line);
  return kNcclSuccess;
}

NcclResult Stop(void* untyped) {
  const auto& handle = *static_cast<const Handle*>(untyped);
  std::lock_guard<std::mutex> lock(handle.recorder->mutex);
  handle.recorder->Write(
      {{"call", "stop"}, {"handle", handle.number}, {"type", EventName(handle.type)}});
  return kNcclSuccess;
}

NcclResult Record(void* untyped, int state, StateArguments* arguments) {
  const auto& handle = *static_cast<const Handle*>(untyped);
  std::lock_guard<std::mutex> lock(handle.recorder->mutex);
  Json line = {{"call", "state"},
               {"handle", handle.number},
               {"type", EventName(handle.type)},
               {"state", state}};
  if (handle.type == kProxyStep) line["transSize"] = arguments->proxy_step.transfer_bytes;
  if (handle.type == kProxyCtrl)
    line["appendedProxyOps"] = arguments->proxy_ctrl.appended_proxy_ops;
  if (handle.type == kKernelCh) line["pTimer"] = arguments->kernel_ch.gpu_ns;
  handle.recorder->Write(line);
  return kNcclSuccess;
}

NcclResult Finalize(void* context) {
  const std::unique_ptr<Recorder> recorder(static_cast<Recorder*>(context));
  recorder->Write({{"call", "finalize"}});
  std::fclose(recorder->file);
  return kNcclSuccess;
}

}  // namespace
}  // namespace holdfast::profiler

extern "C" __attribute__((visibility("default")))
const holdfast::profiler::ProfilerV5 ncclProfiler_v6 = {"Recorder",
                                                        &holdfast::profiler::Init,
                                                        &holdfast::profiler::Start,
                                                        &holdfast::profiler::Stop,
                                                        &holdfast::profiler::Record,
                                                        &holdfast::profiler::Finalize};
