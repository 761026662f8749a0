#include "format/placement_parser.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "format/layout_packs.h"
#include "format/local_tensor.h"

namespace holdfast {
namespace {

constexpr size_t kMeshesMax = 1024;
constexpr size_t kPacksMax = 65'536;
constexpr size_t kBlocksMax = 4096;                // of a shard
constexpr size_t kOpsMax = 64;                     // of a placement
constexpr uint64_t kGrainMax = uint64_t{1} << 32;  // grain, align_elements, multiple_elements
constexpr uint64_t kSlotsMax = uint64_t{1} << 20;  // of a place by index
constexpr size_t kSuggestionsFromMax = 1000;       // names looked at for "did you mean"
constexpr uint32_t kZeroStageMax = 3;

std::string Short(std::string_view name) { return std::string(name.substr(0, 200)); }

// An optional positive number, 1 if absent.
absl::StatusOr<uint64_t> Grain(const JsonValue& value, std::string_view key) {
  const JsonValue grain_value = value.Find(key);
  if (!grain_value.present()) return 1;
  ASSIGN_OR_RETURN(const uint64_t grain, grain_value.Uint64());
  if (grain < 1 || grain > kGrainMax) return grain_value.Mismatch("1 to 2^32");
  return grain;
}

absl::StatusOr<uint32_t> Dim(const JsonValue& value) {
  ASSIGN_OR_RETURN(const JsonValue dim_value, value.Get("dim"));
  ASSIGN_OR_RETURN(const uint64_t dim, dim_value.Uint64());
  if (dim >= kTensorDimsMax) {
    return dim_value.Mismatch(absl::StrFormat("a dimension below %d", kTensorDimsMax));
  }
  return static_cast<uint32_t>(dim);
}

}  // namespace

absl::Status RefuseLayout(const JsonValue& where, const std::string& text) {
  return absl::InvalidArgumentError(absl::StrCat(where.Path(), ": ", text));
}

absl::Status UnknownLayoutName(const JsonValue& where, const std::string& kind,
                               const std::string& name, const NameMap& known) {
  std::vector<std::string_view> names;
  for (const auto& [each, index] : known) {
    if (names.size() < kSuggestionsFromMax) names.push_back(each);
  }
  std::sort(names.begin(), names.end());
  return RefuseLayout(
      where, absl::StrFormat("unknown %s \"%s\"%s", kind, Short(name), DidYouMean(name, names)));
}

absl::StatusOr<std::string> ParseLayoutName(const JsonValue& value, std::string_view key) {
  ASSIGN_OR_RETURN(const JsonValue name_value, value.Get(key));
  ASSIGN_OR_RETURN(const std::string_view name, name_value.String());
  if (absl::Status good = CheckName(std::string(key), std::string(name)); !good.ok()) {
    return RefuseLayout(name_value, std::string(good.message()));
  }
  return std::string(name);
}

// ---- Meshes ----

absl::Status PlacementParser::ParseMeshes(const JsonValue& root) {
  ASSIGN_OR_RETURN(const JsonValue mesh, root.Get("mesh"));
  RETURN_IF_ERROR(ParseMesh(mesh, ""));
  const JsonValue meshes = root.Find("meshes");
  if (!meshes.present()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const auto names, meshes.Keys());
  if (names.size() > kMeshesMax) {
    return meshes.Mismatch(absl::StrCat("at most ", kMeshesMax, " meshes"));
  }
  for (std::string_view name : names) {
    RETURN_IF_ERROR(CheckName("mesh", std::string(name)));
    RETURN_IF_ERROR(ParseMesh(meshes.Find(name), std::string(name)));
  }
  return absl::OkStatus();
}

absl::Status PlacementParser::ParseMesh(const JsonValue& axes, const std::string& name) {
  ASSIGN_OR_RETURN(const size_t count, axes.ArraySize());
  if (count > kMeshAxesMax) return axes.Mismatch(absl::StrCat("at most ", kMeshAxesMax, " axes"));
  Mesh mesh;
  mesh.name = name;
  NameMap numbers;
  uint64_t world_size = 1;
  for (size_t i = 0; i < count; ++i) {
    RETURN_IF_ERROR(axes[i].ExpectKeys({"axis", "size"}));
    ASSIGN_OR_RETURN(const std::string axis, ParseLayoutName(axes[i], "axis"));
    ASSIGN_OR_RETURN(const JsonValue size_value, axes[i].Get("size"));
    ASSIGN_OR_RETURN(const uint64_t size, size_value.Uint64());
    if (size < 1 || size > kWorldSizeMax || world_size * size > kWorldSizeMax) {
      return size_value.Mismatch(
          absl::StrFormat("at least 1, and at most %d ranks in all", kWorldSizeMax));
    }
    world_size *= size;
    if (!numbers.emplace(axis, i).second) {
      return RefuseLayout(axes[i], absl::StrFormat("axis \"%s\" is there twice", Short(axis)));
    }
    mesh.axes.push_back({axis, static_cast<uint32_t>(size)});
  }
  if (program_.meshes.empty()) {
    program_.world_size = static_cast<uint32_t>(world_size);
  } else if (world_size != program_.world_size) {
    return RefuseLayout(axes, absl::StrFormat("expected axes of %d ranks in all, as \"mesh\" has, "
                                              "found %d",
                                              program_.world_size, world_size));
  }
  mesh_names_.emplace(name, static_cast<uint32_t>(program_.meshes.size()));
  program_.meshes.push_back(std::move(mesh));
  axes_.push_back(std::move(numbers));
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> PlacementParser::MeshOf(const JsonValue& value) const {
  if (!value.Find("mesh").present()) return 0;
  ASSIGN_OR_RETURN(const std::string name, ParseLayoutName(value, "mesh"));
  const auto found = mesh_names_.find(name);
  if (found == mesh_names_.end()) {
    return UnknownLayoutName(value.Find("mesh"), "mesh", name, mesh_names_);
  }
  return found->second;
}

absl::StatusOr<uint32_t> PlacementParser::Axis(const JsonValue& name_value, uint32_t mesh) const {
  ASSIGN_OR_RETURN(const std::string_view name, name_value.String());
  const auto found = axes_[mesh].find(std::string(name));
  if (found == axes_[mesh].end()) {
    const std::string kind =
        mesh == 0 ? "axis" : absl::StrFormat("axis of mesh \"%s\"", program_.meshes[mesh].name);
    return UnknownLayoutName(name_value, kind, std::string(name), axes_[mesh]);
  }
  return found->second;
}

absl::StatusOr<std::vector<uint32_t>> PlacementParser::Axes(const JsonValue& value, uint32_t mesh,
                                                            AxesMin least) const {
  ASSIGN_OR_RETURN(const JsonValue axis_value, value.Get("axis"));
  std::vector<uint32_t> axes;
  if (axis_value.type() != JsonValue::Type::kArray) {
    ASSIGN_OR_RETURN(axes.emplace_back(), Axis(axis_value, mesh));
    return axes;
  }
  ASSIGN_OR_RETURN(const size_t count, axis_value.ArraySize());
  if (count == 0 && least == AxesMin::kOne) return axis_value.Mismatch("at least one axis");
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const uint32_t axis, Axis(axis_value[i], mesh));
    if (std::find(axes.begin(), axes.end(), axis) != axes.end()) {
      return RefuseLayout(axis_value[i], "expected distinct axes");
    }
    axes.push_back(axis);
  }
  return axes;
}

