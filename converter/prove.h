// Reads a foreign checkpoint completely and says what is wrong with it: whether every element of
// every tensor is there exactly once, whether replicas are equal bit by bit, and whether values are
// finite. Padding is in no piece, so it is never looked at.
#ifndef HOLDFAST_CONVERTER_PROVE_H_
#define HOLDFAST_CONVERTER_PROVE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"

namespace holdfast::converter {

enum class Soundness {
  kGood,        // exit code 0
  kRepairable,  // 3: a documented repair was made, which the framework's own tools do not make
  kLost,        // 4: elements are missing or unknown
};

struct ProofFinding {
  enum class Kind {
    kRepaired,
    kLost,       // by a framework's own bug
    kCover,      // missing, overlapping, or a file too short
    kReplicas,   // differ
    kNonFinite,  // NaN or infinite where training has neither: in weights and optimizer states
    kUnusual,    // the same elsewhere: a mask may be infinite. Not damage
    kUnreadable,
    kChecksum,  // bytes of an archive are others than it says (converter/archive_check.h)
  };
  Kind kind = Kind::kCover;
  std::string text;
};

inline constexpr size_t kProofFindingsMax = 1'000;  // what comes after is counted only

struct ProofReport {
  Soundness soundness = Soundness::kGood;
  std::vector<ProofFinding> findings;
  uint64_t finding_count = 0;
  uint64_t states_checked = 0;
  uint64_t bytes_read = 0;
  uint64_t replicas_compared = 0;  // pieces besides the first of equal ones
};

struct ProofOptions {
  // Called now and then with bytes read and bytes to read; false stops: kCancelled.
  std::function<bool(uint64_t bytes_done, uint64_t bytes_total)> progress;
};

// Blocking. Errors are about proving (kCancelled, kUnavailable, kPermissionDenied ...); what is
// wrong with the checkpoint is in the report.
absl::StatusOr<ProofReport> Prove(const ForeignFolder& folder, const ForeignIndex& index,
                                  const ProofOptions& options);

// The number of the first element in `bytes` (whole elements) that is NaN or infinite, or its
// count of elements if none is. Integers, bits and float4 always are finite.
uint64_t FirstNonFinite(Dtype dtype, std::span<const std::byte> bytes);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_PROVE_H_
