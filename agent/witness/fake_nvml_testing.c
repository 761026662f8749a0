// A libnvidia-ml.so.1 for tests.
// Model: two GPUs, the first at 3B:00 with this process's parent as its user, the second at AF:00.
//   $HOLDFAST_FAKE_NVML: healthy; hot (the first is throttled and has a narrow link); lost (the second
//   is); absent (init fails); hang (init never returns).
// Not modelled: everything that agent/witness/nvml.cc does not call.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { kSuccess = 0, kInvalidArgument = 2, kDriverNotLoaded = 9, kGpuIsLost = 15 };
#define EXPORT __attribute__((visibility("default")))

static int Is(const char* mode) {
  const char* set = getenv("HOLDFAST_FAKE_NVML");
  return set != NULL && strcmp(set, mode) == 0;
}
static int IndexOf(void* device) { return (int)((char*)device - (char*)0x1000); }

EXPORT int nvmlInit_v2(void) {
  if (Is("hang")) {
    for (;;) pause();
  }
  return Is("absent") ? kDriverNotLoaded : kSuccess;
}
EXPORT int nvmlShutdown(void) { return kSuccess; }
EXPORT const char* nvmlErrorString(int result) {
  return result == kGpuIsLost ? "GPU is lost" : result == kDriverNotLoaded ? "Driver Not Loaded" : "?";
}
EXPORT int nvmlSystemGetDriverVersion(char* text, unsigned size) {
  snprintf(text, size, "599.1");
  return kSuccess;
}
EXPORT int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = 2;
  return kSuccess;
}
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  if (index == 1 && Is("lost")) return kGpuIsLost;
  *device = (char*)0x1000 + index;
  return index < 2 ? kSuccess : kInvalidArgument;
}
struct Pci {
  char legacy[16];
  unsigned numbers[5];
  char id[32];
};
EXPORT int nvmlDeviceGetPciInfo_v3(void* device, struct Pci* pci) {
  snprintf(pci->id, sizeof(pci->id), "00000000:%s:00.0", IndexOf(device) == 0 ? "3B" : "AF");
  return kSuccess;
}
EXPORT int nvmlDeviceGetCurrentClocksThrottleReasons(void* device, unsigned long long* reasons) {
  // The power cap (4) is how a busy GPU runs.
  *reasons = IndexOf(device) == 0 && Is("hot") ? 0x40 | 0x8 | 0x4 : 0x4;
  return kSuccess;
}
EXPORT int nvmlDeviceGetTotalEccErrors(void* device, int type, int counter, unsigned long long* count) {
  (void)device;
  if (counter != 0) return kInvalidArgument;
  *count = type == 0 ? 5 : 0;
  return kSuccess;
}
EXPORT int nvmlDeviceGetCurrPcieLinkWidth(void* device, unsigned* width) {
  *width = IndexOf(device) == 0 && Is("hot") ? 4 : 16;
  return kSuccess;
}
EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned* count, void* processes) {
  if (IndexOf(device) == 0 && *count > 0) {
    *(unsigned*)processes = (unsigned)getppid();
    *count = 1;
  } else {
    *count = 0;
  }
  return kSuccess;
}
