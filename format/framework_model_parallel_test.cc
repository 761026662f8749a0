// Goal: the layout grammar says what tensor, sequence, context and pipeline parallel frameworks do,
// with every layer on a mesh of its own if need be, and how they lay out attention.
// Method: as format/framework_layouts_test.cc.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "format/framework_layouts_testing.h"
#include "format/framework_simulators.h"
#include "gtest/gtest.h"

namespace holdfast::frameworks {
namespace {

int64_t Signed(uint64_t value) { return static_cast<int64_t>(value); }

std::vector<StateLine> Param(const std::string& place) { return {{"param", "float32", place}}; }

// ---- Tensor parallel ----

TEST(FrameworkModelParallel, ColumnsAreCutByOutputRowsByInputAndTheirBiasesFollow) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const Named column{"column", {tp * draw.Size(), draw.Size()}};
    const Named column_bias{"column.bias", {column.shape[0]}};
    const Named row{"row", {draw.Size(), tp * draw.Size()}};
    const Named row_bias{"row.bias", {row.shape[0]}};
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "column", Chunk(Whole(column), tp, 0)[t]);
      world.PutAlone(t, "param", "column.bias", Chunk(Whole(column_bias), tp, 0)[t]);
      world.PutAlone(t, "param", "row", Chunk(Whole(row), tp, 1)[t]);
      world.PutAlone(t, "param", "row.bias", Whole(row_bias));
    }
    Document document({{"tp", tp}});
    document.Tensor(column, Param(Place({Shard(0, "tp", "even")})))
        .Tensor(column_bias, Param(Place({Shard(0, "tp", "even")})))
        .Tensor(row, Param(Place({Shard(1, "tp", "even")})))
        .Tensor(row_bias, Param(""));
    return ExpectSays(document, world);
  });
}

// AutoTP: the first n mod tp ranks get one head more.
TEST(FrameworkModelParallel, AutoTpBalancesWholeHeads) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const uint64_t heads = draw.Size();
    const uint64_t head = draw.Some();  // rows
    const Named tensor{"q", {heads * head, draw.Size()}};
    std::vector<uint64_t> rows;
    for (uint64_t t = 0; t < tp; ++t)
      rows.push_back((heads / tp + (t < heads % tp ? 1 : 0)) * head);
    const std::vector<Array> parts = Split(Whole(tensor), rows, 0);
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) world.PutAlone(t, "param", "q", parts[t]);
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(Place({Shard(0, "tp", "balanced", head)})));
    return ExpectSays(document, world);
  });
}

TEST(FrameworkModelParallel, TheVocabularyIsPaddedToAMultipleTimesTp) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const uint64_t divisible_by = draw.Of({1, 4, 8});
    const Named tensor{"wte", {draw.Below(50), draw.Some()}};
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "wte", MegatronVocabulary(Whole(tensor), divisible_by, tp, t));
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(Place({Pad(0, divisible_by, "tp"), Shard(0, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

// Per rank [W_tp; V_tp], of the whole [W; V].
TEST(FrameworkModelParallel, SwiGluHoldsItsPartOfGateAndUp) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const uint64_t ff = draw.Size();
    const Named tensor{"fc1", {2 * ff, draw.Size()}};
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      std::vector<Array> halves;
      for (const Array& half : Chunk(Whole(tensor), 2, 0)) halves.push_back(Chunk(half, tp, 0)[t]);
      world.PutAlone(t, "param", "fc1", Cat(halves, 0));
    }
    Document document({{"tp", tp}});
    document.Tensor(
        tensor,
        Param(Place({View({2, Signed(ff), Signed(tensor.shape[1])}), Shard(1, "tp", "ceil")})));
    return ExpectSays(document, world);
  });
}

// ---- Attention ----

// g query groups of q heads, of hn rows of h elements.
struct Attention {
  uint64_t g = 1;
  uint64_t q = 1;
  uint64_t hn = 1;
  uint64_t h = 1;

  uint64_t GroupRows() const { return (q + 2) * hn; }
};

