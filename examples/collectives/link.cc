#include "examples/collectives/link.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_format.h"
#include "examples/collectives/status_macros.h"

namespace collectives {
namespace {

absl::Status Broken(const char* what) {
  return absl::UnavailableError(absl::StrFormat("%s: %s", what, std::strerror(errno)));
}

absl::Status Closed() { return absl::UnavailableError("the other end closed the connection"); }

bool IsTransient(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

LinkSender::LinkSender(Socket socket, const LinkHello& hello)
    : socket_(std::move(socket)), hello_(hello) {}

void LinkSender::Ready(bool readable, bool writable) {
  can_read_ = can_read_ || readable;
  can_write_ = can_write_ || writable;
}

void LinkSender::Queue(const FrameHeader& header, std::span<const std::byte> payload) {
  frames_.push_back({header, payload});
  frames_.back().header.payload_bytes = static_cast<uint32_t>(payload.size());
  ++queued_;
}

absl::Status LinkSender::ReadCredits() {
  while (can_read_) {
    const std::span<std::byte> rest =
        std::as_writable_bytes(std::span(&incoming_, 1)).subspan(incoming_bytes_);
    const ssize_t received = recv(socket_.fd(), rest.data(), rest.size(), 0);
    if (received == 0) return Closed();
    if (received < 0) {
      if (!IsTransient(errno)) return Broken("receive of a credit");
      can_read_ = false;
      return absl::OkStatus();
    }
    incoming_bytes_ += static_cast<size_t>(received);
    if (incoming_bytes_ < sizeof(incoming_)) continue;
    incoming_bytes_ = 0;
    // A place is given once what was in it has arrived, so a receiver is never further ahead.
    if (incoming_.posted < credit_.posted || incoming_.arrived < credit_.arrived ||
        incoming_.arrived > written_ || incoming_.posted > incoming_.arrived + kCredits) {
      return absl::DataLossError(absl::StrFormat(
          "credit for %d chunks, %d arrived: expected at least %d and %d, at most %d arrived, and "
          "at most %d more than have arrived",
          incoming_.posted, incoming_.arrived, credit_.posted, credit_.arrived, written_,
          kCredits));
    }
    credit_ = incoming_;
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> LinkSender::WriteSome(std::span<const std::byte> bytes, bool more_follows) {
  const int more = more_follows ? MSG_MORE : 0;
  const ssize_t sent = send(socket_.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL | more);
  if (sent >= 0) {
    done_bytes_ += static_cast<size_t>(sent);
    return true;
  }
  if (!IsTransient(errno)) return Broken("send");
  can_write_ = false;
  return false;
}

absl::Status LinkSender::Pump() {
  RETURN_IF_ERROR(ReadCredits());
  while (can_write_ && has_output()) {
    if (!hello_sent_) {
      const auto hello = std::as_bytes(std::span(&hello_, 1));
      ASSIGN_OR_RETURN(const bool took, WriteSome(hello.subspan(done_bytes_), false));
      if (took && done_bytes_ == hello.size()) {
        hello_sent_ = true;
        done_bytes_ = 0;
      }
      continue;
    }
    const Frame& frame = frames_.front();
    const auto header = std::as_bytes(std::span(&frame.header, 1));
    const size_t total = header.size() + frame.payload.size();
    // The header travels with what follows it.
    const std::span<const std::byte> rest =
        done_bytes_ < header.size() ? header.subspan(done_bytes_)
                                    : frame.payload.subspan(done_bytes_ - header.size());
    const bool more_follows = done_bytes_ < header.size() && !frame.payload.empty();
    ASSIGN_OR_RETURN(const bool took, WriteSome(rest, more_follows));
    if (took && done_bytes_ == total) {
      frames_.pop_front();
      ++written_;
      done_bytes_ = 0;
    }
  }
  return absl::OkStatus();
}

void LinkReceiver::Ready(bool readable, bool writable) {
  can_read_ = can_read_ || readable;
  can_write_ = can_write_ || writable;
}

// OK and 0: nothing is there now.
absl::StatusOr<size_t> LinkReceiver::ReceiveSome(std::span<std::byte> into) {
  if (!can_read_) return size_t{0};
  const ssize_t received = recv(socket_.fd(), into.data(), into.size(), 0);
  if (received > 0) return static_cast<size_t>(received);
  if (received == 0) return Closed();
  if (!IsTransient(errno)) return Broken("receive");
  can_read_ = false;
  return size_t{0};
}

absl::StatusOr<bool> LinkReceiver::ReceiveHeader() {
  const std::span<std::byte> header = std::as_writable_bytes(std::span(&header_, 1));
  while (header_done_bytes_ < header.size()) {
    ASSIGN_OR_RETURN(const size_t received, ReceiveSome(header.subspan(header_done_bytes_)));
    if (received == 0) return false;
    header_done_bytes_ += received;
    if (header_done_bytes_ == header.size() && header_.magic != kWireMagic) {
      return absl::DataLossError(
          absl::StrFormat("frame magic: expected %08x, found %08x", kWireMagic, header_.magic));
    }
  }
  return true;
}

absl::StatusOr<bool> LinkReceiver::ReceivePayload(std::span<std::byte> into) {
  while (payload_done_bytes_ < into.size()) {
    ASSIGN_OR_RETURN(const size_t received, ReceiveSome(into.subspan(payload_done_bytes_)));
    if (received == 0) return false;
    payload_done_bytes_ += received;
  }
  header_done_bytes_ = payload_done_bytes_ = 0;
  return true;
}

absl::Status LinkReceiver::GiveCredit(const LinkCredit& credit) {
  while (can_write_) {
    if (outgoing_done_bytes_ == sizeof(outgoing_)) {
      if (outgoing_.posted == credit.posted && outgoing_.arrived == credit.arrived) break;
      outgoing_ = credit;
      outgoing_done_bytes_ = 0;
    }
    const auto rest = std::as_bytes(std::span(&outgoing_, 1)).subspan(outgoing_done_bytes_);
    const ssize_t sent = send(socket_.fd(), rest.data(), rest.size(), MSG_NOSIGNAL);
    if (sent >= 0) {
      outgoing_done_bytes_ += static_cast<size_t>(sent);
    } else if (IsTransient(errno)) {
      can_write_ = false;
    } else {
      return Broken("send of a credit");
    }
  }
  return absl::OkStatus();
}

}  // namespace collectives
