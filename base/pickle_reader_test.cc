// The reader against pickles written by hand, opcode by opcode: what must be read, and what must be
// refused. Dumps that torch wrote are read in monitor/witness/flight_record_test.cc, hostile bytes
// in tests/fuzz/.
#include "base/pickle_reader.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
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

constexpr PickleOptions kOpaque = {.classes = PickleOptions::Classes::kOpaque};

std::unique_ptr<PickleDocument> MustParseOpaque(const std::string& body) {
  auto document = PickleDocument::Parse("\x80\x02" + body, kOpaque);
  EXPECT_TRUE(document.ok()) << document.status().ToString();
  return document.ok() ? std::move(*document) : nullptr;
}

std::unique_ptr<PickleDocument> MustParse(const std::string& body) {
  auto document = PickleDocument::Parse("\x80\x02" + body);
  EXPECT_TRUE(document.ok()) << document.status().ToString();
  return document.ok() ? std::move(*document) : nullptr;
}

absl::Status ErrorOf(const std::string& body, const PickleOptions& options = {}) {
  return PickleDocument::Parse("\x80\x02" + body, options).status();
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
  EXPECT_THAT(*pair[1].Keys(), ElementsAre("k", "x"));
  EXPECT_TRUE(*pair[1].Find("k").Bool());  // as in Python: the last one
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
      {"\x98", "READONLY_BUFFER"},
  };
  for (const auto& [opcode, name] : kOpcodes) {
    const absl::Status status = ErrorOf("]" + opcode + ".");
    EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << name;
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
    EXPECT_THAT(std::string(status.message()), HasSubstr("byte 3"));
  }
}

// Every opcode that is not read must be refused, at once and with its number or name.
TEST(PickleReader, EveryOtherOpcodeIsRefused) {
  const std::string plain =
      Raw("N\x88\x89JKM\x8a\x8bILFGX\x8c\x8dTU\x42"
          "C\x8e\x96(012])}\x8fltd\x91\x85\x86\x87"
          "aesu\x90qr\x94hjpg\x95.");
  const std::string classes = Raw("c\x93R\x81\x92\x62Q");
  for (const bool opaque : {false, true}) {
    int refused = 0;
    for (int opcode = 0; opcode < 256; ++opcode) {
      const char letter = static_cast<char>(opcode);
      if (plain.find(letter) != std::string::npos) continue;
      if (opaque && classes.find(letter) != std::string::npos) continue;
      const absl::Status status =
          ErrorOf(std::string(1, letter) + "N.", opaque ? kOpaque : PickleOptions());
      const bool is_named = status.code() == absl::StatusCode::kPermissionDenied ||
                            status.message().find("opcode") != std::string::npos ||
                            status.message().find("protocol 0") != std::string::npos;
      EXPECT_TRUE(!status.ok() && is_named) << opcode << status.ToString();
      ++refused;
    }
    EXPECT_EQ(refused, opaque ? 256 - 57 : 256 - 50);
  }
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
  EXPECT_THAT(ErrorOf("}(Nu.").ToString(), HasSubstr("pairs"));
  EXPECT_THAT(ErrorOf("(Nd.").ToString(), HasSubstr("pairs"));
  EXPECT_THAT(ErrorOf("h\x01.").ToString(), HasSubstr("remembered as 1"));
  EXPECT_THAT(ErrorOf(Raw("X\xff\xff\xff\xff.")).ToString(), HasSubstr("truncated"));
  EXPECT_THAT(ErrorOf(Raw("\x8d\xff\xff\xff\xff\xff\xff\xff\xff.")).ToString(),
              HasSubstr("truncated"));
  EXPECT_THAT(ErrorOf(Raw("X\x01\x00\x00\x00\xff.")).ToString(), HasSubstr("UTF-8"));
  EXPECT_THAT(ErrorOf(Raw("\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01.")).ToString(),
              HasSubstr("8 bytes"));
  for (const std::string bytes : {"", "\x80", "\x80\x06N.", "(lp0\n.", "{}", "S'a'\n."}) {
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
              HasSubstr("expected a string, found a list"));
  EXPECT_THAT(document->root()[0].Uint64().status().ToString(), HasSubstr("found None"));
  EXPECT_THAT(PickleValue().Bool().status().ToString(), HasSubstr("found nothing"));
  EXPECT_FALSE(MustParse("J\xff\xff\xff\xff.")->root().Uint64().ok());
}

