// Layers, forward and backward, by hand. Each works on `rows` positions, row-major: attention, the
// mean of the cross entropy and the gradients of weights on those of one sample, all else on those
// of any number of samples.
//
// Nothing here knows how the model is distributed. Where tensor parallelism cuts a contraction
// (a projection over heads or hidden units, or the gradient that flows back through one), the sum
// is left in int64 fixed point (exact.h) in a buffer of the caller: another rank's part can be
// added to it before FromPartial() turns it into numbers.
//
// A part of a contraction, of heads or of the vocabulary may be empty.
//
// A gradient argument (d_...) of a weight is added to; one of an activation is overwritten, unless
// it says otherwise. Matrices are [outputs, inputs], as in torch.nn.Linear. Sizes of inputs, heads
// and outputs that are cut into blocks are multiples of kBlock.
#ifndef HOLDFAST_EXAMPLES_TINY_LM_LAYERS_H_
#define HOLDFAST_EXAMPLES_TINY_LM_LAYERS_H_

#include <cstddef>
#include <cstdint>
#include <span>

namespace tiny_lm {

// Elements of a contraction that are summed in floating point before they go to fixed point.
inline constexpr size_t kBlock = 8;

// Sums in fixed point, and what did not fit.
struct Partial {
  std::span<int64_t> sums;
  int64_t& overflow_count;
};

template <typename Real>
struct Layers {
  struct Matrix {
    const Real* weight;
    const Real* bias;  // or null
    size_t outputs;
    size_t inputs;
  };
  struct MatrixGradient {
    Real* weight;
    Real* bias;  // or null
  };

  // y = x W' + b, whole on one rank or cut over outputs.
  static void LinearForward(const Matrix& matrix, const Real* x, size_t rows, Real* y);
  // The same without bias, cut over inputs: y's sums in partial.
  static void LinearForwardPartial(const Matrix& matrix, const Real* x, size_t rows,
                                   Partial partial);
  // Adds to the gradients of weight and bias.
  static void LinearBackwardWeight(const Matrix& matrix, const Real* x, const Real* d_y,
                                   size_t rows, MatrixGradient gradient);
  // d_x = d_y W, cut over inputs.
  static void LinearBackwardInput(const Matrix& matrix, const Real* d_y, size_t rows, Real* d_x);
  // The same, cut over outputs, in blocks of `block` outputs: d_x's sums in partial.
  static void LinearBackwardInputPartial(const Matrix& matrix, const Real* d_y, size_t rows,
                                         size_t block, Partial partial);
  // y = sums + bias (or null), row by row.
  static void FromPartial(std::span<const int64_t> sums, const Real* bias, size_t width, Real* y);

  // y = (x - mean) / deviation * weight + bias; keeps mean and 1 / deviation of each row.
  static void NormForward(const Real* x, const Real* weight, const Real* bias, size_t rows,
                          size_t width, Real* y, Real* mean, Real* inverse_deviation);
  // ADDS to d_x.
  static void NormBackward(const Real* x, const Real* weight, const Real* d_y, const Real* mean,
                           const Real* inverse_deviation, size_t rows, size_t width, Real* d_x,
                           Real* d_weight, Real* d_bias);

  struct Heads {
    size_t count;
    size_t size;  // elements of a head
  };
  // Causal attention. `qkv` has rows of [q of all heads, k of all heads, v of all heads]; `y` rows
  // of all heads; `weights` keeps [head, row, row].
  static void AttentionForward(Heads heads, const Real* qkv, size_t rows, Real* y, Real* weights);
  static void AttentionBackward(Heads heads, const Real* qkv, const Real* weights, const Real* d_y,
                                size_t rows, Real* d_qkv);

  // GELU in its tanh form.
  static void GeluForward(const Real* x, size_t count, Real* y);
  static void GeluBackward(const Real* x, const Real* d_y, size_t count, Real* d_x);

  // Cross entropy of softmax(logits), whose columns may be cut over ranks: [first, first + count)
  // of them are here, in rows of `stride`. Three steps, with sums over the ranks between them.
  struct Vocabulary {
    size_t first;
    size_t count;
    size_t stride;  // columns of padding behind them are turned into gradients of 0
  };
  // 1. The greatest logit of each row that is here; -infinity without any.
  static void GreatestLogits(Vocabulary vocabulary, const Real* logits, size_t rows,
                             Real* greatest);
  // 2. With the greatest of all ranks: logits become their exponentials. In `partial`, the rows'
  //    denominators, then the bits of the targets' logits (0 if a target is elsewhere).
  static void SoftmaxPartial(Vocabulary vocabulary, Real* logits, const uint8_t* targets,
                             size_t rows, const Real* greatest, Partial partial);
  // 3. With the sums over all ranks: the mean loss over the rows, and the logits' gradient in their
  //    place.
  static Real CrossEntropy(Vocabulary vocabulary, Real* logits, const uint8_t* targets, size_t rows,
                           const int64_t* denominators, const int64_t* target_bits);
};

}  // namespace tiny_lm

#endif  // HOLDFAST_EXAMPLES_TINY_LM_LAYERS_H_
