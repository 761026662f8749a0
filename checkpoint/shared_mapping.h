// A memfd and its mapping in this process, made so that another process that has the descriptor can
// change bytes and nothing else: not the size, not the seals.
#ifndef HOLDFAST_CHECKPOINT_SHARED_MAPPING_H_
#define HOLDFAST_CHECKPOINT_SHARED_MAPPING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "io/unique_fd.h"

namespace holdfast {

// Threads: any; the bytes are what the two processes make of them. Not inherited by children.
// Lifetime: unmaps and closes in the destructor.
class SharedMapping {
 public:
  // A new memfd of `bytes` zeros (at least 1), sealed SHRINK, GROW and SEAL. `name` is for people
  // (/proc/<pid>/maps). Errors: kResourceExhausted.
  static absl::StatusOr<std::shared_ptr<SharedMapping>> Create(const std::string& name,
                                                               uint64_t bytes);
  // Maps what a former worker Create()d. Errors: kDataLoss if it is no memfd with these seals, or
  // is smaller than `bytes_min`; kResourceExhausted.
  static absl::StatusOr<std::shared_ptr<SharedMapping>> Reopen(const std::string& name, UniqueFd fd,
                                                               uint64_t bytes_min);
  ~SharedMapping();
  SharedMapping(const SharedMapping&) = delete;
  SharedMapping& operator=(const SharedMapping&) = delete;

  int fd() const { return fd_.get(); }
  std::span<std::byte> bytes() const { return bytes_; }

  // From now on the mapping stays for ever: the kernel may still refer to it.
  void Leak() { leaked_ = true; }

 private:
  SharedMapping(UniqueFd fd, std::span<std::byte> bytes) : fd_(std::move(fd)), bytes_(bytes) {}
  UniqueFd fd_;
  std::span<std::byte> bytes_;
  bool leaked_ = false;
};

// A memfd with these contents, sealed against every change, for messages to a trainer.
absl::StatusOr<UniqueFd> SealedMemory(const std::string& name, std::span<const std::byte> bytes);

// All bytes of a memfd that its maker (not trusted) has sealed against every change. Errors:
// kInvalidArgument, naming `what`: no memfd, seals missing, another size than `bytes`;
// kResourceExhausted: more than `bytes_max`.
absl::StatusOr<std::string> ReadSealedMemory(const std::string& what, int fd, uint64_t bytes,
                                             uint64_t bytes_max);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_SHARED_MAPPING_H_
