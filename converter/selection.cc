#include "converter/selection.h"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "base/suggestion.h"
#include "base/utf8.h"
#include "converter/optimizer_groups.h"
#include "converter/parallel_facts.h"
#include "converter/rename_rules.h"
#include "converter/rounding.h"
#include "format/name_pattern.h"

namespace holdfast::converter {
namespace {

constexpr std::array<std::string_view, 4> kCastNames = {"float32", "bfloat16", "float16",
                                                        "float64"};
constexpr uint32_t kGone = std::numeric_limits<uint32_t>::max();
constexpr size_t kSuggestedNamesMax = 10'000;

bool Contains(const std::vector<std::string>& words, std::string_view word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

class Selector {
 public:
  Selector(ForeignIndex index, const SelectionRequest& request) : request_(request) {
    selection_.index = std::move(index);
  }

  absl::StatusOr<Selection> Run() {
    CollectStates();
    RETURN_IF_ERROR(CheckDrops());
    RETURN_IF_ERROR(LeaveOutUnreadable());
    RETURN_IF_ERROR(LeaveOutLost());
    ASSIGN_OR_RETURN(const std::vector<bool> wanted, Wanted());
    Keep(wanted);
    RETURN_IF_ERROR(Rename());
    if (!request_.rename.empty() || request_.map != nullptr) ForgetParallelFacts(index());
    if (request_.map != nullptr) {
      const Unmapped unmapped = Drops(kDropUnmapped) ? Unmapped::kLeaveOut : Unmapped::kRefuse;
      RETURN_IF_ERROR(request_.map(index(), unmapped, selection_.left_out));
    }
    RETURN_IF_ERROR(ChooseDtypes());
    return std::move(selection_);
  }

 private:
  ForeignIndex& index() { return selection_.index; }

  void CollectStates() {
    for (const TensorState& state : index().tensor_states) states_.insert(state.state);
  }

  // Of the states that are there and `others`.
  std::string Suggestion(std::string_view word, std::span<const std::string_view> others) const {
    std::vector<std::string_view> known(states_.begin(), states_.end());
    known.insert(known.end(), others.begin(), others.end());
    return DidYouMean(word, known);
  }

  absl::Status CheckDrops() const {
    constexpr std::array<std::string_view, 5> kOthers = {kDropUnreadable, kDropObjects,
                                                         kDropNoWeights, kDropUnmapped, kDropLost};
    for (const std::string& kind : request_.drop) {
      if (kind == kDropUnmapped && request_.map == nullptr && !states_.contains(kind)) {
        return absl::InvalidArgumentError("--drop unmapped: expected --map, found none");
      }
      if (states_.contains(kind) ||
          std::find(kOthers.begin(), kOthers.end(), kind) != kOthers.end()) {
        continue;
      }
      return absl::InvalidArgumentError(absl::StrFormat(
          "--drop %s: expected objects, unreadable, unmapped, lost, '*' or a state that is there "
          "(%s)%s",
          kind.substr(0, 200), absl::StrJoin(states_, ", "), Suggestion(kind, kOthers)));
    }
    return absl::OkStatus();
  }

  bool Drops(std::string_view kind) const { return Contains(request_.drop, kind); }

  absl::Status LeaveOutUnreadable() {
    std::vector<Unreadable>& unreadable = index().unreadable;
    if (!unreadable.empty() && !Drops(kDropUnreadable)) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "%s %s; --drop unreadable leaves it and %d others out", unreadable.front().name,
          unreadable.front().reason, unreadable.size() - 1));
    }
    for (const Unreadable& each : unreadable) {
      selection_.left_out.push_back(absl::StrFormat("%s, which %s", each.name, each.reason));
    }
    unreadable.clear();
    return absl::OkStatus();
  }

