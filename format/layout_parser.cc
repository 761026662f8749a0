// Reads a layout document (docs/layout-grammar.md) into a LayoutProgram: its tensors, and through
// format/placement_parser.h how they are cut. Everything is checked here for all ranks.
#include <algorithm>
#include <map>
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
#include "format/layout_cost.h"
#include "format/layout_program.h"
#include "format/listed_segments.h"
#include "format/placement_parser.h"

namespace holdfast {
namespace {

constexpr size_t kDocumentBytesMax = size_t{512} << 20;
constexpr size_t kDocumentValuesMax = 50'000'000;
constexpr size_t kStatesOfTensorMax = 256;
// Pieces of all tensors on one rank: more are refused.
constexpr uint64_t kSegmentsMax = 4'000'000;
// The name of a tensor is kept for each of its states. All of them together may be so many times as
// long as the document, or a million bytes.
constexpr size_t kNameExpansionMax = 8;
constexpr size_t kNamesBytesMin = 1'000'000;

// `status` with what it is about behind the text.
absl::Status About(const absl::Status& status, const std::string& what) {
  return absl::Status(status.code(), absl::StrCat(std::string(status.message()), " (", what, ")"));
}

class LayoutParser {
 public:
  explicit LayoutParser(LayoutProgram& program) : program_(program), placements_(program) {}

  absl::Status Parse(const JsonValue& root) {
    RETURN_IF_ERROR(root.ExpectKeys(
        {"holdfast_layout", "mesh", "meshes", "packs", "zero", "placements", "tensors"}));
    ASSIGN_OR_RETURN(const JsonValue version, root.Get("holdfast_layout"));
    ASSIGN_OR_RETURN(const uint64_t number, version.Uint64());
    if (number != 1) return version.Mismatch("version 1 of the grammar");
    RETURN_IF_ERROR(placements_.ParseMeshes(root));
    RETURN_IF_ERROR(placements_.ParsePacks(root));
    RETURN_IF_ERROR(placements_.ParseZero(root));
    RETURN_IF_ERROR(placements_.ParsePlacements(root));
    ASSIGN_OR_RETURN(const JsonValue tensors, root.Get("tensors"));
    RETURN_IF_ERROR(ParseTensors(tensors));
    FinishPacks();
    return CheckLayoutCost(program_);
  }

