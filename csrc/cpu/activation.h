// Activation functions and their derivatives on one vector, for kernel bodies.
//
// Relative error below 1e-6 over the whole range, and for gelu's tail 1.5e-7 x^2 / 2 more, of the
// exponent's rounding. NaN and infinities as the formulas give them in float64: only
// gelu(+inf) = +inf needs care.
#pragma once
#include "activation_kinds.h"
#include "simd.h"

namespace vitfast {
namespace VITFAST_ISA {
namespace {

// e^x for x <= 0, underflowing to zero. Cody-Waite reduction; the polynomial's error is 3e-9.
inline vf exp_nonpositive(vf x) {
  x = vmax(splat(-110.f), x);
#if defined(__AVX512F__)
  const vf n = reinterpret_cast<vf>(_mm512_roundscale_ps(
      reinterpret_cast<__m512>(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * 1.44269504f + magic) - magic;
#endif
  const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  vf p = splat(1.381461974e-3f);
  p = fma(p, r, splat(8.368711919e-3f));
  p = fma(p, r, splat(4.166838899e-2f));
  p = fma(p, r, splat(1.666652113e-1f));
  p = fma(p, r, splat(4.999999404e-1f));
  p = fma(p * r, r, r) + 1.f;
#if defined(__AVX512F__)
  return scaled_above(n, p, reinterpret_cast<__m512>(n));
#else
  const vi exponent = __builtin_convertvector(n, vi) << 23;
  const vf scaled = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + exponent);
  return select(x != x, x, select(n <= -126.f, zero(), scaled));
#endif
}

inline vf absolute(vf x) {
  return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & static_cast<int32_t>(0x7fffffff));
}

// sigmoid(v) and 1 - sigmoid(v), both to full relative precision.
struct Logistic {
  vf s, rest;
};
inline Logistic logistic(vf v) {
  const vf e = exp_nonpositive(-absolute(v));
  const vf large = 1.f / (1.f + e), small = e * large;
  const vi positive = v >= 0.f;
  return {select(positive, large, small), select(positive, small, large)};
}

// 1 / x for x of at least 1, to 2 ulp.
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = reinterpret_cast<vf>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return fma(fma(-x, r, splat(1.f)), r, r);
#else
  return 1.f / x;
#endif
}

// e = exp(-a^2 / 2) and the normal distribution's upper tail Q(a) = erfc(a / sqrt 2) / 2, a >= 0.
// Q(a) / e is a polynomial in t = 1 / (1 + 11/32 a), fitted for least relative error (3e-8) with
// coefficients that are floats, so that it is right on average too.
struct Tail {
  vf e, q;
};
inline Tail normal_tail(vf a) {
  const vf e = exp2_nonpositive(a * a * -0.721347520f);
  const vf t = reciprocal(fma(a, splat(0.34375f), splat(1.f)));
  vf p = splat(-2.736672945e-2f);
  p = fma(p, t, splat(1.418111622e-1f));
  p = fma(p, t, splat(-2.677482367e-1f));
  p = fma(p, t, splat(1.866752356e-1f));
  p = fma(p, t, splat(-3.658137470e-2f));
  p = fma(p, t, splat(1.115871593e-1f));
  p = fma(p, t, splat(1.169909984e-1f));
  p = fma(p, t, splat(1.375104487e-1f));
  p = fma(p, t, splat(1.371213496e-1f));
  return {e, p * t * e};
}
// |x|, of which gelu needs to know no more than 15 on the positive side: past it, x - |x| Q is x,
// and infinity would make it NaN.
inline vf gelu_size(vf x) { return absolute(vmin(splat(15.f), x)); }

// sqrt(2 / pi) (x + 0.044715 x^3), twice; and its derivative.
constexpr float kTanhLinear = 1.595769122f, kTanhCubic = 0.0713548163f;
inline vf tanh_argument(vf x) { return x * fma(x * x, splat(kTanhCubic), splat(kTanhLinear)); }

// f(Kind<A>{}) for the activation A that is asked for.
template <Act A>
struct Kind {
  static constexpr Act value = A;
};
template <class F>
inline auto with_act(Act act, const F& f) {
  switch (act) {
    case Act::relu: return f(Kind<Act::relu>{});
    case Act::gelu: return f(Kind<Act::gelu>{});
    case Act::gelu_tanh: return f(Kind<Act::gelu_tanh>{});
    case Act::quick_gelu: return f(Kind<Act::quick_gelu>{});
    case Act::silu: return f(Kind<Act::silu>{});
    case Act::sigmoid: return f(Kind<Act::sigmoid>{});
    default: return f(Kind<Act::none>{});
  }
}

template <Act A>
inline vf activate(vf x) {
  if constexpr (A == Act::relu) return select(x <= 0.f, zero(), x);
  if constexpr (A == Act::gelu) {
    const vf a = gelu_size(x);
    return vmax(zero(), x) - a * normal_tail(a).q;
  }
  if constexpr (A == Act::gelu_tanh) return x * logistic(tanh_argument(x)).s;
  if constexpr (A == Act::quick_gelu) return x * logistic(x * 1.702f).s;
  if constexpr (A == Act::silu) return x * logistic(x).s;
  if constexpr (A == Act::sigmoid) return logistic(x).s;
  return x;
}

// The value and the derivative.
struct Derived {
  vf y, d;
};
template <Act A>
inline Derived differentiate(vf x) {
  if constexpr (A == Act::relu) {
    const vi off = x <= 0.f;
    return {select(off, zero(), x), select(off, zero(), splat(1.f))};
  }
  if constexpr (A == Act::gelu) {
    const vf a = gelu_size(x);
    const Tail tail = normal_tail(a);
    const vf cdf = select(x >= 0.f, 1.f - tail.q, tail.q);
    return {vmax(zero(), x) - a * tail.q, fma(x * 0.398942280f, tail.e, cdf)};
  }
  if constexpr (A == Act::gelu_tanh) {
    const vf a = absolute(x), near = select(a > 20.f, splat(20.f), a);
    const vf slope = fma(near * near, splat(3.f * kTanhCubic), splat(kTanhLinear));
    const Logistic l = logistic(tanh_argument(x));
    return {x * l.s, fma(x * l.s, l.rest * slope, l.s)};
  }
  if constexpr (A == Act::quick_gelu) {
    const Logistic l = logistic(x * 1.702f);
    return {x * l.s, fma(x * l.s, l.rest * 1.702f, l.s)};
  }
  if constexpr (A == Act::silu) {
    const Logistic l = logistic(x);
    return {x * l.s, fma(x * l.s, l.rest, l.s)};
  }
  if constexpr (A == Act::sigmoid) {
    const Logistic l = logistic(x);
    return {l.s, l.s * l.rest};
  }
  return {x, splat(1.f)};
}

}  // namespace
}  // namespace VITFAST_ISA
}  // namespace vitfast