absl::StatusOr<std::vector<uint32_t>> PlacementParser::RanksOf(const JsonValue& value) const {
  const JsonValue list = value.Find("ranks");
  const JsonValue where = value.Find("where");
  if (list.present() == where.present()) {
    return RefuseLayout(value, "expected either \"ranks\" or \"where\"");
  }
  std::vector<uint32_t> ranks;
  if (where.present()) {
    ASSIGN_OR_RETURN(const uint32_t number, MeshOf(value));
    const Mesh& mesh = program_.meshes[number];
    CoordinateChoices choices(mesh.axes.size());
    ASSIGN_OR_RETURN(const auto names, where.Keys());
    for (std::string_view name : names) {
      const auto found = axes_[number].find(std::string(name));
      if (found == axes_[number].end()) {
        return UnknownLayoutName(where, "axis", std::string(name), axes_[number]);
      }
      ASSIGN_OR_RETURN(choices[found->second],
                       ParseCoordinates(where.Find(name), mesh.axes[found->second]));
    }
    ChooseAllOthers(mesh, choices);
    return holdfast::RanksOf(mesh, choices);
  }
  if (value.Find("mesh").present()) return RefuseLayout(value, "expected no mesh beside ranks");
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count == 0) return list.Mismatch("at least one rank");
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const uint64_t rank, list[i].Uint64());
    if (rank >= program_.world_size) {
      return list[i].Mismatch(absl::StrCat("a rank below ", program_.world_size));
    }
    ranks.push_back(static_cast<uint32_t>(rank));
  }
  std::sort(ranks.begin(), ranks.end());
  if (std::adjacent_find(ranks.begin(), ranks.end()) != ranks.end()) {
    return RefuseLayout(list, "expected distinct ranks");
  }
  return ranks;
}

