// Goal: the layout grammar says what data-parallel frameworks do: DDP, DeepSpeed's ZeRO in all its
// stages, PyTorch's FSDP, and what is ragged.
// Method: each case deals a model out by the framework's own rule (format/framework_simulators.h),
// in sizes from zero to uneven primes, writes the document of it as a user would, and compares what
// the library reads in it cell by cell, padding included.
#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "format/framework_layouts_testing.h"
#include "format/framework_simulators.h"
#include "gtest/gtest.h"

namespace holdfast::frameworks {
namespace {

TEST(FrameworkLayouts, DataParallelRanksHoldEverything) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    World world(dp);
    Document document({{"dp", dp}});
    for (const Named& tensor : draw.Tensors()) {
      for (uint64_t rank = 0; rank < dp; ++rank) {
        world.PutAlone(rank, "param", tensor.name, Whole(tensor));
        world.PutAlone(rank, "exp_avg", tensor.name, Whole(tensor));
      }
      document.Tensor(tensor, {{"param", "bfloat16"}, {"exp_avg", "float32"}});
    }
    return ExpectSays(document, world);
  });
}

// ---- ZeRO-1 and -2 ----

// Two parameter groups on dp ranks: weights are views of one flat buffer, the states of the
// optimizer are its partitions, in fp32.
struct ZeroJob {
  uint64_t dp = 1;
  std::vector<std::vector<Named>> groups;
  ZeroFlatRule rule;
};

ZeroJob DrawZeroJob(Draw& draw) {
  ZeroJob job;
  job.dp = draw.Degree();
  job.groups = {draw.Tensors(), draw.Tensors()};
  for (Named& tensor : job.groups[1]) tensor.name += ".bias";
  return job;
}

World ZeroWorld(const ZeroJob& job) {
  World world(job.dp);
  for (size_t g = 0; g < job.groups.size(); ++g) {
    const std::vector<Array> group = WholeOfEach(job.groups[g]);
    const std::vector<Cell> flat = ZeroFlatGroup(group, job.dp, job.rule);
    const std::vector<Array> partitions = ZeroPartitions(group, job.dp, job.rule);
    for (uint64_t rank = 0; rank < job.dp; ++rank) {
      world.Put(rank, absl::StrCat("bit16/", g), "param", {{flat.size()}, flat});
      for (const char* state : {"fp32", "exp_avg", "exp_avg_sq"}) {
        world.Put(rank, absl::StrCat(state, "/", g), state, partitions[rank]);
      }
    }
  }
  return world;
}

// `one` is an axis of one rank: a pack over it is one buffer that is not cut.
Document ZeroDocument(const ZeroJob& job) {
  Document document({{"dp", job.dp}, {"one", 1}});
  for (size_t g = 0; g < job.groups.size(); ++g) {
    const uint64_t align = job.rule.alignment_elements;
    document.AddPack(absl::StrCat("bit16/", g), "one", align, 2 * job.dp);
    for (const char* state : {"fp32", "exp_avg", "exp_avg_sq"}) {
      document.AddPack(absl::StrCat(state, "/", g), "dp", align, 2);
    }
    std::vector<size_t> order(job.groups[g].size());
    std::iota(order.begin(), order.end(), size_t{0});
    if (job.rule.round_robin) {
      std::stable_sort(order.begin(), order.end(),
                       [&](size_t a, size_t b) { return a % job.dp < b % job.dp; });
    }
    for (size_t i : order) {
      std::vector<StateLine> states = {
          {"param", "bfloat16", Place({Pack(absl::StrCat("bit16/", g))})}};
      for (const char* state : {"fp32", "exp_avg", "exp_avg_sq"}) {
        states.push_back({state, "float32", Place({Pack(absl::StrCat(state, "/", g))})});
      }
      document.Tensor(job.groups[g][i], states);
    }
  }
  return document;
}

TEST(FrameworkLayouts, Zero12FlatGroupsArePaddedToTwiceDpAndCutEvenly) {
  ForManySizes([](Draw& draw) {
    const ZeroJob job = DrawZeroJob(draw);
    return ExpectSays(ZeroDocument(job), ZeroWorld(job));
  });
}

