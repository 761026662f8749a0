// Goal: what two checkpoints differ in is what they were made to differ in, whatever their layouts,
// whoever leads and however little memory there is; what cannot be known is said; damage of either
// is named.
// Method: random tensors in two random layouts (the generator of the layout oracle), whole tensors
// in memory as the truth, random elements changed; the expected report is brute force over them.
#include "checkpoint/diff.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "checkpoint/diff_bytes.h"
#include "checkpoint/diff_plan.h"
#include "checkpoint/stored_testing.h"
#include "format/layout.h"
#include "format/layout_oracle.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::AnyOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;
using Kind = TensorDifference::Kind;
using Verdict = DiffReport::Verdict;
using Random = std::mt19937_64;

constexpr uint64_t kBlock = kStoredBlockBytes;

DiffOptions Memory(uint64_t bytes) {
  DiffOptions options;
  options.memory_bytes_max = bytes;
  return options;
}

absl::StatusOr<DiffReport> Diff(const StoredCheckpoint& a, const StoredCheckpoint& b,
                                uint64_t memory_bytes = kDiffMemoryBytes,
                                Caching caching = Caching::kBuffered) {
  return DiffBytes(*NewPosixFileSystem(), PlainReadAt(), DiffInput{a.directory(), a.index()},
                   DiffInput{b.directory(), b.index()}, caching, Memory(memory_bytes));
}

// ---- The expected report: brute force ----

// Written from the definitions of the types, with ldexp, for one value at a time.
std::optional<double> FiniteValue(Dtype dtype, std::span<const std::byte> element) {
  struct Form {
    int exponent_bits;
    int mantissa_bits;
    bool has_infinity;
  };
  static const std::map<Dtype, Form> kForms = {
      {Dtype::kFloat16, {5, 10, true}},      {Dtype::kBfloat16, {8, 7, true}},
      {Dtype::kFloat32, {8, 23, true}},      {Dtype::kFloat64, {11, 52, true}},
      {Dtype::kFloat8E4m3fn, {4, 3, false}}, {Dtype::kFloat8E5m2, {5, 2, true}}};
  uint64_t bits = 0;
  for (size_t i = 0; i < element.size(); ++i) {
    bits |= uint64_t{std::to_integer<uint8_t>(element[i])} << (8 * i);
  }
  const Form form = kForms.at(dtype);
  const uint64_t exponent_max = (uint64_t{1} << form.exponent_bits) - 1;
  const uint64_t mantissa_max = (uint64_t{1} << form.mantissa_bits) - 1;
  const uint64_t exponent = (bits >> form.mantissa_bits) & exponent_max;
  const uint64_t mantissa = bits & mantissa_max;
  const bool negative = ((bits >> (form.mantissa_bits + form.exponent_bits)) & 1) != 0;
  if (exponent == exponent_max && (form.has_infinity || mantissa == mantissa_max)) {
    return std::nullopt;
  }
  const int bias = (1 << (form.exponent_bits - 1)) - 1;
  const double whole = static_cast<double>(mantissa + (exponent > 0 ? mantissa_max + 1 : 0));
  const double value =
      std::ldexp(whole, std::max(1, static_cast<int>(exponent)) - bias - form.mantissa_bits);
  return negative ? -value : value;
}

bool IsFloating(Dtype dtype) {
  return static_cast<int>(dtype) >= static_cast<int>(Dtype::kFloat16);
}

// A long double holds every integer type and their distances exactly.
long double IntegerValue(Dtype dtype, std::span<const std::byte> element) {
  long double value = 0;
  for (size_t i = element.size(); i-- > 0;) {
    value = value * 256 + std::to_integer<uint8_t>(element[i]);
  }
  const bool is_signed = dtype == Dtype::kInt8 || dtype == Dtype::kInt16 ||
                         dtype == Dtype::kInt32 || dtype == Dtype::kInt64;
  const long double range = std::ldexp(1.0L, static_cast<int>(8 * element.size()));
  return is_signed && value >= range / 2 ? value - range : value;
}