TEST(PickleReader, Protocol1HasNoHeaderAndDecimalNumbers) {
  const auto parsed = PickleDocument::Parse("}(I01\nI-7\nL12345678901L\nI00\nU\x01kF2.5\nu.");
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  const PickleValue root = (*parsed)->root();
  ASSERT_EQ(*root.EntryCount(), 3u);
  EXPECT_TRUE(*root.Key(0).Bool());
  EXPECT_EQ(*root.Entry(0).Int64(), -7);
  EXPECT_EQ(*root.Key(1).Int64(), 12345678901);
  EXPECT_FALSE(*root.Entry(1).Bool());
  EXPECT_EQ(*root.Find("k").Double(), 2.5);
}

TEST(PickleReader, BigIntegersAreKeptAsBytes) {
  const auto value = [](const std::string& body) {
    const auto document = MustParseOpaque(body);
    return std::string(*document->root().BigInteger());
  };
  EXPECT_EQ(value(Raw("\x8a\x0b\x00\x00\x00\x00\x00\x00\x00\x00\x40\x00\x00.")),
            Raw("\x00\x00\x00\x00\x00\x00\x00\x00\x40"));
  EXPECT_EQ(value("L1180591620717411303424L\n."), Raw("\x00\x00\x00\x00\x00\x00\x00\x00\x40"));
  EXPECT_EQ(value("L-1180591620717411303424L\n."), Raw("\x00\x00\x00\x00\x00\x00\x00\x00\xc0"));
  EXPECT_EQ(value("I9223372036854775808\n."), Raw("\x00\x00\x00\x00\x00\x00\x00\x80\x00"));
  EXPECT_EQ(*MustParseOpaque("I-9223372036854775808\n.")->root().Int64(), INT64_MIN);
  // As many digits as Python itself reads, and no more: the conversion is quadratic.
  EXPECT_TRUE(ErrorOf("L" + std::string(4300, '9') + "L\n.", kOpaque).ok());
  EXPECT_THAT(ErrorOf("L" + std::string(4301, '9') + "L\n.", kOpaque).ToString(),
              HasSubstr("4300 digits"));
}

