// Reads a layout document (docs/layout-grammar.md) into a LayoutProgram. Everything is checked here
// for all ranks: whether a rule fits a size is decided on the set of sizes that a dimension can
// have on any rank, so the cost does not grow with the world.
#include <algorithm>
#include <set>
#include <span>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"
#include "base/json_reader.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "format/layout_program.h"

namespace holdfast {
namespace {

constexpr size_t kDocumentBytesMax = size_t{512} << 20;
constexpr size_t kDocumentValuesMax = 50'000'000;
constexpr uint64_t kGrainMax = uint64_t{1} << 32;  // grain, align_elements, multiple_elements
constexpr size_t kSuggestionsFromMax = 1000;       // names looked at for "did you mean"
constexpr size_t kLocalSizesMax = 4096;            // so that hostile sizes cost no time
constexpr size_t kPacksMax = 65'536;

absl::Status Refuse(const JsonValue& where, const std::string& text) {
  return absl::InvalidArgumentError(absl::StrCat(where.Path(), ": ", text));
}

// `status` with what it is about behind the text.
absl::Status About(const absl::Status& status, const std::string& what) {
  return absl::Status(status.code(), absl::StrCat(std::string(status.message()), " (", what, ")"));
}

using NameMap = std::unordered_map<std::string, uint32_t>;

absl::Status UnknownName(const JsonValue& where, const std::string& kind, const std::string& name,
                         const NameMap& known) {
  std::vector<std::string_view> names;
  for (const auto& [each, index] : known) {
    if (names.size() < kSuggestionsFromMax) names.push_back(each);
  }
  std::sort(names.begin(), names.end());
  return Refuse(where, absl::StrFormat("unknown %s \"%s\"%s", kind, name.substr(0, 200),
                                       DidYouMean(name, names)));
}

class LayoutParser {
 public:
  explicit LayoutParser(LayoutProgram& program) : program_(program) {}

  absl::Status Parse(const JsonValue& root) {
    RETURN_IF_ERROR(root.ExpectKeys({"holdfast_layout", "mesh", "placements", "packs", "tensors"}));
    ASSIGN_OR_RETURN(const JsonValue version, root.Get("holdfast_layout"));
    ASSIGN_OR_RETURN(const uint64_t number, version.Uint64());
    if (number != 1) return version.Mismatch("version 1 of the grammar");
    ASSIGN_OR_RETURN(const JsonValue mesh, root.Get("mesh"));
    RETURN_IF_ERROR(ParseMesh(mesh));
    if (root.Find("packs").present()) RETURN_IF_ERROR(ParsePacks(root.Find("packs")));
    InternPlacement({});  // number 0: replicated
    if (root.Find("placements").present()) {
      RETURN_IF_ERROR(ParsePlacements(root.Find("placements")));
    }
    ASSIGN_OR_RETURN(const JsonValue tensors, root.Get("tensors"));
    RETURN_IF_ERROR(ParseTensors(tensors));
    FinishPacks();
    return absl::OkStatus();
  }

 private:
  absl::Status ParseMesh(const JsonValue& mesh) {
    ASSIGN_OR_RETURN(const size_t count, mesh.ArraySize());
    if (count > kMeshAxesMax) return mesh.Mismatch(absl::StrCat("at most ", kMeshAxesMax, " axes"));
    uint64_t world_size = 1;
    for (size_t i = 0; i < count; ++i) {
      RETURN_IF_ERROR(mesh[i].ExpectKeys({"axis", "size"}));
      ASSIGN_OR_RETURN(const std::string name, Name(mesh[i], "axis"));
      ASSIGN_OR_RETURN(const JsonValue size_value, mesh[i].Get("size"));
      ASSIGN_OR_RETURN(const uint64_t size, size_value.Uint64());
      if (size < 1 || size > kWorldSizeMax || world_size * size > kWorldSizeMax) {
        return size_value.Mismatch(
            absl::StrFormat("at least 1, and at most %d ranks in all", kWorldSizeMax));
      }
      world_size *= size;
      if (!axes_.emplace(name, i).second) {
        return Refuse(mesh[i], absl::StrFormat("axis \"%s\" is there twice", name));
      }
      program_.mesh.push_back({name, static_cast<uint32_t>(size)});
    }
    program_.world_size = static_cast<uint32_t>(world_size);
    return absl::OkStatus();
  }

