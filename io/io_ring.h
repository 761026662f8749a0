// The seam to asynchronous transfers: images are written and read through it. Real ones:
// io/uring_ring.cc (io_uring) and io/thread_ring.cc (pread/pwrite on threads, where io_uring is
// denied); the simulated disk implements it too.
#ifndef HOLDFAST_IO_IO_RING_H_
#define HOLDFAST_IO_IO_RING_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "io/file_system.h"

namespace holdfast {

// Threads: all calls, making and destroying it included, on one thread, the event loop's;
//   completions run there too, never inside the call that submitted.
// Lifetime: the destructor waits for what is in flight, and drops the completions. Buffers and
//   files must live until their completion has run or the ring is gone. The FileSystem outlives
//   the ring.
class IoRing {
 public:
  // OK: the whole transfer was done: short transfers are continued inside. Reading past the end of
  // the file is kDataLoss ("truncated": expected and found lengths). Else as in file_system.h.
  using Done = std::function<void(absl::Status)>;

  virtual ~IoRing() = default;

  // Writes all of `data` at `offset_bytes`. OK: visible, NOT durable.
  virtual void Write(IoFile& file, uint64_t offset_bytes, std::span<const std::byte> data,
                     Done done) = 0;

  // Fills all of `data` from `offset_bytes`.
  virtual void Read(IoFile& file, uint64_t offset_bytes, std::span<std::byte> data, Done done) = 0;

  // OK: every write of this file whose completion ran before this call is durable. A failure is
  // final for the file (see WritableFile::Sync).
  virtual void Sync(IoFile& file, Done done) = 0;

  // Says that transfers in `memory` (a slice of a rank's, not registered yet) will be many: pins
  // and registers it where that is granted, else false; transfers work all the same. Unregister it,
  // or several slices that adjoin, before it goes away and with nothing of it in flight.
  virtual bool RegisterMemory(std::span<std::byte> memory) = 0;
  virtual void UnregisterMemory(std::span<std::byte> memory) = 0;

  // A descriptor that is readable when completions wait, for EventLoop::Watch; -1 in a simulation.
  virtual int event_fd() const = 0;
  // Runs the completions that are ready; never waits.
  virtual void RunCompletions() = 0;
  // Operations accepted and not completed. There is no limit here (the flush keeps to its depth);
  // what the kernel's ring cannot take waits in order inside.
  virtual size_t in_flight_count() const = 0;

  // One line for people: "io_uring, 64 entries, registered buffers" or
  // "threads (io_uring: EPERM)".
  virtual std::string Describe() const = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_IO_IO_RING_H_
