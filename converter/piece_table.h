// Collects tensor states and their stored pieces for a ForeignIndex, for readers in which a tensor
// lies scattered: interns boxes and extents, and cuts replicas at common places. Two ranks that
// hold the same elements may have them in differently cut flat buffers; the index wants replicas to
// be equal pieces, so each is cut wherever another one is.
#ifndef HOLDFAST_CONVERTER_PIECE_TABLE_H_
#define HOLDFAST_CONVERTER_PIECE_TABLE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_index.h"
#include "converter/shard_map.h"
#include "format/dtype.h"

namespace holdfast::converter {

// A tensor as a file has it.
struct StoredTensor {
  Dtype dtype = Dtype::kFloat32;
  Shape shape;
  bool contiguous = true;
  Shape strides;              // in elements, if not contiguous
  uint32_t file = 0;          // or kInline, then `inline_bytes` has them
  uint64_t offset_bytes = 0;  // of the first element, in the file
  std::string inline_bytes;
  ByteOrder byte_order = ByteOrder::kLittle;
  bool negate = false;
  bool conjugate = false;
  // The storage it is a view of, to tell aliases and flat buffers.
  uint64_t storage_offset_bytes = 0;
  uint64_t storage_bytes = 0;

  uint64_t ElementCount() const;  // of a shape that was checked
};

// Threads: one at a time.
class PieceTable {
 public:
  // What goes beside the tensors: notes, facts, classes.
  ForeignIndex& index() { return index_; }

  // The number of a state, which is made if it is not there. kDataLoss if it is there with another
  // shape or dtype: expected and found.
  absl::StatusOr<uint32_t> State(const std::string& tensor, const std::string& state, Dtype dtype,
                                 const Shape& shape);
  std::optional<uint32_t> Find(const std::string& tensor, const std::string& state) const;
  bool HasPieces(uint32_t tensor_state) const;

  // All elements of `stored`, which has the state's elements in row-major order (its shape may be
  // another one of the same size, if it is contiguous).
  absl::Status AddWhole(uint32_t tensor_state, const StoredTensor& stored);
  // Elements [stored_begin, stored_begin + count) of `stored` (1-d or contiguous) are elements
  // [begin, begin + count) of the shard.
  absl::Status AddShardRange(uint32_t tensor_state, const ShardMap& shard, uint64_t begin,
                             const StoredTensor& stored, uint64_t stored_begin, uint64_t count);
  // All of a shard that is stored as a tensor.
  absl::Status AddShard(uint32_t tensor_state, const ShardMap& shard, const StoredTensor& stored);

  // A new state whose elements are those of state `of`, rounded to this dtype.
  absl::Status AddRounded(const std::string& tensor, const std::string& state, Dtype dtype,
                          uint32_t of);

  void AddAlias(uint32_t tensor_state, uint32_t of) {
    index_.aliases.push_back({tensor_state, of});
  }

  // Cuts, and gives the index. kResourceExhausted (kPiecesMax).
  absl::StatusOr<ForeignIndex> Take();

 private:
  uint32_t ExtentOf(const StoredTensor& stored);
  uint32_t BoxOf(const Shape& lo, const Shape& size);
  absl::Status Add(ForeignPiece piece);

  ForeignIndex index_;
  std::map<std::pair<std::string, std::string>, uint32_t> states_;
  std::map<std::pair<Shape, Shape>, uint32_t> boxes_;
  std::map<std::pair<uint32_t, uint64_t>, uint32_t> extents_;  // by file and offset
  std::map<std::string, uint32_t> inline_extents_;
  std::vector<bool> has_pieces_;
  std::vector<std::pair<uint32_t, uint32_t>> rounded_;  // state, and what it is made from
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_PIECE_TABLE_H_
