// LocalServer's answers to the monitor's clients, over a real socket, with the real service, pool
// and clock: what a client sees of a job that a simulation reports.
#include <poll.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "agent/local_server_testing.h"
#include "agent/monitor/service.h"
#include "gmock/gmock.h"
#include "io/posix_file_system.h"
#include "io/thread_pool.h"
#include "monitor/recording.h"
#include "monitor/sim/catalogue.h"
#include "monitor/sim/world.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

abi::MonitorQuery QueryOf(abi::MonitorQueryKind kind, const std::string& job = "") {
  abi::MonitorQuery query{};
  query.kind = kind;
  job.copy(query.job, sizeof(query.job) - 1);
  return query;
}

class LocalServerMonitorTest : public LocalServerTest {
 protected:
  LocalServerMonitorTest() {
    MonitorService::Options options;
    options.directory = directory_.Join("monitor");
    service_ =
        std::make_unique<MonitorService>(std::move(options), *files_, *loop_, *pool_, RealClock());
    service_->Start();
    MakeServer([this](LocalServer::Options& server) { server.monitor_service = service_.get(); });
  }
  ~LocalServerMonitorTest() override {
    server_.reset();
    service_.reset();
    pool_.reset();
  }

  void Report(const std::string& job) {
    for (monitor::NodeSummary summary : world_.Tick().arrived) {
      const std::string node = "gpu-" + std::to_string(summary.node);
      summary.node = 0;
      service_->Deliver({job, "run/0", 8, node, monitor::EncodeSummary(summary)});
    }
  }

  // The next packet, which is awaited: steps are made by the real clock.
  Packet Await(const UniqueFd& socket) {
    Received received;
    EXPECT_TRUE(PumpUntil([&] {
      received = ReceivePacket(socket.get());
      return received.kind != Received::Kind::kNothing;
    }));
    EXPECT_EQ(received.kind, Received::Kind::kPacket) << received.problem;
    return std::move(received.packet);
  }
  std::string TextOf(const Packet& packet, uint64_t bytes) {
    EXPECT_EQ(packet.fds.size(), 1u);
    if (packet.fds.empty()) return "";
    const absl::StatusOr<std::string> text = ReadAll(packet.fds[0].get(), 1 << 20);
    EXPECT_TRUE(text.ok()) << text.status();
    EXPECT_EQ(text->size(), bytes);
    return *text;
  }
  abi::QueryReply AwaitReply(const UniqueFd& socket, std::string* text) {
    const Packet packet = Await(socket);
    EXPECT_EQ(packet.type, abi::MessageType::kQueryReply);
    abi::QueryReply reply{};
    EXPECT_EQ(packet.body.size(), sizeof(reply));
    std::memcpy(&reply, packet.body.data(), std::min(packet.body.size(), sizeof(reply)));
    if (reply.status.code == 0) *text = TextOf(packet, reply.text_bytes);
    return reply;
  }
  json Ask(const UniqueFd& socket, const abi::MonitorQuery& query) {
    Request(socket, abi::MessageType::kMonitorQuery, query);
    std::string text;
    const abi::QueryReply reply = AwaitReply(socket, &text);
    EXPECT_EQ(reply.status.code, 0) << reply.status.text;
    return json::parse(text, nullptr, false);
  }

  TemporaryDirectory directory_;
  std::unique_ptr<FileSystem> files_ = NewPosixFileSystem();
  std::unique_ptr<ThreadPool> pool_ = *ThreadPool::Create(*loop_, 2);
  std::unique_ptr<MonitorService> service_;
  monitor::sim::World world_{monitor::sim::WorldOptions{}};
};

TEST_F(LocalServerMonitorTest, QuestionsAreAnsweredOnOneConnectionOneAfterAnother) {
  const UniqueFd socket = Connect();
  EXPECT_TRUE(Ask(socket, QueryOf(abi::MonitorQueryKind::kStatus))["jobs"].empty());
  Report("llama");
  EXPECT_TRUE(PumpUntil([&] {
    const json status = Ask(socket, QueryOf(abi::MonitorQueryKind::kStatus, "llama"));
    return status["jobs"][0]["sight"]["ranks_reporting"] == 8;
  }));
  EXPECT_EQ(Ask(socket, QueryOf(abi::MonitorQueryKind::kWaits))["jobs"].size(), 1u);
  EXPECT_EQ(Ask(socket, QueryOf(abi::MonitorQueryKind::kMatrix))["jobs"].size(), 1u);
  EXPECT_TRUE(Ask(socket, QueryOf(abi::MonitorQueryKind::kFindings))["findings"].empty());
}

