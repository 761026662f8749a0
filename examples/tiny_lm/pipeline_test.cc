// Goal: the schedule is 1F1B, cannot deadlock, and keeps no more micro-batches than it says; and
// the passes over real links give the sums of one stage.
#include "examples/tiny_lm/pipeline.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/tiny_lm/exact.h"
#include "examples/tiny_lm/test_ranks.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

std::string Text(size_t stage, size_t stage_count, size_t micro_batch_count) {
  std::string text;
  for (const PipelineStep& step : OneForwardOneBackward(stage, stage_count, micro_batch_count)) {
    absl::StrAppend(&text, step.pass == Pass::kForward ? "F" : "B", step.micro_batch, " ");
  }
  return text;
}

TEST(Schedule, IsThatOfThePaper) {
  // Figure 4 of arXiv:2006.09503, PipeDream-Flush: four stages, four micro-batches.
  EXPECT_EQ(Text(0, 4, 4), "F0 F1 F2 F3 B0 B1 B2 B3 ");
  EXPECT_EQ(Text(1, 4, 4), "F0 F1 F2 B0 F3 B1 B2 B3 ");
  EXPECT_EQ(Text(2, 4, 4), "F0 F1 B0 F2 B1 F3 B2 B3 ");
  EXPECT_EQ(Text(3, 4, 4), "F0 B0 F1 B1 F2 B2 F3 B3 ");
  EXPECT_EQ(Text(0, 3, 1), "F0 B0 ");
}

// Every stage does its next step as soon as the neighbour's message is there: all come to an end,
// and no stage keeps more than it says.
TEST(Schedule, EveryStageComesToItsEndAndKeepsNoMoreThanItSays) {
  for (size_t stages = 1; stages <= 6; ++stages) {
    for (size_t micro_batches = 1; micro_batches <= 9; ++micro_batches) {
      std::vector<size_t> done(stages);
      std::vector<size_t> forward(stages);
      std::vector<size_t> backward(stages);
      std::vector<size_t> kept(stages);
      for (bool moved = true; moved;) {
        moved = false;
        for (size_t stage = 0; stage < stages; ++stage) {
          const auto steps = OneForwardOneBackward(stage, stages, micro_batches);
          if (done[stage] == steps.size()) continue;
          const PipelineStep step = steps[done[stage]];
          const bool is_forward = step.pass == Pass::kForward;
          size_t& own = is_forward ? forward[stage] : backward[stage];
          EXPECT_EQ(step.micro_batch, own) << "messages would be mixed up";
          const bool ready = is_forward
                                 ? stage == 0 || forward[stage - 1] > step.micro_batch
                                 : stage + 1 == stages || backward[stage + 1] > step.micro_batch;
          if (!ready) continue;
          EXPECT_TRUE(is_forward || forward[stage] > step.micro_batch);
          ++own;
          ++done[stage];
          kept[stage] = std::max(kept[stage], forward[stage] - backward[stage]);
          moved = true;
        }
      }
      for (size_t stage = 0; stage < stages; ++stage) {
        EXPECT_EQ(done[stage], 2 * micro_batches) << "stage " << stage << " of " << stages;
        EXPECT_EQ(kept[stage], UnderWayMax(stage, stages, micro_batches));
      }
    }
  }
}

TEST(Pipeline, StagesOverLinksGiveTheSumsOfOneStage) {
  ModelConfig config;
  config.context = 5;
  config.layers = 3;
  const ParameterTable table(config);
  std::vector<uint8_t> tokens(48);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<uint8_t>(i * 29 % 97);
  // Seven micro-batches: short and empty ones too.
  std::vector<Windows> micro_batches(7);
  for (size_t i = 0; i < 9; ++i) {
    micro_batches[std::min<size_t>(i / 2, 5)].push_back(std::span(tokens).subspan(5 * i / 2, 6));
  }
  micro_batches[2].clear();
  const auto run = [&](collectives::Communicator* ranks, const Partition& partition) {
    const uint32_t pp = partition.layout().mesh.pp;
    std::vector<float> weights(partition.slot_count());
    for (const LocalParameter& local : partition.parameters()) {
      for (size_t i = 0; i < local.count(); ++i) {
        weights[local.slot + i] = ParameterTable::StartValue(3, *local.parameter, i);
      }
    }
    Model<float> model(config, partition, TensorGroup(nullptr),
                       UnderWayMax(partition.at().pp, pp, micro_batches.size()), 2);
    StepSums sums;
    sums.gradients.resize(weights.size());
    std::vector<size_t> order;
    const absl::Status status = Pipeline(model, ranks, micro_batches.size())
                                    .Run(weights, micro_batches, sums, [&](size_t micro_batch) {
                                      order.push_back(micro_batch);
                                      return absl::OkStatus();
                                    });
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(order, (std::vector<size_t>{0, 1, 2, 3, 4, 5, 6}));
    return sums;
  };
  JobLayout layout;
  layout.stage_layers = {3};
  const StepSums expected = run(nullptr, Partition(table, layout, 0));
  EXPECT_EQ(expected.overflow_count, 0);
  EXPECT_GT(expected.loss, 0);

  layout.stage_layers = {1, 0, 2};
  layout.mesh.pp = 3;
  std::vector<StepSums> found(3);
  RunRanks(3, [&](collectives::Context& context, uint32_t rank) {
    const auto ranks = context.CreateCommunicator("pp");
    ASSERT_TRUE(ranks.ok());
    found[rank] = run(ranks->get(), Partition(table, layout, rank));
  });
  // The stages' parameters, one behind the other, are the table.
  std::vector<int64_t> gradients;
  for (const StepSums& sums : found) {
    gradients.insert(gradients.end(), sums.gradients.begin(), sums.gradients.end());
  }
  EXPECT_EQ(gradients, expected.gradients);
  EXPECT_EQ(found[2].loss, expected.loss);
  EXPECT_EQ(found[0].loss + found[1].loss, 0);
}

// An error in the middle of a step must end the other stages, not let them wait.
TEST(Pipeline, AStageThatGivesUpEndsTheOthers) {
  ModelConfig config;
  const ParameterTable table(config);
  JobLayout layout;
  layout.stage_layers = {1, 1};
  layout.mesh.pp = 2;
  const std::vector<uint8_t> tokens(33, 4);
  const std::vector<Windows> micro_batches(3, {tokens});
  RunRanks(2, [&](collectives::Context& context, uint32_t rank) {
    const Partition partition(table, layout, rank);
    Model<float> model(config, partition, TensorGroup(nullptr), 2, 1);
    auto ranks = context.CreateCommunicator("pp");
    ASSERT_TRUE(ranks.ok());
    StepSums sums;
    sums.gradients.resize(partition.slot_count());
    const absl::Status status =
        Pipeline(model, ranks->get(), micro_batches.size())
            .Run(std::vector<float>(partition.slot_count()), micro_batches, sums, [&](size_t) {
              return rank == 1 ? absl::AbortedError("no more") : absl::OkStatus();
            });
    EXPECT_EQ(status.code(),
              rank == 1 ? absl::StatusCode::kAborted : absl::StatusCode::kUnavailable)
        << status;
  });
}

}  // namespace
}  // namespace tiny_lm
