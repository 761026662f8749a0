// What a run of tiny_lm can be told (flags.h reads it from the command line).
#ifndef HOLDFAST_EXAMPLES_TINY_LM_OPTIONS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_OPTIONS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "examples/tiny_lm/parallel.h"
#include "examples/tiny_lm/parameters.h"

namespace tiny_lm {

struct CheckpointingOptions {
  int64_t capture_deadline_ns = 60'000'000'000;
  int64_t commit_deadline_ns = 300'000'000'000;   // at the end
  int64_t restore_deadline_ns = 300'000'000'000;  // of hf_register, and of hf_restore
  int64_t save_wait_ns = 0;                       // for image memory
};

// A fault to be found: once a step is done, one rank has one bit of one element otherwise than it
// should.
struct BitFlip {
  uint32_t rank = 0;
  uint64_t step = 0;  // behind its optimizer step, before it is saved
  std::string tensor;
  std::string state = "param";
  uint64_t element = 0;  // in the whole tensor, row-major
  uint32_t bit = 0;      // of the element, 0 is the least significant
};

struct TrainerOptions {
  std::vector<std::string> corpus_paths;
  ParallelOptions parallel;
  uint64_t layers = 2;
  bool tied = false;  // the head is the token embedding
  uint64_t seed = 1;
  uint64_t batch = 24;       // samples of a step, of all ranks together
  uint64_t micro_batch = 4;  // samples that go through the model at once
  uint64_t steps = 20;
  uint64_t save_every = 0;  // 0: when hf_due says so
  uint64_t ballast_bytes = 0;
  double device_ms = 0;              // what forward and backward would take on a device
  double device_jitter_percent = 5;  // up to so much longer, from the rank's own generator
  bool use_holdfast = true;
  bool use_device = false;  // the state is in the memory of a CUDA device
  bool check_restore = false;
  bool wait_committed_at_end = true;
  std::vector<BitFlip> bit_flips;
  std::string faults_path;        // empty: none (faults.h)
  uint64_t all_reduce_bytes = 0;  // traffic besides the model's, of a step and rank (traffic.h)
  uint64_t all_to_all_bytes = 0;
  CheckpointingOptions checkpointing;

  ModelConfig model() const {
    ModelConfig config;
    config.layers = layers;
    config.tied = tied;
    return config;
  }
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_OPTIONS_H_
