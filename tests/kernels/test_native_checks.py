"""native/tests covers the library's whole interface, and its sanitizer builds are part of what must pass before work lands."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bitgrain.kernels.cpu import library

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "native"


def exported():
    """Names of the functions that the sources export."""
    text = "\n".join(path.read_text() for path in sorted((NATIVE / "src").glob("*.cpp")))
    return set(re.findall(r"^EXPORT [\w* ]+?\b(bg_\w+)\(", text, re.M))


def test_every_exported_function_is_in_the_list_of_the_checks():
    listed = set(re.findall(r"\bF\((bg_\w+)\)", (NATIVE / "tests/interface.hpp").read_text()))
    assert listed == exported() and set(library.SIGNATURES) <= listed


def test_every_exported_function_is_called_by_a_check():
    # the program also counts the calls, and fails when a function had none
    calls = "\n".join(path.read_text() for path in sorted((NATIVE / "tests").glob("*.cpp")))
    assert exported() == set(re.findall(r"native::(bg_\w+)\(", calls))


@pytest.mark.skipif(bool(library.missing()) or shutil.which("nm") is None, reason=library.missing() or "no nm")
def test_library_exports_what_its_sources_say():
    lines = subprocess.run(["nm", "-D", "--defined-only", str(library.FILE)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[-1] for line in lines if " T bg_" in line} == exported()


def test_every_source_of_the_checks_is_built():
    builders = (NATIVE / "CMakeLists.txt").read_text() + (ROOT / "tools/emulate_sets.sh").read_text()
    assert set(re.findall(r"tests/(\w+\.cpp)", builders)) == {path.name for path in (NATIVE / "tests").glob("*.cpp")}


def test_sanitizers_run_before_work_lands():
    assert "make sanitize" in (ROOT / ".ci/run").read_text()
