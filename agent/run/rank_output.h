// A rank's standard output and error on their way to its log files.
//
// A thread of its own writes: a log's storage that hangs must hold up neither the shim, which is
// asked to end the rank just then, nor the rank. What is read from a rank's pipe waits in a bounded
// buffer. While that is full the pipe is not read, so that a rank which prints faster than its log
// is slowed down, as any pipe does it; after kStallMax of that, what does not fit is dropped and
// counted, and the log says how much is missing, so that no rank waits for a log longer than that.
//
// Std only: holdfast-shim uses it.
#ifndef HOLDFAST_AGENT_RUN_RANK_OUTPUT_H_
#define HOLDFAST_AGENT_RUN_RANK_OUTPUT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <thread>

#include "base/mutex.h"
#include "io/unique_fd.h"

namespace holdfast {

// A file that is appended to. When it would grow beyond `bytes_max` it becomes `path`.1, which
// replaces the one before, so that there are never more than 2 x bytes_max. Readers that follow it
// find the new one by its inode.
class RotatedFile {
 public:
  RotatedFile(std::string path, uint64_t bytes_max);
  // False: not all of it was written (no space, no such directory); the next call tries anew.
  bool Append(const char* bytes, size_t count);

 private:
  bool Open();

  const std::string path_;
  const uint64_t bytes_max_;
  UniqueFd file_;
  uint64_t bytes_ = 0;  // that it has
};

enum class Stream { kOutput = 0, kError = 1 };
inline constexpr std::array<const char*, 2> kLogNames = {"stdout.log", "stderr.log"};

// Threads: one, but for its own.
class RankOutput {
 public:
  static constexpr size_t kBufferBytesMax = size_t{4} << 20;
  static constexpr int64_t kStallMaxNs = 2'000'000'000;
  // Taken beyond the buffer, unless its log has stalled: what a rank has written before its end.
  static constexpr size_t kLastWordsBytesMax = size_t{4} << 20;

  RankOutput(const std::string& log_directory, uint64_t log_bytes_max);
  ~RankOutput();  // abandons what is not written

  void Start();

  // How much to read and Put now. 0: the buffer is full; not 0 any more after kStallMaxNs of that,
  // because Put drops then.
  size_t Room(int64_t now_ns);
  void Put(Stream stream, const char* bytes, size_t count);

  // Becomes readable when something was written.
  int progress_fd() const { return progress_.get(); }
  void DrainProgress();
  size_t waiting_bytes();
  uint64_t bytes() const { return bytes_; }
  uint64_t dropped_bytes();

 private:
  struct Piece {
    Stream stream{};
    std::string bytes;
    uint64_t dropped_before = 0;
  };
  void Write();

  UniqueFd progress_;
  uint64_t bytes_ = 0;
  int64_t full_since_ns_ = 0;  // 0: it is not
  bool is_stalled_ = false;
  std::array<uint64_t, 2> dropped_unsaid_{};  // by stream: the next piece says it
  std::thread thread_;
  std::array<RotatedFile, 2> files_;  // the thread's

  Mutex mutex_;
  CondVar changed_;
  std::deque<Piece> pieces_ ABSL_GUARDED_BY(mutex_);
  size_t waiting_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t dropped_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool ends_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_RANK_OUTPUT_H_
