// One rank's restore: plans which blocks of the source hold what this rank's buffers need, and
// delivers them, verified, through the registration's RestoreRing (hook/abi/shared_memory.h). The
// trainer copies out of them; the agent never sees the buffers.
//
//   1. plan: format/planner gives copies image -> buffer; they are cut at block borders and ordered
//      by (image, block). What reads one block is one piece.
//   2. blobs are read and verified, all global ones and those of all old ranks: once for all ranks
//      that restore from one source.
//   3. begun(): operations and blobs go out as sealed memory.
//   4. pieces are fetched, several at a time, and go into the ring as they are verified; a piece's
//      memory is free again when the trainer has consumed it.
//   5. ended(), when the last one is consumed, or at the first error.
#ifndef HOLDFAST_CHECKPOINT_RESTORE_H_
#define HOLDFAST_CHECKPOINT_RESTORE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/executor.h"
#include "checkpoint/engine.h"
#include "checkpoint/registration.h"
#include "checkpoint/restore_selection.h"
#include "checkpoint/restore_source.h"
#include "format/planner.h"
#include "hook/abi/messages.h"
#include "hook/abi/shared_memory.h"
#include "io/unique_fd.h"

namespace holdfast {

// Operations of one delivered piece: [first_op, first_op + op_count) apply to `bytes` bytes at
// `offset_bytes` of block `block` of image `image`.
struct RestorePiece {
  uint32_t image = 0;
  uint64_t block = 0;
  uint64_t offset_bytes = 0;
  uint64_t bytes = 0;
  uint64_t first_op = 0;
  uint64_t op_count = 0;
};

struct RestorePlan {
  std::vector<abi::RestoreOp> ops;  // source_offset from the beginning of the piece
  // By (image, block, offset). A block larger than `piece_bytes_max` is several pieces.
  std::vector<RestorePiece> pieces;
  uint64_t bytes = 0;
  // Of those of which the target holds something.
  uint64_t tensor_states = 0;
  uint64_t tensor_states_left_out = 0;
};

// Of what `target` holds, that which `selection` chooses. Pure; may take long: for a WorkPool.
// Errors: those of PlanCopy and ChooseStates.
absl::StatusOr<RestorePlan> PlanRestore(const Index& index, const Registration& target,
                                        uint64_t piece_bytes_max,
                                        const RestoreSelection& selection = {});

// Free blocks of the restoring rank's memory (RankImages::TakeStaging), as an interface so that a
// test needs no session.
class StagingMemory {
 public:
  virtual ~StagingMemory() = default;
  virtual std::vector<uint64_t> Take(size_t count) = 0;  // offsets of blocks, at most `count`
  virtual void Return(std::span<const uint64_t> offsets) = 0;
  virtual std::span<std::byte> memory() const = 0;
  virtual uint64_t block_bytes() const = 0;
  virtual const SharedMapping* mapping() const = 0;  // of memory()
};

// kNotFound says that a run begins from nothing; what was looked for and is missing is kDataLoss.
absl::Status NotTheBeginning(const absl::Status& status);

// Makes a read-only descriptor of a mapping, for the trainer (RestoreBegun::Map).
absl::StatusOr<UniqueFd> OpenReadOnly(const SharedMapping& mapping);

// Threads: the event loop's. Callbacks run on the loop, never inside the call that took them.
// Lifetime: the world outlives it. Destroy it when idle(): until then fetches write into staging
//   blocks, which a destroyed one never gives back.
class Restore {
 public:
  struct Options {
    uint32_t fetches_in_flight_max = 8;
    RestoreFrom restore_from = RestoreFrom::kNotGiven;  // for RestoreBegun
    RestoreSelection selection = {};
  };
  using Begun = std::function<void(absl::StatusOr<RestoreBegun>)>;
  using Ended = std::function<void(absl::StatusOr<RestoreEnded>)>;

  Restore(std::shared_ptr<RestoreSource> source, std::shared_ptr<const Registration> target,
          std::shared_ptr<StagingMemory> staging, abi::RestoreRing& ring, EventLoop& loop,
          WorkPool& pool, const Options& options, Begun begun, Ended ended);
  Restore(const Restore&) = delete;
  Restore& operator=(const Restore&) = delete;

  // The trainer has consumed pieces.
  void Advance();
  // Ends it with this error, unless it has ended: begun() or ended() says so, later, if `report`.
  // The ring is not touched any more after this.
  enum class Report { kYes, kNo };
  void Cancel(absl::Status why, Report report);
  bool is_over() const { return phase_ == Phase::kOver; }
  // It is over and nothing is in flight.
  bool idle() const { return is_over() && in_flight_count_ == 0; }

 private:
  enum class Phase { kPlanning, kBlobs, kDelivering, kOver };
  // All pieces of one block, which is verified as a whole.
  struct Unit {
    uint32_t image = 0;
    uint64_t block = 0;
    size_t first_piece = 0;
    size_t piece_count = 0;
  };
  // A verified piece, waiting for room in the ring, or in it.
  struct Delivery {
    abi::RestoreEntry entry{};
    std::optional<uint64_t> staging;  // to be returned when it is consumed
    RestoreSource::From from = RestoreSource::From::kStorage;
  };

  void Plan();
  void ReadBlobs();
  absl::StatusOr<RestoreBegun> Describe();
  void Begin();
  void StartFetches();
  bool StartFetch(const Unit& unit);
  bool FetchStaged(const Unit& unit);
  void DeliverInPlace(const Unit& unit, uint64_t memory_offset);
  void DeliverStaged(const Unit& unit, const std::vector<uint64_t>& staging,
                     RestoreSource::From from);
  void FillRing();
  void Fail(absl::Status why);
  void CheckEnd();

  const std::shared_ptr<RestoreSource> source_;
  const std::shared_ptr<const Registration> target_;
  const std::shared_ptr<StagingMemory> staging_;
  abi::RestoreRing& ring_;
  EventLoop& loop_;
  WorkPool& pool_;
  const Options options_;
  Begun begun_;
  Ended ended_;

  Phase phase_ = Phase::kPlanning;
  RestorePlan plan_;
  uint64_t piece_bytes_max_ = 0;
  std::vector<Unit> units_;
  std::vector<uint32_t> map_ids_;  // of images that are handed out in place; see Describe()

  std::shared_ptr<const SealedBlobs> blobs_;

  size_t next_unit_ = 0;
  std::deque<Unit> again_;  // were bad in place: to be fetched elsewhere
  std::deque<Delivery> ready_;
  std::deque<Delivery> delivered_;  // in the ring, oldest first
  uint32_t produced_ = 0;
  uint32_t consumed_ = 0;
  size_t fetch_count_ = 0;      // units in flight
  size_t in_flight_count_ = 0;  // and everything else that will come back
  RestoreEnded result_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_RESTORE_H_
