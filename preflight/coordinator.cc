#include "preflight/coordinator.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "preflight/channel.h"
#include "preflight/clocks.h"
#include "preflight/pair.h"
#include "preflight/pairing.h"

namespace holdfast::preflight {
namespace {

// Of the measuring time; the rest is for the rounds of pairs.
constexpr double kAloneShare = 0.4;
constexpr absl::Duration kClocksWithin = absl::Seconds(5);
constexpr absl::Duration kSendWithin = absl::Seconds(5);
constexpr absl::Duration kSayAgainAfter = absl::Seconds(5);
constexpr int kClockTrips = 8;
constexpr size_t kRanksNamedMax = 16;

struct Member {
  std::optional<Channel> channel;
  bool ready = false;
  ReadyMessage said;
};

class Coordinator {
 public:
  Coordinator(const CoordinatorOptions& options, Listener& listener)
      : options_(options),
        listener_(listener),
        rounds_(RoundsOf(options.node_count)),
        members_(options.node_count) {
    report_.job.nodes.resize(options.node_count);
  }

  Report Run() {
    const absl::Status done = Measure();
    EndMessage end;
    if (done.ok()) {
      report_.findings = FindOddOnes(report_.job, options_.slow_ratio);
      report_.outcome = report_.findings.empty() ? Outcome::kFine : Outcome::kOdd;
    } else {
      report_.failure = std::string(done.message());
      end.text = FixedText<1024>(report_.failure);
    }
    end.outcome = report_.outcome;
    for (Member& member : members_) {
      if (!member.channel.has_value()) continue;
      // Whom it does not reach sees the connection close, and fails too.
      static_cast<void>(
          member.channel->Send(MessageType::kEnd, end, Deadline::After(absl::Seconds(1))));
    }
    report_.refusals = listener_.refusals();
    report_.refusal_count = listener_.refusal_count();
    return std::move(report_);
  }

 private:
  absl::Status Measure() {
    RETURN_IF_ERROR(Join());
    const absl::Duration within = WholeWithin(options_.measure_for, options_.node_count);
    RETURN_IF_ERROR(Broadcast(MessageType::kBegin, BeginMessage{absl::ToDoubleSeconds(within)}));
    RETURN_IF_ERROR(CompareClocks());
    RETURN_IF_ERROR(Alone());
    for (uint32_t round = 0; round < rounds_.size(); ++round) RETURN_IF_ERROR(Pairs(round));
    return CompareClocks();
  }

  // --- Joining.

  absl::Status Join() {
    const Deadline deadline = Deadline::After(options_.join_within);
    Deadline say_again = Deadline::After(kSayAgainAfter);
    while (ready_count_ < options_.node_count) {
      // Before the door is opened: who has gone may come again.
      RETURN_IF_ERROR(HearReady());
      welcomed_.clear();
      ASSIGN_OR_RETURN(std::vector<Connection> welcomed,
                       listener_.Pump([this](const Hello& hello) { return Judge(hello); }));
      for (Connection& connection : welcomed) {
        members_[connection.remote_rank].channel.emplace(std::move(connection),
                                                         Channel::End::kListening);
      }
      // Rank 0's own node must hear of it too, and does not look for a coordinator that has gone.
      if (!twice_.empty() && members_[0].ready) return absl::FailedPreconditionError(twice_);
      if (ready_count_ == options_.node_count) break;
      if (deadline.passed()) return NotAllCame();
      if (say_again.passed()) {
        Say(absl::StrFormat("%d of %d nodes have come, waiting for %s", ready_count_,
                            options_.node_count, RanksText(Absent())));
        say_again = Deadline::After(kSayAgainAfter);
      }
      std::vector<pollfd> entries;
      listener_.AppendPollFds(&entries);
      for (const Member& member : members_) {
        if (member.channel.has_value()) entries.push_back({member.channel->fd(), POLLIN, 0});
      }
      RETURN_IF_ERROR(Poll(entries, deadline.Earlier(say_again)));
    }
    Say(absl::StrFormat("all %d nodes have come", options_.node_count));
    return absl::OkStatus();
  }

  Answer Judge(const Hello& hello) {
    if (hello.line != Line::kControl) return Answer::kNotNow;
    if (!members_[hello.from_rank].channel.has_value() &&
        welcomed_.insert(hello.from_rank).second) {
      return Answer::kWelcome;
    }
    twice_ = absl::StrFormat(
        "two processes say that they are rank %d: one process per node, each with a RANK of its "
        "own",
        hello.from_rank);
    return Answer::kTaken;
  }

