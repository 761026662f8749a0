// What both rings say when a transfer goes wrong. A ring knows only a descriptor; these find its
// path, at the price of a system call that only failures pay.
#ifndef HOLDFAST_IO_TRANSFER_ERRORS_H_
#define HOLDFAST_IO_TRANSFER_ERRORS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace holdfast {

// The path under which `fd` is open, as the kernel tells it; "fd 7" if it does not.
std::string PathOfDescriptor(int fd);

// The error of a system call on `fd`; `error_number` is a positive errno.
absl::Status TransferError(int error_number, const char* verb, int fd);

// For a read that got fewer bytes than asked: OK if the file goes on behind what was found, else
// kDataLoss ("truncated").
struct ShortRead {
  uint64_t offset_bytes = 0;  // of the whole transfer
  uint64_t asked_bytes = 0;
  uint64_t found_bytes = 0;
};
absl::Status CheckNotTruncated(int fd, const ShortRead& read);

}  // namespace holdfast

#endif  // HOLDFAST_IO_TRANSFER_ERRORS_H_
