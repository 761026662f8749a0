// holdfast verify: reads a checkpoint back completely and names what is wrong.

#include "checkpoint/verify.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/foreign.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "cli/verb.h"

namespace holdfast::cli {
namespace {

const char* VerdictText(Verdict verdict) {
  switch (verdict) {
    case Verdict::kGood:
      return "good";
    case Verdict::kDamagedUnread:
      return "damaged only where nothing is read";
    case Verdict::kDamaged:
      return "damaged";
    case Verdict::kNotFound:
      return "not committed";
  }
  return "";
}

ExitCode VerdictExitCode(Verdict verdict) {
  switch (verdict) {
    case Verdict::kGood:
      return kExitOk;
    case Verdict::kDamagedUnread:
      return kExitRecoverable;
    case Verdict::kDamaged:
      return kExitDamaged;
    case Verdict::kNotFound:
      return kExitNotFound;
  }
  return kExitFailure;
}

void Print(const CatalogEntry& entry, const VerifyReport& report, bool json) {
  if (json) {
    nlohmann::ordered_json output = {{"schema_version", 1},
                                     {"directory", entry.directory},
                                     {"verdict", VerdictText(report.verdict)},
                                     {"bytes_read", report.bytes_read},
                                     {"blocks_checked", report.blocks_checked},
                                     {"fingerprints",
                                      {{"checked", report.fingerprints_checked},
                                       {"not_computed", report.fingerprints_not_computed}}},
                                     {"finding_count", report.finding_count},
                                     {"findings", nlohmann::ordered_json::array()}};
    for (const Finding& finding : report.findings) {
      output["findings"].push_back({{"file", finding.file},
                                    {"offset", finding.offset_bytes},
                                    {"bytes", finding.bytes},
                                    {"tensors", finding.tensors},
                                    {"text", finding.text}});
    }
    std::printf("%s\n", JsonText(output).c_str());
    return;
  }
  std::printf("%s: %s (%llu blocks, %s read; %llu fingerprints checked, %llu not computed)\n",
              Printable(entry.directory).c_str(), VerdictText(report.verdict),
              static_cast<unsigned long long>(report.blocks_checked),
              HumanBytes(report.bytes_read).c_str(),
              static_cast<unsigned long long>(report.fingerprints_checked),
              static_cast<unsigned long long>(report.fingerprints_not_computed));
  for (const Finding& finding : report.findings) {
    std::printf("  %s\n", Printable(finding.text).c_str());
  }
  if (report.finding_count > report.findings.size()) {
    std::printf("  and %llu more\n",
                static_cast<unsigned long long>(report.finding_count - report.findings.size()));
  }
}

ExitCode Run(Invocation& invocation, const std::string& path) {
  const absl::StatusOr<CatalogEntry> entry = Locate(invocation.file_system, path);
  if (!entry.ok()) return Report(entry.status());
  absl::StatusOr<VerifyReport> report;
  {
    Progress progress(
        "verify",
        invocation.no_progress ? Progress::Display::kNever : Progress::Display::kAutomatic,
        RealClock());
    report = VerifyCheckpoint(invocation.file_system, PlainReadAt(), *entry,
                              {.progress = [&progress](uint64_t done, uint64_t total) {
                                progress.Update(done, total);
                                return true;
                              }});
  }
  if (!report.ok()) return Report(report.status());
  Print(*entry, *report, invocation.json);
  return VerdictExitCode(report->verdict);
}

}  // namespace

void AddVerify(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand("verify", "Read a checkpoint back and name what is wrong");
  struct Options {
    std::string path;
    ForeignOptions foreign;
  };
  auto options = std::make_shared<Options>();
  verb->add_option(
          "checkpoint", options->path,
          "Its directory, or ROOT/JOB for the newest; or another framework's file or folder")
      ->required();
  AddForeignOptions(*verb, options->foreign);
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      if (IsOurs(options->path)) return Run(invocation, options->path);
      return VerifyForeign(invocation, options->path, options->foreign);
    };
  });
}

}  // namespace holdfast::cli
