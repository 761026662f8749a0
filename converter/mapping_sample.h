// For tests of mappings: small whole tensors of numbers, stored in pieces of several kinds, and
// read back; and the same operations on whole tensors, element by element, as an oracle.
#ifndef HOLDFAST_CONVERTER_MAPPING_SAMPLE_H_
#define HOLDFAST_CONVERTER_MAPPING_SAMPLE_H_

#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/whole_tensor_reader.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {

struct Dense {
  std::vector<uint64_t> shape;
  std::vector<uint32_t> values;  // row-major

  static uint64_t Count(const std::vector<uint64_t>& shape) {
    return std::accumulate(shape.begin(), shape.end(), uint64_t{1}, std::multiplies<>());
  }
  // first, first + 1, ...
  static Dense Of(std::vector<uint64_t> shape, uint32_t first) {
    Dense dense{std::move(shape), {}};
    dense.values.resize(Count(dense.shape));
    std::iota(dense.values.begin(), dense.values.end(), first);
    return dense;
  }
  uint64_t RowSize() const { return shape[0] == 0 ? 0 : values.size() / shape[0]; }
  std::vector<uint32_t> Rows(uint64_t begin, uint64_t end) const {
    const auto at = [&](uint64_t row) {
      return values.begin() + static_cast<long>(row * RowSize());
    };
    return {at(begin), at(end)};
  }
  friend bool operator==(const Dense&, const Dense&) = default;
};

inline Dense TransposedDense(const Dense& in) {
  const size_t dims = in.shape.size();
  Dense out = in;
  std::swap(out.shape[dims - 2], out.shape[dims - 1]);
  const uint64_t rows = in.shape[dims - 2];
  const uint64_t columns = in.shape[dims - 1];
  for (uint64_t i = 0; i < in.values.size(); ++i) {
    const uint64_t matrix = i / (rows * columns);
    const uint64_t row = i / columns % rows;
    const uint64_t column = i % columns;
    out.values[matrix * rows * columns + column * rows + row] = in.values[i];
  }
  return out;
}

// Megatron's rows: for each chunk a part of everything.
inline Dense InterleavedDense(const std::vector<Dense>& parts, uint64_t chunks) {
  Dense out = parts[0];
  out.shape[0] = 0;
  out.values.clear();
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    for (const Dense& part : parts) {
      const uint64_t rows = part.shape[0] / chunks;
      const std::vector<uint32_t> more = part.Rows(chunk * rows, (chunk + 1) * rows);
      out.values.insert(out.values.end(), more.begin(), more.end());
      out.shape[0] += rows;
    }
  }
  return out;
}

// transformers' convert_llama_weights_to_hf.py: view(heads, rows / heads / 2, 2).transpose(1, 2).
inline Dense RotaryDense(const Dense& in, uint64_t heads) {
  Dense out = in;
  const uint64_t half = in.shape[0] / heads / 2;
  for (uint64_t row = 0; row < in.shape[0]; ++row) {
    const uint64_t head = row / (2 * half);
    const uint64_t pair = row % (2 * half) / 2;
    const uint64_t to = head * 2 * half + row % 2 * half + pair;
    const std::vector<uint32_t> elements = in.Rows(row, row + 1);
    std::copy(elements.begin(), elements.end(),
              out.values.begin() + static_cast<long>(to * in.RowSize()));
  }
  return out;
}

inline Dense StackedDense(const std::vector<Dense>& parts) {
  Dense out{parts[0].shape, {}};
  out.shape.insert(out.shape.begin(), parts.size());
  for (const Dense& part : parts) {
    out.values.insert(out.values.end(), part.values.begin(), part.values.end());
  }
  return out;
}

// How a tensor is cut and stored.
enum class Cut { kWhole, kRows, kColumns, kRange, kTransposed, kReplicas };
inline constexpr Cut kAllCuts[] = {Cut::kWhole, Cut::kRows,       Cut::kColumns,
                                   Cut::kRange, Cut::kTransposed, Cut::kReplicas};

// An index of tensors of uint32, with their bytes in it.
class MappingSample {
 public:
  MappingSample() : file_system_(NewPosixFileSystem()) {
    auto folder = ForeignFolder::Open(*file_system_, directory_.path());
    EXPECT_THAT(folder, IsOk());
    folder_ = *std::move(folder);
    index.format = "test";
  }