TEST(FrameworkModelParallel, MegatronQkvCutsWholeQueryGroups) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const Attention a{tp * draw.Some(), draw.Some(), draw.Some(), draw.Size()};
    const Named tensor{"qkv", {a.g * a.GroupRows(), a.h}};
    const Array whole = Whole(tensor);
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      for (uint64_t group = 0; group < a.g; ++group) {
        if (group / (a.g / tp) != t) continue;
        for (uint64_t head = 0; head < a.q + 2; ++head) {
          world.PutAlone(t, "param", "qkv",
                         Narrow(whole, 0, (group * (a.q + 2) + head) * a.hn, a.hn));
        }
      }
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor,
                    Param(Place({View({Signed(a.g), Signed(a.q + 2), Signed(a.hn), Signed(a.h)}),
                                 Shard(0, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

// The same weights under Hugging Face's three names: every group of each is a box of its own.
TEST(FrameworkModelParallel, SeparateQkvTensorsAreListedGroupByGroupInMegatronsBuffer) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Of({1, 2, 3});
    const Attention a{tp * draw.Of({1, 2, 3}), draw.Of({1, 2, 3}), draw.Some(), draw.Some()};
    const std::vector<Named> tensors = {
        {"q", {a.g * a.q * a.hn, a.h}}, {"k", {a.g * a.hn, a.h}}, {"v", {a.g * a.hn, a.h}}};
    const std::vector<uint64_t> rows = {a.q * a.hn, a.hn, a.hn};  // of a group
    World world(tp);
    for (uint64_t group = 0; group < a.g; ++group) {
      for (size_t i = 0; i < tensors.size(); ++i) {
        world.Put(group / (a.g / tp), "linear_qkv", "param",
                  Narrow(Whole(tensors[i]), 0, group * rows[i], rows[i]));
      }
    }
    Document document({{"tp", tp}});
    uint64_t behind = 0;  // rows of the group before those of this tensor
    for (size_t i = 0; i < tensors.size(); ++i) {
      Listed listed;
      for (uint64_t group = 0; group < a.g; ++group) {
        const uint64_t local = group % (a.g / tp);
        listed.Add({group / (a.g / tp)}, {group * rows[i], 0}, {rows[i], a.h},
                   4 * a.h * (local * a.GroupRows() + behind));
      }
      document.Tensor(tensors[i], {{.state = "param",
                                    .dtype = "float32",
                                    .buffer = "linear_qkv",
                                    .segments = listed.Json()}});
      behind += rows[i];
    }
    return ExpectSays(document, world);
  });
}

// More tensor-parallel ranks than groups: rep ranks share the key and value heads of a group and
// divide its query heads. Per rank: its query heads, k, v.
TEST(FrameworkModelParallel, SharedKeyValueHeadsAreListedInTheFusedTensor) {
  ForManySizes([](Draw& draw) {
    const uint64_t rep = draw.Of({2, 3, 4});
    const Attention a{draw.Of({1, 2, 3}), rep * draw.Of({1, 2}), draw.Some(), draw.Some()};
    const Named tensor{"qkv", {a.g * a.GroupRows(), a.h}};
    const uint64_t q_rows = a.q / rep * a.hn;
    World world(a.g * rep);
    for (uint64_t t = 0; t < a.g * rep; ++t) {
      const Array group = Narrow(Whole(tensor), 0, t / rep * a.GroupRows(), a.GroupRows());
      const std::vector<Array> qkv = Split(group, {a.q * a.hn, a.hn, a.hn}, 0);
      world.PutAlone(t, "param", "qkv", Chunk(qkv[0], rep, 0)[t % rep]);
      world.PutAlone(t, "param", "qkv", qkv[1]);
      world.PutAlone(t, "param", "qkv", qkv[2]);
    }
    Listed listed;
    for (uint64_t group = 0; group < a.g; ++group) {
      const uint64_t row = group * a.GroupRows();
      std::vector<uint64_t> sharers;
      for (uint64_t r = 0; r < rep; ++r) {
        sharers.push_back(group * rep + r);
        listed.Add({sharers.back()}, {row + r * q_rows, 0}, {q_rows, a.h}, 0);
      }
      listed.Add(sharers, {row + a.q * a.hn, 0}, {2 * a.hn, a.h}, 4 * q_rows * a.h);
    }
    Document document({{"tp", a.g * rep}});
    document.Tensor(tensor, {{.state = "param", .dtype = "float32", .segments = listed.Json()}});
    return ExpectSays(document, world);
  });
}

// As tensors of their own they need no list: a mesh that factors tp into groups and sharers.
TEST(FrameworkModelParallel, SharedKeyValueHeadsAreAMeshThatFactorsTp) {
  ForManySizes([](Draw& draw) {
    const uint64_t rep = draw.Of({1, 2, 3, 4});
    const Attention a{draw.Of({1, 2, 3}), rep * draw.Of({1, 2}), draw.Some(), draw.Some()};
    const Named q{"q", {a.g * a.q * a.hn, a.h}};
    const Named k{"k", {a.g * a.hn, a.h}};
    const Named v{"v", {a.g * a.hn, a.h}};
    const uint64_t tp = a.g * rep;
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.Put(t, "qkv", "param", Chunk(Whole(q), tp, 0)[t]);
      world.Put(t, "qkv", "param", Narrow(Whole(k), 0, t / rep * a.hn, a.hn));
      world.Put(t, "qkv", "param", Narrow(Whole(v), 0, t / rep * a.hn, a.hn));
    }
    const uint64_t q_bytes = 4 * a.q / rep * a.hn * a.h;
    const std::string shared = PlaceOn("attention", {Shard(0, "group", "even")});
    Document document({{"tp", tp}});
    document.Mesh("attention", {{"group", a.g}, {"sharer", rep}});
    document.Tensor(q, {{"param", "float32", Place({Shard(0, "tp", "even")}), "qkv"}})
        .Tensor(k, {{"param", "float32", shared, "qkv", q_bytes}})
        .Tensor(v, {{"param", "float32", shared, "qkv", q_bytes + 4 * a.hn * a.h}});
    return ExpectSays(document, world);
  });
}

