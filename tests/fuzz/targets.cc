#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

constexpr Target kTargets[] = {
    {"json", FuzzJson, Form::kText, 1 * kMiB, 64, true, 20'000},
    {"layout", FuzzLayout, Form::kText, 512 * kMiB, 128, true, 6'000},
    {"layout_rules", FuzzLayoutRules, Form::kText, 512 * kMiB, 128, true, 3'000},
    {"index", FuzzIndex, Form::kIndex, 512 * kMiB, 128, true, 6'000},
    {"sealed_files", FuzzSealedFiles, Form::kSealedText, 1 * kMiB, 64, true, 10'000},
    {"names", FuzzNames, Form::kBinary, 1 * kMiB, 64, true, 20'000},
    {"image", FuzzImage, Form::kBinary, 64 * kMiB, 64, false, 2'000},
    {"image_record", FuzzImageRecord, Form::kImageRecord, 1 * kMiB, 64, true, 4'000},
    {"registration", FuzzRegistration, Form::kRegistration, 512 * kMiB, 128, false, 3'000},
    {"packet", FuzzPacket, Form::kBinary, 1 * kMiB, 64, true, 5'000},
    {"board", FuzzBoard, Form::kBinary, 4 * kMiB, 64, true, 5'000},
    {"selection", FuzzSelection, Form::kBinary, 1 * kMiB, 128, true, 20'000},
    {"recorded_step", FuzzRecordedStep, Form::kBinary, 16 * kMiB, 256, true, 10'000},
    {"recording", FuzzRecording, Form::kBinary, 256 * kMiB, 64, true, 5'000},
    {"flight_record", FuzzFlightRecord, Form::kBinary, 1 * kMiB, 256, true, 10'000},
    {"pickle", FuzzPickle, Form::kBinary, 1 * kMiB, 256, true, 20'000},
    {"zip", FuzzZip, Form::kBinary, 4 * kMiB, 64, true, 10'000},
    {"torch", FuzzTorch, Form::kBinary, 4 * kMiB, 512, true, 10'000},
    {"safetensors", FuzzSafetensors, Form::kText, 1 * kMiB, 128, true, 10'000},
    {"foreign_index", FuzzForeignIndex, Form::kBinary, 1 * kMiB, 256, true, 10'000},
    {"dcp_metadata", FuzzDcpMetadata, Form::kBinary, 1 * kMiB, 512, true, 5'000},
    {"shard_rules", FuzzShardRules, Form::kText, 128 * kMiB, 128, true, 3'000},
    {"mapping", FuzzMapping, Form::kText, 1024 * kMiB, 128, true, 3'000},
    {"renames", FuzzRenames, Form::kText, 256 * kMiB, 512, true, 3'000},
    {"ras", FuzzRas, Form::kText, 1 * kMiB, 128, true, 10'000},
    {"stacks", FuzzStacks, Form::kText, 4 * kMiB, 512, true, 5'000},
};

}  // namespace

std::span<const Target> Targets() { return kTargets; }

const Target* FindTarget(std::string_view name) {
  for (const Target& target : kTargets) {
    if (target.name == name) return &target;
  }
  return nullptr;
}

}  // namespace holdfast::fuzz
