// Goal: the layout grammar says what mixtures of experts, stacked tensors and Megatron-LM's
// distributed optimizer do.
// Method: as format/framework_layouts_test.cc.
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "format/framework_layouts_testing.h"
#include "format/framework_simulators.h"
#include "gtest/gtest.h"

namespace holdfast::frameworks {
namespace {

int64_t Signed(uint64_t value) { return static_cast<int64_t>(value); }

// ---- Experts ----

// Dense layers are on a mesh (pp, dp, tp), experts on (pp, edp, ep, etp) of the same ranks: expert
// e on expert-parallel rank e / (E / ep), its columns cut over etp, its moments packed over edp.
TEST(FrameworkExperts, ExpertsAreOnAMeshOfTheirOwnWithTheirMomentsPackedOverEdp) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Of({1, 2});
    const uint64_t edp = draw.Of({1, 2, 3});
    const uint64_t ep = draw.Of({1, 2, 3});
    const uint64_t etp = draw.Of({1, 2});
    const uint64_t tp = draw.Of({1, edp});
    const uint64_t dp = edp * ep * etp / tp;
    const uint64_t experts = ep * draw.Of({1, 2});
    World world(pp * dp * tp);
    Document document({{"pp", pp}, {"dp", dp}, {"tp", tp}});
    document.Mesh("experts", {{"pp", pp}, {"edp", edp}, {"ep", ep}, {"etp", etp}});
    document.AddPack("dense/exp_avg", "dp", 1, 2);
    document.AddPack("expert/exp_avg", "edp", 1, 2, "experts");
    for (uint64_t layer = 0; layer < pp; ++layer) {  // one of each kind for every stage
      const std::string stage = PlaceIndex("pp", layer, pp);
      const Named dense{absl::StrCat("l", layer, ".qkv"), {tp * draw.Some(), draw.Size()}};
      document.Tensor(dense, {{"param", "bfloat16", Place({stage, Shard(0, "tp", "even")})},
                              {"exp_avg", "float32",
                               Place({stage, Shard(0, "tp", "even"), Pack("dense/exp_avg")})}});
      std::vector<Named> expert;
      for (uint64_t e = 0; e < experts; ++e) {
        expert.push_back({absl::StrCat("l", layer, ".e", e), {etp * draw.Some(), draw.Some()}});
        const std::vector<std::string> ops = {stage, PlaceIndex("ep", e, experts),
                                              Shard(0, "etp", "even")};
        std::vector<std::string> packed = ops;
        packed.push_back(Pack("expert/exp_avg"));
        document.Tensor(expert.back(), {{"param", "bfloat16", PlaceOn("experts", ops)},
                                        {"exp_avg", "float32", PlaceOn("experts", packed)}});
      }
      const uint64_t first_rank = layer * dp * tp;
      for (uint64_t d = 0, rank = first_rank; d < dp; ++d) {
        for (uint64_t t = 0; t < tp; ++t, ++rank) {
          const Array local = Chunk(Whole(dense), tp, 0)[t];
          world.PutAlone(rank, "param", dense.name, local);
          world.Put(rank, "dense/exp_avg", "exp_avg", ZeroPartitions({local}, dp, {})[d]);
        }
      }
      for (uint64_t d = 0, rank = first_rank; d < edp; ++d) {
        for (uint64_t x = 0; x < ep; ++x) {
          for (uint64_t t = 0; t < etp; ++t, ++rank) {
            std::vector<Array> mine;
            for (uint64_t local = 0; local < experts / ep; ++local) {
              const Named& tensor = expert[x * (experts / ep) + local];
              mine.push_back(Chunk(Whole(tensor), etp, 0)[t]);
              world.PutAlone(rank, "param", tensor.name, mine.back());
            }
            world.Put(rank, "expert/exp_avg", "exp_avg", ZeroPartitions(mine, edp, {})[d]);
          }
        }
      }
    }
    return ExpectSays(document, world);
  });
}