// And so they also lie in flat groups: as many ranks as share a head pack it at the same place, or,
// where query heads are uneven, at others.
TEST(FrameworkModelParallel, SharedKeyValueHeadsAreCutByZeroInsideTheirRanksFlatGroup) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Of({1, 2, 3});
    const uint64_t groups = draw.Of({1, 2});
    const uint64_t sharers = draw.Of({1, 2, 3});
    const Named q{"q", {draw.Below(20), draw.Some()}};
    const Named k{"k", {groups * draw.Size(), q.shape[1]}};
    const Named norm{"norm", {draw.Size()}};
    World world(dp * groups * sharers);
    for (uint64_t d = 0, rank = 0; d < dp; ++d) {
      for (uint64_t t = 0; t < groups * sharers; ++t, ++rank) {
        const std::vector<Array> qk = {Chunk(Whole(q), groups * sharers, 0)[t],
                                       Chunk(Whole(k), groups, 0)[t / sharers]};
        world.Put(rank, "exp_avg", "exp_avg", ZeroPartitions({Cat(qk, 0), Whole(norm)}, dp, {})[d]);
      }
    }
    const auto packed = [](const std::string& cut) {
      return std::vector<StateLine>{{"exp_avg", "float32", Place({cut, Pack("exp_avg")})}};
    };
    Document document({{"dp", dp}, {"group", groups}, {"sharer", sharers}});
    document.AddPack("exp_avg", "dp", 1, 2);
    document.Tensor(q, packed(Shard(0, "group,sharer", "ceil")))
        .Tensor(k, packed(Shard(0, "group", "even")))
        .Tensor(norm, {{"exp_avg", "float32", Place({Pack("exp_avg")})}});
    return ExpectSays(document, world);
  });
}

