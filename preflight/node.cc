#include "preflight/node.h"

#include <poll.h>

#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "preflight/channel.h"
#include "preflight/clocks.h"
#include "preflight/measure_disk.h"
#include "preflight/measure_node.h"
#include "preflight/pair.h"

namespace holdfast::preflight {
namespace {

// A service that speaks first answers at once; one that waits for us to speak is not rank 0.
constexpr absl::Duration kTryWithin = absl::Seconds(2);
// Between two rounds through all places where rank 0 may be: nothing tells us that it has come.
constexpr absl::Duration kTryAgainAfter = absl::Milliseconds(100);
constexpr absl::Duration kSendWithin = absl::Seconds(5);
// Of the time for a node alone.
constexpr double kMemoryShare = 0.25;
constexpr double kCpuShare = 0.25;
constexpr double kDiskShare = 0.5;

class Node {
 public:
  Node(FileSystem& file_system, const NodeOptions& options)
      : file_system_(file_system), options_(options) {}

  absl::StatusOr<Ending> Run() {
    ASSIGN_OR_RETURN(listener_, Listener::Create(options_.identity, options_.loopback_only
                                                                        ? Endpoint::Loopback(0)
                                                                        : Endpoint::Any(0)));
    ASSIGN_OR_RETURN(Connection connection, FindRank0());
    channel_.emplace(std::move(connection), Channel::End::kConnecting);
    RETURN_IF_ERROR(Say(MessageType::kReady, ReadyMessage{.pair_port = listener_->endpoint().port(),
                                                          .cpu_count = CpuCount(),
                                                          .host = FixedText<64>(options_.host)}));
    // Rank 0 may have begun to wait for the others when this node had almost given up.
    Deadline deadline = Deadline::After(options_.join_within + options_.join_within);
    while (true) {
      const absl::StatusOr<Message> message = channel_->Receive(deadline);
      if (!message.ok()) return LostRank0(message.status());
      clocks_.Look();
      if (message->type == MessageType::kEnd) {
        ASSIGN_OR_RETURN(const EndMessage end, message->As<EndMessage>());
        if (end.outcome != Outcome::kFine && end.outcome != Outcome::kOdd) {
          return Ending{Outcome::kFailed, end.text.ToString()};
        }
        return Ending{end.outcome, ""};
      }
      if (message->type == MessageType::kBegin) {
        ASSIGN_OR_RETURN(const BeginMessage begin, message->As<BeginMessage>());
        ASSIGN_OR_RETURN(const absl::Duration within, DurationOf(begin.seconds_max));
        deadline = Deadline::After(within);
        continue;
      }
      RETURN_IF_ERROR(Obey(*message));
    }
  }

 private:
  absl::StatusOr<Connection> FindRank0() {
    const Deadline deadline = Deadline::After(options_.join_within);
    // Of all tries the one that says most: that nobody listens yet is to be expected.
    absl::Status told = absl::UnavailableError("");
    while (true) {
      for (const Endpoint& endpoint : options_.rank_0) {
        absl::StatusOr<Connection> connection =
            Connect(options_.identity, 0, endpoint, Line::kControl, 0,
                    deadline.Earlier(Deadline::After(kTryWithin)));
        if (connection.ok()) return connection;
        // Said by a node of this job: nothing changes with time.
        if (absl::IsFailedPrecondition(connection.status())) return connection.status();
        if (absl::IsUnauthenticated(connection.status()) || told.message().empty()) {
          told = connection.status();
        }
      }
      if (deadline.passed()) {
        return absl::DeadlineExceededError(absl::StrFormat(
            "rank 0 was not found within %s at %s to port %d; %s",
            absl::FormatDuration(options_.join_within), options_.rank_0.front().ToString(),
            options_.rank_0.back().port(), told.message()));
      }
      pollfd nobody{-1, 0, 0};
      static_cast<void>(
          poll(&nobody, 1, deadline.Earlier(Deadline::After(kTryAgainAfter)).PollMilliseconds()));
    }
  }

  absl::Status LostRank0(const absl::Status& status) const {
    return absl::UnavailableError(absl::StrFormat(
        "rank 0 at %s is lost: %s", channel_->connection().remote.ToString(), status.message()));
  }

  // From somebody who knows the token, and may still be wrong.
  static absl::StatusOr<absl::Duration> DurationOf(double seconds) {
    if (seconds >= 0 && seconds <= 24 * 3600) return absl::Seconds(seconds);
    return absl::InvalidArgumentError(
        absl::StrFormat("rank 0 said %g seconds, expected 0 to a day", seconds));
  }

