#include "checkpoint/diff_plan.h"

#include <algorithm>
#include <array>
#include <list>
#include <tuple>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "checkpoint/commit.h"
#include "format/layout.h"

namespace holdfast {
namespace {

constexpr uint32_t kNone = UINT32_MAX;
constexpr uint64_t kBoxWindowBytesMin = uint64_t{64} << 10;

struct BlockName {
  uint32_t image = 0;
  uint64_t block = 0;
  friend auto operator<=>(const BlockName&, const BlockName&) = default;
};

// Adds the blocks in which the runs lie, each once. False: there are more than count_max.
bool AddBlocksOf(const IndexImage& facts, const CopyOp& runs, uint32_t image, uint64_t offset_bytes,
                 uint64_t stride_bytes, size_t count_max, std::vector<BlockName>& blocks) {
  const auto add = [&](uint64_t first, uint64_t last) {
    for (uint64_t block = first; block <= last; ++block) {
      const BlockName name{image, block};
      if (!blocks.empty() && blocks.back() == name) continue;
      if (std::find(blocks.begin(), blocks.end(), name) != blocks.end()) continue;
      if (blocks.size() == count_max) return false;
      blocks.push_back(name);
    }
    return true;
  };
  const uint64_t block_bytes = facts.block_bytes;
  // A run begins in every block from the first to the last.
  if (stride_bytes <= block_bytes) {
    const uint64_t end = offset_bytes + (runs.count - 1) * stride_bytes + runs.run_bytes;
    return add(offset_bytes / block_bytes, (end - 1) / block_bytes);
  }
  for (uint64_t run = 0; run < runs.count; ++run) {
    const uint64_t begin = offset_bytes + run * stride_bytes;
    if (!add(begin / block_bytes, (begin + runs.run_bytes - 1) / block_bytes)) return false;
  }
  return true;
}

// The slots of one checkpoint while a schedule is made: which block is where after which window.
class Slots {
 public:
  Slots(const Index& index, uint64_t memory_bytes_max) {
    uint64_t blocks = 0;
    uint64_t block_bytes = kBlockBytesMin;
    for (const IndexImage& image : index.images) {
      first_block_.push_back(blocks);
      blocks += image.block_crc32c.size();
      block_bytes = std::max(block_bytes, image.block_bytes);
    }
    load_of_block_.assign(blocks, kNone);
    seen_.assign(blocks, false);
    const uint64_t fit = memory_bytes_max / block_bytes;
    count_ = static_cast<size_t>(std::clamp<uint64_t>(fit, kDiffSlotsMin, kDiffSlotsMax));
    count_ = static_cast<size_t>(std::clamp<uint64_t>(blocks, 1, count_));
    // So that half of the slots are of earlier and later windows.
    window_blocks_max_ = std::max<size_t>(count_ / 2, 2);
    content_.assign(count_, kEmpty);
    for (uint32_t slot = 0; slot < count_; ++slot) {
      by_use_.push_back(slot);
      place_.push_back(std::prev(by_use_.end()));
    }
  }

  size_t count() const { return count_; }
  size_t window_blocks_max() const { return window_blocks_max_; }
  uint32_t Resident(const BlockName& name) const { return load_of_block_[Number(name)]; }

  // Whether it is the first time that this is asked for the block.
  bool SeeFirst(const BlockName& name) {
    const bool first = !seen_[Number(name)];
    seen_[Number(name)] = true;
    return first;
  }

  void Touch(uint32_t slot) { by_use_.splice(by_use_.end(), by_use_, place_[slot]); }

  // Puts the block, as load number `load`, into the slot that was not used for longest.
  uint32_t Load(const BlockName& name, uint32_t load) {
    const uint32_t slot = by_use_.front();
    if (content_[slot] != kEmpty) load_of_block_[content_[slot]] = kNone;
    content_[slot] = Number(name);
    load_of_block_[Number(name)] = load;
    Touch(slot);
    return slot;
  }

 private:
  static constexpr uint64_t kEmpty = UINT64_MAX;

  uint64_t Number(const BlockName& name) const { return first_block_[name.image] + name.block; }

  std::vector<uint64_t> first_block_;    // of each image, in the numbers of blocks
  std::vector<uint32_t> load_of_block_;  // whose load is in a slot
  std::vector<bool> seen_;
  size_t count_ = 0;
  size_t window_blocks_max_ = 0;
  std::vector<uint64_t> content_;  // number of the block in each slot
  std::list<uint32_t> by_use_;     // slots, the one not used for longest first
  std::vector<std::list<uint32_t>::iterator> place_;
};

class Scheduler {
 public:
  Scheduler(const DiffPlan& plan, const DiffLimits& limits)
      : plan_(plan),
        slots_{Slots(plan.lead_index(), limits.memory_bytes_max / 2),
               Slots(plan.other_index(), limits.memory_bytes_max / 2)},
        limits_(limits) {}

