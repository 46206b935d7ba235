"""Loops over rows of activations, compiled by numba, float32 only: each does in one pass over memory what takes torch
five to ten operations, of which each costs more to begin than to compute where a model is small.

They are compiled when this file is imported, and the result is kept in `__pycache__`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Sums may be reordered, so that they vectorise; infinities and NaN keep their meaning.
_SUMS = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "cache": True, "nogil": True}
_EXACT = {"cache": True, "nogil": True}
_BLOCK = 64  # rows whose sum is made in float32 before it is added in float64


@njit("void(f4[:,::1], f4[::1], f4, f4[:,::1], f4[::1])", **_SUMS)
def rms_norm_rows(x, weight, epsilon, output, factors):
    """output = factor x weight, factor = 1 / sqrt(mean(x^2) + epsilon). x, output: [rows, dim]. factors: [rows]."""
    rows, dim = x.shape
    for t in range(rows):
        total = np.float32(0)
        for d in range(dim):
            total += x[t, d] * x[t, d]
        factor = np.float32(1) / np.sqrt(total / np.float32(dim) + epsilon)
        factors[t] = factor
        for d in range(dim):
            output[t, d] = x[t, d] * factor * weight[d]


@njit("void(f4[:,::1], f4[:,::1], f4[::1], f4[::1], f4[:,::1], f8[::1])", **_SUMS)
def rms_norm_gradients(gradient, x, weight, factors, of_x, of_weight):
    """With g = gradient weight: of_x = factor (g - x factor^2 mean(g x)); of_weight += sum of gradient x factor.

    gradient, x, of_x: [rows, dim]. factors: [rows]. of_weight: [dim].
    """
    rows, dim = x.shape
    part = np.zeros(dim, np.float32)
    for t in range(rows):
        factor, dot = factors[t], np.float32(0)
        for d in range(dim):
            dot += gradient[t, d] * weight[d] * x[t, d]
        along = dot * factor * factor / np.float32(dim)
        for d in range(dim):
            of_x[t, d] = factor * (gradient[t, d] * weight[d] - x[t, d] * along)
            part[d] += gradient[t, d] * x[t, d] * factor
        if t % _BLOCK == _BLOCK - 1 or t == rows - 1:
            for d in range(dim):
                of_weight[d] += part[d]
                part[d] = 0


@njit("void(f4[:,:,::1], f4[:,::1], f4[:,::1], f4[:,:,::1])", **_EXACT)
def rotate_rows(t, cos, sin, output):
    """Pairs (t_i, t_{i + r/2}) turned by their angles, the rest copied. t, output: [tokens, heads, d]; cos, sin:
    [tokens, r / 2]."""
    half = cos.shape[1]
    for token in range(t.shape[0]):
        for head in range(t.shape[1]):
            for i in range(half):
                low, high, s = t[token, head, i], t[token, head, half + i], sin[token, i]
                output[token, head, i] = low * cos[token, i] - high * s
                output[token, head, half + i] = high * cos[token, i] + low * s
            for i in range(2 * half, t.shape[2]):
                output[token, head, i] = t[token, head, i]


@njit("void(f4[:,::1], f4[:,::1], f4[::1], f4[:,::1])", **_EXACT)
def swiglu_rows(x, sigmoid, factors, output):
    """output = gate sigmoid(gate) up factor. x: [rows, 2 f], gate and up. sigmoid, output: [rows, f]. factors:
    [rows]."""
    rows, width = sigmoid.shape
    for t in range(rows):
        for i in range(width):
            output[t, i] = x[t, i] * sigmoid[t, i] * x[t, width + i] * factors[t]


@njit("void(f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f4[:,::1], f4[::1])", **_SUMS)
def swiglu_gradients(gradient, x, sigmoid, factors, of_x, of_factors):
    """gradient, sigmoid: [rows, f]. x, of_x: [rows, 2 f]. factors, of_factors: [rows]."""
    rows, width = sigmoid.shape
    one = np.float32(1)
    for t in range(rows):
        factor, total = factors[t], np.float32(0)
        for i in range(width):
            gate, up, s, g = x[t, i], x[t, width + i], sigmoid[t, i], gradient[t, i]
            total += g * gate * s * up
            of_x[t, i] = g * factor * up * s * (one + gate * (one - s))
            of_x[t, width + i] = g * factor * gate * s
        of_factors[t] = total
