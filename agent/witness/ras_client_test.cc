// The client against a server that speaks the protocol, and against everything else that may
// listen.
#include "agent/witness/ras_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "agent/witness/ras_server_testing.h"
#include "monitor/witness/ras.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Seconds(60);

constexpr char kRasReport[] = R"({"communicators": [{"hash": "0xa1", "size": 2, "ranks": [
{"rank": 0, "host": "h", "pid": 1000, "status": {"async_error": 0}, "collective_counts": {"AllReduce": 9}},
{"rank": 1, "host": "h", "pid": 1001, "status": {"async_error": 0}, "collective_counts": {"AllReduce": 8}},
{"rank": 2, "host": "h", "pid": 1002, "status": {"async_error": 0}, "collective_counts": {"AllReduce": 9}}],
"missing_ranks": []}]})";

TEST(RasClientTest, BothFormsAreAskedFor) {
  for (const auto kind : {RasServer::Kind::kJson, RasServer::Kind::kTextOnly}) {
    const RasServer server(kind, kRasReport);
    for (int i = 0; i < 2; ++i) {
      const auto answer = AskRas(server.address(), kPatience);
      ASSERT_TRUE(answer.ok()) << answer.status().ToString();
      EXPECT_EQ(*answer, kRasReport);
    }
  }
}

TEST(RasClientTest, EveryOtherServerIsRefusedInTime) {
  const auto ask = [](RasServer::Kind kind, absl::Duration deadline) {
    const RasServer server(kind, kRasReport);
    const auto answer = AskRas(server.address(), deadline);
    return answer.ok() ? monitor::ParseRasReport(*answer).status() : answer.status();
  };
  EXPECT_EQ(ask(RasServer::Kind::kSilent, absl::Milliseconds(200)).code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(ask(RasServer::Kind::kHttp, kPatience).ToString(), HasSubstr("SERVER PROTOCOL"));
  EXPECT_EQ(ask(RasServer::Kind::kClosesEarly, kPatience).code(),
            absl::StatusCode::kInvalidArgument);
  RasAddress nobody;
  {
    const RasServer server(RasServer::Kind::kJson, "");
    nobody = server.address();
  }
  EXPECT_EQ(AskRas(nobody, kPatience).status().code(), absl::StatusCode::kNotFound);
}

TEST(RasClientTest, AddressesAreRead) {
  EXPECT_EQ(ParseRasAddress("localhost:28028")->host, "127.0.0.1");
  EXPECT_EQ(ParseRasAddress("10.0.0.1:99")->port, 99);
  EXPECT_EQ(ParseRasAddress("[::1]:7")->host, "::1");
  for (const char* none : {"", "host", "host:", "host:0", "host:65536", "host:x"}) {
    EXPECT_FALSE(ParseRasAddress(none).ok()) << none;
  }
}

}  // namespace
}  // namespace holdfast