  absl::Status HearReady() {
    for (uint32_t rank = 0; rank < members_.size(); ++rank) {
      Member& member = members_[rank];
      if (!member.channel.has_value()) continue;
      const absl::StatusOr<std::optional<Message>> message = member.channel->TryReceive();
      if (!message.ok() && !member.ready) {
        member.channel.reset();  // it may come again
        continue;
      }
      if (!message.ok()) return Lost(rank, "while others were awaited", message.status());
      if (!message->has_value()) continue;
      if (member.ready || (*message)->type != MessageType::kReady) {
        return Lost(rank, "while others were awaited",
                    absl::DataLossError("an unexpected message"));
      }
      ASSIGN_OR_RETURN(member.said, (*message)->As<ReadyMessage>());
      member.ready = true;
      ++ready_count_;
      NodeMeasurements& node = report_.job.nodes[rank];
      node.host = member.said.host.ToString();
      node.address = AddressWithoutPort(member.channel->connection().remote);
      node.cpu_count = member.said.cpu_count;
    }
    return absl::OkStatus();
  }

  std::vector<uint32_t> Absent() const {
    std::vector<uint32_t> absent;
    for (uint32_t rank = 0; rank < members_.size(); ++rank) {
      if (!members_[rank].ready) absent.push_back(rank);
    }
    return absent;
  }

  absl::Status NotAllCame() {
    report_.missing = Absent();
    std::string text = absl::StrFormat(
        "%d of %d nodes came within %s; missing: %s", ready_count_, options_.node_count,
        absl::FormatDuration(options_.join_within), RanksText(report_.missing));
    for (const Refusal& refusal : listener_.refusals()) {
      absl::StrAppendFormat(&text, "; turned away: somebody at %s, %d times: %s", refusal.address,
                            refusal.count, refusal.reason);
    }
    return absl::DeadlineExceededError(text);
  }

  // --- Asking and hearing.

  template <typename T>
  absl::Status Tell(uint32_t rank, MessageType type, const T& value) {
    const absl::Status sent =
        members_[rank].channel->Send(type, value, Deadline::After(kSendWithin));
    return sent.ok() ? sent : Lost(rank, "when it was spoken to", sent);
  }

  template <typename T>
  absl::Status Broadcast(MessageType type, const T& value) {
    for (uint32_t rank = 0; rank < members_.size(); ++rank) {
      RETURN_IF_ERROR(Tell(rank, type, value));
    }
    return absl::OkStatus();
  }

  // One message of `type` from each of `ranks`, given to `take` as it comes. A node that goes ends
  // it at once, also one that nothing is asked of. `what`: for people, in "while <what>".
  template <typename T>
  absl::Status Collect(std::vector<uint32_t> ranks, MessageType type, const std::string& what,
                       absl::Duration within,
                       const std::function<absl::Status(uint32_t, const T&)>& take) {
    const Deadline deadline = Deadline::After(within);
    Deadline say_again = Deadline::After(kSayAgainAfter);
    while (true) {
      for (uint32_t rank = 0; rank < members_.size(); ++rank) {
        const absl::StatusOr<std::optional<Message>> message = members_[rank].channel->TryReceive();
        if (!message.ok()) return Lost(rank, absl::StrCat("while ", what), message.status());
        if (!message->has_value()) continue;
        const auto asked = std::find(ranks.begin(), ranks.end(), rank);
        const absl::StatusOr<T> value = (*message)->As<T>();
        if ((*message)->type != type || asked == ranks.end() || !value.ok()) {
          return Lost(rank, absl::StrCat("while ", what),
                      absl::DataLossError("an unexpected message"));
        }
        ranks.erase(asked);
        RETURN_IF_ERROR(take(rank, *value));
      }
      if (ranks.empty()) return absl::OkStatus();
      if (deadline.passed()) {
        report_.missing = ranks;
        return absl::DeadlineExceededError(absl::StrFormat("no answer from %s within %s while %s",
                                                           RanksText(ranks),
                                                           absl::FormatDuration(within), what));
      }
      if (say_again.passed()) {
        Say(absl::StrFormat("%s: waiting for %s", what, RanksText(ranks)));
        say_again = Deadline::After(kSayAgainAfter);
      }
      std::vector<pollfd> entries;
      for (const Member& member : members_) entries.push_back({member.channel->fd(), POLLIN, 0});
      RETURN_IF_ERROR(Poll(entries, deadline.Earlier(say_again)));
    }
  }

  static absl::Status Poll(std::vector<pollfd>& entries, Deadline deadline) {
    if (poll(entries.data(), entries.size(), deadline.PollMilliseconds()) >= 0 || errno == EINTR) {
      return absl::OkStatus();
    }
    return absl::UnavailableError(absl::StrFormat("poll: errno %d", errno));
  }

