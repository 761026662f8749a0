// Recordings: the steps of jobs as the analysis got them (job_analysis.h), in a file, so that a
// replay gives the same findings on any machine.
//
// Bytes of a file:
//
//   file    = "HFMR" version:byte zstd-frame      version 2
//   frame   = record*                             decompressed
//   record  = length:varint crc32c:4 payload      crc32c of the payload, little-endian
//   payload = kind:varint body                    1 step, 2 loss, 3 end, 4 step with topology
//   step    = job:text elapsed_us:varint gap_us:varint
//             count:varint (attempt_key:text world_size:varint node:text summary:text)*
//             count:varint batch:text*          testimonies
//             count:varint (stage:varint tensor_position:varint)*
//             document:text                       of kind 4 only: a topology document
//   loss    = steps:varint                        that the recorder was too slow for
//   end     =                                     the recording was ended on purpose
//
// Numbers (varint) and texts (their length before them) as in byte_codec.h, the summary as in
// summary.h, a batch as in testimony.h. Version 1, which is still read, had no kind 4 (and
// summaries of version 1). What was written before a recorder was killed can be read: each step is
// flushed through the compression.
#ifndef HOLDFAST_MONITOR_RECORDING_H_
#define HOLDFAST_MONITOR_RECORDING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "base/zstd_codec.h"
#include "monitor/job_analysis.h"

namespace holdfast::monitor {

// Limits: the writer keeps them, the reader refuses what is above.
inline constexpr size_t kReportsPerStepMax = 16'384;
inline constexpr size_t kTestimoniesPerStepMax = 4;  // batches
inline constexpr size_t kRecordBytesMax = size_t{64} << 20;
inline constexpr size_t kRecordingBytesMax = size_t{1} << 30;             // of a file
inline constexpr uint64_t kRecordingContentBytesMax = uint64_t{1} << 38;  // of it, decompressed

struct RecordedStep {
  std::string job;
  JobStep step;
};
struct RecordedLoss {
  uint64_t steps = 0;
};
using Recorded = std::variant<RecordedStep, RecordedLoss>;

// A payload; also the form in which the agent hands steps to a recorder. CHECKs the limits.
std::string EncodeRecorded(Recorded recorded);

// Errors: kDataLoss (truncated), kInvalidArgument (another value than a writer of ours gives).
absl::StatusOr<Recorded> DecodeRecorded(std::span<const std::byte> payload);

// Makes the bytes of a file, piece by piece. Threads: one.
class RecordingWriter {
 public:
  // To be appended to the file, as what the others give. Without it the first of them begins.
  std::string Begin();
  // `payload`: of EncodeRecorded.
  std::string Append(std::string_view payload);
  std::string End();

 private:
  void Add(std::string_view payload, std::string& out);

  bool begun_ = false;
  ZstdCompressor compressor_;
};

// Threads: one. Lifetime: `file` outlives it.
class RecordingReader {
 public:
  // kDataLoss: not a recording; kUnimplemented: another version.
  static absl::StatusOr<std::unique_ptr<RecordingReader>> Create(std::string_view file);

  // The next one, or nothing at the end. kDataLoss, kInvalidArgument: damaged here; what came
  // before was good, what follows cannot be read.
  absl::StatusOr<std::optional<Recorded>> Next();
  // Whether the recording was ended on purpose; else the file stops after the last whole record:
  // the recorder was killed, or the file was cut off.
  bool ended() const { return ended_; }

 private:
  explicit RecordingReader(std::string_view frame) : decompressor_(frame) {}
  absl::StatusOr<bool> Fill(std::span<char> out);

  ZstdDecompressor decompressor_;
  uint64_t content_bytes_ = 0;
  bool ended_ = false;
  bool stopped_ = false;
};

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_RECORDING_H_
