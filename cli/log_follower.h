// Shows a log file as it grows, also when it is rotated (PATH becomes PATH.1 and a new PATH
// begins).
#ifndef HOLDFAST_CLI_LOG_FOLLOWER_H_
#define HOLDFAST_CLI_LOG_FOLLOWER_H_

#include <cstdint>
#include <string>

#include "io/unique_fd.h"

namespace holdfast::cli {

// Threads: one.
class LogFollower {
 public:
  // A line without an end is shown when it has grown so long.
  static constexpr size_t kLineBytesMax = size_t{1} << 20;

  // `prefix`: in front of each line, and only whole lines are shown; empty: bytes as they come.
  // `sink`: a descriptor; what cannot be written there is dropped.
  LogFollower(std::string path, std::string prefix, int sink);

  // Shows what there is. The file need not be there yet.
  void Advance();
  // The last of it: also a line without an end.
  void Finish();

 private:
  // False: nothing more now.
  bool ReadSome();
  void Show(const char* bytes, size_t count);

  const std::string path_;
  const std::string prefix_;
  const int sink_;
  UniqueFd file_;
  std::string partial_;
};

}  // namespace holdfast::cli

#endif  // HOLDFAST_CLI_LOG_FOLLOWER_H_
