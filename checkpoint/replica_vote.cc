#include "checkpoint/replica_vote.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "checkpoint/block_sums.h"

namespace holdfast {
namespace {

// Texts stay readable: more ranks than these are counted, more parties not shown.
constexpr size_t kRanksNamedMax = 8;
constexpr size_t kPartiesShownMax = 4;
// What is compared at once; a multiple of every element's size.
constexpr uint64_t kCompareBytes = uint64_t{64} << 10;

// The replicas with one set of holders: of each holder, in its order, their numbers.
using NumbersOfHolders = std::vector<std::vector<uint32_t>>;

std::map<std::vector<uint32_t>, NumbersOfHolders> SortByHolders(
    std::span<const ReplicaBallot> ballots) {
  std::map<std::vector<uint32_t>, NumbersOfHolders> sorted;
  for (uint32_t rank = 0; rank < ballots.size(); ++rank) {
    const Replicas& replicas = ballots[rank].replicas;
    CHECK(ballots[rank].sums.size() == replicas.replicas.size());
    // Where the numbers of each of this rank's sets go.
    std::vector<std::vector<uint32_t>*> numbers;
    for (const std::vector<uint32_t>& ranks : replicas.holder_sets) {
      if (ranks.size() < 2) {
        numbers.push_back(nullptr);
        continue;
      }
      const size_t mine =
          static_cast<size_t>(std::lower_bound(ranks.begin(), ranks.end(), rank) - ranks.begin());
      CHECK(mine < ranks.size() && ranks[mine] == rank && ranks.back() < ballots.size());
      NumbersOfHolders& of_holders = sorted[ranks];
      of_holders.resize(ranks.size());
      numbers.push_back(&of_holders[mine]);
    }
    for (uint32_t number = 0; number < replicas.replicas.size(); ++number) {
      numbers.at(replicas.replicas[number].holders)->push_back(number);
    }
  }
  return sorted;
}

// The vote on one replica; nothing if all copies are equal.
std::optional<ReplicaDifference> Count(const std::vector<uint32_t>& ranks,
                                       std::span<const ReplicaBallot> ballots,
                                       const NumbersOfHolders& numbers, size_t n) {
  struct Party {
    Fingerprint sum;
    std::vector<uint32_t> ranks;
    uint32_t replica = 0;
  };
  std::vector<Party> parties;
  for (size_t holder = 0; holder < ranks.size(); ++holder) {
    const uint32_t replica = numbers[holder][n];
    const Fingerprint& sum = ballots[ranks[holder]].sums[replica];
    const auto found = std::find_if(parties.begin(), parties.end(),
                                    [&](const Party& party) { return party.sum == sum; });
    if (found == parties.end()) {
      parties.push_back({sum, {ranks[holder]}, replica});
    } else {
      found->ranks.push_back(ranks[holder]);
    }
  }
  if (parties.size() == 1) return std::nullopt;
  // They stand in the order of their lowest rank.
  std::stable_sort(parties.begin(), parties.end(),
                   [](const Party& a, const Party& b) { return a.ranks.size() > b.ranks.size(); });
  ReplicaDifference difference;
  difference.has_majority = parties[0].ranks.size() * 2 > ranks.size();
  for (Party& party : parties) {
    difference.parties.push_back(std::move(party.ranks));
    difference.replica_of_party.push_back(party.replica);
  }
  return difference;
}

// "rank 2", "ranks 0, 1, 3", "ranks 0, 1, ... and 90 more"
std::string Ranks(const std::vector<uint32_t>& ranks) {
  std::string text = absl::StrCat(
      ranks.size() == 1 ? "rank " : "ranks ",
      absl::StrJoin(ranks.begin(), ranks.begin() + std::min(ranks.size(), kRanksNamedMax), ", "));
  if (ranks.size() > kRanksNamedMax) {
    absl::StrAppend(&text, " and ", ranks.size() - kRanksNamedMax, " more");
  }
  return text;
}

// Reads a replica's bytes out of a slot, block by block, each verified when it is first needed.
class ReplicaReader {
 public:
  ReplicaReader(const ReplicaHolder& holder, uint32_t replica)
      : holder_(holder), places_(holder.registration->replicas().PlacesOf(replica)) {
    element_bytes_ = ElementBytes(
        holder.registration->layout().tensor_states()[places_[0].piece.tensor_state].dtype);
  }

  // Bytes from `begin` on, counted from the replica's first. False: what is in memory is not what
  // was checksummed.
  bool Read(uint64_t begin, std::span<std::byte> out) {
    const uint64_t first_element = places_[0].piece.begin;
    for (const PlacedPiece& place : places_) {
      const uint64_t place_begin = (place.piece.begin - first_element) * element_bytes_;
      const uint64_t place_end = (place.piece.end - first_element) * element_bytes_;
      const uint64_t from = std::max(begin, place_begin);
      const uint64_t to = std::min(begin + out.size(), place_end);
      if (from >= to) continue;
      if (!ReadSlot(place.image_offset_bytes + from - place_begin,
                    out.subspan(from - begin, to - from))) {
        return false;
      }
    }
    return true;
  }

