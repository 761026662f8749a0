#include "agent/recovery/actions.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/recovery/text.h"

namespace holdfast::recovery {
namespace {

std::string RestoreText(const RestoreRule& rule) {
  const std::string step =
      rule.checkpoint.has_value()
          ? absl::StrFormat("step %s of attempt %d", CountText(Value(rule.checkpoint->step)),
                            Value(rule.checkpoint->attempt))
          : "no known checkpoint";
  switch (rule.kind) {
    case RestoreRule::Kind::kNewest:
      return absl::StrCat("from the newest (", step, ")");
    case RestoreRule::Kind::kExactly:
      return absl::StrCat("from ", step);
    case RestoreRule::Kind::kNothing:
      break;
  }
  return "from nothing";
}

std::string Text(const CollectEvidence& a) {
  return absl::StrFormat("collect evidence of incident %d: %s", a.incident, a.why);
}
std::string Text(const RequestSave& a) {
  return absl::StrFormat("save (launch %d): %s", Value(a.launch), a.why);
}
std::string Text(const StopRanks& a) {
  return absl::StrFormat("stop launch %d: %s", Value(a.launch), a.why);
}
std::string Text(const StartRanks& a) {
  return absl::StrFormat(
      "start launch %d (restart %d), %d ranks on GPUs %s%s, %s: %s", Value(a.launch),
      a.restart_count, a.placement.world_size(),
      absl::StrJoin(a.placement.gpus, ",",
                    [](std::string* out, const Gpu& gpu) { absl::StrAppend(out, gpu.index); }),
      a.placement.layout.empty() ? "" : absl::StrCat(", layout ", a.placement.layout),
      RestoreText(a.restore), a.why);
}
std::string Text(const ExitJob& a) { return absl::StrFormat("exit %d: %s", a.code, a.why); }
std::string Text(const Ask& a) { return absl::StrCat("ask ", a.id, ": ", a.question); }
std::string Text(const Notice& a) { return a.text; }
std::string Text(const RecordLemon& a) {
  return absl::StrCat(a.lemon.excluded.has_value() ? "exclude " : "mark ", Name(a.lemon.gpu, ""));
}
std::string Text(const ForgetLemon& a) { return absl::StrCat("readmit ", Name(a.gpu, "")); }

}  // namespace

std::string Describe(const Action& action) {
  return std::visit([](const auto& what) { return Text(what); }, action);
}

}  // namespace holdfast::recovery
