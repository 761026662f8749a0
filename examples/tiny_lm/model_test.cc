// Goal: the gradient that is written by hand is that of the loss; and a model that is cut over
// tensor ranks or stages gives the bits of the whole one.
// Method: central differences in double, for every parameter of a small model; and the whole model
// on one rank as the oracle of every cut.
#include "examples/tiny_lm/model.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "examples/tiny_lm/exact.h"
#include "examples/tiny_lm/test_ranks.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

ModelConfig SmallModel(bool tied) {
  ModelConfig config;
  config.context = 6;
  config.width = 32;
  config.heads = 4;
  config.layers = 3;
  config.hidden = 40;
  config.tied = tied;
  return config;
}

JobLayout Cut(uint32_t pp, uint32_t tp, std::vector<uint32_t> stage_layers) {
  JobLayout layout;
  layout.mesh = {pp, 1, tp};
  layout.stage_layers = std::move(stage_layers);
  return layout;
}

// Of the whole model, in the table's order. Larger than at the start of a training, so that nothing
// is nearly linear.
template <typename Real>
std::vector<Real> Weights(const ParameterTable& table) {
  std::vector<Real> weights;
  for (const Parameter& parameter : table.parameters()) {
    Parameter random = parameter;
    random.start = 0;
    random.deviation = 0.08F;
    for (size_t i = 0; i < parameter.count; ++i) {
      weights.push_back(4 * Real{ParameterTable::StartValue(5, random, i)} + Real{parameter.start});
    }
  }
  return weights;
}

const std::vector<uint8_t> kTokens = {3, 96, 0, 40, 3, 3, 71, 70, 3, 8, 41, 95, 40};
const Windows kWindows = {std::span(kTokens).first(7), std::span(kTokens).last(7)};

// `whole` as a rank has it.
template <typename Real>
std::vector<Real> SlotsOf(const Partition& partition, const std::vector<Real>& whole) {
  std::vector<Real> slots(partition.slot_count());
  for (const LocalParameter& local : partition.parameters()) {
    for (size_t i = 0; i < local.count(); ++i) {
      slots[local.slot + i] = whole[local.parameter->offset + local.index().Of(i)];
    }
  }
  return slots;
}

// The sums of the whole model on one rank.
template <typename Real>
StepSums WholeModel(const ModelConfig& config, const std::vector<Real>& weights,
                    const Windows& windows) {
  const ParameterTable table(config);
  const Partition partition(table, Cut(1, 1, {static_cast<uint32_t>(config.layers)}), 0);
  EXPECT_EQ(partition.slot_count(), table.element_count());
  Model<Real> model(config, partition, TensorGroup(nullptr), 1, windows.size());
  StepSums sums;
  sums.gradients.resize(partition.slot_count());
  EXPECT_TRUE(model.Forward(0, weights, windows).ok());
  EXPECT_TRUE(model.Backward(0, weights, windows, sums).ok());
  return sums;
}

// Adds up what the ranks have; where several have an element, they must agree unless `tied`: then
// the parts of first and last stage are added.
void Collect(const Partition& partition, const StepSums& sums, StepSums& whole,
             std::vector<bool>& seen) {
  for (const LocalParameter& local : partition.parameters()) {
    const bool adds = local.parameter->home.first_stage && local.parameter->home.last_stage;
    for (size_t i = 0; i < local.slot_count; ++i) {
      const int64_t found = sums.gradients[local.slot + i];
      if (i >= local.count()) {
        EXPECT_EQ(found, 0) << local.parameter->name << ": the padding has a gradient";
        continue;
      }
      const size_t element = local.parameter->offset + local.index().Of(i);
      int64_t& expected = whole.gradients[element];
      if (seen[element] && !adds) {
        ASSERT_EQ(found, expected)
            << local.parameter->name << " element " << i << " on rank " << partition.rank();
      } else {
        expected += found;
      }
      seen[element] = true;
    }
  }
  whole.loss += sums.loss;
  whole.overflow_count += sums.overflow_count;
}

class ModelTest : public testing::TestWithParam<bool> {};  // tied?
INSTANTIATE_TEST_SUITE_P(Tied, ModelTest, testing::Bool());