// ---- Packs and the zero rule ----

absl::Status PlacementParser::ParsePacks(const JsonValue& root) {
  const JsonValue packs = root.Find("packs");
  if (!packs.present()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const size_t count, packs.ArraySize());
  if (count > kPacksMax) return packs.Mismatch(absl::StrCat("at most ", kPacksMax, " packs"));
  for (size_t i = 0; i < count; ++i) {
    const JsonValue pack = packs[i];
    RETURN_IF_ERROR(
        pack.ExpectKeys({"pack", "mesh", "axis", "align_elements", "multiple_elements", "buffer"}));
    PackProgram program;
    ASSIGN_OR_RETURN(program.name, ParseLayoutName(pack, "pack"));
    ASSIGN_OR_RETURN(program.mesh, MeshOf(pack));
    ASSIGN_OR_RETURN(program.axes, Axes(pack, program.mesh, AxesMin::kNone));
    ASSIGN_OR_RETURN(program.align_elements, Grain(pack, "align_elements"));
    ASSIGN_OR_RETURN(program.multiple_elements, Grain(pack, "multiple_elements"));
    ASSIGN_OR_RETURN(const std::string buffer, ParseLayoutName(pack, "buffer"));
    program.buffer = InternBuffer(buffer);
    if (!packs_.emplace(program.name, i).second) {
      return RefuseLayout(pack, absl::StrFormat("pack \"%s\" is there twice", Short(program.name)));
    }
    program_.packs.push_back(std::move(program));
  }
  return absl::OkStatus();
}

absl::Status PlacementParser::ParseZero(const JsonValue& root) {
  zero_from_ = {{"param", 3}, {"grad", 2}, {"*", 1}};
  const JsonValue zero = root.Find("zero");
  if (!zero.present()) return absl::OkStatus();
  has_zero_ = true;
  RETURN_IF_ERROR(zero.ExpectKeys({"stage", "axis", "states"}));
  ASSIGN_OR_RETURN(const JsonValue stage_value, zero.Get("stage"));
  ASSIGN_OR_RETURN(const uint64_t stage, stage_value.Uint64());
  if (stage > kZeroStageMax) return stage_value.Mismatch("a stage of 0 to 3");
  zero_stage_ = static_cast<uint32_t>(stage);
  // Names: the axes of each placement's own mesh.
  ASSIGN_OR_RETURN(const JsonValue axis_value, zero.Get("axis"));
  if (axis_value.type() == JsonValue::Type::kArray) {
    ASSIGN_OR_RETURN(const size_t count, axis_value.ArraySize());
    if (count == 0) return axis_value.Mismatch("at least one axis");
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const std::string_view name, axis_value[i].String());
      zero_axes_.emplace_back(name);
    }
  } else {
    ASSIGN_OR_RETURN(const std::string name, ParseLayoutName(zero, "axis"));
    zero_axes_.push_back(name);
  }
  const JsonValue states = zero.Find("states");
  if (!states.present()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const auto names, states.Keys());
  for (std::string_view name : names) {
    ASSIGN_OR_RETURN(const uint64_t from, states.Find(name).Uint64());
    if (from < 1 || from > kZeroStageMax) {
      return states.Find(name).Mismatch("the stage from which on it is cut, 1 to 3");
    }
    zero_from_[std::string(name)] = static_cast<uint32_t>(from);
  }
  return absl::OkStatus();
}

