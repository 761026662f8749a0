#include "monitor/finding.h"

#include <array>
#include <nlohmann/json.hpp>

namespace holdfast::monitor {
namespace {

constexpr std::array<std::string_view, kFaultClasses> kFaultNames = {
    "unknown",      "late-data",     "late-compute",  "pause-overdue", "link",     "sender-end",
    "receiver-end", "starved-proxy", "never-entered", "gpu-hang",      "deadlock", "mismatch",
    "never-joined", "stopped",       "node-silent",   "gpu-fault",     "dead"};
constexpr std::array<std::string_view, kScopes> kScopeNames = {"process",
                                                               "gpu",
                                                               "host",
                                                               "rank-late",
                                                               "node",
                                                               "sender-nic",
                                                               "receiver-nic",
                                                               "path",
                                                               "sender-nic-or-path",
                                                               "receiver-nic-or-path",
                                                               "connection",
                                                               "program",
                                                               "behind-blind-rank",
                                                               "communicator"};
constexpr std::array<std::string_view, kSyndromes> kSyndromeNames = {"communication-hang",
                                                                     "non-communication-hang",
                                                                     "communication-slow",
                                                                     "non-communication-slow",
                                                                     "ended",
                                                                     "start-up"};

}  // namespace

std::string_view Name(Grade grade) { return grade == Grade::kVerdict ? "verdict" : "suspicion"; }
std::string_view Name(Syndrome syndrome) { return kSyndromeNames[static_cast<size_t>(syndrome)]; }
std::string_view Name(FaultClass fault) { return kFaultNames[static_cast<size_t>(fault)]; }
std::string_view Name(Scope scope) { return kScopeNames[static_cast<size_t>(scope)]; }

std::string FindingJson(const Finding& finding) {
  nlohmann::ordered_json json;
  json["schema_version"] = 1;
  json["id"] = finding.id;
  json["grade"] = Name(finding.grade);
  json["syndrome"] = Name(finding.syndrome);
  json["fault"] = Name(finding.fault);
  json["scope"] = Name(finding.scope);
  json["suspects"] = nlohmann::ordered_json::array();
  for (const Suspect& suspect : finding.suspects) {
    nlohmann::ordered_json one = {{"rank", Value(suspect.rank)}};
    if (suspect.peer != suspect.rank) one["peer"] = Value(suspect.peer);
    json["suspects"].push_back(std::move(one));
  }
  json["confidence"] = finding.confidence;
  json["sentence"] = finding.sentence;
  json["evidence"] = finding.evidence;
  json["changes_mind"] = finding.changes_mind;
  json["since_seconds"] = absl::ToDoubleSeconds(finding.since);
  // Names of sections come from the trainer and may be any bytes.
  return json.dump(1, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace);
}

}  // namespace holdfast::monitor
