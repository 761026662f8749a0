// Copies of what Python's own pickler writes, in every protocol, read by Python's unpickler: the
// same values, and one object where there was one.
#include "base/pickle_copy.h"

#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using absl::StatusCode;
using ::testing::HasSubstr;

// Makes `value`: everything that the copier has a rule for.
constexpr char kValue[] =
    "import pickle, sys, argparse, collections, decimal\n"
    "shared = [1, {'a': None}]\n"
    "value = argparse.Namespace(numbers=(0, -1, 2**40, -2**70, 2**3000, 0.5, float('inf')), "
    "text='h\\u00e9', raw=b'\\x00\\xff', none=b'', array=bytearray(b'ab\\xfe'), "
    "sets=({3}, frozenset([4])), both=[shared, shared], flags=(True, False, None, ()), "
    "ordered=collections.OrderedDict(x=shared, y=2), counts=collections.defaultdict(list, z=[1]), "
    "exact=decimal.Decimal('1.25'), queue=collections.deque([5, 6]), cls=dict)\n";

template <size_t N>
std::string Raw(const char (&bytes)[N]) {
  return {bytes, N - 1};
}

std::string Python(const std::string& code) {
  const std::string file = testing::TempDir() + "/pickle_copy_test.py";
  FILE* script = std::fopen(file.c_str(), "w");
  if (script == nullptr) return "no script";
  std::fputs(code.c_str(), script);
  std::fclose(script);
  FILE* pipe = ::popen(("/usr/bin/python3 " + file).c_str(), "r");
  if (pipe == nullptr) return "no pipe";
  std::string output;
  char buffer[4096];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) output += buffer;
  ::pclose(pipe);
  if (!output.empty()) output.pop_back();
  return output;
}

std::unique_ptr<PickleDocument> Parsed(const std::string& bytes) {
  PickleOptions options;
  options.classes = PickleOptions::Classes::kOpaque;
  auto document = PickleDocument::Parse(bytes, options);
  EXPECT_THAT(document, IsOk());
  return document.ok() ? *std::move(document) : nullptr;
}

absl::StatusOr<bool> Nothing(PickleValue) { return false; }

TEST(PickleCopy, PythonReadsFromACopyWhatItHasWritten) {
  for (int protocol = 1; protocol <= 5; ++protocol) {
    SCOPED_TRACE(protocol);
    const std::string written = Python(std::string(kValue) + "print(pickle.dumps(value, " +
                                       std::to_string(protocol) + ").hex())\n");
    const auto document = Parsed(absl::HexStringToBytes(written));
    ASSERT_NE(document, nullptr);
    PickleWriter out;
    PickleCopier copier(out, Nothing);
    ASSERT_THAT(copier.Copy(document->root()), IsOk());
    const std::string copy = std::move(out).Finish();
    EXPECT_EQ(Python(std::string(kValue) + "copy = pickle.loads(bytes.fromhex('" +
                     absl::BytesToHexString(copy) +
                     "'))\n"
                     "print(copy == value, list(vars(copy)) == list(vars(value)), "
                     "repr(copy) == repr(value), copy.both[0] is copy.both[1], "
                     "copy.ordered['x'] is copy.both[0])\n"),
              "True True True True True");
  }
}

TEST(PickleCopy, SomeValuesAreWrittenByTheCaller) {
  PickleWriter original;
  original.EmptyList();
  original.Mark();
  original.String("kept");
  original.Int(7);
  original.PersistentId();
  original.Appends();
  const auto document = Parsed(std::move(original).Finish());
  ASSERT_NE(document, nullptr);
  PickleWriter out;
  PickleCopier copier(out, [&](PickleValue value) -> absl::StatusOr<bool> {
    if (!value.Is(PickleValue::Type::kPersistent)) return false;
    out.Int(*value.persistent_id().Int64() + 1);
    return true;
  });
  ASSERT_THAT(copier.Copy(document->root()), IsOk());
  EXPECT_EQ(Python("import pickle\nprint(pickle.loads(bytes.fromhex('" +
                   absl::BytesToHexString(std::move(out).Finish()) + "')))\n"),
            "['kept', 8]");
}

TEST(PickleCopy, WhatCannotBeWrittenIsRefusedByName) {
  const auto refused = [](const std::string& bytes) {
    const auto document = Parsed(bytes);
    PickleWriter out;
    PickleCopier copier(out, Nothing);
    return copier.Copy(document->root());
  };
  PickleWriter persistent;
  persistent.Int(7);
  persistent.PersistentId();
  EXPECT_THAT(refused(std::move(persistent).Finish()), StatusIs(StatusCode::kUnimplemented));
  // l = []; l.append(l)
  EXPECT_THAT(refused(Raw("\x80\x02]q\x00h\x00\x61.")),
              StatusIs(StatusCode::kUnimplemented, HasSubstr("holds itself")));
  // Protocol 4: m.a.b, a class in a class.
  EXPECT_THAT(refused(Raw("\x80\x04\x8c\x01m\x8c\x03\x61.b\x93.")),
              StatusIs(StatusCode::kUnimplemented, HasSubstr("a class in a class")));
  PickleWriter deep;
  for (size_t i = 0; i <= kPickleCopyDepthMax; ++i) deep.EmptyList();
  for (size_t i = 0; i < kPickleCopyDepthMax; ++i) deep.Tuple(2);
  EXPECT_THAT(refused(std::move(deep).Finish()), StatusIs(StatusCode::kResourceExhausted));
}

}  // namespace
}  // namespace holdfast