 private:
  bool ReadSlot(uint64_t offset_bytes, std::span<std::byte> out) {
    const uint64_t block_bytes = holder_.registration->block_bytes();
    while (!out.empty()) {
      const uint64_t block = offset_bytes / block_bytes;
      const uint64_t in_block = offset_bytes % block_bytes;
      const std::span<const std::byte> bytes = holder_.blocks[block];
      if (!verified_.contains(block)) {
        if (Crc32c(bytes) != holder_.block_crc32c[block]) return false;
        verified_.insert(block);
      }
      const uint64_t count = std::min<uint64_t>(out.size(), block_bytes - in_block);
      std::ranges::copy(bytes.subspan(in_block, count), out.begin());
      out = out.subspan(count);
      offset_bytes += count;
    }
    return true;
  }

  const ReplicaHolder& holder_;
  const std::span<const PlacedPiece> places_;
  uint64_t element_bytes_ = 0;
  std::set<uint64_t> verified_;
};

// Where the copies of the parties that are shown differ.
struct Narrowed {
  uint64_t differing_count = 0;     // elements
  uint64_t first = 0;               // counted from the replica's first
  std::vector<std::string> values;  // of that element, of each party
};

std::string Hex(std::span<const std::byte> element) {
  std::string text = "0x";
  for (size_t i = element.size(); i-- > 0;) {
    absl::StrAppendFormat(&text, "%02x", std::to_integer<uint32_t>(element[i]));
  }
  return text;
}

// Nothing: the bytes in memory are not those that were compared any more. (A trainer that lives can
// write them.)
std::optional<Narrowed> Narrow(std::span<const ReplicaHolder> holders,
                               const ReplicaDifference& difference, uint64_t element_count,
                               uint64_t element_bytes) {
  std::vector<ReplicaReader> readers;
  for (size_t i = 0; i < std::min(difference.parties.size(), kPartiesShownMax); ++i) {
    readers.emplace_back(holders[difference.parties[i][0]], difference.replica_of_party[i]);
  }
  std::vector<std::vector<std::byte>> bytes(readers.size());
  Narrowed narrowed;
  const uint64_t end = element_count * element_bytes;
  for (uint64_t at = 0; at < end; at += kCompareBytes) {
    const uint64_t size = std::min(kCompareBytes, end - at);
    for (size_t i = 0; i < readers.size(); ++i) {
      bytes[i].resize(size);
      if (!readers[i].Read(at, bytes[i])) return std::nullopt;
    }
    if (std::all_of(bytes.begin(), bytes.end(), [&](const auto& of) { return of == bytes[0]; })) {
      continue;
    }
    for (uint64_t i = 0; i < size; i += element_bytes) {
      const auto element = [&](const std::vector<std::byte>& of) {
        return std::span(of).subspan(i, element_bytes);
      };
      if (std::all_of(bytes.begin(), bytes.end(), [&](const auto& of) {
            return std::ranges::equal(element(of), element(bytes[0]));
          })) {
        continue;
      }
      if (narrowed.differing_count++ > 0) continue;
      narrowed.first = (at + i) / element_bytes;
      for (const std::vector<std::byte>& of : bytes) narrowed.values.push_back(Hex(element(of)));
    }
  }
  return narrowed.differing_count > 0 ? std::optional(std::move(narrowed)) : std::nullopt;
}

// "element 17 (at [0, 17])" of the tensor: the element of the piece's box of this number.
std::string DescribeElement(const TensorState& state, const Piece& piece, const BoxTable& boxes,
                            uint64_t in_box) {
  std::vector<uint64_t> at(state.shape.size());
  std::span<const uint64_t> size = state.shape;
  if (piece.box != kWholeTensor) size = boxes[piece.box].size;
  for (size_t d = at.size(); d-- > 0;) {
    at[d] = in_box % size[d] + (piece.box == kWholeTensor ? 0 : boxes[piece.box].lo[d]);
    in_box /= size[d];
  }
  uint64_t element = 0;
  for (size_t d = 0; d < at.size(); ++d) element = element * state.shape[d] + at[d];
  return absl::StrFormat("element %d (at [%s])", element, absl::StrJoin(at, ", "));
}

// Who differs from whom.
std::string DescribeVote(const ReplicaDifference& difference) {
  const std::vector<std::vector<uint32_t>>& parties = difference.parties;
  if (difference.has_majority) {
    std::vector<uint32_t> others;
    for (size_t i = 1; i < parties.size(); ++i) {
      others.insert(others.end(), parties[i].begin(), parties[i].end());
    }
    std::sort(others.begin(), others.end());
    return absl::StrFormat("%s %s from %s", Ranks(others),
                           others.size() == 1 ? "differs" : "differ", Ranks(parties[0]));
  }
  std::vector<std::string> texts;
  for (size_t i = 0; i < std::min(parties.size(), kPartiesShownMax); ++i) {
    texts.push_back(Ranks(parties[i]));
  }
  if (parties.size() > kPartiesShownMax) {
    texts.push_back(absl::StrFormat("%d more copies", parties.size() - kPartiesShownMax));
  }
  return absl::StrFormat("%s differ from each other, without a majority that says which is right",
                         absl::StrJoin(texts, " and "));
}

std::string DescribePlace(std::span<const ReplicaHolder> holders,
                          const ReplicaDifference& difference) {
  const Registration& registration = *holders[difference.parties[0][0]].registration;
  const Piece& piece = registration.replicas().replicas[difference.replica_of_party[0]].piece;
  const TensorState& state = registration.layout().tensor_states()[piece.tensor_state];
  const std::string elements = Describe(piece, registration.stored_boxes());
  const std::optional<Narrowed> narrowed =
      Narrow(holders, difference, piece.ElementCount(), ElementBytes(state.dtype));
  if (!narrowed.has_value()) {
    return absl::StrFormat("%s, %s (the copies were overwritten before their bytes were compared)",
                           Describe(state), elements);
  }
  std::vector<std::string> values;
  for (size_t i = 0; i < narrowed->values.size(); ++i) {
    values.push_back(absl::StrCat(narrowed->values[i], " on ", Ranks(difference.parties[i])));
  }
  return absl::StrFormat(
      "%s, %s: %s; %d of %s %s", Describe(state),
      DescribeElement(state, piece, registration.stored_boxes(), piece.begin + narrowed->first),
      absl::StrJoin(values, ", "), narrowed->differing_count, elements,
      narrowed->differing_count == 1 ? "differs" : "differ");
}

// What the first difference does not say of the others.
std::string DescribeRest(std::span<const ReplicaHolder> holders,
                         std::span<const ReplicaDifference> differences) {
  if (differences.size() == 1) return "";
  std::set<uint32_t> tensor_states;
  std::set<uint32_t> suspects;
  for (const ReplicaDifference& difference : differences) {
    const Registration& registration = *holders[difference.parties[0][0]].registration;
    tensor_states.insert(
        registration.replicas().replicas[difference.replica_of_party[0]].piece.tensor_state);
    if (!difference.has_majority) continue;
    for (size_t i = 1; i < difference.parties.size(); ++i) {
      suspects.insert(difference.parties[i].begin(), difference.parties[i].end());
    }
  }
  std::string text = absl::StrFormat("; in all, %d pieces of %d tensor states differ",
                                     differences.size(), tensor_states.size());
  if (!suspects.empty()) {
    absl::StrAppend(&text, ", suspected: ", Ranks({suspects.begin(), suspects.end()}));
  }
  return text;
}

}  // namespace

std::vector<ReplicaDifference> CountVotes(std::span<const ReplicaBallot> ballots) {
  // (tensor state, lowest holder, its number): the order.
  std::map<std::tuple<uint32_t, uint32_t, uint32_t>, ReplicaDifference> found;
  for (const auto& [ranks, numbers] : SortByHolders(ballots)) {
    const std::vector<uint32_t>& first = numbers[0];
    const auto piece_of = [&](size_t holder, size_t n) -> const Piece& {
      return ballots[ranks[holder]].replicas.replicas[numbers[holder][n]].piece;
    };
    for (size_t holder = 1; holder < ranks.size(); ++holder) {
      CHECK(numbers[holder].size() == first.size());
    }
    for (size_t n = 0; n < first.size(); ++n) {
      for (size_t holder = 1; holder < ranks.size(); ++holder) {
        CHECK(piece_of(holder, n).tensor_state == piece_of(0, n).tensor_state &&
              piece_of(holder, n).ElementCount() == piece_of(0, n).ElementCount());
      }
      if (auto difference = Count(ranks, ballots, numbers, n); difference.has_value()) {
        found.emplace(std::tuple(piece_of(0, n).tensor_state, ranks[0], first[n]),
                      *std::move(difference));
      }
    }
  }
  std::vector<ReplicaDifference> differences;
  for (auto& [order, difference] : found) differences.push_back(std::move(difference));
  return differences;
}

absl::Status TakeSums(Rank rank, ReplicaHolder& holder) {
  if (holder.sums.has_value()) return absl::OkStatus();
  holder.sums = SumReplicas(*holder.registration, holder.blocks, holder.block_crc32c);
  if (holder.sums.has_value()) return absl::OkStatus();
  return absl::AbortedError(absl::StrFormat(
      "replicas cannot be compared: what rank %d captured has changed in memory", Value(rank)));
}

absl::Status VoteOnReplicas(std::span<const ReplicaHolder> holders) {
  std::vector<ReplicaBallot> ballots;
  for (const ReplicaHolder& holder : holders) {
    CHECK(holder.sums.has_value());
    ballots.push_back({holder.registration->replicas(), *holder.sums});
  }
  const std::vector<ReplicaDifference> differences = CountVotes(ballots);
  if (differences.empty()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("replicas differ: ", DescribeVote(differences[0]), ": ",
                                          DescribePlace(holders, differences[0]),
                                          DescribeRest(holders, differences)));
}

}  // namespace holdfast