  absl::Status ParsePacks(const JsonValue& packs) {
    ASSIGN_OR_RETURN(const size_t count, packs.ArraySize());
    if (count > kPacksMax) return packs.Mismatch(absl::StrCat("at most ", kPacksMax, " packs"));
    for (size_t i = 0; i < count; ++i) {
      const JsonValue pack = packs[i];
      RETURN_IF_ERROR(
          pack.ExpectKeys({"pack", "axis", "align_elements", "multiple_elements", "buffer"}));
      PackProgram program;
      ASSIGN_OR_RETURN(program.name, Name(pack, "pack"));
      ASSIGN_OR_RETURN(program.axis, Axis(pack));
      ASSIGN_OR_RETURN(program.align_elements, Grain(pack, "align_elements"));
      ASSIGN_OR_RETURN(program.multiple_elements, Grain(pack, "multiple_elements"));
      ASSIGN_OR_RETURN(const std::string buffer, Name(pack, "buffer"));
      program.buffer = InternBuffer(buffer);
      if (!packs_.emplace(program.name, i).second) {
        return Refuse(pack, absl::StrFormat("pack \"%s\" is there twice", program.name));
      }
      program_.packs.push_back(std::move(program));
    }
    return absl::OkStatus();
  }

  absl::Status ParsePlacements(const JsonValue& placements) {
    ASSIGN_OR_RETURN(const auto keys, placements.Keys());
    for (std::string_view key : keys) {
      RETURN_IF_ERROR(CheckName("placement", std::string(key)));
      ASSIGN_OR_RETURN(placement_names_[std::string(key)], ParsePlacement(placements.Find(key)));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<uint32_t> ParsePlacement(const JsonValue& ops) {
    ASSIGN_OR_RETURN(const size_t count, ops.ArraySize());
    if (count > kMeshAxesMax)
      return ops.Mismatch(absl::StrCat("at most ", kMeshAxesMax, " operations"));
    Placement placement;
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(PlacementOp op, ParseOp(ops[i]));
      for (const PlacementOp& earlier : placement) {
        if (earlier.axis == op.axis) {
          return Refuse(ops[i],
                        absl::StrFormat("axis \"%s\" is used by an earlier operation of this "
                                        "placement; an axis is used once",
                                        program_.mesh[op.axis].name));
        }
        if (earlier.kind == PlacementOp::Kind::kPack) {
          return Refuse(ops[i], "expected nothing behind a pack");
        }
        if (earlier.kind == PlacementOp::Kind::kFlat && op.kind == PlacementOp::Kind::kShard &&
            op.dim != 0) {
          return Refuse(ops[i], absl::StrFormat("expected dimension 0, the only one behind a flat "
                                                "cut, found %d",
                                                op.dim));
        }
      }
      placement.push_back(std::move(op));
    }
    return InternPlacement(std::move(placement));
  }

  absl::StatusOr<PlacementOp> ParseOp(const JsonValue& value) {
    ASSIGN_OR_RETURN(const JsonValue op_value, value.Get("op"));
    ASSIGN_OR_RETURN(const std::string_view kind, op_value.String());
    PlacementOp op;
    if (kind == "shard") {
      RETURN_IF_ERROR(value.ExpectKeys({"op", "dim", "axis", "rule", "sizes", "grain"}));
      op.kind = PlacementOp::Kind::kShard;
      ASSIGN_OR_RETURN(op.axis, Axis(value));
      ASSIGN_OR_RETURN(const JsonValue dim_value, value.Get("dim"));
      ASSIGN_OR_RETURN(const uint64_t dim, dim_value.Uint64());
      if (dim >= kTensorDimsMax) {
        return dim_value.Mismatch(absl::StrFormat("a dimension below %d", kTensorDimsMax));
      }
      op.dim = static_cast<uint32_t>(dim);
      ASSIGN_OR_RETURN(op.rule, ParseRule(value, program_.mesh[op.axis]));
    } else if (kind == "flat") {
      RETURN_IF_ERROR(value.ExpectKeys({"op", "axis", "rule", "sizes", "grain"}));
      op.kind = PlacementOp::Kind::kFlat;
      ASSIGN_OR_RETURN(op.axis, Axis(value));
      ASSIGN_OR_RETURN(op.rule, ParseRule(value, program_.mesh[op.axis]));
    } else if (kind == "place") {
      RETURN_IF_ERROR(value.ExpectKeys({"op", "axis", "coordinates"}));
      op.kind = PlacementOp::Kind::kPlace;
      ASSIGN_OR_RETURN(op.axis, Axis(value));
      ASSIGN_OR_RETURN(op.coordinates, ParseCoordinates(value, program_.mesh[op.axis]));
    } else if (kind == "pack") {
      RETURN_IF_ERROR(value.ExpectKeys({"op", "pack"}));
      op.kind = PlacementOp::Kind::kPack;
      ASSIGN_OR_RETURN(const std::string name, Name(value, "pack"));
      const auto found = packs_.find(name);
      if (found == packs_.end()) return UnknownName(value, "pack", name, packs_);
      op.pack = found->second;
      op.axis = program_.packs[op.pack].axis;
    } else {
      static constexpr std::string_view kOps[] = {"shard", "flat", "place", "pack"};
      return Refuse(value, absl::StrFormat("unknown op \"%s\"%s", std::string(kind.substr(0, 200)),
                                           DidYouMean(kind, kOps)));
    }
    return op;
  }

  absl::StatusOr<CutRule> ParseRule(const JsonValue& value, const MeshAxis& axis) {
    CutRule rule;
    ASSIGN_OR_RETURN(const JsonValue name_value, value.Get("rule"));
    ASSIGN_OR_RETURN(const std::string_view name, name_value.String());
    static constexpr std::string_view kRules[] = {"even", "ceil", "balanced", "sizes"};
    const auto found = std::find(std::begin(kRules), std::end(kRules), name);
    if (found == std::end(kRules)) {
      return Refuse(name_value,
                    absl::StrFormat("unknown rule \"%s\"%s", std::string(name.substr(0, 200)),
                                    DidYouMean(name, kRules)));
    }
    rule.kind = static_cast<CutRule::Kind>(found - std::begin(kRules));
    ASSIGN_OR_RETURN(rule.grain, Grain(value, "grain"));
    const JsonValue sizes = value.Find("sizes");
    if (rule.kind != CutRule::Kind::kSizes) {
      if (sizes.present()) return Refuse(sizes, "expected no sizes but with the rule \"sizes\"");
      return rule;
    }
    if (value.Find("grain").present()) return Refuse(value, "expected no grain beside sizes");
    ASSIGN_OR_RETURN(const JsonValue list, value.Get("sizes"));
    ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
    if (count != axis.size) {
      return list.Mismatch(absl::StrFormat("one size for each of the %d ranks of axis \"%s\"",
                                           axis.size, axis.name));
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const uint64_t size, list[i].Uint64());
      if (size > kTensorBytesMax - sum) return list.Mismatch("a sum of at most 2^62");
      sum += size;
      rule.sizes.push_back(size);
    }
    return rule;
  }

