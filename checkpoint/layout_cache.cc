#include "checkpoint/layout_cache.h"

#include <span>
#include <utility>

#include "base/crc32c.h"
#include "base/status_macros.h"

namespace holdfast {

absl::StatusOr<std::shared_ptr<const SharedLayout>> SharedLayout::Make(std::string text) {
  ASSIGN_OR_RETURN(std::unique_ptr<const Layout> layout, Layout::Parse(std::move(text)));
  WriterAssignment writers = WriterAssignment::Create(*layout);
  return std::make_shared<const SharedLayout>(
      SharedLayout{.layout = std::move(layout), .writers = std::move(writers)});
}

// Locks a slot inside mutex_, but one that nobody else has, so that nobody waits for a parse.
std::shared_ptr<LayoutCache::Slot> LayoutCache::FindSlot(LayoutHash hash) {
  MutexLock lock(mutex_);
  std::erase_if(slots_, [](const auto& entry) {
    if (entry.second.use_count() > 1) return false;
    MutexLock slot_lock(entry.second->mutex);
    return entry.second->layout.expired();
  });
  std::shared_ptr<Slot>& slot = slots_[hash];
  if (slot == nullptr) slot = std::make_shared<Slot>();
  return slot;
}

absl::StatusOr<std::shared_ptr<const SharedLayout>> LayoutCache::Parse(std::string text) {
  ++parse_count_;
  return SharedLayout::Make(std::move(text));
}

absl::StatusOr<std::shared_ptr<const SharedLayout>> LayoutCache::Get(std::string text) {
  const std::shared_ptr<Slot> slot =
      FindSlot({text.size(), Crc32c(std::as_bytes(std::span(text)))});
  MutexLock lock(slot->mutex);
  if (std::shared_ptr<const SharedLayout> known = slot->layout.lock()) {
    // Another text with this hash has the slot for itself.
    return known->layout->text() == text ? known : Parse(std::move(text));
  }
  ASSIGN_OR_RETURN(std::shared_ptr<const SharedLayout> made, Parse(std::move(text)));
  slot->layout = made;
  return made;
}

size_t LayoutCache::size() const {
  MutexLock lock(mutex_);
  return slots_.size();
}

}  // namespace holdfast
