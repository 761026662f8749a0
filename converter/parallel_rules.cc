#include "converter/parallel_rules.h"

#include <re2/re2.h>
#include <re2/set.h>

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/suggestion.h"

namespace holdfast::converter {
namespace {

std::string Show(std::span<const uint64_t> sizes) {
  return "[" + absl::StrJoin(sizes.begin(), sizes.end(), ", ") + "]";
}

absl::Status Named(const std::string& parameter, const absl::Status& status) {
  return absl::Status(status.code(),
                      absl::StrCat("parameter \"", parameter, "\": ", status.message()));
}

// The shape in which `rule` sees the whole parameter of so many elements.
absl::StatusOr<Shape> LogicalShape(const SubParameters& rule, uint64_t dimension_size,
                                   uint64_t elements) {
  Shape shape;
  std::optional<size_t> left_over;
  uint64_t known = 1;
  for (size_t d = 0; d < rule.shape.size(); ++d) {
    if (d == rule.dimension) {
      shape.push_back(dimension_size);
    } else if (rule.shape[d] < 0) {
      if (left_over.has_value()) {
        return absl::InvalidArgumentError("sub-parameters: expected at most one size -1");
      }
      left_over = d;
      shape.push_back(1);
    } else {
      shape.push_back(static_cast<uint64_t>(rule.shape[d]));
    }
  }
  ASSIGN_OR_RETURN(known, ElementCount(shape, "shape of sub-parameters"));
  if (left_over.has_value()) {
    if (known == 0 || elements % known != 0) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "sub-parameters: expected a multiple of %d elements, found %d", known, elements));
    }
    shape[*left_over] = elements / known;
    known = elements;
  }
  if (known != elements) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "sub-parameters: expected shape %s, found %d elements", Show(shape), elements));
  }
  return shape;
}

absl::StatusOr<ShardMap> Replica(std::span<const Shape> shard_shapes, size_t rank) {
  for (const Shape& shape : shard_shapes) {
    if (shape != shard_shapes[0]) {
      return absl::InvalidArgumentError(
          absl::StrFormat("expected equal replicas on all tensor-parallel ranks, found %s and %s",
                          Show(shard_shapes[0]), Show(shape)));
    }
  }
  return WholeShard(shard_shapes[rank]);
}

absl::StatusOr<uint64_t> TotalElements(std::span<const Shape> shard_shapes) {
  uint64_t total = 0;
  for (const Shape& shape : shard_shapes) {
    ASSIGN_OR_RETURN(const uint64_t count, ElementCount(shape, "shard"));
    total += count;
    if (total > kTensorBytesMax / 8) {
      return absl::InvalidArgumentError("shards: more elements than a tensor can have");
    }
  }
  return total;
}

}  // namespace

// Matches at the beginning of a name, as re.match does.
class ParallelRules::Matcher {
 public:
  static absl::StatusOr<std::unique_ptr<Matcher>> Create(const std::string& what,
                                                         const std::vector<std::string>& patterns) {
    RE2::Options options(RE2::Quiet);
    options.set_max_mem(int64_t{64} << 20);
    auto matcher = std::make_unique<Matcher>(options);
    for (const std::string& pattern : patterns) {
      std::string error;
      if (matcher->set_.Add(pattern, &error) < 0) {
        return absl::UnimplementedError(
            absl::StrFormat("%s: pattern \"%s\" is not understood: %s", what, pattern, error));
      }
    }
    if (!patterns.empty() && !matcher->set_.Compile()) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%s: %d patterns take too much memory", what, patterns.size()));
    }
    matcher->empty_ = patterns.empty();
    return matcher;
  }

  explicit Matcher(const RE2::Options& options) : set_(options, RE2::ANCHOR_START) {}

  // Numbers of the patterns that match, ascending.
  std::vector<int> Match(std::string_view name) const {
    std::vector<int> found;
    if (!empty_ && set_.Match(re2::StringPiece(name.data(), name.size()), &found)) {
      std::sort(found.begin(), found.end());
    }
    return found;
  }
  bool Matches(std::string_view name) const { return !Match(name).empty(); }

 private:
  RE2::Set set_;
  bool empty_ = true;
};

bool ParallelInfo::NamesShards() const {
  return !vocabulary.empty() || !replicated.empty() || !averaged.empty() || !row.empty() ||
         !column.empty() || !two_sub_parameters.empty() || !sub_parameters.empty() ||
         !affine.empty();
}