// [q; k; v] one behind the other, of other widths, each balanced over the ranks by whole heads.
TEST(FrameworkModelParallel, HfFusedQkvIsListedBlockByBlock) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const uint64_t hn = draw.Some();
    const uint64_t h = draw.Some();
    const uint64_t kv_heads = draw.Some();
    const std::vector<uint64_t> heads = {draw.Some(), kv_heads, kv_heads};
    const Named tensor{"c_attn", {(heads[0] + 2 * kv_heads) * hn, h}};
    const auto rows_of = [&](uint64_t count, uint64_t t) {
      return (count / tp + (t < count % tp ? 1 : 0)) * hn;
    };
    World world(tp);
    const std::vector<Array> blocks =
        Split(Whole(tensor), {heads[0] * hn, kv_heads * hn, kv_heads * hn}, 0);
    for (size_t b = 0; b < blocks.size(); ++b) {
      std::vector<uint64_t> rows;
      for (uint64_t t = 0; t < tp; ++t) rows.push_back(rows_of(heads[b], t));
      const std::vector<Array> parts = Split(blocks[b], rows, 0);
      for (uint64_t t = 0; t < tp; ++t) world.PutAlone(t, "param", "c_attn", parts[t]);
    }
    Listed listed;
    std::vector<uint64_t> local_rows(tp, 0);
    uint64_t row = 0;
    for (uint64_t count : heads) {
      for (uint64_t t = 0; t < tp; ++t) {
        listed.Add({t}, {row, 0}, {rows_of(count, t), h}, 4 * h * local_rows[t]);
        local_rows[t] += rows_of(count, t);
        row += rows_of(count, t);
      }
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, {{.state = "param", .dtype = "float32", .segments = listed.Json()}});
    return ExpectSays(document, world);
  });
}

// ---- Sequence and context parallel ----

// Neither cuts parameters: both are more ranks over which optimizer state is cut.
TEST(FrameworkModelParallel, SequenceAndContextParallelReplicateParameters) {
  ForManySizes([](Draw& draw) {
    const uint64_t dp = draw.Of({1, 2, 3});
    const uint64_t cp = draw.Of({1, 2, 3});
    const uint64_t tp = draw.Of({1, 2});
    const Named norm{"norm", {draw.Size()}};  // sequence parallel over tp
    const Named linear{"linear", {tp * draw.Size(), draw.Size()}};
    World world(dp * cp * tp);
    for (uint64_t d = 0, rank = 0; d < dp; ++d) {
      for (uint64_t c = 0; c < cp; ++c) {
        for (uint64_t t = 0; t < tp; ++t, ++rank) {
          const Array local = Chunk(Whole(linear), tp, 0)[t];
          world.PutAlone(rank, "param", "norm", Whole(norm));
          world.PutAlone(rank, "param", "linear", local);
          world.Put(rank, "exp_avg", "exp_avg",
                    ZeroPartitions({Whole(norm), local}, dp * cp, {})[d * cp + c]);
        }
      }
    }
    Document document({{"dp", dp}, {"cp", cp}, {"tp", tp}});
    document.AddPack("exp_avg", "dp,cp", 1, 2);
    document.Tensor(norm, {{"param", "bfloat16"}, {"exp_avg", "float32", Place({Pack("exp_avg")})}})
        .Tensor(linear, {{"param", "bfloat16", Place({Shard(0, "tp", "even")})},
                         {"exp_avg", "float32", Place({Shard(0, "tp", "even"), Pack("exp_avg")})}});
    return ExpectSays(document, world);
  });
}

// ---- Pipelines ----