ElementDifferences BruteForce(const TensorState& state, std::span<const std::byte> a,
                              std::span<const std::byte> b) {
  const uint64_t element_bytes = ElementBytes(state.dtype);
  ElementDifferences expected;
  for (uint64_t i = 0; i < state.ElementCount(); ++i) {
    const auto x = a.subspan(i * element_bytes, element_bytes);
    const auto y = b.subspan(i * element_bytes, element_bytes);
    if (std::equal(x.begin(), x.end(), y.begin())) continue;
    if (expected.count++ == 0) expected.first = i;
    if (!IsFloating(state.dtype)) {
      const long double distance =
          std::fabs(IntegerValue(state.dtype, x) - IntegerValue(state.dtype, y));
      expected.max_absolute = std::max(expected.max_absolute, static_cast<double>(distance));
      continue;
    }
    const std::optional<double> p = FiniteValue(state.dtype, x);
    const std::optional<double> q = FiniteValue(state.dtype, y);
    if (!p.has_value() || !q.has_value()) {
      ++expected.non_finite_count;
      continue;
    }
    // A long double holds the distance of any two doubles.
    const long double distance = std::fabs(static_cast<long double>(*p) - *q);
    const long double larger = std::max(std::fabs(*p), std::fabs(*q));
    expected.max_absolute = std::max(
        expected.max_absolute,
        static_cast<double>(std::min<long double>(distance, std::numeric_limits<double>::max())));
    if (larger > 0) {
      expected.max_relative =
          std::max(expected.max_relative, static_cast<double>(distance / larger));
    }
  }
  return expected;
}

void ExpectElements(const ElementDifferences& found, const ElementDifferences& expected) {
  EXPECT_EQ(found.count, expected.count);
  EXPECT_EQ(found.first, expected.first);
  EXPECT_EQ(found.non_finite_count, expected.non_finite_count);
  EXPECT_DOUBLE_EQ(found.max_absolute, expected.max_absolute);
  EXPECT_NEAR(found.max_relative, expected.max_relative, 1e-12);
}

// Of checkpoints with the same tensor states.
void ExpectReport(const DiffReport& report, const Truths& a, const Truths& b) {
  size_t at = 0;
  uint64_t equal = 0;
  for (const auto& [name, truth] : a) {
    const ElementDifferences expected = BruteForce(truth.state, truth.bytes, b.at(name).bytes);
    if (expected.count == 0) {
      ++equal;
      continue;
    }
    ASSERT_LT(at, report.tensors.size()) << name.first;
    const TensorDifference& found = report.tensors[at++];
    SCOPED_TRACE(
        absl::StrCat(Describe(truth.state), " ", std::string(DtypeName(truth.state.dtype))));
    EXPECT_EQ(Describe(found.state()), Describe(truth.state));
    EXPECT_EQ(found.kind, Kind::kContents);
    ASSERT_TRUE(found.elements.has_value());
    ExpectElements(*found.elements, expected);
  }
  EXPECT_EQ(at, report.tensors.size());
  EXPECT_EQ(report.states_equal, equal);
  EXPECT_EQ(report.states_compared, a.size());
  EXPECT_EQ(report.verdict, equal == a.size() ? Verdict::kEqual : Verdict::kDifferent);
  EXPECT_EQ(report.fingerprints_checked, 2 * a.size());
  EXPECT_THAT(report.damage, IsEmpty());
}

// ---- Random pairs of layouts ----

// Changes some elements of some states; sometimes to the odd values of their type.
Truths Changed(Truths truths, Random& random) {
  for (auto& [name, truth] : truths) {
    if (truth.bytes.empty() || random() % 2 == 0) continue;
    const uint64_t element_bytes = ElementBytes(truth.state.dtype);
    const uint64_t changes = random() % 4 == 0 ? truth.state.ElementCount() : 1 + random() % 3;
    for (uint64_t change = 0; change < changes; ++change) {
      const uint64_t element = random() % truth.state.ElementCount();
      std::byte* const bytes = truth.bytes.data() + element * element_bytes;
      // All ones are a NaN, 0x7F..: NaN or large; zeros; one bit.
      const uint64_t choice = random() % 5;
      if (choice == 0) std::memset(bytes, 0xFF, element_bytes);
      if (choice == 1) std::memset(bytes, 0, element_bytes);
      if (choice == 2) bytes[element_bytes - 1] = std::byte{0x7F};
      if (choice > 2) bytes[random() % element_bytes] ^= static_cast<std::byte>(1u << random() % 8);
    }
  }
  return truths;
}

std::unique_ptr<const Layout> RandomLayout(const std::vector<oracle::Tensor>& tensors,
                                           Random& random) {
  while (true) {
    const oracle::Document document = oracle::RandomDocument(random, tensors);
    auto layout = Layout::Parse(oracle::ToJson(document, random));
    if (layout.ok()) return *std::move(layout);  // not every rule fits
  }
}

