// The HTTP port over real sockets. Client and server share one thread: Pump() runs the loop.
#include "agent/http_server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/epoll_loop.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// Model: stands still until the test moves it; timers of the loop run on the real clock.
class HandClock final : public Clock {
 public:
  absl::Duration Elapsed() const override { return now; }
  absl::Time WallTime() const override { return absl::UnixEpoch() + now; }
  absl::Duration now = absl::Seconds(100);
};

constexpr char kToken[] = "0123456789abcdef";

class HttpServerTest : public ::testing::Test {
 protected:
  HttpServerTest() {
    HttpServer::Options options;
    options.at = Endpoint::Loopback(0);
    options.token = kToken;
    std::vector<HttpServer::Page> pages = {
        {"/open", "text/plain", false,
         [] {
           return HttpServer::Answer{200, "open\n"};
         }},
        {"/closed", "application/json", true,
         [this] {
           ++made_;
           return HttpServer::Answer{code_, big_.empty() ? absl::StrCat("made ", made_) : big_};
         }},
    };
    absl::StatusOr<std::unique_ptr<HttpServer>> server =
        HttpServer::Start(std::move(options), std::move(pages), *loop_, clock_);
    CHECK_OK(server.status());
    server_ = *std::move(server);
  }

  void Pump() {
    loop_->RunAfter(absl::Milliseconds(1), [this] { loop_->Stop(); });
    loop_->Run();
  }
  void PumpUntil(const std::function<bool()>& holds, const char* what) {
    const absl::Duration end = RealClock().Elapsed() + absl::Seconds(60);
    while (!holds()) {
      ASSERT_LT(RealClock().Elapsed(), end) << "gave up waiting for " << what;
      Pump();
    }
  }

