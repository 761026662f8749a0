#include "monitor/testimony.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "base/byte_codec.h"
#include "base/status_macros.h"

namespace holdfast::monitor {
namespace {

constexpr Envelope kEnvelope = {"testimonies", "HFMT", 1, kTestimonyBytesMax};
constexpr uint64_t kThousand = 1000;
// Of an age, of a standstill: beyond a year nothing is told apart.
constexpr uint64_t kMicrosecondsMax = uint64_t{366} * 86'400 * 1'000'000;

constexpr std::array<std::string_view, kSources> kSourceNames = {
    "flight-recorder", "stacks", "ras", "kernel-log", "nvml", "exit"};
constexpr std::array<std::string_view, kClaims> kClaimNames = {
    "entered", "never-entered", "completed",    "differs", "odd-stack", "missing",
    "behind",  "gpu-fault",     "gpu-impaired", "ended",   "heard",     "unheard"};

template <typename Codec>
void WalkDuration(Codec& codec, std::string_view what, absl::Duration& duration) {
  auto microseconds = static_cast<uint64_t>(
      std::clamp<int64_t>(absl::ToInt64Microseconds(duration), 0, kMicrosecondsMax));
  codec.Number(what, microseconds, kMicrosecondsMax);
  duration = absl::Microseconds(static_cast<int64_t>(microseconds));
}

template <typename Codec>
void Walk(Codec& codec, Testimony& t) {
  codec.Enumerator("source", t.source, kSources);
  codec.Enumerator("claim", t.claim, kClaims);
  codec.Length("ranks", t.ranks, kTestimonyRanksMax);
  for (Rank& rank : t.ranks) {
    uint32_t number = Value(rank);
    codec.Number("rank", number);
    rank = Rank{number};
  }
  codec.Text("node", t.node, kTestimonyTextBytesMax);
  codec.Number("communicator", t.communicator);
  codec.Text("group", t.group, kTestimonyTextBytesMax);
  codec.Number("operation", t.operation);
  codec.Signed("code", t.code);
  WalkDuration(codec, "age", t.age);
  WalkDuration(codec, "standing", t.standing);
  uint64_t has_normal = t.normal.has_value() ? 1 : 0;
  codec.Number("whether a normal standstill is known", has_normal, 1);
  absl::Duration normal = t.normal.value_or(absl::ZeroDuration());
  if (has_normal == 1) WalkDuration(codec, "normal standstill", normal);
  t.normal = has_normal == 1 ? std::optional(normal) : std::nullopt;
  auto certainty =
      static_cast<uint64_t>(std::lround(std::clamp(t.certainty, 0.0, 1.0) * kThousand));
  codec.Number("certainty", certainty, kThousand);
  t.certainty = static_cast<double>(certainty) / kThousand;
  codec.Text("sentence", t.sentence, kTestimonyTextBytesMax);
}

template <typename Codec>
void WalkBatch(Codec& codec, std::vector<Testimony>& batch) {
  codec.Length("testimonies", batch, kTestimoniesMax);
  for (Testimony& testimony : batch) Walk(codec, testimony);
}

}  // namespace

std::string_view Name(Source source) { return kSourceNames[static_cast<size_t>(source)]; }
std::string_view Name(Claim claim) { return kClaimNames[static_cast<size_t>(claim)]; }

Testimony ToTestimony(const WitnessState& state) {
  Testimony testimony;
  testimony.source = state.source;
  testimony.claim = state.heard ? Claim::kHeard : Claim::kUnheard;
  testimony.node = CutText(state.node);
  testimony.certainty = 1;
  testimony.sentence = CutText(state.why);
  return testimony;
}

std::string EncodeTestimonies(std::span<const Testimony> batch) {
  std::string bytes;
  OpenEnvelope(kEnvelope, bytes);
  ByteWriter writer(&bytes);
  std::vector<Testimony> copy(batch.begin(), batch.end());  // Walk takes what it could also fill
  WalkBatch(writer, copy);
  SealEnvelope(kEnvelope, bytes);
  return bytes;
}

absl::StatusOr<std::vector<Testimony>> DecodeTestimonies(std::span<const std::byte> bytes) {
  ASSIGN_OR_RETURN(const auto fields, FieldsIn(kEnvelope, bytes));
  ByteReader reader(kEnvelope.name, fields);
  std::vector<Testimony> batch;
  WalkBatch(reader, batch);
  RETURN_IF_ERROR(reader.Finish());
  return batch;
}

std::string CutText(std::string text) {
  if (text.size() <= kTestimonyTextBytesMax) return text;
  size_t end = kTestimonyTextBytesMax;
  // Back to the beginning of the character that is cut; at most three bytes continue one.
  for (int i = 0; i < 3 && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80; ++i) --end;
  text.resize(end);
  return text;
}

}  // namespace holdfast::monitor