TEST(DiffBytes, TheDifferencesOfAnyTwoLayoutsAreThoseThatWereMade) {
  const uint64_t seed = 20251126;
  const int rounds = 250;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  int different = 0;
  uint64_t read_twice = 0;
  for (int round = 0; round < rounds; ++round) {
    Random random(seed + static_cast<uint64_t>(round));
    std::vector<oracle::Tensor> tensors = oracle::RandomTensors(random);
    for (oracle::Tensor& tensor : tensors) {
      for (oracle::State& state : tensor.states) {
        // Those of which FiniteValue knows the form; element_difference_test has all.
        const std::string_view name = DtypeNames()[random() % 15];
        state.dtype = name;
        state.element_bytes = ElementBytes(*DtypeFromName(name));
      }
    }
    const std::unique_ptr<const Layout> a_layout = RandomLayout(tensors, random);
    const std::unique_ptr<const Layout> b_layout = RandomLayout(tensors, random);
    const Truths a_truth = RandomTruths(a_layout->tensor_states(), random);
    const Truths b_truth = Changed(a_truth, random);
    const StoredCheckpoint::Alignment alignment = random() % 3 == 0
                                                      ? StoredCheckpoint::Alignment::kNone
                                                      : StoredCheckpoint::Alignment::kOfElements;
    StoredCheckpoint a(*a_layout, a_truth, random, alignment);
    StoredCheckpoint b(*b_layout, b_truth, random, alignment);
    a.Write();
    b.Write();
    SCOPED_TRACE(absl::StrCat("round ", round, "\n", a_layout->text(), "\n", b_layout->text()));
    const uint64_t memory = random() % 2 == 0 ? 0 : kDiffMemoryBytes;
    const Caching caching = random() % 4 == 0 ? Caching::kDirect : Caching::kBuffered;
    ASSERT_OK_AND_ASSIGN(const DiffReport report, Diff(a, b, memory, caching));
    ExpectReport(report, a_truth, b_truth);

    // What is compared does not depend on who leads and in which order.
    std::vector<CommonState> common;
    for (uint32_t i = 0; i < a.index().tensor_states.size(); ++i) common.push_back({{i, i}});
    const auto files = NewPosixFileSystem();
    ASSERT_OK_AND_ASSIGN(const auto a_reader, BlockReader::Open(*files, PlainReadAt(),
                                                                a.directory(), a.index(), caching));
    ASSERT_OK_AND_ASSIGN(const auto b_reader, BlockReader::Open(*files, PlainReadAt(),
                                                                b.directory(), b.index(), caching));
    uint64_t least = UINT64_MAX;
    for (const uint32_t lead : {0, 1}) {
      for (const DiffPlan::Order order : {DiffPlan::Order::kStorage, DiffPlan::Order::kElements}) {
        ASSERT_OK_AND_ASSIGN(
            const DiffPlan plan,
            DiffPlan::CreateWith(a.index(), b.index(), common,
                                 DiffLimits{.memory_bytes_max = memory}, lead, order));
        ASSERT_OK_AND_ASSIGN(const auto results,
                             CompareBytes(plan, common.size(), {a_reader.get(), b_reader.get()}, {},
                                          [](uint64_t) { return true; }));
        for (uint32_t i = 0; i < common.size(); ++i) {
          const TensorState& state = a.index().tensor_states[i];
          const std::pair name(state.tensor, state.state);
          ExpectElements(results[i].differences,
                         BruteForce(state, a_truth.at(name).bytes, b_truth.at(name).bytes));
        }
        least = std::min(least, plan.schedule().bytes);
        read_twice += plan.schedule().bytes - plan.schedule().distinct_bytes;
      }
    }
    EXPECT_EQ(report.bytes_read, least);
    if (testing::Test::HasFailure()) return;
    different += report.verdict == Verdict::kDifferent ? 1 : 0;
  }
  std::printf("%d pairs, %d different, %llu bytes read more than once\n", rounds, different,
              static_cast<unsigned long long>(read_twice));
  EXPECT_GT(different, rounds / 3);
  EXPECT_LT(different, rounds * 19 / 20);
  EXPECT_GT(read_twice, 100 * kBlock);
}

