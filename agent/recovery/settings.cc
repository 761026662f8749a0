#include "agent/recovery/settings.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/config_values.h"
#include "base/status_macros.h"
#include "base/suggestion.h"

#define TOML_EXCEPTIONS 0
#include "toml++/toml.h"

namespace holdfast::recovery {
namespace {

constexpr SettingsKey kKeys[] = {
    {"recovery.mode", "act",
     "observe: says what it would do. ask: asks before anything is stopped or started. act: acts "
     "by "
     "the table, asks for the rest."},
    {"recovery.max_restarts", "5",
     "Restarts of one run; those after a healthy attempt do not count. Then the job ends with 1."},
    {"recovery.restarts_in_window", "3",
     "More restarts than this within restart_window wait until they are fewer."},
    {"recovery.restart_window", "30m", "See restarts_in_window."},
    {"recovery.pause_first", "5s",
     "Pause before the second restart in a row without a healthy attempt; doubled before each "
     "further one."},
    {"recovery.pause_max", "5m", "The longest such pause."},
    {"recovery.healthy_after", "15m", "An attempt that has trained for so long was healthy."},
    {"recovery.hang_timeout", "10m",
     "A hang that one source alone explains is acted on after this, where no time-out was "
     "learned; and heartbeats that stop, where none is longer."},
    {"recovery.start_wait", "1h",
     "From the start of a job that tells its steps to the first new step of every rank."},
    {"recovery.evidence_wait", "5s", "How long evidence is waited for before ranks are stopped."},
    {"recovery.save_wait", "1m", "How long a last save may take."},
    {"recovery.stop_wait", "5s", "From TERM to KILL."},
    {"recovery.kill_wait", "30s",
     "A process that KILL has not ended after this is left behind, and its GPU is not used."},
    {"recovery.approval_wait", "24h",
     "How long a person is waited for while no rank runs; then the job ends with 75."},
    {"recovery.capacity_wait", "10m",
     "How long GPUs are waited for while too few can be used; then the job ends with 75."},
    {"recovery.lemons", "exclude",
     "GPUs that an earlier job has excluded. exclude: not used. ask: a person is asked where there "
     "are too few others. ignore: used."},
    {"recovery.hangs_to_exclude", "2",
     "So many hangs of one GPU within lemon_memory exclude it; one, if the driver has reported a "
     "fault of it."},
    {"recovery.lemon_memory", "24h", "How long a hang is remembered against a GPU."},
    {"recovery.exclude_for", "168h",
     "How long an excluded GPU is not used, unless it is readmitted."},
    {"recovery.exclusions_max", "2",
     "GPUs that one run may exclude without a sign of the hardware."},
    {"recovery.checkpoint_tries", "2",
     "A checkpoint whose attempt died so often before it came to the next commit is not restored "
     "again."},
    {"recovery.no_restart_codes", "[2, 64, 93, 126, 127]",
     "Exit codes of the trainer which say that a restart cannot help: the job ends with 93."},
    {"recovery.slow", "report",
     "report: slowness is told. replace-at-checkpoint: the slow GPU is left out if that pays."},
    {"recovery.slow_horizon", "24h", "The time over which slowness must cost more than a restart."},
    {"recovery.failure_prior", "24h",
     "Time between failures that is assumed before any was seen, for every = \"auto\"."},
    {"elastic.layouts", "",
     "World sizes that the job may also run with, and their layouts: { 3 = \"dp=3\" }. None: it "
     "never shrinks."},
    {"elastic.rank_bytes_max", "",
     "The most that a rank may hold; a layout that needs more is not used."},
};

constexpr uint32_t kWorldSizeMax = 65'536;
constexpr size_t kLayoutBytesMax = 512;
constexpr size_t kCodesMax = 64;

std::string KindOf(const toml::node& node) {
  return toml::impl::node_type_friendly_names[static_cast<size_t>(node.type())].data();
}

absl::StatusOr<std::string> TextOf(const toml::node& node) {
  if (const auto text = node.value_exact<std::string>()) return *text;
  if (const auto number = node.value_exact<int64_t>()) return absl::StrCat(*number);
  return absl::InvalidArgumentError(
      absl::StrCat("expected a string or a whole number, found ", KindOf(node)));
}

absl::Status Take(const toml::node& node, absl::Duration& out) {
  ASSIGN_OR_RETURN(const std::string text, TextOf(node));
  ASSIGN_OR_RETURN(out, ParseDuration(text));
  return absl::OkStatus();
}

absl::Status Take(const toml::node& node, uint32_t& out, uint64_t min, uint64_t max) {
  ASSIGN_OR_RETURN(const std::string text, TextOf(node));
  ASSIGN_OR_RETURN(const uint64_t count, ParseCount(text, min, max));
  out = static_cast<uint32_t>(count);
  return absl::OkStatus();
}

template <typename Choice>
absl::Status Take(const toml::node& node, Choice& out,
                  std::initializer_list<std::string_view> choices) {
  ASSIGN_OR_RETURN(const std::string text, TextOf(node));
  const auto found = std::find(choices.begin(), choices.end(), text);
  if (found == choices.end()) {
    std::string list;
    for (const std::string_view choice : choices) {
      absl::StrAppend(&list, list.empty() ? "" : ", ", std::string(choice));
    }
    return absl::InvalidArgumentError(
        absl::StrCat("expected one of ", list, "; found \"", text, "\""));
  }
  out = static_cast<Choice>(found - choices.begin());
  return absl::OkStatus();
}

absl::Status TakeCodes(const toml::node& node, std::vector<int32_t>& out) {
  const toml::array* const list = node.as_array();
  if (list == nullptr || list->size() > kCodesMax) {
    return absl::InvalidArgumentError(
        absl::StrFormat("expected a list of at most %d exit codes, found %s", kCodesMax,
                        list == nullptr ? KindOf(node) : absl::StrCat(list->size())));
  }
  out.clear();
  for (const toml::node& element : *list) {
    const auto code = element.value_exact<int64_t>();
    if (!code.has_value() || *code < 1 || *code > 255) {
      return absl::InvalidArgumentError("expected exit codes from 1 to 255");
    }
    out.push_back(static_cast<int32_t>(*code));
  }
  return absl::OkStatus();
}

absl::Status TakeLayouts(const toml::node& node, std::vector<ElasticLayout>& out) {
  const toml::table* const table = node.as_table();
  if (table == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected a table { RANKS = \"LAYOUT\" }, found ", KindOf(node)));
  }
  out.clear();
  for (const auto& [key, value] : *table) {
    ElasticLayout layout;
    ASSIGN_OR_RETURN(const uint64_t ranks, ParseCount(std::string(key.str()), 1, kWorldSizeMax));
    layout.world_size = static_cast<uint32_t>(ranks);
    const auto text = value.value_exact<std::string>();
    if (!text.has_value() || text->size() > kLayoutBytesMax) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%d: expected a layout as a string of at most %d bytes", ranks, kLayoutBytesMax));
    }
    layout.layout = *text;
    out.push_back(std::move(layout));
  }
  std::sort(out.begin(), out.end(),
            [](const auto& a, const auto& b) { return a.world_size < b.world_size; });
  for (size_t i = 1; i < out.size(); ++i) {
    if (out[i].world_size == out[i - 1].world_size) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%d ranks: expected one layout, found two", out[i].world_size));
    }
  }
  return absl::OkStatus();
}

