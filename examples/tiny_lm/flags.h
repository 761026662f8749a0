// The command line of tiny_lm.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_FLAGS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_FLAGS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/tiny_lm/options.h"

namespace tiny_lm {

// What --help prints.
std::string Usage();

// A size: a number of bytes, or one with a unit K, M or G (powers of 1024; an i and a B may
// follow). Errors: kInvalidArgument.
absl::StatusOr<uint64_t> ParseSize(const std::string& text);

// `arguments` without the program's name; "--flag value" or "--flag=value". Errors:
// kInvalidArgument, naming the flag, what it expects and what was found.
absl::StatusOr<TrainerOptions> ParseFlags(const std::vector<std::string>& arguments);

// What `holdfast run` says in HOLDFAST_LAYOUT when the job goes on with fewer ranks: AXIS=SIZE,...
// of pp, dp and tp, and zero=STAGE, as `holdfast reshard --to` has it. What is not named stays as
// it is; with pp the stages are even. Errors: kInvalidArgument, also if dp is not what is left of
// `world_size`.
absl::Status ApplyLayout(const std::string& text, uint32_t world_size, ParallelOptions& options);

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_FLAGS_H_