struct Pair {
  Truths truths;
  StoredCheckpoint a;
  StoredCheckpoint b;

  Pair(const Layout& a_layout, const Layout& b_layout, Random& random)
      : truths(RandomTruths(a_layout.tensor_states(), random)),
        a(a_layout, truths, random),
        b(b_layout, truths, random) {
    a.Write();
    b.Write();
  }
};

// ---- What is not the same tensor ----

std::unique_ptr<const Layout> Named(const std::vector<std::pair<std::string, std::string>>& kinds) {
  std::string tensors;
  for (const auto& [name, kind] : kinds) {
    absl::StrAppend(&tensors, tensors.empty() ? "" : ",", R"({"name":")", name, R"(",)", kind, "}");
  }
  return Layout::Parse(
             absl::StrCat(R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":1}],"tensors":[)",
                          tensors, "]}"))
      .value();
}
constexpr char kFloats[] = R"("shape":[3,4],"states":[{"state":"param","dtype":"float32"}])";
constexpr char kTurned[] = R"("shape":[4,3],"states":[{"state":"param","dtype":"float32"}])";
constexpr char kIntegers[] = R"("shape":[3,4],"states":[{"state":"param","dtype":"int32"}])";
constexpr char kNothing[] = R"("shape":[0,4],"states":[{"state":"param","dtype":"float32"}])";

TEST(Diff, WhatIsInOneOnlyOrOfAnotherKindDiffersAndIsNamed) {
  Random random(4);
  const auto a_layout = Named({{"a", kFloats}, {"c", kFloats}, {"d", kFloats}, {"e", kNothing}});
  const auto b_layout = Named({{"b", kFloats}, {"c", kTurned}, {"d", kIntegers}, {"e", kNothing}});
  StoredCheckpoint a(*a_layout, RandomTruths(a_layout->tensor_states(), random), random);
  StoredCheckpoint b(*b_layout, RandomTruths(b_layout->tensor_states(), random), random);
  a.Write();
  b.Write();
  ASSERT_OK_AND_ASSIGN(const DiffReport by_bytes, Diff(a, b));
  for (const DiffReport& report : {DiffFingerprints(a.index(), b.index()), by_bytes}) {
    EXPECT_EQ(report.verdict, Verdict::kDifferent);
    ASSERT_THAT(report.tensors, SizeIs(4));
    const std::vector<Kind> kinds{Kind::kOnlyInA, Kind::kOnlyInB, Kind::kOtherKind,
                                  Kind::kOtherKind};
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(report.tensors[i].kind, kinds[i]);
      EXPECT_EQ(report.tensors[i].state().tensor, std::string(1, static_cast<char>('a' + i)));
    }
    EXPECT_EQ(report.tensors[0].b, std::nullopt);
    EXPECT_EQ(report.tensors[1].a, std::nullopt);
    EXPECT_THAT(report.tensors[2].b->shape, ElementsAre(4, 3));
    EXPECT_EQ(report.tensors[3].b->dtype, Dtype::kInt32);
    EXPECT_EQ(report.states_compared, 1u);
    EXPECT_EQ(report.states_equal, 1u);
    EXPECT_THAT(report.tensor_counts, ElementsAre(1, 1, 2, 0, 0));
  }
}

TEST(Diff, FingerprintsSayWhatBytesSayAndWithoutThemItIsUnknown) {
  Random random(5);
  const auto layout = Named({{"a", kFloats}, {"b", kFloats}, {"c", kIntegers}});
  const Truths truths = RandomTruths(layout->tensor_states(), random);
  Truths changed = truths;
  changed.at({"b", "param"}).bytes[7] ^= std::byte{1};
  const StoredCheckpoint a(*layout, truths, random);
  StoredCheckpoint same(*layout, truths, random);
  const StoredCheckpoint other(*layout, changed, random);

  EXPECT_EQ(DiffFingerprints(a.index(), same.index()).verdict, Verdict::kEqual);
  const DiffReport report = DiffFingerprints(a.index(), other.index());
  EXPECT_EQ(report.verdict, Verdict::kDifferent);
  ASSERT_THAT(report.tensors, SizeIs(1));
  EXPECT_EQ(report.tensors[0].kind, Kind::kContents);
  EXPECT_EQ(report.tensors[0].state().tensor, "b");
  EXPECT_FALSE(report.tensors[0].elements.has_value());

  same.index().facts[2].fingerprint.reset();
  const DiffReport unknown = DiffFingerprints(a.index(), same.index());
  EXPECT_EQ(unknown.verdict, Verdict::kUnknown);
  ASSERT_THAT(unknown.tensors, SizeIs(1));
  EXPECT_EQ(unknown.tensors[0].kind, Kind::kNotComparable);
  EXPECT_TRUE(unknown.tensors[0].a_has_fingerprint);
  EXPECT_FALSE(unknown.tensors[0].b_has_fingerprint);
  EXPECT_EQ(unknown.states_equal, 2u);
  // What differs for certain decides.
  EXPECT_EQ(DiffFingerprints(other.index(), same.index()).verdict, Verdict::kDifferent);
}

