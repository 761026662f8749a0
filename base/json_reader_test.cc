// The reader against what must be read and what must be refused, an oracle for random documents,
// and a document of the size that a job of 100,000 tensors registers.
#include "base/json_reader.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::unique_ptr<JsonDocument> MustParse(std::string text) {
  auto document = JsonDocument::Parse(std::move(text));
  EXPECT_TRUE(document.ok()) << document.status().ToString();
  return document.ok() ? std::move(*document) : nullptr;
}

std::string ErrorOf(std::string text, const JsonLimits& limits = {}) {
  auto document = JsonDocument::Parse(std::move(text), limits);
  return document.ok() ? "accepted" : std::string(document.status().message());
}

TEST(JsonReader, ReadsEveryTypeInDocumentOrder) {
  const auto document = MustParse(
      " { \"z\" : null , \"a\" : [ true , false , -0.5e1 , 18446744073709551615 , "
      "-9223372036854775808"
      " ] , \"\" : { } , \"s\" : \"\\u00e9\\n\\ud83d\\ude00\\\\x\" , \"e\":[] }\r\n\t");
  const JsonValue root = document->root();
  EXPECT_THAT(*root.Keys(), ElementsAre("z", "a", "", "s", "e"));
  EXPECT_EQ(root.Find("z").type(), JsonValue::Type::kNull);
  const JsonValue array = *root.Get("a");
  ASSERT_EQ(*array.ArraySize(), 5u);
  EXPECT_TRUE(*array[0].Bool());
  EXPECT_FALSE(*array[1].Bool());
  EXPECT_EQ(*array[2].Double(), -5.0);
  EXPECT_EQ(*array[3].Uint64(), UINT64_MAX);
  EXPECT_EQ(*array[4].Int64(), INT64_MIN);
  EXPECT_EQ(*root.Find("s").String(), "\u00e9\n\U0001F600\\x");
  EXPECT_EQ(root.Find("").Keys()->size(), 0u);
  EXPECT_EQ(*root.Find("e").ArraySize(), 0u);
  EXPECT_FALSE(root.Find("missing").present());
}

TEST(JsonReader, ReadsAScalarAsTheWholeDocument) {
  EXPECT_EQ(*MustParse("7")->root().Uint64(), 7u);
  EXPECT_EQ(*MustParse("\"\"")->root().String(), "");
  EXPECT_EQ(MustParse("[]")->root().Path(), "$");
}

TEST(JsonReader, RefusesWhatIsNoJson) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "line 1, column 1: expected a value, found the end"},
      {"  ", "expected a value, found the end"},
      {"{} x", "line 1, column 4: expected the end of the document, found 'x'"},
      {"[1,]", "column 4: expected a value, found ']'"},
      {"[1 2]", "expected ',' or ']', found '2'"},
      {"{\"a\":1,}", "expected a key in double quotes, found '}'"},
      {"{\"a\" 1}", "expected ':', found '1'"},
      {"{a:1}", "expected a key in double quotes, found 'a'"},
      {"{\"a\":1\n,\n \"b\" 2}", "line 3, column 6: expected ':', found '2'"},
      {"[1", "expected ',' or ']', found the end"},
      {"\"abc", "expected '\"', found the end"},
      {"'a'", "expected a value"},
      {"tru", "expected a value"},
      {"nullx", "expected the end of the document"},
      {"NaN", "expected a value"},
      {"Infinity", "expected a value"},
      {"+1", "expected a value"},
      {".5", "expected a value"},
      {"01", "no digit after a leading zero"},
      {"-", "expected a digit"},
      {"-a", "expected a digit"},
      {"1.", "expected a digit"},
      {"1e", "expected a digit"},
      {"1e+", "expected a digit"},
      {"0x10", "expected the end of the document"},
      {"// c\n1", "expected a value"},
      {"[1]]", "expected the end of the document"},
      {"]", "expected a value"},
      {"[}", "expected a value"},
      {"{]", "expected a key"},
      {"\xEF\xBB\xBF{}", "expected a value"},
      {"\"a\nb\"", "no control character"},
      {std::string("\"a\0b\"", 5), "no control character"},
      {std::string("1\0", 2), "expected the end of the document"},
      {"\"\\x\"", "an escape of JSON"},
      {"\"\\", "an escape of JSON"},
      {"\"\\u12g4\"", "a hexadecimal digit, found 'g'"},
      {"\"\\u12", "a hexadecimal digit, found the end"},
      {"\"\\ud800\"", "no lone surrogate"},
      {"\"\\udc00\"", "no lone surrogate"},
      {"\"\\ud800\\u0041\"", "no lone surrogate"},
      {"{\"a\":1,\"b\":2,\"a\":3}", "has the key \"a\" twice"},
      {"{\"a\":1,\"\\u0061\":3}", "has the key \"a\" twice"},
  };
  for (const auto& [text, expected] : cases)
    EXPECT_THAT(ErrorOf(text), HasSubstr(expected)) << text;
}