TEST_F(LocalServerMonitorTest, BadQuestionsAreRefusedWithTheReason) {
  const UniqueFd socket = Connect();
  const auto refused = [&](const abi::MonitorQuery& query, absl::StatusCode code,
                           const std::string& why) {
    Request(socket, abi::MessageType::kMonitorQuery, query);
    std::string text;
    const abi::QueryReply reply = AwaitReply(socket, &text);
    EXPECT_EQ(reply.status.code, static_cast<int>(code));
    EXPECT_THAT(std::string(reply.status.text), HasSubstr(why));
  };
  refused(QueryOf(abi::MonitorQueryKind{17}), absl::StatusCode::kInvalidArgument, "kind 17");
  refused(QueryOf(abi::MonitorQueryKind::kStatus, "none"), absl::StatusCode::kNotFound, "none");
  refused(QueryOf(abi::MonitorQueryKind::kExplain), absl::StatusCode::kNotFound, "finding");
  abi::MonitorQuery endless = QueryOf(abi::MonitorQueryKind::kStatus);
  std::fill(std::begin(endless.job), std::end(endless.job), 'x');
  refused(endless, absl::StatusCode::kInvalidArgument, "job");
  Request(socket, abi::MessageType::kMonitorQuery, abi::QueryRequest{});
  std::string text;
  EXPECT_EQ(AwaitReply(socket, &text).status.code,
            static_cast<int>(absl::StatusCode::kInvalidArgument));
}

TEST_F(LocalServerMonitorTest, ARecorderGetsEveryStepOfItsJob) {
  const UniqueFd socket = Connect();
  Request(socket, abi::MessageType::kMonitorQuery,
          QueryOf(abi::MonitorQueryKind::kRecord, "llama"));
  std::string text;
  EXPECT_EQ(AwaitReply(socket, &text).status.code, 0);
  EXPECT_EQ(text, "");
  // A connection follows once.
  Request(socket, abi::MessageType::kMonitorQuery, QueryOf(abi::MonitorQueryKind::kFollow));
  EXPECT_EQ(AwaitReply(socket, &text).status.code,
            static_cast<int>(absl::StatusCode::kFailedPrecondition));
  Report("llama");
  Report("other");
  for (int i = 0; i < 2; ++i) {
    const Packet packet = Await(socket);
    ASSERT_EQ(packet.type, abi::MessageType::kMonitorEvent);
    const absl::StatusOr<abi::MonitorEvent> event = BodyAs<abi::MonitorEvent>(packet, 1);
    ASSERT_TRUE(event.ok()) << event.status();
    EXPECT_EQ(event->lost, 0u);
    const std::string payload = TextOf(packet, event->text_bytes);
    const auto recorded = monitor::DecodeRecorded(std::as_bytes(std::span(payload)));
    ASSERT_TRUE(recorded.ok()) << recorded.status();
    const auto& step = std::get<monitor::RecordedStep>(*recorded);
    EXPECT_EQ(step.job, "llama");
    EXPECT_EQ(step.step.reports.size(), i == 0 ? 8u : 0u);
  }
}

TEST_F(LocalServerMonitorTest, AFollowerThatDoesNotReadHoldsNobodyUp) {
  const UniqueFd deaf = Connect();
  Request(deaf, abi::MessageType::kMonitorQuery, QueryOf(abi::MonitorQueryKind::kRecord));
  std::string text;
  EXPECT_EQ(AwaitReply(deaf, &text).status.code, 0);
  Report("llama");
  const UniqueFd other = Connect();
  EXPECT_TRUE(PumpUntil(
      [&] { return Ask(other, QueryOf(abi::MonitorQueryKind::kStatus))["jobs"].size() == 1; }));
  EXPECT_EQ(Ask(other, QueryOf(abi::MonitorQueryKind::kStatus))["agent"]["subscribers"], 1);
  server_.reset();  // with a stream that waits
}

}  // namespace
}  // namespace holdfast