TEST(PickleReader, ClassesAndCallsAreInertNodes) {
  // {'a': os.system('x'), 'b': an instance with state, items and entries, 'c': a persistent id}
  const auto document =
      MustParseOpaque(Raw("}(U\x01\x61"
                          "cos\nsystem\nU\x01x\x85RU\x01\x62"
                          "cm\nC\n(K\x01t\x81}U\x01zK\x09s\x62K\x05\x61(K\x06K\x07\x65K\x01Ns"
                          "U\x01\x63(U\x07storageK\x02tQu."));
  const PickleValue root = document->root();
  const PickleValue called = root.Find("a");
  EXPECT_TRUE(called.IsCallOf("os", "system"));
  EXPECT_EQ(called.making(), PickleValue::Making::kReduce);
  EXPECT_EQ(*called.args()[0].String(), "x");
  EXPECT_FALSE(called.state().present());
  const PickleValue made = root.Find("b");
  EXPECT_TRUE(made.IsCallOf("m", "C"));
  EXPECT_EQ(made.making(), PickleValue::Making::kNew);
  EXPECT_EQ(*made.args()[0].Int64(), 1);
  EXPECT_EQ(*made.state().Find("z").Int64(), 9);
  EXPECT_EQ(made.state_count(), 1u);
  EXPECT_EQ(*made.items().ArraySize(), 3u);
  EXPECT_EQ(*made.items()[2].Int64(), 7);
  EXPECT_EQ(*made.entries().EntryCount(), 1u);
  EXPECT_EQ(*root.Find("c").persistent_id()[1].Int64(), 2);
  // Whoever needs such a value is told whose it is.
  const absl::Status needed = called.Int64().status();
  EXPECT_EQ(needed.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(needed.ToString(), HasSubstr("an object of os.system"));
}

TEST(PickleReader, StackGlobalAndKeywordArguments) {
  const auto document = MustParseOpaque("U\x01mU\x01n\x93)}U\x01kNs\x92.");
  EXPECT_TRUE(document->root().IsCallOf("m", "n"));
  EXPECT_TRUE(document->root().kwargs().Find("k").Is(PickleValue::Type::kNone));
  EXPECT_THAT(ErrorOf("K\x01K\x02\x93.", kOpaque).ToString(), HasSubstr("as strings"));
  EXPECT_THAT(ErrorOf("K\x01)R.", kOpaque).ToString(), HasSubstr("a class or function"));
  EXPECT_THAT(ErrorOf("ca\nb\nNR.", kOpaque).ToString(), HasSubstr("a tuple of arguments"));
  EXPECT_THAT(ErrorOf("K\x01}\x62.", kOpaque).ToString(), HasSubstr("give a state to"));
  EXPECT_THAT(
      ErrorOf("c" + std::string(kPickleNameBytesMax + 1, 'a') + "\nb\n.", kOpaque).ToString(),
      HasSubstr("a line of at most"));
}

TEST(PickleReader, KeysAreThoseOfPython) {
  // 1, True and 1.0 are one key; '1' and b'1' are others; two NaN are two.
  const std::string nan = Raw("G\x7f\xf8\x00\x00\x00\x00\x00\x00");
  const auto document =
      MustParse(Raw("}(K\x01K\x00\x88K\x01") + Raw("G\x3f\xf0\x00\x00\x00\x00\x00\x00") +
                "K\x02U\x01\x31K\x03" + Raw("C\x01\x31") + "K\x04" + nan + "N" + nan + "Nu.");
  ASSERT_EQ(*document->root().EntryCount(), 5u);
  EXPECT_EQ(*document->root().Key(0).Int64(), 1);
  EXPECT_EQ(*document->root().Entry(0).Int64(), 2);
  EXPECT_EQ(*document->root().Find("1").Int64(), 3);
}

TEST(PickleReader, ManyKeysAreFoundByName) {
  std::string body = "}(";
  for (int i = 999; i >= 0; --i) {
    const std::string key = absl::StrCat("key", i % 500);
    body += absl::StrCat("X", std::string(1, static_cast<char>(key.size())), std::string(3, '\0'),
                         key, "I", i, "\n");
  }
  const auto document = MustParse(body + "u.");
  ASSERT_EQ(*document->root().EntryCount(), 500u);
  for (int i = 0; i < 500; ++i) {
    EXPECT_EQ(*document->root().Find(absl::StrCat("key", i)).Int64(), i);
  }
  EXPECT_FALSE(document->root().Find("key500").present());
  EXPECT_EQ(*document->root().Key(0).String(), "key499");  // the place of the first
}

// Every number of entries, and any two of the keys equal: strings, written twice or remembered, and
// objects, which are equal to themselves only, in the order in which they were made and in the
// opposite one, and both in turns.
TEST(PickleReader, TwoEqualKeysAreOneEntryHoweverManyThereAre) {
  const auto number = [](size_t n) { return absl::StrCat("I", n, "\n"); };
  const auto text = [](size_t n) {
    const std::string key = absl::StrCat("key", n);
    return absl::StrCat("U", std::string(1, static_cast<char>(key.size())), key);
  };
  const auto recalled = [](size_t n) { return std::string{'h', static_cast<char>(n)}; };
  for (size_t count = 1; count <= 20; ++count) {
    // What is remembered as 0 to count - 1: first texts, then objects.
    std::string texts;
    std::string objects;
    std::string both;
    for (size_t i = 0; i < count; ++i) {
      const std::string remember = {'q', static_cast<char>(i), '0'};
      texts += text(i) + remember;
      objects += "cm\nC\n)\x81" + remember;
      both += (i % 2 == 0 ? text(i) : "cm\nC\n)\x81") + remember;
    }
    for (size_t first = 0; first < count; ++first) {
      for (size_t second = first; second < count; ++second) {
        const auto key_of = [&](size_t i) { return i == second ? first : i; };
        std::string bodies[5] = {"}(", texts + "}(", objects + "}(", objects + "}(", both + "}("};
        for (size_t i = 0; i < count; ++i) {
          bodies[0] += text(key_of(i)) + number(i);
          bodies[1] += recalled(key_of(i)) + number(i);
          bodies[2] += recalled(key_of(i)) + number(i);
          bodies[3] += recalled(count - 1 - key_of(i)) + number(i);
          bodies[4] += recalled(count - 1 - key_of(i)) + number(i);
        }
        for (const std::string& body : bodies) {
          const auto document = MustParseOpaque(body + "u.");
          const PickleValue root = document->root();
          ASSERT_EQ(*root.EntryCount(), first == second ? count : count - 1);
          for (size_t i = 0; i < count; ++i) {
            if (i == second && first != second) continue;
            const size_t entry = i > second ? i - (first != second ? 1 : 0) : i;
            const size_t value = i == first ? second : i;
            ASSERT_EQ(*root.Entry(entry).Uint64(), value);
            if (&body > &bodies[1]) continue;
            ASSERT_EQ(*root.Key(entry).String(), absl::StrCat("key", i));
            ASSERT_EQ(*root.Find(absl::StrCat("key", i)).Uint64(), value);
          }
        }
      }
    }
  }
}

// All sequences of what an object can be given, up to four of them: with and without keyword
// arguments. Walk finds each part.
TEST(PickleReader, ObjectsKeepWhateverTheyAreGivenInAnyOrder) {
  for (const bool has_kwargs : {false, true}) {
    for (size_t sequence = 0; sequence < 4 * 4 * 4 * 4; ++sequence) {
      std::string body = "cm\nC\n(I7\nt";
      body += has_kwargs ? "}U\x01kI8\ns\x92" : "\x81";
      size_t states = 0;
      size_t items = 0;
      size_t entries = 0;
      for (size_t rest = sequence; rest > 0; rest /= 4) {
        switch (rest % 4) {
          case 1:
            body += absl::StrCat("(I", ++states, "\ntb");
            break;
          case 2:
            body += absl::StrCat("I", items++, "\na");
            break;
          case 3:
            body += absl::StrCat("I", entries++, "\nNs");
            break;
          default:
            break;
        }
      }
      const auto document = MustParseOpaque(body + ".");
      const PickleValue object = document->root();
      ASSERT_TRUE(object.IsCallOf("m", "C"));
      ASSERT_EQ(*object.args()[0].Int64(), 7);
      ASSERT_EQ(object.kwargs().present(), has_kwargs);
      if (has_kwargs) {
        ASSERT_EQ(*object.kwargs().Find("k").Int64(), 8);
      }
      ASSERT_EQ(object.state_count(), states);
      ASSERT_EQ(object.state().present(), states > 0);
      if (states > 0) {
        ASSERT_EQ(*object.state()[0].Uint64(), states);
      }
      ASSERT_EQ(object.items().present(), items > 0);
      for (size_t i = 0; i < items; ++i) ASSERT_EQ(*object.items()[i].Uint64(), i);
      ASSERT_EQ(object.entries().present(), entries > 0);
      for (size_t i = 0; i < entries; ++i) ASSERT_EQ(*object.entries().Key(i).Uint64(), i);
      size_t containers = 0;
      document->Walk([&containers](PickleValue value) {
        containers += value.Is(PickleValue::Type::kTuple) || value.Is(PickleValue::Type::kList) ||
                      value.Is(PickleValue::Type::kDict);
        return PickleDocument::Step::kInto;
      });
      ASSERT_EQ(containers, 1u + has_kwargs + (states > 0) + (items > 0) + (entries > 0));
    }
  }
}

// What is one object in Python is one value here, and no other is.
TEST(PickleReader, EqualIntegersMayBeOneValueAndNothingElse) {
  const auto document = MustParseOpaque("(K\x05I5\n\x88\x89K\x01))]]}}NN(t(tF5\nt.");
  const PickleValue root = document->root();
  const size_t count = *root.ArraySize();
  ASSERT_EQ(count, 16u);
  EXPECT_EQ(root[0].number(), root[1].number());  // 5
  EXPECT_EQ(root[5].number(), root[6].number());  // ()
  std::vector<uint32_t> numbers;
  for (size_t i = 0; i < count; ++i) {
    if (i != 1 && i != 6) numbers.push_back(root[i].number());
  }
  std::sort(numbers.begin(), numbers.end());
  EXPECT_EQ(std::unique(numbers.begin(), numbers.end()), numbers.end());
}

// Above a megabyte memory is reserved ahead, for fewer values than there are here, and for more.
TEST(PickleReader, LargePicklesReadAsSmallOnesDo) {
  std::string body = "]";
  constexpr int kCount = 400'000;
  for (int i = 0; i < kCount; ++i) {
    if (i % 1000 == 0) body += '(';
    body += absl::StrCat("]\x94I", i, "\na");
    if (i % 1000 == 999) body += 'e';
  }
  const auto document = MustParse(body + ".");
  ASSERT_EQ(*document->root().ArraySize(), size_t{kCount});
  for (int i = 0; i < kCount; i += 7) ASSERT_EQ(*document->root()[i][0].Int64(), i);
  const auto text = MustParse(absl::StrCat("](", "K\x01X", Raw("\x00\x00\x20\x00"),
                                           std::string(size_t{2} << 20, 'x'), "K\x02\x65."));
  EXPECT_EQ(text->root()[1].String()->size(), size_t{2} << 20);
  EXPECT_EQ(*text->root()[2].Int64(), 2);
}

// Forty levels of lists that hold the one below ten times, and a list that holds itself.
TEST(PickleReader, AWalkSeesEachValueOnce) {
  std::string body = Raw("]q\x00\x30(]q\xffh\xff\x61");
  for (int level = 0; level < 40; ++level) {
    body += "](";
    for (int i = 0; i < 10; ++i) body += {'h', static_cast<char>(level)};
    body += {'e', 'q', static_cast<char>(level + 1)};
    if (level < 39) body += '0';
  }
  const auto document = MustParse(body + "t.");
  size_t seen = 0;
  document->Walk([&seen](PickleValue) {
    ++seen;
    return PickleDocument::Step::kInto;
  });
  EXPECT_EQ(seen, 43u);
  size_t stopped = 0;
  document->Walk([&stopped](PickleValue) {
    return ++stopped == 3 ? PickleDocument::Step::kStop : PickleDocument::Step::kInto;
  });
  EXPECT_EQ(stopped, 3u);
}

TEST(PickleReader, WhatFollowsIsAllowedWhereAsked) {
  PickleOptions options = kOpaque;
  options.following = PickleOptions::Following::kAllowed;
  const auto document = PickleDocument::Parse("\x80\x02N.more", options);
  ASSERT_TRUE(document.ok());
  EXPECT_EQ((*document)->consumed_bytes(), 4u);
  for (const std::string bytes :
       {"\x80\x02", "\x80\x02X\x09", "\x80\x02U\x09x", "\x80\x02I12", "\x80"}) {
    EXPECT_EQ(PickleDocument::Parse(bytes, options).status().code(), absl::StatusCode::kOutOfRange);
  }
}

TEST(PickleReader, LoneSurrogatesAreKeptWithOpaqueClasses) {
  const std::string lone = Raw("X\x03\x00\x00\x00\xed\xa0\x80.");
  EXPECT_EQ(*MustParseOpaque(lone)->root().String(), "\xed\xa0\x80");
  EXPECT_FALSE(ErrorOf(lone).ok());
  EXPECT_FALSE(ErrorOf(Raw("X\x02\x00\x00\x00\xc0\x80."), kOpaque).ok());
}

}  // namespace
}  // namespace holdfast
