// How the job's ranks are arranged, and which part of anything belongs to whom. Pure functions.
//
// The mesh has three axes, as in every layout document of this program:
//   pp  pipeline: consecutive layers on consecutive stages. Outermost: stages talk least.
//   dp  data: everyone takes a share of the batch.
//   tp  tensor: heads, hidden units and the vocabulary are cut. Innermost: they talk most.
// Ranks are numbered row-major over (pp, dp, tp). pp and tp are options; dp is what is left of the
// world.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_PARALLEL_H_
#define HOLDFAST_EXAMPLES_TINY_LM_PARALLEL_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"

namespace tiny_lm {

// What is cut over dp instead of replicated; each value adds to the one before.
enum class Zero { kReplicated = 0, kOptimizer = 1, kGradients = 2, kParameters = 3 };

struct ParallelOptions {
  uint32_t pp = 1;
  uint32_t tp = 1;
  // Layers of each stage. Empty: as even as possible, the first stages one more.
  std::vector<uint32_t> pp_layers;
  Zero zero = Zero::kOptimizer;
};

struct Coordinates {
  uint32_t pp = 0;
  uint32_t dp = 0;
  uint32_t tp = 0;
};

struct Mesh {
  uint32_t pp = 1;
  uint32_t dp = 1;
  uint32_t tp = 1;

  uint32_t world_size() const { return pp * dp * tp; }
  Coordinates Of(uint32_t rank) const;
  uint32_t RankAt(const Coordinates& at) const;
  // The ranks that differ from `at` in one axis only, in the order of that axis.
  std::vector<uint32_t> Stages(Coordinates at) const;
  std::vector<uint32_t> DataRanks(Coordinates at) const;
  std::vector<uint32_t> TensorRanks(Coordinates at) const;
};

// Elements [begin, begin + count).
struct Slice {
  size_t begin = 0;
  size_t count = 0;
};

// Part `index` of `parts`: ceil(n / parts) each of n grains of `grain` elements until nothing is
// left, so that the last parts may be short or empty. Rule "ceil" of a layout document.
Slice CeilPart(size_t count, size_t grain, size_t parts, size_t index);

// What all ranks agree about.
struct JobLayout {
  Mesh mesh;
  Zero zero = Zero::kOptimizer;
  std::vector<uint32_t> stage_layers = {0};  // one per stage
  uint64_t ballast_bytes = 0;                // of the whole job; rounded up to pages

  Slice LayersOf(uint32_t stage) const;
  // As even as possible, the first stages one more.
  bool has_even_stages() const;
};

// Errors: kInvalidArgument (the world is no multiple of pp * tp; --pp-layers does not fit pp or the
// model), naming what was expected and found.
absl::StatusOr<JobLayout> MakeJobLayout(const ParallelOptions& options, size_t layer_count,
                                        uint32_t world_size, uint64_t ballast_bytes);

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_PARALLEL_H_