// Layers of two tensors; `place` says where layer i is.
template <typename PlaceOfLayer>
size_t ExpectStages(Draw& draw, const std::vector<std::vector<uint64_t>>& stages,
                    const PlaceOfLayer& place) {
  uint64_t layers = 0;
  for (const std::vector<uint64_t>& stage : stages) layers += stage.size();
  World world(stages.size());
  Document document({{"pp", stages.size()}});
  std::vector<std::vector<Named>> tensors;
  for (uint64_t layer = 0; layer < layers; ++layer) {
    tensors.push_back({{absl::StrCat("layers.", layer, ".w"), {draw.Some(), draw.Size()}},
                       {absl::StrCat("layers.", layer, ".b"), {draw.Some()}}});
    for (const Named& tensor : tensors.back()) {
      document.Tensor(tensor, Param(Place({place(layer, layers)})));
    }
  }
  for (uint64_t p = 0; p < stages.size(); ++p) {
    for (uint64_t layer : stages[p]) {
      for (const Named& tensor : tensors[layer]) {
        world.PutAlone(p, "param", tensor.name, Whole(tensor));
      }
    }
  }
  return ExpectSays(document, world);
}

TEST(FrameworkModelParallel, EvenStagesHoldLayersInOrder) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Degree();
    return ExpectStages(
        draw, MegatronStages(pp * draw.Some(), pp, 1),
        [](uint64_t layer, uint64_t layers) { return PlaceIndex("pp", layer, layers); });
  });
}

TEST(FrameworkModelParallel, InterleavedStagesHoldEveryNthChunk) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Degree();
    const uint64_t vpp = draw.Of({2, 3, 4});
    return ExpectStages(
        draw, MegatronStages(pp * vpp * draw.Of({1, 2}), pp, vpp),
        [&](uint64_t layer, uint64_t layers) { return PlaceIndex("pp", layer, layers, vpp); });
  });
}

TEST(FrameworkModelParallel, UnevenStagesHoldAsManyLayersAsListed) {
  ForManySizes([](Draw& draw) {
    const std::vector<uint64_t> sizes = draw.Parts(1 + draw.Below(12), draw.Degree());
    std::vector<std::vector<uint64_t>> stages(sizes.size());
    uint64_t next = 0;
    for (size_t p = 0; p < sizes.size(); ++p) {
      while (stages[p].size() < sizes[p]) stages[p].push_back(next++);
    }
    return ExpectStages(draw, stages, [&](uint64_t layer, uint64_t) {
      return PlaceIndexSizes("pp", layer, sizes);
    });
  });
}

TEST(FrameworkModelParallel, AListedPipelineHoldsAnyLayerAnywhere) {
  ForManySizes([](Draw& draw) {
    std::vector<std::vector<uint64_t>> stages(draw.Degree());
    std::vector<int64_t> stage_of(1 + draw.Below(12));
    for (uint64_t layer = 0; layer < stage_of.size(); ++layer) {
      const uint64_t stage = draw.Below(stages.size());
      stage_of[layer] = Signed(stage);
      stages[stage].push_back(layer);
    }
    return ExpectStages(draw, stages,
                        [&](uint64_t layer, uint64_t) { return PlaceAt("pp", {stage_of[layer]}); });
  });
}

