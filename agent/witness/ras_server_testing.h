// A server of NCCL's RAS protocol for tests, written from the description of the protocol (the
// reference named in ras_client.h), one connection after another.
// Model: the greeting, TIMEOUT, SET FORMAT, VERBOSE STATUS; an old NCCL knows no format; a broken
// one
//   is silent, talks HTTP, or closes in the middle.
// Not modelled: MONITOR, several clients at once.
#ifndef HOLDFAST_AGENT_WITNESS_RAS_SERVER_TESTING_H_
#define HOLDFAST_AGENT_WITNESS_RAS_SERVER_TESTING_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cctype>
#include <cstdint>
#include <string>
#include <thread>

#include "agent/witness/ras_client.h"
#include "base/check.h"
#include "io/unique_fd.h"

namespace holdfast {

// Threads: made and destroyed by one; its own serves.
class RasServer {
 public:
  enum class Kind { kJson, kTextOnly, kSilent, kHttp, kClosesEarly };

  RasServer(Kind kind, std::string report) : kind_(kind), report_(std::move(report)) {
    listener_.Reset(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
    CHECK(listen(listener_.get(), 8) == 0);
    socklen_t size = sizeof(address);
    CHECK(getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    address_.port = ntohs(address.sin_port);
    stop_.Reset(eventfd(0, EFD_CLOEXEC));
    thread_ = std::thread([this] { Serve(); });
  }
  ~RasServer() {
    const uint64_t one = 1;
    CHECK(write(stop_.get(), &one, sizeof(one)) == sizeof(one));
    thread_.join();
  }

  const RasAddress& address() const { return address_; }

 private:
  // False when the server is to stop.
  bool WaitFor(int fd) const {
    pollfd entries[] = {{fd, POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    while (poll(entries, 2, -1) < 0) continue;
    return entries[1].revents == 0;
  }
  void Serve() {
    while (WaitFor(listener_.get())) {
      const UniqueFd client(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      std::string received;
      char bytes[512];
      while (client && WaitFor(client.get())) {
        const ssize_t got = read(client.get(), bytes, sizeof(bytes));
        if (got <= 0) break;
        received.append(bytes, static_cast<size_t>(got));
        bool closes = false;
        for (size_t end; !closes && (end = received.find('\n')) != std::string::npos;) {
          closes = Answer(client.get(), received.substr(0, end));
          received.erase(0, end + 1);
        }
        if (closes) break;
      }
    }
  }
  // Whether the connection is to be closed.
  bool Answer(int client, std::string line) const {
    for (char& c : line) c = static_cast<char>(toupper(static_cast<unsigned char>(c)));
    if (kind_ == Kind::kSilent) return false;
    if (kind_ == Kind::kHttp) return Say(client, "HTTP/1.1 400 Bad Request\r\n\r\n");
    if (line.starts_with("CLIENT PROTOCOL ")) return !Say(client, "SERVER PROTOCOL 2\n");
    if (line.starts_with("TIMEOUT ")) return !Say(client, "OK\n");
    if (line.starts_with("SET FORMAT ")) {
      return !Say(client, kind_ == Kind::kTextOnly ? "ERROR: unknown command\n" : "OK\n");
    }
    if (line == "VERBOSE STATUS") {
      Say(client, kind_ == Kind::kClosesEarly ? report_.substr(0, report_.size() / 2) : report_);
      return true;
    }
    return !Say(client, "ERROR: unknown command\n");
  }
  static bool Say(int client, const std::string& text) {
    return send(client, text.data(), text.size(), MSG_NOSIGNAL) ==
           static_cast<ssize_t>(text.size());
  }

  const Kind kind_;
  const std::string report_;
  RasAddress address_;
  UniqueFd listener_, stop_;
  std::thread thread_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_RAS_SERVER_TESTING_H_
