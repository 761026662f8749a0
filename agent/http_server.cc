#include "agent/http_server.h"

#include <errno.h>
#include <fcntl.h>
#include <microhttpd.h>
#include <netdb.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/process.h"
#include "base/check.h"
#include "base/random_bits.h"
#include "base/status_macros.h"
#include "io/errno_status.h"
#include "io/unique_fd.h"

namespace holdfast {
namespace {

constexpr int kBacklog = 64;
constexpr size_t kTokenBytesMin = 16;
constexpr size_t kTokenBytesMax = 256;
constexpr char kPlain[] = "text/plain; charset=utf-8";

// How much of a token is right must not show in the time that it takes.
bool IsEqual(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned char differs = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    differs = static_cast<unsigned char>(differs | (a[i] ^ b[i]));
  }
  return differs == 0;
}

MHD_Response* NewResponse(const std::string& text, const std::string& content_type) {
  // The library copies the text, and writes nothing into what it is given.
  MHD_Response* const response = MHD_create_response_from_buffer(
      text.size(), const_cast<char*>(text.data()), MHD_RESPMEM_MUST_COPY);
  if (response == nullptr) return nullptr;
  const std::pair<const char*, std::string> headers[] = {
      {MHD_HTTP_HEADER_CONTENT_TYPE, content_type},
      {MHD_HTTP_HEADER_CONNECTION, "close"},
      {MHD_HTTP_HEADER_CACHE_CONTROL, "no-store"},
      {"X-Content-Type-Options", "nosniff"}};
  for (const auto& [name, value] : headers) MHD_add_response_header(response, name, value.c_str());
  return response;
}

}  // namespace

struct HttpServer::Callbacks {
  static MHD_Result OnRequest(void* self, MHD_Connection* connection, const char* url,
                              const char* method, const char*, const char*, size_t* body_bytes,
                              void** cls) {
    // The answer is given with the headers: a body is not waited for. After that the library may
    // call once more.
    if (*cls != nullptr) {
      *body_bytes = 0;
      return MHD_YES;
    }
    *cls = self;
    return static_cast<MHD_Result>(static_cast<HttpServer*>(self)->Reply(connection, url, method));
  }

  static void OnConnection(void* self, MHD_Connection* connection, void**,
                           MHD_ConnectionNotificationCode code) {
    HttpServer& server = *static_cast<HttpServer*>(self);
    if (code == MHD_CONNECTION_NOTIFY_CLOSED) {
      server.connections_.erase(connection);
      return;
    }
    const MHD_ConnectionInfo* const info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    server.connections_[connection] = {info == nullptr ? -1 : info->connect_fd,
                                       server.clock_.Elapsed() + kConnectionTime, false};
  }
};

HttpServer::HttpServer(Options options, std::vector<Page> pages, EventLoop& loop,
                       const Clock& clock)
    : options_(std::move(options)), loop_(loop), clock_(clock) {
  for (Page& page : pages) pages_.push_back({std::move(page), nullptr, 0, {}});
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(Options options,
                                                              std::vector<Page> pages,
                                                              EventLoop& loop, const Clock& clock) {
  ASSIGN_OR_RETURN(UniqueFd listener, ListenTcp(options.at, kBacklog));
  std::unique_ptr<HttpServer> server(
      new HttpServer(std::move(options), std::move(pages), loop, clock));
  ASSIGN_OR_RETURN(server->at_, LocalEndpoint(listener.get()));
  server->daemon_ = MHD_start_daemon(
      MHD_USE_EPOLL, /*port=*/0, /*apc=*/nullptr, /*apc_cls=*/nullptr, &Callbacks::OnRequest,
      server.get(), MHD_OPTION_LISTEN_SOCKET, listener.get(), MHD_OPTION_CONNECTION_LIMIT,
      static_cast<unsigned>(kConnectionsMax), MHD_OPTION_CONNECTION_MEMORY_LIMIT,
      kConnectionBytesMax, MHD_OPTION_CONNECTION_TIMEOUT,
      static_cast<unsigned>(absl::ToInt64Seconds(kConnectionTime)), MHD_OPTION_NOTIFY_CONNECTION,
      &Callbacks::OnConnection, server.get(), MHD_OPTION_END);
  if (server->daemon_ == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("HTTP on ", server->at_.ToString(), ": the library did not start"));
  }
  static_cast<void>(listener.Release());  // the library closes it
  const MHD_DaemonInfo* const info = MHD_get_daemon_info(server->daemon_, MHD_DAEMON_INFO_EPOLL_FD);
  CHECK(info != nullptr && info->epoll_fd >= 0);
  server->epoll_fd_ = info->epoll_fd;
  server->Rest(/*was_full=*/false);
  return server;
}

