// Findings on disk: they survive the worker, the agent and the machine's power.
//
// Files `findings-<n>.jsonl` in one directory, lines `<crc32c> <JSON>\n`: the CRC32C of the JSON
// text as eight hexadecimal digits, and the whole record as it then was (monitor/finding_record.h).
// Of several lines with one id the last one holds, in the order of the numbers of the files, then
// of the lines. A line whose checksum is another, or which does not end, is ignored and said.
//
// Protocol of a new file, at the first write of this worker and whenever one has grown too large:
//   1. make the directory durable; create findings-<n+1>, write all records into it, sync it, sync
//      the directory;
//   2. remove the older files. Until then, whatever is lost of the new one is in the old ones.
//   3. append and sync.
// After a failed write the file is left as it is, and the next write begins with a new one.
#ifndef HOLDFAST_AGENT_MONITOR_VERDICT_STORE_H_
#define HOLDFAST_AGENT_MONITOR_VERDICT_STORE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/executor.h"
#include "io/file_system.h"
#include "monitor/finding_log.h"

namespace holdfast {

// Threads: the event loop's; writes go through the pool, one at a time.
// Lifetime: the world outlives it; what is being written when it goes is written or not.
class VerdictStore {
 public:
  static constexpr size_t kFileBytesMax = size_t{128} << 20;  // a larger one is not read
  // A new one begins beyond this, and beyond twice what it began with.
  static constexpr size_t kFileBytes = size_t{4} << 20;
  static constexpr size_t kFilesMax = 1000;    // listed
  static constexpr size_t kWaitingMax = 4096;  // lines; beyond, a new file begins

  struct Options {
    std::string directory;  // made if missing; its parent exists
    // All records, for a new file. Called on the loop.
    std::function<std::vector<const monitor::FindingRecord*>()> records;
    std::function<void(const std::string&)> warn;
  };
  VerdictStore(Options options, FileSystem& file_system, WorkPool& pool);
  ~VerdictStore();
  VerdictStore(const VerdictStore&) = delete;
  VerdictStore& operator=(const VerdictStore&) = delete;

  // What is there; what could not be read was said. Blocks; once, before Put.
  std::vector<monitor::FindingRecord> Load();

  // The record as it is now is durable soon.
  void Put(const monitor::FindingRecord& record);

  // Lines not durable yet; and writes that failed, since the start.
  size_t waiting_count() const { return waiting_.size() + (writing_ ? 1 : 0); }
  uint64_t failure_count() const { return failure_count_; }

 private:
  struct Disk;

  void WriteNext();
  void Written(const absl::Status& status);

  const Options options_;
  FileSystem& file_system_;
  WorkPool& pool_;
  // Shared with the pool: touched by it while `writing_`, by the loop otherwise.
  std::shared_ptr<Disk> disk_;
  std::vector<std::string> waiting_;
  bool dirty_ = false;    // something was put that is not being written
  bool new_file_ = true;  // the next write begins one
  bool writing_ = false;
  bool failed_ = false;  // and said
  uint64_t failure_count_ = 0;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_MONITOR_VERDICT_STORE_H_
