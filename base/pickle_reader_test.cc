// The reader against pickles written by hand, opcode by opcode: what must be read, and what must be
// refused. Dumps that torch wrote are read in monitor/witness/flight_record_test.cc, hostile bytes
// in tests/fuzz/.
#include "base/pickle_reader.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <size_t N>
std::string Raw(const char (&bytes)[N]) {
  return {bytes, N - 1};
}

std::unique_ptr<PickleDocument> MustParse(const std::string& body) {
  auto document = PickleDocument::Parse("\x80\x02" + body);
  EXPECT_TRUE(document.ok()) << document.status().ToString();
  return document.ok() ? std::move(*document) : nullptr;
}

absl::Status ErrorOf(const std::string& body, const PickleLimits& limits = {}) {
  return PickleDocument::Parse("\x80\x02" + body, limits).status();
}

TEST(PickleReader, ReadsEveryScalar) {
  EXPECT_EQ(MustParse("N.")->root().type(), PickleValue::Type::kNone);
  EXPECT_TRUE(*MustParse("\x88.")->root().Bool());
  EXPECT_FALSE(*MustParse("\x89.")->root().Bool());
  EXPECT_EQ(*MustParse("K\xff.")->root().Int64(), 255);
  EXPECT_EQ(*MustParse("M\x01\x02.")->root().Int64(), 0x201);
  EXPECT_EQ(*MustParse("J\xff\xff\xff\xff.")->root().Int64(), -1);
  EXPECT_EQ(*MustParse(Raw("\x8a\x00."))->root().Int64(), 0);
  EXPECT_EQ(*MustParse("\x8a\x01\x80.")->root().Int64(), -128);
  EXPECT_EQ(*MustParse(Raw("\x8a\x02\x80\x00."))->root().Int64(), 128);
  EXPECT_EQ(*MustParse(Raw("\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80."))->root().Int64(),
            INT64_MIN);
  EXPECT_EQ(*MustParse(Raw("G\xbf\xf8\x00\x00\x00\x00\x00\x00."))->root().Double(), -1.5);
  EXPECT_EQ(*MustParse("K\x05.")->root().Double(), 5.0);
  EXPECT_EQ(*MustParse(Raw("X\x03\x00\x00\x00h\xc3\xa9."))->root().String(), "h\u00e9");
  EXPECT_EQ(*MustParse(Raw("\x8c\x01y."))->root().String(), "y");
  EXPECT_EQ(MustParse("C\x02\xff\xfe.")->root().type(), PickleValue::Type::kBytes);
}

TEST(PickleReader, ReadsContainersAndSharedValues) {
  // [(1, 'a'), {'k': None, 'k': True}] with 'a' remembered and recalled as a key's value.
  const auto document =
      MustParse(Raw("](K\x01X\x01\x00\x00\x00"
                    "aq\x07t}(X\x01\x00\x00\x00kNX\x01\x00\x00\x00k\x88X\x01\x00\x00\x00xh\x07u\x86"
                    "a."));
  const PickleValue root = document->root();
  ASSERT_EQ(*root.ArraySize(), 1u);
  const PickleValue pair = root[0];
  EXPECT_EQ(*pair[0][0].Int64(), 1);
  EXPECT_EQ(*pair[0][1].String(), "a");
  EXPECT_THAT(*pair[1].Keys(), ElementsAre("k", "k", "x"));
  EXPECT_TRUE(*pair[1].Find("k").Bool());  // as a dict: the last one
  EXPECT_EQ(*pair[1].Find("x").String(), "a");
  EXPECT_FALSE(pair[1].Find("absent").present());
  // Protocol 4: a frame, and places that number themselves.
  const auto framed = PickleDocument::Parse(
      Raw("\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00]\x94(\x8c\x01z\x94h\x01\x65."));
  ASSERT_TRUE(framed.ok()) << framed.status().ToString();
  EXPECT_EQ(*(*framed)->root()[1].String(), "z");
}

TEST(PickleReader, WhatCouldRunCodeIsRefusedByName) {
  const std::pair<std::string, std::string> kOpcodes[] = {
      {"cos\nsystem\n", "GLOBAL"},
      {"\x93", "STACK_GLOBAL"},
      {"R", "REDUCE"},
      {"b", "BUILD"},
      {"ios\nsystem\n", "INST"},
      {"o", "OBJ"},
      {"\x81", "NEWOBJ"},
      {"\x92", "NEWOBJ_EX"},
      {"Pid\n", "PERSID"},
      {"Q", "BINPERSID"},
      {"\x82\x01", "EXT1"},
      {"\x83", "EXT2"},
      {"\x84", "EXT4"},
      {"\x97", "NEXT_BUFFER"},
  };
  for (const auto& [opcode, name] : kOpcodes) {
    const absl::Status status = ErrorOf("]" + opcode + ".");
    EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << name;
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
    EXPECT_THAT(std::string(status.message()), HasSubstr("byte 3"));
  }
}

