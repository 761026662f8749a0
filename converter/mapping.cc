// An *instance* is a rule with numbers for its captures: `h.{n}.qkv = ...` with n = 3. Each has the
// source tensors that its side names, all of them, and gives the target's. So the whole index is
// mapped instance by instance, and only one instance's blocks are in memory besides both indices.
#include "converter/mapping.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

#include "absl/numeric/int128.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/block_tensor.h"
#include "converter/mapping_checks.h"
#include "converter/optimizer_groups.h"
#include "converter/whole_tensor_reader.h"

namespace holdfast::converter {
namespace {

using Kind = MappingExpression::Kind;

constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kZeroBytes = 16;  // of the largest dtype

std::string ShapeText(std::span<const uint64_t> shape) {
  return absl::StrFormat("[%s]", absl::StrJoin(shape.begin(), shape.end(), ", "));
}

// The captures of an expression that no stack in it counts (the parser saw to it that its names
// agree in them).
std::set<std::string> FreeCaptures(const MappingExpression& expression) {
  if (expression.kind == Kind::kTensor) return expression.name->captures();
  std::set<std::string> captures = FreeCaptures(expression.operands[0]);
  if (expression.kind == Kind::kStack) captures.erase(expression.capture);
  return captures;
}

// Which rule has a name on the side that is read. The first one counts.
class NameFinder {
 public:
  NameFinder(const MappingRules& rules, MappingDirection direction) {
    for (uint32_t rule = 0; rule < rules.rules.size(); ++rule) {
      const MappingRule& each = rules.rules[rule];
      const bool left = direction == MappingDirection::kLeftToRight;
      for (const NameTemplate* name : NamesIn(left ? each.left : each.right)) {
        if (name->captures().empty()) {
          plain_.try_emplace(name->text(), rule);
        } else {
          templates_.emplace_back(rule, name);
        }
      }
    }
  }

  struct Found {
    uint32_t rule = 0;
    NamePatternNumbers numbers;
  };
  std::optional<Found> Find(const std::string& name) const {
    const auto plain = plain_.find(name);
    const uint32_t before = plain == plain_.end() ? kNone : plain->second;
    for (const auto& [rule, each] : templates_) {
      if (rule > before) break;
      if (auto numbers = each->Match(name); numbers.has_value()) return Found{rule, *numbers};
    }
    if (before == kNone) return std::nullopt;
    return Found{before, {}};
  }

 private:
  std::unordered_map<std::string, uint32_t> plain_;
  std::vector<std::pair<uint32_t, const NameTemplate*>> templates_;  // by rule
};

class Mapper {
 public:
  Mapper(const MappingRequest& request, const ForeignFolder& folder, ModelNumbers& numbers,
         const ForeignIndex& index, std::vector<std::string>& left_out)
      : request_(request),
        numbers_(numbers),
        in_(index),
        reader_(folder, index),
        left_out_(left_out),
        new_numbers_(index.tensor_states.size(), kNone) {}

  absl::StatusOr<ForeignIndex> Run() {
    for (const MappingRequirement& each : request_.rules.requirements) {
      RETURN_IF_ERROR(numbers_.Require(each, request_.where));
    }
    RETURN_IF_ERROR(CheckShapes(request_.rules.shapes, request_.where, in_));
    CollectTensors();
    RETURN_IF_ERROR(FindInstances());
    Begin();
    for (Instance& instance : instances_) RETURN_IF_ERROR(Map(instance));
    for (const Alias& alias : in_.aliases) {
      const Alias mapped = {new_numbers_[alias.tensor_state], new_numbers_[alias.of]};
      if (mapped.tensor_state != kNone && mapped.of != kNone) out_.aliases.push_back(mapped);
    }
    RETURN_IF_ERROR(MapGroups());
    RETURN_IF_ERROR(Finish(out_));
    RETURN_IF_ERROR(CheckCover(out_));
    RETURN_IF_ERROR(CheckShapes(request_.rules.shapes, request_.where, out_));
    return std::move(out_);
  }

 private:
  struct Tensor {
    std::string_view name;
    std::vector<uint32_t> states;  // in the order of the index
    uint32_t instance = kNone;
  };
  struct Instance {
    uint32_t rule = 0;
    NamePatternNumbers numbers;                              // of the free captures
    std::map<std::string, std::set<uint64_t>> stacked = {};  // the others' numbers that are there
    std::vector<std::string> targets = {};
    bool one_to_one = false;           // one tensor becomes one other
    std::vector<uint64_t> group = {};  // one element: its optimizer's group
  };
  // The tensors that are made, in one state.
  struct Made {
    std::vector<std::pair<std::string, BlockTensor>> tensors = {};
    size_t block_count = 0;
  };

