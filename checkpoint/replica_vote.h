// The vote of replicas: where all holders of a segment have captured their copy (copies = all), the
// copies must be equal, and this says which are not, where, and who is alone with what it holds.
//
// Copies are compared by their sums (format/fingerprint.h), which every rank's images have taken
// block by block beside the checksums. Bytes are read only to say more of a difference that the
// sums have found, or where a worker that died took the sums with it.
//
// A strict majority of equal copies names the others as suspects. Without one (two copies; two
// against two) nobody is: that would be a guess.
#ifndef HOLDFAST_CHECKPOINT_REPLICA_VOTE_H_
#define HOLDFAST_CHECKPOINT_REPLICA_VOTE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "base/ids.h"
#include "checkpoint/registration.h"
#include "checkpoint/replicas.h"
#include "checkpoint/shared_mapping.h"
#include "format/fingerprint.h"

namespace holdfast {

// What one rank's replicas sum up to: as many sums as it has replicas.
struct ReplicaBallot {
  const Replicas& replicas;
  std::span<const Fingerprint> sums;
};

// A replica of which not all copies are equal.
struct ReplicaDifference {
  // Those with equal copies together, each ascending: the greatest number first, then as ordered by
  // their lowest rank. At least two.
  std::vector<std::vector<uint32_t>> parties;
  std::vector<uint32_t> replica_of_party;  // its number on the first rank of each
  bool has_majority = false;               // parties[0] is more than half of all
};

// Of all ranks, by their numbers: the replicas whose copies differ, ordered by tensor state, then
// as the document has them. CHECKs that holders agree on what they hold, which follows from the
// layout.
std::vector<ReplicaDifference> CountVotes(std::span<const ReplicaBallot> ballots);

// A rank's sealed slot.
struct ReplicaHolder {
  std::shared_ptr<const Registration> registration;
  std::optional<std::vector<Fingerprint>> sums;  // empty: not known
  std::vector<std::span<const std::byte>> blocks;
  std::vector<uint32_t> block_crc32c;
  std::shared_ptr<SharedMapping> mapping;  // in which the blocks are
};

// Takes the sums if they are not known, out of the blocks in which replicas lie: for a WorkPool.
// After kAborted (bytes in memory have changed since they were checksummed) they still are not.
absl::Status TakeSums(Rank rank, ReplicaHolder& holder);

// OK if all copies of every replica are equal. `holders`: of all ranks, by their numbers; CHECKs
// that their sums are known. Errors: kDataLoss with tensor, state, elements, the ranks and how they
// voted. May read the blocks of what differs: for a WorkPool.
absl::Status VoteOnReplicas(std::span<const ReplicaHolder> holders);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_REPLICA_VOTE_H_
