// The agent's HTTP port: fixed pages for what watches agents, read only. The protocol is
// libmicrohttpd's; this file is the only one that knows it.
//
// Whoever can reach the port may be hostile. What a client can cost, whatever it sends:
//   memory       kConnectionsMax connections of kConnectionBytesMax each; others wait in the
//                kernel's queue; an answer is kept once, however many read it
//   time         a connection ends kConnectionTime after it began, at whatever it stands
//   processor    the port is looked at once in kTurnEvery; one turn parses what kConnectionsMax
//                sockets have, and an answer is made anew at most once in kAnswerAge
// One request a connection: the answer closes it. No body of a request is ever read.
//
// Threads: the event loop's; libmicrohttpd starts none. Lifetime: the loop and the clock outlive
//   it; so does what the pages refer to.
#ifndef HOLDFAST_AGENT_HTTP_SERVER_H_
#define HOLDFAST_AGENT_HTTP_SERVER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/executor.h"
#include "io/tcp.h"

struct MHD_Connection;
struct MHD_Daemon;
struct MHD_Response;

namespace holdfast {

class HttpServer {
 public:
  static constexpr uint32_t kConnectionsMax = 16;
  static constexpr size_t kConnectionBytesMax = size_t{32} << 10;
  static constexpr absl::Duration kConnectionTime = absl::Seconds(10);
  static constexpr absl::Duration kTurnEvery = absl::Milliseconds(5);
  static constexpr absl::Duration kAnswerAge = absl::Seconds(1);

  struct Answer {
    int code = 200;
    std::string text;
  };
  struct Page {
    std::string path;  // "/metrics"
    std::string content_type;
    bool needs_token = true;
    std::function<Answer()> make;
  };
  struct Options {
    Endpoint at;        // port 0: the kernel chooses
    std::string token;  // that "Authorization: Bearer TOKEN" must have; empty: none is asked for
  };

  // Serves from the loop's next turn on. Errors: kAlreadyExists (the port is taken), kUnavailable
  // (the address is not this machine's, ...), kResourceExhausted.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(Options options, std::vector<Page> pages,
                                                           EventLoop& loop, const Clock& clock);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  const Endpoint& at() const { return at_; }
  // Answers since the start, by path (one of the pages', or "other") and code.
  const std::map<std::pair<std::string, int>, uint64_t>& answer_counts() const {
    return answer_counts_;
  }
  size_t connection_count() const { return connections_.size(); }
  // Connections that were ended at kConnectionTime.
  uint64_t late_count() const { return late_count_; }

 private:
  struct Shown {  // a page, and its last answer
    Page page;
    MHD_Response* response = nullptr;
    int code = 0;
    absl::Duration made_at;
  };
  struct Open {
    int fd = -1;  // libmicrohttpd's
    absl::Duration end_at;
    bool is_shut = false;
  };
  struct Callbacks;  // as libmicrohttpd wants them

  HttpServer(Options options, std::vector<Page> pages, EventLoop& loop, const Clock& clock);
  void Turn();
  void Rest(bool was_full);
  void ShutLate(absl::Duration now);
  int Reply(MHD_Connection* connection, const std::string& path, const std::string& method);
  int ReplyText(MHD_Connection* connection, const std::string& path, int code,
                const std::string& text);
  bool HasToken(MHD_Connection* connection) const;
  void Refresh(Shown& shown);

  const Options options_;
  EventLoop& loop_;
  const Clock& clock_;
  Endpoint at_;
  std::vector<Shown> pages_;
  MHD_Daemon* daemon_ = nullptr;
  int epoll_fd_ = -1;  // libmicrohttpd's
  EventLoop::TimerId timer_ = 0;
  std::map<MHD_Connection*, Open> connections_;
  std::map<std::pair<std::string, int>, uint64_t> answer_counts_;
  uint64_t late_count_ = 0;
};

// "127.0.0.1:9470", "[::1]:9470", "localhost:9470", "0.0.0.0:9470": numbers only, so that nothing
// waits for a resolver. kInvalidArgument.
absl::StatusOr<Endpoint> ParseHttpAddress(const std::string& text);

// The token in `path`: one line of 16 to 256 printable characters, in a file of this user that
// nobody else may read (mode 0600). A new one is made if there is no such file. Errors:
// kPermissionDenied (whose, or who may read it), kInvalidArgument (what is in it), of the disk.
absl::StatusOr<std::string> ReadOrMakeToken(const std::string& path);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_HTTP_SERVER_H_