// ---- Placements ----

absl::Status PlacementParser::ParsePlacements(const JsonValue& root) {
  Intern({});  // number 0: replicated
  const JsonValue placements = root.Find("placements");
  if (!placements.present()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const auto keys, placements.Keys());
  for (std::string_view key : keys) {
    RETURN_IF_ERROR(CheckName("placement", std::string(key)));
    ASSIGN_OR_RETURN(written_names_[std::string(key)], ParseWritten(placements.Find(key)));
  }
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> PlacementParser::PlacementOf(const JsonValue& place,
                                                      const std::string& state) {
  if (!place.present()) return 0;
  uint32_t number = 0;
  if (place.type() == JsonValue::Type::kString) {
    ASSIGN_OR_RETURN(const std::string_view name, place.String());
    const auto found = written_names_.find(std::string(name));
    if (found == written_names_.end()) {
      return UnknownLayoutName(place, "placement", std::string(name), written_names_);
    }
    number = found->second;
  } else {
    ASSIGN_OR_RETURN(number, ParseWritten(place));
  }
  Written& written = written_[number];
  bool is_cut = false;
  if (written.zero.has_value()) {
    const auto named = zero_from_.find(state);
    is_cut = zero_stage_ >= (named == zero_from_.end() ? zero_from_.at("*") : named->second);
  }
  std::optional<uint32_t>& interned = written.interned[is_cut ? 1 : 0];
  if (!interned.has_value()) {
    Placement placement = written.placement;
    if (is_cut) placement.ops.push_back(*written.zero);
    interned = Intern(std::move(placement));
  }
  const uint32_t result = *interned;
  // One that stands in its place is not asked for again.
  if (place.type() != JsonValue::Type::kString) written_.pop_back();
  return result;
}

absl::StatusOr<uint32_t> PlacementParser::ParseWritten(const JsonValue& value) {
  Written written;
  JsonValue ops = value;
  if (value.type() == JsonValue::Type::kObject) {
    RETURN_IF_ERROR(value.ExpectKeys({"mesh", "ops"}));
    ASSIGN_OR_RETURN(written.placement.mesh, MeshOf(value));
    ASSIGN_OR_RETURN(ops, value.Get("ops"));
  } else if (value.type() != JsonValue::Type::kArray) {
    return value.Mismatch(
        "the name of a placement, an array of operations, or an object with \"mesh\" and \"ops\"");
  }
  ASSIGN_OR_RETURN(const size_t count, ops.ArraySize());
  if (count > kOpsMax) return ops.Mismatch(absl::StrCat("at most ", kOpsMax, " operations"));
  std::vector<PlacementOp> all;  // the zero rule's cut too
  for (size_t i = 0; i < count; ++i) {
    bool is_zero = false;
    ASSIGN_OR_RETURN(PlacementOp op, ParseOp(ops[i], written.placement.mesh, &is_zero));
    if (written.zero.has_value()) {
      return RefuseLayout(ops[i], "expected nothing behind the zero rule");
    }
    RETURN_IF_ERROR(CheckFollows(ops[i], all, op, written.placement.mesh));
    all.push_back(op);
    if (is_zero) {
      written.zero = std::move(op);
    } else {
      written.placement.ops.push_back(std::move(op));
    }
  }
  written_.push_back(std::move(written));
  return static_cast<uint32_t>(written_.size() - 1);
}

absl::Status PlacementParser::CheckFollows(const JsonValue& where,
                                           const std::vector<PlacementOp>& before,
                                           const PlacementOp& op, uint32_t mesh) const {
  bool flat = false;
  for (const PlacementOp& earlier : before) {
    for (uint32_t axis : op.axes) {
      if (std::find(earlier.axes.begin(), earlier.axes.end(), axis) == earlier.axes.end()) continue;
      return RefuseLayout(where,
                          absl::StrFormat("axis \"%s\" is used by an earlier operation of this "
                                          "placement; an axis is used once",
                                          program_.meshes[mesh].axes[axis].name));
    }
    if (earlier.kind == PlacementOp::Kind::kPack) {
      return RefuseLayout(where, "expected nothing behind a pack");
    }
    flat = flat || earlier.kind == PlacementOp::Kind::kFlat;
    if (earlier.kind == PlacementOp::Kind::kView) flat = false;
  }
  if (flat && op.kind == PlacementOp::Kind::kShard && op.dim != 0) {
    return RefuseLayout(where, absl::StrFormat("expected dimension 0, the only one behind a flat "
                                               "cut, found %d",
                                               op.dim));
  }
  return absl::OkStatus();
}

// ---- Operations ----

absl::StatusOr<PlacementOp> PlacementParser::ParseOp(const JsonValue& value, uint32_t mesh,
                                                     bool* is_zero) const {
  ASSIGN_OR_RETURN(const JsonValue op_value, value.Get("op"));
  ASSIGN_OR_RETURN(const std::string_view kind, op_value.String());
  *is_zero = kind == "zero";
  if (kind == "shard" || kind == "flat") return ParseShard(value, mesh);
  if (kind == "place") return ParsePlace(value, mesh);
  if (kind == "pack") return ParsePack(value, mesh);
  if (kind == "zero") return ParseZeroOp(value, mesh);
  if (kind == "view") return ParseView(value);
  if (kind == "perm") return ParsePerm(value);
  if (kind == "pad") return ParsePad(value, mesh);
  if (kind == "partial") {
    return RefuseLayout(op_value,
                        "a partial sum is no state that can be stored: reduce it over its axis, "
                        "and say that it is replicated or sharded");
  }
  static constexpr std::string_view kOps[] = {"shard", "flat", "place", "pack",
                                              "zero",  "view", "perm",  "pad"};
  return RefuseLayout(value,
                      absl::StrFormat("unknown op \"%s\"%s", Short(kind), DidYouMean(kind, kOps)));
}

absl::StatusOr<PlacementOp> PlacementParser::ParseShard(const JsonValue& value,
                                                        uint32_t mesh) const {
  ASSIGN_OR_RETURN(const std::string_view kind, value.Find("op").String());
  PlacementOp op;
  if (kind == "shard") {
    RETURN_IF_ERROR(value.ExpectKeys({"op", "dim", "axis", "rule", "sizes", "grain", "blocks"}));
    ASSIGN_OR_RETURN(op.dim, Dim(value));
    ASSIGN_OR_RETURN(op.blocks, ParseBlocks(value));
  } else {
    RETURN_IF_ERROR(value.ExpectKeys({"op", "axis", "rule", "sizes", "grain"}));
    op.kind = PlacementOp::Kind::kFlat;
  }
  ASSIGN_OR_RETURN(op.axes, Axes(value, mesh));
  const Mesh& axes = program_.meshes[mesh];
  ASSIGN_OR_RETURN(op.rule, ParseRule(value, axes.SizeOf(op.axes),
                                      absl::StrFormat("%d ranks of axis %s", axes.SizeOf(op.axes),
                                                      AxesText(axes, op.axes))));
  return op;
}

absl::StatusOr<std::vector<uint64_t>> PlacementParser::ParseBlocks(const JsonValue& value) {
  std::vector<uint64_t> blocks;
  const JsonValue list = value.Find("blocks");
  if (!list.present()) return blocks;
  if (value.Find("sizes").present()) return RefuseLayout(list, "expected none beside sizes");
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count < 1 || count > kBlocksMax) {
    return list.Mismatch(absl::StrFormat("1 to %d blocks", kBlocksMax));
  }
  uint64_t sum = 0;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const uint64_t width, list[i].Uint64());
    if (width > kTensorBytesMax - sum) return list.Mismatch("a sum of at most 2^62");
    sum += width;
    blocks.push_back(width);
  }
  return blocks;
}