absl::Status TakeBytes(const toml::node& node, std::optional<uint64_t>& out) {
  ASSIGN_OR_RETURN(const std::string text, TextOf(node));
  ASSIGN_OR_RETURN(out, ParseByteCount(text));
  return absl::OkStatus();
}

// One key; kNotFound: there is none of that name.
absl::Status TakeKey(const std::string& key, const toml::node& node, Settings& s) {
  const std::pair<std::string_view, absl::Duration*> durations[] = {
      {"recovery.restart_window", &s.restart_window}, {"recovery.pause_first", &s.pause_first},
      {"recovery.pause_max", &s.pause_max},           {"recovery.healthy_after", &s.healthy_after},
      {"recovery.hang_timeout", &s.hang_timeout},     {"recovery.start_wait", &s.start_wait},
      {"recovery.evidence_wait", &s.evidence_wait},   {"recovery.save_wait", &s.save_wait},
      {"recovery.stop_wait", &s.stop_wait},           {"recovery.kill_wait", &s.kill_wait},
      {"recovery.approval_wait", &s.approval_wait},   {"recovery.capacity_wait", &s.capacity_wait},
      {"recovery.lemon_memory", &s.lemon_memory},     {"recovery.exclude_for", &s.exclude_for},
      {"recovery.slow_horizon", &s.slow_horizon},     {"recovery.failure_prior", &s.failure_prior},
  };
  for (const auto& [name, duration] : durations) {
    if (key == name) return Take(node, *duration);
  }
  if (key == "recovery.mode") return Take(node, s.mode, {"observe", "ask", "act"});
  if (key == "recovery.max_restarts") return Take(node, s.max_restarts, 0, 1'000'000);
  if (key == "recovery.restarts_in_window") return Take(node, s.restarts_in_window, 1, 64);
  if (key == "recovery.lemons") return Take(node, s.lemons, {"exclude", "ask", "ignore"});
  if (key == "recovery.hangs_to_exclude") return Take(node, s.hangs_to_exclude, 1, 8);
  if (key == "recovery.exclusions_max") return Take(node, s.exclusions_max, 0, kWorldSizeMax);
  if (key == "recovery.checkpoint_tries") return Take(node, s.checkpoint_tries, 1, 1000);
  if (key == "recovery.no_restart_codes") return TakeCodes(node, s.no_restart_codes);
  if (key == "recovery.slow") return Take(node, s.slow, {"report", "replace-at-checkpoint"});
  if (key == "elastic.layouts") return TakeLayouts(node, s.layouts);
  if (key == "elastic.rank_bytes_max") return TakeBytes(node, s.rank_bytes_max);
  return absl::NotFoundError(key);
}

}  // namespace

