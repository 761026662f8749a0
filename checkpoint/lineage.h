// Which checkpoints belong to the current branch of a job, and which of them is the newest. A pure
// function of what the root holds: no clock, no file.
//
// format/manifest.h says what HEAD.<n> selects (CurrentBranch); with several attempts that is a
// tree. Here the branch is a line in it: the greatest (attempt, step), and then parent by parent.
// Whatever else exists was left behind by an attempt that went on from an older checkpoint, and is
// abandoned. Two facts help where a parent is missing or cannot be read: within one attempt commits
// go in the order of their steps, so an attempt's checkpoints form a line; and parents are older.
#ifndef HOLDFAST_CHECKPOINT_LINEAGE_H_
#define HOLDFAST_CHECKPOINT_LINEAGE_H_

#include <cstddef>
#include <optional>
#include <vector>

#include "base/ids.h"
#include "format/manifest.h"

namespace holdfast {

// A directory that holds a manifest.
struct LineageNode {
  CheckpointId id;
  std::optional<CheckpointId> parent;
  // The manifest cannot be read, so its parent is not known. It still counts: what was committed
  // and is damaged must not be passed over in silence.
  bool damaged = false;
  bool marked_bad = false;
};

enum class Branch {
  kCurrent,
  kAbandoned,
  kUnknown,  // the chain of parents breaks off above it
};

struct Lineage {
  enum class Outcome {
    kNone,     // there is no checkpoint on the branch: begin from nothing
    kFound,    // `newest` is set
    kDamaged,  // `newest` is set, and its manifest cannot be read
    kAllBad,   // every checkpoint of the branch is marked bad
    kUnknown,  // the newest that is not marked bad lies beyond a break of the chain
  };
  Outcome outcome = Outcome::kNone;
  std::optional<size_t> newest;  // the newest of the branch that is not marked bad: index of a node
  std::vector<Branch> branch;    // of each node, in the order given
};

// `nodes` in any order, ids distinct (CHECKed). A parent that is not older than its child counts as
// unknown.
Lineage FindLineage(const std::vector<LineageNode>& nodes, const std::optional<Head>& head);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_LINEAGE_H_
