// A finding with its history as JSON: the form of the agent's store, of `holdfast monitor
// verdicts --json`, of subscribers and of `on_verdict`. docs/MONITOR.md lists the members; a change
// of their meaning is a new schema_version.
#ifndef HOLDFAST_MONITOR_FINDING_RECORD_H_
#define HOLDFAST_MONITOR_FINDING_RECORD_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/json_reader.h"
#include "monitor/finding_log.h"

namespace holdfast::monitor {

inline constexpr int kFindingSchema = 1;

// FindingJson's members, and: job, attempt_key, state, scope_in_words, history with
// {change, at_seconds, wall_time, text}, history_left_out.
nlohmann::ordered_json FindingRecordObject(const FindingRecord& record);
// In one line. Bytes that are not UTF-8 become U+FFFD.
std::string OneLine(const nlohmann::ordered_json& json);

// What FindingRecordObject wrote. Members that it does not know are ignored: a later release may
// have more. Errors: kInvalidArgument, with the path, what was expected and found.
absl::StatusOr<FindingRecord> ParseFindingRecord(const JsonValue& value);

// "the process of the rank, not its machine": how far the path lets us see.
std::string_view InWords(Scope scope);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_FINDING_RECORD_H_
