"""Sizes of tiles: chosen by rules, by a table that comes with the package, or by what this machine measured.

A product's *plan* is what decides the order of its sums: columns per step and runs of steps.  It depends on the weight and the device, never
on the number of rows.  A *shape* is the rest: rows and columns of a tile, threads, stages; each number of rows (by buckets) has its own.

    tiles/<generation>.json in the package, else tiles/default.json:
        {"note": "...", "shapes": {<class>: {"16": [block_n, block_m, warps, stages, waves], "32": ...}}, "tiles": {<key>: {"plan": [block_k, splits], "16": [...]}}}
    triton-tiles.json in the cache folder, which is asked first: {<generation>: {<key>: ...}}

"shapes" hold for every product of a class: "float16" (16-bit operands), "float32", "int8" and "fp8"; "tiles" for one weight's key_of().
Nothing is measured unless tune() is called; the same inputs always choose the same tiles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bitgrain.errors import RunError
from bitgrain.kernels.triton.packed import COLUMN, FLOATS, Layout
from bitgrain.platforms.base import Platform
from bitgrain.settings import cache_folder

# A bucket holds the row counts up to it; the last one holds all above.
BUCKETS = (16, 32, 64, 128, 256, 1024, 1 << 30)
# Runs are worth their extra pass when they shorten the time by this factor at least.
WORTH = 0.75
MOST_SPLITS = 8
# steps that a run has at least
STEPS_OF_RUN = 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one launch is cut.

    Args:
        block_n, block_m: rows of the weight and of the input in a tile.
        block_k: slots of a step; splits: runs of steps.  These two alone order the sums.
        warps, stages: groups of threads of a program; loads that are under way at once.
        waves: programs per core, where programs stay and take tile after tile.
    """

    block_n: int
    block_m: int
    block_k: int
    splits: int
    warps: int
    stages: int
    waves: int = 2


def tiles_for(layout: Layout, n: int, k: int, m: int, dtype: torch.dtype, platform: Platform) -> Tiles:
    """The tiles of one launch; deterministic."""
    return _chosen(layout, n, k, bucket_of(m), dtype, generation_of(platform), platform.cores)


def bucket_of(m: int) -> int:
    """The largest number of rows that has the same tiles as m."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


@cache
def generation_of(platform: Platform) -> str:
    """The table that is read for a platform: its generation's, where there is one, else "default"."""
    known = (resources.files(__package__) / "tiles" / f"{platform.generation}.json").is_file()
    return platform.generation if known else "default"


def key_of(layout: Layout, n: int, k: int, dtype: torch.dtype) -> str:
    """What a table calls a product, rows apart: element and bits, columns of a segment, arithmetic, sizes, type."""
    kind = {0: "int", 2: "e4m3-", 3: "e5m2-", 4: "e2m1-"}[layout.kind]
    return f"{kind}{layout.bits} s{layout.slots.segment} {('floats', 'int8', 'fp8')[layout.dot]} {n}x{k} {str(dtype).removeprefix('torch.')}"


def class_of(layout: Layout, dtype: torch.dtype) -> str:
    """The shapes that hold where a product has none of its own."""
    if layout.dot != FLOATS:
        return ("", "int8", "fp8")[layout.dot]
    return "float32" if dtype == torch.float32 or layout.scales == COLUMN else "float16"


@lru_cache(maxsize=4096)
def _chosen(layout: Layout, n: int, k: int, bucket: int, dtype: torch.dtype, generation: str, cores: int) -> Tiles:
    table, key = _table(generation), key_of(layout, n, k, dtype)
    known = {**table["tiles"].get(key, {}), **_measured().get(generation, {}).get(key, {})}
    block_k, splits = known.get("plan") or plan(layout, n, cores)
    block_n, block_m, warps, stages, waves = known.get(str(bucket)) or table["shapes"][class_of(layout, dtype)][str(bucket)]
    return Tiles(block_n, block_m, block_k, splits, warps, stages, waves)


