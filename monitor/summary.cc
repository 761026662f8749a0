#include "monitor/summary.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "base/byte_codec.h"
#include "base/status_macros.h"

namespace holdfast::monitor {
namespace {

constexpr uint8_t kVersion = 3;
constexpr uint8_t kFirstVersion = 1;       // the oldest that is read
constexpr uint8_t kOperationsVersion = 2;  // the first that tells operations and local ranks
constexpr uint8_t kHeldVersion = 3;        // the first that tells the time that our own calls take

constexpr Envelope EnvelopeOf(uint8_t version) {
  return {"summary", "HFMS", version, kSummaryBytesMax};
}
constexpr size_t kOperationsOfTightBudget = 4;  // of a communicator

// That the bytes say if it is read, else ours.
uint8_t VersionOf(std::span<const std::byte> bytes) {
  const size_t at = EnvelopeOf(kVersion).magic.size();
  if (bytes.size() <= at) return kVersion;
  const auto version = std::to_integer<uint8_t>(bytes[at]);
  return version >= kFirstVersion && version <= kVersion ? version : kVersion;
}

template <typename Codec>
void Walk(Codec& codec, ConnectionReport& c) {
  codec.Number("channel", c.channel);
  codec.Number("channels", c.channels);
  codec.Number("peer", c.peer);
  // Direction and state in one byte.
  uint64_t packed = static_cast<uint64_t>(c.state) * 2 + static_cast<uint64_t>(c.direction);
  codec.Number("wait state", packed, kWaitStates * 2 - 1);
  c.direction = static_cast<Direction>(packed % 2);
  c.state = static_cast<WaitState>(packed / 2);
  codec.Number("operation", c.operation);
  codec.Number("steps done", c.steps_done);
  codec.Number("steps total", c.steps_total);
  codec.Number("waiting", c.waiting_us);
  codec.Number("bytes", c.bytes);
  codec.Number("wire wait", c.wire_wait_us);
}

template <typename Codec>
void Walk(Codec& codec, RecentOperation& o) {
  codec.Enumerator("kind of an operation", o.kind, kOperationKinds);
  codec.Number("bytes of an operation", o.bytes);
  // 0: none.
  uint64_t root = o.root == kNoRoot ? 0 : uint64_t{o.root} + 1;
  codec.Number("root of an operation", root, kNoRoot);
  o.root = root == 0 ? kNoRoot : static_cast<uint32_t>(root - 1);
}

// `version`: of the envelope.
template <typename Codec>
void Walk(Codec& codec, CommunicatorReport& c, uint8_t version) {
  codec.Number("communicator", c.id);
  codec.Number("communicator size", c.size);
  codec.Number("index in communicator", c.index);
  uint64_t present = 0;
  for (size_t i = 0; i < kOperationKinds; ++i) {
    if (c.counts[i] != OperationCounts{}) present |= uint64_t{1} << i;
  }
  codec.Number("kinds of operations", present, (uint64_t{1} << kOperationKinds) - 1);
  for (size_t i = 0; i < kOperationKinds; ++i) {
    if ((present >> i & 1) == 0) continue;
    codec.Number("operations enqueued", c.counts[i].enqueued);
    codec.Number("operations started", c.counts[i].started);
    codec.Number("operations finished", c.counts[i].finished);
  }
  codec.Enumerator("kind of the last operation", c.last_kind, kOperationKinds);
  codec.Number("bytes of the last operation", c.last_bytes);
  codec.Number("sequence of the last operation", c.last_sequence);
  codec.Number("time since begin", c.open_us);
  codec.Length("connections", c.connections, kConnectionsMax);
  for (ConnectionReport& connection : c.connections) Walk(codec, connection);
  if (version < kOperationsVersion) return;
  codec.Length("operations", c.operations, kOperationsMax);
  for (RecentOperation& operation : c.operations) Walk(codec, operation);
}

template <typename Codec>
void Walk(Codec& codec, RankReport& r, uint8_t version) {
  uint32_t rank = Value(r.rank);
  codec.Number("rank", rank);
  r.rank = Rank{rank};
  codec.Enumerator("process state", r.process, kProcessStates);
  codec.Enumerator("exit kind", r.exit, kExitKinds);
  codec.Signed("exit value", r.exit_value);
  codec.Number("CPU time", r.cpu_us);
  codec.Number("time in operations", r.operation_us);
  codec.Number("time in data sections", r.data_us);
  codec.Number("run delay", r.run_delay_us);
  codec.Enumerator("telemetry level", r.level, kTelemetryLevels);
  codec.Number("drops", r.drops);
  codec.Length("sections", r.sections, kSectionsMax);
  for (Section& section : r.sections) {
    codec.Enumerator("section kind", section.kind, kSectionKinds);
    codec.Number("time in section", section.elapsed_us);
    codec.Text("section name", section.name, kSectionNameBytesMax);
  }
  codec.Length("communicators", r.communicators, kCommunicatorsMax);
  for (CommunicatorReport& communicator : r.communicators) Walk(codec, communicator, version);
  if (version < kOperationsVersion) return;
  // 0: not known.
  uint64_t local_rank = r.local_rank == kNoLocalRank ? 0 : uint64_t{r.local_rank} + 1;
  codec.Number("local rank", local_rank, uint64_t{kLocalRankMax} + 1);
  r.local_rank = local_rank == 0 ? kNoLocalRank : static_cast<uint32_t>(local_rank - 1);
  if (version < kHeldVersion) return;
  uint64_t held = !r.held_us.has_value() ? 0 : std::min(*r.held_us, UINT64_MAX - 1) + 1;
  codec.Number("time held up", held);
  r.held_us.reset();
  if (held != 0) r.held_us = held - 1;
}

template <typename Codec>
void Walk(Codec& codec, NodeSummary& s, uint8_t version) {
  codec.Number("node", s.node);
  uint32_t attempt = Value(s.attempt);
  codec.Number("attempt", attempt);
  s.attempt = Attempt{attempt};
  codec.Number("incarnation", s.incarnation);
  codec.Number("sequence", s.sequence);
  codec.Number("clock", s.clock_us);
  codec.Number("observer gap", s.observer_gap_us);
  uint64_t paused = s.engine_paused ? 1 : 0;
  codec.Number("engine paused", paused, 1);
  s.engine_paused = paused == 1;
  codec.Length("ranks", s.ranks, kRanksMax);
  for (RankReport& rank : s.ranks) Walk(codec, rank, version);
}

void MergeChannels(CommunicatorReport& communicator) {
  std::map<std::tuple<uint32_t, Direction>, ConnectionReport> merged;
  for (const ConnectionReport& c : communicator.connections) {
    const auto [at, first] = merged.try_emplace({c.peer, c.direction}, c);
    if (first) continue;
    ConnectionReport& kept = at->second;
    const ConnectionReport before = kept;
    const bool longer = (c.state != WaitState::kNone) &&
                        (kept.state == WaitState::kNone || c.waiting_us > kept.waiting_us);
    if (longer) kept = c;
    kept.channels = static_cast<uint16_t>(before.channels + c.channels);
    kept.bytes = before.bytes + c.bytes;
    kept.wire_wait_us = before.wire_wait_us + c.wire_wait_us;
  }
  communicator.connections.clear();
  for (auto& [key, connection] : merged) communicator.connections.push_back(connection);
}

// Also of a summary that is too large to be encoded.
size_t EncodedBytes(NodeSummary& summary) {
  ByteSizer sizer;
  Walk(sizer, summary, kVersion);
  return kEnvelopeBytes + sizer.bytes();
}

template <typename Change>
void ForEachCommunicator(NodeSummary& summary, Change change) {
  for (RankReport& rank : summary.ranks) {
    for (CommunicatorReport& communicator : rank.communicators) change(communicator);
  }
}

// Takes away the half of the connections that has waited less; false if none are left.
bool HalveConnections(NodeSummary& summary) {
  std::vector<uint64_t> waits;
  ForEachCommunicator(summary, [&](const CommunicatorReport& communicator) {
    for (const ConnectionReport& c : communicator.connections) waits.push_back(c.waiting_us);
  });
  if (waits.empty()) return false;
  const auto middle = waits.begin() + static_cast<ptrdiff_t>(waits.size() / 2);
  std::nth_element(waits.begin(), middle, waits.end());
  ForEachCommunicator(summary, [&](CommunicatorReport& communicator) {
    std::erase_if(communicator.connections,
                  [&](const ConnectionReport& c) { return c.waiting_us <= *middle; });
  });
  return true;
}

void KeepNewestOperations(NodeSummary& summary, size_t count) {
  ForEachCommunicator(summary, [&](CommunicatorReport& communicator) {
    std::vector<RecentOperation>& operations = communicator.operations;
    const size_t kept = std::min(operations.size(), count);
    operations.erase(operations.begin(), operations.end() - static_cast<ptrdiff_t>(kept));
  });
}

// Takes away the communicators in which nothing is open, then half of the others; false if none are
// left.
bool HalveCommunicators(NodeSummary& summary) {
  bool had_idle = false, had_any = false;
  for (RankReport& rank : summary.ranks) {
    had_any |= !rank.communicators.empty();
    had_idle |= std::erase_if(rank.communicators,
                              [](const CommunicatorReport& c) { return c.open_us == 0; }) > 0;
  }
  if (had_idle) return true;
  for (RankReport& rank : summary.ranks) rank.communicators.resize(rank.communicators.size() / 2);
  return had_any;
}

}  // namespace

std::string EncodeSummary(const NodeSummary& summary) {
  std::string bytes;
  OpenEnvelope(EnvelopeOf(kVersion), bytes);
  ByteWriter writer(&bytes);
  NodeSummary copy = summary;  // Walk takes what it could also fill
  Walk(writer, copy, kVersion);
  SealEnvelope(EnvelopeOf(kVersion), bytes);
  return bytes;
}

absl::StatusOr<NodeSummary> DecodeSummary(std::span<const std::byte> bytes) {
  const Envelope envelope = EnvelopeOf(VersionOf(bytes));
  ASSIGN_OR_RETURN(const auto fields, FieldsIn(envelope, bytes));
  ByteReader reader(envelope.name, fields);
  NodeSummary summary;
  Walk(reader, summary, envelope.version);
  RETURN_IF_ERROR(reader.Finish());
  for (const RankReport& rank : summary.ranks) {
    for (const CommunicatorReport& c : rank.communicators) {
      if (c.index >= c.size) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "summary: rank %d: index in communicator: expected below its size %d, found %d",
            Value(rank.rank), c.size, c.index));
      }
    }
  }
  return summary;
}