// DeepSpeed-MoE: the group ep_size_N has a partition count of its own; rank r has expert-parallel
// rank r % ep and partition r / ep, and numbers its experts from 0.
TEST(FrameworkExperts, DeepSpeedMoeGroupsArePartitionedByTheExpertDataParallelSize) {
  ForManySizes([](Draw& draw) {
    const uint64_t ep = draw.Of({1, 2, 3});
    const uint64_t edp = draw.Of({1, 2, 3});
    const uint64_t dp = ep * edp;
    const uint64_t local_experts = draw.Of({1, 2, 3});
    const std::vector<Named> dense = draw.Tensors();
    std::vector<Named> experts;
    for (uint64_t e = 0; e < ep * local_experts; ++e) {
      experts.push_back({absl::StrCat("expert.", e), {draw.Some(), draw.Size()}});
    }
    World world(dp);
    const std::vector<Array> partitions = ZeroPartitions(WholeOfEach(dense), dp, {});
    for (uint64_t r = 0; r < dp; ++r) {
      world.Put(r, "group0", "fp32", partitions[r]);
      std::vector<Array> mine;
      for (uint64_t local = 0; local < local_experts; ++local) {
        mine.push_back(Whole(experts[local + (r % ep) * local_experts]));
      }
      world.Put(r, "ep_size", "fp32", ZeroPartitions(mine, edp, {})[r / ep]);
    }
    Document document({{"dp", dp}});
    document.Mesh("moe", {{"edp", edp}, {"ep", ep}});
    document.AddPack("group0", "dp", 1, 2).AddPack("ep_size", "edp", 1, 2, "moe");
    for (const Named& tensor : dense) {
      document.Tensor(tensor, {{"fp32", "float32", Place({Pack("group0")})}});
    }
    for (uint64_t e = 0; e < experts.size(); ++e) {
      document.Tensor(experts[e],
                      {{"fp32", "float32",
                        PlaceOn("moe", {PlaceIndex("ep", e, experts.size()), Pack("ep_size")})}});
    }
    return ExpectSays(document, world);
  });
}

// ---- Megatron's distributed optimizer ----

// The document's lines for a tensor of which the local part is packed in a bucket of its own name.
void AddBucketed(Document& document, const std::vector<MegatronBucket>& buckets,
                 const std::map<std::string, Named>& tensors,
                 const std::map<std::string, std::vector<std::string>>& ops, uint64_t dp,
                 uint64_t end_multiple, const std::string& mesh) {
  for (const MegatronBucket& bucket : buckets) {
    const std::string pack = absl::StrCat("bucket/", bucket.names[0]);
    document.AddPack(pack, mesh.empty() ? "dp" : "edp", 64, end_multiple / dp, mesh);
    for (const std::string& name : bucket.names) {
      std::vector<std::string> packed = ops.at(name);
      packed.push_back(Pack(pack));
      document.Tensor(tensors.at(name), {{"exp_avg", "float32",
                                          mesh.empty() ? Place(packed) : PlaceOn(mesh, packed)}});
    }
  }
}

void PutBuckets(World& world, uint64_t rank, const std::vector<MegatronBucket>& buckets,
                uint64_t dp, uint64_t dp_rank) {
  for (const MegatronBucket& bucket : buckets) {
    world.Put(rank, absl::StrCat("bucket/", bucket.names[0]), "exp_avg",
              MegatronShard(bucket, dp, dp_rank));
  }
}

TEST(FrameworkExperts, DistributedOptimizerBuffersAreReversedAlignedAndCutBucketByBucket) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Degree();
    const uint64_t tp = draw.Of({1, 2});
    const MegatronBufferRule rule{dp, draw.Of({0, 100, 300}), false};
    std::map<std::string, Named> tensors;
    std::map<std::string, std::vector<std::string>> ops;
    std::vector<std::vector<MegatronParameter>> parameters(tp);
    for (const Named& each : draw.Tensors()) {
      const Named tensor{each.name, {tp * draw.Size(), 1 + draw.Below(12)}};
      tensors[tensor.name] = tensor;
      ops[tensor.name] = {Shard(0, "tp", "even")};
      for (uint64_t t = 0; t < tp; ++t) {
        parameters[t].push_back({tensor.name, Chunk(Whole(tensor), tp, 0)[t]});
      }
    }
    World world(dp * tp);
    for (uint64_t d = 0; d < dp; ++d) {
      for (uint64_t t = 0; t < tp; ++t) {
        PutBuckets(world, d * tp + t, MegatronBuckets(parameters[t], rule), dp, d);
      }
    }
    Document document({{"dp", dp}, {"tp", tp}});
    // Buckets are the same on all tensor-parallel ranks: their local tensors are of one size.
    AddBucketed(document, MegatronBuckets(parameters[0], rule), tensors, ops, dp,
                std::lcm(dp, uint64_t{128}), "");
    return ExpectSays(document, world);
  });
}