TEST(FrameworkLayouts, ZeroAlignmentPaddingsStandBetweenParameters) {
  ForManySizes([](Draw& draw) {
    ZeroJob job = DrawZeroJob(draw);
    job.rule.alignment_elements = draw.Of({4, 8});  // 16 bytes of float32, bfloat16
    return ExpectSays(ZeroDocument(job), ZeroWorld(job));
  });
}

TEST(FrameworkLayouts, ZeroRoundRobinIsAnotherOrderOfTheTensors) {
  ForManySizes([](Draw& draw) {
    ZeroJob job = DrawZeroJob(draw);
    job.rule.round_robin = true;
    job.rule.alignment_elements = draw.Of({1, 8});
    return ExpectSays(ZeroDocument(job), ZeroWorld(job));
  });
}

// Weights that are no views of the flat buffer, replicated; masters and moments keep the tail.
TEST(FrameworkLayouts, Bf16OptimizerHasReplicatedWeightsAndWholePartitions) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const std::vector<Named> group = draw.Tensors();
    const std::vector<Array> partitions = ZeroPartitions(WholeOfEach(group), dp, {});
    World world(dp);
    Document document({{"dp", dp}});
    document.AddPack("fp32", "dp", 1, 2).AddPack("exp_avg", "dp", 1, 2);
    for (const Named& tensor : group) {
      document.Tensor(tensor, {{"param", "bfloat16"},
                               {"fp32", "float32", Place({Pack("fp32")})},
                               {"exp_avg", "float32", Place({Pack("exp_avg")})}});
      for (uint64_t rank = 0; rank < dp; ++rank) {
        world.PutAlone(rank, "param", tensor.name, Whole(tensor));
      }
    }
    for (uint64_t rank = 0; rank < dp; ++rank) {
      world.Put(rank, "fp32", "fp32", partitions[rank]);
      world.Put(rank, "exp_avg", "exp_avg", partitions[rank]);
    }
    return ExpectSays(document, world);
  });
}

// A stage is one number of the document; nothing else in it changes.
TEST(FrameworkLayouts, TheStageOfTheZeroRuleSaysWhatIsCut) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const uint64_t stage = draw.Below(4);
    const std::vector<Named> tensors = draw.Tensors();
    World world(dp);
    Document document({{"dp", dp}});
    document.Zero(stage, "dp").AddPack("flat", "dp", 1, 2);
    for (const Named& tensor : tensors) {
      document.Tensor(tensor, {{"param", "bfloat16", Place({ZeroCut("ceil")})},
                               {"grad", "bfloat16", Place({ZeroCut("ceil")})},
                               {"exp_avg", "float32", Place({ZeroPack("flat")})}});
    }
    const std::vector<Array> partitions = ZeroPartitions(WholeOfEach(tensors), dp, {});
    for (uint64_t rank = 0; rank < dp; ++rank) {
      for (const Named& tensor : tensors) {
        const Array whole = Whole(tensor);
        const Array part = Chunk(Flatten(whole), dp, 0)[rank];
        world.PutAlone(rank, "param", tensor.name, stage >= 3 ? part : whole);
        world.PutAlone(rank, "grad", tensor.name, stage >= 2 ? part : whole);
        if (stage == 0) world.PutAlone(rank, "exp_avg", tensor.name, whole);
      }
      if (stage > 0) world.Put(rank, "flat", "exp_avg", partitions[rank]);
    }
    return ExpectSays(document, world);
  });
}

// Each stage and tensor-parallel rank flattens what it has itself: packs that differ in size and
// members.
TEST(FrameworkLayouts, ZeroPacksTheLocalTensorsOfStagesAndTensorParallelRanks) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Of({1, 2, 3});
    const uint64_t dp = draw.Of({1, 2, 3});
    const uint64_t tp = draw.Of({1, 2});
    World world(pp * dp * tp);
    Document document({{"pp", pp}, {"dp", dp}, {"tp", tp}});
    document.AddPack("exp_avg", "dp", 1, 2);
    std::vector<Named> tensors;  // number i is on stage i % pp; the last one on all
    for (uint64_t i = 0; i < pp + 2; ++i) {
      tensors.push_back({absl::StrCat("t", i), {draw.Size(), draw.Size()}});
      std::vector<std::string> ops;
      if (i < pp + 1) ops = {PlaceAt("pp", {static_cast<int64_t>(i % pp)})};
      ops.push_back(Shard(0, "tp", "ceil"));
      ops.push_back(Pack("exp_avg"));
      document.Tensor(tensors.back(), {{"exp_avg", "float32", Place(ops)}});
    }
    for (uint64_t p = 0, rank = 0; p < pp; ++p) {
      for (uint64_t d = 0; d < dp; ++d) {
        for (uint64_t t = 0; t < tp; ++t, ++rank) {
          std::vector<Array> mine;
          for (uint64_t i = 0; i < tensors.size(); ++i) {
            if (i % pp == p || i == pp + 1) mine.push_back(Chunk(Whole(tensors[i]), tp, 0)[t]);
          }
          world.Put(rank, "exp_avg", "exp_avg", ZeroPartitions(mine, dp, {})[d]);
        }
      }
    }
    return ExpectSays(document, world);
  });
}

