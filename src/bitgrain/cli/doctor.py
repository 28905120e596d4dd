"""Show the environment in one block that can be pasted: versions, platforms, features, kernels, extras."""

from __future__ import annotations

import argparse
from typing import Any

from bitgrain.cli.tables import print_json, print_table
from bitgrain.inspect.doctor import examine
from bitgrain.platforms.base import told_features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _platform_row(found: dict[str, Any]) -> tuple[str, str, str]:
    """(key, state with its devices, features)."""
    devices = "; ".join([*dict.fromkeys(found["devices"]), *(f"device {index}: {why}" for index, why in found["unusable"].items())])
    return found["platform"], found["state"] + (f": {devices}" if devices and found["devices"] else ""), ", ".join(told_features(found["features"]))


def run(args: argparse.Namespace) -> int:
    found = examine()
    if args.json:
        print_json(found)
        return 0
    print(f"bitgrain {found['bitgrain']}, Python {found['python']}, {found['system']}, {found['threads']} threads")
    print_table("packages", ("extra", "package", "state"), [("core", n, s) for n, s in found["core"].items()] + [(e, n, s) for e, p in found["extras"].items() for n, s in p.items()])
    print_table("platforms", ("platform", "state", "features"), [_platform_row(p) for p in found["platforms"]])
    print_table("kernels", ("operation", "platform", "kernel", "state"), [(k["operation"], k["platform"], k["kernel"], k["state"]) for k in found["kernels"]])
    if found["broken_kernels"]:
        print_table("packages of kernels that do not load", ("package", "state"), list(found["broken_kernels"].items()))
    print_table("modelling code", ("code", "state"), [(m["code"], m["state"]) for m in found["modelling"]])
    print(f"formats: {', '.join(found['formats'])}")
    for name, value in found["settings"].items():
        if value is not None:
            print(f"{name}={value}")
    return 0
