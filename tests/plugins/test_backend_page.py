"""docs/bring-up-a-backend.md is the toy backend: its blocks are the files, in order and complete; its commands exist."""

import re
import shlex
from pathlib import Path

from bitgrain.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "plugins" / "toy_backend"
PAGE = (ROOT / "docs" / "bring-up-a-backend.md").read_text()


def blocks() -> dict[str, str]:
    """File to its blocks on the page, joined."""
    found: dict[str, list[str]] = {}
    for name, text in re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE):
        found.setdefault(name, []).append(text)
    return {name: "\n".join(texts) for name, texts in found.items()}


def lines(text: str) -> list[str]:
    """What is written; blank lines stand where a block ends."""
    return [line for line in text.splitlines() if line.strip()]


def test_blocks_of_the_page_are_the_files_of_the_toy_backend():
    files = {str(path.relative_to(TOY)): path.read_text() for path in TOY.rglob("*") if path.suffix in (".py", ".toml") and "build" not in path.parts}
    shown = blocks()
    assert set(shown) == set(files)
    for name, text in files.items():
        assert lines(shown[name]) == lines(text), f"docs/bring-up-a-backend.md and tests/plugins/toy_backend/{name} differ"


def test_commands_of_the_page_exist():
    commands = re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)
    assert len(commands) >= 5
    assert all(shlex.split(command)[0] == "bitgrain" and shlex.split(command)[1] in COMMANDS for command in commands)


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((ROOT / "docs" / link).is_file() for link in links), links