  UniqueFd Connect() {
    absl::StatusOr<UniqueFd> fd = ConnectTcp(server_->at(), Deadline::After(absl::Seconds(60)));
    CHECK_OK(fd.status());
    return *std::move(fd);
  }
  void Send(const UniqueFd& fd, const std::string& text) {
    // Dropped: a server that has enough of it closes the connection.
    (void)send(fd.get(), text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  // All until the server closes.
  std::string Hear(const UniqueFd& fd) {
    std::string heard;
    bool ended = false;
    PumpUntil(
        [&] {
          char bytes[65536];
          const ssize_t got = recv(fd.get(), bytes, sizeof(bytes), MSG_DONTWAIT);
          if (got > 0) heard.append(bytes, static_cast<size_t>(got));
          ended = got == 0 || (got < 0 && errno != EAGAIN);
          return ended;
        },
        "the end of an answer");
    return heard;
  }
  std::string Ask(const std::string& path, const std::string& headers = "",
                  const std::string& method = "GET") {
    const UniqueFd fd = Connect();
    Send(fd, absl::StrCat(method, " ", path, " HTTP/1.1\r\nHost: x\r\n", headers, "\r\n"));
    return Hear(fd);
  }

  static std::string WithToken(const std::string& token) {
    return absl::StrCat("Authorization: Bearer ", token, "\r\n");
  }

  std::unique_ptr<EpollLoop> loop_ = *EpollLoop::Create(RealClock());
  HandClock clock_;
  int made_ = 0;
  int code_ = 200;
  std::string big_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, PagesTokensMethodsAndWhatIsNotThere) {
  const std::string open = Ask("/open");
  EXPECT_THAT(open, StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(open, HasSubstr("Connection: close\r\n"));
  EXPECT_TRUE(absl::EndsWith(open, "\r\n\r\nopen\n")) << open;
  for (const std::string& headers :
       {std::string(), WithToken("0123456789abcdeX"), WithToken("0123456789abcde"),
        WithToken("0123456789abcdef0"), WithToken(""), std::string("Authorization: Basic eDp5\r\n"),
        std::string("Authorization: 0123456789abcdef\r\n")}) {
    const std::string refused = Ask("/closed", headers);
    EXPECT_THAT(refused, StartsWith("HTTP/1.1 401 ")) << headers;
    EXPECT_THAT(refused, HasSubstr("WWW-Authenticate: Bearer\r\n"));
  }
  EXPECT_EQ(made_, 0);
  const std::string closed = Ask("/closed", WithToken(kToken));
  EXPECT_THAT(closed, StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(closed, HasSubstr("Content-Type: application/json\r\n"));
  EXPECT_TRUE(absl::EndsWith(closed, "made 1"));
  EXPECT_THAT(Ask("/closed", absl::StrCat("AUTHORIZATION: bEARER ", kToken, "\r\n")),
              StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(Ask("/nothing", WithToken(kToken)), StartsWith("HTTP/1.1 404 "));
  EXPECT_THAT(Ask("/openx"), StartsWith("HTTP/1.1 404 "));
  const std::string head = Ask("/open", "", "HEAD");
  EXPECT_THAT(head, HasSubstr("Content-Length: 5\r\n"));
  EXPECT_TRUE(absl::EndsWith(head, "\r\n\r\n")) << head;
  for (const char* const method : {"POST", "PUT", "DELETE", "OPTIONS", "BREW"}) {
    EXPECT_THAT(Ask("/open", "Content-Length: 1000000\r\n", method), StartsWith("HTTP/1.1 405 "));
  }
  using Key = std::pair<std::string, int>;
  EXPECT_EQ(server_->answer_counts().at(Key("/closed", 401)), 7);
  EXPECT_EQ(server_->answer_counts().at(Key("/closed", 200)), 2);
  EXPECT_EQ(server_->answer_counts().at(Key("other", 404)), 2);
  EXPECT_EQ(server_->answer_counts().at(Key("/open", 405)), 5);
}

TEST_F(HttpServerTest, AnAnswerIsMadeAnewOnceASecondHoweverManyAsk) {
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(absl::EndsWith(Ask("/closed", WithToken(kToken)), "made 1"));
  }
  clock_.now += HttpServer::kAnswerAge;
  code_ = 503;
  const std::string next = Ask("/closed", WithToken(kToken));
  EXPECT_THAT(next, StartsWith("HTTP/1.1 503 "));
  EXPECT_TRUE(absl::EndsWith(next, "made 2"));
}

// A client that takes its answer slowly holds the answer of then, not a copy of its own.
TEST_F(HttpServerTest, ALargeAnswerArrivesWholeAlsoWhenANewerOneIsMadeMeanwhile) {
  big_ = std::string(size_t{8} << 20, 'a');
  const UniqueFd slow = Connect();
  Send(slow, absl::StrCat("GET /closed HTTP/1.1\r\nHost: x\r\n", WithToken(kToken), "\r\n"));
  PumpUntil([&] { return made_ == 1; }, "the first answer");
  clock_.now += HttpServer::kAnswerAge;
  big_ = "b";
  EXPECT_TRUE(absl::EndsWith(Ask("/closed", WithToken(kToken)), "\r\n\r\nb"));
  const std::string heard = Hear(slow);
  const size_t body = heard.find("\r\n\r\n") + 4;
  EXPECT_EQ(heard.size() - body, size_t{8} << 20);
  EXPECT_EQ(heard.find_first_not_of('a', body), std::string::npos);
}

TEST_F(HttpServerTest, AConnectionEndsAtItsDeadlineHoweverItSendsOrReads) {
  const UniqueFd silent = Connect();
  const UniqueFd dripping = Connect();
  Send(dripping, "GET /open HT");
  // More than the kernel keeps for one who does not read it.
  big_ = std::string(size_t{64} << 20, 'a');
  const UniqueFd unread = Connect();
  Send(unread, absl::StrCat("GET /closed HTTP/1.1\r\nHost: x\r\n", WithToken(kToken), "\r\n"));
  PumpUntil([&] { return server_->connection_count() == 3 && made_ == 1; }, "all connections");
  for (int i = 0; i < 9; ++i) {
    clock_.now += absl::Seconds(1);
    Send(dripping, "T");
    Pump();
  }
  EXPECT_EQ(server_->connection_count(), 3);
  clock_.now += absl::Seconds(1);
  // The next turn, whoever causes it.
  EXPECT_THAT(Ask("/open"), StartsWith("HTTP/1.1 200 "));
  PumpUntil([&] { return server_->connection_count() == 0; }, "the end of all");
  EXPECT_EQ(server_->late_count(), 3);
  Hear(silent);
  Hear(dripping);
  EXPECT_LT(Hear(unread).size(), big_.size());
}

TEST_F(HttpServerTest, BeyondTheMostConnectionsOthersWaitAndAreServedThen) {
  std::vector<UniqueFd> holders;
  for (uint32_t i = 0; i < HttpServer::kConnectionsMax; ++i) holders.push_back(Connect());
  PumpUntil([&] { return server_->connection_count() == HttpServer::kConnectionsMax; },
            "all connections");
  const UniqueFd waiting = Connect();
  Send(waiting, "GET /open HTTP/1.1\r\nHost: x\r\n\r\n");
  for (int i = 0; i < 20; ++i) Pump();
  EXPECT_EQ(server_->connection_count(), HttpServer::kConnectionsMax);
  EXPECT_TRUE(server_->answer_counts().empty());
  // All of them end at once: the library must listen again by itself.
  holders.clear();
  EXPECT_THAT(Hear(waiting), StartsWith("HTTP/1.1 200 "));
  EXPECT_THAT(Ask("/open"), StartsWith("HTTP/1.1 200 "));
}

// Goal: whatever bytes come, the connection ends, and the next client is served.
TEST_F(HttpServerTest, HostileBytesEndTheirOwnConnectionOnly) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  const std::string good =
      absl::StrCat("GET /closed HTTP/1.1\r\nHost: x\r\n", WithToken(kToken), "\r\n");
  std::vector<std::string> texts = {
      "\r\n\r\n\r\n\r\n",
      std::string(1000, '\0'),
      "GET /open\r\n\r\n",
      "GET /open HTTP/9.9\r\n\r\n",
      absl::StrCat("GET /", std::string(100'000, 'a'), " HTTP/1.1\r\nHost: x\r\n\r\n"),
      absl::StrCat("GET /open HTTP/1.1\r\nHost: ", std::string(100'000, 'a'), "\r\n\r\n"),
      absl::StrCat("GET /open?", std::string(20'000, '&'), " HTTP/1.1\r\nHost: x\r\n\r\n"),
      "GET /open HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
      "POST /closed HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551615\r\n\r\n",
      "GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
      "GET /closed%00/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"};
  std::string many = "GET /open HTTP/1.1\r\nHost: x\r\n";
  for (int i = 0; i < 2'000; ++i) absl::StrAppend(&many, "X-", i, ": y\r\n");
  texts.push_back(absl::StrCat(many, "\r\n"));
  for (int i = 0; i < 100; ++i) {
    std::string mutated = good;
    const int changes = 1 + static_cast<int>(random() % 4);
    for (int j = 0; j < changes; ++j) {
      mutated[random() % mutated.size()] = static_cast<char>(random());
    }
    texts.push_back(std::move(mutated));
  }
  for (const std::string& text : texts) {
    const UniqueFd fd = Connect();
    Send(fd, text);
    shutdown(fd.get(), SHUT_WR);
    // Without an answer, too: what was no request has none. One that the library waits for more of
    // ends at its deadline, which the clock brings near; the next client makes it look.
    std::string heard;
    for (int i = 1;; ++i) {
      char bytes[65536];
      const ssize_t got = recv(fd.get(), bytes, sizeof(bytes), MSG_DONTWAIT);
      if (got > 0) heard.append(bytes, static_cast<size_t>(got));
      if (got == 0 || (got < 0 && errno != EAGAIN)) break;
      Pump();
      if (i % 20 != 0) continue;
      clock_.now += HttpServer::kConnectionTime;
      ASSERT_THAT(Ask("/open"), StartsWith("HTTP/1.1 200 "));
    }
    EXPECT_TRUE(heard.empty() || absl::StartsWith(heard, "HTTP/1.")) << heard.substr(0, 80);
  }
  EXPECT_THAT(Ask("/open"), StartsWith("HTTP/1.1 200 "));
  PumpUntil([&] { return server_->connection_count() == 0; }, "the end of all");
}

TEST_F(HttpServerTest, ATakenPortIsAnErrorThatNamesIt) {
  const absl::Status taken = HttpServer::Start({server_->at(), ""}, {}, *loop_, clock_).status();
  EXPECT_EQ(taken.code(), absl::StatusCode::kAlreadyExists) << taken;
  EXPECT_THAT(std::string(taken.message()), HasSubstr(server_->at().ToString()));
}

TEST(HttpAddress, IsNumeric) {
  EXPECT_EQ(ParseHttpAddress("127.0.0.1:9470")->ToString(), "127.0.0.1:9470");
  EXPECT_EQ(ParseHttpAddress("localhost:1")->ToString(), "127.0.0.1:1");
  EXPECT_EQ(ParseHttpAddress("[::1]:0")->ToString(), "[::1]:0");
  EXPECT_FALSE(ParseHttpAddress("0.0.0.0:9470")->is_loopback());
  EXPECT_FALSE(ParseHttpAddress("example.org:80").ok());
}

class TokenTest : public ::testing::Test {
 protected:
  void Write(const std::string& text, mode_t mode) {
    std::ofstream(path_) << text;
    ASSERT_EQ(chmod(path_.c_str(), mode), 0);
  }
  const TemporaryDirectory directory_;
  const std::string path_ = directory_.Join("http-token");
};

TEST_F(TokenTest, IsMadeOnceAndForThisUserAlone) {
  const mode_t before = umask(0);
  const absl::StatusOr<std::string> token = ReadOrMakeToken(path_);
  umask(before);
  ASSERT_TRUE(token.ok()) << token.status();
  EXPECT_EQ(token->size(), 32);
  struct stat info {};
  ASSERT_EQ(stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600);
  EXPECT_EQ(*ReadOrMakeToken(path_), *token);
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory_.path())) {
    files += entry.exists() ? 1 : 0;
  }
  EXPECT_EQ(files, 1);
  EXPECT_NE(*ReadOrMakeToken(directory_.Join("other")), *token);
}

TEST_F(TokenTest, OneThatOthersMayReadOrThatIsNoneIsRefused) {
  Write("0123456789abcdef\n", 0600);
  EXPECT_EQ(*ReadOrMakeToken(path_), "0123456789abcdef");
  for (const mode_t mode : {0640, 0604, 0666}) {
    Write("0123456789abcdef\n", mode);
    const absl::Status refused = ReadOrMakeToken(path_).status();
    EXPECT_EQ(refused.code(), absl::StatusCode::kPermissionDenied) << refused;
    EXPECT_THAT(std::string(refused.message()), HasSubstr("expected a file of user"));
  }
  for (const std::string& text : {std::string("short\n"), std::string(300, 'x'), std::string(),
                                  std::string("0123456789 abcdef\n")}) {
    Write(text, 0600);
    EXPECT_FALSE(ReadOrMakeToken(path_).ok()) << text;
  }
  std::filesystem::remove(path_);
  std::filesystem::create_symlink("/etc/hostname", path_);
  EXPECT_FALSE(ReadOrMakeToken(path_).ok());
}

}  // namespace
}  // namespace holdfast
