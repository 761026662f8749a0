#include "format/layout_rules.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "format/layout.h"
#include "format/name_pattern.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kToBytesMax = 64 << 10;
constexpr size_t kChangesMax = 1000;  // in one --to
constexpr size_t kRulesBytesMax = size_t{64} << 20;
constexpr size_t kRulesMax = 10'000;

// What the strict reader has accepted, for changing it. It may still have numbers that no double
// holds.
absl::StatusOr<Json> ToJson(const std::string& text, const std::string& what) {
  Json json = Json::parse(text, /*callback=*/nullptr, /*allow_exceptions=*/false);
  if (!json.is_discarded()) return json;
  return absl::InvalidArgumentError(what +
                                    ": expected numbers in the range of a double, found another");
}

// ---- Resizing ----

absl::Status RefuseTo(size_t column, const std::string& text) {
  return absl::InvalidArgumentError(absl::StrFormat("--to, column %d: %s", column, text));
}

std::vector<std::string_view> AxisNames(const Json& mesh) {
  std::vector<std::string_view> names;
  for (const Json& axis : mesh) names.push_back(axis["axis"].get_ref<const std::string&>());
  return names;
}

Json* FindAxis(Json& mesh, const std::string& name) {
  for (Json& axis : mesh) {
    if (axis["axis"] == name) return &axis;
  }
  return nullptr;
}

// The parts of a document that a change of sizes concerns. The document was parsed by
// Layout::Parse, so that everything has the type that it should.
class Resizer {
 public:
  explicit Resizer(Json& document) : document_(document) {}

  absl::Status Apply(const AxisSize& change) {
    if (change.mesh.empty() && change.axis == "zero") return SetStage(change);
    if (change.size == 0) return RefuseTo(change.column, "expected a size of at least 1");
    if (!change.mesh.empty()) return ResizeInMesh(change);
    Json* axis = FindAxis(document_["mesh"], change.axis);
    if (axis == nullptr) return UnknownAxisOfAnyMesh(change);
    Resize(*axis, "", change);
    if (!document_.contains("meshes")) return absl::OkStatus();
    for (auto& [name, mesh] : document_["meshes"].items()) {
      if (Json* same = FindAxis(mesh, change.axis); same != nullptr) Resize(*same, name, change);
    }
    return absl::OkStatus();
  }

  // Whatever names ranks or coordinates of a resized axis one by one does not say what it is now.
  absl::Status CheckPlaces() const {
    if (resized_.empty()) return absl::OkStatus();
    if (document_.contains("placements")) {
      for (const auto& [name, placement] : document_["placements"].items()) {
        RETURN_IF_ERROR(CheckPlacement(placement, absl::StrFormat("placement \"%s\"", name)));
      }
    }
    for (const Json& tensor : document_["tensors"]) {
      for (const Json& state : tensor["states"]) {
        const std::string what =
            absl::StrFormat("tensor \"%s\", state \"%s\"",
                            tensor["name"].get_ref<const std::string&>().substr(0, 200),
                            state["state"].get_ref<const std::string&>().substr(0, 200));
        if (state.contains("segments") && !state["segments"].empty()) {
          return Needs(absl::StrCat(what, " lists its segments rank by rank"));
        }
        if (state.contains("place") && !state["place"].is_string()) {
          RETURN_IF_ERROR(CheckPlacement(state["place"], what));
        }
      }
    }
    return absl::OkStatus();
  }

 private:
  static absl::Status UnknownAxis(const AxisSize& change,
                                  const std::vector<std::string_view>& names,
                                  const std::string& suggestion) {
    std::string known;
    for (std::string_view name : names) {
      absl::StrAppend(&known, known.empty() ? "" : ", ", std::string(name));
    }
    return RefuseTo(
        change.column,
        absl::StrFormat(
            "unknown axis \"%s\"%s; the checkpoint's layout has: %s. Another axis needs "
            "a layout file (--layout)",
            change.axis.substr(0, 200), suggestion, known.empty() ? "none" : known));
  }

  // Names what could have been meant: of a further mesh that has such an axis, MESH.AXIS.
  absl::Status UnknownAxisOfAnyMesh(const AxisSize& change) const {
    const std::vector<std::string_view> own = AxisNames(document_["mesh"]);
    std::vector<std::string> of_meshes;
    std::string suggestion;
    if (document_.contains("meshes")) {
      for (const auto& [mesh, axes] : document_["meshes"].items()) {
        for (const std::string_view axis : AxisNames(axes)) {
          of_meshes.push_back(absl::StrCat(mesh, ".", std::string(axis)));
          if (axis != change.axis || !suggestion.empty()) continue;
          suggestion = absl::StrCat("; did you mean \"", of_meshes.back(), "\"?");
        }
      }
    }
    if (suggestion.empty()) suggestion = DidYouMean(change.axis, own);
    std::vector<std::string_view> all = own;
    all.insert(all.end(), of_meshes.begin(), of_meshes.end());
    return UnknownAxis(change, all, suggestion);
  }

