#include "agent/recovery/gpus.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/recovery/text.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "checkpoint/sealed_json.h"

namespace holdfast::recovery {
namespace {

constexpr int64_t kSecondsMax = int64_t{1} << 40;  // 34,000 years

absl::Time WholeSeconds(absl::Time time) {
  return absl::FromUnixSeconds(std::clamp<int64_t>(absl::ToUnixSeconds(time), 0, kSecondsMax));
}

std::string MarkText(const LemonMark& mark) {
  return absl::StrFormat("{\"at\": %d, \"job\": %s, \"hardware\": %s, \"reason\": %s}",
                         absl::ToUnixSeconds(mark.at), JsonString(mark.job),
                         mark.hardware ? "true" : "false", JsonString(mark.reason));
}

std::string LemonText(const Lemon& lemon) {
  std::string excluded;
  if (lemon.excluded.has_value()) {
    excluded = absl::StrFormat(" \"excluded\": {\"at\": %d, \"until\": %d, \"reason\": %s},",
                               absl::ToUnixSeconds(lemon.excluded->at),
                               absl::ToUnixSeconds(lemon.excluded->until),
                               JsonString(lemon.excluded->reason));
  }
  return absl::StrFormat(
      "{\"node\": %s, \"gpu\": %d, \"uuid\": %s,%s \"marks\": [%s]}", JsonString(lemon.gpu.node),
      lemon.gpu.index, JsonString(lemon.gpu.uuid), excluded,
      absl::StrJoin(lemon.marks, ", ", [](std::string* out, const LemonMark& mark) {
        absl::StrAppend(out, MarkText(mark));
      }));
}

absl::StatusOr<std::string> TextMember(const JsonValue& object, std::string_view key,
                                       size_t bytes_max) {
  ASSIGN_OR_RETURN(const JsonValue value, object.Get(key));
  ASSIGN_OR_RETURN(const std::string_view text, value.String());
  if (text.size() > bytes_max) {
    return value.Mismatch(absl::StrFormat("at most %d bytes", bytes_max));
  }
  return std::string(text);
}

absl::StatusOr<absl::Time> TimeMember(const JsonValue& object, std::string_view key) {
  ASSIGN_OR_RETURN(const JsonValue value, object.Get(key));
  ASSIGN_OR_RETURN(const uint64_t seconds, value.Uint64());
  if (seconds > static_cast<uint64_t>(kSecondsMax)) {
    return value.Mismatch("seconds since 1970, at most 2^40");
  }
  return absl::FromUnixSeconds(static_cast<int64_t>(seconds));
}

absl::StatusOr<LemonMark> ParseMark(const JsonValue& value) {
  RETURN_IF_ERROR(value.ExpectKeys({"at", "job", "hardware", "reason"}));
  LemonMark mark;
  ASSIGN_OR_RETURN(mark.at, TimeMember(value, "at"));
  ASSIGN_OR_RETURN(mark.job, TextMember(value, "job", kLemonJobBytesMax));
  ASSIGN_OR_RETURN(mark.reason, TextMember(value, "reason", kLemonReasonBytesMax));
  ASSIGN_OR_RETURN(const JsonValue hardware, value.Get("hardware"));
  ASSIGN_OR_RETURN(mark.hardware, hardware.Bool());
  return mark;
}

absl::StatusOr<Lemon> ParseLemon(const JsonValue& value) {
  RETURN_IF_ERROR(value.ExpectKeys({"node", "gpu", "uuid", "excluded", "marks"}));
  Lemon lemon;
  ASSIGN_OR_RETURN(lemon.gpu.node, TextMember(value, "node", kGpuNodeBytesMax));
  ASSIGN_OR_RETURN(lemon.gpu.uuid, TextMember(value, "uuid", kGpuUuidBytesMax));
  ASSIGN_OR_RETURN(const JsonValue gpu, value.Get("gpu"));
  ASSIGN_OR_RETURN(const uint64_t index, gpu.Uint64());
  if (index > UINT32_MAX) return gpu.Mismatch("the number of a GPU");
  lemon.gpu.index = static_cast<uint32_t>(index);
  if (const JsonValue excluded = value.Find("excluded"); excluded.present()) {
    RETURN_IF_ERROR(excluded.ExpectKeys({"at", "until", "reason"}));
    lemon.excluded.emplace();
    ASSIGN_OR_RETURN(lemon.excluded->at, TimeMember(excluded, "at"));
    ASSIGN_OR_RETURN(lemon.excluded->until, TimeMember(excluded, "until"));
    ASSIGN_OR_RETURN(lemon.excluded->reason, TextMember(excluded, "reason", kLemonReasonBytesMax));
  }
  ASSIGN_OR_RETURN(const JsonValue marks, value.Get("marks"));
  ASSIGN_OR_RETURN(const size_t count, marks.ArraySize());
  if (count > LemonList::kMarksMax) {
    return marks.Mismatch(absl::StrFormat("at most %d marks", LemonList::kMarksMax));
  }
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(LemonMark mark, ParseMark(marks[i]));
    lemon.marks.push_back(std::move(mark));
  }
  return lemon;
}

absl::StatusOr<std::vector<Lemon>> ParseLemons(const JsonValue& root) {
  RETURN_IF_ERROR(root.ExpectKeys({"schema_version", "lemons", "crc32c"}));
  ASSIGN_OR_RETURN(const JsonValue version, root.Get("schema_version"));
  ASSIGN_OR_RETURN(const uint64_t number, version.Uint64());
  if (number != 1) return version.Mismatch("1");
  ASSIGN_OR_RETURN(const JsonValue list, root.Get("lemons"));
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count > LemonList::kLemonsMax) {
    return list.Mismatch(absl::StrFormat("at most %d GPUs", LemonList::kLemonsMax));
  }
  std::vector<Lemon> lemons;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(Lemon lemon, ParseLemon(list[i]));
    for (const Lemon& other : lemons) {
      if (IsSame(other.gpu, lemon.gpu))
        return list[i].Mismatch("a GPU that is not in the list yet");
    }
    lemons.push_back(std::move(lemon));
  }
  return lemons;
}