// Every opcode that is not read must be refused, at once and with its number.
TEST(PickleReader, EveryOtherOpcodeIsRefused) {
  const std::string read =
      Raw("N\x88\x89JKM\x8aGX\x8c\x8d\x42"
          "C\x8e(])}ltd\x85\x86\x87"
          "aesuqr\x94hj\x95.");
  int refused = 0;
  for (int opcode = 0; opcode < 256; ++opcode) {
    if (read.find(static_cast<char>(opcode)) != std::string::npos) continue;
    const absl::Status status = ErrorOf(std::string(1, static_cast<char>(opcode)));
    EXPECT_FALSE(status.ok()) << opcode;
    ++refused;
  }
  EXPECT_EQ(refused, 256 - 35);
}

TEST(PickleReader, WhatDoesNotFitTogetherIsRefused) {
  EXPECT_THAT(ErrorOf("").ToString(), HasSubstr("truncated"));
  EXPECT_THAT(ErrorOf(".").ToString(), HasSubstr("expected a value"));
  EXPECT_THAT(ErrorOf("NN.").ToString(), HasSubstr("one value at the end, found 2"));
  EXPECT_THAT(ErrorOf("N.N").ToString(), HasSubstr("1 bytes more"));
  EXPECT_THAT(ErrorOf("(.").ToString(), HasSubstr("expected a value"));
  EXPECT_THAT(ErrorOf("Nt.").ToString(), HasSubstr("mark"));
  EXPECT_THAT(ErrorOf("N(a.").ToString(), HasSubstr("mark"));
  EXPECT_THAT(ErrorOf("}Na.").ToString(), HasSubstr("a list"));
  EXPECT_THAT(ErrorOf("](Nu.").ToString(), HasSubstr("a dict"));
  EXPECT_THAT(ErrorOf("}(Nu.").ToString(), HasSubstr("a dict"));
  EXPECT_THAT(ErrorOf("(Nd.").ToString(), HasSubstr("pairs"));
  EXPECT_THAT(ErrorOf("h\x01.").ToString(), HasSubstr("remembered as 1"));
  EXPECT_THAT(ErrorOf(Raw("X\xff\xff\xff\xff.")).ToString(), HasSubstr("truncated"));
  EXPECT_THAT(ErrorOf(Raw("\x8d\xff\xff\xff\xff\xff\xff\xff\xff.")).ToString(),
              HasSubstr("truncated"));
  EXPECT_THAT(ErrorOf(Raw("X\x01\x00\x00\x00\xff.")).ToString(), HasSubstr("UTF-8"));
  EXPECT_THAT(ErrorOf(Raw("\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01.")).ToString(),
              HasSubstr("8 bytes"));
  for (const std::string bytes : {"", "\x80", "\x80\x01N.", "\x80\x06N.", "(lp0\n.", "{}"}) {
    EXPECT_EQ(PickleDocument::Parse(bytes).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(PickleReader, LimitsHold) {
  EXPECT_TRUE(ErrorOf("]N\x85.", {.values_max = 3}).ok() == false);  // two values at the end
  EXPECT_TRUE(ErrorOf("(NNNt.", {.values_max = 4}).ok());
  EXPECT_THAT(ErrorOf("(NNNt.", {.values_max = 3}).ToString(), HasSubstr("at most 3 values"));
  EXPECT_TRUE(ErrorOf("((Ntt.", {.depth_max = 2}).ok());
  EXPECT_THAT(ErrorOf("((Ntt.", {.depth_max = 1}).ToString(), HasSubstr("in one another"));
  EXPECT_THAT(ErrorOf("N.", {.bytes_max = 3}).ToString(), HasSubstr("at most 3 bytes"));
}

TEST(PickleReader, AListThatHoldsItselfIsHarmless) {
  const auto document = MustParse("]q\x01h\x01\x61.");
  PickleValue value = document->root();
  for (int i = 0; i < 1000; ++i) value = value[0];
  EXPECT_EQ(*value.ArraySize(), 1u);
}

TEST(PickleReader, AccessorsSayWhatTheyExpected) {
  const auto document = MustParse("]N\x61.");
  EXPECT_THAT(document->root().String().status().ToString(),
              HasSubstr("expected a string, found a list or tuple"));
  EXPECT_THAT(document->root()[0].Uint64().status().ToString(), HasSubstr("found None"));
  EXPECT_THAT(PickleValue().Bool().status().ToString(), HasSubstr("found nothing"));
  EXPECT_FALSE(MustParse("J\xff\xff\xff\xff.")->root().Uint64().ok());
}

}  // namespace
}  // namespace holdfast
