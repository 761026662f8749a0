// Packs: many local tensors behind each other in one 1-D buffer that is cut evenly over one axis,
// or over several together. Inside of format/layout*.
//
// What a pack holds can differ between ranks that differ in another axis: a pipeline stage packs
// its own tensors. A *tuple* is one choice of coordinates of those other axes; all ranks of a tuple
// share one pack. The same elements of a tensor can lie in the packs of several tuples, cut at
// different elements; PackCuts finds intervals that every rank holds wholly or not at all.
#ifndef HOLDFAST_FORMAT_LAYOUT_PACKS_H_
#define HOLDFAST_FORMAT_LAYOUT_PACKS_H_

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "format/layout_program.h"
#include "format/local_tensor.h"

namespace holdfast {

// Per axis of the mesh: coordinates, ascending.
using CoordinateChoices = std::vector<std::vector<uint32_t>>;
CoordinateChoices AllCoordinates(const Mesh& mesh);
// Fills in all coordinates of the axes that have no choice yet.
void ChooseAllOthers(const Mesh& mesh, CoordinateChoices& choices);
// All ranks whose coordinate of every axis is among the choices; ascending.
std::vector<uint32_t> RanksOf(const Mesh& mesh, const CoordinateChoices& choices);
// Fixes the coordinates of these axes to what JointCoordinate made `joint` of.
void ChooseJoint(const Mesh& mesh, std::span<const uint32_t> axes, uint32_t joint,
                 CoordinateChoices& choices);

struct PackContents {
  static constexpr uint64_t kNotHeld = UINT64_MAX;
  std::vector<uint64_t> starts;  // of each member, in elements of the pack
  uint64_t slice_elements = 0;   // of each coordinate of the pack's axes, padding included
};

// The pack of the ranks at `coordinates` (those of the pack's own axes do not count).
PackContents FillPack(const LayoutProgram& program, const PackProgram& pack,
                      std::span<const uint32_t> coordinates);

struct PackCut {
  uint64_t begin = 0;  // places of the member's local tensor
  uint64_t end = 0;
  std::vector<uint32_t> ranks;  // that hold it, ascending
};

// Threads: any; immutable. Lifetime: refers to program and pack.
class PackCuts {
 public:
  // O(tuples x members).
  PackCuts(const LayoutProgram& program, const PackProgram& pack);

  // Cuts [begin, end) of the local tensor that the ranks at `coordinates` have of a member, where
  // its holders change.
  std::vector<PackCut> CutsOf(uint32_t member, std::span<const uint32_t> coordinates,
                              uint64_t begin, uint64_t end) const;

  // What AddLoads costs: ranks that hold a part between two cuts, counted for each part, the boxes
  // in which it may be, and `part_numbers` more for each. Stops above `numbers_max`.
  uint64_t HolderNumbers(uint64_t part_numbers, uint64_t numbers_max) const;

  // Adds the bytes that each set of ranks holds of all members.
  void AddLoads(std::map<std::vector<uint32_t>, uint64_t>& loads) const;

 private:
  // Tuple and coordinate of the pack's axes together.
  using Holder = std::pair<uint32_t, uint32_t>;
  struct Interval {
    uint64_t begin = 0;
    uint64_t end = 0;
    std::vector<Holder> holders;
  };

  // The coordinates on which the member's local tensor depends, as one number.
  uint64_t LocalKey(uint32_t member, std::span<const uint32_t> coordinates) const;
  // Tuples that hold the member, those with equal local tensors together.
  std::map<uint64_t, std::vector<uint32_t>> TuplesAlike(uint32_t member) const;
  LocalTensor LocalOf(uint32_t member, uint32_t tuple) const;
  // Where the holders of [begin, end) of the member's local tensor change, both ends included.
  std::vector<uint64_t> CutsIn(uint32_t member, const std::vector<uint32_t>& tuples, uint64_t begin,
                               uint64_t end) const;
  std::vector<Interval> IntervalsOf(uint32_t member, const std::vector<uint32_t>& tuples,
                                    uint64_t begin, uint64_t end) const;
  std::vector<uint32_t> Ranks(const std::vector<Holder>& holders) const;

  const LayoutProgram* program_;
  const PackProgram* pack_;
  const Mesh* mesh_;
  std::vector<std::vector<uint32_t>> tuples_;  // coordinates; 0 on axes that do not count
  std::vector<PackContents> contents_;         // of each tuple
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_LAYOUT_PACKS_H_
