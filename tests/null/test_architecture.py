"""The house rules, read from the source trees: one-way imports, and no name where it does not belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "bitgrain"

# package or top-level module: what it may import besides itself, errors, registry, settings and the package root
ALLOWED = {
    "errors": set(),
    "registry": set(),
    "settings": set(),
    "grouping": set(),
    "numerics": set(),
    "weights": {"numerics"},
    "platforms": set(),
    "checkpoint": {"numerics", "weights"},
    "quantize": {"numerics", "weights"},
    "formats": {"numerics", "weights", "checkpoint", "quantize"},
    "plan": {"formats", "checkpoint", "weights", "numerics"},
    "resolve": {"plan", "formats", "checkpoint", "weights", "numerics"},
    "kernels": {"numerics", "weights", "platforms"},
    "kvcache": {"numerics", "weights"},
    "layers": {"numerics", "weights", "checkpoint", "formats", "plan", "resolve", "kernels", "kvcache", "platforms"},
    "models": {"layers", "numerics", "weights", "checkpoint", "formats", "plan", "resolve", "kernels", "kvcache", "platforms"},
    "hosts": {"models", "layers", "numerics", "weights", "checkpoint", "formats", "plan", "resolve", "kernels", "kvcache", "platforms"},
    "api": {"models", "layers", "plan", "resolve", "formats", "checkpoint"},
    "engine": {"api", "models", "kvcache", "plan", "bundled", "checkpoint"},
    "bundled": set(),
    "server": {"engine", "api", "plan", "bundled"},
    "conformance": {"numerics", "weights", "platforms", "kernels"},
    "bench": {"api", "models", "layers", "kernels", "weights", "platforms"},
    "inspect": {"conformance", "api", "plan", "models", "layers", "formats", "kernels", "platforms", "checkpoint", "weights", "quantize", "bundled"},
    "__main__": {"cli"},
    "cli": {"bench", "conformance", "server", "engine", "api", "inspect", "plan", "bundled", "platforms", "formats", "kernels"},
}
EVERYWHERE = {"errors", "registry", "settings", "grouping"}
DEVICES = r"cuda|hip|rocm|xpu|npu|ascend|mps|cpu"
FORMATS = r"awq|gptq|autoround|auto_round|compressed.tensors|modelopt|modelslim|quark|hqq|bitsandbytes|quanto|fbgemm|torchao"
VENDORS = {"triton", "torch_npu", "intel_extension_for_pytorch", "vllm", "sglang", "transformers", "fastapi", "uvicorn", "rich", "jinja2", "huggingface_hub"}


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def package_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports_of(tree: ast.AST):
    """(module name, is it under TYPE_CHECKING) of every import."""
    guarded = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "bitgrain":
                yield from ((f"bitgrain.{alias.name}", id(node) in guarded) for alias in node.names)
            yield node.module, id(node) in guarded


def code_words(path: Path) -> list[tuple[int, str]]:
    """(line, text) of names and strings, docstrings left out: prose may name what it explains."""
    tree = ast.parse(path.read_text())
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body and isinstance(node.body[0], ast.Expr):
            docs.add(id(node.body[0].value))
    words = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words.append((node.lineno, node.value))
        elif isinstance(node, ast.Name):
            words.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute):
            words.append((node.lineno, node.attr))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            words.append((node.lineno, node.name))
    return words


def mentions(path: Path, pattern: str) -> list[str]:
    found = re.compile(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", re.IGNORECASE)
    return [f"{path.relative_to(ROOT)}:{line}: {text[:80]}" for line, text in code_words(path) if found.search(text)]


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    package = package_of(path)
    if package == "__init__":
        return check_root(path)
    assert package in ALLOWED, f"{package} has no place in the order of imports: add it to ALLOWED"
    wrong = []
    for name, _ in imports_of(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "bitgrain" and len(parts) > 1:
            target = parts[1]
            if target != package and target not in EVERYWHERE | ALLOWED[package] and target in ALLOWED:
                wrong.append(f"{package} imports {name}")
    assert not wrong, wrong


def check_root(path):
    eager = [name for name, guarded in imports_of(ast.parse(path.read_text())) if name.startswith("bitgrain") and not guarded]
    assert set(eager) <= {"bitgrain.errors"}, f"the package root imports {eager}"


def test_a_reader_of_formats_finds_no_device():
    found = [m for path in source_files() if package_of(path) == "formats" for m in mentions(path, DEVICES)]
    assert not found, found


def test_a_reader_of_kernels_finds_no_format():
    found = [m for path in source_files() if package_of(path) in ("kernels", "platforms") for m in mentions(path, FORMATS)]
    native = [p for p in (ROOT / "native").rglob("*") if p.suffix in (".cpp", ".hpp", ".h", ".txt")]
    assert native, "the native sources have moved: correct this test"
    pattern = re.compile(rf"\b({FORMATS})\b", re.IGNORECASE)
    found += [f"{p.relative_to(ROOT)}: {m.group(0)}" for p in native for m in pattern.finditer(p.read_text())]
    assert not found, found


def test_device_names_stay_in_platforms_and_kernels():
    found = [m for path in source_files() if package_of(path) not in ("platforms", "kernels") for m in mentions(path, DEVICES)]
    assert not found, found


def test_format_names_stay_in_formats():
    found = [m for path in source_files() if package_of(path) != "formats" for m in mentions(path, FORMATS)]
    assert not found, found


def test_environment_is_read_in_one_place():
    found = [str(p.relative_to(ROOT)) for p in source_files() if p.name != "settings.py" and re.search(r"os\.environ|os\.getenv|getenv\(", p.read_text())]
    assert not found, found


def test_import_of_bitgrain_brings_no_engine_server_or_vendor():
    code = (
        "import sys, bitgrain\n"
        f"vendors = {sorted(VENDORS)!r}\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in vendors or m.startswith(('bitgrain.engine', 'bitgrain.server', 'bitgrain.kernels'))]\n"
        "print(heavy)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def module_of(path: Path) -> str:
    return ".".join(("bitgrain", *path.relative_to(SOURCE).with_suffix("").parts))


def imported_at_once(path: Path) -> list[str]:
    """What a file imports when it is imported."""
    tree = ast.parse(path.read_text())
    return [name for name, _ in imports_of(ast.Module(body=[n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], type_ignores=[]))]


def compiled_sources() -> set[str]:
    """Sources that a vendor's compiler reads: they import it, and are imported only inside functions, or by each other."""
    return {module_of(path) for path in (SOURCE / "kernels" / "triton").glob("*.py") if any(name.split(".")[0] == "triton" for name in imported_at_once(path))}


