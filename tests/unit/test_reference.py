# SPDX-License-Identifier: Apache-2.0
"""docs/reference is what the program says, the site has every page, and commands in the docs have real options."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
import yaml

from modelslim import api, errors
from modelslim.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def commands(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield from commands(f"{path} {name}", sub)


KNOWN = {
    path: command
    for name in COMMANDS
    for path, command in commands(name, import_module(f"modelslim.cli.{name}").command)
}


def generate(*words: str, script: Path = DOCS / "generate.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)


def test_pages_are_what_the_program_says() -> None:
    done = generate("--check")
    assert (done.stderr, done.returncode) == ("", 0)


def test_stale_missing_and_foreign_pages_are_told(tmp_path: Path) -> None:
    """On a copy, whose reference is damaged in three ways."""
    for folder in ("docs/generator", "docs/reference", "plugins"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".md") or file.name == "pyproject.toml":
                target = tmp_path / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    script = tmp_path / "docs" / "generate.py"
    script.write_bytes((DOCS / "generate.py").read_bytes())
    reference = tmp_path / "docs" / "reference"
    assert generate("--check", script=script).returncode == 0
    (reference / "hooks.md").unlink()
    (reference / "old.md").write_text("a command that was removed")
    (reference / "errors.md").write_text((reference / "errors.md").read_text().replace("| 70 |", "| 71 |"))
    done = generate("--check", script=script)
    assert done.returncode == 1
    assert re.findall(r"reference/(\w+\.md) is stale", done.stderr) == ["errors.md", "hooks.md", "old.md"]
    assert generate(script=script).returncode == 0
    assert generate("--check", script=script).returncode == 0
    assert not (reference / "old.md").exists()


@pytest.mark.parametrize("path", KNOWN)
def test_every_word_of_help_is_in_the_reference(path: str) -> None:
    text = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    section = re.split(r"\n#+ ", text.split(f" modelslim {path}\n")[1])[0]
    shown = KNOWN[path].get_help(click.Context(KNOWN[path], info_name=path))
    options = set(re.findall(r"--[a-z][\w-]*", shown)) - {"--help"}
    assert [one for one in sorted(options) if one not in section] == []


def test_every_error_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    kinds = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 10
    assert [one for one in kinds if f"| `{one}` |" not in text] == []
    assert {"PluginError", "ModelError"} <= set(api.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_commands_of_the_docs_have_options_that_exist(page: Path) -> None:
    wrong = []
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for words in re.findall(r"\bmodelslim ((?:\w+ ?)+(?:[^`\n|#]*)?)", text):
        first, second = [*words.split(), ""][:2]
        command = KNOWN.get(f"{first} {second}", KNOWN.get(first))
        if command is None or "--" not in words:
            continue
        names = {name.replace("-", "_") for one in command.params for name in (*one.opts, *one.secondary_opts)}
        used = re.findall(r"(?<!\S)--[a-z][\w-]*", words)
        wrong += [f"{first} {one}" for one in used if one.replace("-", "_") not in {*names, "__help"}]
    assert wrong == []


def test_the_site_has_every_page_once() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for one in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(one)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(files(site["nav"]))
    readmes = {f"{file.parent.relative_to(ROOT)}.md" for file in ROOT.glob("plugins/*/*/README.md")}
    written = {str(page.relative_to(DOCS)) for page in PAGES}
    assert sorted(listed) == sorted({*written, *readmes, "compat.md", "benchmarks.md"})
