#include "agent/run/shim_protocol.h"

#include <charconv>

#include "agent/run/fields.h"

namespace holdfast {
namespace {

constexpr char kLine = '\n';
constexpr char kNul = '\0';
// The last line of a record: without it the file was cut off.
constexpr char kEnd[] = "end";

// "resource:soft".
std::optional<ShimSpec::Limit> DecodeLimit(std::string_view text) {
  ShimSpec::Limit limit;
  const char* const end = text.data() + text.size();
  auto [colon, error] = std::from_chars(text.data(), end, limit.resource);
  if (error != std::errc() || colon == end || *colon != ':') return std::nullopt;
  const auto [stop, soft_error] = std::from_chars(colon + 1, end, limit.soft);
  if (soft_error != std::errc() || stop != end) return std::nullopt;
  return limit;
}

}  // namespace

std::string EncodeExitRecord(const ExitRecord& record) {
  Fields fields;
  fields.Add("version", kShimVersion);
  fields.Add("rank", record.rank);
  fields.Add("pid", record.rank_pid);
  fields.Add("wait_status", record.wait_status);
  fields.Add("start_error", record.start_error);
  fields.Add("started_ns", record.started_ns);
  fields.Add("ended_ns", record.ended_ns);
  fields.Add(kEnd, 1);
  return fields.Encode(kLine);
}

std::optional<ExitRecord> DecodeExitRecord(std::string_view text) {
  const std::optional<Fields> fields = Fields::Decode(text, kLine);
  if (!fields.has_value()) return std::nullopt;
  const auto rank = fields->Number("rank", 0, UINT32_MAX);
  const auto pid = fields->Number("pid", 0, INT32_MAX);
  const auto wait_status = fields->Number("wait_status", INT32_MIN, INT32_MAX);
  const auto start_error = fields->Number("start_error", 0, INT32_MAX);
  const auto started_ns = fields->Number("started_ns", 0, INT64_MAX);
  const auto ended_ns = fields->Number("ended_ns", 0, INT64_MAX);
  if (!fields->Number("version", kShimVersion, kShimVersion) || !rank || !pid || !wait_status ||
      !start_error || !started_ns || !ended_ns || !fields->Number(kEnd, 1, 1)) {
    return std::nullopt;
  }
  ExitRecord record;
  record.rank = static_cast<uint32_t>(*rank);
  record.rank_pid = static_cast<int32_t>(*pid);
  record.wait_status = static_cast<int32_t>(*wait_status);
  record.start_error = static_cast<int32_t>(*start_error);
  record.started_ns = *started_ns;
  record.ended_ns = *ended_ns;
  return record;
}

std::string EncodeShimSpec(const ShimSpec& spec) {
  Fields fields;
  fields.Add("version", kShimVersion);
  fields.Add("rank", spec.rank);
  fields.Add("listener", spec.listener);
  fields.Add("directory", spec.directory);
  fields.Add("log_directory", spec.log_directory);
  fields.Add("log_bytes_max", static_cast<int64_t>(spec.log_bytes_max));
  fields.Add("linger_seconds", spec.linger_seconds);
  fields.Add("working_directory", spec.working_directory);
  fields.Add("umask", spec.umask);
  for (const ShimSpec::Limit& limit : spec.limits) {
    fields.Add("limit", std::to_string(limit.resource) + ":" + std::to_string(limit.soft));
  }
  for (const std::string& word : spec.command) fields.Add("command", word);
  for (const std::string& variable : spec.environment) fields.Add("environment", variable);
  return fields.Encode(kNul);
}

std::optional<ShimSpec> DecodeShimSpec(std::string_view bytes) {
  const std::optional<Fields> fields = Fields::Decode(bytes, kNul);
  if (!fields.has_value()) return std::nullopt;
  const auto rank = fields->Number("rank", 0, UINT32_MAX);
  const auto listener = fields->Number("listener", 0, INT32_MAX);
  const auto log_bytes_max = fields->Number("log_bytes_max", 1, INT64_MAX);
  const auto linger_seconds = fields->Number("linger_seconds", 0, UINT32_MAX);
  const auto mask = fields->Number("umask", 0, 0777);
  const auto directory = fields->Text("directory");
  const auto log_directory = fields->Text("log_directory");
  const auto working_directory = fields->Text("working_directory");
  if (!fields->Number("version", kShimVersion, kShimVersion) || !rank || !listener ||
      !log_bytes_max || !linger_seconds || !mask || !directory || !log_directory ||
      !working_directory) {
    return std::nullopt;
  }
  ShimSpec spec;
  spec.rank = static_cast<uint32_t>(*rank);
  spec.listener = static_cast<int>(*listener);
  spec.directory = *directory;
  spec.log_directory = *log_directory;
  spec.log_bytes_max = static_cast<uint64_t>(*log_bytes_max);
  spec.linger_seconds = static_cast<uint32_t>(*linger_seconds);
  spec.working_directory = *working_directory;
  spec.umask = static_cast<uint32_t>(*mask);
  for (const std::string& text : fields->All("limit")) {
    const std::optional<ShimSpec::Limit> limit = DecodeLimit(text);
    if (!limit.has_value()) return std::nullopt;
    spec.limits.push_back(*limit);
  }
  spec.command = fields->All("command");
  spec.environment = fields->All("environment");
  if (spec.command.empty()) return std::nullopt;
  return spec;
}

}  // namespace holdfast
