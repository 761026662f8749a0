// Goal: the layout grammar says what DeepSpeed's two languages of universal checkpoints say: the
// classes of universal_checkpoint_info, and affine maps.
// Method: as format/framework_layouts_test.cc. A class is simulated as DeepSpeed restores it, a map
// as as_strided on both sides.
#include <algorithm>
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

std::vector<StateLine> Param(const std::string& place) { return {{"param", "float32", place}}; }
std::vector<StateLine> ListedParam(const Listed& listed) {
  return {{.state = "param", .dtype = "float32", .segments = listed.Json()}};
}

Shape RowMajor(const Shape& shape) {
  Shape strides(shape.size());
  uint64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
  return strides;
}

Named DrawTensor(Draw& draw) { return {"w", {draw.Size(), draw.Size(), draw.Size()}}; }

// ---- universal_checkpoint_info ----

TEST(FrameworkLanguages, TpReplicatedParameterPatterns) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const Named tensor = DrawTensor(draw);
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) world.PutAlone(t, "param", "w", Whole(tensor));
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(""));
    return ExpectSays(document, world);
  });
}

// Once merged it is replicated. Until then every rank has values of its own, which a layout can
// only say as what they are: slices of a tensor with a dimension more.
TEST(FrameworkLanguages, ParameterToAveragePatterns) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const Named tensor = DrawTensor(draw);
    Named slices{"slices", {tp}};
    slices.shape.insert(slices.shape.end(), tensor.shape.begin(), tensor.shape.end());
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "w", Whole(tensor));
      world.PutAlone(t, "param", "slices", Narrow(Whole(slices), 0, t, 1));
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param("")).Tensor(slices, Param(Place({Shard(0, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

// The default is dimension 0, parameter_with_row_parallelism_patterns 1; cat_dim may be any.
TEST(FrameworkLanguages, CatDim) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const size_t cat_dim = draw.Below(3);
    Named tensor = DrawTensor(draw);
    tensor.shape[cat_dim] *= tp;
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "w", Chunk(Whole(tensor), tp, cat_dim)[t]);
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(Place({Shard(cat_dim, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

// parameter_with_2_sub_params_cat_dim_0, and parameter_with_sub_params with a count: (3, -1).
TEST(FrameworkLanguages, EqualSubParametersAreAViewOfTheirDimension) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const size_t dim = draw.Below(3);
    const uint64_t count = draw.Of({2, 2, 3, 5});
    Named tensor = DrawTensor(draw);
    const uint64_t width = tensor.shape[dim];
    tensor.shape[dim] *= count;
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(
          t, "param", "w",
          UcpSubParameters(Whole(tensor), dim, std::vector<uint64_t>(count, width), tp, t));
    }
    std::vector<int64_t> view;
    for (size_t d = 0; d < 3; ++d) {
      if (d == dim) view.push_back(Signed(count));
      view.push_back(Signed(d == dim ? width : tensor.shape[d]));
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(Place({View(view), Shard(dim + 1, "tp", "ceil")})));
    return ExpectSays(document, world);
  });
}

// Sub-parameters of these widths on each rank, along dimension `dim`: a box of each on every rank,
// which lies in the local tensor with the strides of that.
Listed ListSubParameters(const Shape& shape, size_t dim,
                         const std::vector<std::vector<uint64_t>>& widths) {
  Listed listed;
  const size_t ranks = widths[0].size();
  for (size_t rank = 0; rank < ranks; ++rank) {
    Shape local = shape;
    local[dim] = 0;
    for (const std::vector<uint64_t>& of_ranks : widths) local[dim] += of_ranks[rank];
    const Shape strides = RowMajor(local);
    uint64_t behind = 0;  // in the local tensor
    uint64_t start = 0;   // of the sub-parameter
    for (const std::vector<uint64_t>& of_ranks : widths) {
      Shape lo(shape.size(), 0);
      Shape size = shape;
      lo[dim] = std::accumulate(of_ranks.begin(), of_ranks.begin() + Signed(rank), start);
      size[dim] = of_ranks[rank];
      listed.Add({rank}, lo, size, 4 * behind * strides[dim], strides);
      behind += of_ranks[rank];
      start += std::accumulate(of_ranks.begin(), of_ranks.end(), uint64_t{0});
    }
  }
  return listed;
}

// parameter_with_sub_params with a tuple of widths at partition_dim.
TEST(FrameworkLanguages, SubParametersOfOtherWidthsAreListed) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const size_t dim = draw.Below(3);
    Named tensor{"w", {draw.Some(), draw.Some(), draw.Some()}};
    std::vector<uint64_t> widths;
    std::vector<std::vector<uint64_t>> on_ranks;
    for (uint64_t i = draw.Of({2, 3, 4}); i > 0; --i) {
      on_ranks.emplace_back(tp, draw.Some());
      widths.push_back(on_ranks.back()[0] * tp);
    }
    tensor.shape[dim] = std::accumulate(widths.begin(), widths.end(), uint64_t{0});
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "w", UcpSubParameters(Whole(tensor), dim, widths, tp, t));
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, ListedParam(ListSubParameters(tensor.shape, dim, on_ranks)));
    return ExpectSays(document, world);
  });
}