TEST(FrameworkExperts, PaddingForHighBusBandwidthIsAnotherMultiple) {
  const uint64_t dp = 3;
  const MegatronBufferRule rule{dp, 0, true};
  const std::map<std::string, Named> tensors = {{"a", {"a", {10, 7}}}, {"b", {"b", {33}}}};
  const auto buckets =
      MegatronBuckets({{"a", Whole(tensors.at("a"))}, {"b", Whole(tensors.at("b"))}}, rule);
  World world(dp);
  for (uint64_t d = 0; d < dp; ++d) PutBuckets(world, d, buckets, dp, d);
  ASSERT_EQ(world.ranks[0].at("bucket/b").cells.size(), 65536u);  // 3 * 65536 in all
  Document document({{"dp", dp}});
  AddBucketed(document, buckets, tensors, {{"a", {}}, {"b", {}}}, dp, 3 * 65536, "");
  EXPECT_EQ(ExpectSays(document, world), 70u + 33);
}

// A tied embedding, its padded vocabulary too, always sits alone in its bucket; it is the last of
// the first stage's buffer and the first of the last one's.
TEST(FrameworkExperts, SharedEmbeddingsAreABucketOfTheirOwnOnBothStages) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Of({2, 3});
    const uint64_t dp = draw.Of({1, 2, 3});
    const uint64_t tp = draw.Of({1, 2});
    const MegatronBufferRule rule{dp, draw.Of({0, 100}), false};
    const Named embedding{"wte", {1 + draw.Below(40), draw.Some()}};
    std::vector<std::vector<Named>> layers(pp);
    for (uint64_t p = 0; p < pp; ++p) {
      for (const char* name : {"norm", "w"}) {
        layers[p].push_back({absl::StrCat("l", p, ".", name), {draw.Some(), draw.Some()}});
      }
    }
    const auto parameters_of = [&](uint64_t p, uint64_t t) {
      const MegatronParameter shared{"wte", MegatronVocabulary(Whole(embedding), 4, tp, t), true};
      std::vector<MegatronParameter> parameters;
      if (p == 0) parameters.push_back(shared);
      for (const Named& tensor : layers[p]) parameters.push_back({tensor.name, Whole(tensor)});
      if (p + 1 == pp) parameters.push_back(shared);
      return parameters;
    };
    World world(pp * dp * tp);
    for (uint64_t p = 0, rank = 0; p < pp; ++p) {
      for (uint64_t d = 0; d < dp; ++d) {
        for (uint64_t t = 0; t < tp; ++t, ++rank) {
          PutBuckets(world, rank, MegatronBuckets(parameters_of(p, t), rule), dp, d);
        }
      }
    }
    std::map<std::string, Named> tensors = {{"wte", embedding}};
    std::map<std::string, std::vector<std::string>> ops = {
        {"wte", {PlaceAt("pp", {0, -1}), Pad(0, 4, "tp"), Shard(0, "tp", "even")}}};
    std::vector<MegatronBucket> buckets;  // of all stages, the shared one once
    for (uint64_t p = 0; p < pp; ++p) {
      for (const Named& tensor : layers[p]) {
        tensors[tensor.name] = tensor;
        ops[tensor.name] = {PlaceAt("pp", {Signed(p)})};
      }
      for (MegatronBucket& bucket : MegatronBuckets(parameters_of(p, 0), rule)) {
        if (p == 0 || bucket.names[0] != "wte") buckets.push_back(std::move(bucket));
      }
    }
    Document document({{"pp", pp}, {"dp", dp}, {"tp", tp}});
    AddBucketed(document, buckets, tensors, ops, dp, std::lcm(dp, uint64_t{128}), "");
    return ExpectSays(document, world);
  });
}