absl::StatusOr<PlacementOp> PlacementParser::ParsePlace(const JsonValue& value,
                                                        uint32_t mesh) const {
  RETURN_IF_ERROR(value.ExpectKeys(
      {"op", "axis", "coordinates", "index", "count", "rule", "sizes", "grain", "virtual"}));
  PlacementOp op;
  op.kind = PlacementOp::Kind::kPlace;
  ASSIGN_OR_RETURN(op.axes, Axes(value, mesh));
  if (op.axes.size() != 1) return value.Find("axis").Mismatch("one axis");
  const MeshAxis& axis = program_.meshes[mesh].axes[op.axes[0]];
  const JsonValue coordinates = value.Find("coordinates");
  if (coordinates.present() == value.Find("index").present()) {
    return RefuseLayout(value, "expected either \"coordinates\" or \"index\"");
  }
  if (coordinates.present()) {
    RETURN_IF_ERROR(value.ExpectKeys({"op", "axis", "coordinates"}));
    ASSIGN_OR_RETURN(op.coordinates, ParseCoordinates(coordinates, axis));
  } else {
    ASSIGN_OR_RETURN(const uint32_t coordinate, CoordinateOfIndex(value, axis));
    op.coordinates = {coordinate};
  }
  return op;
}

absl::StatusOr<PlacementOp> PlacementParser::ParsePack(const JsonValue& value,
                                                       uint32_t mesh) const {
  RETURN_IF_ERROR(value.ExpectKeys({"op", "pack"}));
  PlacementOp op;
  op.kind = PlacementOp::Kind::kPack;
  ASSIGN_OR_RETURN(const std::string name, ParseLayoutName(value, "pack"));
  const auto found = packs_.find(name);
  if (found == packs_.end()) {
    return UnknownLayoutName(value.Find("pack"), "pack", name, packs_);
  }
  const PackProgram& pack = program_.packs[found->second];
  if (pack.mesh != mesh) {
    return RefuseLayout(
        value, absl::StrFormat("pack \"%s\" is cut over mesh \"%s\", this placement "
                               "is over mesh \"%s\"",
                               name, program_.meshes[pack.mesh].name, program_.meshes[mesh].name));
  }
  op.pack = found->second;
  op.axes = pack.axes;
  return op;
}