ParallelRules::ParallelRules() = default;
ParallelRules::~ParallelRules() = default;
ParallelRules::ParallelRules(ParallelRules&&) noexcept = default;
ParallelRules& ParallelRules::operator=(ParallelRules&&) noexcept = default;

absl::StatusOr<ParallelRules> ParallelRules::Create(ParallelInfo info) {
  ParallelRules rules;
  std::vector<std::string> sub, unsupported, affine, layout;
  for (const SubParameters& rule : info.sub_parameters) {
    sub.insert(sub.end(), rule.patterns.begin(), rule.patterns.end());
  }
  for (const auto& [pattern, reason] : info.unsupported) unsupported.push_back(pattern);
  for (const AffineParameter& parameter : info.affine) affine.push_back(parameter.pattern);
  for (const ShardRule& rule : info.rules) layout.push_back(rule.pattern);
  struct Class {
    const char* name;
    const std::vector<std::string>* patterns;
    std::unique_ptr<Matcher>* matcher;
  };
  const std::array<Class, 11> classes = {{
      {"layout file", &layout, &rules.rules_},
      {"vocabulary_parameter_patterns", &info.vocabulary, &rules.vocabulary_},
      {"tp_replicated_parameter_patterns", &info.replicated, &rules.replicated_},
      {"parameter_to_average_patterns", &info.averaged, &rules.averaged_},
      {"parameter_with_row_parallelism_patterns", &info.row, &rules.row_},
      {"preset", &info.column, &rules.column_},
      {"parameter_with_2_sub_params_cat_dim_0", &info.two_sub_parameters, &rules.two_},
      {"pipeline_replicated_parameter_patterns", &info.pipeline_replicated, &rules.pipeline_},
      {"parameter_with_sub_params", &sub, &rules.sub_},
      {"autotp_unsupported_parameter_patterns", &unsupported, &rules.unsupported_},
      {"affine_map", &affine, &rules.affine_},
  }};
  size_t count = 0;
  for (const Class& of : classes) {
    count += of.patterns->size();
    if (count > kParallelPatternsMax) {
      return absl::ResourceExhaustedError(absl::StrFormat(
          "%s: expected at most %d patterns in all, found more", of.name, kParallelPatternsMax));
    }
    ASSIGN_OR_RETURN(*of.matcher, Matcher::Create(of.name, *of.patterns));
  }
  rules.info_ = std::move(info);
  return rules;
}

bool ParallelRules::PipelineReplicated(std::string_view parameter) const {
  return pipeline_->Matches(parameter);
}

const ShardRule* ParallelRules::RuleOf(std::string_view parameter) const {
  const std::vector<int> found = rules_->Match(parameter);
  return found.empty() ? nullptr : &info_.rules[static_cast<size_t>(found[0])];
}

std::optional<uint64_t> ParallelRules::RowsOf(std::string_view parameter) const {
  if (const ShardRule* rule = RuleOf(parameter); rule != nullptr) return rule->rows;
  return vocabulary_->Matches(parameter) ? info_.original_vocabulary : std::nullopt;
}

absl::StatusOr<std::vector<ShardMap>> ParallelRules::Resolve(
    const std::string& parameter, std::span<const Shape> shard_shapes) const {
  CHECK(!shard_shapes.empty());
  std::vector<ShardMap> maps;
  for (size_t rank = 0; rank < shard_shapes.size(); ++rank) {
    absl::StatusOr<ShardMap> map = Shard(parameter, shard_shapes, rank);
    if (!map.ok()) return Named(parameter, map.status());
    if (const std::optional<uint64_t> rows = RowsOf(parameter); rows.has_value()) {
      const absl::Status kept = KeepRows(*rows, *map);
      if (!kept.ok()) return Named(parameter, kept);
    }
    if (!maps.empty() && map->shape != maps.front().shape) {
      return Named(parameter, absl::InvalidArgumentError(absl::StrFormat(
                                  "expected one shape by all ranks, found %s and %s",
                                  Show(maps.front().shape), Show(map->shape))));
    }
    maps.push_back(*std::move(map));
  }
  return maps;
}