  const MappingRule& RuleOf(const Instance& instance) const {
    return request_.rules.rules[instance.rule];
  }
  const MappingExpression& SourceOf(const Instance& instance) const {
    const MappingRule& rule = RuleOf(instance);
    return request_.direction == MappingDirection::kLeftToRight ? rule.left : rule.right;
  }
  const MappingExpression& TargetOf(const Instance& instance) const {
    const MappingRule& rule = RuleOf(instance);
    return request_.direction == MappingDirection::kLeftToRight ? rule.right : rule.left;
  }

  absl::Status Refuse(const Instance& instance, const std::string& what) const {
    return absl::FailedPreconditionError(
        absl::StrFormat("%s: line %d: %s", request_.where, RuleOf(instance).line, what));
  }
  // An operation's error, with rule and tensor.
  absl::Status At(const Instance& instance, std::string_view name,
                  const absl::Status& status) const {
    if (status.ok()) return status;
    return absl::Status(status.code() == absl::StatusCode::kInvalidArgument
                            ? absl::StatusCode::kFailedPrecondition
                            : status.code(),
                        absl::StrFormat("%s: line %d: \"%s\": %s", request_.where,
                                        RuleOf(instance).line, name, status.message()));
  }

  void CollectTensors() {
    for (uint32_t i = 0; i < in_.tensor_states.size(); ++i) {
      const TensorState& state = in_.tensor_states[i];
      const auto [place, is_new] =
          by_name_.try_emplace(state.tensor, static_cast<uint32_t>(tensors_.size()));
      if (is_new) tensors_.push_back({state.tensor, {}, kNone});
      tensors_[place->second].states.push_back(i);
    }
  }

