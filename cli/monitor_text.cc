// How `holdfast monitor` says things: for somebody who was asleep a minute ago.
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/monitor_verbs.h"
#include "cli/output.h"

namespace holdfast::cli {
namespace {

using nlohmann::ordered_json;

std::string TextOf(const ordered_json& object, const char* key) {
  return Printable(object.value(key, std::string()));
}

// How much longer than its peers' a connection takes: a sign and a colour (of 256) for each.
struct Shade {
  double ratio;  // from this on
  char sign;
  int colour;
};
constexpr std::array<Shade, 6> kShades = {{{3, '#', 160},
                                           {2, '+', 166},
                                           {1.5, '=', 172},
                                           {1.25, '-', 142},
                                           {1.1, ':', 64},
                                           {0, '.', 22}}};

struct Heat {
  bool measured = false;
  bool slow = false;
  double ratio = 0;
};

double RatioOf(const ordered_json& cell) {
  const double own = cell.value("us_per_mib", 0.0);
  const double peers = cell.value("peers_us_per_mib", 0.0);
  const double baseline = cell.value("baseline_us_per_mib", 0.0);
  const double normal = peers > 0 ? peers : baseline;
  return normal > 0 ? own / normal : 1;
}

std::string HeatText(const Heat& heat, Colour colour) {
  if (!heat.measured) return "   ";
  const auto shade = std::find_if(kShades.begin(), kShades.end(),
                                  [&](const Shade& one) { return heat.ratio >= one.ratio; });
  const char sign = shade == kShades.end() ? '?' : shade->sign;
  const std::string text = absl::StrFormat(" %c%c", sign, heat.slow ? '!' : ' ');
  if (colour == Colour::kNever || shade == kShades.end()) return text;
  return absl::StrFormat("\033[48;5;%dm%s\033[0m", shade->colour, text);
}

}  // namespace

absl::StatusOr<ordered_json> ParseAnswer(const std::string& text) {
  ordered_json json = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || json.value("schema_version", 0) != 1) {
    return absl::UnavailableError(
        "the agent's answer is no JSON object of schema_version 1: install agent and command from "
        "one release");
  }
  return json;
}

absl::StatusOr<ordered_json> AskMonitor(const std::string& socket,
                                        const MonitorQuestion& question) {
  const absl::StatusOr<std::string> text = QueryMonitor(socket, question, kMonitorTimeout);
  if (!text.ok()) return text.status();
  return ParseAnswer(*text);
}

std::string SecondsText(double seconds) {
  if (seconds < 10) return absl::StrFormat("%.1f s", seconds);
  if (seconds < 180) return absl::StrFormat("%.0f s", seconds);
  if (seconds < 3 * 3600) return absl::StrFormat("%.0f min", seconds / 60);
  return absl::StrFormat("%.0f h", seconds / 3600);
}

std::string JobText(const ordered_json& job) {
  const std::string key = TextOf(job, "attempt_key");
  return absl::StrFormat("%s (%s%d ranks)", TextOf(job, "job"),
                         key.empty() ? "" : absl::StrCat("attempt ", key, ", "),
                         job.value("world_size", 0));
}

std::string EndText(const ordered_json& end) {
  const std::string kind = end.value("kind", "unknown");
  if (kind == "rank") return absl::StrFormat("rank %d", end.value("rank", 0));
  if (kind == "link") {
    return absl::StrFormat("link %d -> %d", end.value("from", 0), end.value("to", 0));
  }
  if (kind == "operation") return "an operation that shows nothing";
  if (kind == "inside-of-node") return "inside of its node";
  if (kind == "unknown-member") {
    return absl::StrFormat("member %d, not seen", end.value("index", 0));
  }
  return "something unknown";
}

std::string FindingLine(const ordered_json& finding) {
  std::string when;
  if (const ordered_json& history = finding["history"]; !history.empty()) {
    const ordered_json& first = history.front();
    when = first["wall_time"].is_string()
               ? TextOf(first, "wall_time").substr(0, 19)
               : absl::StrFormat("%.0f s", first.value("at_seconds", 0.0));
  }
  return absl::StrFormat("%-10s %-9s %-9s %-19s %s: %s", TextOf(finding, "id"),
                         TextOf(finding, "grade"), TextOf(finding, "state"), when,
                         TextOf(finding, "job"), TextOf(finding, "sentence"));
}