TEST(Diff, BlobsAreReportedAndAreNoPartOfTheVerdict) {
  Random random(6);
  const auto layout = Named({{"a", kFloats}});
  const Truths truths = RandomTruths(layout->tensor_states(), random);
  StoredCheckpoint a(*layout, truths, random);
  StoredCheckpoint b(*layout, truths, random);
  const std::string large(3 * kBlock + 5, 'x');
  for (StoredCheckpoint* stored : {&a, &b}) {
    const std::string mine = stored == &a ? "a" : "b";
    stored->AddBlob(BlobScope::kGlobal, 0, "args", "same");
    stored->AddBlob(BlobScope::kGlobal, 0, "empty", "");
    stored->AddBlob(BlobScope::kGlobal, 0, "large", large + mine);
    stored->AddBlob(BlobScope::kGlobal, 0, "length", std::string(stored == &a ? 3 : 4, 'y'));
    stored->AddBlob(BlobScope::kRank, 0, "rng", large);
    stored->AddBlob(BlobScope::kRank, stored == &a ? 1 : 2, "rng", "only");
  }
  a.Write();
  b.Write();
  const auto text = [](const DiffReport& report) {
    std::string found;
    for (const BlobDifference& blob : report.blobs) {
      absl::StrAppend(&found, std::string(BlobScopeName(blob.scope)), " ", blob.name, " ",
                      Value(blob.rank), ":", static_cast<int>(blob.kind), " ");
    }
    return found;
  };
  const DiffReport by_index = DiffFingerprints(a.index(), b.index());
  EXPECT_EQ(by_index.verdict, Verdict::kEqual);
  EXPECT_EQ(by_index.blobs_equal, 1u);
  EXPECT_EQ(text(by_index),
            "global args 0:3 global large 0:3 global length 0:2 rank rng 0:3 rank rng 1:0 "
            "rank rng 2:1 ");
  ASSERT_OK_AND_ASSIGN(const DiffReport by_bytes, Diff(a, b));
  EXPECT_EQ(by_bytes.verdict, Verdict::kEqual);
  EXPECT_EQ(by_bytes.blobs_equal, 3u);
  EXPECT_EQ(text(by_bytes), "global large 0:2 global length 0:2 rank rng 1:0 rank rng 2:1 ");
  EXPECT_THAT(by_bytes.blob_counts, ElementsAre(1, 1, 2, 0));
}

// ---- Damage, and stopping ----

TEST(DiffBytes, DamageOfEitherIsNamedWithItsPlace) {
  Random random(7);
  const auto rows = MatrixLayout(4, 64, 100, CutOver(0));
  const auto columns = MatrixLayout(2, 64, 100, CutOver(1));
  Pair pair(*rows, *columns, random);
  const auto files = NewPosixFileSystem();
  const auto rewrite = [&](StoredCheckpoint& stored, std::span<const std::byte> bytes) {
    CHECK_OK(files->Unlink(stored.PathOf(1)));
    const auto file = files->CreateNew(stored.PathOf(1));
    CHECK_OK(file.status());
    CHECK_OK((*file)->Append(bytes));
  };
  for (StoredCheckpoint* stored : {&pair.a, &pair.b}) {
    ASSERT_OK(Diff(pair.a, pair.b));
    const std::vector<std::byte> good = stored->image(1);
    std::vector<std::byte> bad = good;
    bad[stored->index().pieces[1].offset_bytes] ^= std::byte{1};
    rewrite(*stored, bad);
    EXPECT_THAT(Diff(pair.a, pair.b).status(),
                StatusIs(absl::StatusCode::kDataLoss,
                         AllOf(HasSubstr(stored->PathOf(1)), HasSubstr("expected CRC32C"),
                               HasSubstr("w (param)"))));
    rewrite(*stored, std::span(good).first(kBlock / 2));
    EXPECT_THAT(Diff(pair.a, pair.b).status(),
                StatusIs(absl::StatusCode::kDataLoss,
                         AllOf(HasSubstr(stored->PathOf(1)), HasSubstr("found 2048"))));
    rewrite(*stored, good);
    const IndexPiece piece = stored->index().pieces.back();
    stored->index().pieces.pop_back();
    EXPECT_THAT(Diff(pair.a, pair.b).status(),
                StatusIs(absl::StatusCode::kDataLoss,
                         AllOf(HasSubstr(stored->directory()), HasSubstr("\"w\""))));
    stored->index().pieces.push_back(piece);
  }
}