TEST(JsonReader, RefusesADuplicateAmongManyKeysAndFindsEachOfThem) {
  for (int count : {2, 11, 12, 13, 14, 1000}) {
    std::string text = "{";
    for (int i = 0; i < count; ++i) absl::StrAppend(&text, i ? "," : "", "\"key", i, "\":", i);
    const auto document = MustParse(text + "}");
    for (int i = 0; i < count; ++i) {
      EXPECT_EQ(*document->root().Find(absl::StrCat("key", i)).Int64(), i);
    }
    EXPECT_FALSE(document->root().Find("key").present());
    EXPECT_FALSE(document->root().Find("zz").present());
    EXPECT_THAT(ErrorOf(absl::StrCat(text, ",\"key", count - 2, "\":0}")), HasSubstr("twice"));
  }
}

// Every sequence of at most 3 bytes, and the interesting ones of 4, against a decoder written from
// the definition: decode, then refuse what is overlong, a surrogate or too large.
bool IsUtf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&text](size_t at) { return static_cast<unsigned char>(text[at]); };
    const int length = byte(i) < 0x80           ? 1
                       : (byte(i) >> 5) == 0x6  ? 2
                       : (byte(i) >> 4) == 0xE  ? 3
                       : (byte(i) >> 3) == 0x1E ? 4
                                                : 0;
    if (length == 0 || i + static_cast<size_t>(length) > text.size()) return false;
    uint32_t value = length == 1 ? byte(i) : byte(i) & (0x7F >> length);
    for (int k = 1; k < length; ++k) {
      const unsigned char next = byte(i + static_cast<size_t>(k));
      if ((next >> 6) != 2) return false;
      value = value << 6 | (next & 0x3F);
    }
    static constexpr uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
    if (value < kSmallest[length] || value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) {
      return false;
    }
    i += static_cast<size_t>(length);
  }
  return true;
}

TEST(JsonReader, AcceptsExactlyTheUtf8OfTheStandard) {
  int accepted = 0;
  const auto check = [&accepted](const std::string& bytes) {
    const bool good = JsonDocument::Parse("\"" + bytes + "\"").ok();
    EXPECT_EQ(good, IsUtf8(bytes)) << absl::StrFormat("%02x", static_cast<unsigned char>(bytes[0]));
    accepted += good;
  };
  const auto byte = [](int value) { return std::string(1, static_cast<char>(value)); };
  const std::vector<int> tails = {0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF};
  for (int a = 0x80; a <= 0xFF; ++a) {
    check(byte(a));
    for (int b = 0x7F; b <= 0xFF; ++b) {
      check(byte(a) + byte(b));
      for (int c : tails) {
        check(byte(a) + byte(b) + byte(c));
        if (a >= 0xEF) {
          for (int d : tails) check(byte(a) + byte(b) + byte(c) + byte(d));
        }
      }
    }
  }
  EXPECT_GT(accepted, 3000);
}

TEST(JsonReader, AccessorsNamePathExpectedAndFound) {
  const auto document = MustParse(
      R"({"tensors":[{"name":"a"},{"shape":[1,-2,1.0,1e3,18446744073709551616,1e999]}],"b c":{"d":"x"}})");
  const JsonValue root = document->root();
  const JsonValue shape = root.Find("tensors")[1].Find("shape");
  EXPECT_EQ(shape.Path(), "tensors[1].shape");
  EXPECT_EQ(shape[3].Path(), "tensors[1].shape[3]");
  EXPECT_EQ(root.Find("b c").Find("d").Path(), "[\"b c\"].d");
  EXPECT_EQ(*shape[0].Uint64(), 1u);
  EXPECT_EQ(*shape[1].Int64(), -2);
  EXPECT_EQ(shape[1].Uint64().status().message(),
            "tensors[1].shape[1]: expected an integer from 0 to 2^64 - 1, found the number -2");
  for (size_t i = 2; i < 6; ++i) {
    EXPECT_FALSE(shape[i].Uint64().ok());
    EXPECT_FALSE(shape[i].Int64().ok());
  }
  EXPECT_EQ(*shape[3].Double(), 1000.0);
  EXPECT_THAT(std::string(shape[5].Double().status().message()), HasSubstr("range of a double"));
  EXPECT_THAT(std::string(shape.String().status().message()),
              HasSubstr("tensors[1].shape: expected a string, found an array of 6"));
  EXPECT_THAT(std::string(root.Get("mesh").status().message()),
              HasSubstr("$: expected the key \"mesh\", found none"));
  EXPECT_THAT(std::string(shape.Get("x").status().message()), HasSubstr("expected an object"));
  EXPECT_THAT(std::string(root.Find("nope").Uint64().status().message()),
              HasSubstr("found nothing"));
  EXPECT_FALSE(root.Bool().ok());
  EXPECT_FALSE(root.ArraySize().ok());
  EXPECT_FALSE(shape.Keys().ok());
}

