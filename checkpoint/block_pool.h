// Which block of a rank memory is used for what. Holds no memory itself.
//
//   kAbsent       not pre-faulted yet
//   kFree
//   kGranted      a trainer may begin to write an image into it
//   kImage        of an image that is being captured, or is sealed
//   kQuarantined  of an image that is void, but whose trainer may still write
//   kStaging      lent to a restore
#ifndef HOLDFAST_CHECKPOINT_BLOCK_POOL_H_
#define HOLDFAST_CHECKPOINT_BLOCK_POOL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace holdfast {

enum class BlockState : uint8_t { kAbsent, kFree, kGranted, kImage, kQuarantined, kStaging };
inline constexpr size_t kBlockStateCount = 6;

// Threads: the event loop's.
class BlockPool {
 public:
  explicit BlockPool(uint32_t block_count);

  // Blocks [first, first + count) have memory now: those that are kAbsent become kFree.
  void AddFree(uint32_t first, uint32_t count);

  // Takes `count` free blocks, lowest index first, as long runs as there are; all or nothing.
  std::optional<std::vector<uint32_t>> Take(uint32_t count, BlockState state);

  // After a restart: these blocks are in use by an image. False, and nothing changes, if one of
  // them is out of range, named twice or in use already.
  [[nodiscard]] bool Claim(std::span<const uint32_t> blocks, BlockState state);

  // CHECKs that each block is in `from`.
  void Move(std::span<const uint32_t> blocks, BlockState from, BlockState to);
  void Free(std::span<const uint32_t> blocks, BlockState from) {
    Move(blocks, from, BlockState::kFree);
  }

  uint32_t count(BlockState state) const { return counts_[static_cast<size_t>(state)]; }
  uint32_t block_count() const { return static_cast<uint32_t>(states_.size()); }
  BlockState state(uint32_t block) const { return states_[block]; }

 private:
  void Set(uint32_t block, BlockState state);

  std::vector<BlockState> states_;
  std::array<uint32_t, kBlockStateCount> counts_{};
  uint32_t search_from_ = 0;  // no free block lies below
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_BLOCK_POOL_H_
