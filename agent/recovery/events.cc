#include "agent/recovery/events.h"

#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "monitor/testimony.h"

namespace holdfast::recovery {

uint32_t IndependentSources(const monitor::Finding& finding) {
  // Lines of other witnesses begin with their name (monitor/testimony_book.cc), and one witness may
  // have several; each other line is another view of telemetry or of the process.
  std::set<monitor::Source> witnesses;
  uint32_t sources = 0;
  for (const std::string& line : finding.evidence) {
    if (absl::StartsWith(line, "against it")) continue;
    std::optional<monitor::Source> witness;
    for (size_t i = 0; i < monitor::kSources; ++i) {
      const auto source = static_cast<monitor::Source>(i);
      if (absl::StartsWith(line, absl::StrCat(std::string(monitor::Name(source)), ": "))) {
        witness = source;
      }
    }
    if (!witness.has_value() || witnesses.insert(*witness).second) ++sources;
  }
  return sources;
}

bool IsBusy(const monitor::Finding& finding) {
  switch (finding.fault) {
    case monitor::FaultClass::kLateCompute:
    case monitor::FaultClass::kLateData:
    case monitor::FaultClass::kPauseOverdue:
      return true;
    case monitor::FaultClass::kNeverEntered:
      return finding.scope == monitor::Scope::kRankLate;
    default:
      return false;
  }
}

}  // namespace holdfast::recovery
