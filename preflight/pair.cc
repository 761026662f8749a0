#include "preflight/pair.h"

#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "preflight/channel.h"
#include "preflight/clocks.h"

namespace holdfast::preflight {
namespace {

constexpr size_t kChunkBytes = size_t{256} << 10;
constexpr size_t kWarmUpPings = 10;
constexpr int64_t kNsPerSecond = 1'000'000'000;

// Counts what arrives in a leg, from the first byte on and without the warm-up.
class Arrivals {
 public:
  explicit Arrivals(int64_t leg_ns)
      : leg_ns_(leg_ns),
        warm_up_ns_(static_cast<int64_t>(kLegWarmUpShare * static_cast<double>(leg_ns))) {}

  // `bytes` (0: none) have come. True once the leg's time is over, and something has been counted:
  // a sender that waited for a processor all the time is no path of no speed.
  bool Count(size_t bytes) {
    now_ns_ = MonotonicNs();
    if (first_ns_ == 0 && bytes > 0) first_ns_ = now_ns_;
    if (first_ns_ == 0) return false;
    if (counted_from_ns_ > 0) {
      counted_bytes_ += bytes;
    } else if (now_ns_ - first_ns_ >= warm_up_ns_) {
      counted_from_ns_ = now_ns_;
    }
    // From when counting really began: a process that did not run in between has lost that time.
    return is_time_over() && counted_bytes_ > 0;
  }

  double bytes_per_second() const {
    const int64_t counted_ns = std::max<int64_t>(now_ns_ - counted_from_ns_, 1);
    return static_cast<double>(counted_bytes_) * kNsPerSecond / static_cast<double>(counted_ns);
  }

  // Until warm-up or counting is over; for ever if a byte is waited for.
  Deadline WaitAtMost() const {
    if (first_ns_ == 0 || is_time_over()) return Deadline::After(absl::Hours(1));
    const int64_t until_ns =
        counted_from_ns_ > 0 ? counted_from_ns_ + leg_ns_ - warm_up_ns_ : first_ns_ + warm_up_ns_;
    return Deadline::After(absl::Nanoseconds(until_ns - now_ns_));
  }

 private:
  bool is_time_over() const {
    return counted_from_ns_ > 0 && now_ns_ - counted_from_ns_ >= leg_ns_ - warm_up_ns_;
  }

  const int64_t leg_ns_;
  const int64_t warm_up_ns_;
  int64_t now_ns_ = 0;
  int64_t first_ns_ = 0;
  int64_t counted_from_ns_ = 0;
  uint64_t counted_bytes_ = 0;
};

class PairMeasurement {
 public:
  PairMeasurement(const Identity& self, Listener& listener, const PairPlan& plan)
      : self_(self),
        listener_(listener),
        plan_(plan),
        deadline_(Deadline::After(plan.duration + kPairPatience)),
        leg_ns_(absl::ToInt64Nanoseconds(plan.duration / kLegCount)) {}

  absl::StatusOr<PairMessage> Run() {
    ASSIGN_OR_RETURN(Connection connection, Open(Line::kPair));
    channel_.emplace(std::move(connection),
                     plan_.connects ? Channel::End::kConnecting : Channel::End::kListening);
    PairMessage result;
    RETURN_IF_ERROR(RoundTrips(&result));
    RETURN_IF_ERROR(
        Flow(Line::kForward, plan_.connects, !plan_.connects, &result.one_way_bytes_per_second));
    RETURN_IF_ERROR(
        Flow(Line::kBackward, !plan_.connects, plan_.connects, &result.one_way_bytes_per_second));
    RETURN_IF_ERROR(Flow(Line::kBothWays, true, true, &result.both_ways_bytes_per_second));
    return result;
  }

 private:
  absl::StatusOr<Connection> Open(Line line) {
    if (plan_.connects) {
      return Connect(self_, plan_.partner_rank, plan_.partner, line, plan_.round, deadline_);
    }
    absl::StatusOr<Connection> connection = listener_.Accept(
        [&](const Hello& hello) {
          return hello.from_rank == plan_.partner_rank && hello.line == line &&
                         hello.round == plan_.round
                     ? Answer::kWelcome
                     : Answer::kNotNow;
        },
        channel_.has_value() ? channel_->fd() : -1, deadline_);
    if (!absl::IsAborted(connection.status())) return connection;
    // Between legs nothing is to be said: it is the end of the channel, or should not be there.
    RETURN_IF_ERROR(channel_->Receive(deadline_).status());
    return absl::DataLossError("a message between two legs");
  }

  absl::Status CheckDone(const Message& message, Line line) const {
    if (message.type != MessageType::kLegDone) {
      return absl::DataLossError(absl::StrFormat("expected the end of a leg, found message %d",
                                                 static_cast<uint32_t>(message.type)));
    }
    ASSIGN_OR_RETURN(const LegDoneMessage done, message.As<LegDoneMessage>());
    if (done.leg == static_cast<uint32_t>(line)) return absl::OkStatus();
    return absl::DataLossError(absl::StrFormat("expected the end of leg %d, found that of %d",
                                               static_cast<uint32_t>(line), done.leg));
  }

  // True once the other end has said that it is done with `line`.
  absl::StatusOr<bool> PartnerIsDone(Line line) {
    ASSIGN_OR_RETURN(const std::optional<Message> message, channel_->TryReceive());
    if (!message.has_value()) return false;
    RETURN_IF_ERROR(CheckDone(*message, line));
    return true;
  }

  // After an error on the leg's connection: OK if the other end has broken it off because it is
  // done. Only the channel tells, and it may be later.
  absl::Status DoneOr(const absl::Status& leg_error, Line line) {
    const absl::StatusOr<Message> message = channel_->Receive(deadline_);
    return message.ok() ? CheckDone(*message, line) : leg_error;
  }

