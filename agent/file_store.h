// The coordination store of one node, or of the node that holds it: plain files under
// `<root>/<job>/`, written through FileSystem, so that crash enumeration covers it. It has no
// fail-over; a cluster uses etcd.
//
//   <root>/<job>/JOB.json                          uuid of the job
//   <root>/<job>/store/attempt-<n>.json            AttemptRecord; the greatest n is the newest
//   <root>/<job>/store/attempt-<n>.restore.json    RestorePoint of attempt n
//
// Every record is sealed JSON (last line: CRC32C of what is before it) and is published: contents,
// sync, link under its final name (fails if the name exists: that is the compare-and-set), sync of
// the directory (checkpoint/publish.h). No record is ever changed or removed, but one that was torn
// while it was published, so that nobody was told of it.
#ifndef HOLDFAST_AGENT_FILE_STORE_H_
#define HOLDFAST_AGENT_FILE_STORE_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "checkpoint/coordination_store.h"
#include "io/file_system.h"

namespace holdfast {

// Threads: one call at a time per job; calls of different jobs from any threads.
// Lifetime: the FileSystem and the clock outlive it.
class FileStore final : public CoordinationStore {
 public:
  struct Options {
    std::string root;  // exists
    // Makes names of partial files unique among all processes that ever wrote in the root, e.g.
    // 16 random hexadecimal digits. [a-z0-9]{1,32}
    std::string writer;
    // Makes a new job's uuid (RFC 4122, version 4). Called on the thread of the call.
    std::function<std::string()> make_uuid;
  };
  FileStore(FileSystem& file_system, const Clock& clock, Options options);

  // Also makes the directories that the calls below need: call it first.
  // kInvalidArgument: the job's name (format/manifest.h). kDataLoss: JOB.json is damaged, or is
  // that of a job of another name.
  absl::StatusOr<std::string> JobUuid(const std::string& job) override;
  absl::StatusOr<AttemptRecord> NewestAttempt(const std::string& job) override;
  absl::Status BeginAttempt(const std::string& job, const AttemptRecord& record) override;
  absl::StatusOr<RestorePoint> DecideRestorePoint(const std::string& job, Attempt attempt,
                                                  const RestorePoint& proposed) override;
  absl::StatusOr<RestorePoint> GetRestorePoint(const std::string& job, Attempt attempt) override;

 private:
  std::string JobDirectory(const std::string& job) const;
  std::string StoreDirectory(const std::string& job) const;
  absl::Status Publish(const std::string& directory, const std::string& name,
                       const std::string& bytes, std::function<bool(const std::string&)> is_whole);
  absl::StatusOr<bool> HasOnlyBegun(const std::string& job);
  absl::StatusOr<bool> HasPublished(const std::string& job, Attempt attempt);
  absl::StatusOr<std::string> ReadUuid(const std::string& job);
  absl::StatusOr<std::optional<Attempt>> GreatestAttempt(const std::string& job);

  FileSystem& file_system_;
  const Clock& clock_;  // for people: when a job was created
  const Options options_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_FILE_STORE_H_
