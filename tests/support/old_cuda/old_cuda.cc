// A libcuda.so.1 of CUDA 9.2, as far as it matters: it says its version and has nothing that
// capture needs. For the test of what is said of a driver that is too old.
#include "hook/device_driver.h"

extern "C" holdfast::hook::CuResult cuDriverGetVersion(int* version) {
  *version = 9020;
  return holdfast::hook::CuResult::kSuccess;
}