TEST(JsonReader, UnknownKeysGetASuggestion) {
  const auto document = MustParse(R"({"shap":1})");
  EXPECT_TRUE(document->root().ExpectKeys({"name", "shap"}).ok());
  EXPECT_EQ(document->root().ExpectKeys({"name", "shape", "states"}).message(),
            "$: unknown key \"shap\"; did you mean \"shape\"?");
  EXPECT_EQ(document->root().ExpectKeys({"mesh"}).message(), "$: unknown key \"shap\"");
}

TEST(JsonReader, LimitsAreExact) {
  JsonLimits limits;
  limits.depth_max = 3;
  EXPECT_EQ(ErrorOf("[[[1]]]", limits), "accepted");
  EXPECT_THAT(ErrorOf("[[[[1]]]]", limits), HasSubstr("nested deeper than 3"));
  limits = {};
  limits.values_max = 4;
  EXPECT_EQ(ErrorOf("[1,2,3]", limits), "accepted");
  EXPECT_THAT(ErrorOf("[1,2,3,4]", limits), HasSubstr("more than 4 values"));
  limits = {};
  limits.bytes_max = 5;
  EXPECT_EQ(ErrorOf("[1,2]", limits), "accepted");
  EXPECT_THAT(ErrorOf("[1,23]", limits), HasSubstr("at most 5 bytes, found 6"));
  EXPECT_THAT(ErrorOf(std::string(1'000'000, '[')), HasSubstr("nested deeper than 32"));
}

// Builds a random document together with a second description of it, then compares.
struct Model {
  JsonValue::Type type = JsonValue::Type::kNull;
  std::string scalar;  // as String() gives it, or the number's text
  std::string key;     // in its object, if it is a member of one
  std::vector<Model> children;
};

class Generator {
 public:
  explicit Generator(uint64_t seed) : random_(seed) {}

  Model Value(int depth) {
    Model model;
    const int kind = Below(depth == 0 ? 4 : 6);
    model.type = static_cast<JsonValue::Type>(kind);
    if (kind == 1) model.scalar = Below(2) ? "true" : "false";
    if (kind == 2) model.scalar = absl::StrCat(static_cast<int64_t>(random_()));
    if (kind == 3) model.scalar = Text();
    if (kind >= 4) {
      for (int i = Below(4) == 0 ? Below(30) : Below(4); i > 0; --i) {
        std::string key = absl::StrCat(Text(), i);
        model.children.push_back(Value(depth - 1));
        model.children.back().key = std::move(key);
      }
    }
    return model;
  }

  std::string Write(const Model& model) {
    std::string text = Space();
    switch (model.type) {
      case JsonValue::Type::kNull:
        text += "null";
        break;
      case JsonValue::Type::kBool:
      case JsonValue::Type::kNumber:
        text += model.scalar;
        break;
      case JsonValue::Type::kString:
        text += Escape(model.scalar);
        break;
      default: {
        const bool object = model.type == JsonValue::Type::kObject;
        text += object ? "{" : "[";
        for (size_t i = 0; i < model.children.size(); ++i) {
          if (i > 0) text += ",";
          if (object) absl::StrAppend(&text, Space(), Escape(model.children[i].key), Space(), ":");
          text += Write(model.children[i]);
        }
        absl::StrAppend(&text, Space(), object ? "}" : "]");
      }
    }
    return text + Space();
  }

 private:
  int Below(int limit) { return static_cast<int>(random_() % static_cast<uint64_t>(limit)); }

  std::string Space() {
    std::string text;
    while (Below(3) == 0) text += " \t\r\n"[Below(4)];
    return text;
  }

  std::string Text() {
    static const std::vector<std::string> kPieces = {"a",    "/", "\"", "\\", "\n",
                                                     "\x01", "é", "€",  "😀"};
    std::string text;
    while (Below(4) != 0) text += kPieces[static_cast<size_t>(Below(9))];
    return text;
  }