  absl::StatusOr<DiffSchedule> Make(DiffPlan::Order order) {
    RETURN_IF_ERROR(CutPieces(order));
    if (order == DiffPlan::Order::kElements) SortByElements();
    AssignLoads();
    schedule_.slot_count = {slots_[0].count(), slots_[1].count()};
    if (plan_.lead() == 1) std::swap(schedule_.slot_count[0], schedule_.slot_count[1]);
    return std::move(schedule_);
  }

 private:
  uint64_t ElementBytesOf(const LeadPiece& piece) const {
    return ElementBytes(plan_.lead_index().tensor_states[piece.piece.tensor_state].dtype);
  }

  absl::Status CutPieces(DiffPlan::Order order) {
    // In the order of elements, pieces that are boxes take turns: the blocks of all of them are
    // there at once, so one turn must not be long.
    std::vector<uint32_t> box_count(plan_.lead_index().tensor_states.size(), 0);
    for (const LeadPiece& piece : plan_.pieces()) {
      if (piece.piece.box != kWholeTensor) ++box_count[piece.piece.tensor_state];
    }
    for (uint32_t i = 0; i < plan_.pieces().size(); ++i) {
      uint64_t window_bytes = kDiffWindowBytesMax;
      const uint32_t boxes = box_count[plan_.pieces()[i].piece.tensor_state];
      if (order == DiffPlan::Order::kElements && boxes > 0) {
        window_bytes = std::clamp(limits_.memory_bytes_max / 8 / boxes / kBoxWindowBytesMin,
                                  uint64_t{1}, kDiffWindowBytesMax / kBoxWindowBytesMin) *
                       kBoxWindowBytesMin;
      }
      RETURN_IF_ERROR(CutPiece(i, window_bytes));
    }
    return absl::OkStatus();
  }

