// How fast a directory's storage is: large writes and their sync, small writes each with a sync,
// large reads, past the page cache where the file system can do that, through the same io/ as
// checkpoints.
#ifndef HOLDFAST_PREFLIGHT_MEASURE_DISK_H_
#define HOLDFAST_PREFLIGHT_MEASURE_DISK_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "io/file_system.h"

namespace holdfast::preflight {

// Of the one file, which is written over and over, or a quarter of the space that is left.
inline constexpr uint64_t kDiskFileBytes = uint64_t{256} << 20;
// Less space than for this cannot be measured.
inline constexpr uint64_t kDiskFileBytesMin = uint64_t{8} << 20;
// Small and few, so that a dying disk does not keep us for long after the time is up.
inline constexpr uint64_t kDiskTransferBytes = uint64_t{1} << 20;
inline constexpr uint32_t kDiskTransfersInFlight = 8;

struct DiskSpeed {
  double write_bytes_per_second = 0;  // the sync at the end included
  double sync_seconds = 0;            // of a small write and its sync: the median
  double read_bytes_per_second = 0;
  std::string description;  // "ext4, O_DIRECT, io_uring ...", or "tmpfs, buffered: ..."
};

// In `directory`, which exists and is writable. The file has no name while it is measured, so that
// nothing is left behind whatever happens. Takes `duration`, and what the last transfers need:
// storage that does not answer at all cannot be given up, here or by anybody.
// Errors: those of FileSystem and IoRing; kResourceExhausted (less space than kDiskFileBytesMin).
absl::StatusOr<DiskSpeed> MeasureDisk(FileSystem& file_system, const std::string& directory,
                                      absl::Duration duration);

}  // namespace holdfast::preflight

#endif  // HOLDFAST_PREFLIGHT_MEASURE_DISK_H_