  absl::Status SetStage(const AxisSize& change) {
    if (!document_.contains("zero")) {
      return RefuseTo(change.column,
                      "the checkpoint's layout has no zero rule whose stage could be another; that "
                      "needs a layout file (--layout)");
    }
    if (change.size > 3) {
      return RefuseTo(change.column,
                      absl::StrFormat("expected a stage of 0 to 3, found %d", change.size));
    }
    document_["zero"]["stage"] = change.size;
    return absl::OkStatus();
  }

  absl::Status ResizeInMesh(const AxisSize& change) {
    std::vector<std::string_view> names;
    if (document_.contains("meshes")) {
      for (const auto& [name, mesh] : document_["meshes"].items()) names.push_back(name);
    }
    if (std::find(names.begin(), names.end(), change.mesh) == names.end()) {
      return RefuseTo(change.column,
                      absl::StrFormat("unknown mesh \"%s\"%s", change.mesh.substr(0, 200),
                                      DidYouMean(change.mesh, names)));
    }
    Json& mesh = document_["meshes"][change.mesh];
    Json* axis = FindAxis(mesh, change.axis);
    if (axis == nullptr) {
      const std::vector<std::string_view> axes = AxisNames(mesh);
      return UnknownAxis(change, axes, DidYouMean(change.axis, axes));
    }
    Resize(*axis, change.mesh, change);
    return absl::OkStatus();
  }

  void Resize(Json& axis, const std::string& mesh, const AxisSize& change) {
    if (axis["size"] == change.size) return;
    axis["size"] = change.size;
    resized_.emplace_back(mesh, change.axis);
  }

  static absl::Status Needs(const std::string& why) {
    return absl::InvalidArgumentError(
        absl::StrCat("--to: ", why,
                     ", which says nothing of other sizes; that needs a layout file "
                     "(--layout)"));
  }

  absl::Status CheckPlacement(const Json& placement, const std::string& what) const {
    const bool has_mesh = placement.is_object() && placement.contains("mesh");
    const std::string mesh = has_mesh ? placement["mesh"].get<std::string>() : "";
    const Json& ops = placement.is_object() ? placement["ops"] : placement;
    for (const Json& op : ops) {
      if (op["op"] != "place" || !op.contains("coordinates")) continue;
      const Json& axis = op["axis"].is_array() ? op["axis"][0] : op["axis"];
      const std::pair<std::string, std::string> key(mesh, axis.get<std::string>());
      if (std::find(resized_.begin(), resized_.end(), key) == resized_.end()) continue;
      for (const Json& coordinate : op["coordinates"]) {
        if (coordinate == 0 || coordinate == -1) continue;  // the first, the last
        return Needs(absl::StrFormat("%s is placed at coordinate %d of axis \"%s\"", what,
                                     coordinate.get<int64_t>(), key.second));
      }
    }
    return absl::OkStatus();
  }

  Json& document_;
  std::vector<std::pair<std::string, std::string>> resized_;  // mesh, axis
};

// ---- Rules ----

struct Rule {
  NamePattern tensors;
  std::vector<std::string> states;  // empty: all
  Json place;                       // null: none
  std::string path;                 // for errors
  bool used = false;
};

