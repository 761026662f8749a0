#include "agent/monitor/mapped_board.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <x86intrin.h>

#include "absl/strings/str_format.h"

namespace holdfast {

absl::StatusOr<std::shared_ptr<MappedBoard>> MappedBoard::Map(int fd) {
  struct stat file {};
  if (fstat(fd, &file) != 0 || !S_ISREG(file.st_mode)) {
    return absl::InvalidArgumentError("monitor board: expected a memfd, found another descriptor");
  }
  // So that no read runs off its end.
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return absl::InvalidArgumentError(
        "monitor board: expected a memfd sealed against shrinking, found one that is not");
  }
  if (static_cast<uint64_t>(file.st_size) != abi::kBoardBytes) {
    return absl::InvalidArgumentError(absl::StrFormat("monitor board: expected %d bytes, found %d",
                                                      abi::kBoardBytes, file.st_size));
  }
  std::shared_ptr<MappedBoard> board(new MappedBoard());
  board->device_ = file.st_dev;
  board->inode_ = file.st_ino;
  void* const memory = mmap(nullptr, abi::kBoardBytes, PROT_READ, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("monitor board: mmap of %d bytes: %s", abi::kBoardBytes, strerror(errno)));
  }
  board->memory_ = memory;
  board->view_ = abi::ViewBoard(static_cast<const std::byte*>(memory), abi::kBoardBytes);
  if (board->view_.header == nullptr) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "monitor board: expected version %d, found no board of it", abi::kBoardVersion));
  }
  void* const requests = mmap(nullptr, sizeof(abi::BoardRequests), PROT_READ | PROT_WRITE,
                              MAP_SHARED, fd, static_cast<off_t>(abi::kBoardRequestsAt));
  if (requests == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("monitor board: mmap of its requests for writing: %s", strerror(errno)));
  }
  board->requests_ = static_cast<abi::BoardRequests*>(requests);
  return board;
}

MappedBoard::~MappedBoard() {
  if (memory_ != nullptr) munmap(const_cast<void*>(memory_), abi::kBoardBytes);
  if (requests_ != nullptr) munmap(requests_, sizeof(abi::BoardRequests));
}

uint64_t MappedBoard::NowTicks() const {
  if (view_.header->clock == abi::BoardClock::kTsc) return __rdtsc();
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

double MappedBoard::Seconds(uint64_t ticks) const {
  const uint64_t rate = view_.header->ticks_per_second;
  return rate == 0 ? 0.0 : static_cast<double>(ticks) / static_cast<double>(rate);
}

}  // namespace holdfast
