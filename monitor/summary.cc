#include "monitor/summary.h"

#include <algorithm>
#include <limits>
#include <map>
#include <string_view>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"

namespace holdfast::monitor {
namespace {

constexpr std::string_view kMagic = "HFMS";
constexpr uint64_t kVersion = 1;
constexpr size_t kChecksumBytes = 4;

// Encoder and decoder walk the same description of the fields (Walk below), so they cannot
// disagree.
class Writer {
 public:
  explicit Writer(std::string* out) : out_(*out) {}

  template <typename T>
  void Number(std::string_view, T& value, uint64_t max = std::numeric_limits<T>::max()) {
    CHECK(static_cast<uint64_t>(value) <= max);
    Put(static_cast<uint64_t>(value));
  }
  template <typename T>
  void Enumerator(std::string_view what, T& value, size_t count) {
    uint64_t number = static_cast<uint64_t>(value);
    Number(what, number, count - 1);
  }
  void Signed(std::string_view, int32_t& value) {
    const auto wide = static_cast<int64_t>(value);
    Put((static_cast<uint64_t>(wide) << 1) ^ static_cast<uint64_t>(wide >> 63));
  }
  void Text(std::string_view what, std::string& text, size_t bytes_max) {
    uint64_t size = text.size();
    Number(what, size, bytes_max);
    out_ += text;
  }
  template <typename T>
  void Length(std::string_view what, std::vector<T>& list, size_t max) {
    uint64_t size = list.size();
    Number(what, size, max);
  }

 private:
  void Put(uint64_t value) {
    for (; value >= 0x80; value >>= 7) out_ += static_cast<char>(0x80 | (value & 0x7F));
    out_ += static_cast<char>(value);
  }
  std::string& out_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <typename T>
  void Number(std::string_view what, T& value, uint64_t max = std::numeric_limits<T>::max()) {
    const uint64_t found = Get(what);
    if (status_.ok() && found > max) {
      status_ = absl::InvalidArgumentError(
          absl::StrFormat("summary: %s: expected at most %d, found %d", what, max, found));
    }
    value = status_.ok() ? static_cast<T>(found) : T{};
  }
  template <typename T>
  void Enumerator(std::string_view what, T& value, size_t count) {
    uint64_t number = 0;
    Number(what, number, count - 1);
    value = static_cast<T>(number);
  }
  void Signed(std::string_view what, int32_t& value) {
    uint64_t found = 0;
    Number(what, found, std::numeric_limits<uint32_t>::max());
    value =
        static_cast<int32_t>(static_cast<int64_t>(found >> 1) ^ -static_cast<int64_t>(found & 1));
  }
  void Text(std::string_view what, std::string& text, size_t bytes_max) {
    uint64_t size = 0;
    Number(what, size, bytes_max);
    if (size > bytes_.size()) return Truncated(what);
    text.resize(size);
    std::transform(bytes_.begin(), bytes_.begin() + static_cast<ptrdiff_t>(size), text.begin(),
                   [](std::byte byte) { return static_cast<char>(byte); });
    bytes_ = bytes_.subspan(size);
  }
  template <typename T>
  void Length(std::string_view what, std::vector<T>& list, size_t max) {
    uint64_t size = 0;
    Number(what, size, max);
    // Every element takes a byte at least: a length that lies cannot make us allocate much.
    if (size > bytes_.size()) return Truncated(what);
    list.resize(size);
  }
  absl::Status Finish() {
    if (status_.ok() && !bytes_.empty()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("summary: expected the end of the body, found %d bytes", bytes_.size()));
    }
    return status_;
  }