absl::StatusOr<ShardMap> ParallelRules::Shard(const std::string& parameter,
                                              std::span<const Shape> shard_shapes,
                                              size_t rank) const {
  const Shape& mine = shard_shapes[rank];
  if (const ShardRule* rule = RuleOf(parameter); rule != nullptr) {
    return shard_shapes.size() == 1 ? WholeShard(mine) : RuleShard(*rule, shard_shapes, rank);
  }
  if (const std::vector<int> found = affine_->Match(parameter); !found.empty()) {
    if (found.size() > 1) {
      return absl::InvalidArgumentError("affine_map: expected one pattern that matches, found two");
    }
    const AffineParameter& rule = info_.affine[static_cast<size_t>(found[0])];
    for (const AffineParameter::OfRank& of : rule.ranks) {
      if (of.rank != rank) continue;
      ASSIGN_OR_RETURN(const uint64_t said, ElementCount(of.shard_shape, "shard"));
      ASSIGN_OR_RETURN(const uint64_t is, ElementCount(mine, "shard"));
      if (said != is) {
        return absl::InvalidArgumentError(
            absl::StrFormat("affine_map: expected a shard of shape %s on tensor-parallel rank %d, "
                            "found %s",
                            Show(of.shard_shape), rank, Show(mine)));
      }
      return AffineShard(rule.logical_shape, of.shard_shape, of.pieces);
    }
    return absl::InvalidArgumentError(
        absl::StrFormat("affine_map: found nothing of tensor-parallel rank %d", rank));
  }
  if (shard_shapes.size() == 1) return WholeShard(mine);
  if (const std::vector<int> found = unsupported_->Match(parameter); !found.empty()) {
    return absl::UnimplementedError(
        absl::StrCat("its producer says that its shards cannot be joined: ",
                     info_.unsupported[static_cast<size_t>(found[0])].second));
  }
  if (replicated_->Matches(parameter) || averaged_->Matches(parameter)) {
    return Replica(shard_shapes, rank);
  }
  if (two_->Matches(parameter)) {
    Shape first, second;  // torch.chunk: the first half is the larger one
    Shape whole = mine;
    uint64_t rows = 0;
    for (const Shape& shape : shard_shapes) {
      if (shape.empty()) return absl::InvalidArgumentError("expected a dimension, found none");
      first.push_back((shape[0] + 1) / 2);
      second.push_back(shape[0] / 2);
      rows += std::min(shape[0], kTensorBytesMax);
    }
    whole[0] = rows;
    return SubTensorShard(whole, 0, {first, second}, rank);
  }
  if (const std::vector<int> found = sub_->Match(parameter); !found.empty()) {
    auto left = static_cast<size_t>(found[0]);
    for (const SubParameters& rule : info_.sub_parameters) {
      if (left < rule.patterns.size()) {
        return SubParameterShard(rule, rule.patterns[left], shard_shapes, rank);
      }
      left -= rule.patterns.size();
    }
  }
  if (row_->Matches(parameter)) return JoinedShard(shard_shapes, rank, 1);
  if (!info_.NamesShards()) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "found on %d tensor-parallel ranks, and %s how it was cut: expected "
        "universal_checkpoint_info, a preset (gpt2, llama, mixtral) or a layout "
        "file",
        shard_shapes.size(),
        info_.rules.empty() ? "the checkpoint does not say" : "no rule of the layout file says"));
  }
  if (!info_.column.empty() && !column_->Matches(parameter)) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "found on %d tensor-parallel ranks, and the preset does not know its name: a layout file "
        "says how it was cut",
        shard_shapes.size()));
  }
  return JoinedShard(shard_shapes, rank, 0);
}

