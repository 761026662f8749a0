#include "checkpoint/shared_mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

// Not WRITE: both sides write. SEAL, so that the other process cannot forbid future mappings, which
// a restarted worker needs.
constexpr int kSharedSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr int kConstantSeals = kSharedSeals | F_SEAL_WRITE;
// What makes the bytes of somebody else's memfd constant; a WRITE seal can never be taken off.
constexpr int kConstantSealsNeeded = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

absl::StatusOr<uint64_t> SizeOf(int fd, const std::string& name) {
  struct stat info;
  if (fstat(fd, &info) != 0) return ErrnoStatus(errno, "fstat", name);
  return static_cast<uint64_t>(info.st_size);
}

absl::StatusOr<UniqueFd> MakeMemfd(const std::string& name) {
  UniqueFd fd(memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return ErrnoStatus(errno, "memfd_create", name);
  return fd;
}

absl::StatusOr<std::span<std::byte>> Map(int fd, const std::string& name, uint64_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) return ErrnoStatus(errno, "mmap", name);
  // A child (the keeper is restarted by fork) has no use for it. Best effort, as huge pages are.
  (void)madvise(address, bytes, MADV_DONTFORK);
  (void)madvise(address, bytes, MADV_HUGEPAGE);
  return std::span<std::byte>(static_cast<std::byte*>(address), bytes);
}

}  // namespace

absl::StatusOr<std::shared_ptr<SharedMapping>> SharedMapping::Create(const std::string& name,
                                                                     uint64_t bytes) {
  ASSIGN_OR_RETURN(UniqueFd fd, MakeMemfd(name));
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) {
    return ErrnoStatus(errno, "ftruncate", name);
  }
  if (fcntl(fd.get(), F_ADD_SEALS, kSharedSeals) != 0) return ErrnoStatus(errno, "seal", name);
  ASSIGN_OR_RETURN(const std::span<std::byte> mapped, Map(fd.get(), name, bytes));
  return std::shared_ptr<SharedMapping>(new SharedMapping(std::move(fd), mapped));
}

absl::StatusOr<std::shared_ptr<SharedMapping>> SharedMapping::Reopen(const std::string& name,
                                                                     UniqueFd fd,
                                                                     uint64_t bytes_min) {
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals != kSharedSeals) {
    return absl::DataLossError(
        absl::StrFormat("%s: expected a memfd with seals 0x%x, found %s", name, kSharedSeals,
                        seals < 0 ? "none" : absl::StrFormat("0x%x", seals)));
  }
  ASSIGN_OR_RETURN(const uint64_t bytes, SizeOf(fd.get(), name));
  if (bytes < bytes_min || bytes == 0) {
    return absl::DataLossError(
        absl::StrFormat("%s: expected at least %d bytes, found %d", name, bytes_min, bytes));
  }
  ASSIGN_OR_RETURN(const std::span<std::byte> mapped, Map(fd.get(), name, bytes));
  return std::shared_ptr<SharedMapping>(new SharedMapping(std::move(fd), mapped));
}

SharedMapping::~SharedMapping() {
  if (!leaked_) munmap(bytes_.data(), bytes_.size());
}

absl::StatusOr<UniqueFd> SealedMemory(const std::string& name, std::span<const std::byte> bytes) {
  ASSIGN_OR_RETURN(UniqueFd fd, MakeMemfd(name));
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t written = write(fd.get(), bytes.data() + done, bytes.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return ErrnoStatus(errno, "write", name);
    done += static_cast<size_t>(written);
  }
  if (fcntl(fd.get(), F_ADD_SEALS, kConstantSeals) != 0) return ErrnoStatus(errno, "seal", name);
  return fd;
}

absl::StatusOr<std::string> ReadSealedMemory(const std::string& what, int fd, uint64_t bytes,
                                             uint64_t bytes_max) {
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & kConstantSealsNeeded) != kConstantSealsNeeded) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: expected a memfd with seals 0x%x (shrink, grow, write), found %s", what,
        kConstantSealsNeeded, seals < 0 ? "no memfd" : absl::StrFormat("0x%x", seals)));
  }
  ASSIGN_OR_RETURN(const uint64_t found, SizeOf(fd, what));
  if (found != bytes) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: expected %d bytes as announced, found %d", what, bytes, found));
  }
  if (bytes > bytes_max) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("%s: %d bytes, at most %d are read", what, bytes, bytes_max));
  }
  std::string text(bytes, '\0');
  for (uint64_t done = 0; done < bytes;) {
    const ssize_t got = pread(fd, text.data() + done, bytes - done, static_cast<off_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, "read", what);
    if (got == 0) return absl::InternalError(what + ": sealed memory ended early");
    done += static_cast<uint64_t>(got);
  }
  return text;
}

}  // namespace holdfast