std::string FindingText(const ordered_json& finding) {
  std::string text =
      absl::StrFormat("%s %s of job %s: %s\n\n", TextOf(finding, "grade"), TextOf(finding, "id"),
                      TextOf(finding, "job"), TextOf(finding, "sentence"));
  absl::StrAppendFormat(&text, "  state         %s\n", TextOf(finding, "state"));
  absl::StrAppendFormat(&text, "  what          %s (%s)\n", TextOf(finding, "fault"),
                        TextOf(finding, "syndrome"));
  std::string suspects;
  for (const ordered_json& suspect : finding["suspects"]) {
    absl::StrAppend(&suspects, suspects.empty() ? "" : ", ", "rank ", suspect.value("rank", 0));
    if (suspect.contains("peer")) absl::StrAppend(&suspects, " -> rank ", suspect.value("peer", 0));
  }
  absl::StrAppendFormat(&text, "  suspects      %s%s\n", suspects.empty() ? "nobody" : suspects,
                        finding["suspects"].size() > 1 ? " (the likeliest first)" : "");
  absl::StrAppendFormat(&text, "  scope         %s: %s\n", TextOf(finding, "scope"),
                        TextOf(finding, "scope_in_words"));
  absl::StrAppendFormat(&text, "  confidence    %.0f%%\n", 100 * finding.value("confidence", 0.0));
  const char* head = "  evidence      ";
  for (const ordered_json& one : finding["evidence"]) {
    absl::StrAppend(&text, head, Printable(one.is_string() ? one.get<std::string>() : ""), "\n");
    head = "                ";
  }
  absl::StrAppendFormat(&text, "  wrong if      %s\n", TextOf(finding, "changes_mind"));
  head = "  history       ";
  for (const ordered_json& event : finding["history"]) {
    const std::string when = event["wall_time"].is_string()
                                 ? TextOf(event, "wall_time")
                                 : absl::StrFormat("%.0f s", event.value("at_seconds", 0.0));
    absl::StrAppendFormat(&text, "%s%s  %-10s %s\n", head, when, TextOf(event, "change"),
                          TextOf(event, "text"));
    head = "                ";
    if (&event == &finding["history"].front() && finding.value("history_left_out", 0) > 0) {
      absl::StrAppendFormat(&text, "%s(%d more)\n", head, finding.value("history_left_out", 0));
    }
  }
  return text;
}

Colour ColourOfTerminal() {
  const char* term = std::getenv("TERM");
  const char* none = std::getenv("NO_COLOR");
  const bool plain = isatty(STDOUT_FILENO) == 0 || (none != nullptr && *none != '\0') ||
                     term == nullptr || std::string_view(term) == "dumb";
  return plain ? Colour::kNever : Colour::kAlways;
}

TerminalSize SizeOfTerminal() {
  winsize size{};
  TerminalSize result;
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return result;
  return {size.ws_col, size.ws_row};
}

std::string MatrixText(const ordered_json& communicator, Colour colour, int columns) {
  constexpr int kLabel = 6;
  constexpr int kCell = 3;
  std::map<int64_t, size_t> places;  // of ranks, in their order
  for (const ordered_json& cell : communicator["cells"]) {
    places.emplace(cell.value("from", int64_t{0}), 0);
    places.emplace(cell.value("to", int64_t{0}), 0);
  }
  std::vector<int64_t> ranks;
  for (auto& [rank, place] : places) {
    place = ranks.size();
    ranks.push_back(rank);
  }
  const auto fit = static_cast<size_t>(std::max(1, (columns - kLabel) / kCell));
  const size_t joined = (ranks.size() + fit - 1) / fit;  // ranks in one row or column
  const size_t side = joined == 0 ? 0 : (ranks.size() + joined - 1) / joined;
  std::vector<Heat> heats(side * side);
  std::string slow;
  for (const ordered_json& cell : communicator["cells"]) {
    const int64_t from = cell.value("from", int64_t{0});
    const int64_t to = cell.value("to", int64_t{0});
    Heat& heat = heats[places.at(from) / joined * side + places.at(to) / joined];
    heat.measured = true;
    heat.ratio = std::max(heat.ratio, RatioOf(cell));
    if (!cell.value("slow", false)) continue;
    heat.slow = true;
    absl::StrAppendFormat(&slow, "slow: rank %d -> rank %d takes %.0f us per MiB, its peers %.0f\n",
                          from, to, cell.value("us_per_mib", 0.0),
                          cell.value("peers_us_per_mib", 0.0));
  }
  std::string text = absl::StrFormat("%*s", kLabel, "from");
  for (size_t i = 0; i < side; ++i) {
    absl::StrAppendFormat(&text, "%3d", ranks[i * joined] % 1000);
  }
  text += "  <- to\n";
  for (size_t row = 0; row < side; ++row) {
    absl::StrAppendFormat(&text, "%*d", kLabel, ranks[row * joined]);
    for (size_t column = 0; column < side; ++column) {
      text += HeatText(heats[row * side + column], colour);
    }
    text += "\n";
  }
  if (joined > 1) {
    absl::StrAppendFormat(&text, "each cell is the worst of %d x %d ranks\n", joined, joined);
  }
  return text + slow;
}

}  // namespace holdfast::cli