// Whole parameters, of which one that straddles a cut is on two ranks at two places: listed.
TEST(FrameworkLayouts, MuonMomentumIsListedAsWholeParametersOfThePartitionsTheyTouch) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    std::vector<Named> tensors(1 + draw.Below(5));
    for (size_t i = 0; i < tensors.size(); ++i) {
      tensors[i] = {absl::StrCat("t", i), {draw.Some(), draw.Some()}};
    }
    World world(dp);
    const std::vector<Array> momentum = MuonMomentum(WholeOfEach(tensors), dp);
    for (uint64_t rank = 0; rank < dp; ++rank) {
      world.Put(rank, "muon", "momentum_buffer", momentum[rank]);
    }
    uint64_t total = 0;
    for (const Named& tensor : tensors) total += Numel(tensor.shape);
    const uint64_t partition = (total + 2 * dp - 1) / (2 * dp) * 2;
    std::vector<uint64_t> used_bytes(dp, 0);
    Document document({{"dp", dp}});
    uint64_t begin = 0;
    for (const Named& tensor : tensors) {
      const uint64_t end = begin + Numel(tensor.shape);
      Listed listed;
      for (uint64_t rank = begin / partition; rank <= (end - 1) / partition; ++rank) {
        listed.Add({rank}, {0, 0}, tensor.shape, used_bytes[rank]);
        used_bytes[rank] += 2 * (end - begin);
      }
      document.Tensor(tensor, {{.state = "momentum_buffer",
                                .dtype = "bfloat16",
                                .buffer = "muon",
                                .segments = listed.Json()}});
      begin = end;
    }
    return ExpectSays(document, world);
  });
}

// ---- ZeRO-3 and its partial forms ----

// ceil(numel / dp) places on every rank: the flat tensor, padded, and cut evenly.
std::vector<std::string> PaddedPartition(const std::string& axis) {
  return {View({-1}), Pad(0, 1, axis), Shard(0, axis, "even")};
}
std::vector<std::string> Then(std::vector<std::string> ops, const std::string& last) {
  ops.push_back(last);
  return ops;
}

TEST(FrameworkLayouts, Zero3PartitionsEachTensorAndSubGroupsLieOneBehindTheOther) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const std::vector<Named> tensors = draw.Tensors();
    const uint64_t sub_group_size = draw.Of({1, 10, 50, 1000});
    const auto sub_groups = Zero3SubGroups(WholeOfEach(tensors), dp, sub_group_size);
    World world(dp);
    Document document({{"dp", dp}, {"one", 1}});
    document.AddPack("fp32", "one", 1, 1);
    // A buffer for each sub-group besides, in which the user counts as DeepSpeed does.
    std::vector<size_t> group_of;
    uint64_t filled = 0;
    size_t group = 0;
    for (const Named& tensor : tensors) {
      group_of.push_back(group);
      filled += (Numel(tensor.shape) + dp - 1) / dp;
      if (filled < sub_group_size) continue;
      filled = 0;
      ++group;
    }
    for (size_t g = 0; g <= group_of.back(); ++g) {
      document.AddPack(absl::StrCat("exp_avg/", g), "one", 1, 1);
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      const std::string exp_avg = Pack(absl::StrCat("exp_avg/", group_of[i]));
      document.Tensor(tensors[i],
                      {{"param", "bfloat16", Place({FlatCut("dp", "ceil")})},
                       {"fp32", "float32", Place(Then(PaddedPartition("dp"), Pack("fp32")))},
                       {"exp_avg", "float32", Place(Then(PaddedPartition("dp"), exp_avg))}});
    }
    for (uint64_t rank = 0; rank < dp; ++rank) {
      for (const Named& tensor : tensors) {
        world.PutAlone(rank, "param", tensor.name, Chunk(Flatten(Whole(tensor)), dp, 0)[rank]);
      }
      for (size_t g = 0; g < sub_groups[rank].size(); ++g) {
        world.Put(rank, "fp32", "fp32", sub_groups[rank][g]);
        world.Put(rank, absl::StrCat("exp_avg/", g), "exp_avg", sub_groups[rank][g]);
      }
    }
    return ExpectSays(document, world);
  });
}