HttpServer::~HttpServer() {
  loop_.CancelTimer(timer_);
  if (epoll_fd_ >= 0) loop_.Unwatch(epoll_fd_);
  if (daemon_ != nullptr) MHD_stop_daemon(daemon_);
  for (Shown& shown : pages_) {
    if (shown.response != nullptr) MHD_destroy_response(shown.response);
  }
}

// One look at all that the sockets have. What comes meanwhile waits for the next turn, so that
// clients that send without end get a bounded part of the loop's time.
void HttpServer::Turn() {
  loop_.CancelTimer(timer_);
  loop_.Unwatch(epoll_fd_);
  ShutLate(clock_.Elapsed());
  const bool was_full = connections_.size() >= kConnectionsMax;
  MHD_run(daemon_);
  timer_ = loop_.RunAfter(kTurnEvery, [this, was_full] { Rest(was_full); });
}

void HttpServer::Rest(bool was_full) {
  timer_ = 0;
  MHD_UNSIGNED_LONG_LONG wait_ms = 0;
  const bool has_wait = MHD_get_timeout(daemon_, &wait_ms) == MHD_YES;
  // The library listens again, after having been full, only when it is run.
  const bool listens_again = was_full && connections_.size() < kConnectionsMax;
  if ((has_wait && wait_ms == 0) || listens_again) return Turn();
  loop_.Watch(epoll_fd_, EventLoop::FdEvents::kReadable, [this] { Turn(); });
  absl::Duration wait =
      has_wait ? absl::Milliseconds(static_cast<int64_t>(std::min<uint64_t>(wait_ms, 3'600'000)))
               : absl::InfiniteDuration();
  for (const auto& [connection, open] : connections_) {
    if (!open.is_shut) wait = std::min(wait, open.end_at - clock_.Elapsed());
  }
  if (wait == absl::InfiniteDuration()) return;
  timer_ = loop_.RunAfter(std::max(wait, kTurnEvery), [this] { Turn(); });
}

// The library's own time-out begins anew with every byte: this one does not.
void HttpServer::ShutLate(absl::Duration now) {
  for (auto& [connection, open] : connections_) {
    if (open.is_shut || now < open.end_at) continue;
    open.is_shut = true;
    ++late_count_;
    // The library sees its end, and closes it. Dropped: then it has ended already.
    if (open.fd >= 0) static_cast<void>(shutdown(open.fd, SHUT_RDWR));
  }
}

bool HttpServer::HasToken(MHD_Connection* connection) const {
  if (options_.token.empty()) return true;
  // The name of a scheme is in any case (RFC 9110, section 11.1).
  constexpr std::string_view kScheme = "Bearer ";
  const char* const value =
      MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_AUTHORIZATION);
  return value != nullptr && strncasecmp(value, kScheme.data(), kScheme.size()) == 0 &&
         IsEqual(value + kScheme.size(), options_.token);
}

void HttpServer::Refresh(Shown& shown) {
  const absl::Duration now = clock_.Elapsed();
  if (shown.response != nullptr && now - shown.made_at < kAnswerAge) return;
  const Answer answer = shown.page.make();
  MHD_Response* const fresh = NewResponse(answer.text, shown.page.content_type);
  if (fresh == nullptr) return;  // no memory: what was there is told once more
  if (shown.response != nullptr) MHD_destroy_response(shown.response);  // kept by who reads it
  shown.response = fresh;
  shown.code = answer.code;
  shown.made_at = now;
}

int HttpServer::Reply(MHD_Connection* connection, const std::string& path,
                      const std::string& method) {
  const auto found = std::find_if(pages_.begin(), pages_.end(),
                                  [&](const Shown& shown) { return shown.page.path == path; });
  if (found == pages_.end()) return ReplyText(connection, "other", 404, "no such page\n");
  if (method != MHD_HTTP_METHOD_GET && method != MHD_HTTP_METHOD_HEAD) {
    return ReplyText(connection, path, 405, "expected GET or HEAD\n");
  }
  if (found->page.needs_token && !HasToken(connection)) {
    return ReplyText(connection, path, 401,
                     "expected the header Authorization: Bearer TOKEN (http_token_file)\n");
  }
  Refresh(*found);
  if (found->response == nullptr) return MHD_NO;
  ++answer_counts_[{path, found->code}];
  return MHD_queue_response(connection, static_cast<unsigned>(found->code), found->response);
}

