#include "converter/non_tensors.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace holdfast::converter {
namespace {

constexpr size_t kNamedMax = 8;

std::string Names(std::vector<std::string> names) {
  const size_t more = names.size() - std::min(names.size(), kNamedMax);
  names.resize(names.size() - more);
  return absl::StrCat(absl::StrJoin(names, ", "),
                      more > 0 ? absl::StrFormat(" and %d more", more) : "");
}

// "param_groups" of "param_groups.0.lr": a list is named once.
std::string_view ListOf(std::string_view name) {
  for (size_t dot = name.find('.'); dot != std::string_view::npos; dot = name.find('.', dot + 1)) {
    if (dot + 1 < name.size() && absl::ascii_isdigit(static_cast<unsigned char>(name[dot + 1]))) {
      return name.substr(0, dot);
    }
  }
  return name;
}

// Which framework wrote the file: nothing about the model.
bool IsMarkOfSafetensors(const Fact& fact) {
  return fact.name == "metadata" && fact.json == R"({"format": "pt"})";
}

}  // namespace

std::vector<std::string> NonTensorsWithoutPlace(const ForeignIndex& index,
                                                const std::function<bool(const Fact&)>& has_place) {
  std::vector<std::string> found;
  std::vector<std::string> names;
  for (const Fact& fact : index.scalars) {
    if (has_place(fact) || IsMarkOfSafetensors(fact)) continue;
    const std::string_view name = ListOf(fact.name);
    if (names.empty() || names.back() != name) names.emplace_back(name);
  }
  if (!names.empty()) found.push_back(Names(std::move(names)));
  names.clear();
  for (const ForeignBlob& blob : index.blobs) names.push_back(blob.name);
  if (!names.empty()) {
    found.push_back(
        absl::StrFormat("%d opaque objects (%s)", index.blobs.size(), Names(std::move(names))));
  }
  return found;
}

bool IsStep(const Fact& fact, const ForeignIndex& index) {
  constexpr std::array<std::string_view, 4> kNames = {"global_step", "global_steps", "step",
                                                      "iteration"};
  return index.has_step && fact.json == absl::StrCat(index.step) &&
         std::find(kNames.begin(), kNames.end(), fact.name) != kNames.end();
}

}  // namespace holdfast::converter
