#include "monitor/witness/xid.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace holdfast::monitor {
namespace {

using ::testing::HasSubstr;

// Lines as drivers of several versions wrote them.
TEST(XidTest, LinesOfTheKernelLogAreRead) {
  struct Case {
    const char* line;
    const char* address;
    int32_t code;
    int64_t process;
  };
  for (const Case& c : {
           Case{"NVRM: Xid (PCI:0000:10:1c): 63, pid=1234, name=python3, Row Remapper: New row",
                "0000:10:1c", 63, 1234},
           Case{"NVRM: Xid (PCI:0000:3B:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen "
                "off the bus.",
                "0000:3b:00", 79, -1},
           Case{"NVRM: Xid (0000:03:00): 14, Channel 00000001", "0000:03:00", 14, -1},
           Case{"NVRM: Xid (PCI:0001:00:00): 48, DBE (double bit error)", "0001:00:00", 48, -1},
           Case{"  prefix NVRM: Xid (PCI:0000:00:0a): 119, Timeout", "0000:00:0a", 119, -1},
           Case{"NVRM: Xid (PCI:0000:00:0a): 31", "0000:00:0a", 31, -1},
       }) {
    const auto xid = ParseXid(c.line);
    ASSERT_TRUE(xid.has_value()) << c.line;
    EXPECT_EQ(xid->pci_address, c.address);
    EXPECT_EQ(xid->code, c.code);
    EXPECT_EQ(xid->process, c.process);
  }
}

TEST(XidTest, OtherLinesAreNone) {
  for (const char* line :
       {"", "NVRM: loading NVIDIA UNIX x86_64 Kernel Module", "NVRM: Xid (PCI:0000:10:1c)",
        "NVRM: Xid (PCI:0000:10:1c): , pid=1", "NVRM: Xid (PCI:here): 79", "NVRM: Xid (:::): 79",
        "NVRM: Xid (PCI:0000:10:1c): 99999999999999999999", "NVRM: Xid (PCI:0000:10:1c): -5"}) {
    EXPECT_FALSE(ParseXid(line).has_value()) << line;
  }
}

TEST(XidTest, AddressesOfAllSourcesAreTheSame) {
  EXPECT_EQ(NormalPciAddress("00000000:3B:00.0"), "0000:3b:00");
  EXPECT_EQ(NormalPciAddress("0000:3b:00.0"), "0000:3b:00");
  EXPECT_EQ(NormalPciAddress("0000:3b:00"), "0000:3b:00");
  EXPECT_EQ(NormalPciAddress("00010000:01:1F.7"), "10000:01:1f");
  for (const char* none : {"", "3b:00", "0000:3b", "x:3b:00", "0000:3bb:00", "000000000:3b:00"}) {
    EXPECT_EQ(NormalPciAddress(none), "") << none;
  }
}

TEST(XidTest, TheCatalogueIsInOrderAndItsBucketsAreUsed) {
  int32_t before = 0;
  std::vector<int> actions(4);
  for (const XidMeaning& meaning : XidCatalogue()) {
    EXPECT_GT(meaning.code, before);
    before = meaning.code;
    EXPECT_FALSE(meaning.text.empty());
    EXPECT_EQ(MeaningOfXid(meaning.code), &meaning);
    ++actions[static_cast<size_t>(meaning.action)];
  }
  for (const int count : actions) EXPECT_GT(count, 3);
  EXPECT_EQ(MeaningOfXid(1), nullptr);
  EXPECT_EQ(MeaningOfXid(100'000), nullptr);
}

TEST(XidTest, WhatACodeMeansDecidesHowMuchItCounts) {
  const std::vector<Rank> ranks = {Rank{9}, Rank{8}};
  const auto of = [&](int32_t code) {
    return TestifyXid({.pci_address = "0000:3b:00", .code = code, .process = -1, .detail = ""},
                      ranks, absl::Seconds(2));
  };
  EXPECT_FALSE(of(43).has_value());    // the program's own
  EXPECT_FALSE(of(154).has_value());   // another code says what is to be done
  EXPECT_FALSE(of(7777).has_value());  // not known
  ASSERT_TRUE(of(79).has_value());
  EXPECT_GE(of(79)->certainty, 0.9);
  EXPECT_GE(of(48)->certainty, 0.9);
  EXPECT_LT(of(119)->certainty, 0.9);
  EXPECT_LT(of(13)->certainty, of(119)->certainty);
  EXPECT_EQ(of(79)->ranks, (std::vector<Rank>{Rank{8}, Rank{9}}));
  EXPECT_EQ(of(79)->age, absl::Seconds(2));
  EXPECT_THAT(of(79)->sentence, HasSubstr("Xid 79 (the GPU has fallen off the bus)"));
  const auto unknown =
      TestifyXid({.pci_address = "0000:3b:00", .code = 79, .process = -1, .detail = ""}, {}, {});
  EXPECT_THAT(unknown->sentence, HasSubstr("not known"));
}

}  // namespace
}  // namespace holdfast::monitor
