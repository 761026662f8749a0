// Fingerprints by the formula of docs/FORMAT.md, section 4, element by element, in arithmetic that
// needs no thought. Slow. For tests only.
#ifndef HOLDFAST_FORMAT_FINGERPRINT_ORACLE_H_
#define HOLDFAST_FORMAT_FINGERPRINT_ORACLE_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "format/fingerprint.h"

namespace holdfast {

// The terms of elements first_element, first_element + 1, ..., which `bytes` holds, summed.
Fingerprint OracleSum(Dtype dtype, uint64_t first_element, std::span<const std::byte> bytes);

// The fingerprint of a tensor state of which `bytes` are all elements.
Fingerprint OracleFingerprint(const TensorState& tensor_state, std::span<const std::byte> bytes);

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_FINGERPRINT_ORACLE_H_
