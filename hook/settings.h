// What hf_open was asked for, with every default filled in: the only place where the library reads
// the environment.
#ifndef HOLDFAST_HOOK_SETTINGS_H_
#define HOLDFAST_HOOK_SETTINGS_H_

#include <cstdint>
#include <string>

#include "hook/abi/messages.h"
#include "hook/check_source.h"
#include "hook/error.h"

namespace holdfast::hook {

// HOLDFAST_CAPTURE_HEAD_START_MS: how long a capture has the machine to itself (hook/capture.h).
// Longer than 2 GB take at the speed of memory; short against any flush.
inline constexpr int64_t kCaptureHeadStartNs = 200'000'000;

struct Settings {
  std::string job;
  uint32_t rank = 0;
  uint32_t world_size = 1;
  uint32_t local_rank = 0;
  std::string attempt_key;   // empty: none
  std::string root;          // empty: the agent's; absolute
  std::string restore_from;  // empty: none; absolute
  std::string socket_path;
  bool private_agent = false;     // start one if nobody listens there
  std::string runtime_directory;  // of the job; only if private_agent
  std::string daemon_path;        // $HOLDFASTD; empty: look beside the library and in PATH
  std::string search_path;        // $PATH
  CheckSource check_source = CheckSource::kSample;
  abi::Copies copies = abi::Copies::kOnce;
  uint32_t copy_threads = 1;
  int64_t capture_head_start_ns = kCaptureHeadStartNs;
  // HOLDFAST_DEVICE_COPY_MIB_PER_SECOND; 0: no limit.
  uint64_t device_bytes_per_second_max = 0;
  int64_t deadline_ns = 0;
};

// Errors: HF_INVALID_ARGUMENT, with the option or variable, expected and found.
Result<Settings> ReadSettings(const hf_open_options& options);

// As abi/private_agent_path.h has them.
std::string RuntimeDirectory();

std::string JobDirectoryName(const std::string& job);

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_SETTINGS_H_
