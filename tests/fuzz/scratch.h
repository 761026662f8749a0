// Where targets let libhdf5 build: in memory where there is such a place, since they build
// hundreds.
#ifndef HOLDFAST_TESTS_FUZZ_SCRATCH_H_
#define HOLDFAST_TESTS_FUZZ_SCRATCH_H_

#include <unistd.h>

#include <string>

namespace holdfast::fuzz {

inline std::string ScratchDirectory() {
  return access("/dev/shm", W_OK | X_OK) == 0 ? "/dev/shm" : ".";
}

}  // namespace holdfast::fuzz

#endif  // HOLDFAST_TESTS_FUZZ_SCRATCH_H_
