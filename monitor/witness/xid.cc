#include "monitor/witness/xid.h"

#include <algorithm>
#include <array>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"

namespace holdfast::monitor {
namespace {

constexpr size_t kDetailBytesMax = 200;

// Of the codes in NVIDIA's catalogue those that a training job meets. Its actions RESTART_APP,
// RESET_GPU and RESTART_BM are kRestartApp, kResetGpu and kDrain; where the catalogue names a
// workflow, what that comes to. The fatal ones that NVIDIA's health check drains a node on, and
// failures of a repair, are kDrain.
constexpr std::array kCatalogue = std::to_array<XidMeaning>({
    {8, XidAction::kRestartApp, "the GPU stopped processing this program's work"},
    {11, XidAction::kRestartApp, "invalid or corrupted push buffer"},
    {13, XidAction::kRestartApp, "graphics engine exception, mostly an illegal access of a kernel"},
    {31, XidAction::kRestartApp, "memory page fault, mostly an illegal address of a kernel"},
    {32, XidAction::kRestartApp, "invalid or corrupted push buffer (DMA)"},
    {43, XidAction::kNone, "the program's own fault stopped its channel"},
    {45, XidAction::kNone, "the driver cleans up after a program that has ended or failed"},
    {46, XidAction::kResetGpu, "the GPU does not answer the driver"},
    {48, XidAction::kDrain, "uncorrectable ECC error"},
    {62, XidAction::kResetGpu, "the power controller of the GPU has halted"},
    {63, XidAction::kNone, "a memory row is to be remapped"},
    {64, XidAction::kDrain, "a memory row could not be remapped"},
    {69, XidAction::kRestartApp, "graphics engine class error"},
    {74, XidAction::kResetGpu, "NVLink error"},
    {79, XidAction::kDrain, "the GPU has fallen off the bus"},
    {92, XidAction::kNone, "many corrected ECC errors"},
    {94, XidAction::kRestartApp, "uncorrectable memory error, contained to one program"},
    {95, XidAction::kDrain, "uncorrectable memory error, not contained"},
    {109, XidAction::kResetGpu, "context switch timed out"},
    {110, XidAction::kResetGpu, "security engine fault"},
    {119, XidAction::kResetGpu, "the GPU's system processor (GSP) does not answer"},
    {120, XidAction::kResetGpu, "error of the GPU's system processor (GSP)"},
    {121, XidAction::kNone, "chip-to-chip link error, corrected"},
    {136, XidAction::kResetGpu, "NVLink training failed"},
    {137, XidAction::kNone, "NVLink fault that a remote program caused"},
    {140, XidAction::kDrain, "unrecovered ECC error"},
    {143, XidAction::kDrain, "the GPU could not be initialised"},
    {144, XidAction::kResetGpu, "NVLink error (SAW)"},
    {145, XidAction::kResetGpu, "NVLink error (RLW)"},
    {146, XidAction::kResetGpu, "NVLink error (TLW)"},
    {147, XidAction::kResetGpu, "NVLink error (TREX)"},
    {148, XidAction::kResetGpu, "NVLink error (NVLPW)"},
    {149, XidAction::kResetGpu, "NVLink error (NETIR)"},
    {150, XidAction::kResetGpu, "NVLink error (MSE)"},
    {151, XidAction::kResetGpu, "key rotation failed"},
    {154, XidAction::kNone, "the recommended recovery of the GPU has changed"},
    {155, XidAction::kResetGpu, "NVLink error that software defined"},
    {156, XidAction::kResetGpu, "a resource of the GPU is to be retired"},
    {158, XidAction::kResetGpu, "fatal time-out of the GPU"},
    {160, XidAction::kDrain, "a memory channel is to be retired"},
});

bool IsHex(absl::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), absl::ascii_isxdigit);
}

// Takes the text before `end` and `end` itself from the front; nothing if it is not there.
std::optional<absl::string_view> ConsumeTo(absl::string_view* text, absl::string_view end) {
  const size_t at = text->find(end);
  if (at == absl::string_view::npos) return std::nullopt;
  const absl::string_view before = text->substr(0, at);
  text->remove_prefix(at + end.size());
  return before;
}

}  // namespace

std::span<const XidMeaning> XidCatalogue() { return kCatalogue; }