TEST(DiffBytes, AFingerprintThatLiesIsDamageOfItsCheckpoint) {
  Random random(8);
  Pair pair(*MatrixLayout(4, 64, 100, CutOver(0)), *MatrixLayout(2, 64, 100, CutOver(1)), random);
  for (StoredCheckpoint* stored : {&pair.a, &pair.b}) {
    const std::optional<Fingerprint> right = stored->index().facts[0].fingerprint;
    stored->index().facts[0].fingerprint = *right + Fingerprint(1);
    ASSERT_OK_AND_ASSIGN(const DiffReport report, Diff(pair.a, pair.b));
    EXPECT_EQ(report.verdict, Verdict::kEqual);
    EXPECT_EQ(report.damage_count, 1u);
    EXPECT_THAT(report.damage, ElementsAre(AllOf(HasSubstr(stored->directory()), HasSubstr("\"w\""),
                                                 HasSubstr(absl::StrCat("found ", right->Hex())))));
    stored->index().facts[0].fingerprint = right;
  }
  // Contents that were changed under good checksums, by the fingerprint that stayed.
  pair.b.image(1)[pair.b.index().pieces[1].offset_bytes] ^= std::byte{1};
  for (uint32_t i = 0; i < 2; ++i) CHECK_OK(NewPosixFileSystem()->Unlink(pair.b.PathOf(i)));
  pair.b.Write();
  EXPECT_EQ(DiffFingerprints(pair.a.index(), pair.b.index()).verdict, Verdict::kEqual);
  ASSERT_OK_AND_ASSIGN(const DiffReport report, Diff(pair.a, pair.b));
  EXPECT_EQ(report.verdict, Verdict::kDifferent);
  EXPECT_THAT(report.damage, ElementsAre(HasSubstr(pair.b.directory())));
}

// An index may say that a piece is stored twice; that counts as one.
TEST(DiffBytes, ReplicasCountOnce) {
  Random random(9);
  const auto layout = MatrixLayout(2, 64, 100, CutOver(1));
  const Truths truths = RandomTruths(layout->tensor_states(), random);
  StoredCheckpoint a(*layout, truths, random);
  for (int copies = 0; copies < 2; ++copies) {
    IndexPiece copy = a.index().pieces[0];
    const uint64_t bytes = copy.piece.ElementCount() * 2;
    std::vector<std::byte>& from = a.image(copy.image);
    std::vector<std::byte>& to = a.image(1);
    const std::vector<std::byte> contents(
        from.begin() + static_cast<ptrdiff_t>(copy.offset_bytes),
        from.begin() + static_cast<ptrdiff_t>(copy.offset_bytes + bytes));
    copy.image = 1;
    copy.offset_bytes = to.size();
    to.insert(to.end(), contents.begin(), contents.end());
    to.resize((to.size() + kBlock - 1) / kBlock * kBlock);
    a.index().pieces.push_back(copy);
  }
  SortIndex(a.index());
  StoredCheckpoint b(*MatrixLayout(2, 64, 100, CutOver(0)), truths, random);
  a.Write();
  b.Write();
  for (const bool first : {true, false}) {
    ASSERT_OK_AND_ASSIGN(const DiffReport report, first ? Diff(a, b) : Diff(b, a));
    ExpectReport(report, truths, truths);
  }
}

