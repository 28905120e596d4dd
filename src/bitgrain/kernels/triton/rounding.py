"""Rounding in Triton that is the same in its interpreter and on a device.

The interpreter's conversions of float32 to 16-bit brain floats and to 8 bits cut digits off, and fast divisions of devices are off by an
ulp or two: what must be equal to the definition to the bit says its rounding here.  This module imports triton.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_integer(value):
    """float32 rounded to the nearest integer, ties to even; for magnitudes below 2^22."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def exponent_of(value):
    """int32 e with 2^e <= |value| < 2^(e + 1), for normal float32; -127 of zero and subnormals."""
    return ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def power_of_two(exponent):
    """float32 2^exponent for int32 from -127 to 127."""
    bits = tl.where(exponent <= -127, 0x400000, (exponent + 127) << 23)  # 2^-127 is a subnormal
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def small_float_steps(value, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """(|value| in steps of its binade, rounded to nearest even; the binade's exponent).

    The magnitude rounded to a type of MANTISSA bits whose smallest normal number is 2^LOWEST is steps * 2^(exponent - MANTISSA), its
    code ((exponent - LOWEST) << MANTISSA) + steps: a step count of the next binade carries into the exponent by itself.
    """
    exponent = tl.maximum(exponent_of(value), LOWEST)
    return nearest_integer(tl.abs(value) * power_of_two(MANTISSA - exponent)), exponent


@triton.jit
def small_float(value, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """float32 rounded to the grid of a small float, with its sign; NaN stays NaN.  The magnitude is at most the type's largest."""
    steps, exponent = small_float_steps(value, MANTISSA, LOWEST)
    magnitude = steps * power_of_two(exponent - MANTISSA)
    sign = value.to(tl.int32, bitcast=True) & -2147483648
    signed = (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(value != value, value, signed)


@triton.jit
def small_float_code(value, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """int32 code of small_float(value)."""
    steps, exponent = small_float_steps(value, MANTISSA, LOWEST)
    code = ((exponent - LOWEST) << MANTISSA) + steps.to(tl.int32)
    return code | ((value.to(tl.int32, bitcast=True) >> 31) & (1 << (BITS - 1)))


@triton.jit
def narrowed(value, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """float32 converted to TYPE, rounded to nearest even; WIDE: in the interpreter, whose own conversion to bfloat16 is not."""
    if WIDE and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        value = tl.where(value != value, value, rounded)
    return value.to(TYPE)
