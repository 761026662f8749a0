// What the file system under a directory can do, found by trying, so that flush and restore use the
// best that is granted and say so.
#ifndef HOLDFAST_IO_MOUNT_PROBE_H_
#define HOLDFAST_IO_MOUNT_PROBE_H_

#include <cstdint>
#include <map>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "io/file_system.h"

namespace holdfast {

struct MountFacts {
  std::string file_system;        // "ext4", "xfs", "tmpfs", "nfs", "lustre", ...; else "0x<magic>"
  bool direct_supported = false;  // CreateSized and OpenForRead take Caching::kDirect
  std::string direct_refusal;     // why not; empty if supported
  uint64_t alignment_bytes = 4096;  // of offsets, lengths and addresses of direct transfers
  bool links_supported = false;     // FileSystem::Link publishes
  uint64_t transfer_bytes = uint64_t{4} << 20;  // good size of one transfer
  uint32_t transfers_in_flight = 16;            // good number of them at once

  Caching caching() const { return direct_supported ? Caching::kDirect : Caching::kBuffered; }
  // For transfers of whole blocks of so many bytes (a power of two). The refusal is empty if direct
  // ones work, else it says why not: no support, or blocks smaller than the alignment.
  std::string DirectRefusal(uint64_t block_bytes) const;
  // One line for people: "ext4, O_DIRECT aligned to 512 bytes, links, 16 transfers of 4194304
  // bytes" or "tmpfs, buffered (<refusal>), ...".
  std::string Describe() const;
  friend bool operator==(const MountFacts&, const MountFacts&) = default;
};

// Threads: any; calls block on storage. Lifetime: `file_system` outlives it.
class MountProbe {
 public:
  // `cache_directory`: exists and is this user's own, or empty for no cache. What is found is kept
  // there, one file per mount and boot of the machine, with a checksum; a damaged or foreign one is
  // ignored and replaced. A cache that cannot be written is no error.
  MountProbe(FileSystem& file_system, std::string cache_directory);

  // The facts of the mount that holds `directory`, which must be writable: the trial makes up to
  // two files named .holdfast-probe.* there and removes them. A mount is tried once per MountProbe.
  // Errors: those of FileSystem, if not even an ordinary file can be created.
  absl::StatusOr<MountFacts> Probe(const std::string& directory);

  // Trials made, not taken from a cache.
  uint64_t trial_count() const;

 private:
  absl::StatusOr<MountFacts> Try(const std::string& directory);
  void WriteCache(const std::string& path, const std::string& text);

  FileSystem& file_system_;
  const std::string cache_directory_;
  mutable Mutex mutex_;
  std::map<std::string, MountFacts> known_ ABSL_GUARDED_BY(mutex_);
  uint64_t trial_count_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_IO_MOUNT_PROBE_H_
