// holdfast diff where at least one of the two is another framework's: every element is compared.

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "cli/foreign.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "converter/compare.h"

namespace holdfast::cli {
namespace {

using converter::Comparison;

constexpr size_t kPrintedMax = 100;

const char* KindText(Comparison::Kind kind) {
  switch (kind) {
    case Comparison::Kind::kOnlyInA:
      return "only in A";
    case Comparison::Kind::kOnlyInB:
      return "only in B";
    case Comparison::Kind::kOtherKind:
      return "another dtype or shape";
    case Comparison::Kind::kContents:
      return "contents";
  }
  return "";
}

nlohmann::ordered_json ToJson(const std::optional<TensorState>& state) {
  if (!state.has_value()) return nullptr;
  return {{"name", state->tensor},
          {"state", state->state},
          {"dtype", DtypeName(state->dtype)},
          {"shape", state->shape}};
}

const char* VerdictText(const Comparison& comparison) {
  if (comparison.different()) return "different";
  return comparison.equal() ? "equal" : "unknown";
}

void Print(const Comparison& comparison, const std::string& a, const std::string& b, bool json) {
  if (json) {
    nlohmann::ordered_json output = {{"schema_version", 1},
                                     {"a", a},
                                     {"b", b},
                                     {"verdict", VerdictText(comparison)},
                                     {"tensors_equal", comparison.equal_count},
                                     {"tensors_different", comparison.different_count},
                                     {"differences", nlohmann::ordered_json::array()},
                                     {"not_compared", comparison.not_compared}};
    for (const Comparison::Difference& each : comparison.differences) {
      nlohmann::ordered_json record = {
          {"kind", KindText(each.kind)}, {"a", ToJson(each.a)}, {"b", ToJson(each.b)}};
      if (each.kind == Comparison::Kind::kContents) {
        record["elements"] = {{"different", each.elements.count},
                              {"first", each.elements.first},
                              {"non_finite", each.elements.non_finite_count},
                              {"max_absolute", each.elements.max_absolute},
                              {"max_relative", each.elements.max_relative}};
      }
      output["differences"].push_back(std::move(record));
    }
    std::printf("%s\n", JsonText(output).c_str());
    return;
  }
  std::printf("%s: %llu tensors equal, %llu different\n", VerdictText(comparison),
              static_cast<unsigned long long>(comparison.equal_count),
              static_cast<unsigned long long>(comparison.different_count));
  for (size_t i = 0; i < comparison.differences.size() && i < kPrintedMax; ++i) {
    const Comparison::Difference& each = comparison.differences[i];
    const TensorState& state = each.a.has_value() ? *each.a : *each.b;
    std::printf("  %s: %s", KindText(each.kind), Printable(Describe(state)).c_str());
    if (each.kind == Comparison::Kind::kContents) {
      std::printf(", %llu elements, by at most %g (relative %g)",
                  static_cast<unsigned long long>(each.elements.count), each.elements.max_absolute,
                  each.elements.max_relative);
    } else if (each.kind == Comparison::Kind::kOtherKind) {
      std::printf(", %s [%s] and %s [%s]", std::string(DtypeName(each.a->dtype)).c_str(),
                  absl::StrJoin(each.a->shape, ", ").c_str(),
                  std::string(DtypeName(each.b->dtype)).c_str(),
                  absl::StrJoin(each.b->shape, ", ").c_str());
    }
    std::printf("\n");
  }
  if (comparison.different_count > kPrintedMax) {
    std::printf("  and %llu more\n",
                static_cast<unsigned long long>(comparison.different_count - kPrintedMax));
  }
  const std::vector<std::string>& unknown = comparison.not_compared;
  for (size_t i = 0; i < unknown.size() && i < kPrintedMax; ++i) {
    std::printf("  not compared: %s\n", Printable(unknown[i]).c_str());
  }
  if (unknown.size() > kPrintedMax) {
    std::printf("  and %zu more that were not compared\n", unknown.size() - kPrintedMax);
  }
}

absl::StatusOr<ExitCode> Run(Invocation& invocation, const std::string& a, const std::string& b,
                             const ForeignOptions& options) {
  ASSIGN_OR_RETURN(const converter::ForeignSource first, OpenAny(invocation, a, options));
  ASSIGN_OR_RETURN(const converter::ForeignSource second, OpenAny(invocation, b, options));
  absl::StatusOr<Comparison> comparison;
  {
    Progress progress(
        "diff", invocation.no_progress ? Progress::Display::kNever : Progress::Display::kAutomatic,
        RealClock());
    comparison = converter::Compare({*first.folder, first.index}, {*second.folder, second.index},
                                    [&progress](uint64_t done, uint64_t total) {
                                      progress.Update(done, total);
                                      return true;
                                    });
  }
  RETURN_IF_ERROR(comparison.status());
  Print(*comparison, a, b, invocation.json);
  if (comparison->different()) return kExitDiffers;
  return comparison->equal() ? kExitOk : kExitUsage;  // that is "no answer" of this verb
}

}  // namespace

ExitCode DiffForeign(Invocation& invocation, const std::string& a, const std::string& b,
                     const ForeignOptions& options) {
  ForeignOptions of_one = options;
  of_one.tag_is_of_one = true;
  const absl::StatusOr<ExitCode> code = Run(invocation, a, b, of_one);
  if (code.ok()) return *code;
  const ExitCode failure = ReportForeign(code.status());
  return failure == kExitFailure ? invocation.failure : failure;
}

}  // namespace holdfast::cli
