// What the training loop is doing now, told to Holdfast's monitor.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_SECTIONS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_SECTIONS_H_

#include "hook/holdfast.h"

namespace tiny_lm {

// From construction to destruction. Sections nest. `job`: or null, then only the monitor's board
// shows it.
//
// Threads: one at a time.
class Section {
 public:
  Section(hf_job* job, const char* name) : job_(job) { hf_section_begin(job_, name); }
  ~Section() { hf_section_end(job_); }
  Section(const Section&) = delete;
  Section& operator=(const Section&) = delete;

 private:
  hf_job* const job_;
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_SECTIONS_H_