  absl::Status SayDone(Line line) {
    return channel_->Send(MessageType::kLegDone, LegDoneMessage{static_cast<uint32_t>(line)},
                          deadline_);
  }

  // Waits until the leg's connection or the channel has something, or for the time given.
  absl::Status Wait(int fd, int events, Deadline until) {
    std::array<pollfd, 2> entries = {pollfd{channel_->fd(), POLLIN, 0},
                                     pollfd{fd, static_cast<short>(events), 0}};
    const int timeout_ms = deadline_.Earlier(until).PollMilliseconds();
    if (poll(entries.data(), entries.size(), timeout_ms) < 0 && errno != EINTR) {
      return absl::UnavailableError(absl::StrFormat("poll: errno %d", errno));
    }
    return absl::OkStatus();
  }

  absl::Status CheckDeadline(Line line) const {
    if (!deadline_.passed()) return absl::OkStatus();
    return absl::DeadlineExceededError(absl::StrFormat(
        "rank %d did not end leg %d in time", plan_.partner_rank, static_cast<uint32_t>(line)));
  }

  absl::Status RoundTrips(PairMessage* result) {
    ASSIGN_OR_RETURN(const Connection leg, Open(Line::kRoundTrips));
    return plan_.connects ? Ping(leg.fd.get(), result) : Echo(leg.fd.get());
  }

  absl::Status Ping(int fd, PairMessage* result) {
    std::array<std::byte, kPingBytes> ping = {};
    std::vector<double> seconds;
    const int64_t begun_ns = MonotonicNs();
    int64_t now_ns = begun_ns;
    do {
      const int64_t sent_ns = now_ns;
      RETURN_IF_ERROR(SendAll(fd, ping, deadline_));
      RETURN_IF_ERROR(ReceiveAll(fd, ping, deadline_));
      now_ns = MonotonicNs();
      seconds.push_back(static_cast<double>(now_ns - sent_ns) / kNsPerSecond);
    } while (now_ns - begun_ns < leg_ns_ && seconds.size() < kPingsMax);
    RETURN_IF_ERROR(SayDone(Line::kRoundTrips));
    // The first ones find sleeping CPUs and empty caches; on a path on which there are only few,
    // they count.
    if (seconds.size() > 10 * kWarmUpPings) {
      seconds.erase(seconds.begin(), seconds.begin() + kWarmUpPings);
    }
    std::sort(seconds.begin(), seconds.end());
    result->round_trip_seconds = seconds[seconds.size() / 2];
    result->round_trip_p99_seconds = seconds[seconds.size() * 99 / 100];
    return absl::OkStatus();
  }

  absl::Status Echo(int fd) {
    std::array<std::byte, kPingBytes> ping = {};
    while (true) {
      ASSIGN_OR_RETURN(const bool done, PartnerIsDone(Line::kRoundTrips));
      if (done) return absl::OkStatus();
      RETURN_IF_ERROR(CheckDeadline(Line::kRoundTrips));
      const absl::StatusOr<size_t> received = ReceiveSome(fd, ping);
      if (!received.ok()) return DoneOr(received.status(), Line::kRoundTrips);
      if (*received > 0) {
        RETURN_IF_ERROR(SendAll(fd, std::span(ping).first(*received), deadline_));
      } else {
        RETURN_IF_ERROR(Wait(fd, POLLIN, deadline_));
      }
    }
  }

  absl::Status Flow(Line line, bool sends, bool receives, double* bytes_per_second) {
    ASSIGN_OR_RETURN(const Connection leg, Open(line));
    const int fd = leg.fd.get();
    DropUnsentOnClose(fd);
    std::vector<std::byte> chunk(kChunkBytes);
    Arrivals arrivals(leg_ns_);
    bool sending = sends;
    bool receiving = receives;
    while (sending || receiving) {
      RETURN_IF_ERROR(CheckDeadline(line));
      ASSIGN_OR_RETURN(const bool partner_is_done, PartnerIsDone(line));
      if (partner_is_done && !sending) return absl::DataLossError("a leg that ended twice");
      sending = sending && !partner_is_done;
      size_t moved_bytes = 0;
      if (receiving) {
        ASSIGN_OR_RETURN(const size_t received, ReceiveSome(fd, chunk));
        moved_bytes += received;
        if (arrivals.Count(received)) {
          *bytes_per_second = arrivals.bytes_per_second();
          receiving = false;
          RETURN_IF_ERROR(SayDone(line));
        }
      }
      if (sending) {
        const absl::StatusOr<size_t> sent = SendSome(fd, chunk);
        if (!sent.ok()) {
          RETURN_IF_ERROR(DoneOr(sent.status(), line));
          sending = false;
        } else {
          moved_bytes += *sent;
        }
      }
      if (moved_bytes > 0 || !(sending || receiving)) continue;
      RETURN_IF_ERROR(Wait(fd, (receiving ? POLLIN : 0) | (sending ? POLLOUT : 0),
                           receiving ? arrivals.WaitAtMost() : deadline_));
    }
    return absl::OkStatus();
  }

  const Identity& self_;
  Listener& listener_;
  const PairPlan& plan_;
  const Deadline deadline_;
  const int64_t leg_ns_;
  std::optional<Channel> channel_;
};

}  // namespace

absl::StatusOr<PairMessage> MeasurePair(const Identity& self, Listener& listener,
                                        const PairPlan& plan) {
  return PairMeasurement(self, listener, plan).Run();
}

}  // namespace holdfast::preflight
