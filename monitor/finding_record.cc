#include "monitor/finding_record.h"

#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/status_macros.h"

namespace holdfast::monitor {
namespace {

using nlohmann::ordered_json;

// A line of a store cannot have more; see finding_log.h for what we write.
constexpr size_t kListMax = 4096;

constexpr std::array<std::string_view, kScopes> kScopeWords = {
    "the process of the rank, not its machine",
    "its GPU, or the kernel that runs on it",
    "its host: processors, scheduling, memory",
    "the rank is late; nothing shows whether computing, data or its host makes it so",
    "the whole node, or the way to it",
    "the sending end: the rank's NIC and what leads to it",
    "the receiving end: the rank's NIC and what leads to it",
    "the path between two ends that are both healthy elsewhere",
    "the sending end or the path; the receiving end is healthy elsewhere",
    "the path or the receiving end; the sending end is healthy elsewhere",
    "this connection: sending end, path or receiving end, and nothing tells them apart",
    "the program, not the machines",
    "this rank, or one that it waits for: it has no plugin, so nobody sees",
    "some member of the communicator; nothing tells which"};

constexpr char kWallTimeFormat[] = "%Y-%m-%dT%H:%M:%E3SZ";

template <typename E>
absl::StatusOr<E> ParseName(const JsonValue& object, std::string_view key, size_t count) {
  ASSIGN_OR_RETURN(const JsonValue value, object.Get(key));
  ASSIGN_OR_RETURN(const std::string_view text, value.String());
  for (size_t i = 0; i < count; ++i) {
    if (Name(static_cast<E>(i)) == text) return static_cast<E>(i);
  }
  return value.Mismatch(absl::StrCat("a name of one of ", count, " known values"));
}

absl::StatusOr<std::string> ParseText(const JsonValue& object, std::string_view key) {
  ASSIGN_OR_RETURN(const JsonValue value, object.Get(key));
  ASSIGN_OR_RETURN(const std::string_view text, value.String());
  return std::string(text);
}

absl::StatusOr<std::vector<std::string>> ParseTexts(const JsonValue& object, std::string_view key) {
  ASSIGN_OR_RETURN(const JsonValue list, object.Get(key));
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count > kListMax) return list.Mismatch(absl::StrCat("at most ", kListMax, " elements"));
  std::vector<std::string> texts;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view text, list[i].String());
    texts.emplace_back(text);
  }
  return texts;
}

absl::StatusOr<absl::Duration> ParseSeconds(const JsonValue& object, std::string_view key) {
  ASSIGN_OR_RETURN(const JsonValue value, object.Get(key));
  ASSIGN_OR_RETURN(const double seconds, value.Double());
  return absl::Seconds(seconds);
}

absl::StatusOr<Rank> ParseRank(const JsonValue& value) {
  ASSIGN_OR_RETURN(const uint64_t rank, value.Uint64());
  if (rank > std::numeric_limits<uint32_t>::max()) return value.Mismatch("a rank of 32 bits");
  return Rank{static_cast<uint32_t>(rank)};
}

absl::StatusOr<std::vector<Suspect>> ParseSuspects(const JsonValue& object) {
  ASSIGN_OR_RETURN(const JsonValue list, object.Get("suspects"));
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  std::vector<Suspect> suspects;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const JsonValue rank, list[i].Get("rank"));
    Suspect suspect;
    ASSIGN_OR_RETURN(suspect.rank, ParseRank(rank));
    suspect.peer = suspect.rank;
    if (const JsonValue peer = list[i].Find("peer"); peer.present()) {
      ASSIGN_OR_RETURN(suspect.peer, ParseRank(peer));
    }
    suspects.push_back(suspect);
  }
  return suspects;
}