absl::StatusOr<PlacementOp> PlacementParser::ParseZeroOp(const JsonValue& value,
                                                         uint32_t mesh) const {
  if (!has_zero_) {
    return RefuseLayout(value, "expected \"zero\" in the document, with \"stage\" and \"axis\"");
  }
  if (value.Find("pack").present()) return ParsePack(value, mesh);
  RETURN_IF_ERROR(value.ExpectKeys({"op", "rule", "sizes", "grain"}));
  PlacementOp op;
  op.kind = PlacementOp::Kind::kFlat;
  for (const std::string& name : zero_axes_) {
    const auto found = axes_[mesh].find(name);
    if (found == axes_[mesh].end()) return UnknownLayoutName(value, "axis", name, axes_[mesh]);
    if (std::find(op.axes.begin(), op.axes.end(), found->second) != op.axes.end()) {
      return RefuseLayout(value, "expected distinct axes of the zero rule");
    }
    op.axes.push_back(found->second);
  }
  const uint32_t count = program_.meshes[mesh].SizeOf(op.axes);
  ASSIGN_OR_RETURN(op.rule,
                   ParseRule(value, count, absl::StrFormat("%d ranks of the zero rule", count)));
  return op;
}

absl::StatusOr<PlacementOp> PlacementParser::ParseView(const JsonValue& value) const {
  RETURN_IF_ERROR(value.ExpectKeys({"op", "shape"}));
  PlacementOp op;
  op.kind = PlacementOp::Kind::kView;
  ASSIGN_OR_RETURN(const JsonValue shape, value.Get("shape"));
  ASSIGN_OR_RETURN(const size_t dims, shape.ArraySize());
  if (dims > kTensorDimsMax) {
    return shape.Mismatch(absl::StrCat("at most ", kTensorDimsMax, " dimensions"));
  }
  bool derived = false;
  for (size_t d = 0; d < dims; ++d) {
    ASSIGN_OR_RETURN(const int64_t size, shape[d].Int64());
    if (size < -1 || size > static_cast<int64_t>(kTensorBytesMax) || (size == -1 && derived)) {
      return shape[d].Mismatch("a size of at most 2^62, or -1 once for the one that follows");
    }
    derived = derived || size == -1;
    op.view.push_back(size == -1 ? kDerivedSize : static_cast<uint64_t>(size));
  }
  return op;
}