  absl::Status Lost(uint32_t rank, const std::string& when, const absl::Status& why) {
    report_.missing = {rank};
    return absl::UnavailableError(
        absl::StrFormat("%s is lost %s: %s", RanksText({rank}), when, why.message()));
  }

  // --- Measuring.

  // The trip that took least time says most: the node read its clocks within it.
  absl::Status CompareClocks() {
    for (uint32_t rank = 0; rank < members_.size(); ++rank) {
      NodeMeasurements& node = report_.job.nodes[rank];
      node.clock_offset_error_seconds = absl::ToDoubleSeconds(kClocksWithin);
      for (int trip = 0; trip < kClockTrips; ++trip) {
        const ClockReading before = ReadClocks();
        RETURN_IF_ERROR(Tell(rank, MessageType::kReadClocks, uint32_t{0}));
        ASSIGN_OR_RETURN(const ClocksMessage clocks, HearClocks(rank));
        const ClockReading after = ReadClocks();
        node.clock_step_seconds = static_cast<double>(clocks.step_ns) / 1e9;
        const double error = static_cast<double>(after.monotonic_ns - before.monotonic_ns) / 2e9;
        if (error >= node.clock_offset_error_seconds) continue;
        node.clock_offset_error_seconds = error;
        const int64_t middle_ns = before.realtime_ns / 2 + after.realtime_ns / 2;
        node.clock_offset_seconds =
            (static_cast<double>(clocks.realtime_ns) - static_cast<double>(middle_ns)) / 1e9;
      }
    }
    return absl::OkStatus();
  }

  // Of one node: looking at all for each of so many messages would take minutes in a large job.
  absl::StatusOr<ClocksMessage> HearClocks(uint32_t rank) {
    const absl::StatusOr<Message> message =
        members_[rank].channel->Receive(Deadline::After(kClocksWithin));
    if (!message.ok()) return Lost(rank, "while comparing clocks", message.status());
    const absl::StatusOr<ClocksMessage> clocks = message->As<ClocksMessage>();
    if (message->type != MessageType::kClocks || !clocks.ok()) {
      return Lost(rank, "while comparing clocks", absl::DataLossError("an unexpected message"));
    }
    return clocks;
  }

  absl::Status Alone() {
    const absl::Duration duration =
        rounds_.empty() ? options_.measure_for : kAloneShare * options_.measure_for;
    Say(absl::StrFormat("each node alone: memory, CPUs, disk (%s)",
                        absl::FormatDuration(duration)));
    RETURN_IF_ERROR(Broadcast(MessageType::kMeasureAlone,
                              MeasureAloneMessage{absl::ToDoubleSeconds(duration)}));
    std::vector<uint32_t> all;
    for (uint32_t rank = 0; rank < members_.size(); ++rank) all.push_back(rank);
    return Collect<AloneMessage>(
        std::move(all), MessageType::kAlone, "each node measures itself",
        duration + options_.alone_patience, [this](uint32_t rank, const AloneMessage& said) {
          NodeMeasurements& node = report_.job.nodes[rank];
          for (size_t metric = 0; metric < kNodeMetricCount; ++metric) {
            if ((said.measured >> metric & 1) == 0) continue;
            ASSIGN_OR_RETURN(node.values[metric], Plausible(rank, said.values[metric]));
          }
          node.disk = said.disk.ToString();
          node.disk_error = said.disk_error.ToString();
          return absl::OkStatus();
        });
  }