def test_core_modules_import_vendors_only_inside_functions():
    compiled, found = compiled_sources(), []
    assert compiled, "the compiled sources have moved: correct this test"
    for path in source_files():
        if package_of(path) not in ("server", "cli") and module_of(path) not in compiled:
            found += [f"{path.relative_to(ROOT)}: {name}" for name in imported_at_once(path) if name.split(".")[0] in VENDORS or any(name == c or name.startswith(f"{c}.") for c in compiled)]
    assert not found, found


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_under_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_file_has_a_name_that_says_nothing():
    found = [p for p in source_files() if re.search(r"utils|helpers|common|manager|misc", p.stem)]
    assert not found, found


def test_public_names_are_listed_and_exist():
    import bitgrain

    assert set(bitgrain.__all__) == {*bitgrain._LAZY, "BitgrainError", "__version__"}
    assert all(hasattr(bitgrain, name) for name in bitgrain.__all__)


# names that Python 3.10 does not have, by the module they would come from
NEWER = {"typing": {"Self", "assert_never", "reveal_type", "LiteralString", "Never", "override"}, "enum": {"StrEnum"}, "datetime": {"UTC"}, "tomllib": None}


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_sources_hold_to_python_3_10(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    newer = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in NEWER:
            newer += [a.name for a in node.names if NEWER[node.module] is None or a.name in NEWER[node.module]]
    assert not newer, newer
