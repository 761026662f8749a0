#include "checkpoint/block_pool.h"

#include <algorithm>

#include "base/check.h"

namespace holdfast {

BlockPool::BlockPool(uint32_t block_count)
    : states_(block_count, BlockState::kAbsent), search_from_(block_count) {
  counts_[static_cast<size_t>(BlockState::kAbsent)] = block_count;
}

void BlockPool::Set(uint32_t block, BlockState state) {
  --counts_[static_cast<size_t>(states_[block])];
  ++counts_[static_cast<size_t>(state)];
  states_[block] = state;
  if (state == BlockState::kFree) search_from_ = std::min(search_from_, block);
}

void BlockPool::AddFree(uint32_t first, uint32_t count) {
  CHECK(first <= block_count() && count <= block_count() - first);
  for (uint32_t block = first; block < first + count; ++block) {
    if (states_[block] == BlockState::kAbsent) Set(block, BlockState::kFree);
  }
}

std::optional<std::vector<uint32_t>> BlockPool::Take(uint32_t count, BlockState state) {
  CHECK(state != BlockState::kFree && state != BlockState::kAbsent);
  if (this->count(BlockState::kFree) < count) return std::nullopt;
  std::vector<uint32_t> taken;
  taken.reserve(count);
  uint32_t block = search_from_;
  for (; taken.size() < count; ++block) {
    if (states_[block] != BlockState::kFree) continue;
    Set(block, state);
    taken.push_back(block);
  }
  search_from_ = block;
  return taken;
}

bool BlockPool::Claim(std::span<const uint32_t> blocks, BlockState state) {
  CHECK(state != BlockState::kFree && state != BlockState::kAbsent);
  std::vector<BlockState> before;
  before.reserve(blocks.size());
  for (const uint32_t block : blocks) {
    // A block named twice is in use at the second time.
    if (block >= block_count() ||
        (states_[block] != BlockState::kAbsent && states_[block] != BlockState::kFree)) {
      for (size_t k = 0; k < before.size(); ++k) Set(blocks[k], before[k]);
      return false;
    }
    before.push_back(states_[block]);
    Set(block, state);
  }
  return true;
}

void BlockPool::Move(std::span<const uint32_t> blocks, BlockState from, BlockState to) {
  for (const uint32_t block : blocks) {
    CHECK(block < block_count() && states_[block] == from);
    Set(block, to);
  }
}

}  // namespace holdfast
