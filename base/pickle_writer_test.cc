// The writer against the bytes that Python's own pickler writes for the same values, and against
// Python's unpickler.
#include "base/pickle_writer.h"

#include <cstdio>
#include <limits>
#include <string>
#include <utility>

#include "gtest/gtest.h"

namespace holdfast {
namespace {

template <size_t N>
std::string Raw(const char (&bytes)[N]) {
  return {bytes, N - 1};
}

std::string Hex(const std::string& bytes) {
  std::string hex;
  for (const char c : bytes) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", static_cast<unsigned char>(c));
    hex += two;
  }
  return hex;
}

std::string WriteInt(int64_t value) {
  PickleWriter writer;
  writer.Int(value);
  return std::move(writer).Finish();
}

// What Python evaluates `pickle` to, by its own unpickler, as repr().
std::string PythonReads(const std::string& pickle) {
  const std::string command =
      "/usr/bin/python3 -c \"import pickle; print(repr(pickle.loads(bytes.fromhex('" + Hex(pickle) +
      "'))))\"";
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) return "no pipe";
  std::string output;
  char buffer[256];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) output += buffer;
  ::pclose(pipe);
  if (!output.empty()) output.pop_back();
  return output;
}

TEST(PickleWriter, IntegersTakeTheFormThatPythonGivesThem) {
  // pickle.dumps(value, 2)
  const std::pair<int64_t, std::string> kValues[] = {
      {0, Raw("\x80\x02K\x00.")},
      {255, Raw("\x80\x02K\xff.")},
      {256, Raw("\x80\x02M\x00\x01.")},
      {65535, Raw("\x80\x02M\xff\xff.")},
      {65536, Raw("\x80\x02J\x00\x00\x01\x00.")},
      {-1, Raw("\x80\x02J\xff\xff\xff\xff.")},
      {INT32_MIN, Raw("\x80\x02J\x00\x00\x00\x80.")},
      {int64_t{1} << 31, Raw("\x80\x02\x8a\x05\x00\x00\x00\x80\x00.")},
      {-(int64_t{1} << 31) - 1, Raw("\x80\x02\x8a\x05\xff\xff\xff\x7f\xff.")},
      {int64_t{1} << 40, Raw("\x80\x02\x8a\x06\x00\x00\x00\x00\x00\x01.")},
      {-(int64_t{1} << 39), Raw("\x80\x02\x8a\x05\x00\x00\x00\x00\x80.")},
      {INT64_MAX, Raw("\x80\x02\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f.")},
      {INT64_MIN, Raw("\x80\x02\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80.")},
  };
  for (const auto& [value, expected] : kValues) {
    EXPECT_EQ(Hex(WriteInt(value)), Hex(expected)) << value;
  }
}

TEST(PickleWriter, PythonReadsEveryKindOfValue) {
  PickleWriter writer;
  writer.Global("collections", "OrderedDict");
  writer.Tuple(0);
  writer.Reduce();
  writer.Mark();
  writer.String("scalars");
  writer.EmptyList();
  writer.Mark();
  writer.None();
  writer.Bool(true);
  writer.Bool(false);
  writer.Float(-1.5);
  writer.Float(std::numeric_limits<double>::infinity());
  writer.Int(-(int64_t{1} << 40));
  writer.String("h\u00e9");
  writer.Bytes(Raw("\x00\x7f\x80\xff"));
  writer.Bytes("");
  writer.Appends();
  writer.String("tuples");
  writer.Mark();
  writer.Tuple(0);
  writer.Int(1);
  writer.Tuple(1);
  writer.Int(2);
  writer.Int(3);
  writer.Tuple(2);
  writer.EmptyDict();
  writer.Mark();
  writer.Int(7);
  writer.String("tuples");
  writer.SetItems();
  writer.Tuple();
  writer.String("state");
  writer.Global("argparse", "Namespace");
  writer.Tuple(0);
  writer.NewObject();
  writer.EmptyDict();
  writer.Mark();
  writer.String("lr");
  writer.Float(0.5);
  writer.SetItems();
  writer.Build();
  writer.SetItems();
  EXPECT_EQ(PythonReads(std::move(writer).Finish()),
            "OrderedDict([('scalars', [None, True, False, -1.5, inf, -1099511627776, 'h\u00e9', "
            "b'\\x00\\x7f\\x80\\xff', b'']), ('tuples', ((), (1,), (2, 3), {7: 'tuples'})), "
            "('state', Namespace(lr=0.5))])");
}

TEST(PickleWriter, WhatIsWrittenTwiceIsRecalled) {
  PickleWriter writer;
  writer.Mark();
  for (int i = 0; i < 300; ++i) writer.String(std::to_string(i % 290));
  const size_t before = writer.size();
  writer.String("289");  // beyond 255 memo numbers: LONG_BINGET
  EXPECT_EQ(writer.size(), before + 5);
  writer.String("12");
  EXPECT_EQ(writer.size(), before + 7);
  writer.Tuple();
  const std::string read = PythonReads(std::move(writer).Finish());
  EXPECT_TRUE(
      read.ends_with("'288', '289', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', "
                     "'289', '12')"))
      << read;
}

TEST(PickleWriter, ARememberedObjectIsTheSameObject) {
  PickleWriter writer;
  writer.EmptyList();
  const uint32_t list = writer.Remember();
  writer.Recall(list);
  writer.Mark();
  writer.Int(5);
  writer.Appends();
  writer.Tuple(2);
  EXPECT_EQ(PythonReads(std::move(writer).Finish()), "([5], [5])");
}

TEST(PickleWriterDeathTest, TakesNothingThatIsNotThere) {
  EXPECT_DEATH(PickleWriter().Reduce(), "depth_");
  EXPECT_DEATH(PickleWriter().Tuple(), "marks_");
  EXPECT_DEATH(PickleWriter().Global("os\nsystem", "x"), "find");
  EXPECT_DEATH(
      {
        PickleWriter writer;
        writer.Mark();
        writer.Int(1);
        std::move(writer).Finish();
      },
      "marks_");
}

}  // namespace
}  // namespace holdfast
