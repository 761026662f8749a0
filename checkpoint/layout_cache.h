// Layout documents, understood once: all ranks of a job register the same text, and an agent serves
// many of them. The costly parts that do not depend on the rank (parsing, and who writes which
// replica) are made by the first and shared by the others. Plans are not kept: they are each rank's
// own (docs/decisions/0006-what-is-cached-by-layout.md).
//
// Bounded by who uses it: a layout lives as long as a registration holds it, no longer.
#ifndef HOLDFAST_CHECKPOINT_LAYOUT_CACHE_H_
#define HOLDFAST_CHECKPOINT_LAYOUT_CACHE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "format/layout.h"
#include "format/writer_assignment.h"

namespace holdfast {

// Threads: any; immutable.
struct SharedLayout {
  std::unique_ptr<const Layout> layout;
  WriterAssignment writers;  // of *layout

  // Errors: those of Layout::Parse.
  static absl::StatusOr<std::shared_ptr<const SharedLayout>> Make(std::string text);
};

// Threads: any. Lifetime: what it gives may outlive it.
class LayoutCache {
 public:
  // The layout of this text; made now, unless somebody holds it. Who asks while another thread
  // makes it waits for that. Errors: those of Layout::Parse, which are not remembered.
  absl::StatusOr<std::shared_ptr<const SharedLayout>> Get(std::string text)
      ABSL_LOCKS_EXCLUDED(mutex_);

  // How often a text was parsed.
  uint64_t parse_count() const { return parse_count_; }
  // Texts that are known; those that nobody holds any more go at the next Get.
  size_t size() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Slot {
    Mutex mutex;  // held while it is made
    std::weak_ptr<const SharedLayout> layout ABSL_GUARDED_BY(mutex);
  };
  std::shared_ptr<Slot> FindSlot(LayoutHash hash) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<std::shared_ptr<const SharedLayout>> Parse(std::string text);

  mutable Mutex mutex_;
  std::map<LayoutHash, std::shared_ptr<Slot>> slots_ ABSL_GUARDED_BY(mutex_);
  std::atomic<uint64_t> parse_count_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_LAYOUT_CACHE_H_
