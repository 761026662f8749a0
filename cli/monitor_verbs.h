// The verbs of `holdfast monitor`, and what they share.
#ifndef HOLDFAST_CLI_MONITOR_VERBS_H_
#define HOLDFAST_CLI_MONITOR_VERBS_H_

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cli/agent_client.h"
#include "cli/verb.h"

namespace CLI {
class App;
}

namespace holdfast::cli {

// For an answer: an analysis of 10,000 ranks may be at work just then.
inline constexpr absl::Duration kMonitorTimeout = absl::Seconds(10);

struct MonitorOptions {
  std::string socket;
  std::string job;  // empty: all
};
// --socket and --job, and the footer.
std::shared_ptr<MonitorOptions> AddMonitorOptions(CLI::App& verb);

void AddMonitorStatus(CLI::App& monitor, Invocation& invocation);
void AddMonitorTop(CLI::App& monitor, Invocation& invocation);
void AddMonitorMatrix(CLI::App& monitor, Invocation& invocation);
void AddMonitorVerdicts(CLI::App& monitor, Invocation& invocation);
void AddMonitorExplain(CLI::App& monitor, Invocation& invocation);
void AddMonitorRecord(CLI::App& monitor, Invocation& invocation);
void AddMonitorReplay(CLI::App& monitor, Invocation& invocation);
void AddMonitorWitnesses(CLI::App& monitor, Invocation& invocation);

// The answer parsed. kUnavailable also if it is no JSON object of schema_version 1.
absl::StatusOr<nlohmann::ordered_json> AskMonitor(const std::string& socket,
                                                  const MonitorQuestion& question);
absl::StatusOr<nlohmann::ordered_json> ParseAnswer(const std::string& text);

// monitor_text.cc: how things are said. Names are made safe to print.

// "0.4 s", "21 s", "3 min", "5 h".
std::string SecondsText(double seconds);
// "llama (attempt run/0, 8 ranks)".
std::string JobText(const nlohmann::ordered_json& job);
// "rank 3", "link 1 -> 2", ...: an end of an edge, as `top` has it.
std::string EndText(const nlohmann::ordered_json& end);
// A finding in one line, and in full.
std::string FindingLine(const nlohmann::ordered_json& finding);
std::string FindingText(const nlohmann::ordered_json& finding);

enum class Colour { kNever, kAlways };
// kAlways on a terminal that has not asked for none (NO_COLOR, TERM=dumb).
Colour ColourOfTerminal();
// Columns and rows of the terminal, or 80 and 0 where there is none.
struct TerminalSize {
  int columns = 80;
  int rows = 0;
};
TerminalSize SizeOfTerminal();
// The delay matrix of one communicator as a heat map: a row for each sender, a column for each
// receiver. At most `columns` wide: beyond, ranks are joined and the worst is shown.
std::string MatrixText(const nlohmann::ordered_json& communicator, Colour colour, int columns);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_MONITOR_VERBS_H_
