#include "agent/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "io/errno_status.h"
#include "io/unique_fd.h"
#include "spdlog/details/null_mutex.h"
#include "spdlog/sinks/base_sink.h"
#include "spdlog/spdlog.h"

namespace holdfast {
namespace {

// Makes `path` what descriptors 1 and 2 are.
absl::Status RedirectTo(const std::string& path) {
  const UniqueFd file(open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  if (!file) return ErrnoStatus(errno, "open log", path);
  if (dup2(file.get(), STDOUT_FILENO) < 0 || dup2(file.get(), STDERR_FILENO) < 0) {
    return ErrnoStatus(errno, "redirect output to log", path);
  }
  return absl::OkStatus();
}

// Writes to descriptor 2, whatever it is, and keeps it on the file named.
class DescriptorSink final : public spdlog::sinks::base_sink<std::mutex> {
 public:
  explicit DescriptorSink(LogOptions options) : options_(std::move(options)) {}

 protected:
  void sink_it_(const spdlog::details::log_msg& message) override {
    if (!options_.path.empty()) KeepUpWithFile();
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    // Dropped: a log that cannot be written has nowhere to say so.
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
  }
  void flush_() override {}

 private:
  void KeepUpWithFile() {
    struct stat open_file {};
    struct stat named {};
    if (fstat(STDERR_FILENO, &open_file) != 0) return;
    if (options_.rotation == LogOptions::Rotation::kRotate &&
        static_cast<uint64_t>(open_file.st_size) >= options_.bytes_max) {
      // Dropped: with the rename refused the log grows, which beats losing its lines.
      (void)rename(options_.path.c_str(), absl::StrCat(options_.path, ".1").c_str());
    }
    const bool same = stat(options_.path.c_str(), &named) == 0 &&
                      named.st_ino == open_file.st_ino && named.st_dev == open_file.st_dev;
    // Dropped: the old file goes on taking the lines.
    if (!same) RedirectTo(options_.path).IgnoreError();
  }

  const LogOptions options_;
};

}  // namespace

absl::Status OpenLog(const LogOptions& options) {
  if (!options.path.empty()) {
    if (absl::Status redirected = RedirectTo(options.path); !redirected.ok()) return redirected;
  }
  auto logger =
      std::make_shared<spdlog::logger>("holdfastd", std::make_shared<DescriptorSink>(options));
  logger->set_level(spdlog::level::from_str(options.level));
  logger->set_pattern(absl::StrCat("%Y-%m-%dT%H:%M:%S.%e%z %l ", options.process, "[%P] %v"));
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

void LogDebug(const std::string& text) { spdlog::default_logger_raw()->debug("{}", text); }
void LogInfo(const std::string& text) { spdlog::default_logger_raw()->info("{}", text); }
void LogWarning(const std::string& text) { spdlog::default_logger_raw()->warn("{}", text); }
void LogError(const std::string& text) { spdlog::default_logger_raw()->error("{}", text); }

}  // namespace holdfast