bool FitToBudget(NodeSummary& summary, size_t bytes_max) {
  const auto fits = [&] { return EncodedBytes(summary) <= bytes_max; };
  if (fits()) return true;
  ForEachCommunicator(summary, MergeChannels);
  if (fits()) return true;
  KeepNewestOperations(summary, kOperationsOfTightBudget);
  if (fits()) return true;
  ForEachCommunicator(summary, [](CommunicatorReport& communicator) {
    std::erase_if(communicator.connections,
                  [](const ConnectionReport& c) { return c.state == WaitState::kNone; });
  });
  if (fits()) return true;
  KeepNewestOperations(summary, 0);
  while (!fits()) {
    if (!HalveConnections(summary) && !HalveCommunicators(summary)) return false;
  }
  return true;
}

OperationCounts Total(const CommunicatorReport& report) {
  OperationCounts total;
  for (const OperationCounts& counts : report.counts) {
    total.enqueued += counts.enqueued;
    total.started += counts.started;
    total.finished += counts.finished;
  }
  return total;
}

OperationCounts Collectives(const CommunicatorReport& report) {
  OperationCounts total = Total(report);
  for (const OperationKind kind : {OperationKind::kSend, OperationKind::kReceive}) {
    const OperationCounts& counts = report.counts[static_cast<size_t>(kind)];
    total.enqueued -= counts.enqueued;
    total.started -= counts.started;
    total.finished -= counts.finished;
  }
  return total;
}

}  // namespace holdfast::monitor
