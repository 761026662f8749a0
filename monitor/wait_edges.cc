#include "monitor/wait_edges.h"

#include <algorithm>
#include <set>

namespace holdfast::monitor {
namespace {

constexpr uint32_t kNobody = UINT32_MAX;

const ConnectionReport* OtherEnd(const CommunicatorTrack& track, const ConnectionReport& mine,
                                 uint32_t my_index) {
  const Direction other =
      mine.direction == Direction::kSend ? Direction::kReceive : Direction::kSend;
  for (const ConnectionReport& c : track.now.connections) {
    const bool merged = c.channels > 1 || mine.channels > 1;
    if (c.peer == my_index && c.direction == other && (merged || c.channel == mine.channel)) {
      return &c;
    }
  }
  return nullptr;
}

class Drawing {
 public:
  explicit Drawing(const JobState& state) : state_(state) {
    picture_.rank_count = static_cast<uint32_t>(state.ranks().size());
    next_node_ = picture_.rank_count;
  }

  WaitPicture Finish() {
    for (uint32_t r = 0; r < picture_.rank_count; ++r) DrawRank(Rank{r});
    picture_.node_count = next_node_;
    return std::move(picture_);
  }

 private:
  bool IsMute(Rank rank) const {
    const RankTrack& track = state_.ranks()[Value(rank)];
    return track.CannotRun() || state_.IsSilent(rank) || IsStarved(state_, rank);
  }

  void DrawRank(Rank rank) {
    const RankTrack& track = state_.ranks()[Value(rank)];
    if (track.IsBlind() || IsMute(rank)) return;
    for (const CommunicatorTrack& c : track.communicators) {
      if (!c.IsOpen() || state_.StillFor(rank, c.now.id) < state_.thresholds().hang_suspicion) {
        continue;
      }
      // By channel: they move by themselves.
      std::map<uint16_t, bool> waits_for_peer;
      for (const ConnectionReport& connection : c.now.connections) {
        if (connection.state == WaitState::kNone) continue;
        const size_t before = picture_.edges.size();
        DrawConnection(rank, c, connection);
        waits_for_peer[connection.channel] |= picture_.edges.size() > before;
      }
      const size_t before = picture_.edges.size();
      const bool connected = !waits_for_peer.empty();
      if (!connected) DrawCounters(rank, c);
      const bool only_local = std::any_of(waits_for_peer.begin(), waits_for_peer.end(),
                                          [](const auto& channel) { return !channel.second; });
      if (only_local || (!connected && picture_.edges.size() == before)) {
        DrawInside(rank, c, connected);
      }
    }
  }

  void DrawConnection(Rank rank, const CommunicatorTrack& c, const ConnectionReport& mine) {
    const bool data = mine.state == WaitState::kReceiveWait;
    const bool credit = mine.state == WaitState::kSendPeerWait;
    const bool wire = mine.state == WaitState::kSendWait;
    if (!data && !credit && !wire) return;
    const int64_t member = Member(c.now.id, mine.peer);
    if (member < 0) {
      Add(Value(rank), UnknownMember(c.now.id, mine.peer), c, WaitReason::kBlind, Still(rank, c));
      return;
    }
    const Rank peer{static_cast<uint32_t>(member)};
    if (peer == rank) return;
    const RankTrack& other = state_.ranks()[Value(peer)];
    if (IsMute(peer)) return AddRank(rank, peer, c, WaitReason::kNoData, Still(rank, c));
    if (wire) return AddLink(rank, peer, rank, peer, c);
    if (other.IsBlind()) return AddRank(rank, peer, c, WaitReason::kBlind, Still(rank, c));
    const CommunicatorTrack* theirs = other.Find(c.now.id);
    const ConnectionReport* end =
        theirs == nullptr ? nullptr : OtherEnd(*theirs, mine, c.now.index);
    const absl::Duration both = Both(rank, c, peer);
    if (end == nullptr || end->operation < mine.operation) {
      return AddRank(rank, peer, c, WaitReason::kNotEntered, both);
    }
    const bool same = end->operation == mine.operation;
    if (data) {
      const bool local = end->state == WaitState::kSendGpuWait ||
                         end->state == WaitState::kQueued || end->state == WaitState::kBetweenSteps;
      if (same && end->steps_done <= mine.steps_done && local) {
        return AddRank(rank, peer, c, WaitReason::kNoData, both);
      }
      return AddLink(peer, rank, rank, peer, c);
    }
    const bool local = end->state == WaitState::kReceiveGpuWait ||
                       end->state == WaitState::kReceiveFlushWait ||
                       end->state == WaitState::kQueued || end->state == WaitState::kBetweenSteps;
    if (same && local) return AddRank(rank, peer, c, WaitReason::kNoCredit, both);
    AddLink(rank, peer, rank, peer, c);
  }

