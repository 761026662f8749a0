// The two ends of a link: chunks and credits over one socket, without ever blocking.
//
// A socket is only tried if poll(2) has said that it is ready since it was last found exhausted:
// whoever polls passes that on with Ready().
#ifndef HOLDFAST_EXAMPLES_COLLECTIVES_LINK_H_
#define HOLDFAST_EXAMPLES_COLLECTIVES_LINK_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/collectives/wire.h"

namespace collectives {

// The sending end.
//
// Threads: one at a time.
// Lifetime: the bytes given to Queue() must live until they are written.
class LinkSender {
 public:
  LinkSender(Socket socket, const LinkHello& hello);

  int fd() const { return socket_.fd(); }
  // Whether poll(2) shall watch for room to write.
  bool is_blocked() const { return !can_write_ && has_output(); }
  void Ready(bool readable, bool writable);

  // Totals since the link was made.
  uint64_t queued() const { return queued_; }
  uint64_t written() const { return written_; }         // given to the kernel: may be changed
  uint64_t posted() const { return credit_.posted; }    // by the receiver
  uint64_t arrived() const { return credit_.arrived; }  // there

  // Precondition: queued() < posted(). `header.payload_bytes` is set here.
  void Queue(const FrameHeader& header, std::span<const std::byte> payload);
  // Reads credits and writes what the socket takes now. Errors: kUnavailable (the link is broken),
  // kDataLoss (no receiver of ours gives such credit).
  absl::Status Pump();

 private:
  struct Frame {
    FrameHeader header;
    std::span<const std::byte> payload;
  };
  bool has_output() const { return !hello_sent_ || !frames_.empty(); }
  absl::Status ReadCredits();
  // False: the socket is full.
  absl::StatusOr<bool> WriteSome(std::span<const std::byte> bytes, bool more_follows);

  Socket socket_;
  const LinkHello hello_;
  bool hello_sent_ = false;
  bool can_read_ = true;
  bool can_write_ = true;
  std::deque<Frame> frames_;  // at most kCredits
  size_t done_bytes_ = 0;     // of the hello, or of the first frame with its header
  uint64_t queued_ = 0;
  uint64_t written_ = 0;
  LinkCredit credit_;
  LinkCredit incoming_;
  size_t incoming_bytes_ = 0;
};

// The receiving end, after the link's hello. A chunk is received in two parts, so that its place
// can be chosen by its header.
//
// Threads: one at a time.
class LinkReceiver {
 public:
  explicit LinkReceiver(Socket socket) : socket_(std::move(socket)) {}

  int fd() const { return socket_.fd(); }
  void Ready(bool readable, bool writable);
  // Whether poll(2) shall watch for room to write.
  bool is_blocked() const { return !can_write_; }

  // True once the header of the next chunk is there. Errors: kUnavailable (the link is broken),
  // kDataLoss (not a frame).
  absl::StatusOr<bool> ReceiveHeader();
  const FrameHeader& header() const { return header_; }
  // Receives the chunk's payload into `into`, which has its size and is the same in every call for
  // it. True once all of it is there; then comes the next header.
  absl::StatusOr<bool> ReceivePayload(std::span<std::byte> into);

  // Tells the sender, now or, if the socket is full, with the next call.
  absl::Status GiveCredit(const LinkCredit& credit);

 private:
  absl::StatusOr<size_t> ReceiveSome(std::span<std::byte> into);

  Socket socket_;
  bool can_read_ = true;
  bool can_write_ = true;
  FrameHeader header_;
  size_t header_done_bytes_ = 0;
  size_t payload_done_bytes_ = 0;
  LinkCredit outgoing_;  // of which some bytes may be on their way
  size_t outgoing_done_bytes_ = sizeof(LinkCredit);
};

}  // namespace collectives

#endif  // HOLDFAST_EXAMPLES_COLLECTIVES_LINK_H_
