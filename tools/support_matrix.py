"""Hold the kernels of platforms against the definition, record what agreed, and write the pages of the support matrix.

Usage: support_matrix.py [KEY[@host] ...] [--full] [--page-only]

Without a platform: the one that is here, over the whole grid.  What runs on the host's tensors is recorded as such.  Records go to
src/bitgrain/bundled/last_run.json, those of other platforms are kept; pages are docs/support-matrix.md and docs/support-matrix/.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bitgrain.bundled import run_records_file
from bitgrain.inspect.matrix_pages import FOLDER, matrix_pages
from bitgrain.platforms.probe import HOST, default_platform

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platforms", nargs="*", metavar="KEY[@host]")
    parser.add_argument("--full", action="store_true", help="the whole grid also where kernels run on the host's tensors, which takes hours")
    parser.add_argument("--page-only", action="store_true", help="write the pages from the records as they are")
    args = parser.parse_args()
    statuses = []
    for platform in [] if args.page_only else args.platforms or [default_platform().key]:
        # a process of its own each: a package that is imported for the host's tensors serves no device afterwards
        words = ["conformance", "--platform", platform, "--record", str(run_records_file())]
        quick = ["--quick"] if platform.endswith(HOST) and not args.full else []
        statuses.append(subprocess.run([sys.executable, "-m", "bitgrain", *words, *quick], check=False).returncode)
    (DOCS / FOLDER).mkdir(exist_ok=True)
    for name, text in matrix_pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return max(statuses, default=0)


if __name__ == "__main__":
    sys.exit(main())