 private:
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
    }
    for (size_t i = 0; i < count; ++i) {
      const JsonValue tensor = tensors[i];
      RETURN_IF_ERROR(tensor.ExpectKeys({"name", "shape", "states"}));
      ASSIGN_OR_RETURN(const std::string name, ParseLayoutName(tensor, "name"));
      if (!names.insert(*tensor.Find("name").String()).second) {
        return RefuseLayout(tensor,
                            absl::StrFormat("tensor \"%s\" is there twice", name.substr(0, 200)));
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
    ASSIGN_OR_RETURN(const std::vector<uint64_t> shape, ParseShape(shape_value));
    ASSIGN_OR_RETURN(const JsonValue states, tensor.Get("states"));
    ASSIGN_OR_RETURN(const size_t state_count, states.ArraySize());
    if (state_count == 0 || state_count > kStatesOfTensorMax) {
      return states.Mismatch(absl::StrFormat("1 to %d states", kStatesOfTensorMax));
    }
    names_bytes_ += state_count * name.size();
    if (names_bytes_ > std::max(kNamesBytesMin, kNameExpansionMax * program_.text.size())) {
      return RefuseLayout(
          tensor,
          "expected names that, once for each state, are at most 8 times as long as "
          "the document, found more");
    }
    const size_t first = program_.tensor_states.size();
    for (size_t i = 0; i < state_count; ++i) {
      RETURN_IF_ERROR(ParseState(states[i], name, shape));
      const std::string& state = program_.tensor_states.back().state;
      for (size_t k = first; k + 1 < program_.tensor_states.size(); ++k) {
        if (program_.tensor_states[k].state == state) {
          return RefuseLayout(states[i], absl::StrFormat("state \"%s\" is there twice", state));
        }
      }
    }
    return absl::OkStatus();
  }

  static absl::StatusOr<std::vector<uint64_t>> ParseShape(const JsonValue& value) {
    ASSIGN_OR_RETURN(const size_t dims, value.ArraySize());
    if (dims > kTensorDimsMax) {
      return value.Mismatch(absl::StrCat("at most ", kTensorDimsMax, " dimensions"));
    }
    std::vector<uint64_t> shape(dims);
    for (size_t d = 0; d < dims; ++d) {
      ASSIGN_OR_RETURN(shape[d], value[d].Uint64());
    }
    return shape;
  }

  absl::Status ParseState(const JsonValue& value, const std::string& name,
                          const std::vector<uint64_t>& shape) {
    RETURN_IF_ERROR(value.ExpectKeys(
        {"state", "dtype", "shape", "place", "segments", "buffer", "offset_bytes"}));
    TensorState tensor_state{name, "", Dtype::kFloat32, shape};
    if (const JsonValue own = value.Find("shape"); own.present()) {
      ASSIGN_OR_RETURN(tensor_state.shape, ParseShape(own));
    }
    ASSIGN_OR_RETURN(tensor_state.state, ParseLayoutName(value, "state"));
    ASSIGN_OR_RETURN(const JsonValue dtype_value, value.Get("dtype"));
    ASSIGN_OR_RETURN(const std::string_view dtype_name, dtype_value.String());
    const auto dtype = DtypeFromName(dtype_name);
    if (!dtype.has_value()) {
      return RefuseLayout(dtype_value, absl::StrFormat("unknown dtype \"%s\"%s",
                                                       std::string(dtype_name.substr(0, 200)),
                                                       DidYouMean(dtype_name, DtypeNames())));
    }
    tensor_state.dtype = *dtype;
    if (absl::Status fits = CheckTensorState(tensor_state); !fits.ok()) {
      return RefuseLayout(value, std::string(fits.message()));
    }
    StateProgram state;
    if (value.Find("segments").present()) {
      RETURN_IF_ERROR(ParseListed(value, tensor_state, state));
    } else {
      ASSIGN_OR_RETURN(state.placement,
                       placements_.PlacementOf(value.Find("place"), tensor_state.state));
      ASSIGN_OR_RETURN(const PlacementParser::LocalBounds bounds,
                       placements_.CheckFits(value, state.placement, tensor_state.shape));
      segments_ += bounds.parts;
      if (segments_ > kSegmentsMax) {
        return RefuseLayout(
            value,
            absl::StrFormat("expected at most %d pieces of all tensors on one rank, found more",
                            kSegmentsMax));
      }
      RETURN_IF_ERROR(ParseBuffer(value, tensor_state, bounds, state));
    }
    program_.tensor_states.push_back(std::move(tensor_state));
    program_.states.push_back(state);
    return absl::OkStatus();
  }

  absl::Status ParseListed(const JsonValue& value, const TensorState& tensor_state,
                           StateProgram& state) {
    for (std::string_view key : {"place", "offset_bytes"}) {
      if (value.Find(key).present()) {
        return RefuseLayout(value.Find(key), "expected none beside \"segments\"");
      }
    }
    std::string buffer = absl::StrCat(tensor_state.state, "/", tensor_state.tensor);
    if (value.Find("buffer").present()) {
      ASSIGN_OR_RETURN(buffer, ParseLayoutName(value, "buffer"));
    }
    ASSIGN_OR_RETURN(ListedState listed, ParseListedSegments(value.Find("segments"), tensor_state,
                                                             buffer, placements_, copy_count_));
    state.listed = static_cast<uint32_t>(program_.listed.size());
    program_.listed.push_back(std::move(listed));
    return absl::OkStatus();
  }

  absl::Status ParseBuffer(const JsonValue& value, const TensorState& tensor_state,
                           const PlacementParser::LocalBounds& bounds, StateProgram& state) {
    const std::vector<PlacementOp>& ops = program_.placements[state.placement].ops;
    if (!ops.empty() && ops.back().kind == PlacementOp::Kind::kPack) {
      for (std::string_view key : {"buffer", "offset_bytes"}) {
        if (value.Find(key).present()) {
          return RefuseLayout(value.Find(key),
                              "expected none: a packed state lies in the pack's buffer");
        }
      }
      return AddToPack(value, ops.back().pack, tensor_state, bounds.places, state);
    }
    std::string buffer = absl::StrCat(tensor_state.state, "/", tensor_state.tensor);
    if (value.Find("buffer").present()) {
      ASSIGN_OR_RETURN(buffer, ParseLayoutName(value, "buffer"));
    }
    state.buffer = placements_.InternBuffer(buffer);
    const JsonValue offset = value.Find("offset_bytes");
    if (offset.present()) {
      ASSIGN_OR_RETURN(state.offset_bytes, offset.Uint64());
      if (state.offset_bytes > kTensorBytesMax) return offset.Mismatch("at most 2^62 bytes");
    }
    return absl::OkStatus();
  }

  absl::Status AddToPack(const JsonValue& value, uint32_t index, const TensorState& tensor_state,
                         uint64_t places_max, StateProgram& state) {
    PackProgram& pack = program_.packs[index];
    state.pack = index;
    state.buffer = pack.buffer;
    state.pack_member = static_cast<uint32_t>(pack.members.size());
    if (!pack.members.empty()) {
      const TensorState& first = program_.tensor_states[pack.members[0]];
      if (first.dtype != tensor_state.dtype) {
        return RefuseLayout(value,
                            absl::StrFormat("expected the dtype of the others in pack \"%s\", %s, "
                                            "found %s",
                                            pack.name, std::string(DtypeName(first.dtype)),
                                            std::string(DtypeName(tensor_state.dtype))));
      }
    }
    pack.members.push_back(static_cast<uint32_t>(program_.tensor_states.size()));
    // The largest local tensors, aligned, bound what any rank packs.
    const uint64_t padding = pack.align_elements + (pack.members.size() == 1 ? 1 : 0) *
                                                       pack.multiple_elements *
                                                       program_.meshes[pack.mesh].SizeOf(pack.axes);
    const uint64_t limit = kTensorBytesMax / ElementBytes(tensor_state.dtype);
    uint64_t& elements = pack_elements_[index];
    if (places_max + padding > limit - elements) {
      return RefuseLayout(
          value,
          absl::StrFormat("expected at most 2^62 bytes in pack \"%s\", found more", pack.name));
    }
    elements += places_max + padding;
    return absl::OkStatus();
  }

  void FinishPacks() {
    for (PackProgram& pack : program_.packs) {
      std::set<uint32_t> axes;
      std::unordered_set<uint32_t> seen;
      for (uint32_t member : pack.members) {
        const uint32_t placement = program_.states[member].placement;
        if (!seen.insert(placement).second) continue;
        for (const PlacementOp& op : program_.placements[placement].ops) {
          if (op.kind != PlacementOp::Kind::kPack) axes.insert(op.axes.begin(), op.axes.end());
        }
      }
      pack.other_axes.assign(axes.begin(), axes.end());
    }
  }

  LayoutProgram& program_;
  PlacementParser placements_;
  std::unordered_map<uint32_t, uint64_t> pack_elements_;
  uint64_t segments_ = 0;
  size_t copy_count_ = 0;
  size_t names_bytes_ = 0;
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