  absl::Status FindInstances() {
    const NameFinder finder(request_.rules, request_.direction);
    std::vector<std::set<std::string>> free;
    for (const MappingRule& rule : request_.rules.rules) free.push_back(FreeCaptures(rule.left));
    std::map<std::pair<uint32_t, NamePatternNumbers>, uint32_t> numbers_of;
    size_t dropped = 0;
    std::vector<std::string_view> unmapped;
    for (Tensor& tensor : tensors_) {
      const auto found = finder.Find(std::string(tensor.name));
      if (!found.has_value()) {
        const auto drops = [&](const NameTemplate& name) {
          return name.Match(tensor.name).has_value();
        };
        if (std::any_of(request_.rules.drops.begin(), request_.rules.drops.end(), drops)) {
          ++dropped;
        } else {
          unmapped.push_back(tensor.name);
        }
        continue;
      }
      NamePatternNumbers own;
      NamePatternNumbers stacked;
      for (const auto& [capture, number] : found->numbers) {
        (free[found->rule].contains(capture) ? own : stacked)[capture] = number;
      }
      const auto [place, is_new] = numbers_of.try_emplace(std::pair(found->rule, own),
                                                          static_cast<uint32_t>(instances_.size()));
      if (is_new) instances_.push_back({.rule = found->rule, .numbers = own});
      tensor.instance = place->second;
      for (const auto& [capture, number] : stacked) {
        instances_[place->second].stacked[capture].insert(number);
      }
    }
    if (dropped > 0) {
      left_out_.push_back(absl::StrFormat("%d tensors that %s drops", dropped, request_.where));
    }
    if (unmapped.empty()) return absl::OkStatus();
    if (request_.unmapped == Unmapped::kRefuse) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s: expected a rule for \"%s\" (and %d others), found none; --drop unmapped leaves them "
          "out",
          request_.where, unmapped.front(), unmapped.size() - 1));
    }
    for (const std::string_view name : unmapped) {
      left_out_.push_back(absl::StrFormat("%s, for which %s has no rule", name, request_.where));
    }
    return absl::OkStatus();
  }

  // Everything but tensors stays; blocks and strides are added to those that are there.
  void Begin() {
    out_.format = in_.format;
    out_.variant = in_.variant;
    out_.has_step = in_.has_step;
    out_.step = in_.step;
    out_.layout = in_.layout;
    out_.files = in_.files;
    out_.inline_bytes = in_.inline_bytes;
    out_.extents = in_.extents;
    out_.boxes = in_.boxes;
    out_.strides = in_.strides;
    out_.scalars = in_.scalars;
    out_.blobs = in_.blobs;
    out_.opaque_classes = in_.opaque_classes;
    out_.unreadable = in_.unreadable;
    out_.notes = in_.notes;
    out_.repairs = in_.repairs;
    out_.losses = in_.losses;
  }

  // All names of the source's side, stacks included.
  absl::Status LeavesOf(const Instance& instance, const MappingExpression& expression,
                        NamePatternNumbers& numbers, std::vector<const Tensor*>& leaves) const {
    if (expression.kind == Kind::kTensor) {
      const std::string name = expression.name->Name(numbers);
      const auto tensor = by_name_.find(name);
      if (tensor == by_name_.end()) {
        return Refuse(instance, absl::StrFormat("expected \"%s\", of which it makes a tensor "
                                                "together with others; it is not there",
                                                name));
      }
      leaves.push_back(&tensors_[tensor->second]);
      return absl::OkStatus();
    }
    if (expression.kind != Kind::kStack) {
      for (const MappingExpression& operand : expression.operands) {
        RETURN_IF_ERROR(LeavesOf(instance, operand, numbers, leaves));
      }
      return absl::OkStatus();
    }
    const auto stacked = instance.stacked.find(expression.capture);
    if (stacked == instance.stacked.end()) {
      return Refuse(instance,
                    absl::StrFormat("expected \"%s\", of which it makes a tensor together "
                                    "with others; none is there",
                                    NamesIn(expression)[0]->text()));
    }
    const std::set<uint64_t>& there = stacked->second;
    if (*there.rbegin() + 1 != there.size() || there.size() > kMappingPartsMax) {
      return Refuse(
          instance,
          absl::StrFormat("stack: expected {%s} from 0 to at most %d without a gap, found "
                          "%d numbers up to %d",
                          expression.capture, kMappingPartsMax - 1, there.size(), *there.rbegin()));
    }
    for (uint64_t i = 0; i < there.size(); ++i) {
      numbers[expression.capture] = i;
      RETURN_IF_ERROR(LeavesOf(instance, expression.operands[0], numbers, leaves));
    }
    numbers.erase(expression.capture);
    return absl::OkStatus();
  }

  // The number of this state of a tensor, or kNone.
  uint32_t StateOf(const Tensor& tensor, std::string_view state) const {
    for (const uint32_t number : tensor.states) {
      if (in_.tensor_states[number].state == state) return number;
    }
    return kNone;
  }

  // The state whose shape is the tensor's: weights, masters, or else the largest.
  uint32_t MainState(const Tensor& tensor) const {
    const auto rank = [&](uint32_t number) {
      const TensorState& state = in_.tensor_states[number];
      return std::pair(IsWeightState(state.state) ? 2
                       : state.state == "fp32"    ? 1
                                                  : 0,
                       state.ElementCount());
    };
    return *std::max_element(tensor.states.begin(), tensor.states.end(),
                             [&](uint32_t a, uint32_t b) { return rank(a) < rank(b); });
  }

  absl::Status Map(Instance& instance) {
    std::vector<const Tensor*> leaves;
    NamePatternNumbers numbers = instance.numbers;
    RETURN_IF_ERROR(LeavesOf(instance, SourceOf(instance), numbers, leaves));
    const Tensor& first = *leaves[0];
    for (const Tensor* leaf : leaves) {
      if (leaf->instance != first.instance) {
        return Refuse(instance, absl::StrFormat("\"%s\" is of another rule too", leaf->name));
      }
      const bool same = leaf->states.size() == first.states.size() &&
                        std::all_of(first.states.begin(), first.states.end(), [&](uint32_t number) {
                          return StateOf(*leaf, in_.tensor_states[number].state) != kNone;
                        });
      if (!same) {
        return Refuse(instance, absl::StrFormat("expected the same states of \"%s\" and \"%s\", "
                                                "of which it makes one tensor",
                                                first.name, leaf->name));
      }
    }
    if (SourceOf(instance).kind == Kind::kTensor && TargetOf(instance).kind == Kind::kTensor) {
      instance.targets = {TargetOf(instance).name->Name(instance.numbers)};
      instance.one_to_one = true;
      for (const uint32_t number : first.states) {
        RETURN_IF_ERROR(Carry(instance, number, instance.targets[0]));
      }
      return absl::OkStatus();
    }
    std::vector<uint32_t> mains;
    for (const Tensor* leaf : leaves) mains.push_back(MainState(*leaf));
    const std::string& main = in_.tensor_states[mains[0]].state;
    ASSIGN_OR_RETURN(const Made of_main, Make(instance, main));
    for (const auto& [name, blocks] : of_main.tensors) instance.targets.push_back(name);
    instance.one_to_one = leaves.size() == 1 && of_main.tensors.size() == 1;
    for (const uint32_t number : first.states) {
      const std::string& state = in_.tensor_states[number].state;
      Made other;
      if (state != main) {
        ASSIGN_OR_RETURN(const bool is_scalar, IsScalar(instance, state, leaves, mains));
        if (is_scalar) {
          for (const std::string& name : instance.targets) {
            RETURN_IF_ERROR(Carry(instance, number, name));
          }
          continue;
        }
        ASSIGN_OR_RETURN(other, Make(instance, state));
      }
      for (const auto& [name, blocks] : (state == main ? of_main : other).tensors) {
        RETURN_IF_ERROR(Claim(instance, name, state));
        const absl::StatusOr<uint32_t> added = AddBlocks(blocks, name, state, out_);
        if (!added.ok()) return At(instance, name, added.status());
        if (instance.one_to_one) new_numbers_[number] = *added;
      }
    }
    return absl::OkStatus();
  }

  // No two tensors get one name, and none a longer one than a tensor may have.
  absl::Status Claim(const Instance& instance, const std::string& name, const std::string& state) {
    if (name.size() > kNameBytesMax) {
      return Refuse(instance,
                    absl::StrFormat("expected a name of at most %d bytes, found \"%s...\"",
                                    kNameBytesMax, name.substr(0, 200)));
    }
    const size_t line = RuleOf(instance).line;
    const auto [place, is_new] = claimed_.try_emplace(std::pair(name, state), line);
    if (is_new) return absl::OkStatus();
    return Refuse(instance,
                  absl::StrFormat("\"%s\" (state %s) is made twice: by the rule in line %d too",
                                  name, state, place->second));
  }

  // A state as it is, under another name.
  absl::Status Carry(const Instance& instance, uint32_t number, const std::string& name) {
    TensorState state = in_.tensor_states[number];
    RETURN_IF_ERROR(Claim(instance, name, state.state));
    state.tensor = name;
    const uint32_t added = out_.AddState(std::move(state));
    const auto [first, last] = in_.PiecesOf(number);
    for (size_t i = first; i < last; ++i) {
      out_.pieces.push_back(in_.pieces[i]);
      out_.pieces.back().piece.tensor_state = added;
    }
    if (instance.one_to_one) new_numbers_[number] = added;
    return absl::OkStatus();
  }

  // Whether a state is one number for each of these tensors, the same for all: false if it has
  // their shapes. Errors: it is neither.
  absl::StatusOr<bool> IsScalar(const Instance& instance, const std::string& state,
                                std::span<const Tensor* const> leaves,
                                std::span<const uint32_t> mains) {
    bool shaped = true;
    bool single = true;
    std::optional<std::vector<std::byte>> value;
    for (size_t i = 0; i < leaves.size(); ++i) {
      const TensorState& found = in_.tensor_states[StateOf(*leaves[i], state)];
      shaped = shaped && found.shape == in_.tensor_states[mains[i]].shape;
      single = single && found.ElementCount() == 1;
    }
    if (shaped) return false;
    if (!single) {
      return Refuse(
          instance,
          absl::StrFormat("\"%s\": state %s has another shape than the tensor, of which the "
                          "rule says nothing; --drop %s leaves it out",
                          leaves[0]->name, state, state));
    }
    for (const Tensor* leaf : leaves) {
      if (leaves.size() == 1) break;
      const uint32_t number = StateOf(*leaf, state);
      std::vector<std::byte> bytes(in_.tensor_states[number].Bytes());
      RETURN_IF_ERROR(reader_.ReadRange(number, 0, 1, bytes));
      if (value.has_value() && *value != bytes) {
        return Refuse(instance, absl::StrFormat("state %s of \"%s\" and of \"%s\" differs, and one "
                                                "tensor is made of them",
                                                state, leaves[0]->name, leaf->name));
      }
      value = std::move(bytes);
    }
    return true;
  }

  // The tensors that an instance gives, in one state.
  absl::StatusOr<Made> Make(const Instance& instance, const std::string& state) {
    NamePatternNumbers numbers = instance.numbers;
    ASSIGN_OR_RETURN(BlockTensor value, Evaluate(instance, SourceOf(instance), state, numbers));
    Made made;
    numbers = instance.numbers;
    RETURN_IF_ERROR(
        Distribute(instance, TargetOf(instance), state, std::move(value), numbers, made));
    return made;
  }

  absl::StatusOr<BlockTensor> Evaluate(const Instance& instance,
                                       const MappingExpression& expression,
                                       const std::string& state, NamePatternNumbers& numbers) {
    if (expression.kind == Kind::kTensor) {
      const std::string name = expression.name->Name(numbers);
      const uint32_t number = StateOf(tensors_[by_name_.at(name)], state);
      if (in_.tensor_states[number].shape.size() > kTensorDimsMax) {
        return Refuse(instance, absl::StrFormat("\"%s\": expected at most %d dimensions", name,
                                                kTensorDimsMax));
      }
      return BlocksOf(in_, number);
    }
    const std::string& first_name = NamesIn(expression)[0]->text();
    std::vector<BlockTensor> parts;
    size_t block_count = 0;
    const auto add = [&](const MappingExpression& operand) -> absl::Status {
      ASSIGN_OR_RETURN(BlockTensor part, Evaluate(instance, operand, state, numbers));
      block_count += part.blocks.size();
      parts.push_back(std::move(part));
      return At(instance, first_name, CheckBlockCount(block_count));
    };
    if (expression.kind == Kind::kStack) {
      const uint64_t count = instance.stacked.at(expression.capture).size();
      for (uint64_t i = 0; i < count; ++i) {
        numbers[expression.capture] = i;
        RETURN_IF_ERROR(add(expression.operands[0]));
      }
      numbers.erase(expression.capture);
      for (const BlockTensor& part : parts) {
        if (part.shape == parts[0].shape && part.dtype == parts[0].dtype) continue;
        return Refuse(instance, absl::StrFormat("%s: expected equal shapes and dtypes, found %s %s "
                                                "and %s %s",
                                                first_name, DtypeName(parts[0].dtype),
                                                ShapeText(parts[0].shape), DtypeName(part.dtype),
                                                ShapeText(part.shape)));
      }
      return Stacked(std::move(parts));
    }
    for (const MappingExpression& operand : expression.operands) RETURN_IF_ERROR(add(operand));
    absl::StatusOr<BlockTensor> whole = Join(expression, state, std::move(parts));
    if (!whole.ok()) return At(instance, first_name, whole.status());
    return whole;
  }

  // Of operations with operands beside each other.
  absl::StatusOr<BlockTensor> Join(const MappingExpression& expression, const std::string& state,
                                   std::vector<BlockTensor> parts) {
    if (expression.kind == Kind::kTranspose) return Transposed(std::move(parts[0]));
    for (const BlockTensor& part : parts) {
      if (part.shape.empty()) {
        return absl::InvalidArgumentError("expected 1 dimension or more, found none");
      }
      const auto columns = [](const BlockTensor& tensor) {
        return std::span(tensor.shape).subspan(1);
      };
      if (part.dtype != parts[0].dtype || !std::ranges::equal(columns(part), columns(parts[0]))) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "expected parts that differ in their first dimension only, found %s %s and %s %s",
            DtypeName(parts[0].dtype), ShapeText(parts[0].shape), DtypeName(part.dtype),
            ShapeText(part.shape)));
      }
    }
    if (expression.kind == Kind::kPad) return Pad(expression, state, std::move(parts[0]));
    ASSIGN_OR_RETURN(const std::vector<RowRun> runs, RunsOf(expression, RowsOf(parts)));
    return GatherRows(parts, runs);
  }

  static std::vector<uint64_t> RowsOf(std::span<const BlockTensor> parts) {
    std::vector<uint64_t> rows;
    for (const BlockTensor& part : parts) rows.push_back(part.shape[0]);
    return rows;
  }

  absl::StatusOr<BlockTensor> Pad(const MappingExpression& expression, const std::string& state,
                                  BlockTensor part) {
    const uint64_t rows = part.shape[0];
    if (rows == 0) return absl::InvalidArgumentError("pad: expected 1 row or more, found none");
    ASSIGN_OR_RETURN(const std::optional<uint64_t> expected, numbers_.Find(expression.number));
    if (expected.has_value() && *expected != rows) {
      return absl::InvalidArgumentError(absl::StrFormat("pad: expected %d rows (%s), found %d",
                                                        *expected, expression.number.name, rows));
    }
    ASSIGN_OR_RETURN(const uint64_t padded, numbers_.PaddedRows(expression.padded, rows));
    // Megatron's own converter repeats the last word; its optimizer has seen nothing of the copies.
    const bool repeats = IsWeightState(state) || state == "fp32";
    if (!repeats && !zeros_.has_value()) zeros_ = out_.AddInline(std::string(kZeroBytes, '\0'));
    return Padded(std::move(part), padded, repeats ? Padding::kLastRow : Padding::kZeros,
                  zeros_.value_or(0));
  }

  // Of kInterleave and kRotary, with parts of these rows.
  absl::StatusOr<std::vector<RowRun>> RunsOf(const MappingExpression& expression,
                                             const std::vector<uint64_t>& rows) {
    ASSIGN_OR_RETURN(const uint64_t number, numbers_.Get(expression.number));
    if (number > kMappingPartsMax) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "expected at most %d heads, groups or chunks, found %d", kMappingPartsMax, number));
    }
    if (expression.kind == Kind::kRotary) {
      if (rows[0] % (2 * number) != 0) {
        return absl::InvalidArgumentError(
            absl::StrFormat("rotary: expected %d heads with an even number of rows, found %d rows",
                            number, rows[0]));
      }
      return RotaryRuns(rows[0], number);
    }
    std::vector<uint64_t> weights;
    for (const MappingNumber& each : expression.weights) {
      ASSIGN_OR_RETURN(const uint64_t weight, numbers_.Get(each));
      weights.push_back(weight);
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      if (absl::uint128(rows[i]) * weights[0] != absl::uint128(rows[0]) * weights[i] ||
          rows[i] % number != 0) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "expected rows that are to each other as %s, in multiples of %d, found %s",
            absl::StrJoin(weights, " : "), number, absl::StrJoin(rows, " : ")));
      }
    }
    return InterleaveRuns(rows, number);
  }

  absl::Status Distribute(const Instance& instance, const MappingExpression& expression,
                          const std::string& state, BlockTensor value, NamePatternNumbers& numbers,
                          Made& made) {
    if (expression.kind == Kind::kTensor) {
      made.block_count += value.blocks.size();
      made.tensors.emplace_back(expression.name->Name(numbers), std::move(value));
      return At(instance, made.tensors.back().first, CheckBlockCount(made.block_count));
    }
    absl::StatusOr<std::vector<BlockTensor>> parts = Split(instance, expression, state, value);
    if (!parts.ok()) {
      NamePatternNumbers own = instance.numbers;
      std::vector<const Tensor*> leaves;
      RETURN_IF_ERROR(LeavesOf(instance, SourceOf(instance), own, leaves));
      return At(instance, leaves[0]->name, parts.status());
    }
    value = BlockTensor();  // its blocks are in the parts
    for (size_t i = 0; i < parts->size(); ++i) {
      const bool stack = expression.kind == Kind::kStack;
      if (stack) numbers[expression.capture] = i;
      RETURN_IF_ERROR(Distribute(instance, expression.operands[stack ? 0 : i], state,
                                 std::move((*parts)[i]), numbers, made));
      if (stack) numbers.erase(expression.capture);
    }
    return absl::OkStatus();
  }

  // The operands of which an operation makes `whole`.
  absl::StatusOr<std::vector<BlockTensor>> Split(const Instance& instance,
                                                 const MappingExpression& expression,
                                                 const std::string& state,
                                                 const BlockTensor& whole) {
    if (expression.kind == Kind::kTranspose) {
      ASSIGN_OR_RETURN(BlockTensor part, Transposed(whole));
      return std::vector<BlockTensor>{std::move(part)};
    }
    if (expression.kind == Kind::kStack) return Unstacked(whole);
    if (whole.shape.empty()) {
      return absl::InvalidArgumentError("expected 1 dimension or more, found none");
    }
    const uint64_t rows = whole.shape[0];
    if (expression.kind == Kind::kPad) {
      ASSIGN_OR_RETURN(const uint64_t kept, numbers_.Get(expression.number));
      if (kept > rows) {
        return absl::InvalidArgumentError(
            absl::StrFormat("pad: expected at least %d rows (%s), "
                            "found %d",
                            kept, expression.number.name, rows));
      }
      if (rows > kept && IsWeightState(state)) {
        left_out_.push_back(
            absl::StrFormat("%d rows of padding of %s", rows - kept,
                            NamesIn(SourceOf(instance))[0]->Name(instance.numbers)));
      }
      const RowRun run{.part = 0, .part_row = 0, .whole_row = 0, .count = kept};
      return ScatterRows(whole, {&run, 1}, {&kept, 1});
    }
    std::vector<uint64_t> part_rows;
    absl::uint128 total = 0;
    for (const MappingNumber& each : expression.weights) {
      ASSIGN_OR_RETURN(const uint64_t weight, numbers_.Get(each));
      total += weight;
      part_rows.push_back(weight);
    }
    for (uint64_t& each : part_rows) {
      const absl::uint128 of = absl::uint128(rows) * each;
      if (of % total != 0) {
        return absl::InvalidArgumentError(
            absl::StrFormat("expected rows for parts that are to each other as %s, found %d",
                            absl::StrJoin(part_rows, " : "), rows));
      }
    }
    for (uint64_t& each : part_rows) {
      each = static_cast<uint64_t>(absl::uint128(rows) * each / total);
    }
    if (expression.kind == Kind::kRotary) part_rows = {rows};
    ASSIGN_OR_RETURN(const std::vector<RowRun> runs, RunsOf(expression, part_rows));
    return ScatterRows(whole, runs, part_rows);
  }

  // The optimizer's groups, of the new names. Groups that nothing tells stay as they are.
  absl::Status MapGroups() {
    const absl::StatusOr<std::vector<OptimizerGroup>> groups = OptimizerGroupsOf(in_);
    if (!groups.ok() || groups->empty()) return absl::OkStatus();
    std::vector<OptimizerGroup> mapped;
    for (size_t group = 0; group < groups->size(); ++group) {
      mapped.push_back({.parameters = {}, .values = (*groups)[group].values});
      for (const std::string& name : (*groups)[group].parameters) {
        const Tensor& tensor = tensors_[by_name_.at(name)];
        if (tensor.instance == kNone) continue;
        Instance& instance = instances_[tensor.instance];
        if (instance.group.empty()) {
          instance.group = {group};
          std::vector<std::string>& parameters = mapped.back().parameters;
          parameters.insert(parameters.end(), instance.targets.begin(), instance.targets.end());
        } else if (instance.group[0] != group) {
          return Refuse(instance,
                        absl::StrFormat("\"%s\" is in another parameter group than what it "
                                        "is put together with",
                                        name));
        }
      }
    }
    SetOptimizerGroups(mapped, out_);
    return absl::OkStatus();
  }

  const MappingRequest& request_;
  ModelNumbers& numbers_;
  const ForeignIndex& in_;
  WholeTensorReader reader_;
  std::vector<std::string>& left_out_;
  ForeignIndex out_;
  std::vector<Tensor> tensors_;  // in the order of the index
  std::unordered_map<std::string_view, uint32_t> by_name_;
  std::vector<Instance> instances_;                                // by their first tensor
  std::map<std::pair<std::string, std::string>, size_t> claimed_;  // name and state, to the line
  std::vector<uint32_t> new_numbers_;  // of states that became one other: for aliases
  std::optional<uint32_t> zeros_;      // an extent
};

}  // namespace

size_t CountMapped(const MappingRules& rules, MappingDirection direction,
                   const ForeignIndex& index) {
  const NameFinder finder(rules, direction);
  std::set<std::string_view> names;
  for (const TensorState& state : index.tensor_states) names.insert(state.tensor);
  return static_cast<size_t>(std::count_if(names.begin(), names.end(), [&](std::string_view name) {
    return finder.Find(std::string(name)).has_value();
  }));
}

absl::Status ApplyMapping(const MappingRequest& request, const ForeignFolder& folder,
                          ModelNumbers& numbers, ForeignIndex& index,
                          std::vector<std::string>& left_out) {
  std::vector<std::string> more;
  ASSIGN_OR_RETURN(ForeignIndex mapped, Mapper(request, folder, numbers, index, more).Run());
  left_out.insert(left_out.end(), more.begin(), more.end());
  index = std::move(mapped);
  return absl::OkStatus();
}

}  // namespace holdfast::converter