  absl::Status CutPiece(uint32_t number, uint64_t window_bytes_max) {
    const LeadPiece& piece = plan_.pieces()[number];
    const IndexImage& image = plan_.lead_index().images[piece.image];
    const uint64_t element_bytes = ElementBytesOf(piece);
    const uint64_t bytes = piece.piece.ElementCount() * element_bytes;
    for (uint64_t begin = 0; begin < bytes;) {
      if (schedule_.windows.size() == limits_.windows_max) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "to compare bytes in more than %d parts is not supported", limits_.windows_max));
      }
      uint64_t end = begin + std::min(bytes - begin, window_bytes_max);
      // To the end of the block, so that its bytes need not be put together from two; an element
      // that lies in two blocks is a window of its own.
      const uint64_t in_block =
          image.block_bytes - (piece.offset_bytes + begin) % image.block_bytes;
      if (in_block < end - begin) {
        end = begin + std::max(in_block / element_bytes * element_bytes, element_bytes);
      }
      while (!FindBlocks(number, begin, end)) {
        CHECK(end - begin > element_bytes);  // one element lies in at most two blocks
        end = begin + std::max((end - begin) / 2 / element_bytes * element_bytes, element_bytes);
      }
      DiffWindow window{.piece = number, .begin_bytes = begin, .end_bytes = end};
      window.first_use = blocks_.size();
      window.lead_uses = static_cast<uint32_t>(found_[0].size());
      window.other_uses = static_cast<uint32_t>(found_[1].size());
      for (const std::vector<BlockName>& found : found_) {
        blocks_.insert(blocks_.end(), found.begin(), found.end());
      }
      schedule_.windows.push_back(window);
      begin = end;
    }
    return absl::OkStatus();
  }

  // The blocks of a window, in found_. False: more than may be in slots at once.
  bool FindBlocks(uint32_t number, uint64_t begin_bytes, uint64_t end_bytes) {
    const LeadPiece& piece = plan_.pieces()[number];
    for (std::vector<BlockName>& found : found_) found.clear();
    CopyOp whole;
    whole.run_bytes = end_bytes - begin_bytes;
    if (!AddBlocksOf(plan_.lead_index().images[piece.image], whole, piece.image,
                     piece.offset_bytes + begin_bytes, 0, slots_[0].window_blocks_max(),
                     found_[0])) {
      return false;
    }
    found_ops_.clear();
    plan_.AppendOther(number, begin_bytes, end_bytes, found_ops_);
    for (const CopyOp& op : found_ops_) {
      if (!AddBlocksOf(plan_.other_index().images[op.buffer], op, op.buffer, op.buffer_offset_bytes,
                       op.buffer_stride_bytes, slots_[1].window_blocks_max(), found_[1])) {
        return false;
      }
    }
    for (std::vector<BlockName>& found : found_) std::sort(found.begin(), found.end());
    return true;
  }

  // States in the order in which they come first in storage, windows of one by their first element.
  void SortByElements() {
    const std::vector<TensorState>& states = plan_.lead_index().tensor_states;
    std::vector<uint32_t> rank(states.size(), kNone);
    uint32_t ranks = 0;
    std::vector<std::tuple<uint32_t, uint64_t, uint32_t>> keys;
    for (uint32_t i = 0; i < schedule_.windows.size(); ++i) {
      const DiffWindow& window = schedule_.windows[i];
      const LeadPiece& piece = plan_.pieces()[window.piece];
      uint32_t& state_rank = rank[piece.piece.tensor_state];
      if (state_rank == kNone) state_rank = ranks++;
      const uint64_t element = piece.piece.begin + window.begin_bytes / ElementBytesOf(piece);
      keys.emplace_back(state_rank,
                        ElementInTensor(piece.piece, plan_.lead_index().boxes,
                                        states[piece.piece.tensor_state], element),
                        i);
    }
    std::sort(keys.begin(), keys.end());
    std::vector<DiffWindow> sorted;
    sorted.reserve(keys.size());
    for (const auto& key : keys) sorted.push_back(schedule_.windows[std::get<2>(key)]);
    schedule_.windows = std::move(sorted);
  }

  void AssignLoads() {
    schedule_.uses.resize(blocks_.size());
    size_t next_use = 0;
    std::vector<uint32_t> uses;
    for (DiffWindow& window : schedule_.windows) {
      const size_t first_block = window.first_use;
      window.first_use = next_use;
      const std::array<uint32_t, 2> counts{window.lead_uses, window.other_uses};
      size_t at = first_block;
      for (uint32_t side = 0; side < 2; ++side) {
        const std::span<const BlockName> names = std::span(blocks_).subspan(at, counts[side]);
        at += counts[side];
        // First those that are there: what is loaded now must not take their slots.
        for (const BlockName& name : names) {
          const uint32_t load = slots_[side].Resident(name);
          if (load != kNone) slots_[side].Touch(schedule_.loads[load].slot);
        }
        for (const BlockName& name : names) {
          uint32_t load = slots_[side].Resident(name);
          if (load == kNone) load = AddLoad(side, name);
          ++schedule_.loads[load].use_count;
          schedule_.uses[next_use++] = load;
        }
      }
    }
  }

  uint32_t AddLoad(uint32_t side, const BlockName& name) {
    const auto load = static_cast<uint32_t>(schedule_.loads.size());
    const Index& index = side == 0 ? plan_.lead_index() : plan_.other_index();
    const uint64_t block_bytes = index.images[name.image].block_bytes;
    schedule_.loads.push_back({.image = name.image,
                               .slot = slots_[side].Load(name, load),
                               .block = name.block,
                               .checkpoint = side == 0 ? plan_.lead() : 1 - plan_.lead(),
                               .use_count = 0});
    schedule_.bytes += block_bytes;
    if (slots_[side].SeeFirst(name)) schedule_.distinct_bytes += block_bytes;
    return load;
  }

  const DiffPlan& plan_;
  std::array<Slots, 2> slots_;  // of the leading checkpoint and of the other
  const DiffLimits limits_;
  DiffSchedule schedule_;
  // Of each window, as it was cut, its blocks.
  std::vector<BlockName> blocks_;
  // Of the window that is being cut.
  std::array<std::vector<BlockName>, 2> found_;
  std::vector<CopyOp> found_ops_;
};

}  // namespace

absl::StatusOr<DiffPlan> DiffPlan::Create(const Index& a, const Index& b,
                                          std::span<const CommonState> common,
                                          const DiffLimits& limits) {
  std::array<absl::StatusOr<DiffPlan>, 2> plans{WithPieces(a, b, common, 0),
                                                absl::UnknownError("not needed so far")};
  RETURN_IF_ERROR(plans[0].status());
  uint32_t best = kNone;
  absl::Status refused;  // the first that was
  for (const Order order : {Order::kStorage, Order::kElements}) {
    for (uint32_t lead = 0; lead < 2; ++lead) {
      if (!plans[lead].ok()) {
        plans[lead] = WithPieces(a, b, common, lead);
        RETURN_IF_ERROR(plans[lead].status());
      }
      absl::StatusOr<DiffSchedule> schedule = Scheduler(*plans[lead], limits).Make(order);
      if (!schedule.ok()) {
        // Too many windows for one may not be too many for the next.
        refused.Update(schedule.status());
        continue;
      }
      if (best != kNone && schedule->bytes >= plans[best]->schedule_.bytes) continue;
      best = lead;
      plans[best]->schedule_ = *std::move(schedule);
      if (plans[best]->schedule_.bytes == plans[best]->schedule_.distinct_bytes) {
        return std::move(plans[best]);
      }
    }
  }
  if (best == kNone) return refused;
  return std::move(plans[best]);
}

