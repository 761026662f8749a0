// Worker: its HTTP port, which is off unless `http` says where. What is wrong with it is a matter
// of the configuration and never ends the agent: the log and the status say it, and it is tried
// again.
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/log.h"
#include "agent/metrics.h"
#include "agent/run/small_files.h"
#include "agent/version.h"
#include "agent/worker.h"
#include "nlohmann/json.hpp"

namespace holdfast {
namespace {

constexpr absl::Duration kHttpRetry = absl::Seconds(10);
constexpr char kPlainText[] = "text/plain; charset=utf-8";
constexpr char kJson[] = "application/json";

}  // namespace

void Worker::StartHttp() {
  if (!config_.http.has_value()) return;
  HttpServer::Options options;
  options.at = *config_.http;
  // Where the token lies by default.
  absl::Status problem = holdfast::MakeDirectories(config_.state_directory);
  if (problem.ok() && !config_.http_token_file.empty()) {
    absl::StatusOr<std::string> token = ReadOrMakeToken(config_.http_token_file);
    problem = token.status();
    if (token.ok()) options.token = *std::move(token);
  }
  if (problem.ok()) {
    absl::StatusOr<std::unique_ptr<HttpServer>> started =
        HttpServer::Start(std::move(options), HttpPages(), *loop_, clock_);
    problem = started.status();
    if (started.ok()) http_ = *std::move(started);
  }
  if (problem.ok()) {
    http_problem_.clear();
    LogInfo(absl::StrFormat("HTTP on %s; %s", http_->at().ToString(),
                            config_.http_token_file.empty()
                                ? std::string("no token is asked for")
                                : absl::StrCat("the token is in ", config_.http_token_file)));
    if (!config_.http->is_loopback()) {
      LogWarning(
          "HTTP can be reached from other machines, and tokens go over the wire as they are");
    }
    return;
  }
  const std::string text =
      absl::StrFormat("http = %s (%s): %s", config_.values.at("http").text,
                      config_.values.at("http").origin, std::string(problem.message()));
  if (text != http_problem_) {
    LogError(absl::StrFormat("%s; the agent serves without it, and tries again every %s", text,
                             absl::FormatDuration(kHttpRetry)));
  }
  http_problem_ = text;
  loop_->RunAfter(kHttpRetry, [this] { StartHttp(); });
}

std::vector<HttpServer::Page> Worker::HttpPages() {
  const auto when_ready = [this](auto make) {
    return [this, make] {
      if (!recovered_) return Readiness();
      return HttpServer::Answer{200, make()};
    };
  };
  return {
      {"/healthz", kPlainText, false,
       [] {
         return HttpServer::Answer{200, "ok\n"};
       }},
      {"/readyz", kPlainText, false, [this] { return Readiness(); }},
      {"/metrics", kMetricsContentType, true, when_ready([this] { return MetricsNow(); })},
      {"/v1/status", kJson, true, when_ready([this] { return absl::StrCat(StatusText(), "\n"); })}};
}

HttpServer::Answer Worker::Readiness() const {
  if (!recovered_) return {503, "not ready: takes over what the last worker held\n"};
  if (draining_) return {503, "not ready: ends\n"};
  return {200, "ready\n"};
}

std::string Worker::MetricsNow() const {
  const nlohmann::json status = EngineStatus();
  const nlohmann::json memory = status.value("memory", nlohmann::json::object());
  AgentNumbers agent;
  agent.version = kVersion;
  agent.mode = config_.is_private ? "private" : "system";
  agent.worker_restarts = restart_count_;
  agent.keeper_restarts = keeper_->keeper_restart_count();
  agent.is_ready = !draining_;
  agent.memory_limit_bytes = memory.value("limit_bytes", uint64_t{0});
  agent.memory_used_bytes = memory.value("used_bytes", uint64_t{0});
  agent.open_sessions = engine_->open_session_count();
  agent.pending_images = engine_->pending_image_count();
  agent.connections = server_->connection_count();
  agent.garbage_messages = server_->garbage_count();
  agent.http_answers = http_->answer_counts();
  ReadProcess(agent);
  return MetricsText(agent, JobsNow(JobSourcesOf(status)));
}

}  // namespace holdfast