  // Nothing of the operation is visible but that it was enqueued: who did not?
  void DrawCounters(Rank rank, const CommunicatorTrack& c) {
    const OperationCounts mine = Collectives(c.now);
    if (mine.enqueued == mine.finished) return;
    const uint64_t number = mine.finished + 1;
    const auto [at, first] = operation_nodes_.try_emplace({c.now.id, number}, next_node_);
    if (first) {
      const uint32_t node = next_node_++;
      picture_.operations[node] = c.now.id;
      const size_t before = picture_.edges.size();
      for (uint32_t index = 0; index < c.now.size; ++index) {
        if (index != c.now.index) DrawMember(node, rank, c, index, number);
      }
      if (picture_.edges.size() == before) at->second = kNobody;  // all have entered
    }
    if (at->second != kNobody) {
      Add(Value(rank), at->second, c, WaitReason::kOperation, Still(rank, c));
    }
  }

  // An edge from `node` to the member, if that has not begun collective `number`, or cannot go on.
  void DrawMember(uint32_t node, Rank rank, const CommunicatorTrack& c, uint32_t index,
                  uint64_t number) {
    const int64_t member = Member(c.now.id, index);
    if (member < 0) {
      Add(node, UnknownMember(c.now.id, index), c, WaitReason::kBlind, Still(rank, c));
      return;
    }
    const Rank peer{static_cast<uint32_t>(member)};
    const RankTrack& other = state_.ranks()[Value(peer)];
    const CommunicatorTrack* theirs = other.Find(c.now.id);
    if (IsMute(peer)) {
      Add(node, Value(peer), c, WaitReason::kNoData, Still(rank, c));
    } else if (other.IsBlind()) {
      Add(node, Value(peer), c, WaitReason::kBlind, Still(rank, c));
    } else if (theirs == nullptr || Collectives(theirs->now).enqueued < number) {
      Add(node, Value(peer), c, WaitReason::kNotEntered, Both(rank, c, peer));
    }
  }

  // It waits for its GPU, or shows nothing at all: perhaps for the members that share its node.
  void DrawInside(Rank rank, const CommunicatorTrack& c, bool connected) {
    const uint32_t machine = state_.shape().ranks[Value(rank)].node;
    const auto [at, first] = inside_nodes_.try_emplace({c.now.id, machine}, next_node_);
    if (first) {
      const uint32_t node = next_node_++;
      picture_.insides[node] = c.now.id;
      for (const int64_t member : state_.communicators().at(c.now.id).members) {
        if (member < 0 || state_.shape().ranks[static_cast<size_t>(member)].node != machine)
          continue;
        inside_members_[node].push_back(Rank{static_cast<uint32_t>(member)});
      }
    }
    const std::vector<Rank>& members = inside_members_[at->second];
    if (members.size() < 2 || ShowsInside(machine, c)) {
      if (!connected) DrawUnexplained(rank, c);
      return;
    }
    Add(Value(rank), at->second, c, WaitReason::kOperation, Still(rank, c));
    if (inside_drawn_.insert(at->second).second) {
      const OperationCounts mine = Collectives(c.now);
      for (const Rank peer : members) {
        const RankTrack& other = state_.ranks()[Value(peer)];
        const CommunicatorTrack* theirs = other.Find(c.now.id);
        const bool behind =
            theirs == nullptr || Collectives(theirs->now).enqueued < mine.finished + 1;
        const WaitReason reason = IsMute(peer)      ? WaitReason::kNoData
                                  : other.IsBlind() ? WaitReason::kBlind
                                  : behind          ? WaitReason::kNotEntered
                                                    : WaitReason::kOperation;
        Add(at->second, Value(peer), c, reason,
            peer == rank || reason == WaitReason::kNoData ? Still(rank, c) : Both(rank, c, peer));
      }
    }
  }

  // Whether what passes between it and the members on its node goes through connections that we
  // see.
  bool ShowsInside(uint32_t machine, const CommunicatorTrack& c) const {
    return std::any_of(c.now.connections.begin(), c.now.connections.end(), [&](const auto& seen) {
      const int64_t member = Member(c.now.id, seen.peer);
      return member >= 0 && state_.shape().ranks[static_cast<size_t>(member)].node == machine;
    });
  }

