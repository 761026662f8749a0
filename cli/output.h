// How what was read from a checkpoint reaches a terminal or a JSON reader. A checkpoint may come
// from anywhere: its names and reasons are text of strangers, and must neither control a terminal
// nor end the command.
#ifndef HOLDFAST_CLI_OUTPUT_H_
#define HOLDFAST_CLI_OUTPUT_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace holdfast::cli {

// `text` in one line that is safe to print: control characters (C0, DEL, C1) and bytes that are not
// UTF-8 become \n, \t or \xNN. For people: JSON output has the exact text.
std::string Printable(std::string_view text);

// The object, indented by one, without a newline at the end. Bytes that are not UTF-8 (a path may
// hold any) become U+FFFD.
std::string JsonText(const nlohmann::ordered_json& json);

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_OUTPUT_H_