  template <typename T>
  absl::Status Say(MessageType type, const T& value) {
    const absl::Status sent = channel_->Send(type, value, Deadline::After(kSendWithin));
    if (sent.ok()) return sent;
    // Rank 0 may have said why before it went.
    const absl::StatusOr<std::optional<Message>> last = channel_->TryReceive();
    if (last.ok() && last->has_value() && (*last)->type == MessageType::kEnd) {
      ASSIGN_OR_RETURN(const EndMessage end, (*last)->As<EndMessage>());
      return absl::UnavailableError(end.text.ToString());
    }
    return LostRank0(sent);
  }

  absl::Status Obey(const Message& message) {
    switch (message.type) {
      case MessageType::kReadClocks: {
        const ClockReading now = clocks_.Look();
        return Say(MessageType::kClocks,
                   ClocksMessage{now.realtime_ns, now.monotonic_ns, clocks_.step_ns()});
      }
      case MessageType::kMeasureAlone: {
        ASSIGN_OR_RETURN(const MeasureAloneMessage request, message.As<MeasureAloneMessage>());
        ASSIGN_OR_RETURN(const absl::Duration duration, DurationOf(request.seconds));
        ASSIGN_OR_RETURN(const AloneMessage result, MeasureAlone(duration));
        return Say(MessageType::kAlone, result);
      }
      case MessageType::kMeasurePair: {
        ASSIGN_OR_RETURN(const MeasurePairMessage request, message.As<MeasurePairMessage>());
        ASSIGN_OR_RETURN(const absl::Duration duration, DurationOf(request.seconds));
        const Endpoint partner =
            request.partner_is_rank_0 != 0
                ? channel_->connection().remote.WithPort(request.partner_port)
                : Endpoint::Decode(request.partner_address, request.partner_port);
        const absl::StatusOr<PairMessage> measured =
            MeasurePair(options_.identity, *listener_,
                        {.round = request.round,
                         .partner_rank = request.partner_rank,
                         .partner = partner,
                         .connects = request.connects != 0,
                         .duration = duration});
        PairMessage result;
        if (measured.ok()) {
          result = *measured;
        } else {
          result.error = FixedText<512>(std::string(measured.status().message()));
        }
        return Say(MessageType::kPair, result);
      }
      default:
        return absl::DataLossError(absl::StrFormat("rank 0 sent an unexpected message of type %d",
                                                   static_cast<uint32_t>(message.type)));
    }
  }

  // Without memory or threads this node cannot take part; without a disk it can, and says why.
  absl::StatusOr<AloneMessage> MeasureAlone(absl::Duration duration) {
    AloneMessage result;
    const auto put = [&result](NodeMetric metric, double value) {
      const auto index = static_cast<size_t>(metric);
      result.values[index] = value;
      result.measured |= 1U << index;
    };
    ASSIGN_OR_RETURN(const double memory, MeasureMemory(kMemoryShare * duration));
    put(NodeMetric::kMemory, memory);
    clocks_.Look();
    ASSIGN_OR_RETURN(const CpuSpeed cpus, MeasureCpus(kCpuShare * duration));
    put(NodeMetric::kCpu, cpus.steps_per_second);
    put(NodeMetric::kSlowestCore, cpus.slowest_steps_per_second);
    clocks_.Look();
    if (options_.disk_directory.empty()) return result;
    const absl::StatusOr<DiskSpeed> disk =
        MeasureDisk(file_system_, options_.disk_directory, kDiskShare * duration);
    if (!disk.ok()) {
      result.disk_error = FixedText<512>(std::string(disk.status().message()));
      return result;
    }
    put(NodeMetric::kDiskWrite, disk->write_bytes_per_second);
    put(NodeMetric::kDiskSync, disk->sync_seconds);
    put(NodeMetric::kDiskRead, disk->read_bytes_per_second);
    result.disk = FixedText<128>(disk->description);
    return result;
  }

  FileSystem& file_system_;
  const NodeOptions& options_;
  ClockWatch clocks_;
  std::unique_ptr<Listener> listener_;
  std::optional<Channel> channel_;
};

}  // namespace

Ending RunNode(FileSystem& file_system, const NodeOptions& options) {
  absl::StatusOr<Ending> ending = Node(file_system, options).Run();
  if (ending.ok()) return *std::move(ending);
  return {Outcome::kFailed, std::string(ending.status().message())};
}

}  // namespace holdfast::preflight