int HttpServer::ReplyText(MHD_Connection* connection, const std::string& path, int code,
                          const std::string& text) {
  MHD_Response* const response = NewResponse(text, kPlain);
  if (response == nullptr) return MHD_NO;
  if (code == 401) MHD_add_response_header(response, MHD_HTTP_HEADER_WWW_AUTHENTICATE, "Bearer");
  if (code == 405) MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
  ++answer_counts_[{path, code}];
  const int queued = MHD_queue_response(connection, static_cast<unsigned>(code), response);
  MHD_destroy_response(response);
  return queued;
}

absl::StatusOr<Endpoint> ParseHttpAddress(const std::string& text) {
  const auto refuse = [&] {
    return absl::InvalidArgumentError(absl::StrFormat(
        "expected off, or ADDRESS:PORT with a numeric address (127.0.0.1:9470, [::1]:9470), found "
        "\"%s\"",
        text));
  };
  const size_t colon = text.rfind(':');
  uint32_t port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(text.substr(colon + 1), &port) ||
      port > 65'535) {
    return refuse();
  }
  std::string host = text.substr(0, colon);
  if (host == "localhost") host = "127.0.0.1";
  const bool is_bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (is_bracketed) host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), "0", &hints, &found) != 0) return refuse();
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> places(found, &freeaddrinfo);
  if (found->ai_family == AF_INET6 && !is_bracketed) return refuse();
  sockaddr_storage address{};
  std::memcpy(&address, found->ai_addr, found->ai_addrlen);
  return Endpoint(address).WithPort(static_cast<uint16_t>(port));
}

namespace {

absl::Status CheckToken(const std::string& path, const std::string& token) {
  const bool is_printable = std::all_of(token.begin(), token.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c));
  });
  if (token.size() >= kTokenBytesMin && token.size() <= kTokenBytesMax && is_printable) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrFormat(
      "%s: expected one line of %d to %d printable characters without blanks, found %d bytes of "
      "something else",
      path, kTokenBytesMin, kTokenBytesMax, token.size()));
}

absl::StatusOr<std::string> ReadToken(const std::string& path, int fd) {
  struct stat info {};
  if (fstat(fd, &info) != 0) return ErrnoStatus(errno, "stat", path);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected a regular file"));
  }
  if (info.st_uid != geteuid() || (info.st_mode & 077) != 0) {
    return absl::PermissionDeniedError(absl::StrFormat(
        "%s: expected a file of user %d with mode 0600, found one of user %d with mode %04o", path,
        geteuid(), info.st_uid, info.st_mode & 07777));
  }
  ASSIGN_OR_RETURN(std::string token, ReadAll(fd, kTokenBytesMax + 2));
  absl::StripAsciiWhitespace(&token);
  RETURN_IF_ERROR(CheckToken(path, token));
  return token;
}

}  // namespace

absl::StatusOr<std::string> ReadOrMakeToken(const std::string& path) {
  constexpr int kFlags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  const UniqueFd known(open(path.c_str(), O_RDONLY | kFlags));
  if (known) return ReadToken(path, known.get());
  if (errno != ENOENT) return ErrnoStatus(errno, "open", path);
  const std::string token =
      absl::StrFormat("%016x%016x", RandomBits(), RandomBits());  // 128 bits of the kernel's
  const std::string text = absl::StrCat(token, "\n");
  // Whole under its final name, or not there: another agent may look for it.
  const std::string partial = absl::StrFormat("%s.partial.%016x", path, RandomBits());
  const UniqueFd file(open(partial.c_str(), O_WRONLY | O_CREAT | O_EXCL | kFlags, 0600));
  if (!file) return ErrnoStatus(errno, "create", partial);
  const bool is_written =
      write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size());
  const int error = is_written && link(partial.c_str(), path.c_str()) == 0 ? 0 : errno;
  unlink(partial.c_str());
  if (error == 0) return token;
  if (error != EEXIST) return ErrnoStatus(error, "create", path);
  // Another one was faster.
  const UniqueFd other(open(path.c_str(), O_RDONLY | kFlags));
  if (!other) return ErrnoStatus(errno, "open", path);
  return ReadToken(path, other.get());
}

}  // namespace holdfast