absl::StatusOr<PlacementOp> PlacementParser::ParsePerm(const JsonValue& value) const {
  RETURN_IF_ERROR(value.ExpectKeys({"op", "dims"}));
  PlacementOp op;
  op.kind = PlacementOp::Kind::kPerm;
  ASSIGN_OR_RETURN(const JsonValue dims, value.Get("dims"));
  ASSIGN_OR_RETURN(const size_t count, dims.ArraySize());
  if (count > kTensorDimsMax) {
    return dims.Mismatch(absl::StrCat("at most ", kTensorDimsMax, " dimensions"));
  }
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const uint64_t dim, dims[i].Uint64());
    if (dim >= count ||
        std::find(op.perm.begin(), op.perm.end(), static_cast<uint32_t>(dim)) != op.perm.end()) {
      return dims[i].Mismatch(absl::StrFormat("each of the dimensions 0 to %d once", count - 1));
    }
    op.perm.push_back(static_cast<uint32_t>(dim));
  }
  return op;
}

absl::StatusOr<PlacementOp> PlacementParser::ParsePad(const JsonValue& value, uint32_t mesh) const {
  RETURN_IF_ERROR(value.ExpectKeys({"op", "dim", "multiple", "axis", "size"}));
  PlacementOp op;
  op.kind = PlacementOp::Kind::kPad;
  ASSIGN_OR_RETURN(op.dim, Dim(value));
  ASSIGN_OR_RETURN(op.pad_multiple, Grain(value, "multiple"));
  if (value.Find("axis").present()) {
    // The multiple follows the axis: an axis is not used up by it.
    ASSIGN_OR_RETURN(const std::vector<uint32_t> axes, Axes(value, mesh));
    op.pad_multiple *= program_.meshes[mesh].SizeOf(axes);
  }
  const JsonValue size = value.Find("size");
  if (size.present()) {
    ASSIGN_OR_RETURN(op.pad_size_min, size.Uint64());
    if (op.pad_size_min > kTensorBytesMax) return size.Mismatch("at most 2^62");
  } else if (!value.Find("multiple").present() && !value.Find("axis").present()) {
    return RefuseLayout(value, "expected \"multiple\", \"axis\" or \"size\"");
  }
  return op;
}

absl::StatusOr<CutRule> PlacementParser::ParseRule(const JsonValue& value, uint64_t count,
                                                   const std::string& what) {
  CutRule rule;
  ASSIGN_OR_RETURN(const JsonValue name_value, value.Get("rule"));
  ASSIGN_OR_RETURN(const std::string_view name, name_value.String());
  static constexpr std::string_view kRules[] = {"even", "ceil", "balanced", "sizes"};
  const auto found = std::find(std::begin(kRules), std::end(kRules), name);
  if (found == std::end(kRules)) {
    return RefuseLayout(name_value, absl::StrFormat("unknown rule \"%s\"%s", Short(name),
                                                    DidYouMean(name, kRules)));
  }
  rule.kind = static_cast<CutRule::Kind>(found - std::begin(kRules));
  ASSIGN_OR_RETURN(rule.grain, Grain(value, "grain"));
  const JsonValue sizes = value.Find("sizes");
  if (rule.kind != CutRule::Kind::kSizes) {
    if (sizes.present()) {
      return RefuseLayout(sizes, "expected no sizes but with the rule \"sizes\"");
    }
    return rule;
  }
  if (value.Find("grain").present()) return RefuseLayout(value, "expected no grain beside sizes");
  ASSIGN_OR_RETURN(const JsonValue list, value.Get("sizes"));
  ASSIGN_OR_RETURN(const size_t size_count, list.ArraySize());
  if (size_count != count) {
    return list.Mismatch(absl::StrCat("one size for each of the ", what));
  }
  uint64_t sum = 0;
  for (size_t i = 0; i < size_count; ++i) {
    ASSIGN_OR_RETURN(const uint64_t size, list[i].Uint64());
    if (size > kTensorBytesMax - sum) return list.Mismatch("a sum of at most 2^62");
    sum += size;
    rule.ends.push_back(sum);
  }
  return rule;
}