TEST(FrameworkModelParallel, TiedEmbeddingsAreOnTheFirstAndTheLastStage) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Degree();
    const uint64_t tp = draw.Of({1, 2, 3});
    const Named embedding{"wte", {draw.Below(20), draw.Some()}};
    World world(pp * tp);
    for (uint64_t t = 0; t < tp; ++t) {
      const Array local = MegatronVocabulary(Whole(embedding), 4, tp, t);
      world.PutAlone(t, "param", "wte", local);
      if (pp > 1) world.PutAlone((pp - 1) * tp + t, "param", "wte", local);
    }
    Document document({{"pp", pp}, {"tp", tp}});
    document.Tensor(
        embedding, Param(Place({PlaceAt("pp", {0, -1}), Pad(0, 4, "tp"), Shard(0, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

// ---- A mesh for every layer ----

// Galvatron: layer by layer another choice of tensor, data and fully sharded parallelism, of the
// same ranks of a stage, tensor-parallel ranks next to each other or not.
TEST(FrameworkModelParallel, EveryLayerMayFactorTheRanksInItsOwnWay) {
  ForManySizes([](Draw& draw) {
    struct Strategy {
      uint64_t dp = 1;
      uint64_t tp = 1;
      bool tp_consecutive = true;
      bool fully_sharded = false;
    };
    constexpr uint64_t kRanks = 12;
    World world(kRanks);
    Document document({{"world", kRanks}});
    for (int layer = 0; layer < 4; ++layer) {
      Strategy s;
      s.tp = draw.Of({1, 2, 3, 4, 6, 12});
      s.dp = kRanks / s.tp;
      s.tp_consecutive = draw.Coin();
      s.fully_sharded = draw.Coin();
      const std::string mesh = absl::StrCat("layer", layer);
      const MeshSizes dp_tp = {{"dp", s.dp}, {"tp", s.tp}};
      document.Mesh(mesh, s.tp_consecutive ? dp_tp : MeshSizes{dp_tp[1], dp_tp[0]});
      std::vector<std::string> ops = {Shard(0, "tp", "even")};
      if (s.fully_sharded) ops.push_back(FlatCut("dp", "ceil"));
      const Named tensor{absl::StrCat("layers.", layer), {s.tp * draw.Size(), draw.Some()}};
      document.Tensor(tensor, Param(PlaceOn(mesh, ops)));
      for (uint64_t d = 0; d < s.dp; ++d) {
        for (uint64_t t = 0; t < s.tp; ++t) {
          const uint64_t rank = s.tp_consecutive ? d * s.tp + t : t * s.dp + d;
          const Array local = Chunk(Whole(tensor), s.tp, 0)[t];
          world.PutAlone(rank, "param", tensor.name,
                         s.fully_sharded ? Chunk(Flatten(local), s.dp, 0)[d] : local);
        }
      }
    }
    return ExpectSays(document, world);
  });
}

// ---- Other orders in memory ----

TEST(FrameworkModelParallel, TransposedWeightsAreCutInTheirOwnOrder) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const Named tensor{"w", {draw.Size(), draw.Size(), draw.Size()}};
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "w", Chunk(Permute(Whole(tensor), {0, 2, 1}), tp, 1)[t]);
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(Place({Perm({0, 2, 1}), Shard(1, "tp", "ceil")})));
    return ExpectSays(document, world);
  });
}

// The two conventions of rotary embeddings: halves [2, hn / 2] of each head, or pairs [hn / 2, 2].
TEST(FrameworkModelParallel, RotaryHalvesAndPairsAreAViewAndAPerm) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const uint64_t heads = tp * draw.Of({1, 2});
    const uint64_t half = draw.Some();
    const uint64_t h = draw.Size();
    const Named tensor{"q", {heads * 2 * half, h}};
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      for (uint64_t head = t * (heads / tp); head < (t + 1) * (heads / tp); ++head) {
        for (uint64_t pair = 0; pair < half; ++pair) {
          for (uint64_t side = 0; side < 2; ++side) {
            world.PutAlone(t, "param", "q",
                           Narrow(Whole(tensor), 0, head * 2 * half + side * half + pair, 1));
          }
        }
      }
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(Place({View({Signed(heads), 2, Signed(half), Signed(h)}),
                                         Perm({0, 2, 1, 3}), Shard(0, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

// [3, heads, hn, h] in one framework, [heads, 3, hn, h] in the memory of another.
TEST(FrameworkModelParallel, QkvByBlocksAndByHeadsAreAViewAndAPerm) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const uint64_t heads = tp * draw.Some();
    const uint64_t hn = draw.Some();
    const uint64_t h = draw.Size();
    const Named tensor{"qkv", {3 * heads * hn, h}};
    World world(tp);
    for (uint64_t head = 0; head < heads; ++head) {
      for (uint64_t block = 0; block < 3; ++block) {
        world.PutAlone(head / (heads / tp), "param", "qkv",
                       Narrow(Whole(tensor), 0, (block * heads + head) * hn, hn));
      }
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(Place({View({3, Signed(heads), Signed(hn), Signed(h)}),
                                         Perm({1, 0, 2, 3}), Shard(0, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

}  // namespace
}  // namespace holdfast::frameworks
