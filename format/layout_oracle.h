// An independent, slow reading of layout documents for the tests: random documents, and the bytes
// of every buffer of every rank.
//
// Model: written from the rules of docs/layout-grammar.md, not from the code. A local tensor is an
// explicit array of global element numbers, and of padding; every operation deals its indices out
// one by one. Not modelled: documents that are refused for their text (names, unknown keys); tied
// tensors.
#ifndef HOLDFAST_FORMAT_LAYOUT_ORACLE_H_
#define HOLDFAST_FORMAT_LAYOUT_ORACLE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace holdfast::oracle {

struct Op {
  std::string kind;          // "shard", "flat", "place", "pack", "zero", "view", "perm", "pad"
  std::vector<size_t> axes;  // indices into the state's mesh; of a pack the pack's
  size_t dim = 0;
  std::string rule;
  std::vector<uint64_t> sizes;
  uint64_t grain = 1;
  std::vector<uint64_t> blocks;      // shard; empty: the dimension is one
  std::vector<int64_t> coordinates;  // place; or else by index:
  uint64_t index = 0;
  uint64_t count = 0;
  uint64_t rounds = 1;
  std::optional<size_t> pack;  // pack, and zero if it packs
  std::vector<int64_t> view;
  std::vector<size_t> perm;
  uint64_t multiple = 1;
  std::vector<size_t> multiple_axes;
  uint64_t size_min = 0;
};

struct ListedSegment {
  std::vector<uint64_t> ranks;
  std::vector<uint64_t> lo;
  std::vector<uint64_t> size;
  std::string buffer;
  uint64_t offset_bytes = 0;
  std::vector<uint64_t> strides;  // elements; empty: row-major
};

struct State {
  std::string name;
  std::string dtype;
  uint64_t element_bytes = 1;
  size_t mesh = 0;
  std::vector<Op> ops;
  std::string buffer;  // empty: the default
  uint64_t offset_bytes = 0;
  std::optional<std::vector<ListedSegment>> listed;  // in the place of operations
};

struct Tensor {
  std::string name;
  std::vector<uint64_t> shape;
  std::vector<State> states;
};

struct Pack {
  std::string name;
  size_t mesh = 0;
  std::vector<size_t> axes;
  uint64_t align = 1;
  uint64_t multiple = 1;
  std::string buffer;
};

struct Zero {
  uint64_t stage = 0;
  std::vector<std::string> axes;
  std::map<std::string, uint64_t> from;  // "*" included
};

using Mesh = std::vector<std::pair<std::string, uint64_t>>;

struct Document {
  std::vector<Mesh> meshes;  // 0: the document's "mesh"; the others are called "m1", "m2", ...
  std::optional<Zero> zero;
  std::vector<Pack> packs;
  std::vector<Tensor> tensors;

  uint64_t WorldSize() const;
};

using Random = std::mt19937_64;

// Names, shapes, states and dtypes; no operations.
std::vector<Tensor> RandomTensors(Random& random);
// A mesh and operations for these tensors. Not every rule fits.
Document RandomDocument(Random& random, std::vector<Tensor> tensors);

// Writes operations in place or as named placements, by chance.
std::string ToJson(const Document& document, Random& random);

// What a byte of a buffer is where no element lies.
inline constexpr uint8_t kNothing = 0xEE;

// The lowest bytes of what element `element` of the `number`-th tensor state holds.
uint64_t ValueOf(size_t number, uint64_t element);

// Of a rank: buffer name -> bytes; or nothing if a rule does not fit on this rank.
std::optional<std::map<std::string, std::vector<uint8_t>>> Lower(const Document& document,
                                                                 uint64_t rank);

}  // namespace holdfast::oracle

#endif  // HOLDFAST_FORMAT_LAYOUT_ORACLE_H_
