// ParseDcpMetadata and its inverse, and what hostile metadata is refused for. Metadata that torch
// itself wrote, of several versions, is in the tests of the readers; that torch reads ours is in
// tests/interop.
#include "converter/dcp_metadata.h"

#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/pickle_writer.h"
#include "converter/dcp_encoding.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/status_matchers.h"

namespace holdfast::converter {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Two tensors, the first in two boxes, one object; everything is stored.
DcpMetadata Sample() {
  DcpMetadata metadata;
  metadata.version = "1.0.0";
  metadata.module = "torch.distributed.checkpoint.metadata";
  metadata.transforms = {{}, {"stream.zstd/1"}};
  metadata.files = {"__0_0.distcp", "__1_0.distcp"};
  metadata.numbers = {0, 0, 2, 3, 2, 0, 2, 3};
  metadata.chunks = {
      {.offsets = 0, .item = 0}, {.offsets = 4, .item = 1}, {.offsets = 8, .item = 2}};
  metadata.items = {
      {.offset_bytes = 100, .stored_bytes = 1577, .file = 0},
      {.offset_bytes = 0, .stored_bytes = uint64_t{1} << 40, .file = 1},
      {.offset_bytes = uint64_t{1} << 40, .stored_bytes = 7, .file = 1, .transforms = 1},
      {.offset_bytes = 0, .stored_bytes = 100, .file = 0}};
  metadata.tensors = {
      {.key = "model.a.weight",
       .path = {"model", "a.weight"},
       .dtype = "bfloat16",
       .requires_grad = true,
       .shape = {4, 3},
       .chunks_begin = 0,
       .chunks_end = 2},
      {.key = "step", .path = {"step"}, .dtype = "int64", .chunks_begin = 2, .chunks_end = 3}};
  metadata.objects = {{.key = "lr", .path = {"lr"}, .item = 3}};
  return metadata;
}

absl::StatusOr<DcpMetadata> Parse(const DcpMetadata& metadata) {
  return ParseDcpMetadata(EncodeDcpMetadata(metadata), ".metadata");
}

// Everything that was said, in words; the order of items may differ.
std::string Words(const DcpMetadata& metadata) {
  std::string words = metadata.version + "\n";
  const auto where = [&](uint32_t number) {
    if (number == kNoItem) return std::string(" nowhere");
    const DcpItem& item = metadata.items[number];
    std::string text = " in " + metadata.files[item.file] + " " +
                       std::to_string(item.offset_bytes) + "+" + std::to_string(item.stored_bytes);
    for (const std::string& name : metadata.transforms[item.transforms]) text += " " + name;
    return text;
  };
  for (const DcpTensor& tensor : metadata.tensors) {
    words += tensor.key + " " + testing::PrintToString(tensor.path) + tensor.dtype +
             testing::PrintToString(tensor.shape) + (tensor.requires_grad ? " grad\n" : "\n");
    for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
      const auto of = metadata.OffsetsOf(tensor, metadata.chunks[c]);
      const auto size = metadata.SizesOf(tensor, metadata.chunks[c]);
      words += "  " + testing::PrintToString(std::vector<uint64_t>(of.begin(), of.end())) +
               testing::PrintToString(std::vector<uint64_t>(size.begin(), size.end())) +
               where(metadata.chunks[c].item) + "\n";
    }
  }
  for (const DcpObject& object : metadata.objects) {
    words += object.key + " " + testing::PrintToString(object.path) + where(object.item) + "\n";
  }
  return words;
}

TEST(DcpMetadata, WhatIsWrittenReadsTheSame) {
  DcpMetadata metadata = Sample();
  ASSERT_OK_AND_ASSIGN(const DcpMetadata read, Parse(metadata));
  EXPECT_EQ(Words(read), Words(metadata));
  EXPECT_EQ(read.module, metadata.module);
  EXPECT_THAT(read.planner_order, ElementsAre("model.a.weight", "step", "lr"));
  EXPECT_EQ(EncodeDcpMetadata(metadata), EncodeDcpMetadata(metadata));
}

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

// The classes have moved: torch <= 1.13 had all of them elsewhere, torch <= 2.2 one of them.
TEST(DcpMetadata, ClassesAreKnownWhereverTheyHaveLived) {
  const DcpMetadata metadata = Sample();
  // In protocol 2 a class is two lines of text.
  const std::string now = EncodeDcpMetadata(metadata);
  const std::string old_properties =
      Replaced(now, "ctorch.distributed.checkpoint.metadata\nTensorProperties\n",
               "ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties\n");
  ASSERT_NE(old_properties, now);
  ASSERT_OK_AND_ASSIGN(const DcpMetadata torch_2_2, ParseDcpMetadata(old_properties, ".metadata"));
  EXPECT_EQ(Words(torch_2_2), Words(metadata));
  std::string all_old = Replaced(old_properties, "ctorch.distributed.checkpoint.",
                                 "ctorch.distributed._shard.checkpoint.");
  ASSERT_OK_AND_ASSIGN(const DcpMetadata torch_1_13, ParseDcpMetadata(all_old, ".metadata"));
  EXPECT_EQ(Words(torch_1_13), Words(metadata));
  EXPECT_EQ(torch_1_13.module, "torch.distributed._shard.checkpoint.metadata");
}