TEST(FrameworkLayouts, MicsIsZero3InsideTheShardGroupAndReplicatedAcross) {
  ForManySizes([](Draw& draw) {
    const uint64_t repl = draw.Degree();
    const uint64_t shard = draw.Degree();
    const std::vector<Named> tensors = draw.Tensors();
    const auto partitions = Zero3SubGroups(WholeOfEach(tensors), shard, 1'000'000);
    World world(repl * shard);
    for (uint64_t r = 0; r < repl; ++r) {
      for (uint64_t s = 0; s < shard; ++s) {
        world.Put(r * shard + s, "fp32", "fp32", partitions[s][0]);
      }
    }
    Document document({{"repl", repl}, {"shard", shard}, {"one", 1}});
    document.AddPack("fp32", "one", 1, 1);
    for (const Named& tensor : tensors) {
      document.Tensor(tensor,
                      {{"fp32", "float32", Place(Then(PaddedPartition("shard"), Pack("fp32")))}});
    }
    return ExpectSays(document, world);
  });
}

TEST(FrameworkLayouts, HsdpIsFsdpInsideTheShardGroupAndReplicatedAcross) {
  ForManySizes([](Draw& draw) {
    const uint64_t repl = draw.Degree();
    const uint64_t shard = draw.Degree();
    World world(repl * shard);
    Document document({{"repl", repl}, {"shard", shard}});
    for (const Named& tensor : draw.Tensors(/*dims_min=*/1)) {
      document.Tensor(tensor, {{"param", "float32", Place({Shard(0, "shard", "ceil")})}});
      for (uint64_t r = 0; r < repl; ++r) {
        for (uint64_t s = 0; s < shard; ++s) {
          world.PutAlone(r * shard + s, "param", tensor.name, Chunk(Whole(tensor), shard, 0)[s]);
        }
      }
    }
    return ExpectSays(document, world);
  });
}

// The secondary copy is a state of its own, cut over the ranks of a node.
TEST(FrameworkLayouts, HpzCutsPrimaryPartitionsOverAllAndSecondaryOnesOverANode) {
  ForManySizes([](Draw& draw) {
    const uint64_t nodes = draw.Degree();
    const uint64_t local = draw.Degree();
    World world(nodes * local);
    Document document({{"node", nodes}, {"local", local}});
    for (const Named& tensor : draw.Tensors()) {
      document.Tensor(tensor, {{"param", "bfloat16", Place({FlatCut("node,local", "ceil")})},
                               {"secondary", "bfloat16", Place({FlatCut("local", "ceil")})},
                               {"fp32", "float32", Place(PaddedPartition("node,local"))}});
      const std::vector<Array> primary = Chunk(Flatten(Whole(tensor)), nodes * local, 0);
      const auto padded = Zero3SubGroups({Whole(tensor)}, nodes * local, 1'000'000);
      for (uint64_t rank = 0; rank < nodes * local; ++rank) {
        world.PutAlone(rank, "param", tensor.name, primary[rank]);
        world.PutAlone(rank, "secondary", tensor.name,
                       Chunk(Flatten(Whole(tensor)), local, 0)[rank % local]);
        world.PutAlone(rank, "fp32", tensor.name, padded[rank][0]);
      }
    }
    return ExpectSays(document, world);
  });
}

// ---- FSDP ----

