#include "examples/tiny_lm/layers.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "examples/tiny_lm/exact.h"

namespace tiny_lm {
namespace {

// The order of this sum is part of the model: kBlock lanes, then pairs of lanes. (It is also what
// lets the compiler use vector registers without reordering anything.)
template <typename Real>
Real Dot(const Real* a, const Real* b, size_t count) {
  Real lanes[kBlock] = {};
  size_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    for (size_t lane = 0; lane < kBlock; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) lanes[i % kBlock] += a[i] * b[i];
  for (size_t width = kBlock / 2; width > 0; width /= 2) {
    for (size_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename Real>
void AddScaled(Real scale, const Real* x, size_t count, Real* y) {
  for (size_t i = 0; i < count; ++i) y[i] += scale * x[i];
}

template <typename Real>
constexpr Real kGeluScale = static_cast<Real>(0.7978845608028654);  // sqrt(2 / pi)
template <typename Real>
constexpr Real kGeluCubic = static_cast<Real>(0.044715);

}  // namespace

template <typename Real>
void Layers<Real>::LinearForward(const Matrix& matrix, const Real* x, size_t rows, Real* y) {
  for (size_t row = 0; row < rows; ++row) {
    for (size_t o = 0; o < matrix.outputs; ++o) {
      const Real sum =
          Dot(x + row * matrix.inputs, matrix.weight + o * matrix.inputs, matrix.inputs);
      y[row * matrix.outputs + o] = matrix.bias == nullptr ? sum : sum + matrix.bias[o];
    }
  }
}

template <typename Real>
void Layers<Real>::LinearForwardPartial(const Matrix& matrix, const Real* x, size_t rows,
                                        Partial partial) {
  for (size_t row = 0; row < rows; ++row) {
    for (size_t o = 0; o < matrix.outputs; ++o) {
      const Real* a = x + row * matrix.inputs;
      const Real* b = matrix.weight + o * matrix.inputs;
      int64_t sum = 0;
      for (size_t i = 0; i < matrix.inputs; i += kBlock) {
        sum += ToFixedPoint(Dot(a + i, b + i, kBlock), partial.overflow_count);
      }
      partial.sums[row * matrix.outputs + o] = sum;
    }
  }
}

template <typename Real>
void Layers<Real>::LinearBackwardWeight(const Matrix& matrix, const Real* x, const Real* d_y,
                                        size_t rows, MatrixGradient gradient) {
  for (size_t row = 0; row < rows; ++row) {
    for (size_t o = 0; o < matrix.outputs; ++o) {
      const Real d = d_y[row * matrix.outputs + o];
      AddScaled(d, x + row * matrix.inputs, matrix.inputs, gradient.weight + o * matrix.inputs);
      if (gradient.bias != nullptr) gradient.bias[o] += d;
    }
  }
}

template <typename Real>
void Layers<Real>::LinearBackwardInput(const Matrix& matrix, const Real* d_y, size_t rows,
                                       Real* d_x) {
  std::fill_n(d_x, rows * matrix.inputs, Real{0});
  for (size_t row = 0; row < rows; ++row) {
    for (size_t o = 0; o < matrix.outputs; ++o) {
      AddScaled(d_y[row * matrix.outputs + o], matrix.weight + o * matrix.inputs, matrix.inputs,
                d_x + row * matrix.inputs);
    }
  }
}

template <typename Real>
void Layers<Real>::LinearBackwardInputPartial(const Matrix& matrix, const Real* d_y, size_t rows,
                                              size_t block, Partial partial) {
  std::vector<Real> sum(matrix.inputs);
  std::fill(partial.sums.begin(), partial.sums.end(), 0);
  for (size_t row = 0; row < rows; ++row) {
    int64_t* sums = partial.sums.data() + row * matrix.inputs;
    for (size_t begin = 0; begin < matrix.outputs; begin += block) {
      std::fill(sum.begin(), sum.end(), Real{0});
      for (size_t o = begin; o < std::min(begin + block, matrix.outputs); ++o) {
        AddScaled(d_y[row * matrix.outputs + o], matrix.weight + o * matrix.inputs, matrix.inputs,
                  sum.data());
      }
      for (size_t i = 0; i < matrix.inputs; ++i) {
        sums[i] += ToFixedPoint(sum[i], partial.overflow_count);
      }
    }
  }
}

template <typename Real>
void Layers<Real>::FromPartial(std::span<const int64_t> sums, const Real* bias, size_t width,
                               Real* y) {
  for (size_t i = 0; i < sums.size(); ++i) {
    y[i] = static_cast<Real>(FromFixedPoint(sums[i]));
    if (bias != nullptr) y[i] += bias[i % width];
  }
}

template <typename Real>
void Layers<Real>::NormForward(const Real* x, const Real* weight, const Real* bias, size_t rows,
                               size_t width, Real* y, Real* mean, Real* inverse_deviation) {
  constexpr Real kEpsilon = static_cast<Real>(1e-5);
  const Real n = static_cast<Real>(width);
  for (size_t row = 0; row < rows; ++row, x += width, y += width) {
    Real sum = 0;
    for (size_t i = 0; i < width; ++i) sum += x[i];
    mean[row] = sum / n;
    Real squares = 0;
    for (size_t i = 0; i < width; ++i) squares += (x[i] - mean[row]) * (x[i] - mean[row]);
    inverse_deviation[row] = Real{1} / std::sqrt(squares / n + kEpsilon);
    for (size_t i = 0; i < width; ++i) {
      y[i] = (x[i] - mean[row]) * inverse_deviation[row] * weight[i] + bias[i];
    }
  }
}

template <typename Real>
void Layers<Real>::NormBackward(const Real* x, const Real* weight, const Real* d_y,
                                const Real* mean, const Real* inverse_deviation, size_t rows,
                                size_t width, Real* d_x, Real* d_weight, Real* d_bias) {
  const Real n = static_cast<Real>(width);
  for (size_t row = 0; row < rows; ++row, x += width, d_y += width, d_x += width) {
    Real sum = 0;
    Real dot = 0;
    for (size_t i = 0; i < width; ++i) {
      const Real normal = (x[i] - mean[row]) * inverse_deviation[row];
      const Real d_normal = d_y[i] * weight[i];
      d_weight[i] += d_y[i] * normal;
      d_bias[i] += d_y[i];
      sum += d_normal;
      dot += d_normal * normal;
    }
    for (size_t i = 0; i < width; ++i) {
      const Real normal = (x[i] - mean[row]) * inverse_deviation[row];
      d_x[i] += (d_y[i] * weight[i] - sum / n - normal * (dot / n)) * inverse_deviation[row];
    }
  }
}

template <typename Real>
void Layers<Real>::AttentionForward(Heads heads, const Real* qkv, size_t rows, Real* y,
                                    Real* weights) {
  const size_t width = heads.count * heads.size;
  const Real scale = Real{1} / std::sqrt(static_cast<Real>(heads.size));
  std::fill_n(y, rows * width, Real{0});
  for (size_t head = 0; head < heads.count; ++head) {
    for (size_t to = 0; to < rows; ++to) {
      const Real* q = qkv + to * 3 * width + head * heads.size;
      Real* w = weights + (head * rows + to) * rows;
      Real greatest = -INFINITY;
      for (size_t from = 0; from <= to; ++from) {
        w[from] = scale * Dot(q, qkv + (from * 3 + 1) * width + head * heads.size, heads.size);
        greatest = std::max(greatest, w[from]);
      }
      Real sum = 0;
      for (size_t from = 0; from <= to; ++from) sum += w[from] = std::exp(w[from] - greatest);
      for (size_t from = 0; from <= to; ++from) {
        w[from] /= sum;
        AddScaled(w[from], qkv + (from * 3 + 2) * width + head * heads.size, heads.size,
                  y + to * width + head * heads.size);
      }
    }
  }
}

template <typename Real>
void Layers<Real>::AttentionBackward(Heads heads, const Real* qkv, const Real* weights,
                                     const Real* d_y, size_t rows, Real* d_qkv) {
  const size_t width = heads.count * heads.size;
  const Real scale = Real{1} / std::sqrt(static_cast<Real>(heads.size));
  std::fill_n(d_qkv, rows * 3 * width, Real{0});
  std::vector<Real> d_w(rows);
  for (size_t head = 0; head < heads.count; ++head) {
    for (size_t to = 0; to < rows; ++to) {
      const Real* w = weights + (head * rows + to) * rows;
      const Real* d_out = d_y + to * width + head * heads.size;
      Real dot = 0;
      for (size_t from = 0; from <= to; ++from) {
        const size_t v = (from * 3 + 2) * width + head * heads.size;
        d_w[from] = Dot(d_out, qkv + v, heads.size);
        AddScaled(w[from], d_out, heads.size, d_qkv + v);
        dot += d_w[from] * w[from];
      }
      const size_t q = to * 3 * width + head * heads.size;
      for (size_t from = 0; from <= to; ++from) {
        const size_t k = (from * 3 + 1) * width + head * heads.size;
        const Real d_score = scale * w[from] * (d_w[from] - dot);
        AddScaled(d_score, qkv + k, heads.size, d_qkv + q);
        AddScaled(d_score, qkv + q, heads.size, d_qkv + k);
      }
    }
  }
}

template <typename Real>
void Layers<Real>::GeluForward(const Real* x, size_t count, Real* y) {
  for (size_t i = 0; i < count; ++i) {
    const Real inner = kGeluScale<Real> * (x[i] + kGeluCubic<Real> * x[i] * x[i] * x[i]);
    y[i] = static_cast<Real>(0.5) * x[i] * (Real{1} + std::tanh(inner));
  }
}

template <typename Real>
void Layers<Real>::GeluBackward(const Real* x, const Real* d_y, size_t count, Real* d_x) {
  constexpr Real kHalf = static_cast<Real>(0.5);
  for (size_t i = 0; i < count; ++i) {
    const Real inner = kGeluScale<Real> * (x[i] + kGeluCubic<Real> * x[i] * x[i] * x[i]);
    const Real tanh = std::tanh(inner);
    const Real d_inner = kGeluScale<Real> * (Real{1} + Real{3} * kGeluCubic<Real> * x[i] * x[i]);
    d_x[i] = d_y[i] * (kHalf * (Real{1} + tanh) + kHalf * x[i] * (Real{1} - tanh * tanh) * d_inner);
  }
}

template <typename Real>
void Layers<Real>::GreatestLogits(Vocabulary vocabulary, const Real* logits, size_t rows,
                                  Real* greatest) {
  for (size_t row = 0; row < rows; ++row, logits += vocabulary.stride) {
    greatest[row] = -INFINITY;
    for (size_t i = 0; i < vocabulary.count; ++i)
      greatest[row] = std::max(greatest[row], logits[i]);
  }
}

template <typename Real>
void Layers<Real>::SoftmaxPartial(Vocabulary vocabulary, Real* logits, const uint8_t* targets,
                                  size_t rows, const Real* greatest, Partial partial) {
  for (size_t row = 0; row < rows; ++row, logits += vocabulary.stride) {
    const size_t target = targets[row] - vocabulary.first;  // wraps if it is below
    partial.sums[rows + row] =
        target < vocabulary.count ? ToBits(logits[target] - greatest[row]) : 0;
    int64_t sum = 0;
    for (size_t i = 0; i < vocabulary.count; ++i) {
      logits[i] = std::exp(logits[i] - greatest[row]);
      sum += ToFixedPoint(logits[i], partial.overflow_count);
    }
    partial.sums[row] = sum;
  }
}

template <typename Real>
Real Layers<Real>::CrossEntropy(Vocabulary vocabulary, Real* logits, const uint8_t* targets,
                                size_t rows, const int64_t* denominators,
                                const int64_t* target_bits) {
  const Real n = static_cast<Real>(rows);
  Real loss = 0;
  for (size_t row = 0; row < rows; ++row, logits += vocabulary.stride) {
    const Real sum = static_cast<Real>(FromFixedPoint(denominators[row]));
    loss += std::log(sum) - FromBits<Real>(target_bits[row]);
    for (size_t i = 0; i < vocabulary.count; ++i) logits[i] = logits[i] / sum / n;
    std::fill(logits + vocabulary.count, logits + vocabulary.stride, Real{0});
    const size_t target = targets[row] - vocabulary.first;
    if (target < vocabulary.count) logits[target] -= Real{1} / n;
  }
  return loss / n;
}

template struct Layers<float>;
template struct Layers<double>;

}  // namespace tiny_lm
