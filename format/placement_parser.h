// Reads the parts of a layout document that say how tensors are cut: meshes, packs, the zero rule,
// placements. Inside of format/layout*. Everything is checked here for all ranks.
#ifndef HOLDFAST_FORMAT_PLACEMENT_PARSER_H_
#define HOLDFAST_FORMAT_PLACEMENT_PARSER_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/json_reader.h"
#include "format/layout_program.h"

namespace holdfast {

using NameMap = std::unordered_map<std::string, uint32_t>;

absl::Status RefuseLayout(const JsonValue& where, const std::string& text);
absl::Status UnknownLayoutName(const JsonValue& where, const std::string& kind,
                               const std::string& name, const NameMap& known);
// A member that is a name (CheckName).
absl::StatusOr<std::string> ParseLayoutName(const JsonValue& value, std::string_view key);

// Threads: one. Lifetime: program and the JSON document outlive it.
class PlacementParser {
 public:
  explicit PlacementParser(LayoutProgram& program) : program_(program) {}

  // In this order, before anything else. `root`: the document. Buffers of packs are interned.
  absl::Status ParseMeshes(const JsonValue& root);
  absl::Status ParsePacks(const JsonValue& root);
  absl::Status ParseZero(const JsonValue& root);
  absl::Status ParsePlacements(const JsonValue& root);

  // What `place` says for this state: the name of a placement, or the placement itself; absent:
  // replicated. Index into LayoutProgram::placements.
  absl::StatusOr<uint32_t> PlacementOf(const JsonValue& place, const std::string& state);
  // Ranks of `{"ranks": [...]}` or `{"where": {"tp": [0]}, "mesh": NAME}`: ascending, not empty.
  absl::StatusOr<std::vector<uint32_t>> RanksOf(const JsonValue& value) const;
  // Of the local tensors of one tensor on any rank: the most places and pieces.
  struct LocalBounds {
    uint64_t places = 0;
    uint64_t parts = 0;
  };
  // An error if the placement does not fit tensors of this shape on every rank.
  absl::StatusOr<LocalBounds> CheckFits(const JsonValue& where, uint32_t placement,
                                        const std::vector<uint64_t>& shape);

  uint32_t InternBuffer(const std::string& name);

 private:
  // A placement as written: what the zero rule adds depends on the state.
  struct Written {
    Placement placement;              // without the zero operation
    std::optional<PlacementOp> zero;  // the cut, where the rule asks for one
    // What it is in LayoutProgram::placements, without and with that cut, once it was asked for.
    std::optional<uint32_t> interned[2];
  };

  absl::Status ParseMesh(const JsonValue& axes, const std::string& name);
  absl::StatusOr<uint32_t> ParseWritten(const JsonValue& value);
  absl::Status CheckFollows(const JsonValue& where, const std::vector<PlacementOp>& before,
                            const PlacementOp& op, uint32_t mesh) const;
  absl::StatusOr<PlacementOp> ParseOp(const JsonValue& value, uint32_t mesh, bool* is_zero) const;
  absl::StatusOr<PlacementOp> ParseShard(const JsonValue& value, uint32_t mesh) const;
  static absl::StatusOr<std::vector<uint64_t>> ParseBlocks(const JsonValue& value);
  absl::StatusOr<PlacementOp> ParsePlace(const JsonValue& value, uint32_t mesh) const;
  absl::StatusOr<PlacementOp> ParsePack(const JsonValue& value, uint32_t mesh) const;
  absl::StatusOr<PlacementOp> ParseZeroOp(const JsonValue& value, uint32_t mesh) const;
  absl::StatusOr<PlacementOp> ParseView(const JsonValue& value) const;
  absl::StatusOr<PlacementOp> ParsePerm(const JsonValue& value) const;
  absl::StatusOr<PlacementOp> ParsePad(const JsonValue& value, uint32_t mesh) const;
  // `count`: how many parts; `what`: of what, for errors.
  static absl::StatusOr<CutRule> ParseRule(const JsonValue& value, uint64_t count,
                                           const std::string& what);
  absl::StatusOr<std::vector<uint32_t>> ParseCoordinates(const JsonValue& value,
                                                         const MeshAxis& axis) const;
  absl::StatusOr<uint32_t> CoordinateOfIndex(const JsonValue& value, const MeshAxis& axis) const;
  absl::StatusOr<uint32_t> MeshOf(const JsonValue& value) const;
  // `"axis": "tp"` or `"axis": ["dp", "cp"]`.
  enum class AxesMin { kNone, kOne };
  absl::StatusOr<std::vector<uint32_t>> Axes(const JsonValue& value, uint32_t mesh,
                                             AxesMin least = AxesMin::kOne) const;
  absl::StatusOr<uint32_t> Axis(const JsonValue& name_value, uint32_t mesh) const;

  uint32_t Intern(Placement placement);
  std::string FirstMisfit(const Placement& placement, const std::vector<uint64_t>& shape,
                          LocalBounds& bounds);
  std::string FirstMisfitByRank(const Placement& placement, const std::vector<uint64_t>& shape,
                                LocalBounds& bounds);
  // Empty, or that this is too much.
  std::string AddWork(uint64_t work);

  LayoutProgram& program_;
  NameMap mesh_names_;
  std::vector<NameMap> axes_;  // of each mesh
  NameMap packs_;
  NameMap buffers_;
  NameMap written_names_;
  std::vector<Written> written_;
  NameMap placements_;  // by content
  // The zero rule.
  bool has_zero_ = false;
  uint32_t zero_stage_ = 0;
  std::vector<std::string> zero_axes_;
  NameMap zero_from_;  // by state: the stage from which on it is cut; "*": all others
  std::unordered_map<std::string, LocalBounds> fits_;  // (shape, placement) pairs
  uint64_t evaluation_count_ = 0;
  uint64_t part_count_ = 0;
  uint64_t work_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_PLACEMENT_PARSER_H_