TEST(FrameworkLayouts, Fsdp1UnitsAreFlatAndPaddedByTheRuleOfOriginalParameters) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const bool use_orig_params = draw.Coin();
    World world(dp);
    Document document({{"dp", dp}});
    for (int unit = 0; unit < 2; ++unit) {
      std::vector<Named> tensors = draw.Tensors();
      for (Named& tensor : tensors) tensor.name = absl::StrCat("unit", unit, ".", tensor.name);
      const std::string flat = absl::StrCat("unit", unit, "._flat_param");
      const auto shards = Fsdp1Shards(WholeOfEach(tensors), dp, use_orig_params, 4);
      for (uint64_t rank = 0; rank < dp; ++rank) world.Put(rank, flat, "param", shards[rank]);
      document.AddPack(flat, "dp", use_orig_params ? 4 : 1, 1);
      for (const Named& tensor : tensors) {
        document.Tensor(tensor, {{"param", "float32", Place({Pack(flat)})}});
      }
    }
    return ExpectSays(document, world);
  });
}

// The optimizer's half-precision states have an alignment of their own: 16 bytes are 8 elements.
TEST(FrameworkLayouts, Fsdp1AlignsToSixteenBytesOfEachDtype) {
  const std::vector<Named> unit = {{"a", {3, 5}}, {"b", {7}}, {"c", {1}}};
  World world(3);
  Document document({{"dp", 3}});
  document.AddPack("flat16", "dp", 8, 1).AddPack("flat32", "dp", 4, 1);
  for (uint64_t rank = 0; rank < 3; ++rank) {
    world.Put(rank, "flat16", "param", Fsdp1Shards(WholeOfEach(unit), 3, true, 2)[rank]);
    world.Put(rank, "flat32", "exp_avg", Fsdp1Shards(WholeOfEach(unit), 3, true, 4)[rank]);
  }
  for (const Named& tensor : unit) {
    document.Tensor(tensor, {{"param", "bfloat16", Place({Pack("flat16")})},
                             {"exp_avg", "float32", Place({Pack("flat32")})}});
  }
  EXPECT_EQ(ExpectSays(document, world), 2u * (15 + 7 + 1));
}

// Rows by torch.chunk; the storage that a scatter left is as long as that of rank 0.
TEST(FrameworkLayouts, Fsdp2ChunksRowsAndMayKeepThePaddedStorage) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    World world(dp);
    Document document({{"dp", dp}});
    for (const Named& tensor : draw.Tensors(/*dims_min=*/1)) {
      document.Tensor(tensor,
                      {{"param", "float32", Place({Shard(0, "dp", "ceil")})},
                       {"storage", "float32", Place({Pad(0, 1, "dp"), Shard(0, "dp", "even")})}});
      const std::vector<Array> chunks = Chunk(Whole(tensor), dp, 0);
      for (uint64_t rank = 0; rank < dp; ++rank) {
        world.PutAlone(rank, "param", tensor.name, chunks[rank]);
        world.PutAlone(rank, "storage", tensor.name, PadTo(chunks[rank], 0, chunks[0].shape[0]));
      }
    }
    return ExpectSays(document, world);
  });
}

// Mesh (dp, tp): the tensor-parallel shard is cut again by FSDP, so tp is the outer cut though dp
// is the outer axis.
TEST(FrameworkLayouts, Fsdp2CutsInsideTheTensorParallelShardOnAnyDimension) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const uint64_t tp = draw.Degree();
    const Named tensor{"w", {draw.Size(), draw.Size(), draw.Size()}};
    const size_t dim = draw.Below(3);  // of the tensor-parallel cut
    World world(dp * tp);
    for (uint64_t d = 0; d < dp; ++d) {
      for (uint64_t t = 0; t < tp; ++t) {
        world.PutAlone(d * tp + t, "param", "w", Chunk(Chunk(Whole(tensor), tp, dim)[t], dp, 0)[d]);
      }
    }
    Document document({{"dp", dp}, {"tp", tp}});
    document.Tensor(
        tensor, {{"param", "float32", Place({Shard(dim, "tp", "ceil"), Shard(0, "dp", "ceil")})}});
    return ExpectSays(document, world);
  });
}

TEST(FrameworkLayouts, FiftyRowsOverTwoTimesThreeAreNineNineSevenOfEachHalf) {
  World world(6);
  for (uint64_t d = 0, rank = 0; d < 3; ++d) {
    for (uint64_t t = 0; t < 2; ++t, ++rank) {
      const std::vector<uint64_t> starts = {0, 9, 18};
      const std::vector<uint64_t> sizes = {9, 9, 7};
      world.PutAlone(rank, "param", "w",
                     Narrow(Whole({"w", {50, 2}}), 0, t * 25 + starts[d], sizes[d]));
    }
  }
  Document document({{"dp", 3}, {"tp", 2}});
  document.Tensor({"w", {50, 2}},
                  {{"param", "float32", Place({Shard(0, "tp", "even"), Shard(0, "dp", "ceil")})}});
  EXPECT_EQ(ExpectSays(document, world), 100u);
}

