// What a witness other than the telemetry of collectives says about ranks: PyTorch's Flight
// Recorder, stacks, NCCL RAS, the kernel's log, NVML, the end of a process. All are equal in rank:
// how much one counts is its certainty, not where it comes from. How they enter the analysis:
// testimony_book.h.
//
// Plain values. A testimony carries no wall clock: its age and its durations were measured by
// whoever made it.
#ifndef HOLDFAST_MONITOR_TESTIMONY_H_
#define HOLDFAST_MONITOR_TESTIMONY_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/ids.h"

namespace holdfast::monitor {

enum class Source : uint8_t { kFlightRecorder, kStacks, kRas, kKernelLog, kNvml, kExit };
inline constexpr size_t kSources = 6;

// What is said of the ranks.
enum class Claim : uint8_t {
  kEntered,       // inside operation `operation`, which has not ended for them
  kNeverEntered,  // outside of operation `operation`, which others are inside of
  kCompleted,     // operation `operation` was their last, and it has ended
  kDiffers,       // called something else as their operation `operation` than the others
  kOddStack,      // stand at another place of the program than the others
  kMissing,       // do not answer their own library, or it takes them for dead
  kBehind,        // have launched fewer operations than the others, and it stays so
  kGpuFault,      // the driver reported a fault of the GPU; `code` is the Xid
  kGpuImpaired,   // the GPU is held back: errors corrected, throttled, a narrow link
  kEnded,         // the process has ended; `code` is the status or signal
  // Of the source itself, not of ranks (WitnessState):
  kHeard,    // was asked and has answered
  kUnheard,  // could not be heard
};
inline constexpr size_t kClaims = 12;

// Limits. Decode refuses what is above them; Encode CHECKs them. Makers cut before.
inline constexpr size_t kTestimoniesMax = 1024;        // of one batch
inline constexpr size_t kTestimonyRanksMax = 64;       // of one testimony
inline constexpr size_t kTestimonyTextBytesMax = 512;  // of each of its texts
// Of one encoded batch: all that the limits above can make.
inline constexpr size_t kTestimonyBytesMax = size_t{2} << 20;

struct Testimony {
  Source source{};
  Claim claim{};
  std::vector<Rank> ranks;    // whom it is about, ascending; empty: not known
  std::string node;           // on which it was observed; empty: on several
  uint64_t communicator = 0;  // NCCL's hash; 0: the source does not know it
  std::string group;          // the communicator as the source names it, for people
  uint64_t operation = 0;     // the source's own number; 0: none. Not comparable between sources
  int32_t code = 0;           // of kGpuFault, kEnded
  absl::Duration age;         // since it was observed, when it was handed over
  absl::Duration standing;    // for how long what it says has held; zero: not known
  // The longest standstill of this kind that ended by itself, as far as the source remembers.
  std::optional<absl::Duration> normal;
  double certainty = 0;  // 0 to 1: how sure the source is that what it says is so
  std::string sentence;  // in which it says so, without a full stop; names the ranks

  friend bool operator==(const Testimony&, const Testimony&) = default;
};

// Of one source on one node: whether it could be heard.
struct WitnessState {
  Source source{};
  std::string node;
  bool heard = false;
  std::string why;  // not heard: the reason, and what would help. Heard: of what
  friend bool operator==(const WitnessState&, const WitnessState&) = default;
};

std::string_view Name(Source source);
std::string_view Name(Claim claim);

// As a testimony, which is how the analysis and recordings get it: kHeard or kUnheard, no ranks,
// `why` (cut) as its sentence.
Testimony ToTestimony(const WitnessState& state);

// The bytes of a batch, which keeps the limits, for recordings and for the wire. Durations are kept
// in microseconds, certainties in thousandths.
std::string EncodeTestimonies(std::span<const Testimony> batch);
// Strict, as DecodeSummary, with the same codes.
absl::StatusOr<std::vector<Testimony>> DecodeTestimonies(std::span<const std::byte> bytes);

// `text`, at most kTestimonyTextBytesMax bytes of it, cut between UTF-8 characters.
std::string CutText(std::string text);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_TESTIMONY_H_