TEST_P(ModelTest, TheGradientIsThatOfTheLossForEveryParameter) {
  ModelConfig config = SmallModel(GetParam());
  config.width = 16;
  config.heads = 2;
  config.layers = 2;
  config.hidden = 24;
  const ParameterTable table(config);
  std::vector<double> weights = Weights<double>(table);
  const Windows window = {kWindows[0]};
  const Partition partition(table, Cut(1, 1, {2}), 0);
  Model<double> model(config, partition, TensorGroup(nullptr), 1, 1);
  StepSums unused;
  unused.gradients.resize(weights.size());
  const auto loss = [&] {
    unused.loss = 0;
    EXPECT_TRUE(model.Forward(0, weights, window).ok());
    EXPECT_TRUE(model.Backward(0, weights, window, unused).ok());
    return FromFixedPoint(unused.loss);
  };
  const StepSums sums = WholeModel(config, weights, window);
  EXPECT_GT(FromFixedPoint(sums.loss), 3);

  constexpr double kDelta = 1e-4;
  double greatest = 0;
  for (const Parameter& parameter : table.parameters()) {
    for (size_t i = parameter.offset; i < parameter.offset + parameter.count; ++i) {
      const double value = weights[i];
      weights[i] = value + kDelta;
      const double above = loss();
      weights[i] = value - kDelta;
      const double below = loss();
      weights[i] = value;
      const double expected = (above - below) / (2 * kDelta);
      ASSERT_NEAR(FromFixedPoint(sums.gradients[i]), expected, 1e-6 + 1e-5 * std::fabs(expected))
          << parameter.name << " element " << i - parameter.offset;
      greatest = std::max(greatest, std::fabs(expected));
    }
  }
  EXPECT_GT(greatest, 0.01) << "the loss depends on nothing";
  EXPECT_EQ(sums.overflow_count + unused.overflow_count, 0);
}

TEST_P(ModelTest, SamplesInOneMicroBatchGiveTheBitsOfOneAtATime) {
  const ModelConfig config = SmallModel(GetParam());
  const std::vector<float> weights = Weights<float>(ParameterTable(config));
  const StepSums together = WholeModel(config, weights, kWindows);
  const StepSums first = WholeModel(config, weights, {kWindows[0]});
  const StepSums second = WholeModel(config, weights, {kWindows[1]});
  EXPECT_EQ(together.loss, first.loss + second.loss);
  for (size_t i = 0; i < weights.size(); ++i) {
    ASSERT_EQ(together.gradients[i], first.gradients[i] + second.gradients[i]) << i;
  }
}

// Over 3 and 5 ranks heads, hidden units and vocabulary are uneven, and some ranks have no head.
TEST_P(ModelTest, ACutOverTensorRanksGivesTheBitsOfTheWholeModel) {
  const ModelConfig config = SmallModel(GetParam());
  const ParameterTable table(config);
  const std::vector<float> weights = Weights<float>(table);
  const StepSums expected = WholeModel(config, weights, kWindows);
  EXPECT_EQ(expected.overflow_count, 0);
  for (const uint32_t tp : {2, 3, 4, 5}) {
    SCOPED_TRACE(absl::StrCat("tp ", tp));
    std::vector<StepSums> sums(tp);
    RunRanks(tp, [&](collectives::Context& context, uint32_t rank) {
      const Partition partition(table, Cut(1, tp, {3}), rank);
      const auto ranks = context.CreateCommunicator("tp");
      ASSERT_TRUE(ranks.ok()) << ranks.status();
      Model<float> model(config, partition, TensorGroup(ranks->get()), 1, kWindows.size());
      const std::vector<float> slots = SlotsOf(partition, weights);
      sums[rank].gradients.resize(slots.size());
      ASSERT_TRUE(model.Forward(0, slots, kWindows).ok());
      ASSERT_TRUE(model.Backward(0, slots, kWindows, sums[rank]).ok());
    });
    StepSums whole;
    whole.gradients.resize(weights.size());
    std::vector<bool> seen(weights.size());
    for (uint32_t rank = 0; rank < tp; ++rank) {
      Collect(Partition(table, Cut(1, tp, {3}), rank), sums[rank], whole, seen);
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), false), 0);
    EXPECT_EQ(whole.gradients, expected.gradients);
    EXPECT_EQ(whole.loss, expected.loss);
    EXPECT_EQ(whole.overflow_count, 0);
  }
}