  absl::Status Pairs(uint32_t round) {
    const std::vector<Pair>& pairs = rounds_[round];
    const absl::Duration duration =
        (1 - kAloneShare) * options_.measure_for / static_cast<double>(rounds_.size());
    Say(absl::StrFormat("pairs, round %d of %d: %d pairs at once (%s)%s", round + 1, rounds_.size(),
                        pairs.size(), absl::FormatDuration(duration), SittingOutText(pairs)));
    std::vector<uint32_t> ranks;
    std::vector<PairMeasurements*> pair_of(members_.size(), nullptr);
    const size_t first = report_.job.pairs.size();
    for (const Pair& pair : pairs) {
      PairMeasurements& measurements = report_.job.pairs.emplace_back();
      measurements.a = pair.a;
      measurements.b = pair.b;
      measurements.round = round;
    }
    for (size_t at = 0; at < pairs.size(); ++at) {
      pair_of[pairs[at].a] = pair_of[pairs[at].b] = &report_.job.pairs[first + at];
      for (const uint32_t rank : {pairs[at].a, pairs[at].b}) {
        ranks.push_back(rank);
        RETURN_IF_ERROR(
            Tell(rank, MessageType::kMeasurePair, RequestFor(rank, pairs[at], round, duration)));
      }
    }
    return Collect<PairMessage>(
        std::move(ranks), MessageType::kPair, absl::StrFormat("round %d of pairs", round + 1),
        duration + kPairPatience + kSendWithin,
        [&](uint32_t rank, const PairMessage& said) -> absl::Status {
          PairMeasurements& pair = *pair_of[rank];
          const std::string error = said.error.ToString();
          if (!error.empty()) {
            absl::StrAppend(&pair.error, pair.error.empty() ? "" : "; ",
                            absl::StrFormat("rank %d: %s", rank, error));
            return absl::OkStatus();
          }
          // What arrives at b comes from a.
          const size_t direction = rank == pair.b ? 0 : 1;
          ASSIGN_OR_RETURN(pair.one_way[direction], Plausible(rank, said.one_way_bytes_per_second));
          ASSIGN_OR_RETURN(pair.both_ways[direction],
                           Plausible(rank, said.both_ways_bytes_per_second));
          if (rank == pair.b) {
            ASSIGN_OR_RETURN(pair.round_trip_seconds, Plausible(rank, said.round_trip_seconds));
            ASSIGN_OR_RETURN(pair.round_trip_p99_seconds,
                             Plausible(rank, said.round_trip_p99_seconds));
          }
          return absl::OkStatus();
        });
  }

  // The higher rank connects to the lower one.
  MeasurePairMessage RequestFor(uint32_t rank, const Pair& pair, uint32_t round,
                                absl::Duration duration) const {
    const uint32_t partner = rank == pair.a ? pair.b : pair.a;
    MeasurePairMessage request{.seconds = absl::ToDoubleSeconds(duration),
                               .round = round,
                               .partner_rank = partner,
                               .partner_port = members_[partner].said.pair_port,
                               .connects = rank == pair.b,
                               .partner_is_rank_0 = partner == 0};
    members_[partner].channel->connection().remote.Encode(request.partner_address);
    return request;
  }

  std::string SittingOutText(const std::vector<Pair>& pairs) const {
    if (2 * pairs.size() == members_.size()) return "";
    std::vector<bool> busy(members_.size(), false);
    for (const Pair& pair : pairs) busy[pair.a] = busy[pair.b] = true;
    std::vector<uint32_t> idle;
    for (uint32_t rank = 0; rank < busy.size(); ++rank) {
      if (!busy[rank]) idle.push_back(rank);
    }
    return absl::StrCat("; ", RanksText(idle), idle.size() == 1 ? " sits out" : " sit out");
  }

  absl::StatusOr<double> Plausible(uint32_t rank, double value) {
    if (std::isfinite(value) && value >= 0) return value;
    return Lost(rank, "after it had measured",
                absl::DataLossError(absl::StrFormat("it reported the value %g", value)));
  }

  // "rank 2 (node-c)", "ranks 1 (node-b), 3".
  std::string RanksText(const std::vector<uint32_t>& ranks) const {
    std::string text = ranks.size() == 1 ? "rank " : "ranks ";
    for (size_t at = 0; at < ranks.size(); ++at) {
      if (at == kRanksNamedMax) {
        absl::StrAppendFormat(&text, " and %d more", ranks.size() - at);
        break;
      }
      const std::string& host = report_.job.nodes[ranks[at]].host;
      absl::StrAppend(&text, at > 0 ? ", " : "", ranks[at]);
      if (!host.empty()) absl::StrAppend(&text, " (", host, ")");
    }
    return text;
  }

  void Say(const std::string& line) const {
    if (options_.progress) options_.progress(line);
  }

  const CoordinatorOptions& options_;
  Listener& listener_;
  const std::vector<std::vector<Pair>> rounds_;
  std::vector<Member> members_;
  uint32_t ready_count_ = 0;
  std::set<uint32_t> welcomed_;  // in this opening of the door
  std::string twice_;            // a rank that came twice, for people
  Report report_;
};

}  // namespace

absl::Duration WholeWithin(absl::Duration measure_for, uint32_t node_count) {
  const auto round_count = static_cast<int64_t>(RoundsOf(node_count).size());
  return measure_for + kAlonePatience + round_count * (kPairPatience + kSendWithin) +
         // Both comparisons of clocks: a node that needs all its time ends it, the others are
         // quick.
         2 * kClocksWithin + absl::Milliseconds(20) * static_cast<int64_t>(node_count);
}

Report Coordinate(const CoordinatorOptions& options, Listener& listener) {
  return Coordinator(options, listener).Run();
}

}  // namespace holdfast::preflight
