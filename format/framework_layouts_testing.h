// For the tests of framework layouts: writes layout documents as a user would, expands what the
// library reads in them to explicit cells, and compares these with a simulated world.
#ifndef HOLDFAST_FORMAT_FRAMEWORK_LAYOUTS_TESTING_H_
#define HOLDFAST_FORMAT_FRAMEWORK_LAYOUTS_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "format/framework_simulators.h"

namespace holdfast::frameworks {

// ---- Documents ----

// Operations, as JSON. `axis`: a name, or several with "," between them.
std::string Shard(size_t dim, const std::string& axis, const std::string& rule, uint64_t grain = 1);
std::string ShardSizes(size_t dim, const std::string& axis, const std::vector<uint64_t>& sizes);
std::string FlatCut(const std::string& axis, const std::string& rule);
std::string FlatSizes(const std::string& axis, const std::vector<uint64_t>& sizes);
std::string View(const std::vector<int64_t>& shape);  // -1: derived
std::string Perm(const std::vector<uint64_t>& dims);
std::string Pad(size_t dim, uint64_t multiple, const std::string& axis);
std::string PlaceAt(const std::string& axis, const std::vector<int64_t>& coordinates);
std::string PlaceIndex(const std::string& axis, uint64_t index, uint64_t count,
                       uint64_t virtual_stages = 1);
std::string PlaceIndexSizes(const std::string& axis, uint64_t index,
                            const std::vector<uint64_t>& sizes);
std::string Pack(const std::string& name);
std::string ZeroCut(const std::string& rule);
std::string ZeroPack(const std::string& pack);

// Placements, as JSON.
std::string Place(const std::vector<std::string>& ops);
std::string PlaceOn(const std::string& mesh, const std::vector<std::string>& ops);

// Lists of segments, as JSON. A box without elements is left out, as the grammar wants it.
class Listed {
 public:
  // The elements of the box on `ranks` from an offset on, with strides between neighbours in each
  // dimension or row-major.
  Listed& Add(const std::vector<uint64_t>& ranks, const Shape& lo, const Shape& size,
              uint64_t offset_bytes, const Shape& strides = {});
  std::string Json() const;

 private:
  std::string segments_;
};

using MeshSizes = std::vector<std::pair<std::string, uint64_t>>;

struct StateLine {
  std::string state;
  std::string dtype;
  std::string place = "";     // empty: replicated
  std::string buffer = "";    // empty: the default
  uint64_t offset_bytes = 0;  // with a buffer
  std::string segments = "";  // in the place of a placement
};

class Document {
 public:
  explicit Document(const MeshSizes& mesh);
  Document& Mesh(const std::string& name, const MeshSizes& mesh);
  // `mesh` empty: the document's.
  Document& AddPack(const std::string& name, const std::string& axis, uint64_t align_elements,
                    uint64_t multiple_elements, const std::string& mesh = "");
  Document& Zero(uint64_t stage, const std::string& axis);
  Document& Tensor(const Named& tensor, const std::vector<StateLine>& states);
  std::string Json() const;

 private:
  std::string mesh_;
  std::string meshes_;
  std::string packs_;
  std::string zero_;
  std::string tensors_;
};

// ---- Comparison ----

// Fails unless the document says of every rank exactly what lies in that world's buffers, padding
// included, and what all writers of it store is everything, once. Returns the elements compared.
size_t ExpectSays(const Document& document, const World& world);

// ---- Sizes ----

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}

  uint64_t Of(std::initializer_list<uint64_t> choices);
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  bool Coin() { return Below(2) == 0; }
  uint64_t Degree() { return Of({1, 2, 3, 4, 5}); }              // of parallelism
  uint64_t Size() { return Of({0, 1, 2, 3, 5, 7, 8, 11, 16}); }  // of a dimension
  uint64_t Some() { return Of({1, 2, 3, 5, 7, 8}); }             // the same, not empty
  // One to six, named "t0" and so on, of `dims_min` to 3 dimensions.
  std::vector<Named> Tensors(size_t dims_min = 0);
  // `count` numbers that add up to `sum`.
  std::vector<uint64_t> Parts(uint64_t sum, uint64_t count);

 private:
  std::mt19937_64 random_;
};

// Runs the round with many seeds until one fails, each printed then. The round returns the elements
// that it compared; fails if they are few.
void ForManySizes(const std::function<size_t(Draw&)>& round);

}  // namespace holdfast::frameworks

#endif  // HOLDFAST_FORMAT_FRAMEWORK_LAYOUTS_TESTING_H_
