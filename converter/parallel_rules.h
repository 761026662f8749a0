// How the tensor-parallel shards of each parameter make the whole one, in DeepSpeed's language
// (`universal_checkpoint_info`): classes of name patterns, sub-parameters, affine maps. Built-in
// presets say the same for model families whose producer wrote nothing.
//
// Nothing is guessed: a parameter on several ranks of which nobody says how it was cut is refused.
// DeepSpeed takes an unnamed parameter for one that is cut along dimension 0; so does this, but
// only beside rules of a producer that name others, because `--inject_missing_state` leaves none at
// all (DeepSpeed#5430: that "will silently produce an incorrect checkpoint").
//
// Patterns are Python's `re`, run by RE2: linear time whatever the pattern. What RE2 does not have
// (look-around, back references) is refused by name.
#ifndef HOLDFAST_CONVERTER_PARALLEL_RULES_H_
#define HOLDFAST_CONVERTER_PARALLEL_RULES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/shard_map.h"

namespace re2 {
class RE2;
}

namespace holdfast::converter {

inline constexpr size_t kParallelPatternsMax = size_t{1} << 20;

// `parameter_with_sub_params`: sub-tensors behind each other along one dimension.
struct SubParameters {
  std::vector<std::string> patterns;
  // The view of the whole parameter; -1: what is left. At `dimension` of rules from 0.4 on the
  // sizes of the sub-tensors stand in `sizes`, before that the size is their number.
  std::vector<int64_t> shape;
  std::vector<uint64_t> sizes;
  size_t dimension = 0;
};

// `affine_map`: of one pattern.
struct AffineParameter {
  std::string pattern;
  Shape logical_shape;
  struct OfRank {
    uint64_t rank = 0;
    Shape shard_shape;
    std::vector<AffinePiece> pieces;
  };
  std::vector<OfRank> ranks;
};

// A rule of a layout file (converter/layout_file.h).
struct ShardRule {
  std::string pattern;
  std::optional<size_t> dimension;  // along which it was cut; nothing: replicated
  // Sub-tensors along it, each cut alone: their sizes in the whole; or, empty, so many equal ones.
  std::vector<uint64_t> blocks;
  uint64_t equal_blocks = 1;
  std::optional<uint64_t> rows;  // of dimension 0: what comes after is padding
};

// `universal_checkpoint_info`, without what is not about tensor or pipeline parallelism.
struct ParallelInfo {
  double version = 0;
  std::vector<std::string> vocabulary;
  std::vector<std::string> replicated;
  std::vector<std::string> averaged;
  std::vector<std::string> row;
  // No word of DeepSpeed's, but of presets: cut along dimension 0. Where there are some, what
  // nobody names is refused.
  std::vector<std::string> column;
  std::vector<std::string> two_sub_parameters;
  std::vector<std::string> pipeline_replicated;
  std::vector<SubParameters> sub_parameters;
  // `sub_param_shard_widths`: by pattern, widths[sub][rank].
  std::vector<std::pair<std::string, std::vector<Shape>>> widths;
  std::optional<uint64_t> original_vocabulary;
  std::optional<uint64_t> padded_vocabulary;  // rows of all ranks together; of what is written only
  std::vector<std::pair<std::string, std::string>> unsupported;  // pattern, reason
  std::vector<AffineParameter> affine;
  // Before all else, the first that matches: what the user says.
  std::vector<ShardRule> rules;

  // Whether anything is said of tensor parallelism by other words than the user's.
  bool NamesShards() const;
};

// How a whole parameter becomes the shards of tensor-parallel ranks. All ranks have equal shapes.
struct ParameterCut {
  enum class Kind : uint8_t { kReplicated, kJoined, kSubTensors };
  Kind kind = Kind::kReplicated;
  size_t dimension = 0;              // that is cut
  std::vector<uint64_t> sizes = {};  // of the sub-tensors along it; kSubTensors only
  bool vocabulary = false;           // the last rank's shard may end in rows of padding
  Shape shard_shape = {};
  std::vector<ShardMap> maps = {};  // by rank
};

// "gpt2", "llama", "mixtral". kInvalidArgument with a suggestion for another word.
absl::StatusOr<ParallelInfo> ParallelPreset(std::string_view name);

// Patterns that fit these names and no others, and what begins so.
std::string ExactPattern(const std::vector<std::string>& names);
std::string ExactPrefix(const std::string& begin);

// Threads: any; immutable. Lifetime: owns all.
class ParallelRules {
 public:
  // Errors: kInvalidArgument (a pattern that is none), kUnimplemented (one that RE2 has not),
  // kResourceExhausted (kParallelPatternsMax).
  static absl::StatusOr<ParallelRules> Create(ParallelInfo info);
  ~ParallelRules();
  ParallelRules(ParallelRules&&) noexcept;
  ParallelRules& operator=(ParallelRules&&) noexcept;

  // The maps of all tensor-parallel ranks, by the shapes of their shards; one shape: not parallel.
  // Errors, all naming the parameter: kFailedPrecondition (nobody says how it was cut),
  // kUnimplemented (the producer says that it cannot be told), kInvalidArgument (the shapes
  // contradict the rules: expected and found), kResourceExhausted.
  absl::StatusOr<std::vector<ShardMap>> Resolve(const std::string& parameter,
                                                std::span<const Shape> shard_shapes) const;
  // The other way: what Resolve makes `whole` of again. 1 rank cuts nothing, but pads a
  // vocabulary. Sub-tensors, and the dimension that is cut, are multiples of `ranks`; a vocabulary
  // is padded to `padded_vocabulary`, if that is a multiple, else to the next one. CHECKs that the
  // info has no affine maps and no widths, which are those of some number of ranks.
  // Errors, all naming the parameter: kFailedPrecondition (nobody says how it is cut; a size that
  // cannot be), kUnimplemented (its producer says that it cannot be told), kResourceExhausted.
  absl::StatusOr<ParameterCut> Cut(const std::string& parameter, const Shape& whole,
                                   uint64_t ranks) const;
  // The same without ranks: kind, dimension, sizes and vocabulary.
  absl::StatusOr<ParameterCut> HowToCut(const std::string& parameter, const Shape& whole) const;
  // Whether it is padded to a number of rows.
  bool IsVocabulary(std::string_view parameter) const { return RowsOf(parameter).has_value(); }
  // Whether several pipeline stages hold it (tied embeddings).
  bool PipelineReplicated(std::string_view parameter) const;
  const ParallelInfo& info() const { return info_; }

 private:
  // The patterns of one class, compiled.
  class Matcher;
  ParallelRules();

  const ShardRule* RuleOf(std::string_view parameter) const;  // of a layout file; null: none
  std::optional<uint64_t> RowsOf(std::string_view parameter) const;
  absl::StatusOr<ShardMap> Shard(const std::string& parameter, std::span<const Shape> shard_shapes,
                                 size_t rank) const;
  absl::StatusOr<ParameterCut> KindOf(const std::string& parameter, const Shape& whole) const;
  absl::StatusOr<ShardMap> RuleShard(const ShardRule& rule, std::span<const Shape> shard_shapes,
                                     size_t rank) const;
  absl::StatusOr<ShardMap> SubParameterShard(const SubParameters& rule, const std::string& pattern,
                                             std::span<const Shape> shard_shapes,
                                             size_t rank) const;

  ParallelInfo info_;
  std::unique_ptr<Matcher> rules_, vocabulary_, replicated_, averaged_, row_, column_, two_,
      pipeline_, sub_, unsupported_, affine_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_PARALLEL_RULES_H_