absl::Time LastSeen(const Lemon& lemon) {
  absl::Time last = lemon.marks.empty() ? absl::UnixEpoch() : lemon.marks.back().at;
  if (lemon.excluded.has_value()) last = std::max(last, lemon.excluded->at);
  return last;
}

}  // namespace

bool IsSame(const Gpu& a, const Gpu& b) {
  if (!a.uuid.empty() && !b.uuid.empty()) return a.uuid == b.uuid;
  return a.node == b.node && a.index == b.index;
}

std::string Name(const Gpu& gpu, std::string_view home) {
  return absl::StrCat(gpu.node == home ? "" : gpu.node + " ", "GPU ", gpu.index);
}

Lemon& LemonList::Place(const Gpu& gpu) {
  for (Lemon& lemon : lemons_) {
    if (IsSame(lemon.gpu, gpu)) return lemon;
  }
  if (lemons_.size() >= kLemonsMax) {
    lemons_.erase(
        std::min_element(lemons_.begin(), lemons_.end(),
                         [](const Lemon& a, const Lemon& b) { return LastSeen(a) < LastSeen(b); }));
  }
  Lemon& lemon = lemons_.emplace_back();
  lemon.gpu = {CutText(gpu.node, kGpuNodeBytesMax), gpu.index, CutText(gpu.uuid, kGpuUuidBytesMax)};
  return lemon;
}

void LemonList::Mark(const Gpu& gpu, LemonMark mark) {
  mark.at = WholeSeconds(mark.at);
  mark.job = CutText(mark.job, kLemonJobBytesMax);
  mark.reason = CutText(mark.reason, kLemonReasonBytesMax);
  Lemon& lemon = Place(gpu);
  if (std::find(lemon.marks.begin(), lemon.marks.end(), mark) != lemon.marks.end()) return;
  if (lemon.marks.size() >= kMarksMax) lemon.marks.erase(lemon.marks.begin());
  lemon.marks.push_back(std::move(mark));
}

void LemonList::Exclude(const Gpu& gpu, Exclusion exclusion) {
  exclusion.at = WholeSeconds(exclusion.at);
  exclusion.until = WholeSeconds(exclusion.until);
  exclusion.reason = CutText(exclusion.reason, kLemonReasonBytesMax);
  Place(gpu).excluded = std::move(exclusion);
}

bool LemonList::Readmit(const Gpu& gpu) {
  return std::erase_if(lemons_, [&](const Lemon& lemon) { return IsSame(lemon.gpu, gpu); }) > 0;
}

void LemonList::Forget(absl::Time now, absl::Duration memory) {
  for (Lemon& lemon : lemons_) {
    std::erase_if(lemon.marks, [&](const LemonMark& mark) { return mark.at < now - memory; });
    if (lemon.excluded.has_value() && lemon.excluded->until <= now) lemon.excluded.reset();
  }
  std::erase_if(lemons_, [](const Lemon& lemon) {
    return lemon.marks.empty() && !lemon.excluded.has_value();
  });
}

const Lemon* LemonList::Find(const Gpu& gpu) const {
  for (const Lemon& lemon : lemons_) {
    if (IsSame(lemon.gpu, gpu)) return &lemon;
  }
  return nullptr;
}

const Exclusion* LemonList::ExclusionOf(const Gpu& gpu, absl::Time now) const {
  const Lemon* const lemon = Find(gpu);
  if (lemon == nullptr || !lemon->excluded.has_value()) return nullptr;
  return lemon->excluded->until > now ? &*lemon->excluded : nullptr;
}

size_t LemonList::MarksSince(const Gpu& gpu, absl::Time since) const {
  const Lemon* const lemon = Find(gpu);
  if (lemon == nullptr) return 0;
  return static_cast<size_t>(
      std::count_if(lemon->marks.begin(), lemon->marks.end(),
                    [&](const LemonMark& mark) { return mark.at >= since; }));
}

std::string LemonList::Encode() const {
  std::string list = "\"lemons\": [";
  for (size_t i = 0; i < lemons_.size(); ++i) {
    absl::StrAppend(&list, i == 0 ? "\n" : ",\n", LemonText(lemons_[i]));
  }
  absl::StrAppend(&list, lemons_.empty() ? "]" : "\n]");
  return SealJson({"\"schema_version\": 1", list});
}

absl::StatusOr<LemonList> LemonList::Decode(std::string_view bytes, const std::string& where) {
  if (bytes.size() > kFileBytesMax) {
    return absl::DataLossError(absl::StrFormat("%s: expected at most %d bytes, found %d", where,
                                               kFileBytesMax, bytes.size()));
  }
  ASSIGN_OR_RETURN(const auto document, UnsealJson(bytes, where));
  absl::StatusOr<std::vector<Lemon>> lemons = ParseLemons(document->root());
  if (!lemons.ok()) {
    return absl::DataLossError(absl::StrCat(where, ": ", std::string(lemons.status().message())));
  }
  LemonList list;
  list.lemons_ = *std::move(lemons);
  return list;
}

}  // namespace holdfast::recovery