  // A checkpoint that lacks something is not written as if it were whole.
  absl::Status LeaveOutLost() {
    std::vector<std::string>& losses = index().losses;
    if (!losses.empty() && !Drops(kDropLost)) {
      return absl::DataLossError(
          absl::StrFormat("expected a whole checkpoint, found that something is lost: %s (and %d "
                          "more, which verify names); --drop lost goes on with what is there",
                          losses.front(), losses.size() - 1));
    }
    for (const std::string& loss : losses) {
      selection_.left_out.push_back(absl::StrFormat("lost: %s", loss));
    }
    losses.clear();
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<bool>> Wanted() {
    std::vector<NamePattern> patterns;
    for (const std::string& only : request_.only) {
      absl::StatusOr<NamePattern> pattern = NamePattern::Parse(only);
      if (!pattern.ok()) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "--only %s: expected %s", only.substr(0, 200), pattern.status().message()));
      }
      patterns.push_back(*std::move(pattern));
    }
    std::vector<bool> used(patterns.size());
    std::vector<bool> wanted;
    std::map<std::string_view, uint64_t> dropped;
    uint64_t others = 0;
    for (const TensorState& state : index().tensor_states) {
      bool fits = patterns.empty();
      for (size_t p = 0; p < patterns.size(); ++p) {
        if (!patterns[p].Match(state.tensor).has_value()) continue;
        fits = true;
        used[p] = true;
      }
      const bool drops =
          Drops(state.state) || (Drops(kDropNoWeights) && !IsWeightState(state.state));
      if (fits && drops) ++dropped[state.state];
      if (!fits) ++others;
      wanted.push_back(fits && !drops);
    }
    for (size_t p = 0; p < patterns.size(); ++p) {
      if (!used[p]) return FitsNothing(request_.only[p]);
    }
    for (const auto& [state, count] : dropped) {
      selection_.left_out.push_back(absl::StrFormat("%d tensors of state %s", count, state));
    }
    if (others > 0) {
      selection_.left_out.push_back(
          absl::StrFormat("%d tensors that --only does not name", others));
    }
    return wanted;
  }

  absl::Status FitsNothing(const std::string& only) const {
    std::vector<std::string_view> names;
    for (const TensorState& state : selection_.index.tensor_states) {
      if (names.size() == kSuggestedNamesMax) break;
      names.push_back(state.tensor);
    }
    return absl::InvalidArgumentError(absl::StrFormat(
        "--only %s: it fits no tensor's name%s", only.substr(0, 200), DidYouMean(only, names)));
  }

  void Keep(const std::vector<bool>& wanted) {
    if (std::find(wanted.begin(), wanted.end(), false) == wanted.end()) return;
    std::vector<uint32_t> numbers(wanted.size(), kGone);
    uint32_t count = 0;
    for (uint32_t i = 0; i < wanted.size(); ++i) {
      if (!wanted[i]) continue;
      numbers[i] = count;
      if (count != i) index().tensor_states[count] = std::move(index().tensor_states[i]);
      ++count;
    }
    index().tensor_states.resize(count);
    for (ForeignPiece& piece : index().pieces) {
      piece.piece.tensor_state = numbers[piece.piece.tensor_state];
    }
    std::erase_if(index().pieces,
                  [](const ForeignPiece& piece) { return piece.piece.tensor_state == kGone; });
    for (Alias& alias : index().aliases) {
      alias = {numbers[alias.tensor_state], numbers[alias.of]};
    }
    std::erase_if(index().aliases, [](const Alias& alias) {
      return alias.tensor_state == kGone || alias.of == kGone;
    });
  }

  absl::Status Rename() {
    ASSIGN_OR_RETURN(RenameRules rules, RenameRules::Parse(request_.rename));
    absl::StatusOr<std::vector<OptimizerGroup>> groups = OptimizerGroupsOf(index());
    if (!rules.empty()) {
      std::map<std::pair<std::string, std::string>, std::string> names;  // to the old ones
      for (TensorState& state : index().tensor_states) {
        std::string name = rules.Apply(state.tensor);
        if (name.size() > kNameBytesMax) {
          return absl::FailedPreconditionError(
              absl::StrFormat("--rename: %s: expected a new name of at most %d bytes, found %d",
                              Describe(state), kNameBytesMax, name.size()));
        }
        if (!IsUtf8(name)) {  // a pattern can match a part of a character: \C
          return absl::FailedPreconditionError(absl::StrFormat(
              "--rename: %s: expected a new name in UTF-8, found other bytes", Describe(state)));
        }
        const auto [place, is_new] = names.emplace(std::pair(name, state.state), state.tensor);
        if (!is_new) {
          return absl::FailedPreconditionError(
              absl::StrFormat("--rename: \"%s\" and \"%s\" would both be called \"%s\" (state %s)",
                              place->second, state.tensor, name, state.state));
        }
        state.tensor = std::move(name);
      }
      if (groups.ok()) {
        for (OptimizerGroup& group : *groups) {
          for (std::string& name : group.parameters) name = rules.Apply(std::move(name));
        }
      }
      RETURN_IF_ERROR(rules.CheckAllUsed());
    }
    // Where they are not told, writers that need them say so.
    if (groups.ok() && !groups->empty()) SetOptimizerGroups(*groups, index());
    return absl::OkStatus();
  }

  struct CastTo {
    std::string state;  // empty: weights and buffers
    Dtype dtype;
  };

  absl::StatusOr<CastTo> ParseCast(const std::string& text) const {
    const size_t equals = text.rfind('=');
    CastTo cast{.state = equals == std::string::npos ? "" : text.substr(0, equals),
                .dtype = Dtype::kFloat32};
    const std::string name = equals == std::string::npos ? text : text.substr(equals + 1);
    if (equals == 0 || (equals != std::string::npos && !states_.contains(cast.state))) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "--dtype %s: expected STATE=DTYPE with a state that is there (%s)%s", text.substr(0, 200),
          absl::StrJoin(states_, ", "), Suggestion(cast.state, {})));
    }
    const std::optional<Dtype> dtype = DtypeFromName(name);
    if (!dtype.has_value() || !IsCastable(*dtype)) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "--dtype %s: expected float32, bfloat16, float16 or float64, found \"%s\"%s",
          text.substr(0, 200), name.substr(0, 200), DidYouMean(name, kCastNames)));
    }
    cast.dtype = *dtype;
    return cast;
  }

  absl::Status ChooseDtypes() {
    std::vector<CastTo> casts;
    for (const std::string& text : request_.dtypes) {
      ASSIGN_OR_RETURN(CastTo cast, ParseCast(text));
      casts.push_back(std::move(cast));
    }
    std::map<std::pair<Dtype, Dtype>, uint64_t> counts;
    for (const TensorState& state : index().tensor_states) {
      Dtype dtype = state.dtype;
      for (const CastTo& cast : casts) {  // the last one counts
        const bool meant =
            cast.state.empty() ? IsWeightState(state.state) : cast.state == state.state;
        if (meant && IsCastable(state.dtype)) dtype = cast.dtype;
      }
      if (dtype != state.dtype) ++counts[{state.dtype, dtype}];
      selection_.dtypes.push_back(dtype);
    }
    for (const auto& [pair, count] : counts) {
      selection_.casts.push_back(absl::StrFormat("%d tensors from %s to %s", count,
                                                 DtypeName(pair.first), DtypeName(pair.second)));
    }
    return absl::OkStatus();
  }

  const SelectionRequest& request_;
  Selection selection_;
  std::set<std::string, std::less<>> states_;
};

}  // namespace

bool DropsObjects(const SelectionRequest& request) {
  return Contains(request.drop, kDropObjects) || Contains(request.drop, kDropNoWeights);
}

absl::StatusOr<Selection> Select(ForeignIndex index, const SelectionRequest& request) {
  return Selector(std::move(index), request).Run();
}

}  // namespace holdfast::converter
