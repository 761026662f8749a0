// Blocking transfers on a descriptor: for threads that may wait. What must not wait uses an IoRing
// (io/io_ring.h); io/thread_ring.cc is an IoRing over these.
//
// Threads: any. Errors as in io/file_system.h, and kDataLoss for a read past the end of the file
// ("truncated": expected and found lengths). Short transfers are continued inside.
#ifndef HOLDFAST_IO_TRANSFER_H_
#define HOLDFAST_IO_TRANSFER_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace holdfast {

// The most of one system call; the kernel moves at most about 2 GiB.
inline constexpr size_t kTransferPieceBytes = size_t{1} << 30;

// Writes all of `data` at offset_bytes. OK: visible, NOT durable. `piece_bytes`, a multiple of
// every alignment, is the most of one system call.
absl::Status WriteAll(int fd, uint64_t offset_bytes, std::span<const std::byte> data,
                      size_t piece_bytes = kTransferPieceBytes);

// Fills all of `data` from offset_bytes.
absl::Status ReadAll(int fd, uint64_t offset_bytes, std::span<std::byte> data,
                     size_t piece_bytes = kTransferPieceBytes);

// After OK what was written to the file before is durable. A failure is final for the file (see
// WritableFile::Sync).
absl::Status SyncAll(int fd);

}  // namespace holdfast

#endif  // HOLDFAST_IO_TRANSFER_H_