  std::string Escape(const std::string& text) {
    std::string out = "\"";
    for (size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      if (c == '"' || c == '\\') {
        absl::StrAppend(&out, "\\", std::string(1, c));
      } else if (static_cast<unsigned char>(c) < 0x20 || (c == 'a' && Below(2) == 0)) {
        absl::StrAppendFormat(&out, "\\u%04x", c);
      } else if (text.substr(i, 4) == "😀" && Below(2) == 0) {
        out += "\\uD83D\\ude00";
        i += 3;
      } else {
        out += c;
      }
    }
    return out + "\"";
  }

  std::mt19937_64 random_;
};

void ExpectEqual(const Model& model, const JsonValue& value) {
  ASSERT_EQ(value.type(), model.type) << value.Path();
  switch (model.type) {
    case JsonValue::Type::kNull:
      return;
    case JsonValue::Type::kBool:
      EXPECT_EQ(*value.Bool(), model.scalar == "true");
      return;
    case JsonValue::Type::kNumber:
      EXPECT_EQ(absl::StrCat(*value.Int64()), model.scalar);
      return;
    case JsonValue::Type::kString:
      EXPECT_EQ(*value.String(), model.scalar);
      return;
    case JsonValue::Type::kArray:
      ASSERT_EQ(*value.ArraySize(), model.children.size());
      for (size_t i = 0; i < model.children.size(); ++i) ExpectEqual(model.children[i], value[i]);
      return;
    case JsonValue::Type::kObject: {
      const auto keys = *value.Keys();
      ASSERT_EQ(keys.size(), model.children.size());
      for (size_t i = 0; i < keys.size(); ++i) {
        EXPECT_EQ(keys[i], model.children[i].key);
        ExpectEqual(model.children[i], value.Find(keys[i]));
      }
    }
  }
}

TEST(JsonReader, RandomDocumentsReadBackAndNeverCrashWhenDamaged) {
  const uint64_t seed = 20251125;
  printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 3000; ++round) {
    Generator generator(random());
    const Model model = generator.Value(5);
    std::string text = generator.Write(model);
    const auto document = MustParse(text);
    ASSERT_NE(document, nullptr);
    ExpectEqual(model, document->root());
    for (int damage = 0; damage < 4; ++damage) {
      std::string bad = text;
      bad[random() % bad.size()] = static_cast<char>(random());
      if (random() % 2) bad.resize(random() % bad.size());
      (void)JsonDocument::Parse(std::move(bad));  // must only not crash: the sanitizers look on
    }
  }
}

TEST(JsonReader, KeepsDuplicatesForWhoAsksForThem) {
  for (const int others : {0, 1000}) {  // found one by one, and by the sorted index
    std::string text = R"({"a": 1, "b": 2, "a": 3)";
    for (int i = 0; i < others; ++i) absl::StrAppend(&text, ", \"k", i, "\": 0");
    text += R"(, "a": 4})";
    EXPECT_FALSE(JsonDocument::Parse(text).ok());
    const auto document = JsonDocument::Parse(text, {.duplicates = JsonDuplicates::kKeep});
    ASSERT_TRUE(document.ok());
    const JsonValue root = (*document)->root();
    EXPECT_EQ(*root.Find("a").Uint64(), 4u);
    EXPECT_EQ(*root.Find("b").Uint64(), 2u);
    const auto keys = *root.Keys();
    ASSERT_EQ(keys.size(), 4u + static_cast<size_t>(others));
    EXPECT_EQ(keys[2], "a");
    EXPECT_EQ(*root.Member(0).Uint64(), 1u);
    EXPECT_EQ(*root.Member(2).Uint64(), 3u);
  }
}

TEST(JsonReader, ReadsALayoutOfAHundredThousandTensors) {
  std::string text = R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":8}],"tensors":[)";
  for (int i = 0; i < 100'000; ++i) {
    absl::StrAppend(&text, i ? "," : "", "{\"name\":\"model.layers.", i,
                    ".weight\",\"shape\":[64,32],",
                    R"("states":[{"state":"param","dtype":"float32","place":"w"},)"
                    R"({"state":"exp_avg","dtype":"float32","place":"o"},)"
                    R"({"state":"exp_avg_sq","dtype":"float32","place":"o"}]})");
  }
  text += "]}";
  const size_t bytes = text.size();
  const absl::Time begin = absl::Now();
  const auto document = MustParse(std::move(text));
  printf("%zu bytes in %s\n", bytes, absl::FormatDuration(absl::Now() - begin).c_str());
  const JsonValue tensors = document->root().Find("tensors");
  ASSERT_EQ(*tensors.ArraySize(), 100'000u);
  EXPECT_EQ(*tensors[99'999].Find("name").String(), "model.layers.99999.weight");
  EXPECT_EQ(tensors[99'999].Find("states")[2].Find("dtype").Path(),
            "tensors[99999].states[2].dtype");
}

}  // namespace
}  // namespace holdfast
