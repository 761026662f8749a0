// Mapping files (--map FILE), read from left to right and from right to left, and rename files
// (--rename FILE), on a small checkpoint.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "converter/foreign_folder.h"
#include "converter/mapping.h"
#include "converter/rename_rules.h"
#include "converter/selection.h"
#include "converter/whole_tensor_reader.h"
#include "format/tensor_piece.h"
#include "io/posix_file_system.h"
#include "tests/fuzz/scratch.h"
#include "tests/fuzz/targets.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::fuzz {
namespace {

using converter::ForeignIndex;
using converter::MappingExpression;

// More than this a mapping can only make by padding: it is not read then.
constexpr uint64_t kElementsReadMax = 1 << 16;

struct Sample {
  ForeignIndex index;
  uint32_t param_elements = 0;  // their values are 0, 1, 2, ...
};

// All bytes are in the index. Names fit the seeds (seeds.cc).
const Sample& TheSample() {
  static const Sample* const sample = [] {
    auto* made = new Sample;
    ForeignIndex& index = made->index;
    index.format = "test";
    const auto add = [&](const std::string& name, const std::string& state,
                         const std::vector<uint64_t>& shape, uint32_t first) {
      const uint32_t number = index.AddState({name, state, Dtype::kUint32, shape});
      const auto count = static_cast<uint32_t>(index.tensor_states[number].ElementCount());
      std::string bytes;
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t value = first + i;
        bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
      }
      if (count > 0) index.AddWholePiece(number, index.AddInline(bytes), 0);
      return count;
    };
    const std::vector<std::pair<std::string, std::vector<uint64_t>>> tensors = {
        {"a", {4, 6}},     {"b", {4, 6}},
        {"h.0.q", {4, 3}}, {"h.0.k", {2, 3}},
        {"h.0.v", {2, 3}}, {"h.1.q", {4, 3}},
        {"h.1.k", {2, 3}}, {"h.1.v", {2, 3}},
        {"e.0", {2, 3}},   {"e.1", {2, 3}},
        {"bias", {3}},     {"scale", {}},
        {"none", {0, 3}},  {"deep", std::vector<uint64_t>(kTensorDimsMax, 1)}};
    for (const auto& [name, shape] : tensors) {
      made->param_elements += add(name, "param", shape, made->param_elements);
      add(name, "exp_avg", shape, 1'000'000);
      add(name, "step", {}, 7);
    }
    index.aliases = {{3, 0}};  // "b" is tied to "a"
    index.scalars = {{"args", R"({"swiglu": true})"}};
    CHECK_OK(converter::Finish(index));
    return made;
  }();
  return *sample;
}

const converter::ForeignFolder& Folder() {
  static const std::unique_ptr<FileSystem> file_system = NewPosixFileSystem();
  static const TemporaryDirectory directory(ScratchDirectory());
  static const std::unique_ptr<converter::ForeignFolder> folder = [] {
    auto opened = converter::ForeignFolder::Open(*file_system, directory.path());
    CHECK_OK(opened.status());
    return *std::move(opened);
  }();
  return *folder;
}

bool Pads(const MappingExpression& expression) {
  return expression.kind == MappingExpression::Kind::kPad ||
         std::any_of(expression.operands.begin(), expression.operands.end(), Pads);
}

// In the order of the tensors.
std::optional<std::vector<uint32_t>> ParamElements(const ForeignIndex& index) {
  std::vector<uint32_t> elements;
  converter::WholeTensorReader reader(Folder(), index);
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const TensorState& state = index.tensor_states[i];
    if (state.state != "param") continue;
    const uint64_t count = state.ElementCount();
    const size_t begin = elements.size();
    if (count > kElementsReadMax - begin) return std::nullopt;
    elements.resize(begin + count);
    const std::span<uint32_t> out = std::span(elements).subspan(begin);
    CHECK_OK(reader.ReadRange(i, 0, count, std::as_writable_bytes(out)));
  }
  return elements;
}

// Nothing is read twice or lost, whatever the equations are.
bool Maps(const converter::MappingRules& rules, converter::MappingDirection direction) {
  static const std::vector<std::string> set = {"heads=2", "groups=1", "vocab=4", "padded_vocab=6"};
  const Sample& sample = TheSample();
  auto numbers = converter::ModelNumbers::Create(
      {.set = set, .arguments = R"({"swiglu": true})", .config = R"({"hidden_act": "silu"})"});
  CHECK_OK(numbers.status());
  ForeignIndex index = sample.index;
  std::vector<std::string> left_out;
  const absl::Status status = converter::ApplyMapping({.rules = rules,
                                                       .direction = direction,
                                                       .where = "input",
                                                       .unmapped = converter::Unmapped::kLeaveOut},
                                                      Folder(), *numbers, index, left_out);
  if (!status.ok()) {
    // The checkpoint is sound: never kDataLoss.
    CHECK(status.code() == absl::StatusCode::kFailedPrecondition ||
          status.code() == absl::StatusCode::kInvalidArgument ||
          status.code() == absl::StatusCode::kResourceExhausted);
    CHECK(left_out.empty() && index.tensor_states.size() == sample.index.tensor_states.size());
    return false;
  }
  const auto encoded = converter::EncodeForeignIndex(index);
  CHECK_OK(encoded.status());
  CHECK_OK(converter::DecodeForeignIndex(std::as_bytes(std::span(*encoded))).status());
  auto elements = ParamElements(index);
  if (!elements.has_value()) return true;
  std::sort(elements->begin(), elements->end());
  CHECK(elements->empty() || elements->back() < sample.param_elements);
  const bool pads = std::any_of(rules.rules.begin(), rules.rules.end(), [](const auto& rule) {
    return Pads(rule.left) || Pads(rule.right);
  });
  if (pads) return true;
  CHECK(std::adjacent_find(elements->begin(), elements->end()) == elements->end());
  CHECK(!left_out.empty() || elements->size() == sample.param_elements);
  return true;
}

}  // namespace

bool FuzzMapping(Input input) {
  const std::string text(input.begin(), input.end());
  const auto rules = converter::ParseMappingRules(text, "input");
  if (!rules.ok()) {
    CHECK(rules.status().code() == absl::StatusCode::kInvalidArgument);
    return false;
  }
  const bool forward = Maps(*rules, converter::MappingDirection::kLeftToRight);
  const bool backward = Maps(*rules, converter::MappingDirection::kRightToLeft);
  return forward || backward;
}

bool FuzzRenames(Input input) {
  const std::string text(input.begin(), input.end());
  auto rules = converter::RenameRules::Parse(text);
  if (!rules.ok()) {
    CHECK(rules.status().code() == absl::StatusCode::kInvalidArgument);
    return false;
  }
  // A long name, and one in which bytes are not characters.
  for (const std::string& name :
       {std::string(kNameBytesMax, 'a'), std::string("gr\xC3\xB6\xC3\x9F"),
        std::string("module.layers.12.weight"), std::string()}) {
    CHECK(rules->Apply(name).size() <= (kNameBytesMax + 1) * (kNameBytesMax + 1));
  }
  const auto selection = converter::Select(TheSample().index, {.rename = text});
  if (!selection.ok()) {
    CHECK(selection.status().code() == absl::StatusCode::kInvalidArgument ||
          selection.status().code() == absl::StatusCode::kFailedPrecondition);
    return false;
  }
  // The names are still names, each of one tensor.
  ForeignIndex index = selection->index;
  CHECK_OK(converter::Finish(index));
  CHECK(index.tensor_states.size() == TheSample().index.tensor_states.size());
  return true;
}

}  // namespace holdfast::fuzz
