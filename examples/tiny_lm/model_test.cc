// Goal: the gradient that is written by hand is that of the loss.
// Method: central differences in double, for every parameter of a small model.
#include "examples/tiny_lm/model.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "examples/tiny_lm/exact.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

TEST(Model, TheGradientIsThatOfTheLossForEveryParameter) {
  ModelConfig config;
  config.context = 6;
  config.width = 16;
  config.heads = 2;
  config.hidden = 24;
  const ParameterTable table(config);
  std::vector<double> parameters(table.element_count());
  for (const Parameter& parameter : table.parameters()) {
    for (size_t i = parameter.offset; i < parameter.offset + parameter.count; ++i) {
      // Larger than at the start of a training, so that nothing is nearly linear.
      parameters[i] = 4 * double{ParameterTable::StartValue(5, {"", {}, 0, 0, 0, 0.08F}, i)};
      parameters[i] += double{parameter.start};
    }
  }
  const std::vector<uint8_t> window = {3, 96, 0, 40, 3, 3, 71};
  Model<double> model(config);
  int64_t overflows = 0;
  std::vector<double> gradient(parameters.size(), 0);
  const double loss = model.LossAndGradient(parameters, window, gradient, overflows);
  EXPECT_GT(loss, 3);

  constexpr double kDelta = 1e-4;
  std::vector<double> unused(parameters.size());
  double greatest = 0;
  for (const Parameter& parameter : table.parameters()) {
    for (size_t i = parameter.offset; i < parameter.offset + parameter.count; ++i) {
      const double value = parameters[i];
      parameters[i] = value + kDelta;
      const double above = model.LossAndGradient(parameters, window, unused, overflows);
      parameters[i] = value - kDelta;
      const double below = model.LossAndGradient(parameters, window, unused, overflows);
      parameters[i] = value;
      const double expected = (above - below) / (2 * kDelta);
      ASSERT_NEAR(gradient[i], expected, 1e-6 + 1e-5 * std::fabs(expected))
          << parameter.name << " element " << i - parameter.offset;
      greatest = std::max(greatest, std::fabs(expected));
    }
  }
  EXPECT_GT(greatest, 0.01) << "the loss depends on nothing";
  EXPECT_EQ(overflows, 0);
}

TEST(Model, AValueThatIsNotANumberIsCountedAndNotHidden) {
  const ModelConfig config;
  const ParameterTable table(config);
  std::vector<float> parameters(table.element_count(), 0.01F);
  parameters[table.Offset("layers.0.mlp.up.weight")] = NAN;
  std::vector<float> gradient(parameters.size());
  int64_t overflows = 0;
  Model<float>(config).LossAndGradient(parameters, std::vector<uint8_t>(33, 1), gradient,
                                       overflows);
  EXPECT_GT(overflows, 0);
}

TEST(Exact, FixedPointSumsDoNotDependOnGrouping) {
  std::vector<double> values;
  for (size_t i = 0; i < 1000; ++i) {
    values.push_back(double{ParameterTable::StartValue(1, {"", {}, 0, 0, 0, 1.0F}, i)} *
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