absl::StatusOr<std::vector<FindingEvent>> ParseHistory(const JsonValue& object) {
  ASSIGN_OR_RETURN(const JsonValue list, object.Get("history"));
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count > FindingLog::kHistoryMax) {
    return list.Mismatch(absl::StrCat("at most ", FindingLog::kHistoryMax, " events"));
  }
  std::vector<FindingEvent> history;
  for (size_t i = 0; i < count; ++i) {
    FindingEvent event;
    ASSIGN_OR_RETURN(event.change, ParseName<FindingChange>(list[i], "change", kFindingChanges));
    ASSIGN_OR_RETURN(event.elapsed, ParseSeconds(list[i], "at_seconds"));
    ASSIGN_OR_RETURN(event.text, ParseText(list[i], "text"));
    ASSIGN_OR_RETURN(const JsonValue wall, list[i].Get("wall_time"));
    if (wall.type() != JsonValue::Type::kNull) {
      ASSIGN_OR_RETURN(const std::string_view text, wall.String());
      absl::Time time;
      std::string error;
      if (!absl::ParseTime(absl::RFC3339_full, std::string(text), &time, &error)) {
        return wall.Mismatch("a time as RFC 3339 has it");
      }
      event.wall_time = time;
    }
    history.push_back(std::move(event));
  }
  return history;
}

}  // namespace

std::string_view InWords(Scope scope) { return kScopeWords[static_cast<size_t>(scope)]; }

std::string OneLine(const ordered_json& json) {
  return json.dump(-1, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace);
}

ordered_json FindingRecordObject(const FindingRecord& record) {
  ordered_json json = ordered_json::parse(FindingJson(record.finding));
  json["scope_in_words"] = InWords(record.finding.scope);
  json["job"] = record.job;
  json["attempt_key"] = record.attempt_key;
  json["state"] = Name(record.state);
  json["history"] = ordered_json::array();
  for (const FindingEvent& event : record.history) {
    ordered_json one = {{"change", Name(event.change)},
                        {"at_seconds", absl::ToDoubleSeconds(event.elapsed)},
                        {"wall_time", nullptr},
                        {"text", event.text}};
    if (event.wall_time.has_value()) {
      one["wall_time"] = absl::FormatTime(kWallTimeFormat, *event.wall_time, absl::UTCTimeZone());
    }
    json["history"].push_back(std::move(one));
  }
  json["history_left_out"] = record.history_left_out;
  return json;
}

absl::StatusOr<FindingRecord> ParseFindingRecord(const JsonValue& value) {
  ASSIGN_OR_RETURN(const JsonValue version, value.Get("schema_version"));
  ASSIGN_OR_RETURN(const uint64_t number, version.Uint64());
  if (number != kFindingSchema) return version.Mismatch(absl::StrCat(kFindingSchema));
  FindingRecord record;
  Finding& finding = record.finding;
  ASSIGN_OR_RETURN(finding.id, ParseText(value, "id"));
  ASSIGN_OR_RETURN(finding.grade, ParseName<Grade>(value, "grade", 2));
  ASSIGN_OR_RETURN(finding.syndrome, ParseName<Syndrome>(value, "syndrome", kSyndromes));
  ASSIGN_OR_RETURN(finding.fault, ParseName<FaultClass>(value, "fault", kFaultClasses));
  ASSIGN_OR_RETURN(finding.scope, ParseName<Scope>(value, "scope", kScopes));
  ASSIGN_OR_RETURN(finding.suspects, ParseSuspects(value));
  ASSIGN_OR_RETURN(const JsonValue confidence, value.Get("confidence"));
  ASSIGN_OR_RETURN(finding.confidence, confidence.Double());
  ASSIGN_OR_RETURN(finding.sentence, ParseText(value, "sentence"));
  ASSIGN_OR_RETURN(finding.evidence, ParseTexts(value, "evidence"));
  ASSIGN_OR_RETURN(finding.changes_mind, ParseText(value, "changes_mind"));
  ASSIGN_OR_RETURN(finding.since, ParseSeconds(value, "since_seconds"));
  ASSIGN_OR_RETURN(record.job, ParseText(value, "job"));
  ASSIGN_OR_RETURN(record.attempt_key, ParseText(value, "attempt_key"));
  ASSIGN_OR_RETURN(record.state, ParseName<FindingState>(value, "state", kFindingStates));
  ASSIGN_OR_RETURN(record.history, ParseHistory(value));
  ASSIGN_OR_RETURN(const JsonValue left_out, value.Get("history_left_out"));
  ASSIGN_OR_RETURN(record.history_left_out, left_out.Uint64());
  return record;
}

}  // namespace holdfast::monitor
