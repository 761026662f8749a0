#include "monitor/recording.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/byte_codec.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "monitor/summary.h"
#include "monitor/testimony.h"

namespace holdfast::monitor {
namespace {

constexpr std::string_view kMagic = "HFMR";
constexpr char kVersion = 2;
constexpr char kFirstVersion = 1;  // has no kStepWithTopology, and is read as this one
constexpr size_t kChecksumBytes = 4;
constexpr uint64_t kMicrosecondsMax = std::numeric_limits<int64_t>::max() / 1000;

enum class Kind : uint64_t { kStep = 1, kLoss = 2, kEnd = 3, kStepWithTopology = 4 };

template <typename Codec>
void Walk(Codec& codec, std::string_view what, absl::Duration& duration) {
  auto us = static_cast<uint64_t>(absl::ToInt64Microseconds(duration));
  codec.Number(what, us, kMicrosecondsMax);
  duration = absl::Microseconds(static_cast<int64_t>(us));
}

template <typename Codec>
void Walk(Codec& codec, RecordedStep& recorded) {
  JobStep& step = recorded.step;
  codec.Text("job", recorded.job, kJobBytesMax);
  Walk(codec, "time of the step", step.elapsed);
  Walk(codec, "gap", step.receiver_gap);
  codec.Length("reports", step.reports, kReportsPerStepMax);
  for (NodeReport& report : step.reports) {
    codec.Text("attempt key", report.attempt_key, kAttemptKeyBytesMax);
    codec.Number("world size", report.world_size, kWorldSizeMax);
    codec.Text("node", report.node, kNodeBytesMax);
    codec.Text("summary", report.summary, kSummaryBytesMax);
    report.job = recorded.job;
  }
  codec.Length("testimonies", step.testimonies, kTestimoniesPerStepMax);
  for (std::string& batch : step.testimonies) codec.Text("testimony", batch, kTestimonyBytesMax);
  codec.Length("roles", step.roles, kWorldSizeMax);
  for (RankRole& role : step.roles) {
    codec.Number("stage", role.stage);
    codec.Number("tensor position", role.tensor_position);
  }
}

template <typename Codec>
void Walk(Codec& codec, Kind& kind) {
  auto number = static_cast<uint64_t>(kind);
  codec.Number("kind of record", number, static_cast<uint64_t>(Kind::kStepWithTopology));
  kind = static_cast<Kind>(number);
}

std::string EndPayload() {
  std::string payload;
  ByteWriter writer(&payload);
  Kind kind = Kind::kEnd;
  Walk(writer, kind);
  return payload;
}

}  // namespace

std::string EncodeRecorded(Recorded recorded) {
  std::string payload;
  ByteWriter writer(&payload);
  if (auto* step = std::get_if<RecordedStep>(&recorded); step != nullptr) {
    std::string& topology = step->step.topology;
    Kind kind = topology.empty() ? Kind::kStep : Kind::kStepWithTopology;
    Walk(writer, kind);
    Walk(writer, *step);
    if (!topology.empty()) writer.Text("topology", topology, kTopologyBytesMax);
  } else {
    Kind kind = Kind::kLoss;
    Walk(writer, kind);
    writer.Number("lost steps", std::get<RecordedLoss>(recorded).steps);
  }
  CHECK(payload.size() <= kRecordBytesMax);
  return payload;
}

absl::StatusOr<Recorded> DecodeRecorded(std::span<const std::byte> payload) {
  ByteReader reader("recording", payload);
  Kind kind{};
  Walk(reader, kind);
  Recorded recorded;
  const bool is_step = kind == Kind::kStep || kind == Kind::kStepWithTopology;
  if (is_step) {
    auto& step = recorded.emplace<RecordedStep>();
    Walk(reader, step);
    if (kind == Kind::kStepWithTopology) {
      reader.Text("topology", step.step.topology, kTopologyBytesMax);
    }
  } else if (kind == Kind::kLoss) {
    reader.Number("lost steps", recorded.emplace<RecordedLoss>().steps);
  }
  RETURN_IF_ERROR(reader.Finish());
  if (!is_step && kind != Kind::kLoss) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "recording: kind of record: expected 1, 2 or 4, found %d", static_cast<uint64_t>(kind)));
  }
  return recorded;
}