TEST(DcpMetadata, RandomMetadataReadsTheSame) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto below = [&random](uint64_t n) { return random() % n; };
  for (int round = 0; round < 200; ++round) {
    DcpMetadata metadata;
    metadata.transforms = {{}, {"a", "b"}};
    for (uint64_t i = 0, files = 1 + below(4); i < files; ++i) {
      metadata.files.push_back("f" + std::to_string(i));
    }
    const auto item = [&]() -> uint32_t {
      if (below(8) == 0) return kNoItem;
      metadata.items.push_back({.offset_bytes = random() >> 1,
                                .stored_bytes = below(100'000),
                                .file = static_cast<uint32_t>(below(metadata.files.size())),
                                .transforms = static_cast<uint32_t>(below(2))});
      return static_cast<uint32_t>(metadata.items.size() - 1);
    };
    for (uint64_t i = 0, tensors = below(6); i < tensors; ++i) {
      DcpTensor tensor{.key = "t" + std::to_string(i), .dtype = "float32"};
      for (uint64_t d = 0, dims = below(4); d < dims; ++d) tensor.shape.push_back(1 + below(9));
      if (below(2) == 0) tensor.path = {"t", std::to_string(i)};
      tensor.chunks_begin = metadata.chunks.size();
      // Rows of the first dimension; one whole chunk of a tensor without dimensions.
      const uint64_t rows = tensor.shape.empty() ? 1 : tensor.shape[0];
      for (uint64_t row = 0; row < rows; ++row) {
        metadata.chunks.push_back({metadata.numbers.size(), item()});
        for (size_t d = 0; d < tensor.shape.size(); ++d) {
          metadata.numbers.push_back(d == 0 ? row : 0);
        }
        for (size_t d = 0; d < tensor.shape.size(); ++d) {
          metadata.numbers.push_back(d == 0 ? 1 : tensor.shape[d]);
        }
      }
      tensor.chunks_end = metadata.chunks.size();
      metadata.tensors.push_back(std::move(tensor));
    }
    for (uint64_t i = 0, objects = below(4); i < objects; ++i) {
      metadata.objects.push_back({.key = "o" + std::to_string(i), .item = item()});
    }
    ASSERT_OK_AND_ASSIGN(const DcpMetadata read, Parse(metadata));
    ASSERT_EQ(Words(read), Words(metadata)) << "round " << round;
  }
}

TEST(DcpMetadata, PartsThatContradictEachOtherAreDamage) {
  const auto error = [](const std::function<void(DcpMetadata&)>& change) {
    DcpMetadata metadata = Sample();
    change(metadata);
    const auto read = Parse(metadata);
    EXPECT_EQ(read.status().code(), absl::StatusCode::kDataLoss) << read.status().ToString();
    return std::string(read.status().message());
  };
  EXPECT_THAT(
      error([](DcpMetadata& m) { m.numbers[6] = 3; }),
      HasSubstr(".metadata: model.a.weight: expected a chunk within 4 in dimension 0, found "
                "[2, 2 + 3)"));
  EXPECT_THAT(error([](DcpMetadata& m) { m.numbers[4] = INT64_MAX; }), HasSubstr("within 4"));
  // Two chunks at one place: the item of the second is where no chunk begins any more.
  EXPECT_THAT(error([](DcpMetadata& m) {
                m.tensors.push_back(m.tensors[0]);
                m.tensors[2].key = "step";  // a dict: the last one counts, of another shape
              }),
              HasSubstr("step"));
}

std::string Pickled(const std::function<void(PickleWriter&)>& write) {
  PickleWriter out;
  write(out);
  return std::move(out).Finish();
}

TEST(DcpMetadata, OtherClassesAreRefusedByName) {
  const auto refusal = [](const std::string& module, const std::string& name) {
    return ParseDcpMetadata(Pickled([&](PickleWriter& out) {
                              out.Global(module, name);
                              out.String("touch /tmp/owned");
                              out.Tuple(1);
                              out.Reduce();
                            }),
                            ".metadata")
        .status();
  };
  EXPECT_THAT(refusal("os", "system"),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("os.system")));
  EXPECT_THAT(refusal("torch.distributed.checkpoint.metadata", "StorageMeta"),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("StorageMeta")));
  EXPECT_THAT(ParseDcpMetadata("", ".metadata"), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(ParseDcpMetadata(Pickled([](PickleWriter& out) { out.None(); }), ".metadata"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a Metadata")));
}

// Whatever byte is lost or changed: a Status, or metadata that is sound in itself.
TEST(DcpMetadata, EveryTruncationAndChangeIsRefusedOrSound) {
  const std::string good = EncodeDcpMetadata(Sample());
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(ParseDcpMetadata(good.substr(0, size), ".metadata").ok()) << size;
  }
  for (size_t at = 0; at < good.size(); ++at) {
    for (const int flip : {1, 0x80}) {
      std::string changed = good;
      changed[at] = static_cast<char>(changed[at] ^ flip);
      const auto read = ParseDcpMetadata(changed, ".metadata");
      if (!read.ok()) continue;
      for (const DcpTensor& tensor : read->tensors) {
        for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
          const auto offsets = read->OffsetsOf(tensor, read->chunks[c]);
          const auto sizes = read->SizesOf(tensor, read->chunks[c]);
          for (size_t d = 0; d < offsets.size(); ++d) {
            EXPECT_LE(sizes[d], tensor.shape[d]);
            EXPECT_LE(offsets[d], tensor.shape[d] - sizes[d]);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace holdfast::converter