absl::StatusOr<DiffPlan> DiffPlan::CreateWith(const Index& a, const Index& b,
                                              std::span<const CommonState> common,
                                              const DiffLimits& limits, uint32_t lead,
                                              Order order) {
  ASSIGN_OR_RETURN(DiffPlan plan, WithPieces(a, b, common, lead));
  ASSIGN_OR_RETURN(plan.schedule_, Scheduler(plan, limits).Make(order));
  return plan;
}

absl::StatusOr<DiffPlan> DiffPlan::WithPieces(const Index& a, const Index& b,
                                              std::span<const CommonState> common, uint32_t lead) {
  DiffPlan plan(lead == 0 ? a : b, lead == 0 ? b : a, lead);
  plan.AddPieces(common);
  RETURN_IF_ERROR(plan.PlanOther());
  return plan;
}

void DiffPlan::AddPieces(std::span<const CommonState> common) {
  std::vector<uint32_t> common_of_state(lead_index_->tensor_states.size(), kNone);
  for (uint32_t i = 0; i < common.size(); ++i) common_of_state[common[i].state[lead_]] = i;
  const BoxTable& boxes = lead_index_->boxes;
  for (const IndexPiece& stored : lead_index_->pieces) {
    const uint32_t state = stored.piece.tensor_state;
    if (common_of_state[state] == kNone || stored.piece.ElementCount() == 0) continue;
    pieces_.push_back({AsRange(stored.piece, lead_index_->tensor_states[state], boxes),
                       stored.image, stored.offset_bytes, common_of_state[state]});
  }
  const auto place = [](const LeadPiece& piece) {
    return std::tuple(piece.image, piece.offset_bytes, piece.common);
  };
  std::sort(pieces_.begin(), pieces_.end(), [&](const LeadPiece& a, const LeadPiece& b) {
    if (a.common != b.common) return a.common < b.common;
    const int order = ComparePieces(a.piece, b.piece, boxes);
    return order != 0 ? order < 0 : place(a) < place(b);
  });
  pieces_.erase(std::unique(pieces_.begin(), pieces_.end(),
                            [&](const LeadPiece& a, const LeadPiece& b) {
                              return a.common == b.common &&
                                     ComparePieces(a.piece, b.piece, boxes) == 0;
                            }),
                pieces_.end());
  std::sort(pieces_.begin(), pieces_.end(),
            [&](const LeadPiece& a, const LeadPiece& b) { return place(a) < place(b); });
}

absl::Status DiffPlan::PlanOther() {
  RankLayout target;
  target.boxes = lead_index_->boxes;
  for (uint32_t i = 0; i < pieces_.size(); ++i) {
    target.segments.push_back({.piece = pieces_[i].piece, .buffer = i});
  }
  const std::vector<StoredPiece> stored = StoredPieces(*other_index_);
  ASSIGN_OR_RETURN(CopyPlan plan,
                   PlanCopy({other_index_->tensor_states, other_index_->boxes, stored},
                            lead_index_->tensor_states, target));
  ops_ = std::move(plan.ops);
  for (CopyOp& op : ops_) {
    std::swap(op.image, op.buffer);
    std::swap(op.image_offset_bytes, op.buffer_offset_bytes);
    std::swap(op.image_stride_bytes, op.buffer_stride_bytes);
  }
  std::sort(ops_.begin(), ops_.end(), [](const CopyOp& a, const CopyOp& b) {
    return std::tie(a.image, a.image_offset_bytes) < std::tie(b.image, b.image_offset_bytes);
  });
  first_op_.assign(pieces_.size() + 1, ops_.size());
  for (size_t i = ops_.size(); i-- > 0;) first_op_[ops_[i].image] = i;
  for (size_t i = pieces_.size(); i-- > 0;) first_op_[i] = std::min(first_op_[i], first_op_[i + 1]);
  for (size_t i = 0; i < ops_.size(); ++i) {
    const bool first = i == first_op_[ops_[i].image];
    reach_.push_back(std::max(ops_[i].ImageEnd(), first ? 0 : reach_.back()));
  }
  return absl::OkStatus();
}

void DiffPlan::AppendOther(uint32_t piece, uint64_t begin_bytes, uint64_t end_bytes,
                           std::vector<CopyOp>& ops) const {
  const auto first = reach_.begin() + static_cast<ptrdiff_t>(first_op_[piece]);
  const auto last = reach_.begin() + static_cast<ptrdiff_t>(first_op_[piece + 1]);
  // No op before this one reaches into the range.
  auto at = static_cast<size_t>(std::upper_bound(first, last, begin_bytes) - reach_.begin());
  for (; at < first_op_[piece + 1] && ops_[at].image_offset_bytes < end_bytes; ++at) {
    ClipToImage(ops_[at], begin_bytes, end_bytes, ops);
  }
}

}  // namespace holdfast