std::string RecordingWriter::Begin() {
  if (std::exchange(begun_, true)) return "";
  return std::string(kMagic) + kVersion;
}

void RecordingWriter::Add(std::string_view payload, std::string& out) {
  std::string record;
  uint64_t size = payload.size();
  ByteWriter(&record).Number("length", size);
  const uint32_t crc = Crc32c(std::as_bytes(std::span(payload)));
  for (size_t i = 0; i < kChecksumBytes; ++i) record += static_cast<char>(crc >> (8 * i) & 0xFF);
  record += payload;
  compressor_.Compress(record, out);
}

std::string RecordingWriter::Append(std::string_view payload) {
  CHECK(payload.size() <= kRecordBytesMax);
  std::string out = Begin();
  Add(payload, out);
  return out;
}

std::string RecordingWriter::End() {
  std::string out = Begin();
  Add(EndPayload(), out);
  compressor_.Finish(out);
  return out;
}

absl::StatusOr<std::unique_ptr<RecordingReader>> RecordingReader::Create(std::string_view file) {
  if (!file.starts_with(kMagic) || file.size() <= kMagic.size()) {
    return absl::DataLossError("recording: expected the magic HFMR, found other bytes");
  }
  if (const char version = file[kMagic.size()]; version != kVersion && version != kFirstVersion) {
    return absl::UnimplementedError(absl::StrFormat("recording: version: expected %d, found %d",
                                                    kVersion, file[kMagic.size()]));
  }
  return std::unique_ptr<RecordingReader>(new RecordingReader(file.substr(kMagic.size() + 1)));
}

// False: the frame ends before all of `out` is there.
absl::StatusOr<bool> RecordingReader::Fill(std::span<char> out) {
  size_t count = 0;
  RETURN_IF_ERROR(decompressor_.Read(out, &count));
  content_bytes_ += count;
  if (content_bytes_ > kRecordingContentBytesMax) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "recording: expected at most %d bytes of content, found more", kRecordingContentBytesMax));
  }
  return count == out.size();
}

absl::StatusOr<std::optional<Recorded>> RecordingReader::Next() {
  if (stopped_) return std::nullopt;
  stopped_ = true;  // unless this goes well
  uint64_t size = 0;
  for (unsigned shift = 0;; shift += 7) {
    char byte = 0;
    ASSIGN_OR_RETURN(const bool there, Fill(std::span(&byte, 1)));
    if (!there) return std::nullopt;
    size |= static_cast<uint64_t>(static_cast<unsigned char>(byte) & 0x7F) << shift;
    if (size > kRecordBytesMax || shift > 28) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "recording: length of a record: expected at most %d, found more", kRecordBytesMax));
    }
    if ((static_cast<unsigned char>(byte) & 0x80) == 0) break;
  }
  std::array<char, kChecksumBytes> checksum{};
  ASSIGN_OR_RETURN(const bool has_checksum, Fill(checksum));
  if (!has_checksum) return std::nullopt;
  // In pieces: a length that lies must not make us allocate what is not there.
  std::string payload;
  constexpr size_t kPieceBytes = size_t{1} << 20;
  while (payload.size() < size) {
    const size_t before = payload.size();
    payload.resize(std::min<size_t>(size, before + kPieceBytes));
    ASSIGN_OR_RETURN(const bool whole, Fill(std::span(payload).subspan(before)));
    if (!whole) return std::nullopt;
  }
  uint32_t found = 0;
  for (size_t i = kChecksumBytes; i-- > 0;) {
    found = found << 8 | static_cast<unsigned char>(checksum[i]);
  }
  const uint32_t expected = Crc32c(std::as_bytes(std::span(payload)));
  if (expected != found) {
    return absl::DataLossError(
        absl::StrFormat("recording: CRC32C: expected %08x, found %08x", expected, found));
  }
  if (payload == EndPayload()) {
    ended_ = true;
    return std::nullopt;
  }
  ASSIGN_OR_RETURN(Recorded recorded, DecodeRecorded(std::as_bytes(std::span(payload))));
  stopped_ = false;
  return std::optional<Recorded>(std::move(recorded));
}

}  // namespace holdfast::monitor