// "{layer}" becomes the number that the name has there.
absl::Status FillNumbers(Json& value, const NamePattern::Numbers& numbers,
                         const std::string& path) {
  if (value.is_structured()) {
    for (Json& each : value) RETURN_IF_ERROR(FillNumbers(each, numbers, path));
    return absl::OkStatus();
  }
  if (!value.is_string()) return absl::OkStatus();
  const std::string& text = value.get_ref<const std::string&>();
  if (text.size() < 3 || text.front() != '{' || text.back() != '}') return absl::OkStatus();
  const auto found = numbers.find(text.substr(1, text.size() - 2));
  if (found == numbers.end()) {
    std::vector<std::string_view> names;
    for (const auto& [name, number] : numbers) names.push_back(name);
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: \"%s\" is no number of the rule's pattern%s", path, text,
                        DidYouMean(text.substr(1, text.size() - 2), names)));
  }
  value = found->second;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Rule>> ParseRules(const JsonValue& list, const Json& json) {
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count > kRulesMax) return list.Mismatch(absl::StrCat("at most ", kRulesMax, " rules"));
  std::vector<Rule> rules;
  for (size_t i = 0; i < count; ++i) {
    RETURN_IF_ERROR(list[i].ExpectKeys({"tensors", "states", "place"}));
    Rule rule;
    rule.path = list[i].Path();
    ASSIGN_OR_RETURN(const JsonValue pattern, list[i].Get("tensors"));
    ASSIGN_OR_RETURN(const std::string_view pattern_text, pattern.String());
    absl::StatusOr<NamePattern> parsed = NamePattern::Parse(pattern_text);
    if (!parsed.ok()) return pattern.Mismatch(std::string(parsed.status().message()));
    rule.tensors = *std::move(parsed);
    if (const JsonValue states = list[i].Find("states"); states.present()) {
      ASSIGN_OR_RETURN(const size_t state_count, states.ArraySize());
      if (state_count == 0) return states.Mismatch("at least one state");
      for (size_t k = 0; k < state_count; ++k) {
        ASSIGN_OR_RETURN(const std::string_view state, states[k].String());
        rule.states.emplace_back(state);
      }
    }
    if (list[i].Find("place").present()) rule.place = json[i]["place"];
    rules.push_back(std::move(rule));
  }
  return rules;
}

// Of the first rule that fits, which is in `found`; null if none does.
absl::StatusOr<std::optional<Json>> PlaceOf(const TensorState& state, std::vector<Rule>& rules,
                                            const Rule*& found) {
  found = nullptr;
  for (Rule& rule : rules) {
    if (!rule.states.empty() &&
        std::find(rule.states.begin(), rule.states.end(), state.state) == rule.states.end()) {
      continue;
    }
    const std::optional<NamePattern::Numbers> numbers = rule.tensors.Match(state.tensor);
    if (!numbers.has_value()) continue;
    found = &rule;
    rule.used = true;
    if (rule.place.is_null()) return std::nullopt;
    Json place = rule.place;
    RETURN_IF_ERROR(FillNumbers(place, *numbers, rule.path));
    return place;
  }
  return std::nullopt;
}

// `text` is about the document that rules gave. A state's place stands in its rule: `rule_of`
// tensor and state.
std::string InRules(const std::string& text, const std::vector<std::vector<const Rule*>>& rule_of) {
  std::string_view rest = text;
  const auto number_behind = [&rest](std::string_view mark) -> std::optional<size_t> {
    if (!rest.starts_with(mark)) return std::nullopt;
    rest.remove_prefix(mark.size());
    size_t number = 0;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
    if (error != std::errc()) return std::nullopt;
    rest.remove_prefix(static_cast<size_t>(end - rest.data()));
    return number;
  };
  const std::optional<size_t> tensor = number_behind("tensors[");
  const std::optional<size_t> state = number_behind("].states[");
  if (!tensor.has_value() || !state.has_value() || !rest.starts_with("].place")) {
    return absl::StrCat("rules: ", text);
  }
  return absl::StrCat(rule_of.at(*tensor).at(*state)->path, std::string(rest.substr(1)));
}

}  // namespace

absl::StatusOr<std::vector<AxisSize>> ParseAxisSizes(const std::string& to) {
  if (to.size() > kToBytesMax) {
    return RefuseTo(1,
                    absl::StrFormat("expected at most %d bytes, found %d", kToBytesMax, to.size()));
  }
  std::vector<AxisSize> changes;
  size_t begin = 0;
  while (begin <= to.size()) {
    const size_t end = std::min(to.find(',', begin), to.size());
    const std::string part = to.substr(begin, end - begin);
    const size_t equals = part.find('=');
    AxisSize change;
    change.column = begin + 1;
    if (equals == std::string::npos || equals == 0) {
      return RefuseTo(change.column,
                      absl::StrFormat("expected AXIS=SIZE, found \"%s\"", part.substr(0, 200)));
    }
    change.axis = part.substr(0, equals);
    if (const size_t dot = change.axis.find('.'); dot != std::string::npos) {
      change.mesh = change.axis.substr(0, dot);
      change.axis.erase(0, dot + 1);
    }
    const std::string size = part.substr(equals + 1);
    const bool digits = !size.empty() && size.find_first_not_of("0123456789") == std::string::npos;
    if (!digits || !absl::SimpleAtoi(size, &change.size) || change.size > kWorldSizeMax) {
      return RefuseTo(begin + equals + 2,
                      absl::StrFormat("expected a number of at most %d, found \"%s\"",
                                      kWorldSizeMax, size.substr(0, 200)));
    }
    for (const AxisSize& earlier : changes) {
      if (earlier.mesh == change.mesh && earlier.axis == change.axis) {
        return RefuseTo(change.column, absl::StrFormat("\"%s\" is there twice", change.axis));
      }
    }
    changes.push_back(std::move(change));
    if (changes.size() > kChangesMax) {
      return RefuseTo(begin + 1, absl::StrFormat("expected at most %d changes", kChangesMax));
    }
    begin = end + 1;
  }
  return changes;
}

