"""Show the environment in one block that can be pasted: versions, platforms, features, kernels, extras."""

from __future__ import annotations

import argparse

from bitgrain.cli.tables import print_json, print_table
from bitgrain.inspect.doctor import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = examine()
    if args.json:
        print_json(found)
        return 0
    print(f"bitgrain {found['bitgrain']}, Python {found['python']}, {found['system']}, {found['threads']} threads")
    print_table("packages", ("extra", "package", "state"), [("core", n, s) for n, s in found["core"].items()] + [(e, n, s) for e, p in found["extras"].items() for n, s in p.items()])
    print_table("platforms", ("platform", "state", "features"), [(p["platform"], p["state"], ", ".join(p["features"])) for p in found["platforms"]])
    print_table("kernels", ("operation", "platform", "kernel", "state"), [(k["operation"], k["platform"], k["kernel"], k["state"]) for k in found["kernels"]])
    print_table("modelling code", ("code", "state"), [(m["code"], m["state"]) for m in found["modelling"]])
    print(f"formats: {', '.join(found['formats'])}")
    for name, value in found["settings"].items():
        if value is not None:
            print(f"{name}={value}")
    return 0
