"""What the documents show is what happens: every console block is run and compared."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from isoflop.cli.outputs import validate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def examples() -> list[tuple[str, str, str]]:
    """(page, command, expected output) of every `$ isoflop ...` in a console block."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                found.append((page.name, command, output.strip("\n")))
    return found


@pytest.mark.parametrize(("page", "command", "expected"), examples())
def test_an_example_prints_what_the_page_shows(page: str, command: str, expected: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "isoflop", f"{page}: only isoflop is run here"
    done = subprocess.run(
        [sys.executable, "-m", "isoflop", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert same(expected, done.stdout.strip("\n")), (
        f"{page}: $ {command}\n{done.stdout}{done.stderr}"
    )


@pytest.mark.parametrize(
    "page", [p for p in PAGES if ">>> " in p.read_text()], ids=lambda p: p.name
)
def test_python_in_a_page_prints_what_it_shows(page: Path) -> None:
    text = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, page.name, 0)
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def same(expected: str, real: str) -> bool:
    """Equal but for trailing spaces; a line of ... stands for any lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line.rstrip()) + r"\n"
        for line in expected.splitlines()
    )
    text = "".join(f"{line.rstrip()}\n" for line in real.splitlines())
    return re.fullmatch(pattern, text) is not None


def test_the_comparison_can_fail() -> None:
    assert same("a\n...\nc", "a\nb\nc")
    assert not same("a\nb", "a\nc")
    assert not same("a", "a\nb")


def test_the_recipe_of_the_readme_trains(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (recipe,) = (b for b in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "tiny.toml" in b)
    (tmp_path / "tiny.toml").write_text(recipe)
    done = subprocess.run(
        [sys.executable, "-m", "isoflop", "train", "tiny.toml", "--json"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    validate("train", done.stdout)
    assert 1.0 < json.loads(done.stdout)["val_loss"] < 3.2
    again = subprocess.run(
        [sys.executable, "-m", "isoflop", "train", "tiny.toml", "--json"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(again.stdout)["val_loss"] == json.loads(done.stdout)["val_loss"]