TEST(DiffBytes, StopsWhenItIsToldTo) {
  Random random(10);
  const Pair pair(*MatrixLayout(4, 512, 400, CutOver(0)), *MatrixLayout(2, 512, 400, CutOver(1)),
                  random);
  DiffOptions options = Memory(0);
  options.threads.comparers_max = 1;  // so that each window ends with a call
  uint64_t calls = 0;
  uint64_t total = 0;
  options.progress = [&](uint64_t done, uint64_t bytes) {
    EXPECT_LE(done, bytes);
    total = bytes;
    return ++calls < 3;
  };
  EXPECT_THAT(DiffBytes(*NewPosixFileSystem(), PlainReadAt(), {pair.a.directory(), pair.a.index()},
                        {pair.b.directory(), pair.b.index()}, Caching::kBuffered, options)
                  .status(),
              StatusIs(absl::StatusCode::kCancelled));
  EXPECT_EQ(calls, 3u);
  EXPECT_GE(total, 2 * 512 * 400 * 2u);
}

TEST(DiffBytes, BlobsAreInTheProgressAndCanBeStopped) {
  Random random(11);
  const auto layout = Named({{"a", kFloats}});
  const Truths truths = RandomTruths(layout->tensor_states(), random);
  StoredCheckpoint a(*layout, truths, random);
  StoredCheckpoint b(*layout, truths, random);
  const std::string large(5 * kBlock, 'x');
  for (StoredCheckpoint* stored : {&a, &b}) {
    stored->AddBlob(BlobScope::kGlobal, 0, "differs", (stored == &a ? "a" : "b") + large);
    stored->AddBlob(BlobScope::kGlobal, 0, "same", large);
    stored->Write();
  }
  const uint64_t blob_bytes = 2 * (large.size() + 1) + 2 * large.size();
  DiffOptions options = Memory(0);
  options.threads.comparers_max = 1;
  std::vector<uint64_t> done;
  uint64_t total = 0;
  uint64_t calls_max = UINT64_MAX;
  options.progress = [&](uint64_t bytes_done, uint64_t bytes) {
    done.push_back(bytes_done);
    total = bytes;
    return done.size() < calls_max;
  };
  const auto compare = [&] {
    done.clear();
    return DiffBytes(*NewPosixFileSystem(), PlainReadAt(), {a.directory(), a.index()},
                     {b.directory(), b.index()}, Caching::kBuffered, options)
        .status();
  };
  ASSERT_OK(compare());
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_GT(total, blob_bytes);
  EXPECT_EQ(done.back(), total);
  // At every call: of the tensors first, and then at each part of a blob.
  const uint64_t calls = done.size();
  ASSERT_GE(calls, 6u);
  for (calls_max = 1; calls_max <= calls; ++calls_max) {
    EXPECT_THAT(compare(), StatusIs(absl::StatusCode::kCancelled));
    EXPECT_EQ(done.size(), calls_max);
  }
}

TEST(DiffBytes, AThreadThatCannotBeStartedEndsItInAnErrorWhicheverItIs) {
  Random random(12);
  // So many blocks in so few slots that readers wait for comparers.
  const Pair pair(*MatrixLayout(4, 512, 400, CutOver(0)), *MatrixLayout(2, 512, 400, CutOver(1)),
                  random);
  for (uint64_t fails_at = 0;; ++fails_at) {
    DiffOptions options = Memory(0);
    uint64_t started = 0;
    bool failed = false;
    options.threads.start = [&](std::function<void()> body) {
      if (started++ == fails_at) {
        failed = true;
        throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
      }
      return std::jthread(std::move(body));
    };
    const absl::Status status =
        DiffBytes(*NewPosixFileSystem(), PlainReadAt(), {pair.a.directory(), pair.a.index()},
                  {pair.b.directory(), pair.b.index()}, Caching::kBuffered, options)
            .status();
    if (!failed) {
      EXPECT_OK(status);
      EXPECT_GE(fails_at, 6u);  // every reader was one of them
      return;
    }
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted,
                                 HasSubstr(absl::StrCat("thread ", fails_at + 1, " of"))));
  }
}

TEST(Diff, ACoordinateIsThatOfTheRowMajorOrder) {
  const std::vector<uint64_t> shape{2, 3, 4};
  uint64_t element = 0;
  for (uint64_t i = 0; i < 2; ++i) {
    for (uint64_t j = 0; j < 3; ++j) {
      for (uint64_t k = 0; k < 4; ++k) {
        EXPECT_THAT(CoordinatesOf(shape, element++), ElementsAre(i, j, k));
      }
    }
  }
  EXPECT_THAT(CoordinatesOf({}, 0), IsEmpty());
}

}  // namespace
}  // namespace holdfast