absl::StatusOr<ParameterCut> ParallelRules::KindOf(const std::string& parameter,
                                                   const Shape& whole) const {
  using Kind = ParameterCut::Kind;
  const auto along = [&](size_t dimension,
                         std::vector<uint64_t> sizes) -> absl::StatusOr<ParameterCut> {
    if (dimension >= whole.size()) {
      return absl::FailedPreconditionError(absl::StrFormat(
          "is to be cut along dimension %d, found shape %s", dimension, Show(whole)));
    }
    return ParameterCut{.kind = sizes.empty() ? Kind::kJoined : Kind::kSubTensors,
                        .dimension = dimension,
                        .sizes = std::move(sizes)};
  };
  const auto equal = [&](size_t dimension, uint64_t count) -> absl::StatusOr<ParameterCut> {
    const uint64_t size = dimension < whole.size() ? whole[dimension] : 0;
    // A number that the source says is not believed before its memory is asked for.
    if (count > std::max<uint64_t>(size, 1) || size % count != 0) {
      return absl::FailedPreconditionError(
          absl::StrFormat("has %d sub-tensors along dimension %d, which do not divide its size %d",
                          count, dimension, size));
    }
    return along(dimension, std::vector<uint64_t>(count, size / count));
  };
  if (const ShardRule* rule = RuleOf(parameter); rule != nullptr) {
    if (!rule->dimension.has_value()) return ParameterCut{};
    if (!rule->blocks.empty()) return along(*rule->dimension, rule->blocks);
    return rule->equal_blocks > 1 ? equal(*rule->dimension, rule->equal_blocks)
                                  : along(*rule->dimension, {});
  }
  if (const std::vector<int> found = unsupported_->Match(parameter); !found.empty()) {
    return absl::UnimplementedError(
        absl::StrCat("its producer says that its shards cannot be told: ",
                     info_.unsupported[static_cast<size_t>(found[0])].second));
  }
  if (replicated_->Matches(parameter) || averaged_->Matches(parameter)) return ParameterCut{};
  if (two_->Matches(parameter)) return equal(0, 2);
  if (const std::vector<int> found = sub_->Match(parameter); !found.empty()) {
    auto left = static_cast<size_t>(found[0]);
    for (const SubParameters& rule : info_.sub_parameters) {
      if (left >= rule.patterns.size()) {
        left -= rule.patterns.size();
        continue;
      }
      if (!rule.sizes.empty()) return along(rule.dimension, rule.sizes);
      return equal(rule.dimension,
                   static_cast<uint64_t>(std::max<int64_t>(rule.shape[rule.dimension], 1)));
    }
  }
  if (row_->Matches(parameter)) return along(1, {});
  if (column_->Matches(parameter)) return along(0, {});
  if (!info_.NamesShards() || !info_.column.empty()) {
    return absl::FailedPreconditionError(
        "nothing says how tensor-parallel ranks cut it: expected universal_checkpoint_info of the "
        "source (in the names that are written), --preset gpt2, llama or mixtral that knows its "
        "name, or a rule of --layout-file");
  }
  return along(0, {});
}

absl::StatusOr<ParameterCut> ParallelRules::HowToCut(const std::string& parameter,
                                                     const Shape& whole) const {
  absl::StatusOr<ParameterCut> cut = KindOf(parameter, whole);
  if (!cut.ok()) return Named(parameter, cut.status());
  cut->vocabulary = IsVocabulary(parameter);
  return cut;
}

absl::StatusOr<ParameterCut> ParallelRules::Cut(const std::string& parameter, const Shape& whole,
                                                uint64_t ranks) const {
  CHECK(ranks > 0 && info_.affine.empty() && info_.widths.empty());
  absl::StatusOr<ParameterCut> cut = ParameterCut{};
  if (ranks > 1) cut = KindOf(parameter, whole);
  if (!cut.ok()) return Named(parameter, cut.status());
  cut->shard_shape = whole;
  if (const std::optional<uint64_t> rows = RowsOf(parameter); rows.has_value()) {
    if (whole.empty() || whole[0] != *rows) {
      return Named(parameter, absl::FailedPreconditionError(absl::StrFormat(
                                  "expected %d rows, as it has without padding, found shape %s",
                                  *rows, Show(whole))));
    }
    cut->vocabulary = true;
    const uint64_t padded = info_.padded_vocabulary.value_or(*rows);
    uint64_t& size = cut->shard_shape[0];
    size = padded >= *rows && padded % ranks == 0 ? padded : (*rows + ranks - 1) / ranks * ranks;
  }
  if (cut->kind != ParameterCut::Kind::kReplicated) {
    uint64_t& size = cut->shard_shape[cut->dimension];
    const std::vector<uint64_t> parts =
        cut->sizes.empty() ? std::vector<uint64_t>{size} : cut->sizes;
    uint64_t sum = 0;
    for (const uint64_t part : parts) {
      sum += std::min(part, kTensorBytesMax / kTensorDimsMax);
      if (part % ranks == 0) continue;
      return Named(parameter,
                   absl::FailedPreconditionError(absl::StrFormat(
                       "%d tensor-parallel ranks do not divide the %d elements of dimension %d%s "
                       "of shape %s",
                       ranks, part, cut->dimension,
                       cut->sizes.empty() ? "" : " of one of its sub-tensors", Show(whole))));
    }
    if (sum != size) {
      return Named(parameter,
                   absl::FailedPreconditionError(absl::StrFormat(
                       "expected sub-tensors of %d elements together along dimension %d, found "
                       "sizes %s",
                       size, cut->dimension, Show(parts))));
    }
    size /= ranks;
  }
  // What will be read: by the very rules of reading.
  ASSIGN_OR_RETURN(cut->maps, Resolve(parameter, std::vector<Shape>(ranks, cut->shard_shape)));
  if (cut->maps.front().shape != whole) {
    return Named(parameter, absl::FailedPreconditionError(absl::StrFormat(
                                "expected shape %s, as its shards would make, found %s",
                                Show(cut->maps.front().shape), Show(whole))));
  }
  return cut;
}

