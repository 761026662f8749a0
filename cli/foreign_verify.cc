// holdfast verify of a checkpoint of another framework.

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/foreign.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "converter/archive_check.h"
#include "converter/prove.h"

namespace holdfast::cli {
namespace {

using converter::ProofFinding;
using converter::Soundness;

const char* KindText(ProofFinding::Kind kind) {
  switch (kind) {
    case ProofFinding::Kind::kRepaired:
      return "repaired";
    case ProofFinding::Kind::kLost:
      return "lost";
    case ProofFinding::Kind::kCover:
      return "missing";
    case ProofFinding::Kind::kReplicas:
      return "copies differ";
    case ProofFinding::Kind::kNonFinite:
      return "not finite";
    case ProofFinding::Kind::kUnusual:
      return "not finite, no damage";
    case ProofFinding::Kind::kUnreadable:
      return "unreadable";
    case ProofFinding::Kind::kChecksum:
      return "checksum";
  }
  return "";
}

const char* SoundnessText(Soundness soundness) {
  switch (soundness) {
    case Soundness::kGood:
      return "good";
    case Soundness::kRepairable:
      return "repairable";
    case Soundness::kLost:
      return "damaged";
  }
  return "";
}

ExitCode SoundnessExitCode(Soundness soundness) {
  switch (soundness) {
    case Soundness::kGood:
      return kExitOk;
    case Soundness::kRepairable:
      return kExitRecoverable;
    case Soundness::kLost:
      return kExitDamaged;
  }
  return kExitFailure;
}

void Print(const std::string& path, const std::string& format, const converter::ProofReport& report,
           bool json) {
  if (json) {
    nlohmann::ordered_json output = {{"schema_version", 1},
                                     {"path", path},
                                     {"format", format},
                                     {"verdict", SoundnessText(report.soundness)},
                                     {"tensors_checked", report.states_checked},
                                     {"copies_compared", report.replicas_compared},
                                     {"bytes_read", report.bytes_read},
                                     {"finding_count", report.finding_count},
                                     {"findings", nlohmann::ordered_json::array()}};
    for (const ProofFinding& finding : report.findings) {
      output["findings"].push_back({{"kind", KindText(finding.kind)}, {"text", finding.text}});
    }
    std::printf("%s\n", JsonText(output).c_str());
    return;
  }
  std::printf("%s: %s (%s; %llu tensors, %s read, %llu copies compared)\n", Printable(path).c_str(),
              SoundnessText(report.soundness), format.c_str(),
              static_cast<unsigned long long>(report.states_checked),
              HumanBytes(report.bytes_read).c_str(),
              static_cast<unsigned long long>(report.replicas_compared));
  for (const ProofFinding& finding : report.findings) {
    std::printf("  %s: %s\n", KindText(finding.kind), Printable(finding.text).c_str());
  }
  if (report.finding_count > report.findings.size()) {
    std::printf("  and %llu more\n",
                static_cast<unsigned long long>(report.finding_count - report.findings.size()));
  }
}

}  // namespace

ExitCode VerifyForeign(Invocation& invocation, const std::string& path,
                       const ForeignOptions& options) {
  const absl::StatusOr<converter::ForeignSource> source = OpenForeign(invocation, path, options);
  if (!source.ok()) return ReportForeign(source.status());
  absl::StatusOr<converter::ProofReport> report;
  {
    Progress progress(
        "verify",
        invocation.no_progress ? Progress::Display::kNever : Progress::Display::kAutomatic,
        RealClock());
    report = converter::Prove(*source->folder, source->index,
                              {.progress = [&progress](uint64_t done, uint64_t total) {
                                progress.Update(done, total);
                                return true;
                              }});
  }
  if (!report.ok()) return ReportForeign(report.status());
  const absl::Status archives = converter::ProveArchives(*source->folder, source->index, *report);
  if (!archives.ok()) return ReportForeign(archives);
  Print(path, source->index.format, *report, invocation.json);
  return SoundnessExitCode(report->soundness);
}

}  // namespace holdfast::cli