// sub_param_shard_widths: uneven, and of some ranks nothing.
TEST(FrameworkLanguages, SubParameterShardWidthsAreListed) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const size_t dim = draw.Below(3);
    Named tensor{"w", {draw.Some(), draw.Some(), draw.Some()}};
    std::vector<std::vector<uint64_t>> widths;
    tensor.shape[dim] = 0;
    for (uint64_t i = draw.Of({1, 2, 3}); i > 0; --i) {
      const uint64_t width = draw.Size();
      widths.push_back(draw.Parts(width, tp));
      tensor.shape[dim] += width;
    }
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "w", UcpShardWidths(Whole(tensor), dim, widths, t));
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, ListedParam(ListSubParameters(tensor.shape, dim, widths)));
    return ExpectSays(document, world);
  });
}

// Merged: param[:original_vocab_size]. Restored: padded to the rows of a rank times tp.
TEST(FrameworkLanguages, VocabularyParameterPatterns) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const uint64_t rows = draw.Some();  // of a rank
    const uint64_t original_vocab_size = (tp - 1) * rows + 1 + draw.Below(rows);
    const Named tensor{"w", {original_vocab_size, draw.Size()}};
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "w", Chunk(PadTo(Whole(tensor), 0, rows * tp), tp, 0)[t]);
    }
    Document document({{"tp", tp}});
    document.Tensor(tensor, Param(Place({Pad(0, rows, "tp"), Shard(0, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

TEST(FrameworkLanguages, PipelineReplicatedParameterPatterns) {
  ForManySizes([](Draw& draw) {
    const uint64_t pp = draw.Degree();
    const uint64_t tp = draw.Of({1, 2});
    const Named tensor{"tied", {tp * draw.Size(), draw.Some()}};
    World world(pp * tp);
    for (uint64_t p = 0; p < pp; ++p) {
      for (uint64_t t = 0; t < tp; ++t) {
        if (p > 0 && p + 1 < pp) continue;
        world.PutAlone(p * tp + t, "param", "tied", Chunk(Whole(tensor), tp, 0)[t]);
      }
    }
    Document document({{"pp", pp}, {"tp", tp}});
    document.Tensor(tensor, Param(Place({PlaceAt("pp", {0, -1}), Shard(0, "tp", "even")})));
    return ExpectSays(document, world);
  });
}

// Experts concatenated over the expert-parallel ranks on dimension 0.
TEST(FrameworkLanguages, ExpertParameterPatterns) {
  ForManySizes([](Draw& draw) {
    const uint64_t edp = draw.Of({1, 2});
    const uint64_t ep = draw.Degree();
    const Named tensor{"experts", {ep * draw.Some(), draw.Some(), draw.Size()}};
    World world(edp * ep);
    for (uint64_t rank = 0; rank < edp * ep; ++rank) {
      world.PutAlone(rank, "param", "experts", Chunk(Whole(tensor), ep, 0)[rank % ep]);
    }
    Document document({{"edp", edp}, {"ep", ep}});
    document.Tensor(tensor, Param(Place({Shard(0, "ep", "even")})));
    return ExpectSays(document, world);
  });
}

// ---- Affine maps ----

struct AffineMap {
  Named tensor;
  std::map<uint64_t, std::pair<Shape, std::vector<AffinePiece>>> ranks;  // shard shape, pieces
};

// Adds to the list the boxes that a piece of rank `rank` is of: itself, if each of its dimensions
// steps through one of the tensor; else it is cut along one that does not.
void ListPiece(const Shape& shape, uint64_t rank, const AffinePiece& piece, Listed& listed) {
  const Shape steps = RowMajor(shape);
  Shape lo(shape.size(), 0);
  Shape size(shape.size(), 1);
  Shape strides(shape.size(), 1);
  for (size_t d = 0; d < shape.size(); ++d) lo[d] = piece.source / steps[d] % shape[d];
  for (size_t p = 0; p < piece.shape.size(); ++p) {
    if (piece.shape[p] == 1) continue;
    const auto found = std::find(steps.begin(), steps.end(), piece.source_strides[p]);
    if (found == steps.end()) {
      for (uint64_t x = 0; x < piece.shape[p]; ++x) {
        AffinePiece part = piece;
        part.shape[p] = 1;
        part.source += x * piece.source_strides[p];
        part.dest += x * piece.dest_strides[p];
        ListPiece(shape, rank, part, listed);
      }
      return;
    }
    const size_t d = static_cast<size_t>(found - steps.begin());
    size[d] = piece.shape[p];
    strides[d] = piece.dest_strides[p];
  }
  listed.Add({rank}, lo, size, 4 * piece.dest, strides);
}

size_t ExpectAffineMap(const AffineMap& map, uint64_t ranks) {
  World world(ranks);
  Listed listed;
  for (const auto& [rank, shard] : map.ranks) {
    world.PutAlone(rank, "param", map.tensor.name,
                   AffineShard(Whole(map.tensor), shard.first, shard.second));
    for (const AffinePiece& piece : shard.second) {
      ListPiece(map.tensor.shape, rank, piece, listed);
    }
  }
  Document document({{"tp", ranks}});
  document.Tensor(map.tensor, ListedParam(listed));
  return ExpectSays(document, world);
}

// GPTBigCode: query rows cut, key and value rows on every rank; [48, 8] on 4 ranks is the example
// of the specification.
TEST(FrameworkLanguages, AffineMapOfMultiQueryAttention) {
  const auto map_of = [](uint64_t tp, uint64_t q_rows, uint64_t kv_rows, uint64_t h) {
    AffineMap map{{"c_attn", {tp * q_rows + kv_rows, h}}, {}};
    std::vector<uint64_t> all(tp);
    std::iota(all.begin(), all.end(), uint64_t{0});
    for (uint64_t t = 0; t < tp; ++t) {
      map.ranks[t] = {{q_rows + kv_rows, h},
                      {{{q_rows, h}, t * q_rows * h, {h, 1}, 0, {h, 1}, {t}},
                       {{kv_rows, h}, tp * q_rows * h, {h, 1}, q_rows * h, {h, 1}, all}}};
    }
    return map;
  };
  const AffineMap example = map_of(4, 8, 16, 8);
  EXPECT_EQ(example.tensor.shape, (Shape{48, 8}));
  EXPECT_EQ(example.ranks.at(0).second[1].source, 256u);
  EXPECT_EQ(example.ranks.at(0).second[1].dest, 64u);
  EXPECT_EQ(ExpectAffineMap(example, 4), 4u * 24 * 8);
  ForManySizes([&](Draw& draw) {
    const uint64_t tp = draw.Degree();
    return ExpectAffineMap(map_of(tp, draw.Some(), draw.Some(), 1 + draw.Some()), tp);
  });
}

// Two blocks of columns of each row, side by side in the shard: source strides (32, 1) for a row of
// 32, as Yuan has.
TEST(FrameworkLanguages, AffineMapOfColumnBlocks) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Degree();
    const uint64_t rows = draw.Some();
    const uint64_t width = 1 + draw.Some();  // of a block on a rank
    const uint64_t h = 2 * tp * width;
    AffineMap map{{"qk", {rows, h}}, {}};
    for (uint64_t t = 0; t < tp; ++t) {
      map.ranks[t].first = {rows, 2 * width};
      for (uint64_t block = 0; block < 2; ++block) {
        map.ranks[t].second.push_back({{rows, width},
                                       block * tp * width + t * width,
                                       {h, 1},
                                       block * width,
                                       {2 * width, 1},
                                       {t}});
      }
    }
    return ExpectAffineMap(map, tp);
  });
}

// The blocks of CodeGen, [blocks][q, v, k][rows, h], of which a rank has parts that span blocks: as
// a map with strides over the blocks, and as the views and the perm that say the same.
TEST(FrameworkLanguages, AffineMapOfInterleavedBlocksIsAlsoAPipelineOfViews) {
  ForManySizes([](Draw& draw) {
    const uint64_t tp = draw.Of({1, 2, 4});
    const uint64_t rows = draw.Some();
    const uint64_t h = 1 + draw.Some();
    constexpr uint64_t kBlocks = 4;
    AffineMap map{{"qkv", {kBlocks * 3 * rows, h}}, {}};
    const uint64_t mine = kBlocks / tp;  // blocks of a rank
    for (uint64_t t = 0; t < tp; ++t) {
      map.ranks[t].first = {3 * mine * rows, h};
      for (uint64_t part = 0; part < 3; ++part) {
        map.ranks[t].second.push_back({{mine, rows, h},
                                       (t * mine * 3 + part) * rows * h,
                                       {3 * rows * h, h, 1},
                                       part * mine * rows * h,
                                       {rows * h, h, 1},
                                       {t}});
      }
    }
    World world(tp);
    for (uint64_t t = 0; t < tp; ++t) {
      world.PutAlone(t, "param", "qkv",
                     AffineShard(Whole(map.tensor), map.ranks[t].first, map.ranks[t].second));
    }
    Document document({{"tp", tp}});
    document.Tensor(
        map.tensor,
        Param(Place({View({kBlocks, 3, Signed(rows), Signed(h)}), Perm({1, 0, 2, 3}),
                     View({3, Signed(kBlocks * rows), Signed(h)}), Shard(1, "tp", "even")})));
    return ExpectAffineMap(map, tp) + ExpectSays(document, world);
  });
}

// What the specification allows beyond row-major shards: any box anywhere in the shard, transposed
// or not, with gaps, on any set of ranks.
TEST(FrameworkLanguages, AffineMapsOfAnyBoxesAtAnyStrides) {
  ForManySizes([](Draw& draw) {
    const uint64_t ranks = draw.Degree();
    const Shape shape = {2 + draw.Below(9), 2 + draw.Below(9)};
    AffineMap map{{"w", shape}, {}};
    const std::vector<uint64_t> heights = draw.Parts(shape[0], 3);
    const std::vector<uint64_t> widths = draw.Parts(shape[1], 3);
    uint64_t row = 0;
    for (uint64_t height : heights) {
      uint64_t column = 0;
      for (uint64_t width : widths) {
        AffinePiece piece{{height, width}, row * shape[1] + column, {shape[1], 1}, 0, {}, {}};
        column += width;
        if (height * width == 0) continue;
        for (uint64_t rank = 0; rank < ranks; ++rank) {
          if (draw.Coin()) piece.locations.push_back(rank);
        }
        if (piece.locations.empty()) piece.locations = {draw.Below(ranks)};
        for (uint64_t rank : piece.locations) {
          auto& [shard_shape, pieces] = map.ranks[rank];
          if (shard_shape.empty()) shard_shape = {0};
          piece.dest = shard_shape[0] + draw.Below(3);
          piece.dest_strides = draw.Coin() ? Shape{width, 1} : Shape{1, height};
          shard_shape[0] = piece.dest + height * width;
          pieces.push_back(piece);
        }
      }
      row += height;
    }
    return ExpectAffineMap(map, ranks);
  });
}

}  // namespace
}  // namespace holdfast::frameworks