absl::StatusOr<ShardMap> ParallelRules::RuleShard(const ShardRule& rule,
                                                  std::span<const Shape> shard_shapes,
                                                  size_t rank) const {
  if (!rule.dimension.has_value()) return Replica(shard_shapes, rank);
  const size_t d = *rule.dimension;
  if (rule.blocks.empty() && rule.equal_blocks == 1) return JoinedShard(shard_shapes, rank, d);
  uint64_t size = 0;
  for (const Shape& shape : shard_shapes) {
    if (shape.size() <= d) {
      return absl::InvalidArgumentError(
          absl::StrFormat("layout file: expected dimension %d, found shape %s", d, Show(shape)));
    }
    size += std::min(shape[d], kTensorBytesMax >> 20);  // no more ranks than 2^20: no overflow
  }
  std::vector<uint64_t> blocks = rule.blocks;
  if (blocks.empty()) blocks.assign(rule.equal_blocks, size / rule.equal_blocks);
  uint64_t sum = 0;
  for (const uint64_t block : blocks) sum += block;
  if (sum != size) {
    return absl::InvalidArgumentError(
        rule.blocks.empty()
            ? absl::StrFormat("layout file: expected a size that %d blocks divide, found %d",
                              rule.equal_blocks, size)
            : absl::StrFormat("layout file: expected blocks of %d together, found %s", size,
                              Show(blocks)));
  }
  std::vector<Shape> widths;
  for (const uint64_t block : blocks) {
    if (block % shard_shapes.size() != 0) {
      return absl::InvalidArgumentError(
          absl::StrFormat("layout file: expected blocks whose sizes %d ranks divide, found %d",
                          shard_shapes.size(), block));
    }
    widths.emplace_back(shard_shapes.size(), block / shard_shapes.size());
  }
  Shape whole = shard_shapes[rank];
  whole[d] = size;
  ASSIGN_OR_RETURN(ShardMap map, SubTensorShard(whole, d, widths, rank));
  ASSIGN_OR_RETURN(const uint64_t mine, ElementCount(shard_shapes[rank], "shard"));
  if (map.shard_elements != mine) {
    return absl::InvalidArgumentError(
        absl::StrFormat("layout file: expected %d elements on tensor-parallel rank %d, found %d",
                        map.shard_elements, rank, mine));
  }
  return map;
}

absl::StatusOr<ShardMap> ParallelRules::SubParameterShard(const SubParameters& rule,
                                                          const std::string& pattern,
                                                          std::span<const Shape> shard_shapes,
                                                          size_t rank) const {
  if (rule.dimension >= rule.shape.size()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("sub-parameters: expected partition_dim below %d, found %d",
                        rule.shape.size(), rule.dimension));
  }
  ASSIGN_OR_RETURN(const uint64_t total, TotalElements(shard_shapes));
  const uint64_t ranks = shard_shapes.size();
  std::vector<uint64_t> sizes = rule.sizes;
  if (sizes.empty()) {  // before 0.4: a number of equal ones
    if (rule.shape[rule.dimension] <= 0) {
      return absl::InvalidArgumentError("sub-parameters: expected their number, found none");
    }
    const auto count = static_cast<uint64_t>(rule.shape[rule.dimension]);
    uint64_t size = 0;
    for (const Shape& shape : shard_shapes) {
      if (shape.size() <= rule.dimension) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "sub-parameters along dimension %d: found shape %s", rule.dimension, Show(shape)));
      }
      size += std::min(shape[rule.dimension], kTensorBytesMax);
    }
    if (size % count != 0 || count > size) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "sub-parameters: expected a size that %d divides, found %d", count, size));
    }
    sizes.assign(count, size / count);
  }
  std::vector<Shape> widths;
  for (const auto& [of, listed] : info_.widths) {
    if (of == pattern) widths = listed;
  }
  if (widths.empty()) {
    for (uint64_t size : sizes) {
      if (size % ranks != 0) {
        return absl::UnimplementedError(
            absl::StrFormat("sub-parameters of size %d on %d ranks: expected a size that %d "
                            "divides, because nothing says how an uneven one was cut",
                            size, ranks, ranks));
      }
      widths.emplace_back(ranks, size / ranks);
    }
  }
  uint64_t dimension_size = 0;
  for (size_t i = 0; i < widths.size(); ++i) {
    uint64_t sum = 0;
    for (uint64_t width : widths[i]) sum += std::min(width, kTensorBytesMax / kTensorDimsMax);
    if (widths.size() != sizes.size() || widths[i].size() != ranks || sum != sizes[i]) {
      return absl::InvalidArgumentError(
          absl::StrFormat("sub_param_shard_widths: expected for each sub-parameter of sizes %s the "
                          "widths on %d ranks, found %s",
                          Show(sizes), ranks, Show(widths[i])));
    }
    dimension_size += sum;
  }
  ASSIGN_OR_RETURN(const Shape logical, LogicalShape(rule, dimension_size, total));
  ASSIGN_OR_RETURN(ShardMap map, SubTensorShard(logical, rule.dimension, widths, rank));
  ASSIGN_OR_RETURN(const uint64_t mine, ElementCount(shard_shapes[rank], "shard"));
  if (map.shard_elements != mine) {
    return absl::InvalidArgumentError(
        absl::StrFormat("sub-parameters: expected %d elements on tensor-parallel rank %d, found %d",
                        map.shard_elements, rank, mine));
  }
  return map;
}