std::span<const SettingsKey> SettingsKeys() { return kKeys; }

std::string SettingsTable() {
  std::string table = "| key | default | meaning |\n|---|---|---|\n";
  for (const SettingsKey& key : kKeys) {
    absl::StrAppend(&table, "| `", key.name, "` | ",
                    *key.default_text == '\0' ? "" : absl::StrCat("`", key.default_text, "`"),
                    " | ", key.help, " |\n");
  }
  return table;
}

std::string_view Name(Mode mode) {
  static constexpr std::string_view kNames[] = {"observe", "ask", "act"};
  return kNames[static_cast<size_t>(mode)];
}

absl::StatusOr<Settings> ParseSettings(std::string_view text, const std::string& where) {
  const toml::parse_result parsed = toml::parse(text, std::string_view(where));
  if (!parsed) {
    return absl::InvalidArgumentError(absl::StrFormat("%s line %d: %s", where,
                                                      parsed.error().source().begin.line,
                                                      std::string(parsed.error().description())));
  }
  std::vector<std::string_view> known;
  for (const SettingsKey& key : kKeys) known.emplace_back(key.name);
  Settings settings;
  for (const char* const name : {"recovery", "elastic"}) {
    const toml::node* const node = parsed.table().get(name);
    if (node == nullptr) continue;
    const toml::table* const table = node->as_table();
    if (table == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s line %d: %s: expected a table, found %s", where,
                          node->source().begin.line, name, KindOf(*node)));
    }
    for (const auto& [key_node, value] : *table) {
      const std::string key = absl::StrCat(name, ".", std::string(key_node.str()));
      const std::string at = absl::StrFormat("%s line %d: ", where, key_node.source().begin.line);
      const absl::Status status = TakeKey(key, value, settings);
      if (absl::IsNotFound(status)) {
        return absl::InvalidArgumentError(
            absl::StrCat(at, "unknown key \"", key, "\"", DidYouMean(key, known)));
      }
      if (!status.ok()) {
        return absl::InvalidArgumentError(
            absl::StrCat(at, key, ": ", std::string(status.message())));
      }
    }
  }
  return settings;
}

}  // namespace holdfast::recovery
