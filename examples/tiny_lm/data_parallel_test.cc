// Goal: whatever is cut over dp and how, the optimizer makes of the ranks' gradients the bits that
// one rank makes of their sum, for tied embeddings on two stages too.
// Method: random gradients (seed printed) of several micro-batches on ranks that are threads;
// digests of all states against those of a world of one.
#include "examples/tiny_lm/data_parallel.h"

#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/tiny_lm/random.h"
#include "examples/tiny_lm/test_ranks.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

constexpr uint64_t kSeed = 20240229;
constexpr size_t kMicroBatches = 3;
constexpr int kSteps = 2;

ModelConfig SmallModel(bool tied) {
  ModelConfig config;
  config.context = 3;
  config.width = 16;
  config.heads = 2;
  config.hidden = 24;
  config.vocabulary = 13;
  config.tied = tied;
  return config;
}

// What share `share` of `shares` of the whole gradient of an element is: shares add up to the same
// for every number of them.
int64_t ShareOf(int step, size_t micro_batch, size_t element, uint32_t share, uint32_t shares) {
  const auto random = [&](uint64_t salt) {
    return static_cast<int64_t>(
               Mix(kSeed ^ Mix(element) ^
                   Mix(salt * 1000 + micro_batch * 10 + static_cast<uint64_t>(step)))) >>
           26;
  };
  int64_t rest = random(0);
  for (uint32_t i = 1; i < shares; ++i) {
    if (i == share) return random(i);
    rest -= random(i);
  }
  return rest;
}

using Digests = std::map<std::string, uint64_t>;

void Train(const Partition& partition, collectives::Communicator* ranks,
           collectives::Communicator* tied_stages, Digests& digests) {
  TrainingState state(partition, 7);
  DataParallel data_parallel(partition, state, ranks, tied_stages);
  const Mesh& mesh = partition.layout().mesh;
  std::vector<int64_t> gradients(partition.slot_count());
  std::vector<float> weights(partition.slot_count());
  for (int step = 0; step < kSteps; ++step) {
    ASSERT_TRUE(data_parallel.Weights(weights).ok());
    data_parallel.Begin(gradients);
    for (size_t micro_batch = 0; micro_batch < kMicroBatches; ++micro_batch) {
      for (const LocalParameter& local : partition.parameters()) {
        // First and last stage have shares of their own of a tied embedding's gradient.
        const bool is_tied = tied_stages != nullptr && local.parameter->home.first_stage &&
                             local.parameter->home.last_stage;
        const uint32_t shares = mesh.dp * (is_tied ? 2 : 1);
        const uint32_t share =
            partition.at().dp * (is_tied ? 2 : 1) + (is_tied && partition.is_last_stage() ? 1 : 0);
        for (size_t i = 0; i < local.count(); ++i) {
          const size_t element = local.parameter->offset + local.index().Of(i);
          gradients[local.slot + i] += ShareOf(step, micro_batch, element, share, shares);
        }
      }
      if (micro_batch + 1 < kMicroBatches) {
        ASSERT_TRUE(data_parallel.MicroBatchDone(gradients).ok());
      }
    }
    ASSERT_TRUE(data_parallel.Reduce(gradients).ok());
    ASSERT_TRUE(data_parallel.Update(AdamConfig(), 24).ok());
  }
  ASSERT_TRUE(data_parallel.Weights(weights).ok());
  for (const Piece& piece : state.Pieces()) {
    digests[absl::StrCat(piece.state, "/", piece.tensor, " copy ", piece.replica)] +=
        DigestOf(piece);
  }
  // What the model computes with is the parameters' values, and 0 in the padding.
  for (const LocalParameter& local : partition.parameters()) {
    for (size_t i = local.count(); i < local.slot_count; ++i) {
      ASSERT_EQ(weights[local.slot + i], 0.0F);
    }
  }
}

// Without the number of the copy: all copies must be the same.
Digests Merged(const std::vector<Digests>& ranks) {
  Digests copies;
  for (const Digests& digests : ranks) {
    for (const auto& [name, digest] : digests) copies[name] += digest;
  }
  Digests merged;
  for (const auto& [name, digest] : copies) {
    const auto [entry, is_new] = merged.emplace(name.substr(0, name.find(" copy ")), digest);
    EXPECT_EQ(entry->second, digest) << name;
  }
  return merged;
}

TEST(DataParallel, EveryCutGivesTheBitsOfOneRank) {
  RecordProperty("seed", absl::StrCat(kSeed));
  for (const bool tied : {false, true}) {
    const ParameterTable table(SmallModel(tied));
    JobLayout one;
    one.zero = Zero::kReplicated;
    one.stage_layers = {2};
    std::vector<Digests> alone(1);
    Train(Partition(table, one, 0), nullptr, nullptr, alone[0]);
    const Digests expected = Merged(alone);
    EXPECT_EQ(expected.size(), 4 * table.parameters().size() + 1);

    for (const Zero zero :
         {Zero::kReplicated, Zero::kOptimizer, Zero::kGradients, Zero::kParameters}) {
      for (const Mesh mesh : {Mesh{1, 1, 1}, Mesh{1, 2, 1}, Mesh{1, 5, 1}, Mesh{1, 2, 3},
                              Mesh{2, 1, 1}, Mesh{3, 2, 1}, Mesh{2, 3, 1}, Mesh{2, 2, 2}}) {
        SCOPED_TRACE(absl::StrCat("seed ", kSeed, " tied ", tied, " zero ", static_cast<int>(zero),
                                  " pp ", mesh.pp, " dp ", mesh.dp, " tp ", mesh.tp));
        JobLayout layout;
        layout.mesh = mesh;
        layout.zero = zero;
        layout.stage_layers.assign(mesh.pp, 0);
        layout.stage_layers[0] = 2;
        std::vector<Digests> found(mesh.world_size());
        RunRanks(mesh.world_size(), [&](collectives::Context& context, uint32_t rank) {
          const Partition partition(table, layout, rank);
          const Coordinates& at = partition.at();
          const auto ranks =
              Communicate(context, absl::StrCat("dp", at.pp, ".", at.tp), mesh.DataRanks(at));
          std::unique_ptr<collectives::Communicator> tied_stages;
          if (tied && mesh.pp > 1 && (partition.is_first_stage() || partition.is_last_stage())) {
            const std::vector<uint32_t> stages = mesh.Stages(at);
            tied_stages = Communicate(context, absl::StrCat("tied", at.dp, ".", at.tp),
                                      {stages.front(), stages.back()});
          }
          Train(partition, ranks.get(), tied_stages.get(), found[rank]);
        });
        EXPECT_EQ(Merged(found), expected);
      }
    }
  }
}

}  // namespace
}  // namespace tiny_lm
