#include "monitor/witness/gpu.h"

#include <algorithm>
#include <map>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "monitor/witness/xid.h"

namespace holdfast::monitor {
namespace {

constexpr size_t kProcessesMax = 1024;

template <typename T>
void Take(const JsonValue& value, std::optional<T>& out) {
  const absl::StatusOr<uint64_t> number = value.Uint64();
  if (number.ok() && *number <= std::numeric_limits<T>::max()) out = static_cast<T>(*number);
}

// The width that most have; 0 if none is told.
uint32_t CommonWidth(std::span<const GpuReading> gpus) {
  std::map<uint32_t, size_t> count;
  uint32_t common = 0;
  for (const GpuReading& gpu : gpus) {
    if (gpu.pcie_width.has_value()) ++count[*gpu.pcie_width];
  }
  for (const auto& [width, number] : count) {
    if (common == 0 || number >= count[common]) common = width;
  }
  return common;
}

}  // namespace

absl::StatusOr<std::vector<GpuReading>> ParseGpuReadings(std::string text) {
  ASSIGN_OR_RETURN(
      const std::unique_ptr<JsonDocument> document,
      JsonDocument::Parse(std::move(text), {.bytes_max = kGpuTextBytesMax, .values_max = 100'000}));
  ASSIGN_OR_RETURN(const JsonValue list, document->root().Get("gpus"));
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  std::vector<GpuReading> gpus;
  for (size_t i = 0; i < std::min(count, kGpusMax); ++i) {
    const JsonValue value = list[i];
    GpuReading gpu;
    ASSIGN_OR_RETURN(const JsonValue index, value.Get("index"));
    ASSIGN_OR_RETURN(const uint64_t number, index.Uint64());
    gpu.index = static_cast<uint32_t>(std::min<uint64_t>(number, UINT32_MAX));
    const absl::StatusOr<std::string_view> address = value.Find("pci_address").String();
    if (address.ok()) gpu.pci_address = NormalPciAddress(*address);
    gpu.trouble = CutText(std::string(value.Find("trouble").String().value_or("")));
    gpu.lost = value.Find("lost").Bool().value_or(false);
    Take(value.Find("throttle_reasons"), gpu.throttle_reasons);
    Take(value.Find("ecc_uncorrected"), gpu.ecc_uncorrected);
    Take(value.Find("ecc_corrected"), gpu.ecc_corrected);
    Take(value.Find("pcie_width"), gpu.pcie_width);
    Take(value.Find("pcie_width_max"), gpu.pcie_width_max);
    Take(value.Find("pcie_generation"), gpu.pcie_generation);
    Take(value.Find("pcie_generation_max"), gpu.pcie_generation_max);
    const JsonValue processes = value.Find("processes");
    const size_t process_count = processes.ArraySize().value_or(0);
    for (size_t p = 0; p < std::min(process_count, kProcessesMax); ++p) {
      if (const auto process = processes[p].Int64(); process.ok())
        gpu.processes.push_back(*process);
    }
    gpus.push_back(std::move(gpu));
  }
  return gpus;
}

std::vector<Testimony> TestifyGpus(std::span<const GpuReading> gpus, const RanksOfGpu& ranks_of) {
  const uint32_t common_width = CommonWidth(gpus);
  std::vector<Testimony> said;
  for (const GpuReading& gpu : gpus) {
    std::vector<std::string> reasons;
    const uint64_t throttle = gpu.throttle_reasons.value_or(0);
    if ((throttle & kThrottleHardwareThermal) != 0) reasons.push_back("it is too hot (hardware)");
    if ((throttle & kThrottleSoftwareThermal) != 0) reasons.push_back("it is too hot (driver)");
    if ((throttle & kThrottlePowerBrake) != 0) reasons.push_back("the power supply brakes it");
    if (throttle != 0 && reasons.empty() && (throttle & kThrottleHardwareSlowdown) != 0) {
      reasons.push_back("the hardware slows it down");
    }
    if (gpu.ecc_uncorrected.value_or(0) > 0) {
      reasons.push_back(absl::StrFormat("%d uncorrected ECC errors", *gpu.ecc_uncorrected));
    }
    if (gpu.pcie_width.has_value() && *gpu.pcie_width < common_width) {
      reasons.push_back(absl::StrFormat("its PCIe link has %d lanes, that of most GPUs here %d",
                                        *gpu.pcie_width, common_width));
    }
    if (reasons.empty() && !gpu.lost) continue;
    Testimony testimony;
    testimony.source = Source::kNvml;
    testimony.claim = gpu.lost ? Claim::kGpuFault : Claim::kGpuImpaired;
    testimony.ranks = ranks_of(gpu);
    std::sort(testimony.ranks.begin(), testimony.ranks.end());
    if (testimony.ranks.size() > kTestimonyRanksMax) testimony.ranks.resize(kTestimonyRanksMax);
    testimony.group = gpu.pci_address;
    testimony.certainty = gpu.lost ? 0.95 : 0.8;
    std::vector<uint32_t> numbers;
    for (const Rank rank : testimony.ranks) numbers.push_back(Value(rank));
    testimony.sentence = CutText(absl::StrFormat(
        "GPU %d (%s)%s %s", gpu.index, gpu.pci_address,
        numbers.empty() ? "" : absl::StrCat(" of rank ", absl::StrJoin(numbers, ", ")),
        gpu.lost ? absl::StrCat("is lost: ", gpu.trouble)
                 : absl::StrCat("is held back: ", absl::StrJoin(reasons, "; "))));
    said.push_back(std::move(testimony));
  }
  return said;
}

}  // namespace holdfast::monitor