const XidMeaning* MeaningOfXid(int32_t code) {
  const auto found = std::lower_bound(
      kCatalogue.begin(), kCatalogue.end(), code,
      [](const XidMeaning& meaning, int32_t wanted) { return meaning.code < wanted; });
  return found != kCatalogue.end() && found->code == code ? &*found : nullptr;
}

std::string_view Name(XidAction action) {
  switch (action) {
    case XidAction::kNone:
      return "none";
    case XidAction::kRestartApp:
      return "restart-app";
    case XidAction::kResetGpu:
      return "reset-gpu";
    case XidAction::kDrain:
      return "drain";
  }
  return "none";
}

std::string NormalPciAddress(std::string_view address) {
  absl::string_view rest(address.data(), address.size());
  const auto domain = ConsumeTo(&rest, ":");
  const auto bus = ConsumeTo(&rest, ":");
  if (!domain.has_value() || !bus.has_value()) return "";
  const absl::string_view device = rest.substr(0, rest.find('.'));
  uint32_t domain_number = 0;
  if (!IsHex(*domain) || domain->size() > 8 || !IsHex(*bus) || bus->size() > 2 || !IsHex(device) ||
      device.size() > 2 || !absl::SimpleHexAtoi(*domain, &domain_number)) {
    return "";
  }
  return absl::AsciiStrToLower(absl::StrFormat("%04x:%02s:%02s", domain_number, *bus, device));
}

std::optional<Xid> ParseXid(std::string_view line) {
  absl::string_view rest(line.data(), line.size());
  if (!ConsumeTo(&rest, "NVRM: Xid (").has_value()) return std::nullopt;
  auto address = ConsumeTo(&rest, "):");
  if (!address.has_value()) return std::nullopt;
  absl::ConsumePrefix(&*address, "PCI:");
  Xid xid;
  xid.pci_address = NormalPciAddress(std::string_view(address->data(), address->size()));
  if (xid.pci_address.empty()) return std::nullopt;
  rest = absl::StripLeadingAsciiWhitespace(rest);
  size_t digits = 0;
  while (digits < rest.size() && absl::ascii_isdigit(static_cast<unsigned char>(rest[digits]))) {
    ++digits;
  }
  if (!absl::SimpleAtoi(rest.substr(0, digits), &xid.code) || xid.code < 0) return std::nullopt;
  rest.remove_prefix(digits);
  absl::ConsumePrefix(&rest, ",");
  rest = absl::StripAsciiWhitespace(rest);
  if (absl::string_view process = rest; absl::ConsumePrefix(&process, "pid=")) {
    int64_t number = 0;
    const absl::string_view text = process.substr(0, process.find_first_of(", "));
    if (absl::SimpleAtoi(text, &number) && number > 0) xid.process = number;
  }
  xid.detail = std::string(rest.substr(0, kDetailBytesMax));
  return xid;
}

std::optional<Testimony> TestifyXid(const Xid& xid, std::span<const Rank> ranks,
                                    absl::Duration age) {
  const XidMeaning* const meaning = MeaningOfXid(xid.code);
  Testimony testimony;
  testimony.source = Source::kKernelLog;
  testimony.claim = Claim::kGpuFault;
  testimony.ranks.assign(ranks.begin(), ranks.end());
  std::sort(testimony.ranks.begin(), testimony.ranks.end());
  if (testimony.ranks.size() > kTestimonyRanksMax) testimony.ranks.resize(kTestimonyRanksMax);
  testimony.group = xid.pci_address;
  testimony.code = xid.code;
  testimony.age = age;
  const XidAction action = meaning == nullptr ? XidAction::kNone : meaning->action;
  switch (action) {
    case XidAction::kNone:
      return std::nullopt;
    case XidAction::kRestartApp:
      testimony.certainty = 0.6;  // that the program must be restarted; mostly not the GPU's fault
      break;
    case XidAction::kResetGpu:
      testimony.certainty = 0.85;  // work on it is lost; it may be usable after a reset
      break;
    case XidAction::kDrain:
      testimony.certainty = 0.95;
      break;
  }
  std::vector<uint32_t> numbers;
  for (const Rank rank : testimony.ranks) numbers.push_back(Value(rank));
  testimony.sentence = CutText(
      absl::StrFormat("the driver reported Xid %d (%s) on the GPU at %s%s", xid.code, meaning->text,
                      xid.pci_address,
                      numbers.empty() ? "; which rank uses it is not known"
                                      : absl::StrCat(" of rank ", absl::StrJoin(numbers, ", "))));
  return testimony;
}

}  // namespace holdfast::monitor
