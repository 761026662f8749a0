#include "hook/settings.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "hook/abi/messages.h"
#include "hook/abi/private_agent_path.h"
#include "hook/capture.h"
#include "hook/deadline.h"

namespace holdfast::hook {
namespace {

constexpr int64_t kOpenDeadlineNs = 30 * kNsPerSecond;
constexpr int64_t kWorldSizeMax = 1 << 24;

// The variable's value; empty if it is not set.
std::string Variable(const char* name) {
  const char* value = getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

Result<int64_t> ParseNumber(const char* variable, const std::string& text, int64_t min,
                            int64_t max) {
  char* end = nullptr;
  errno = 0;
  const long long value = strtoll(text.c_str(), &end, 10);
  if (errno != 0 || end == text.c_str() || *end != '\0' || value < min || value > max) {
    return Error(HF_INVALID_ARGUMENT, "$%s: expected a number from %lld to %lld, found '%s'",
                 variable, static_cast<long long>(min), static_cast<long long>(max),
                 ShortName(text).text());
  }
  return static_cast<int64_t>(value);
}

// `given`, unless it is `absent`: then the variable's value; if that is not set, `otherwise`.
struct NumberOption {
  const char* name;  // of the option
  int64_t given;
  int64_t absent;
  const char* variable;
  int64_t otherwise;  // INT64_MIN: required
  int64_t min;
  int64_t max;
};

Result<int64_t> Choose(const NumberOption& option) {
  if (option.given != option.absent) {
    if (option.given >= option.min && option.given <= option.max) return option.given;
    return Error(HF_INVALID_ARGUMENT, "%s: expected %lld to %lld, found %lld", option.name,
                 static_cast<long long>(option.min), static_cast<long long>(option.max),
                 static_cast<long long>(option.given));
  }
  const std::string text = Variable(option.variable);
  if (!text.empty()) return ParseNumber(option.variable, text, option.min, option.max);
  if (option.otherwise != INT64_MIN) return option.otherwise;
  return Error(HF_INVALID_ARGUMENT, "%s is not given, and $%s is not set", option.name,
               option.variable);
}

Error CheckJobName(const std::string& job) {
  if (job.empty()) {
    return Error(HF_INVALID_ARGUMENT, "job is not given, and $HOLDFAST_JOB is not set");
  }
  constexpr char kAllowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  if (job.size() > abi::kJobNameBytesMax || job[0] == '.' ||
      job.find_first_not_of(kAllowed) != std::string::npos) {
    return Error(HF_INVALID_ARGUMENT,
                 "job: expected 1 to %zu of [A-Za-z0-9._-] without a leading dot, found '%s'",
                 abi::kJobNameBytesMax, ShortName(job).text());
  }
  return Error();
}

std::string TorchrunKey() {
  const std::string run_id = Variable("TORCHELASTIC_RUN_ID");
  if (run_id.empty()) return std::string();
  return run_id + ":" + Variable("TORCHELASTIC_RESTART_COUNT");
}

// The agent has another working directory.
Error MakeAbsolute(const char* option, std::string* path) {
  if (!path->empty() && (*path)[0] != '/') {
    char* current = getcwd(nullptr, 0);
    if (current == nullptr) {
      return Error(HF_INVALID_ARGUMENT, "%s '%s' is relative, and there is no current directory",
                   option, ShortName(*path).text());
    }
    *path = std::string(current) + "/" + *path;
    free(current);
  }
  if (path->size() > abi::kPathBytesMax) {
    return Error(HF_INVALID_ARGUMENT, "%s: expected at most %zu bytes, found %zu", option,
                 abi::kPathBytesMax, path->size());
  }
  return Error();
}

Error ReadPaths(const hf_open_options& options, Settings* settings) {
  settings->root = options.root != nullptr ? std::string(options.root) : Variable("HOLDFAST_ROOT");
  if (Error error = MakeAbsolute("root", &settings->root); !error.ok()) return error;
  settings->restore_from = options.restore_from != nullptr ? std::string(options.restore_from)
                                                           : Variable("HOLDFAST_RESTORE_FROM");
  return MakeAbsolute("restore_from", &settings->restore_from);
}

Error ReadNames(const hf_open_options& options, Settings* settings) {
  settings->job = options.job != nullptr ? std::string(options.job) : Variable("HOLDFAST_JOB");
  if (Error error = CheckJobName(settings->job); !error.ok()) return error;
  settings->attempt_key = options.attempt_key != nullptr ? std::string(options.attempt_key)
                                                         : Variable("HOLDFAST_ATTEMPT_KEY");
  if (settings->attempt_key.empty() && options.attempt_key == nullptr) {
    settings->attempt_key = TorchrunKey();
  }
  if (settings->attempt_key.size() > abi::kAttemptKeyBytesMax) {
    return Error(HF_INVALID_ARGUMENT, "attempt_key: expected at most %zu bytes, found %zu",
                 abi::kAttemptKeyBytesMax, settings->attempt_key.size());
  }
  return ReadPaths(options, settings);
}

Error ReadNumbers(const hf_open_options& options, Settings* settings) {
  Result<int64_t> world_size =
      Choose({"world_size", options.world_size, -1, "WORLD_SIZE", INT64_MIN, 1, kWorldSizeMax});
  if (!world_size.ok()) return world_size.error();
  Result<int64_t> rank =
      Choose({"rank", options.rank, -1, "RANK", INT64_MIN, 0, world_size.value() - 1});
  if (!rank.ok()) return rank.error();
  Result<int64_t> local_rank =
      Choose({"local_rank", options.local_rank, -1, "LOCAL_RANK", 0, 0, world_size.value() - 1});
  if (!local_rank.ok()) return local_rank.error();
  Result<int64_t> threads = Choose(
      {"copy_threads", options.copy_threads, 0, "HOLDFAST_COPY_THREADS", 1, 1, kCopyThreadsMax});
  if (!threads.ok()) return threads.error();
  Result<int64_t> head_start_ms =
      Choose({"capture_head_start_ms", -1, -1, "HOLDFAST_CAPTURE_HEAD_START_MS",
              kCaptureHeadStartNs / kNsPerMs, 0, 60'000});
  if (!head_start_ms.ok()) return head_start_ms.error();
  Result<int64_t> device_mib = Choose(
      {"device_copy_mib_per_second", -1, -1, "HOLDFAST_DEVICE_COPY_MIB_PER_SECOND", 0, 0, 1 << 30});
  if (!device_mib.ok()) return device_mib.error();
  Result<int64_t> private_agent =
      Choose({"private_agent", options.private_agent, -1, "HOLDFAST_PRIVATE", 1, 0, 1});
  if (!private_agent.ok()) return private_agent.error();
  settings->world_size = static_cast<uint32_t>(world_size.value());
  settings->rank = static_cast<uint32_t>(rank.value());
  settings->local_rank = static_cast<uint32_t>(local_rank.value());
  settings->copy_threads = static_cast<uint32_t>(threads.value());
  settings->capture_head_start_ns = head_start_ms.value() * kNsPerMs;
  settings->device_bytes_per_second_max = static_cast<uint64_t>(device_mib.value()) << 20;
  settings->private_agent = private_agent.value() != 0;
  settings->deadline_ns = options.deadline_ns == 0 ? kOpenDeadlineNs : options.deadline_ns;
  return Error();
}

Error ReadCheckSource(const hf_open_options& options, Settings* settings) {
  if (options.check_source >= 0 && options.check_source <= 2) {
    settings->check_source = static_cast<CheckSource>(options.check_source);
    return Error();
  }
  if (options.check_source != -1) {
    return Error(HF_INVALID_ARGUMENT, "check_source: expected -1 to 2, found %d",
                 options.check_source);
  }
  const std::string text = Variable("HOLDFAST_CHECK_SOURCE");
  if (text == "none") {
    settings->check_source = CheckSource::kNone;
  } else if (text == "all") {
    settings->check_source = CheckSource::kAll;
  } else if (text == "sample" || text.empty()) {
    settings->check_source = CheckSource::kSample;
  } else {
    return Error(HF_INVALID_ARGUMENT,
                 "$HOLDFAST_CHECK_SOURCE: expected none, sample or all, found '%s'",
                 ShortName(text).text());
  }
  return Error();
}

Error ReadCopies(const hf_open_options& options, Settings* settings) {
  if (options.copies >= HF_COPIES_ONCE && options.copies <= HF_COPIES_ALL) {
    settings->copies = static_cast<abi::Copies>(options.copies);
    return Error();
  }
  if (options.copies != -1) {
    return Error(HF_INVALID_ARGUMENT, "copies: expected -1 to 2, found %d", options.copies);
  }
  const std::string text = Variable("HOLDFAST_COPIES");
  if (text == "once" || text.empty()) {
    settings->copies = abi::Copies::kOnce;
  } else if (text == "per-node") {
    settings->copies = abi::Copies::kPerNode;
  } else if (text == "all") {
    settings->copies = abi::Copies::kAll;
  } else {
    return Error(HF_INVALID_ARGUMENT,
                 "$HOLDFAST_COPIES: expected once, per-node or all, found '%s'",
                 ShortName(text).text());
  }
  return Error();
}

}  // namespace

std::string RuntimeDirectory() {
  return abi::RuntimeDirectory(Variable("HOLDFAST_RUNTIME_DIR"), Variable("XDG_RUNTIME_DIR"),
                               getuid());
}

std::string JobDirectoryName(const std::string& job) { return abi::JobDirectoryName(job); }

Result<Settings> ReadSettings(const hf_open_options& options) {
  Settings settings;
  if (Error error = ReadNames(options, &settings); !error.ok()) return error;
  if (Error error = ReadNumbers(options, &settings); !error.ok()) return error;
  if (Error error = ReadCheckSource(options, &settings); !error.ok()) return error;
  if (Error error = ReadCopies(options, &settings); !error.ok()) return error;
  settings.socket_path =
      options.socket != nullptr ? std::string(options.socket) : Variable("HOLDFAST_SOCKET");
  if (!settings.socket_path.empty()) {
    // Somebody's agent: to start one of ours at its place would be wrong.
    settings.private_agent = false;
    return settings;
  }
  settings.runtime_directory = RuntimeDirectory() + "/" + JobDirectoryName(settings.job);
  settings.socket_path = settings.runtime_directory + "/agent.sock";
  settings.daemon_path = Variable("HOLDFASTD");
  settings.search_path = Variable("PATH");
  return settings;
}

}  // namespace holdfast::hook