  absl::StatusOr<std::vector<uint32_t>> ParseCoordinates(const JsonValue& value,
                                                         const MeshAxis& axis) {
    ASSIGN_OR_RETURN(const JsonValue list, value.Get("coordinates"));
    ASSIGN_OR_RETURN(const size_t count, list.ArraySize());
    if (count == 0) return list.Mismatch("at least one coordinate");
    std::vector<uint32_t> coordinates;
    for (size_t i = 0; i < count; ++i) {
      ASSIGN_OR_RETURN(const uint64_t coordinate, list[i].Uint64());
      if (coordinate >= axis.size) {
        return list[i].Mismatch(
            absl::StrFormat("a coordinate of axis \"%s\", below %d", axis.name, axis.size));
      }
      coordinates.push_back(static_cast<uint32_t>(coordinate));
    }
    std::sort(coordinates.begin(), coordinates.end());
    if (std::adjacent_find(coordinates.begin(), coordinates.end()) != coordinates.end()) {
      return Refuse(list, "expected distinct coordinates");
    }
    return coordinates;
  }

  absl::Status ParseTensors(const JsonValue& tensors) {
    ASSIGN_OR_RETURN(const size_t count, tensors.ArraySize());
    if (count > kLayoutTensorsMax) {
      return tensors.Mismatch(absl::StrCat("at most ", kLayoutTensorsMax, " tensors"));
    }
    std::unordered_set<std::string_view> names;  // in the document
    names.reserve(count);
    if (count > 0) {
      // As many states as the first tensor has, for each: the usual case.
      const auto states = tensors[0].Find("states").ArraySize();
      const size_t guess = count * std::min<size_t>(states.ok() ? *states : 1, 4);
      program_.tensor_states.reserve(guess);
      program_.states.reserve(guess);
      buffers_.reserve(guess);
    }
    for (size_t i = 0; i < count; ++i) {
      const JsonValue tensor = tensors[i];
      RETURN_IF_ERROR(tensor.ExpectKeys({"name", "shape", "states"}));
      ASSIGN_OR_RETURN(const std::string name, Name(tensor, "name"));
      if (!names.insert(*tensor.Find("name").String()).second) {
        return Refuse(tensor, absl::StrFormat("tensor \"%s\" is there twice", name.substr(0, 200)));
      }
      absl::Status parsed = ParseTensor(tensor, name);
      if (!parsed.ok()) {
        return About(parsed, absl::StrFormat("tensor \"%s\"", name.substr(0, 200)));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ParseTensor(const JsonValue& tensor, const std::string& name) {
    ASSIGN_OR_RETURN(const JsonValue shape_value, tensor.Get("shape"));
    ASSIGN_OR_RETURN(const size_t dims, shape_value.ArraySize());
    if (dims > kTensorDimsMax) {
      return shape_value.Mismatch(absl::StrCat("at most ", kTensorDimsMax, " dimensions"));
    }
    std::vector<uint64_t> shape(dims);
    for (size_t d = 0; d < dims; ++d) {
      ASSIGN_OR_RETURN(shape[d], shape_value[d].Uint64());
    }
    ASSIGN_OR_RETURN(const JsonValue states, tensor.Get("states"));
    ASSIGN_OR_RETURN(const size_t state_count, states.ArraySize());
    if (state_count == 0) return states.Mismatch("at least one state");
    const size_t first = program_.tensor_states.size();
    for (size_t i = 0; i < state_count; ++i) {
      RETURN_IF_ERROR(ParseState(states[i], name, shape));
      const std::string& state = program_.tensor_states.back().state;
      for (size_t k = first; k + 1 < program_.tensor_states.size(); ++k) {
        if (program_.tensor_states[k].state == state) {
          return Refuse(states[i], absl::StrFormat("state \"%s\" is there twice", state));
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status ParseState(const JsonValue& value, const std::string& name,
                          const std::vector<uint64_t>& shape) {
    RETURN_IF_ERROR(value.ExpectKeys({"state", "dtype", "place", "buffer", "offset_bytes"}));
    TensorState tensor_state{name, "", Dtype::kFloat32, shape};
    ASSIGN_OR_RETURN(tensor_state.state, Name(value, "state"));
    ASSIGN_OR_RETURN(const JsonValue dtype_value, value.Get("dtype"));
    ASSIGN_OR_RETURN(const std::string_view dtype_name, dtype_value.String());
    const auto dtype = DtypeFromName(dtype_name);
    if (!dtype.has_value()) {
      return Refuse(dtype_value, absl::StrFormat("unknown dtype \"%s\"%s",
                                                 std::string(dtype_name.substr(0, 200)),
                                                 DidYouMean(dtype_name, DtypeNames())));
    }
    tensor_state.dtype = *dtype;
    if (absl::Status fits = CheckTensorState(tensor_state); !fits.ok()) {
      return Refuse(value, std::string(fits.message()));
    }
    StateProgram state;
    if (value.Find("place").present()) {
      ASSIGN_OR_RETURN(state.placement, PlacementOf(value.Find("place")));
    }
    RETURN_IF_ERROR(CheckSizes(value, state.placement, shape));
    RETURN_IF_ERROR(ParseBuffer(value, tensor_state, state));
    program_.tensor_states.push_back(std::move(tensor_state));
    program_.states.push_back(state);
    return absl::OkStatus();
  }

  absl::StatusOr<uint32_t> PlacementOf(const JsonValue& value) {
    if (value.type() != JsonValue::Type::kString) {
      if (value.type() != JsonValue::Type::kArray) {
        return value.Mismatch("the name of a placement or an array of operations");
      }
      return ParsePlacement(value);
    }
    ASSIGN_OR_RETURN(const std::string_view name, value.String());
    const auto found = placement_names_.find(std::string(name));
    if (found == placement_names_.end()) {
      return UnknownName(value, "placement", std::string(name), placement_names_);
    }
    return found->second;
  }

  absl::Status ParseBuffer(const JsonValue& value, const TensorState& tensor_state,
                           StateProgram& state) {
    const Placement& placement = program_.placements[state.placement];
    if (!placement.empty() && placement.back().kind == PlacementOp::Kind::kPack) {
      for (std::string_view key : {"buffer", "offset_bytes"}) {
        if (value.Find(key).present()) {
          return Refuse(value.Find(key), "expected none: a packed state lies in the pack's buffer");
        }
      }
      return AddToPack(value, placement.back().pack, tensor_state, state);
    }
    std::string buffer = absl::StrCat(tensor_state.state, "/", tensor_state.tensor);
    if (value.Find("buffer").present()) {
      ASSIGN_OR_RETURN(buffer, Name(value, "buffer"));
    }
    state.buffer = InternBuffer(buffer);
    const JsonValue offset = value.Find("offset_bytes");
    if (offset.present()) {
      ASSIGN_OR_RETURN(state.offset_bytes, offset.Uint64());
      if (state.offset_bytes > kTensorBytesMax) return offset.Mismatch("at most 2^62 bytes");
    }
    return absl::OkStatus();
  }

  absl::Status AddToPack(const JsonValue& value, uint32_t index, const TensorState& tensor_state,
                         StateProgram& state) {
    PackProgram& pack = program_.packs[index];
    state.pack = index;
    state.buffer = pack.buffer;
    state.pack_member = static_cast<uint32_t>(pack.members.size());
    if (!pack.members.empty()) {
      const TensorState& first = program_.tensor_states[pack.members[0]];
      if (first.dtype != tensor_state.dtype) {
        return Refuse(value, absl::StrFormat("expected the dtype of the others in pack \"%s\", %s, "
                                             "found %s",
                                             pack.name, std::string(DtypeName(first.dtype)),
                                             std::string(DtypeName(tensor_state.dtype))));
      }
    }
    pack.members.push_back(static_cast<uint32_t>(program_.tensor_states.size()));
    // The whole tensors, aligned, bound what any rank packs.
    const uint64_t padding = pack.align_elements + (pack.members.size() == 1 ? 1 : 0) *
                                                       pack.multiple_elements *
                                                       program_.mesh[pack.axis].size;
    const uint64_t limit = kTensorBytesMax / ElementBytes(tensor_state.dtype);
    uint64_t& elements = pack_elements_[index];
    if (tensor_state.ElementCount() + padding > limit - elements) {
      return Refuse(value, absl::StrFormat("expected at most 2^62 bytes in pack \"%s\", found more",
                                           pack.name));
    }
    elements += tensor_state.ElementCount() + padding;
    return absl::OkStatus();
  }

  // Every rule of the placement fits every size that it can meet on any rank.
  absl::Status CheckSizes(const JsonValue& value, uint32_t placement,
                          const std::vector<uint64_t>& shape) {
    std::string key(reinterpret_cast<const char*>(shape.data()), shape.size() * sizeof(uint64_t));
    key.append(reinterpret_cast<const char*>(&placement), sizeof(placement));
    if (checked_.contains(key)) return absl::OkStatus();
    const std::string wrong = FirstMisfit(placement, shape);
    if (!wrong.empty()) {
      const JsonValue place = value.Find("place");
      return Refuse(place.present() ? place : value, wrong);
    }
    checked_.insert(std::move(key));
    return absl::OkStatus();
  }

  std::string FirstMisfit(uint32_t placement, const std::vector<uint64_t>& shape) const {
    std::vector<std::set<uint64_t>> sizes;  // of each dimension, on any rank
    for (uint64_t size : shape) sizes.push_back({size});
    bool flat = false;
    for (const PlacementOp& op : program_.placements[placement]) {
      if (op.kind != PlacementOp::Kind::kShard && op.kind != PlacementOp::Kind::kFlat) continue;
      const MeshAxis& axis = program_.mesh[op.axis];
      if (op.kind == PlacementOp::Kind::kFlat && !flat) {
        sizes = {Products(sizes)};
        flat = true;
        if (sizes[0].size() > kLocalSizesMax) {
          return absl::StrFormat(
              "expected at most %d different sizes of local tensors before a flat "
              "cut, found more",
              kLocalSizesMax);
        }
      } else if (op.kind == PlacementOp::Kind::kShard && op.dim >= sizes.size()) {
        return absl::StrFormat(
            "expected a tensor with dimension %d to cut over axis \"%s\", found "
            "%d dimensions",
            op.dim, axis.name, sizes.size());
      }
      std::set<uint64_t>& before = sizes[op.kind == PlacementOp::Kind::kFlat ? 0 : op.dim];
      std::set<uint64_t> after;
      for (uint64_t size : before) {
        const std::string expected = CheckCut(op.rule, size, axis.size);
        if (!expected.empty()) {
          const std::string what = flat ? "the flat range" : absl::StrCat("dimension ", op.dim);
          return absl::StrFormat("expected %s in %s to cut over axis \"%s\", found %d", expected,
                                 what, axis.name, size);
        }
        AddParts(op.rule, size, axis.size, after);
      }
      before = std::move(after);
    }
    return "";
  }

  static void AddParts(const CutRule& rule, uint64_t size, uint32_t count,
                       std::set<uint64_t>& parts) {
    const auto add = [&](uint32_t coordinate) {
      const auto [first, last] = Cut(rule, size, count, coordinate);
      parts.insert(last - first);
    };
    if (rule.kind == CutRule::Kind::kSizes) {
      parts.insert(rule.sizes.begin(), rule.sizes.end());
      return;
    }
    // The sizes of parts only fall: few different ones, each a run. Looks at the first of each run
    // by bisection.
    for (uint32_t coordinate = 0; coordinate < count;) {
      add(coordinate);
      const auto size_of = [&](uint32_t c) {
        const auto [first, last] = Cut(rule, size, count, c);
        return last - first;
      };
      uint32_t same = coordinate;  // same size as at `coordinate`
      uint32_t other = count;      // another one, or the end
      while (other - same > 1) {
        const uint32_t middle = same + (other - same) / 2;
        (size_of(middle) == size_of(coordinate) ? same : other) = middle;
      }
      coordinate = other;
    }
  }

  static std::set<uint64_t> Products(const std::vector<std::set<uint64_t>>& sizes) {
    std::set<uint64_t> products = {1};
    for (const std::set<uint64_t>& dimension : sizes) {
      std::set<uint64_t> next;
      for (uint64_t a : products) {
        for (uint64_t b : dimension) {
          if (next.size() <= kLocalSizesMax) next.insert(a * b);
        }
      }
      products = std::move(next);
    }
    return products;
  }

  void FinishPacks() {
    for (PackProgram& pack : program_.packs) {
      std::set<uint32_t> axes;
      std::unordered_set<uint32_t> seen;
      for (uint32_t member : pack.members) {
        const uint32_t placement = program_.states[member].placement;
        if (!seen.insert(placement).second) continue;
        for (const PlacementOp& op : program_.placements[placement]) {
          if (op.kind != PlacementOp::Kind::kPack) axes.insert(op.axis);
        }
      }
      pack.other_axes.assign(axes.begin(), axes.end());
    }
  }

  uint32_t InternPlacement(Placement placement) {
    std::string key;
    for (const PlacementOp& op : placement) {
      absl::StrAppend(&key, static_cast<int>(op.kind), ",", op.axis, ",", op.dim, ",", op.pack, ",",
                      static_cast<int>(op.rule.kind), ",", op.rule.grain);
      for (uint64_t size : op.rule.sizes) absl::StrAppend(&key, ",", size);
      for (uint32_t coordinate : op.coordinates) absl::StrAppend(&key, "@", coordinate);
      key += ';';
    }
    const auto [found, is_new] =
        placements_.emplace(std::move(key), static_cast<uint32_t>(program_.placements.size()));
    if (is_new) program_.placements.push_back(std::move(placement));
    return found->second;
  }

  uint32_t InternBuffer(const std::string& name) {
    const auto [found, is_new] =
        buffers_.emplace(name, static_cast<uint32_t>(program_.buffer_names.size()));
    if (is_new) program_.buffer_names.push_back(name);
    return found->second;
  }

  static absl::StatusOr<std::string> Name(const JsonValue& value, std::string_view key) {
    ASSIGN_OR_RETURN(const JsonValue name_value, value.Get(key));
    ASSIGN_OR_RETURN(const std::string_view name, name_value.String());
    if (absl::Status good = CheckName(std::string(key), std::string(name)); !good.ok()) {
      return Refuse(name_value, std::string(good.message()));
    }
    return std::string(name);
  }

  absl::StatusOr<uint32_t> Axis(const JsonValue& value) const {
    ASSIGN_OR_RETURN(const std::string name, Name(value, "axis"));
    const auto found = axes_.find(name);
    if (found == axes_.end()) return UnknownName(value.Find("axis"), "axis", name, axes_);
    return found->second;
  }

  // An optional positive number, 1 if absent.
  static absl::StatusOr<uint64_t> Grain(const JsonValue& value, std::string_view key) {
    const JsonValue grain_value = value.Find(key);
    if (!grain_value.present()) return 1;
    ASSIGN_OR_RETURN(const uint64_t grain, grain_value.Uint64());
    if (grain < 1 || grain > kGrainMax) return grain_value.Mismatch("1 to 2^32");
    return grain;
  }

  LayoutProgram& program_;
  NameMap axes_;
  NameMap packs_;
  NameMap buffers_;
  NameMap placement_names_;
  NameMap placements_;  // by content
  std::unordered_map<uint32_t, uint64_t> pack_elements_;
  std::unordered_set<std::string> checked_;  // (shape, placement) pairs
};

}  // namespace

absl::StatusOr<std::unique_ptr<LayoutProgram>> ParseLayout(std::string json) {
  auto program = std::make_unique<LayoutProgram>();
  program->hash = {json.size(), Crc32c(std::as_bytes(std::span(json)))};
  program->text = json;
  JsonLimits limits;
  limits.bytes_max = kDocumentBytesMax;
  limits.values_max = kDocumentValuesMax;
  ASSIGN_OR_RETURN(const auto document, JsonDocument::Parse(std::move(json), limits));
  RETURN_IF_ERROR(LayoutParser(*program).Parse(document->root()));
  return program;
}

}  // namespace holdfast
