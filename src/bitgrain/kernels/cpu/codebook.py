"""Codebook weights through native products that look their codes up while they multiply: the dense weight never exists.

Prepared tensors are those of the weight, codes as they are stored, and tables of a few kilobytes beside them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cpu.native_kernel import NativeKernel
from bitgrain.numerics.bitpack import dense_bytes, pack_dense
from bitgrain.numerics.e8_lattice import e8_ball, e8p_codebook
from bitgrain.weights import ActivationSpec, Weight
from bitgrain.weights.additive import AdditiveCodebookWeight
from bitgrain.weights.codebook import CodebookWeight
from bitgrain.weights.lattice import LatticeWeight
from bitgrain.weights.trellis import TrellisWeight, parse_element
from bitgrain.weights.vector_codebook import VectorCodebookWeight

UNIT = 8  # in features that the kernels decode together
OVERHANG = 32  # bytes that a kernel may read beyond a stream of codes
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DECODERS = {"lut": 0, "quantlut": 1, "quantlut_sym": 2, "1mad": 3, "2mad": 4, "3inst": 5}
MAD_DIVISOR = 147.800537109375  # of numerics.trellis_codes; the kernel sums integers and divides once
MAX_BITS, MAX_STEP = 8, 8


class CodebookKernel(NativeKernel):
    """y = x W^T in float32, W looked up eight columns at a time.  A scheme's activation quantization is applied to x first."""

    name = ""
    rank = 50
    kind = ""

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT if problem.activation.is_none else Fidelity.EMULATED

    def _refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind != self.kind:
            return Refusal(f"takes {self.kind.replace('_', ' ')} weights, not {problem.weight.kind} ones")
        return self._limits(problem)

    def _limits(self, problem: LinearProblem) -> Refusal | None:
        """What of its kind the kernel does not take."""
        return None

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        dtype = x.dtype
        if not prepared.activation.is_none:
            x = prepared.activation.fake_quantize(x).float()
        return self._run(x, prepared, bias, dtype)

    def _run(self, x: Tensor, prepared: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


class AdditiveLinear(CodebookKernel):
    """Sums of entries of any number of codebooks of up to 16 bits; blocks of any height and width."""

    name = "cpu.additive"
    kind = "additive"

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, AdditiveCodebookWeight)  # refusal() asked for the kind
        tensors = {"codes": weight.codes.contiguous(), "books": _float(weight.codebooks), "scale": _float(weight.scale)}
        return Prepared(weight.shape, tensors, activation)

    def _run(self, x: Tensor, prepared: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        from bitgrain.kernels.cpu.codebook_operators import additive_linear

        t = prepared.tensors
        y: Tensor = additive_linear(x, t["codes"], t["books"], t["scale"], bias, prepared.shape[0], dtype)
        return y


class LatticeLinear(CodebookKernel):
    """Points of the E8 lattice: magnitudes, signs and shifts from three small tables, and residuals of both kinds."""

    name = "cpu.lattice"
    kind = "lattice"

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, LatticeWeight)  # refusal() asked for the kind
        magnitudes, signs, shifts = lattice_tables()
        tensors = {"codes": weight.codes.contiguous(), "magnitudes": magnitudes, "signs": signs, "shifts": shifts, "second": _ball(weight.residual_divisor)}
        if weight.residual is not None:
            tensors["residual"] = weight.residual.contiguous()
        return Prepared(weight.shape, tensors, activation, {"factor": 1.0 / weight.residual_divisor})

    def _run(self, x: Tensor, prepared: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        from bitgrain.kernels.cpu.codebook_operators import lattice_linear

        t, factor = prepared.tensors, prepared.meta["factor"]
        y: Tensor = lattice_linear(
            x, t["codes"], t.get("residual"), t["magnitudes"], t["signs"], t["shifts"], t["second"], factor, bias, prepared.shape[0], dtype
        )
        return y


class TrellisLinear(CodebookKernel):
    """Bit streams whose windows become values in registers, or rows of a table; both orders of values."""

    name = "cpu.trellis"
    kind = "trellis"

    def _limits(self, problem: LinearProblem) -> Refusal | None:
        _, _, step, _, _ = parse_element(problem.weight.element)
        if problem.weight.bits > MAX_BITS or step > MAX_STEP:
            return Refusal(f"takes up to {MAX_BITS} bits and {MAX_STEP} values per window, not {problem.weight.bits} and {step}")
        return None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, TrellisWeight)  # refusal() asked for the kind
        tensors = {"packed": weight.packed.contiguous()}
        if weight.table is not None:
            tensors["table"] = weight.table.float().contiguous()
        meta = {
            "bits": weight.bits, "window": weight.window, "step": weight.step, "decoder": DECODERS[weight.decoder], "fragments": weight.order == "fragments",
            "factor": 1.0 / MAD_DIVISOR if weight.decoder in ("1mad", "2mad") else 1.0,
        }  # fmt: skip
        return Prepared(weight.shape, tensors, activation, meta)

    def _run(self, x: Tensor, prepared: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        from bitgrain.kernels.cpu.codebook_operators import trellis_linear

        t, meta = prepared.tensors, prepared.meta
        y: Tensor = trellis_linear(
            x, t["packed"], t.get("table"), meta["bits"], meta["window"], meta["step"], meta["decoder"], meta["fragments"], meta["factor"], bias, prepared.shape[0], dtype
        )
        return y


class VectorLinear(CodebookKernel):
    """Vectors of consecutive rows, with residuals, groups of codebooks and outlier columns.

    The columns' scale goes into x, and their offset into one sum per row of x.
    """

    name = "cpu.vector"
    kind = "vector_codebook"

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, VectorCodebookWeight)  # refusal() asked for the kind
        columns = weight.codes.shape[1]
        books = {"book": weight.centroids, "residual_book": weight.residual_centroids, "outlier_book": weight.outlier_centroids}
        held = {name: book for name, book in books.items() if book is not None}
        same = len({book.dtype for book in held.values()}) == 1 and weight.centroids.dtype in FLOATS
        # the kernel reads 16-bit entries with the two bytes behind them
        tensors = {name: torch.nn.functional.pad((book if same else book.float()).flatten(), (0, UNIT)) for name, book in held.items()}
        tensors["codes"] = weight.codes.contiguous()
        for name, source in (("residual_codes", weight.residual_codes), ("outlier_codes", weight.outlier_codes)):
            if source is not None:
                tensors[name] = source.contiguous()
        if weight.group_index is not None:
            group = torch.nn.functional.pad(weight.group_index, (0, -columns % UNIT)).to(torch.int32)
            tensors["start"] = group * weight.sizes.entries
            tensors["residual_start"] = group * weight.sizes.residual
        for name, values in (("column_scale", weight.column_scale), ("column_offset", weight.column_offset)):
            if values is not None:
                tensors[name] = values.float().contiguous()
        if weight.outlier_columns is not None:
            tensors["gather"] = _outliers_last(weight.shape[1], weight.outlier_columns)
        return Prepared(weight.shape, tensors, activation, {"length": weight.sizes.length, "outlier_length": weight.sizes.outlier_length})

    def _run(self, x: Tensor, prepared: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        from bitgrain.kernels.cpu.codebook_operators import vector_linear

        t, meta = prepared.tensors, prepared.meta
        y: Tensor = vector_linear(
            x, t["codes"], t["book"], t.get("start"), t.get("residual_codes"), t.get("residual_book"), t.get("residual_start"), meta["length"], t.get("outlier_codes"),
            t.get("outlier_book"), meta["outlier_length"], t.get("gather"), t.get("column_scale"), t.get("column_offset"), bias, prepared.shape[0], dtype,
        )  # fmt: skip
        return y


class LookupLinear(CodebookKernel):
    """Codes of 1 to 8 bits in tables of values, one table for all rows or one for each, with a scale per group."""

    name = "cpu.lookup"
    kind = "codebook"

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, CodebookWeight)  # refusal() asked for the kind
        k, groups = weight.in_features, weight.scale.shape[1]
        size = weight.group_size if groups > 1 else k
        packed, meta = weight.packed, {"bits": weight.bits, "units": -(-k // UNIT), "per_group": -(-size // UNIT), "row_bytes": dense_bytes(k, weight.bits)}
        tensors = {"table": weight.table.contiguous(), "scale": _float(weight.scale)}
        if groups > 1 and size % UNIT:
            gather = _whole_units(k, size, groups)
            packed = pack_dense(weight.codes()[:, gather.clamp(min=0).long()].contiguous(), weight.bits)
            tensors["gather"] = gather
            meta |= {"units": len(gather) // UNIT, "row_bytes": packed.shape[1]}
        tensors["packed"] = torch.nn.functional.pad(packed.flatten(), (0, OVERHANG))
        return Prepared(weight.shape, tensors, activation, meta)

    def _run(self, x: Tensor, prepared: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        from bitgrain.kernels.cpu.codebook_operators import lookup_linear

        t, meta = prepared.tensors, prepared.meta
        y: Tensor = lookup_linear(
            x, t["packed"], meta["row_bytes"], meta["bits"], t["table"], t["scale"], meta["units"], meta["per_group"], t.get("gather"), bias, prepared.shape[0], dtype
        )
        return y


@lru_cache(maxsize=1)
def lattice_tables() -> tuple[Tensor, Tensor, Tensor]:
    """(magnitudes float32 [256, 8], signs int32 [256, 8] of the top bit, shifts float32 [256]) of the e8p code.

    e8p[256 h + l] = magnitudes[h], with the signs of l, plus shifts[l]; magnitudes have the sign of a low byte of 0.
    """
    values = e8p_codebook().view(256, 256, UNIT)
    magnitudes = values[:, 0] - 0.25
    parity = torch.tensor([bin(low).count("1") & 1 for low in range(256)])
    shifts = 0.25 - 0.5 * parity.float()
    flipped = (values[0] - shifts[:, None]) * magnitudes[0] < 0
    signs = torch.where(flipped, torch.tensor(-(1 << 31), dtype=torch.int64), torch.tensor(0)).to(torch.int32)
    return magnitudes.contiguous(), signs.contiguous(), shifts


@lru_cache(maxsize=4)
def _ball(divisor: float) -> Tensor:
    """float32 [256, 8]; one for all weights."""
    return e8_ball() / divisor


def _float(values: Tensor) -> Tensor:
    """`values` in a type that the kernels read."""
    return (values if values.dtype in FLOATS else values.float()).contiguous()


def _outliers_last(k: int, outliers: Tensor) -> Tensor:
    """int32: the columns that are no outliers, then the others, each followed by -1 up to whole units."""
    main = torch.ones(k, dtype=torch.bool)
    main[outliers] = False
    parts = [torch.nn.functional.pad(part, (0, -len(part) % UNIT), value=-1) for part in (main.nonzero()[:, 0], outliers.cpu())]
    return torch.cat(parts).to(torch.int32)


def _whole_units(k: int, size: int, groups: int) -> Tensor:
    """int32 [groups * ceil8(size)]: the columns of each group, each followed by -1 up to whole units."""
    columns = torch.arange(groups * size).view(groups, size)
    columns[columns >= k] = -1
    return torch.nn.functional.pad(columns, (0, -size % UNIT), value=-1).flatten().to(torch.int32)


CODEBOOK_KERNELS: list[Any] = [AdditiveLinear(), LatticeLinear(), TrellisLinear(), VectorLinear(), LookupLinear()]
