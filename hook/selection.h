// What hf_restore_partial was asked for, as the agent gets it: patterns of names, in sealed memory.
// The agent knows the layout, so it alone says what they fit.
#ifndef HOLDFAST_HOOK_SELECTION_H_
#define HOLDFAST_HOOK_SELECTION_H_

#include <cstdint>
#include <memory>

#include "hook/error.h"
#include "hook/os.h"

namespace holdfast::hook {

// Threads: immutable.
class Selection {
 public:
  // nullptr: everything. Errors: HF_INVALID_ARGUMENT (a list or pattern is NULL or empty, too many
  // or too long), HF_RESOURCE_EXHAUSTED.
  static Result<std::shared_ptr<const Selection>> Make(const hf_restore_options& options);

  // As hook/abi describes it, sealed.
  int fd() const { return memory_.get(); }
  uint64_t bytes() const { return bytes_; }

 private:
  UniqueFd memory_;
  uint64_t bytes_ = 0;
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_SELECTION_H_