TEST_P(ModelTest, ACutIntoStagesGivesTheBitsOfTheWholeModel) {
  const ModelConfig config = SmallModel(GetParam());
  const ParameterTable table(config);
  const std::vector<float> weights = Weights<float>(table);
  const StepSums expected = WholeModel(config, weights, kWindows);
  const std::vector<std::vector<uint32_t>> cuts = {{1, 2},    {3, 0},    {0, 3},         {1, 1, 1},
                                                   {0, 2, 1}, {2, 0, 1}, {1, 0, 1, 1, 0}};
  for (const std::vector<uint32_t>& cut : cuts) {
    const uint32_t pp = static_cast<uint32_t>(cut.size());
    std::vector<std::unique_ptr<Partition>> partitions;
    std::vector<std::unique_ptr<Model<float>>> stages;
    for (uint32_t stage = 0; stage < pp; ++stage) {
      partitions.push_back(std::make_unique<Partition>(table, Cut(pp, 1, cut), stage));
      stages.push_back(
          std::make_unique<Model<float>>(config, *partitions[stage], TensorGroup(nullptr), 1, 2));
    }
    for (uint32_t stage = 0; stage < pp; ++stage) {
      if (stage > 0) {
        const std::span<float> from = stages[stage - 1]->stream(0, 2);
        std::copy(from.begin(), from.end(), stages[stage]->stream(0, 2).begin());
      }
      const std::vector<float> slots = SlotsOf(*partitions[stage], weights);
      ASSERT_TRUE(stages[stage]->Forward(0, slots, kWindows).ok());
    }
    StepSums whole;
    whole.gradients.resize(weights.size());
    std::vector<bool> seen(weights.size());
    for (uint32_t stage = pp; stage-- > 0;) {
      if (stage + 1 < pp) {
        const std::span<float> from = stages[stage + 1]->d_stream(0, 2);
        std::copy(from.begin(), from.end(), stages[stage]->d_stream(0, 2).begin());
      }
      StepSums sums;
      sums.gradients.resize(partitions[stage]->slot_count());
      const std::vector<float> slots = SlotsOf(*partitions[stage], weights);
      ASSERT_TRUE(stages[stage]->Backward(0, slots, kWindows, sums).ok());
      Collect(*partitions[stage], sums, whole, seen);
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), false), 0);
    EXPECT_EQ(whole.gradients, expected.gradients);
    EXPECT_EQ(whole.loss, expected.loss);
  }
}

TEST(Model, AValueThatIsNotANumberIsCountedAndNotHidden) {
  const ModelConfig config;
  const ParameterTable table(config);
  std::vector<float> weights(table.element_count(), 0.01F);
  weights[weights.size() / 2] = NAN;
  const std::vector<uint8_t> tokens(33, 1);
  EXPECT_GT(WholeModel(config, weights, {tokens}).overflow_count, 0);
}

TEST(Exact, FixedPointSumsDoNotDependOnGrouping) {
  std::vector<double> values;
  Parameter parameter;
  parameter.deviation = 1;
  for (size_t i = 0; i < 1000; ++i) {
    values.push_back(double{ParameterTable::StartValue(1, parameter, i)} *
                     std::pow(10.0, static_cast<double>(i % 13) - 7));
  }
  int64_t overflows = 0;
  int64_t forward = 0;
  for (const double value : values) forward += ToFixedPoint(value, overflows);
  int64_t parts[3] = {};
  for (size_t i = values.size(); i-- > 0;) parts[i % 3] += ToFixedPoint(values[i], overflows);
  EXPECT_EQ(parts[2] + (parts[0] + parts[1]), forward);
  EXPECT_EQ(overflows, 0);
  EXPECT_EQ(ToFixedPoint(kFixedPointMax, overflows), 0);
  EXPECT_EQ(ToFixedPoint(NAN, overflows), 0);
  EXPECT_EQ(overflows, 2);
}

TEST(Exact, BitsSurviveASumOfWhichAllButOneGiveNothing) {
  for (const float value : {0.0F, -0.0F, 1.5F, -1e-38F, 3e38F, -INFINITY}) {
    EXPECT_EQ(std::bit_cast<uint32_t>(FromBits<float>(0 + ToBits(value) + 0)),
              std::bit_cast<uint32_t>(value));
    EXPECT_EQ(std::bit_cast<uint64_t>(FromBits<double>(0 + ToBits(double{value}) + 0)),
              std::bit_cast<uint64_t>(double{value}));
  }
}

TEST(Exact, Bfloat16RoundsToTheNearestEvenAndEveryValueSurvives) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t value = static_cast<uint16_t>(bits);
    if (std::isnan(FromBfloat16(value))) continue;
    ASSERT_EQ(ToBfloat16(FromBfloat16(value)), value);
  }
  EXPECT_EQ(ToBfloat16(1.0F + 0x1p-8F), ToBfloat16(1.0F));              // halfway, to even
  EXPECT_EQ(FromBfloat16(ToBfloat16(1.0F + 0x3p-8F)), 1.0F + 0x1p-6F);  // halfway, to even
  EXPECT_EQ(FromBfloat16(ToBfloat16(1.0F + 0x1.1p-8F)), 1.0F + 0x1p-7F);
}

}  // namespace
}  // namespace tiny_lm