absl::StatusOr<std::vector<uint32_t>> PlacementParser::ParseCoordinates(
    const JsonValue& list, const MeshAxis& axis) const {
  ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
  if (count == 0) return list.Mismatch("at least one coordinate");
  std::vector<uint32_t> coordinates;
  std::set<int64_t> seen;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(const int64_t coordinate, list[i].Int64());
    const int64_t size = axis.size;
    if (coordinate >= size || coordinate < -size) {
      return list[i].Mismatch(absl::StrFormat(
          "a coordinate of axis \"%s\", below %d, or from -1 on backwards", axis.name, axis.size));
    }
    if (!seen.insert(coordinate).second) {
      return RefuseLayout(list, "expected distinct coordinates");
    }
    coordinates.push_back(static_cast<uint32_t>(coordinate < 0 ? size + coordinate : coordinate));
  }
  std::sort(coordinates.begin(), coordinates.end());
  // 0 and -1 are the same where there is only one.
  coordinates.erase(std::unique(coordinates.begin(), coordinates.end()), coordinates.end());
  return coordinates;
}

// The coordinate that holds number `index` of `count` things (layers, experts) when the rule deals
// them out, in order, to `virtual` times as many slots as there are coordinates, and slot s is of
// coordinate s modulo their number.
absl::StatusOr<uint32_t> PlacementParser::CoordinateOfIndex(const JsonValue& value,
                                                            const MeshAxis& axis) const {
  RETURN_IF_ERROR(
      value.ExpectKeys({"op", "axis", "index", "count", "rule", "sizes", "grain", "virtual"}));
  ASSIGN_OR_RETURN(const JsonValue count_value, value.Get("count"));
  ASSIGN_OR_RETURN(const uint64_t count, count_value.Uint64());
  if (count < 1 || count > kTensorBytesMax) return count_value.Mismatch("1 to 2^62");
  ASSIGN_OR_RETURN(const uint64_t index, value.Find("index").Uint64());
  if (index >= count) return value.Find("index").Mismatch(absl::StrCat("an index below ", count));
  ASSIGN_OR_RETURN(const uint64_t rounds, Grain(value, "virtual"));
  if (rounds * axis.size > kSlotsMax) {
    return value.Find("virtual").Mismatch(absl::StrFormat("at most %d slots in all", kSlotsMax));
  }
  const uint32_t slots = static_cast<uint32_t>(rounds * axis.size);
  ASSIGN_OR_RETURN(
      const CutRule rule,
      ParseRule(value, slots, absl::StrFormat("%d slots of axis \"%s\"", slots, axis.name)));
  if (const std::string expected = CheckCut(rule, count, slots); !expected.empty()) {
    return RefuseLayout(value, absl::StrFormat("expected %s to place over axis \"%s\", found %d",
                                               expected, axis.name, count));
  }
  // Parts are in order: the first one that ends behind the index.
  uint32_t low = 0;
  uint32_t high = slots - 1;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (Cut(rule, count, slots, middle).second > index) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low % axis.size;
}

uint32_t PlacementParser::Intern(Placement placement) {
  std::string key = absl::StrCat(placement.mesh, ";");
  const auto numbers = [&key](char mark, const auto& values) {
    if (values.empty()) return;
    key += mark;
    for (const auto value : values) absl::StrAppend(&key, value, ",");
  };
  for (const PlacementOp& op : placement.ops) {
    absl::StrAppend(&key, static_cast<int>(op.kind), ",", op.dim, ",", op.pack, ",",
                    static_cast<int>(op.rule.kind), ",", op.rule.grain, ",", op.pad_multiple, ",",
                    op.pad_size_min);
    numbers('a', op.axes);
    numbers('s', op.rule.ends);
    numbers('b', op.blocks);
    numbers('c', op.coordinates);
    numbers('v', op.view);
    numbers('p', op.perm);
    key += ';';
  }
  const auto [found, is_new] =
      placements_.emplace(std::move(key), static_cast<uint32_t>(program_.placements.size()));
  if (is_new) program_.placements.push_back(std::move(placement));
  return found->second;
}

uint32_t PlacementParser::InternBuffer(const std::string& name) {
  const auto [found, is_new] =
      buffers_.emplace(name, static_cast<uint32_t>(program_.buffer_names.size()));
  if (is_new) program_.buffer_names.push_back(name);
  return found->second;
}

}  // namespace holdfast
