#include "hook/profiler/recorded_stream_testing.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "hook/profiler/event_names_testing.h"

namespace holdfast::profiler {
namespace {

using Json = nlohmann::json;

// Names live as long as the process: descriptors hold pointers.
const char* Interned(const std::string& text) {
  static auto* texts = new std::set<std::string>();
  return texts->insert(text).first->c_str();
}

RecordedCall ToCall(const Json& line) {
  RecordedCall call;
  call.us = line.value("us", 0.0);
  call.thread = line.value("thread", 0);
  call.call = line.at("call").get<std::string>();
  call.handle = line.value("handle", uint64_t{0});
  call.parent = line.value("parent", uint64_t{0});
  call.parent_group = line.value("parentGroup", uint64_t{0});
  call.state = line.value("state", 0);
  call.bytes = line.value("transSize", size_t{0});
  call.appended = line.value("appendedProxyOps", 0);
  call.gpu_ns = line.value("pTimer", uint64_t{0});
  call.nodes = line.value("nNodes", 0);
  call.ranks = line.value("nranks", 0);
  Event& event = call.event;
  if (line.contains("type")) {
    event.type = EventType(line.at("type").get<std::string>());
    EXPECT_NE(event.type, 0u) << line.dump();
  }
  event.rank = line.value("rank", 0);
  event.function = Interned(line.value("func", "AllReduce"));
  event.data_type = Interned(line.value("datatype", "ncclFloat32"));
  event.count = line.value("count", size_t{0});
  event.sequence = line.value("seqNumber", uint64_t{0});
  event.root = line.value("root", 0);
  event.channels = static_cast<uint8_t>(line.value("nChannels", 0));
  event.step = line.value("step", 0);
  event.channel = static_cast<uint8_t>(line.value("channelId", 0));
  event.gpu_ns = call.gpu_ns;
  event.proxy_op = {.pid = getpid(),
                    .channel = event.channel,
                    .peer = line.value("peer", 0),
                    .steps = line.value("nSteps", 0),
                    .chunk_bytes = line.value("chunkSize", 0),
                    .is_send = line.value("isSend", 0)};
  return call;
}

}  // namespace

std::vector<RecordedCall> ReadStream(const std::string& path) {
  std::vector<RecordedCall> stream;
  std::ifstream file(path);
  EXPECT_TRUE(file.good()) << path;
  std::string text;
  while (std::getline(file, text)) {
    const Json line = Json::parse(text, nullptr, false);
    if (line.is_discarded()) {
      ADD_FAILURE() << path << ": not JSON: " << text;
      break;
    }
    stream.push_back(ToCall(line));
  }
  return stream;
}

std::vector<CallRecord> ToRecords(const std::vector<RecordedCall>& stream) {
  std::vector<CallRecord> records;
  std::map<uint64_t, uint64_t> types;
  for (const RecordedCall& call : stream) {
    if (call.handle == 0) continue;
    CallRecord record{.thread = call.thread, .call = call.call, .type = call.event.type};
    record.state = call.state;
    record.handle = call.handle;
    record.bytes = call.bytes;
    if (call.call == "start") {
      types[call.handle] = call.event.type;
      record.parent = call.parent;
      record.parent_type = call.parent == 0 ? 0 : types[call.parent];
      record.proxy_op = call.event.proxy_op;
      record.step = call.event.step;
    }
    records.push_back(record);
  }
  return records;
}

std::string ToJson(const std::vector<CallRecord>& calls, int ranks, int rank, size_t count) {
  std::ostringstream text;
  const auto write = [&](const Json& line) { text << line.dump() << "\n"; };
  write({{"us", 0},
         {"thread", 0},
         {"call", "init"},
         {"nNodes", ranks},
         {"nranks", ranks},
         {"rank", rank}});
  int us = 0;
  for (const CallRecord& call : calls) {
    Json line = {{"us", ++us},
                 {"thread", call.thread},
                 {"call", call.call},
                 {"handle", call.handle},
                 {"type", EventName(call.type)}};
    if (call.call == "state") {
      line["state"] = call.state;
      line["transSize"] = call.bytes;
    }
    if (call.call == "start") {
      line["parent"] = call.parent;
      line["rank"] = rank;
      if (call.type == kColl) line["count"] = count;
      if (call.type == kProxyStep) line["step"] = call.step;
      if (call.type == kProxyOp) {
        line["channelId"] = call.proxy_op.channel;
        line["peer"] = call.proxy_op.peer;
        line["nSteps"] = call.proxy_op.steps;
        line["isSend"] = call.proxy_op.is_send;
      }
    }
    write(line);
  }
  return text.str();
}

void Replay::RunTo(size_t end) {
  for (; next_ < end && next_ < stream_.size(); ++next_) {
    const RecordedCall& call = stream_[next_];
    if (call.call == "init") {
      EXPECT_EQ(library_.Init(&context_, id_, nullptr, call.nodes, call.ranks, call.event.rank),
                kNcclSuccess);
    } else if (call.call == "finalize") {
      EXPECT_EQ(library_.Finalize(context_), kNcclSuccess);
    } else if (call.call == "start") {
      Event event = call.event;
      event.parent = call.parent == 0 ? nullptr : handles_[call.parent];
      event.parent_group = call.parent_group == 0 ? nullptr : handles_[call.parent_group];
      handles_[call.handle] = library_.Start(context_, event);
      EXPECT_NE(handles_[call.handle], nullptr) << next_;
    } else if (call.call == "stop") {
      library_.Stop(handles_[call.handle]);
    } else if (call.call == "state") {
      StateArguments arguments = {};
      if (call.event.type == kProxyCtrl) {
        arguments.proxy_ctrl.appended_proxy_ops = call.appended;
      } else if (call.event.type == kKernelCh) {
        arguments.kernel_ch.gpu_ns = call.gpu_ns;
      } else {
        arguments.proxy_step.transfer_bytes = call.bytes;
      }
      library_.Record(handles_[call.handle], call.state, &arguments);
    } else {
      ADD_FAILURE() << "an unknown call: " << call.call;
    }
  }
}

}  // namespace holdfast::profiler