// Experts are in buffers of their own, cut over the expert data-parallel ranks.
TEST(FrameworkExperts, ExpertBuffersAreCutOverTheExpertDataParallelRanks) {
  ForManySizes([](Draw& draw) {
    const uint64_t edp = draw.Of({1, 2, 3});
    const uint64_t ep = draw.Of({1, 2, 3});
    const uint64_t local_experts = draw.Of({1, 2});
    const Shape shape = {1 + draw.Below(20), draw.Some()};  // of every expert
    const MegatronBufferRule rule{edp, draw.Of({0, 50}), false};
    std::map<std::string, Named> tensors;
    std::map<std::string, std::vector<std::string>> ops;
    World world(edp * ep);
    Document document({{"dp", edp * ep}});
    document.Mesh("experts", {{"edp", edp}, {"ep", ep}});
    for (uint64_t x = 0; x < ep; ++x) {
      std::vector<MegatronParameter> parameters;
      for (uint64_t e = x * local_experts; e < (x + 1) * local_experts; ++e) {
        const Named tensor{absl::StrCat("expert.", e), shape};
        tensors[tensor.name] = tensor;
        ops[tensor.name] = {PlaceIndex("ep", e, ep * local_experts)};
        parameters.push_back({tensor.name, Whole(tensor)});
      }
      const std::vector<MegatronBucket> buckets = MegatronBuckets(parameters, rule);
      for (uint64_t d = 0; d < edp; ++d) PutBuckets(world, d * ep + x, buckets, edp, d);
      AddBucketed(document, buckets, tensors, ops, edp, std::lcm(edp, uint64_t{128}), "experts");
    }
    return ExpectSays(document, world);
  });
}

// ---- Stacked tensors ----

// [L, rows, cols]: the chunks of a stage lie one behind the other, as [chunks, layers, rows, cols].
TEST(FrameworkExperts, StackedLayersAreAShardOfTheFirstDimensionOrOfAViewOfIt) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Degree();
    const uint64_t vpp = draw.Of({1, 1, 2, 3});
    const uint64_t tp = draw.Of({1, 2});
    const uint64_t per_chunk = draw.Of({1, 2});
    const uint64_t rows = tp * draw.Size();
    const uint64_t cols = draw.Some();
    const uint64_t layers = pp * vpp * per_chunk;
    const Named tensor{"layers.w", {layers, rows, cols}};
    const auto stages = MegatronStages(layers, pp, vpp);
    World world(pp * tp);
    for (uint64_t p = 0; p < pp; ++p) {
      for (uint64_t t = 0; t < tp; ++t) {
        for (uint64_t layer : stages[p]) {
          world.PutAlone(p * tp + t, "param", "layers.w",
                         Chunk(Narrow(Whole(tensor), 0, layer, 1), tp, 1)[t]);
        }
      }
    }
    std::vector<std::string> ops = {Shard(0, "pp", "even"), Shard(1, "tp", "even")};
    if (vpp > 1) {
      ops = {View({Signed(vpp), Signed(pp), Signed(per_chunk), Signed(rows), Signed(cols)}),
             Shard(1, "pp", "even"), Shard(3, "tp", "even")};
    }
    Document document({{"pp", pp}, {"tp", tp}});
    document.Tensor(tensor, {{"param", "float32", Place(ops)}});
    return ExpectSays(document, world);
  });
}

// [L, E, rows, cols] over stages, expert-parallel and expert-tensor-parallel ranks.
TEST(FrameworkExperts, StackedExpertsAreCutInEachOfTheirDimensions) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Of({1, 2});
    const uint64_t ep = draw.Of({1, 2, 3});
    const uint64_t etp = draw.Of({1, 2});
    const Named tensor{
        "experts.w", {pp * draw.Of({1, 2}), ep * draw.Of({1, 2}), draw.Some(), etp * draw.Size()}};
    World world(pp * ep * etp);
    for (uint64_t p = 0, rank = 0; p < pp; ++p) {
      for (uint64_t x = 0; x < ep; ++x) {
        for (uint64_t t = 0; t < etp; ++t, ++rank) {
          const Array of_stage = Chunk(Whole(tensor), pp, 0)[p];
          world.PutAlone(rank, "param", tensor.name, Chunk(Chunk(of_stage, ep, 1)[x], etp, 3)[t]);
        }
      }
    }
    Document document({{"pp", pp}, {"ep", ep}, {"etp", etp}});
    document.Tensor(
        tensor,
        {{"param", "float32",
          Place({Shard(0, "pp", "even"), Shard(1, "ep", "even"), Shard(3, "etp", "even")})}});
    return ExpectSays(document, world);
  });
}

}  // namespace
}  // namespace holdfast::frameworks