  const ForeignFolder& folder() const { return *folder_; }

  uint32_t Add(const std::string& name, const std::string& state, const Dense& tensor,
               Cut cut = Cut::kWhole) {
    const uint32_t number = index.AddState({name, state, Dtype::kUint32, tensor.shape});
    const size_t dims = tensor.shape.size();
    if (tensor.values.empty()) return number;
    const uint32_t extent = index.AddInline(Bytes(tensor.values));
    ForeignPiece piece;
    piece.extent = extent;
    piece.piece = {number, kWholeTensor, 0, tensor.values.size()};
    const uint64_t cut_row = dims == 0 ? 0 : (tensor.shape[0] + 1) / 2;
    if (cut == Cut::kRange || (dims > 0 && cut == Cut::kRows && cut_row < tensor.shape[0])) {
      const uint64_t at =
          cut == Cut::kRange ? (tensor.values.size() * 2 + 2) / 5 : cut_row * tensor.RowSize();
      piece.piece.end = at;
      index.pieces.push_back(piece);
      piece.piece = {number, kWholeTensor, at, tensor.values.size()};
      piece.offset_bytes = at * 4;
      index.pieces.push_back(piece);
      return number;
    }
    if (cut == Cut::kColumns && dims >= 2 && tensor.shape[dims - 1] > 1) {
      AddColumns(number, tensor);
      return number;
    }
    if (cut == Cut::kTransposed && dims >= 2) {
      const Dense other = TransposedDense(tensor);
      piece.extent = index.AddInline(Bytes(other.values));
      std::vector<uint64_t> strides(dims, 1);
      for (size_t d = dims - 1; d-- > 0;) strides[d] = strides[d + 1] * other.shape[d + 1];
      std::swap(strides[dims - 2], strides[dims - 1]);
      piece.strides = static_cast<uint32_t>(index.strides.size());
      index.strides.push_back(strides);
    }
    index.pieces.push_back(piece);
    if (cut == Cut::kReplicas) index.pieces.push_back(piece);
    return number;
  }

  void Finished() { ASSERT_THAT(Finish(index), IsOk()); }

  // The tensor as it is read, or an empty one that fails the test.
  Dense Read(const ForeignIndex& from, const std::string& name, const std::string& state) const {
    for (uint32_t i = 0; i < from.tensor_states.size(); ++i) {
      const TensorState& each = from.tensor_states[i];
      if (each.tensor != name || each.state != state) continue;
      Dense dense{each.shape, std::vector<uint32_t>(each.ElementCount())};
      WholeTensorReader reader(*folder_, from);
      EXPECT_THAT(reader.ReadRange(i, 0, dense.values.size(),
                                   std::as_writable_bytes(std::span(dense.values))),
                  IsOk());
      return dense;
    }
    ADD_FAILURE() << "no " << name << ", state " << state;
    return {};
  }

  ForeignIndex index;

 private:
  static std::string Bytes(const std::vector<uint32_t>& values) {
    std::string bytes(values.size() * 4, '\0');
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }

  // Two boxes, the second half of the columns first, each stored for itself.
  void AddColumns(uint32_t number, const Dense& tensor) {
    const size_t dims = tensor.shape.size();
    const uint64_t columns = tensor.shape[dims - 1];
    const std::pair<uint64_t, uint64_t> halves[] = {{columns / 2, columns}, {0, columns / 2}};
    for (const auto& [begin, end] : halves) {
      std::vector<uint32_t> values;
      for (uint64_t i = 0; i < tensor.values.size(); ++i) {
        if (i % columns >= begin && i % columns < end) values.push_back(tensor.values[i]);
      }
      std::vector<uint64_t> lo(dims);
      std::vector<uint64_t> size = tensor.shape;
      lo[dims - 1] = begin;
      size[dims - 1] = end - begin;
      ForeignPiece piece;
      piece.extent = index.AddInline(Bytes(values));
      piece.piece = {number, index.boxes.Add(lo, size), 0, values.size()};
      index.pieces.push_back(piece);
    }
  }

  const std::unique_ptr<FileSystem> file_system_;
  const TemporaryDirectory directory_;
  std::unique_ptr<ForeignFolder> folder_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MAPPING_SAMPLE_H_
