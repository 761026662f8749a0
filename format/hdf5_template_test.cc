// What image_test cannot reach: limits, refusals of libhdf5, and files without payload.
#include "format/hdf5_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// A plan of `count` datasets of `extent` bytes each, in one group.
Hdf5Plan Plan(size_t count, uint64_t extent) {
  Hdf5Plan plan;
  plan.groups = {{"/", {{"answer", uint64_t{42}}}, 0}, {"/group", {}, 16 * count}};
  plan.dataset_count = count;
  plan.dataset = [extent](size_t i) {
    Hdf5Dataset dataset;
    dataset.group = 1;
    dataset.name = absl::StrCat("d", i);
    dataset.shape = {extent};
    return dataset;
  };
  plan.head_bytes_max = 1 << 20;
  return plan;
}

absl::StatusOr<Hdf5Layout> Build(const Hdf5Plan& plan) {
  return BuildHdf5Layout(plan, testing::TempDir());
}

TEST(Hdf5TemplateTest, AFileWithoutDatasetsIsAllHead) {
  ASSERT_OK_AND_ASSIGN(const Hdf5Layout layout, Build(Plan(0, 0)));
  EXPECT_THAT(layout.dataset_offsets, IsEmpty());
  EXPECT_EQ(layout.end_bytes, layout.head.size());
  EXPECT_LT(layout.head.size(), 4096u);
}

TEST(Hdf5TemplateTest, EmptyDatasetsHaveNoPlace) {
  ASSERT_OK_AND_ASSIGN(const Hdf5Layout layout, Build(Plan(2, 0)));
  EXPECT_THAT(layout.dataset_offsets, ElementsAre(layout.head.size(), layout.head.size()));
}

TEST(Hdf5TemplateTest, PayloadBeginsWhereTheHeadEnds) {
  ASSERT_OK_AND_ASSIGN(const Hdf5Layout layout, Build(Plan(3, 65)));
  const uint64_t head = layout.head.size();
  EXPECT_THAT(layout.dataset_offsets, ElementsAre(head, head + 128, head + 256));
  EXPECT_EQ(layout.end_bytes, head + 256 + 65);
}

// Names that nobody announced outgrow the first guess of the metadata's size, between the payload
// (many datasets) or behind all of it (one): what does not fit in front is built again.
TEST(Hdf5TemplateTest, MetadataThatOutgrowTheGuessStillComeBeforeThePayload) {
  for (const size_t count : {1, 40}) {
    Hdf5Plan plan = Plan(count, 65);
    plan.groups[1].names_bytes_hint = 0;
    plan.dataset = [count](size_t i) {
      Hdf5Dataset dataset;
      dataset.group = 1;
      dataset.name = absl::StrCat(std::string(count == 1 ? 40'000 : 4000, 'n'), i);
      dataset.shape = {65};
      return dataset;
    };
    ASSERT_OK_AND_ASSIGN(const Hdf5Layout layout, Build(plan));
    EXPECT_GT(layout.head.size(), 40'000u);
    for (size_t i = 0; i < count; ++i) {
      EXPECT_EQ(layout.dataset_offsets[i], layout.head.size() + 128 * i);
    }
    EXPECT_EQ(layout.end_bytes, layout.dataset_offsets.back() + 65);
  }
}

TEST(Hdf5TemplateTest, AHeadAboveTheLimitIsRefusedWithBothNumbers) {
  Hdf5Plan plan = Plan(1000, 8);
  plan.head_bytes_max = 100'000;
  EXPECT_THAT(Build(plan).status(),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("1000 datasets"), HasSubstr("100000"))));
}

TEST(Hdf5TemplateTest, WhatHdf5RefusesComesBackWithItsText) {
  Hdf5Plan plan = Plan(2, 8);
  plan.dataset = [](size_t) {
    Hdf5Dataset dataset;
    dataset.name = "twice";
    dataset.shape = {1};
    return dataset;
  };
  EXPECT_THAT(Build(plan).status(),
              StatusIs(absl::StatusCode::kInternal,
                       AllOf(HasSubstr("create dataset twice"), HasSubstr("name already exists"))));
}

// A failed build leaves nothing open in libhdf5, on disk or in the next build's error text.
TEST(Hdf5TemplateTest, ABuildAfterAFailedOneIsLikeTheFirst) {
  const std::string scratch = absl::StrCat(testing::TempDir(), "/hdf5_template_test.", getpid());
  std::filesystem::create_directories(scratch);
  ASSERT_OK_AND_ASSIGN(const Hdf5Layout first, BuildHdf5Layout(Plan(5, 8), scratch));
  for (int i = 0; i < 3; ++i) {
    Hdf5Plan broken = Plan(5, 8);
    broken.groups.push_back({"/no/parent", {}, 0});
    EXPECT_THAT(BuildHdf5Layout(broken, scratch).status(),
                StatusIs(absl::StatusCode::kInternal, HasSubstr("group /no/parent")));
  }
  ASSERT_OK_AND_ASSIGN(const Hdf5Layout second, BuildHdf5Layout(Plan(5, 8), scratch));
  EXPECT_EQ(first.head, second.head);
  EXPECT_TRUE(std::filesystem::is_empty(scratch));
  std::filesystem::remove_all(scratch);
}

}  // namespace
}  // namespace holdfast