def plan(layout: Layout, n: int, cores: int) -> tuple[int, int]:
    """(block_k, splits) by rule: 64 columns of 16 bits or 128 of 8; runs while they shorten the last wave of 64-row tiles by a quarter."""
    block_k = max(steps_of(layout))
    steps, tiles = layout.slots.total // block_k, -(-n // 64)
    splits, best = 1, float(-(-tiles // cores))
    for count in (2, 4, MOST_SPLITS):
        time = -(-tiles * count // cores) / count
        if steps // count >= STEPS_OF_RUN and time <= WORTH * best:
            splits, best = count, time
    return block_k, splits


def steps_of(layout: Layout) -> list[int]:
    """Sizes of steps that a product may take: units of one segment."""
    width, unit, most = layout.slots.width, layout.slots.unit, 64 if layout.dot == FLOATS else 128
    return [b for b in (unit, 2 * unit, 4 * unit) if b == unit or (b <= most and width % b == 0)]


def candidates(layout: Layout, bucket: int, start: Tiles, planned: bool) -> Iterator[Tiles]:
    """What tune() tries: with `planned` shapes alone, else plans as well."""
    plans = [(start.block_k, start.splits)] if planned else [(b, s) for b in steps_of(layout) for s in (1, 2, 4, MOST_SPLITS)]
    blocks_m = sorted({16, min(bucket, 32), min(bucket, 64), min(bucket, 128)})
    for (block_k, splits), block_n, block_m in product(plans, (32, 64, 128, 256), blocks_m):
        if block_n * block_m > 128 * 256 or block_m > max(16, bucket):
            continue
        for warps, stages in product((4, 8), (2, 3, 4)):
            yield Tiles(block_n, block_m, block_k, splits, warps, stages, start.waves)


def tune(measure: Callable[[Tiles], float], layout: Layout, n: int, k: int, m: int, dtype: torch.dtype, platform: Platform) -> tuple[Tiles, float]:
    """(the fastest tiles of a product of m rows, their seconds), written to the cache folder; later launches take them.

    The first call for a product decides its plan as well, and later calls keep it, so that all numbers of rows add up alike: call for the
    fewest rows first.

    Args:
        measure: seconds of one launch with these tiles; raises what a launch raises where they do not fit.
    Raises:
        RunError: the platform is not here, or no candidate runs.
    """
    if platform.state != "present":
        raise RunError(f"tuning for {platform.key!r}", f"a platform that is {platform.state}", "the device itself", "run it on a machine with the device")
    generation, key, bucket = generation_of(platform), key_of(layout, n, k, dtype), bucket_of(m)
    start = tiles_for(layout, n, k, m, dtype, platform)
    known = _measured().get(generation, {}).get(key, {})
    best: tuple[float, Tiles] | None = None
    for tiles in dict.fromkeys((start, *candidates(layout, bucket, start, "plan" in known))):
        with suppress(Exception):  # too much shared memory, too many registers: another candidate fits
            seconds = measure(tiles)
            best = (seconds, tiles) if best is None or seconds < best[0] else best
    if best is None:
        raise RunError(f"tuning {key}", "no tiles run", "one that does", "see what a launch raises")
    seconds, tiles = best
    entry = {"plan": [tiles.block_k, tiles.splits], str(bucket): [tiles.block_n, tiles.block_m, tiles.warps, tiles.stages, tiles.waves]}
    _remember(generation, key, entry)
    return tiles, seconds


@cache
def _table(generation: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((resources.files(__package__) / "tiles" / f"{generation}.json").read_text())
    return table


def _file() -> Path:
    return cache_folder() / "triton-tiles.json"


@lru_cache(maxsize=1)
def _measured() -> dict[str, Any]:
    try:
        value = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _remember(generation: str, key: str, entry: dict[str, list[int]]) -> None:
    merged = dict(_measured())
    merged[generation] = {**merged.get(generation, {}), key: {**merged.get(generation, {}).get(key, {}), **entry}}
    # a cache that cannot be written only costs the measurement again
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        temporary = _file().with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(merged))
        temporary.replace(_file())
    _measured.cache_clear()
    _chosen.cache_clear()