  // All have entered, and nothing of it is visible to anybody.
  void DrawUnexplained(Rank rank, const CommunicatorTrack& c) {
    const auto [at, first] = unexplained_nodes_.try_emplace(c.now.id, next_node_);
    if (first) picture_.operations[next_node_++] = c.now.id;
    Add(Value(rank), at->second, c, WaitReason::kOperation, Still(rank, c));
  }

  absl::Duration Still(Rank rank, const CommunicatorTrack& c) const {
    return state_.StillFor(rank, c.now.id);
  }
  // There is no common clock: what the awaited one did before its report that came with the
  // waiter's first does not count, and one report of it is not enough. Of two that are a threshold
  // apart the second was taken behind the waiter's first, so that the waiter was not the one ahead.
  absl::Duration Both(Rank waiter, const CommunicatorTrack& c, Rank awaited) const {
    absl::Duration later = state_.StillSince(awaited, c.now.id, c.still_since_tick);
    // Receipts are kept for a while only; that much of no progress is enough to be sure of it.
    if (later >= absl::Seconds(20)) return Still(waiter, c);
    // Where it stands in another communicator for less, it may soon be seen to wait for somebody;
    // who goes on moving there is no less the one that is awaited here.
    if (later >= 2 * state_.thresholds().hang_suspicion) return std::min(Still(waiter, c), later);
    for (const CommunicatorTrack& other : state_.ranks()[Value(awaited)].communicators) {
      const absl::Duration there = Still(awaited, other);
      if (other.IsOpen() && there > absl::ZeroDuration()) later = std::min(later, there);
    }
    return std::min(Still(waiter, c), later);
  }

  int64_t Member(uint64_t communicator, uint32_t index) const {
    const CommunicatorKnowledge& knowledge = state_.communicators().at(communicator);
    if (index >= knowledge.members.size()) return -1;
    if (knowledge.members[index] >= 0) return knowledge.members[index];
    if (knowledge.size != state_.ranks().size()) return -1;
    // The communicator of all: ranks keep their order, if those that we know do.
    for (size_t i = 0; i < knowledge.members.size(); ++i) {
      if (knowledge.members[i] >= 0 && knowledge.members[i] != static_cast<int64_t>(i)) return -1;
    }
    return index;
  }

  void AddRank(Rank waiter, Rank awaited, const CommunicatorTrack& c, WaitReason reason,
               absl::Duration standing) {
    Add(Value(waiter), Value(awaited), c, reason, standing);
  }
  void AddLink(Rank from, Rank to, Rank waiter, Rank other, const CommunicatorTrack& c) {
    const auto [at, first] = link_nodes_.try_emplace({from, to}, next_node_);
    if (first) picture_.links[next_node_++] = {from, to};
    const bool told = !state_.ranks()[Value(other)].IsBlind();
    Add(Value(waiter), at->second, c, WaitReason::kWire,
        told ? Both(waiter, c, other) : Still(waiter, c));
  }
  uint32_t UnknownMember(uint64_t communicator, uint32_t index) {
    const auto [at, first] = unknown_nodes_.try_emplace({communicator, index}, next_node_);
    if (first) picture_.unknown_members[next_node_++] = {communicator, index};
    return at->second;
  }
  void Add(uint32_t waiter, uint32_t awaited, const CommunicatorTrack& c, WaitReason reason,
           absl::Duration standing) {
    picture_.edges.push_back(
        {{waiter, awaited}, c.now.id, reason, IsPointToPoint(c.now.last_kind), standing});
  }

  const JobState& state_;
  WaitPicture picture_;
  uint32_t next_node_ = 0;
  std::map<std::pair<Rank, Rank>, uint32_t> link_nodes_;
  std::map<std::pair<uint64_t, uint64_t>, uint32_t> operation_nodes_;
  std::map<uint64_t, uint32_t> unexplained_nodes_;
  std::map<std::pair<uint64_t, uint32_t>, uint32_t> inside_nodes_;  // communicator, machine
  std::map<uint32_t, std::vector<Rank>> inside_members_;            // by node
  std::set<uint32_t> inside_drawn_;
  std::map<std::pair<uint64_t, uint32_t>, uint32_t> unknown_nodes_;
};

}  // namespace

bool IsStarved(const JobState& state, Rank rank) {
  return state.ranks()[Value(rank)].run_delay_share > state.thresholds().starved_share;
}

WaitPicture DrawWaits(const JobState& state) { return Drawing(state).Finish(); }

}  // namespace holdfast::monitor
