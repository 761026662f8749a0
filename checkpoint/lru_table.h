// Which of many keys have one of a few slots: the least recently used gives way. Only the
// bookkeeping: what a slot holds is the user's.
#ifndef HOLDFAST_CHECKPOINT_LRU_TABLE_H_
#define HOLDFAST_CHECKPOINT_LRU_TABLE_H_

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <utility>

#include "base/check.h"

namespace holdfast {

// Threads: one at a time. O(log slots).
template <typename Key>
class LruTable {
 public:
  explicit LruTable(uint32_t slot_count) : free_count_(slot_count), slot_count_(slot_count) {
    CHECK(slot_count > 0);
  }

  // The key's slot, which is now the most recently used; empty if it has none.
  std::optional<uint32_t> Find(const Key& key) {
    const auto found = entries_.find(key);
    if (found == entries_.end()) return std::nullopt;
    order_.splice(order_.begin(), order_, found->second);
    return found->second->slot;
  }

  // Gives `key`, which has none, the slot of the least recently used key for which `may_go(slot)`,
  // or one that is free. Empty: no key may go.
  template <typename MayGo>
  std::optional<uint32_t> Assign(const Key& key, MayGo may_go) {
    CHECK(!entries_.contains(key));
    uint32_t slot = slot_count_ - free_count_;
    if (!dropped_.empty()) {
      slot = dropped_.front();
      dropped_.pop_front();
    } else if (free_count_ > 0) {
      --free_count_;
    } else {
      auto victim = order_.end();
      do {
        if (victim == order_.begin()) return std::nullopt;
        --victim;
      } while (!may_go(victim->slot));
      slot = victim->slot;
      entries_.erase(victim->key);
      order_.erase(victim);
    }
    order_.push_front({key, slot});
    entries_.emplace(key, order_.begin());
    return slot;
  }

  // Takes the key's slot away from it.
  void Drop(const Key& key) {
    const auto found = entries_.find(key);
    CHECK(found != entries_.end());
    dropped_.push_back(found->second->slot);
    order_.erase(found->second);
    entries_.erase(found);
  }

 private:
  struct Entry {
    Key key;
    uint32_t slot;
  };

  std::list<Entry> order_;  // the most recently used first
  std::map<Key, typename std::list<Entry>::iterator> entries_;
  uint32_t free_count_;  // slots that were never used: the last ones
  const uint32_t slot_count_;
  std::list<uint32_t> dropped_;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_LRU_TABLE_H_
