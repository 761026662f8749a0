// Faults of GPUs as NVIDIA's kernel driver reports them in the kernel's log ("Xid"), and what each
// code means for whoever uses the GPU.
//
//   NVRM: Xid (PCI:0000:3b:00): 79, pid=4711, name=python3, GPU has fallen off the bus.
//   NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', name=<unknown>, DBE ...
//
// The catalogue follows NVIDIA's Xid catalogue (its column of the immediate action) and the set of
// codes that NVIDIA's own health check drains a node on; codes that are not in it are shown, and
// conclude nothing.
#ifndef HOLDFAST_MONITOR_WITNESS_XID_H_
#define HOLDFAST_MONITOR_WITNESS_XID_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "monitor/testimony.h"

namespace holdfast::monitor {

// What is to be done about it at once.
enum class XidAction : uint8_t {
  kNone,        // informative, or another code says what is to be done
  kRestartApp,  // the process is done for; the GPU is usable. Mostly the program's own fault
  kResetGpu,    // the GPU must be reset before it is used again
  kDrain,       // the node should not be used: reset, reboot or repair
};

struct XidMeaning {
  int32_t code = 0;
  XidAction action{};
  std::string_view text;
};

// Null: not in the catalogue.
const XidMeaning* MeaningOfXid(int32_t code);
// All of it, ascending.
std::span<const XidMeaning> XidCatalogue();
std::string_view Name(XidAction action);

struct Xid {
  std::string pci_address;  // "0000:3b:00", lower case, without the function
  int32_t code = 0;
  int64_t process = -1;  // -1: not told
  std::string detail;    // the rest of the line, cut
};

// The Xid that a line of the kernel's log reports, or nothing. `line`: the text only, without the
// prefix of /dev/kmsg.
std::optional<Xid> ParseXid(std::string_view line);

// "00000000:3B:00.0" (NVML), "0000:3b:00.0" (sysfs) and "0000:3b:00" (the log) in the form of
// Xid::pci_address; empty if it is none of them.
std::string NormalPciAddress(std::string_view address);

// `ranks`: that use this GPU; empty: not known. `age`: of the line. Nothing for a code that says
// nothing about the GPU.
std::optional<Testimony> TestifyXid(const Xid& xid, std::span<const Rank> ranks,
                                    absl::Duration age);

}  // namespace holdfast::monitor

#endif  // HOLDFAST_MONITOR_WITNESS_XID_H_
