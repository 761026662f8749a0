// holdfast diff: whether two checkpoints hold the same tensors, whatever their layouts.
//
// Exit code 1 means "differs" and nothing else, so that a script can rely on it.

#include "checkpoint/diff.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "checkpoint/verify.h"
#include "cli/foreign.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "cli/verb.h"

namespace holdfast::cli {
namespace {

constexpr size_t kTensorsPrintedMax = 20;
constexpr size_t kBlobsPrintedMax = 20;
constexpr char kDiffExitCodesHelp[] =
    "Exit codes: 0 equal, 1 differs (and nothing else), 2 usage, or no answer: some tensor has no\n"
    "fingerprint and --bytes was not given, or cannot be read; 4 damaged, 5 not found, 6 unsafe\n"
    "content refused, 75 trouble with reading (retry).";

struct Options {
  std::string a;
  std::string b;
  bool bytes = false;
  ForeignOptions foreign;
};

struct Checkpoint {
  CatalogEntry entry;
  Index index;
};

std::string_view KindText(TensorDifference::Kind kind) {
  switch (kind) {
    case TensorDifference::Kind::kOnlyInA:
      return "only in A";
    case TensorDifference::Kind::kOnlyInB:
      return "only in B";
    case TensorDifference::Kind::kOtherKind:
      return "other dtype or shape";
    case TensorDifference::Kind::kContents:
      return "differs";
    case TensorDifference::Kind::kNotComparable:
      return "no fingerprint";
  }
  return "";
}

std::string_view KindText(BlobDifference::Kind kind) {
  switch (kind) {
    case BlobDifference::Kind::kOnlyInA:
      return "only in A";
    case BlobDifference::Kind::kOnlyInB:
      return "only in B";
    case BlobDifference::Kind::kContents:
      return "differs";
    case BlobDifference::Kind::kNotCompared:
      return "not compared";
  }
  return "";
}

std::string_view VerdictText(DiffReport::Verdict verdict) {
  switch (verdict) {
    case DiffReport::Verdict::kEqual:
      return "equal";
    case DiffReport::Verdict::kDifferent:
      return "different";
    case DiffReport::Verdict::kUnknown:
      return "unknown";
  }
  return "";
}

ExitCode ExitCodeOf(const DiffReport& report) {
  if (report.damage_count > 0) return kExitDamaged;
  switch (report.verdict) {
    case DiffReport::Verdict::kEqual:
      return kExitOk;
    case DiffReport::Verdict::kDifferent:
      return kExitDiffers;
    case DiffReport::Verdict::kUnknown:
      return kExitUsage;
  }
  return kExitRetry;
}

// ---- JSON ----

// As a value or key for programs: "only_in_a".
std::string Token(std::string_view text) {
  return absl::StrReplaceAll(absl::AsciiStrToLower({text.data(), text.size()}), {{" ", "_"}});
}

nlohmann::ordered_json ToJson(const Checkpoint& checkpoint) {
  return {{"directory", checkpoint.entry.directory},
          {"job", checkpoint.index.job},
          {"step", Value(checkpoint.index.checkpoint.step)},
          {"attempt", Value(checkpoint.index.checkpoint.attempt)},
          {"world_size", checkpoint.index.world_size}};
}

nlohmann::ordered_json KindJson(const std::optional<TensorState>& state) {
  if (!state.has_value()) return nullptr;
  return {{"dtype", DtypeName(state->dtype)}, {"shape", state->shape}};
}

nlohmann::ordered_json ToJson(const TensorDifference& difference) {
  nlohmann::ordered_json json = {{"name", difference.state().tensor},
                                 {"state", difference.state().state},
                                 {"what", Token(KindText(difference.kind))},
                                 {"a", KindJson(difference.a)},
                                 {"b", KindJson(difference.b)}};
  if (difference.elements.has_value()) {
    const ElementDifferences& elements = *difference.elements;
    json["elements"] = difference.state().ElementCount();
    json["elements_different"] = elements.count;
    json["first"] = CoordinatesOf(difference.state().shape, elements.first);
    json["not_finite"] = elements.non_finite_count;
    json["max_absolute"] = elements.max_absolute;
    json["max_relative"] = elements.max_relative;
  }
  return json;
}

template <typename Kind, size_t kCount>
nlohmann::ordered_json CountsJson(const std::array<uint64_t, kCount>& counts) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  for (size_t i = 0; i < kCount; ++i) json[Token(KindText(static_cast<Kind>(i)))] = counts[i];
  return json;
}

nlohmann::ordered_json ToJson(const Options& options, const std::array<Checkpoint, 2>& checkpoints,
                              const DiffReport& report) {
  nlohmann::ordered_json json = {
      {"schema_version", 1},
      {"a", ToJson(checkpoints[0])},
      {"b", ToJson(checkpoints[1])},
      {"compared_by", options.bytes ? "bytes" : "fingerprints"},
      {"verdict", VerdictText(report.verdict)},
      {"states_compared", report.states_compared},
      {"states_equal", report.states_equal},
      {"tensor_counts", CountsJson<TensorDifference::Kind>(report.tensor_counts)},
      {"tensors", nlohmann::ordered_json::array()},
      {"blobs_equal", report.blobs_equal},
      {"blob_counts", CountsJson<BlobDifference::Kind>(report.blob_counts)},
      {"blobs", nlohmann::ordered_json::array()}};
  for (const TensorDifference& difference : report.tensors) {
    json["tensors"].push_back(ToJson(difference));
  }
  for (const BlobDifference& blob : report.blobs) {
    json["blobs"].push_back({{"name", blob.name},
                             {"scope", BlobScopeName(blob.scope)},
                             {"rank", Value(blob.rank)},
                             {"what", Token(KindText(blob.kind))},
                             {"a_bytes", blob.a_bytes},
                             {"b_bytes", blob.b_bytes}});
  }
  if (options.bytes) {
    json["bytes_read"] = report.bytes_read;
    json["fingerprints_checked"] = report.fingerprints_checked;
    json["damage_count"] = report.damage_count;
    json["damage"] = report.damage;
  }
  return json;
}

// ---- Text ----

std::string KindOf(const TensorState& state) {
  return absl::StrFormat("%s [%s]", std::string(DtypeName(state.dtype)),
                         absl::StrJoin(state.shape, ", "));
}

std::string DetailText(const TensorDifference& difference) {
  switch (difference.kind) {
    case TensorDifference::Kind::kOnlyInA:
    case TensorDifference::Kind::kOnlyInB:
      return KindOf(difference.state());
    case TensorDifference::Kind::kOtherKind:
      return absl::StrFormat("%s in A, %s in B", KindOf(*difference.a), KindOf(*difference.b));
    case TensorDifference::Kind::kNotComparable:
      return absl::StrCat("in ", difference.a_has_fingerprint   ? "B"
                                 : difference.b_has_fingerprint ? "A"
                                                                : "A and B");
    case TensorDifference::Kind::kContents:
      break;
  }
  if (!difference.elements.has_value()) return KindOf(difference.state());
  const ElementDifferences& elements = *difference.elements;
  std::string text =
      absl::StrFormat("%s, %d of %d elements, first [%s]", KindOf(difference.state()),
                      elements.count, difference.state().ElementCount(),
                      absl::StrJoin(CoordinatesOf(difference.state().shape, elements.first), ", "));
  if (elements.count > elements.non_finite_count) {
    absl::StrAppendFormat(&text, "; by at most %.6g", elements.max_absolute);
    if (elements.max_relative > 0) absl::StrAppendFormat(&text, " (%.3g)", elements.max_relative);
  }
  if (elements.non_finite_count > 0) {
    absl::StrAppendFormat(&text, "; %d NaN or infinite", elements.non_finite_count);
  }
  return text;
}

void PrintMore(uint64_t count, size_t printed) {
  if (count <= printed) return;
  std::printf("  and %llu more\n", static_cast<unsigned long long>(count - printed));
}

void PrintTensors(const Options& options, const DiffReport& report) {
  uint64_t count = 0;
  for (const uint64_t each : report.tensor_counts) count += each;
  std::printf("%s by %s: %llu of %llu tensor states are equal\n",
              std::string(VerdictText(report.verdict)).c_str(),
              options.bytes ? "bytes" : "fingerprints",
              static_cast<unsigned long long>(report.states_equal),
              static_cast<unsigned long long>(report.states_equal + count));
  const size_t printed = std::min(report.tensors.size(), kTensorsPrintedMax);
  for (size_t i = 0; i < printed; ++i) {
    const TensorDifference& difference = report.tensors[i];
    std::printf("  %s: %s %s: %s\n", std::string(KindText(difference.kind)).c_str(),
                Printable(difference.state().tensor).c_str(),
                Printable(difference.state().state).c_str(), DetailText(difference).c_str());
  }
  PrintMore(count, printed);
  if (report.tensor_counts[static_cast<size_t>(TensorDifference::Kind::kNotComparable)] > 0) {
    std::printf("  without fingerprints only --bytes can compare\n");
  }
}

void PrintBlobs(const DiffReport& report) {
  std::string counts = absl::StrFormat("%d equal", report.blobs_equal);
  uint64_t count = 0;
  for (size_t i = 0; i < kBlobDifferenceKinds; ++i) {
    count += report.blob_counts[i];
    if (report.blob_counts[i] == 0) continue;
    absl::StrAppendFormat(&counts, ", %d %s", report.blob_counts[i],
                          std::string(KindText(static_cast<BlobDifference::Kind>(i))));
  }
  std::printf("blobs: %s\n", counts.c_str());
  // Those of equal length are named by --bytes, if they differ.
  size_t printed = 0;
  for (const BlobDifference& blob : report.blobs) {
    if (blob.kind == BlobDifference::Kind::kNotCompared) continue;
    if (printed == kBlobsPrintedMax) break;
    ++printed;
    std::printf("  %s: %s, %s%s\n", std::string(KindText(blob.kind)).c_str(),
                Printable(blob.name).c_str(), std::string(BlobScopeName(blob.scope)).c_str(),
                blob.scope == BlobScope::kRank ? absl::StrCat(" ", Value(blob.rank)).c_str() : "");
  }
  PrintMore(count - report.blob_counts[static_cast<size_t>(BlobDifference::Kind::kNotCompared)],
            printed);
}

void PrintText(const Options& options, const std::array<Checkpoint, 2>& checkpoints,
               const DiffReport& report) {
  for (size_t i = 0; i < 2; ++i) {
    const Checkpoint& checkpoint = checkpoints[i];
    std::printf("%c: %s, %u ranks\n", i == 0 ? 'A' : 'B',
                Printable(checkpoint.entry.directory).c_str(), checkpoint.index.world_size);
  }
  PrintTensors(options, report);
  PrintBlobs(report);
  for (const std::string& text : report.damage) {
    std::printf("damaged: %s\n", Printable(text).c_str());
  }
  if (report.damage_count > report.damage.size()) {
    PrintMore(report.damage_count, report.damage.size());
  }
}

// ---- Running ----

absl::StatusOr<DiffReport> Compare(Invocation& invocation, const Options& options,
                                   const std::array<Checkpoint, 2>& checkpoints) {
  if (!options.bytes) return DiffFingerprints(checkpoints[0].index, checkpoints[1].index);
  Progress progress(
      "diff", invocation.no_progress ? Progress::Display::kNever : Progress::Display::kAutomatic,
      RealClock());
  DiffOptions diff_options;
  diff_options.progress = [&progress](uint64_t done, uint64_t total) {
    progress.Update(done, total);
    return true;
  };
  return DiffBytes(
      invocation.file_system, PlainReadAt(), {checkpoints[0].entry.directory, checkpoints[0].index},
      {checkpoints[1].entry.directory, checkpoints[1].index}, Caching::kDirect, diff_options);
}

absl::StatusOr<ExitCode> RunDiff(Invocation& invocation, const Options& options) {
  std::array<Checkpoint, 2> checkpoints;
  for (size_t i = 0; i < 2; ++i) {
    ASSIGN_OR_RETURN(checkpoints[i].entry,
                     Locate(invocation.file_system, i == 0 ? options.a : options.b));
    ASSIGN_OR_RETURN(checkpoints[i].index,
                     LoadCommittedIndex(invocation.file_system, checkpoints[i].entry));
  }
  ASSIGN_OR_RETURN(const DiffReport report, Compare(invocation, options, checkpoints));
  if (invocation.json) {
    std::printf("%s\n", JsonText(ToJson(options, checkpoints, report)).c_str());
  } else {
    PrintText(options, checkpoints, report);
  }
  return ExitCodeOf(report);
}

ExitCode Run(Invocation& invocation, const Options& options) {
  const absl::StatusOr<ExitCode> code = RunDiff(invocation, options);
  if (code.ok()) return *code;
  const ExitCode failure = Report(code.status());
  return failure == kExitFailure ? invocation.failure : failure;
}

}  // namespace

void AddDiff(CLI::App& app, Invocation& invocation) {
  CLI::App* verb = app.add_subcommand("diff", "Say whether two checkpoints hold the same tensors");
  auto options = std::make_shared<Options>();
  verb->add_option("A", options->a,
                   "A checkpoint's directory, or ROOT/JOB for the newest; or another framework's")
      ->required();
  verb->add_option("B", options->b, "The other one")->required();
  verb->add_flag("--bytes", options->bytes,
                 "Read both and compare every bit, not fingerprints; say by how much they differ");
  AddForeignOptions(*verb, options->foreign);
  verb->footer(kDiffExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.failure = kExitRetry;
    invocation.run = [&invocation, options] {
      if (IsOurs(options->a) && IsOurs(options->b)) return Run(invocation, *options);
      return DiffForeign(invocation, options->a, options->b, options->foreign);
    };
  });
}

}  // namespace holdfast::cli