 private:
  void Truncated(std::string_view what) {
    if (status_.ok()) {
      status_ = absl::DataLossError(
          absl::StrFormat("summary: %s: truncated with %d bytes left", what, bytes_.size()));
    }
  }
  uint64_t Get(std::string_view what) {
    uint64_t value = 0;
    for (unsigned shift = 0; status_.ok(); shift += 7) {
      if (bytes_.empty()) {
        Truncated(what);
        break;
      }
      const auto byte = static_cast<uint64_t>(bytes_.front());
      bytes_ = bytes_.subspan(1);
      // The tenth byte holds one bit; a last byte of 0 is not the shortest form.
      if ((shift == 63 && byte > 1) || (shift > 0 && byte == 0)) {
        status_ = absl::InvalidArgumentError(
            absl::StrFormat("summary: %s: expected the shortest form of 64 bits", what));
        break;
      }
      value |= (byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    return 0;
  }

  std::span<const std::byte> bytes_;
  absl::Status status_;
};

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
void Walk(Codec& codec, CommunicatorReport& c) {
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
}

template <typename Codec>
void Walk(Codec& codec, RankReport& r) {
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
  for (CommunicatorReport& communicator : r.communicators) Walk(codec, communicator);
}

template <typename Codec>
void Walk(Codec& codec, NodeSummary& s) {
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
  for (RankReport& rank : s.ranks) Walk(codec, rank);
}

uint32_t LoadChecksum(std::span<const std::byte> bytes) {
  uint32_t value = 0;
  for (size_t i = kChecksumBytes; i-- > 0;) value = value << 8 | static_cast<uint32_t>(bytes[i]);
  return value;
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

template <typename Change>
bool FitsAfter(NodeSummary& summary, size_t bytes_max, Change change) {
  for (RankReport& rank : summary.ranks) {
    for (CommunicatorReport& communicator : rank.communicators) change(communicator);
  }
  return EncodeSummary(summary).size() <= bytes_max;
}

}  // namespace

std::string EncodeSummary(const NodeSummary& summary) {
  std::string bytes(kMagic);
  Writer writer(&bytes);
  uint64_t version = kVersion;
  writer.Number("version", version);
  NodeSummary copy = summary;  // Walk takes what it could also fill
  Walk(writer, copy);
  const uint32_t checksum = Crc32c(std::as_bytes(std::span(bytes)));
  for (size_t i = 0; i < kChecksumBytes; ++i)
    bytes += static_cast<char>(checksum >> (8 * i) & 0xFF);
  CHECK(bytes.size() <= kSummaryBytesMax);
  return bytes;
}

absl::StatusOr<NodeSummary> DecodeSummary(std::span<const std::byte> bytes) {
  if (bytes.size() > kSummaryBytesMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "summary: expected at most %d bytes, found %d", kSummaryBytesMax, bytes.size()));
  }
  if (bytes.size() <= kMagic.size() + kChecksumBytes) {
    return absl::DataLossError(absl::StrFormat("summary: truncated: found %d bytes", bytes.size()));
  }
  const bool magic = std::equal(kMagic.begin(), kMagic.end(), bytes.begin(),
                                [](char a, std::byte b) { return static_cast<char>(b) == a; });
  if (!magic) return absl::DataLossError("summary: expected the magic HFMS, found other bytes");
  const auto body = bytes.first(bytes.size() - kChecksumBytes);
  const uint32_t expected = Crc32c(body);
  const uint32_t found = LoadChecksum(bytes.last(kChecksumBytes));
  if (expected != found) {
    return absl::DataLossError(
        absl::StrFormat("summary: CRC32C: expected %08x, found %08x", expected, found));
  }
  const auto version = static_cast<uint64_t>(body[kMagic.size()]);
  if (version != kVersion) {
    return absl::UnimplementedError(
        absl::StrFormat("summary: version: expected %d, found %d", kVersion, version));
  }
  Reader reader(body.subspan(kMagic.size() + 1));
  NodeSummary summary;
  Walk(reader, summary);
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
  if (FitsAfter(summary, bytes_max, [](CommunicatorReport&) {})) return true;
  if (FitsAfter(summary, bytes_max, MergeChannels)) return true;
  return FitsAfter(summary, bytes_max, [](CommunicatorReport& communicator) {
    std::erase_if(communicator.connections,
                  [](const ConnectionReport& c) { return c.state == WaitState::kNone; });
  });
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