// DTensor's placements [_StridedShard(dim, split_factor = tp), Shard(dim)] on (dp, tp), axis by
// axis, are the reversed nesting.
TEST(FrameworkLayouts, StridedShardThenShardIsTheReversedNesting) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const uint64_t tp = draw.Degree();
    const size_t dim = draw.Below(3);
    Named tensor{"w", {draw.Size(), draw.Size(), draw.Size()}};
    tensor.shape[dim] = draw.Below(40);
    World world(dp * tp);
    for (uint64_t d = 0; d < dp; ++d) {
      const Array of_dp = StridedShard(Whole(tensor), dim, tp, dp, d);
      for (uint64_t t = 0; t < tp; ++t) {
        world.PutAlone(d * tp + t, "param", "w", Chunk(of_dp, tp, dim)[t]);
      }
    }
    Document document({{"dp", dp}, {"tp", tp}});
    document.Tensor(tensor, {{"param", "float32",
                              Place({Shard(dim, "tp", "ceil"), Shard(dim, "dp", "ceil")})}});
    return ExpectSays(document, world);
  });
}

// Without a cut by the other axis a rank keeps a part of each block: a view shows the blocks.
TEST(FrameworkLayouts, StridedShardAloneIsAViewOfItsBlocks) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const uint64_t split_factor = draw.Degree();
    const uint64_t block = draw.Size();
    const Named tensor{"w", {3, split_factor * block, 2}};
    World world(dp);
    for (uint64_t d = 0; d < dp; ++d) {
      world.PutAlone(d, "param", "w", StridedShard(Whole(tensor), 1, split_factor, dp, d));
    }
    Document document({{"dp", dp}});
    document.Tensor(
        tensor,
        {{"param", "float32",
          Place({View({3, static_cast<int64_t>(split_factor), static_cast<int64_t>(block), 2}),
                 Shard(2, "dp", "ceil")})}});
    return ExpectSays(document, world);
  });
}

// ---- Ragged ----

TEST(FrameworkLayouts, RaggedShardsAreFlatCutsOfListedSizesInsideTensorParallelShards) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const uint64_t tp = draw.Of({1, 2, 3});
    const uint64_t units = draw.Some();
    const uint64_t unit = draw.Size();  // elements
    const Named tensor{"w", {tp * units, unit}};
    const std::vector<uint64_t> local_units = draw.Parts(units, dp);
    std::vector<uint64_t> sizes;
    for (uint64_t count : local_units) sizes.push_back(count * unit);
    World world(dp * tp);
    for (uint64_t t = 0; t < tp; ++t) {
      const auto shards = RaggedShards(Chunk(Whole(tensor), tp, 0)[t], local_units);
      for (uint64_t d = 0; d < dp; ++d) world.PutAlone(d * tp + t, "param", "w", shards[d]);
    }
    Document document({{"dp", dp}, {"tp", tp}});
    document.Tensor(
        tensor, {{"param", "float32", Place({Shard(0, "tp", "even"), FlatSizes("dp", sizes)})}});
    return ExpectSays(document, world);
  });
}

// Megatron-FSDP's DTensor checkpoints: 48 rows as 33 and 15, 256 as 1 and 255.
TEST(FrameworkLayouts, MegatronFsdpShardsRowsByListedSizes) {
  World world(2);
  const std::vector<std::vector<uint64_t>> rows = {{33, 15}, {1, 255}};
  Document document({{"dp", 2}});
  for (size_t i = 0; i < rows.size(); ++i) {
    const Named tensor{absl::StrCat("w", i), {rows[i][0] + rows[i][1], 3}};
    document.Tensor(tensor, {{"param", "float32", Place({ShardSizes(0, "dp", rows[i])})}});
    const std::vector<Array> parts = Split(Whole(tensor), rows[i], 0);
    for (uint64_t rank = 0; rank < 2; ++rank) {
      world.PutAlone(rank, "param", tensor.name, parts[rank]);
    }
  }
  EXPECT_EQ(ExpectSays(document, world), 3u * (48 + 256));
}

}  // namespace
}  // namespace holdfast::frameworks