std::string ExactPattern(const std::vector<std::string>& names) {
  std::vector<std::string> quoted;
  quoted.reserve(names.size());
  for (const std::string& name : names) quoted.push_back(RE2::QuoteMeta(name));
  return absl::StrCat("^(?:", absl::StrJoin(quoted, "|"), ")$");
}

std::string ExactPrefix(const std::string& begin) {
  return absl::StrCat("^", RE2::QuoteMeta(begin));
}

absl::StatusOr<ParallelInfo> ParallelPreset(std::string_view name) {
  // The classes of Megatron-style tensor parallelism: input projections are cut by rows of the
  // weight (dimension 0, with their bias), output projections by columns, norms are replicated.
  ParallelInfo info;
  if (name == "gpt2") {
    // transformers' Conv1D holds weights transposed: [in, out].
    info.replicated = {R"((.*\.)?(ln_1|ln_2|ln_f)\.(weight|bias)$)", R"((.*\.)?wpe\.weight$)",
                       R"((.*\.)?c_proj\.bias$)"};
    info.sub_parameters = {
        {.patterns = {R"((.*\.)?c_attn\.weight$)"}, .shape = {-1, 3}, .sizes = {}, .dimension = 1},
        {.patterns = {R"((.*\.)?c_attn\.bias$)"}, .shape = {3}, .sizes = {}, .dimension = 0}};
    info.row = {R"((.*\.)?c_fc\.weight$)"};
    info.column = {R"((.*\.)?(wte|lm_head|c_proj)\.weight$)", R"((.*\.)?c_fc\.bias$)"};
    return info;
  }
  if (name == "llama" || name == "mixtral") {
    info.replicated = {R"((.*\.)?(input_layernorm|post_attention_layernorm|norm)\.weight$)",
                       R"((.*\.)?(q_norm|k_norm)\.weight$)", R"((.*\.)?(o_proj|down_proj)\.bias$)"};
    info.row = {R"((.*\.)?(o_proj|down_proj)\.weight$)"};
    info.column = {
        R"((.*\.)?(embed_tokens|lm_head|q_proj|k_proj|v_proj|gate_proj|up_proj)\.(weight|bias)$)"};
    if (name == "mixtral") {
      info.replicated.push_back(R"((.*\.)?(block_sparse_moe|mlp)\.gate\.weight$)");
      info.row.push_back(R"((.*\.)?experts\.\d+\.w2\.weight$)");
      info.column.push_back(R"((.*\.)?experts\.\d+\.(w1|w3)\.weight$)");
    }
    return info;
  }
  constexpr std::array<std::string_view, 3> kKnown = {"gpt2", "llama", "mixtral"};
  return absl::InvalidArgumentError(
      absl::StrFormat("--preset \"%s\": expected gpt2, llama or mixtral%s", std::string(name),
                      DidYouMean(name, kKnown)));
}

}  // namespace holdfast::converter
