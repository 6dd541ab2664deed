"""Elementary functions of the coordinate-wise rules in Triton, float32 in and out."""

# Triton's functions take Triton's values: annotations would be wrong for either side.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(value):
    """A run-time number: as a constant it would make the function that gets it a separate one."""
    return tl.cast(value, tl.int32)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); an overflow of the exponential gives 0."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh, accurate relative to x near 0, +-1 for large x, NaN for NaN."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    large = tl.div_rn(1.0 - e, 1.0 + e)
    # The difference above cancels near 0: there the Taylor series, off by 2e-9 relative at 0.3.
    s = x * x
    series = -929569.0 / 638512875.0
    series = series * s + 21844.0 / 6081075.0
    series = series * s - 1382.0 / 155925.0
    series = series * s + 62.0 / 2835.0
    series = series * s - 17.0 / 315.0
    series = series * s + 2.0 / 15.0
    series = series * s - 1.0 / 3.0
    small = x + x * (s * series)
    return tl.where(magnitude < 0.3, small, tl.where(x < 0.0, -large, large))


@triton.jit
def elu(x):
    """x above 0, e^x - 1 below, by 2 tanh(x / 2) / (1 - tanh(x / 2)) so that nothing cancels."""
    half = tanh(0.5 * tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
    return tl.where(x > 0.0, x, tl.div_rn(2.0 * half, 1.0 - half))


@triton.jit
def log_sign_features(grad, p, eps, exp_p):
    """max(log(|g| + eps) / p, -1) and clip(e^p g, -1, 1); NaN stays NaN."""
    # The smallest normal number in place of 0: its log / p is below -1 for every p accepted.
    magnitude = tl.maximum(
        tl.abs(grad) + eps, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL
    )
    logarithm = tl.div_rn(tl.log(magnitude), p)
    linear = grad * exp_p
    first = tl.where(logarithm < -1.0, -1.0, logarithm)
    return first, tl.where(linear > 1.0, 1.0, tl.where(linear < -1.0, -1.0, linear))


@triton.jit
def moment_features(grad, m, v, correction1, correction2, beta1, beta2, rest1, rest2):
    """RNNprop's new moments m and v, and g / r and m / ((1 - beta1^t) r), r = sqrt(v^) + 1e-8.

    The corrections are 1 / (1 - beta^t), `rest` is 1 - beta.
    """
    m = beta1 * m + rest1 * grad
    v = beta2 * v + rest2 * grad * grad
    root = tl.sqrt_rn(v * correction2) + 1e-8
    return m, v, tl.div_rn(grad, root), tl.div_rn(m * correction1, root)


@triton.jit
def bounded_exp(x):
    """e^x, held at 2^40 so that a product of three such numbers is finite; NaN for NaN."""
    return tl.exp2(tl.minimum(x * 1.44269504, 40.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def tanh_fraction(x):
    """tanh(x) as numerator and denominator, accurate relative to x near 0; NaN for NaN."""
    e = bounded_exp(2.0 * x)
    # e - 1 cancels near 0: there the odd minimax polynomial, relative error 3.7e-8.
    s = x * x
    series = s * 0.016437571495771408 - 0.05267180874943733
    series = series * s + 0.13320724666118622
    series = series * s - 0.3333294689655304
    near = tl.abs(x) < 0.55
    return tl.where(near, x + x * (s * series), e - 1.0), tl.where(near, 1.0, e + 1.0)


@triton.jit
def lstm_cell(i, f, g, o, c):
    """New h and c from the preactivations of the gates and the old c, by two divisions.

    c' = sigmoid(f) c + sigmoid(i) tanh(g) over the common denominator of its three gates,
    h' = sigmoid(o) tanh(c') over that of its two.
    """
    input_inverse, forget_inverse = 1.0 + bounded_exp(-i), 1.0 + bounded_exp(-f)
    numerator, denominator = tanh_fraction(g)
    without_forget = input_inverse * denominator
    c = (c * without_forget + numerator * forget_inverse) / (without_forget * forget_inverse)
    numerator, denominator = tanh_fraction(c)
    return numerator / ((1.0 + bounded_exp(-o)) * denominator), c


@triton.constexpr_function
def layer_offset(layer, rnnprop, features, hidden):
    """Offset of a layer's meta-parameters; of the readout's for `layer` = number of layers."""
    inputs = hidden if rnnprop else features
    offset = 3 * hidden if rnnprop else 0
    for number in range(layer):
        offset += 4 * hidden * ((hidden if number else inputs) + hidden + 1)
    return offset


@triton.jit
def lstm_cell_backward(i, f, g, o, c, d_h, d_c):
    """Gradients of the four preactivations and of the old c, given those of the new h and c."""
    exp_i, exp_f, exp_o = bounded_exp(-i), bounded_exp(-f), bounded_exp(-o)
    i, f, o = 1.0 / (1.0 + exp_i), 1.0 / (1.0 + exp_f), 1.0 / (1.0 + exp_o)
    numerator, denominator = tanh_fraction(g)
    candidate = numerator / denominator
    numerator, denominator = tanh_fraction(f * c + i * candidate)
    tanh_c = numerator / denominator
    d_c += d_h * o * (1.0 - tanh_c * tanh_c)
    # s (1 - s) = e^-a s^2, which does not cancel where s is near 1.
    d_i = d_c * candidate * (exp_i * i * i)
    d_f = d_c * c * (exp_f * f * f)
    d_g = d_c * i * (1.0 - candidate * candidate)
    d_o = d_h * tanh_c * (exp_o * o * o)
    return d_i, d_f, d_g, d_o, d_c * f


@triton.jit
def log_sign_features_backward(d_first, d_second, grad, p, eps, exp_p):
    """dL/d(grad) from the gradients of the two features; flat where a feature is clipped."""
    magnitude = tl.maximum(
        tl.abs(grad) + eps, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL
    )
    sign = tl.where(grad > 0.0, 1.0, tl.where(grad < 0.0, -1.0, 0.0))
    logarithmic = tl.div_rn(tl.log(magnitude), p) >= -1.0
    slope = tl.where(logarithmic, tl.div_rn(sign, p * magnitude), 0.0)
    return d_first * slope + d_second * tl.where(tl.abs(grad * exp_p) <= 1.0, exp_p, 0.0)


@triton.jit
def moment_features_backward(
    d_g_scaled, d_m_scaled, d_m, d_v, grad, v, g_scaled, m_scaled, correction1, correction2,
    beta1, beta2, rest1, rest2,
):  # fmt: skip
    """dL/d(grad) and the adjoints of the old moments, from those of the features and new moments.

    `v` is the new second moment; the other arguments are as in `moment_features`.
    """
    root = tl.sqrt_rn(v * correction2)
    rms = root + 1e-8
    d_rms = -(d_g_scaled * g_scaled + d_m_scaled * m_scaled) / rms
    # The root has no slope at 0; there v is 0 because every gradient was.
    zero = root == 0.0
    d_v += tl.where(zero, 0.0, 0.5 * d_rms * correction2 / tl.where(zero, 1.0, root))
    d_m += d_m_scaled * correction1 / rms
    d_grad = d_g_scaled / rms + rest1 * d_m + 2.0 * rest2 * grad * d_v
    return d_grad, beta1 * d_m, beta2 * d_v