absl::StatusOr<std::string> ResizeLayout(const std::string& document, const std::string& to) {
  // Bounds what the lenient reader below is given, and proves all types.
  RETURN_IF_ERROR(Layout::Parse(document).status());
  ASSIGN_OR_RETURN(std::vector<AxisSize> changes, ParseAxisSizes(to));
  // What a further mesh is given goes before what it follows, in whatever order they are named.
  std::stable_partition(changes.begin(), changes.end(),
                        [](const AxisSize& change) { return change.mesh.empty(); });
  ASSIGN_OR_RETURN(Json json, ToJson(document, "layout"));
  Resizer resizer(json);
  for (const AxisSize& change : changes) RETURN_IF_ERROR(resizer.Apply(change));
  RETURN_IF_ERROR(resizer.CheckPlaces());
  std::string text = json.dump();
  if (const auto layout = Layout::Parse(text); !layout.ok()) {
    return absl::Status(
        layout.status().code(),
        absl::StrFormat("--to %s: %s", to.substr(0, 200), std::string(layout.status().message())));
  }
  return text;
}

absl::StatusOr<std::string> ExpandLayoutRules(const std::string& rules,
                                              const std::vector<TensorState>& states) {
  JsonLimits limits;
  limits.bytes_max = kRulesBytesMax;
  ASSIGN_OR_RETURN(const auto parsed, JsonDocument::Parse(rules, limits));
  const JsonValue root = parsed->root();
  RETURN_IF_ERROR(root.ExpectKeys(
      {"holdfast_layout_rules", "mesh", "meshes", "zero", "packs", "placements", "rules"}));
  ASSIGN_OR_RETURN(const JsonValue version, root.Get("holdfast_layout_rules"));
  ASSIGN_OR_RETURN(const uint64_t number, version.Uint64());
  if (number != 1) return version.Mismatch("version 1 of the grammar");
  ASSIGN_OR_RETURN(const JsonValue list, root.Get("rules"));
  ASSIGN_OR_RETURN(Json json, ToJson(rules, "rules"));
  ASSIGN_OR_RETURN(std::vector<Rule> all, ParseRules(list, json["rules"]));

  Json document = {{"holdfast_layout", 1}};
  for (const auto& [key, value] : json.items()) {
    if (key != "holdfast_layout_rules" && key != "rules") document[key] = value;
  }
  Json tensors = Json::array();
  std::vector<std::vector<const Rule*>> rule_of;
  for (const TensorState& state : states) {
    const Rule* rule = nullptr;
    ASSIGN_OR_RETURN(std::optional<Json> place, PlaceOf(state, all, rule));
    if (rule == nullptr) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "rules: no rule fits %s; one with \"tensors\": \"*\" would", Describe(state)));
    }
    Json entry = {{"state", state.state}, {"dtype", std::string(DtypeName(state.dtype))}};
    if (place.has_value()) entry["place"] = *std::move(place);
    if (tensors.empty() || tensors.back()["name"] != state.tensor) {
      tensors.push_back(
          {{"name", state.tensor}, {"shape", state.shape}, {"states", Json::array()}});
      rule_of.emplace_back();
    }
    rule_of.back().push_back(rule);
    if (tensors.back()["shape"] != state.shape) entry["shape"] = state.shape;
    tensors.back()["states"].push_back(std::move(entry));
  }
  for (const Rule& rule : all) {
    if (!rule.used) {
      return absl::InvalidArgumentError(
          absl::StrCat(rule.path, ": this rule fits no tensor state"));
    }
  }
  document["tensors"] = std::move(tensors);
  std::string text = document.dump();
  if (const auto layout = Layout::Parse(text); !layout.ok()) {
    return absl::Status(layout.status().code(),
                        InRules(std::string(layout.status().message()), rule_of));
  }
  return text;
}

bool IsLayoutRules(const std::string& json) {
  const auto parsed = JsonDocument::Parse(json);
  return parsed.ok() && (*parsed)->root().Find("holdfast_layout_rules").present();
}

}  // namespace holdfast
