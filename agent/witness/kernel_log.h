// New lines of the kernel's log as they come: of /dev/kmsg, or of a file that somebody appends
// them to (a syslog daemon, a node-problem detector, outside of the agent's container).
//
// What was there before Start() is not told: of it nobody knows whom it concerned. A file may be
// rotated (another one under its name), cut, or made later.
#ifndef HOLDFAST_AGENT_WITNESS_KERNEL_LOG_H_
#define HOLDFAST_AGENT_WITNESS_KERNEL_LOG_H_

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/executor.h"
#include "io/unique_fd.h"

namespace holdfast {

// Threads: the event loop's. Lifetime: the loop outlives it.
class KernelLog {
 public:
  static constexpr char kDevice[] = "/dev/kmsg";
  // A file is looked at so often.
  static constexpr absl::Duration kLookEvery = absl::Milliseconds(500);
  // Taken in one turn of the loop; the rest in the next.
  static constexpr size_t kBytesPerTurnMax = size_t{256} << 10;
  // Of a line; what is longer is told up to here.
  static constexpr size_t kLineBytesMax = 8192;  // CONSOLE_EXT_LOG_MAX of the kernel

  // `on_line` gets the text of every line, without what /dev/kmsg puts before it.
  KernelLog(EventLoop& loop, std::string path, std::function<void(std::string_view line)> on_line)
      : loop_(loop), path_(std::move(path)), on_line_(std::move(on_line)) {}
  ~KernelLog();
  KernelLog(const KernelLog&) = delete;
  KernelLog& operator=(const KernelLog&) = delete;

  // Once.
  void Start();

  // Tells at once what has been written by now, as far as one turn allows.
  void ReadNow();

  // OK: it is read. Else why not, naming the path and what would help: kPermissionDenied,
  // kNotFound (a file that may be made later), kInvalidArgument (neither device nor file),
  // kUnavailable.
  const absl::Status& state() const { return state_; }

 private:
  enum class From { kBeginning, kEnd };
  void Open(From from);
  void ReadDevice();
  void Look();
  bool ReadFile();
  void TakeText(std::string_view text);
  bool IsReplaced() const;

  EventLoop& loop_;
  const std::string path_;
  const std::function<void(std::string_view)> on_line_;
  absl::Status state_ = absl::UnavailableError("not read yet");
  UniqueFd fd_;
  bool watched_ = false;  // a device; else looked at by the timer
  EventLoop::TimerId timer_ = 0;
  uint64_t offset_bytes_ = 0;  // in the file: read up to here
  std::string line_;           // its beginning, while its end has not come
};

// What was written to it last, as lines of text: `bytes_max` at most, of the device only what the
// kernel still has. With the time of each record behind the kernel's start in front, where it is
// told. Blocks for the disk. Errors: as KernelLog::state().
absl::StatusOr<std::string> LastOfKernelLog(const std::string& path, size_t bytes_max);

// The text of a record "priority,sequence,microseconds,flags[,...];text\n[ KEY=value\n...]" as
// /dev/kmsg gives it; empty if it is none.
std::string_view TextOfKernelRecord(std::string_view record);

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_WITNESS_KERNEL_LOG_H_
