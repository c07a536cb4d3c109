# SPDX-License-Identifier: Apache-2.0
"""The registry reads metadata, imports nothing on its own, and says why a plugin cannot be used.

The plugins here are folders with a hand-written dist-info, put on the path; nothing is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import modelslim
from modelslim import __version__
from modelslim.errors import PluginError
from modelslim.registry import KINDS, Entry, Registry

Install = Callable[..., None]


def write_distribution(
    folder: Path,
    name: str,
    groups: Mapping[str, Mapping[str, str]],
    *,
    version: str = "1.0",
    requires: tuple[str, ...] = (),
    files: Mapping[str, str] | None = None,
) -> None:
    """Lay out what pip would have left behind."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    header = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    header += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(header) + "\n")
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{word} = {value}" for word, value in entries.items()), "")
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for path, text in (files or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Writes a distribution into a folder of its own at the front of the path."""

    def write(name: str, groups: Mapping[str, Mapping[str, str]], **options: object) -> None:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}-{name}"
        write_distribution(folder, name, groups, **options)  # type: ignore[arg-type]
        monkeypatch.syspath_prepend(folder)

    return write


def row(registry: Registry, name: str) -> Entry:
    (entry,) = (entry for entry in registry.entries if entry.name == name)
    return entry


def test_a_good_plugin_is_listed_with_its_distribution_and_loads(install: Install) -> None:
    install(
        "acme-good",
        {"modelslim.algorithms": {"good": "acme_good.algorithm:Outer.Inner"}},
        version="2.5",
        requires=("modelslim>=0.1,<0.2",),
        files={"acme_good/__init__.py": "", "acme_good/algorithm.py": "class Outer:\n    class Inner: pass\n"},
    )
    registry = Registry.scan({})
    assert row(registry, "good") == Entry(
        "algorithms", "good", "acme_good.algorithm:Outer.Inner", "acme-good", "2.5", "ok", ""
    )
    assert "good" in registry.names("algorithms")
    assert registry.load("algorithms", "good").__qualname__ == "Outer.Inner"


def test_the_core_offers_its_own_runner_and_calibration_sets() -> None:
    registry = Registry.scan({"MODELSLIM_PLUGINS": ""})
    assert registry.names("runners") == ["dp_layer_wise", "layer_wise", "model_wise"]
    assert registry.resource("calibration", "modelslim") == Path(modelslim.__file__).parent / "calibration"


def test_scanning_and_reading_a_schema_imports_no_plugin_and_nothing_heavy(tmp_path: Path) -> None:
    write_distribution(
        tmp_path,
        "acme-bomb",
        {
            "modelslim.algorithms": {"bomb": "acme_bomb.algorithm:Bomb"},
            "modelslim.practices": {"set": "acme_bomb.sets"},
        },
        files={
            "acme_bomb/__init__.py": "raise RuntimeError('imported')",
            "acme_bomb/bomb.schema.json": '{"type": "object"}',
            "acme_bomb/sets/a.yaml": "",
        },
    )
    script = """
import sys
from modelslim.registry import Registry
registry = Registry.scan()
assert registry.schema("algorithms", "bomb") == {"type": "object"}
assert registry.resource("practices", "set").name == "sets"
heavy = {"acme_bomb", "torch", "transformers", "jsonschema", "click", "rich"}
print(sorted(heavy & set(sys.modules)))
"""
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "MODELSLIM_PLUGINS": "acme-bomb"}
    result = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize("requirement", ["modelslim>=99", "ModelSlim[npu] (<0.1)", "modelslim!=0.1.0,>=0.1"])
def test_a_plugin_for_another_core_is_incompatible_and_says_both_versions(install: Install, requirement: str) -> None:
    install("acme-old", {"modelslim.savers": {"old_saver": "acme_old:Saver"}}, requires=("numpy", requirement))
    registry = Registry.scan({})
    entry = row(registry, "old_saver")
    assert entry.status == "incompatible"
    assert __version__ in entry.reason
    assert "old_saver" not in registry.names("savers")
    with pytest.raises(PluginError, match=r"saver 'old_saver' of acme-old 1.0 is incompatible: needs modelslim"):
        registry.load("savers", "old_saver")


@pytest.mark.parametrize(
    "requirement",
    ['modelslim>=99; python_version < "3"', 'modelslim>=99; extra == "future"', "modelslim-adapter-x>=99", "modelslim"],
)
def test_a_requirement_that_does_not_apply_here_is_ignored(install: Install, requirement: str) -> None:
    install("acme-fine", {"modelslim.savers": {"fine": "acme_fine:Saver"}}, requires=(requirement,))
    assert row(Registry.scan({}), "fine").status == "ok"


def test_a_requirement_that_nobody_can_read_is_broken(install: Install) -> None:
    install("acme-typo", {"modelslim.savers": {"typo": "acme_typo:Saver"}}, requires=("modelslim >>1",))
    entry = row(Registry.scan({}), "typo")
    assert (entry.status, "modelslim >>1" in entry.reason) == ("broken", True)


def test_two_distributions_that_claim_one_name_are_both_refused_by_name(install: Install) -> None:
    install("acme-one", {"modelslim.algorithms": {"twin": "acme_one:A"}}, version="1.1")
    install("acme-two", {"modelslim.algorithms": {"twin": "acme_two:A"}, "modelslim.savers": {"twin": "acme_two:S"}})
    registry = Registry.scan({})
    twins = [entry for entry in registry.entries if entry.name == "twin" and entry.kind == "algorithms"]
    assert [entry.distribution for entry in twins] == ["acme-one", "acme-two"]
    for entry in twins:
        assert entry.status == "duplicate"
        assert "acme-one 1.1" in entry.reason
        assert "acme-two 1.0" in entry.reason
    assert "twin" not in registry.names("algorithms")
    assert "twin" in registry.names("savers")
    with pytest.raises(PluginError, match=r"acme-one 1\.1") as caught:
        registry.load("algorithms", "twin")
    assert "acme-two 1.0" in caught.value.message
    assert "MODELSLIM_PLUGINS" in caught.value.hint
    chosen = Registry.scan({"MODELSLIM_PLUGINS": "acme-two"})
    assert row(chosen, "layer_wise").distribution == "modelslim"
    assert "twin" in chosen.names("algorithms")


def test_an_incompatible_plugin_does_not_take_a_name_from_one_that_works(install: Install) -> None:
    install("acme-past", {"modelslim.algorithms": {"heir": "acme_past:A"}}, requires=("modelslim<0.1",))
    install("acme-heir", {"modelslim.algorithms": {"heir": "acme_heir:A"}}, files={"acme_heir.py": "A = 7\n"})
    assert Registry.scan({}).load("algorithms", "heir") == 7


def test_one_distribution_that_claims_a_name_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "acme-echo", {"modelslim.runners": {"echo": "acme_echo:A"}})
    with (tmp_path / "acme_echo-1.0.dist-info" / "entry_points.txt").open("a") as file:
        file.write("echo = acme_echo:B\n")
    monkeypatch.syspath_prepend(tmp_path)
    reasons = {entry.reason for entry in Registry.scan({}).entries if entry.name == "echo"}
    assert reasons == {"claimed twice by acme-echo 1.0"}


def test_of_two_versions_of_one_distribution_the_first_on_the_path_counts(install: Install) -> None:
    install("Acme_Copy", {"modelslim.savers": {"copy": "acme_copy:Old"}}, version="1.0")
    install("acme-copy", {"modelslim.savers": {"copy": "acme_copy:New"}}, version="2.0")
    assert row(Registry.scan({}), "copy").value == "acme_copy:New"
    install("acme.copy", {"console_scripts": {"copy": "acme_copy:main"}}, version="3.0")
    assert not [entry for entry in Registry.scan({}).entries if entry.name == "copy"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("Other = 1", "AttributeError: module 'acme_{0}' has no attribute 'Saver'"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("raise ValueError('first\\nsecond')", "ValueError: first second"),
    ],
)
def test_a_plugin_that_fails_to_import_is_broken_once_tried(
    install: Install, source: str, reason: str, request: pytest.FixtureRequest
) -> None:
    suffix = f"fails{request.node.callspec.indices['source']}"
    install(
        "acme-fails",
        {"modelslim.savers": {"fails": f"acme_{suffix}:Saver"}},
        files={f"acme_{suffix}.py": source + "\n"},
    )
    registry = Registry.scan({"MODELSLIM_PLUGINS": "acme-fails"})
    assert row(registry, "fails").status == "ok"
    checked = row(registry.check(), "fails")
    assert (checked.status, checked.reason) == ("broken", reason.format(suffix))
    with pytest.raises(PluginError) as caught:
        registry.load("savers", "fails")
    assert caught.value.message == f"saver 'fails' of acme-fails 1.0 cannot be loaded: {reason.format(suffix)}"
    assert type(caught.value.__cause__).__name__ == reason.partition(":")[0]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("algorithms", "acme_bad"),
        ("algorithms", "acme-bad:Class"),
        ("algorithms", "acme_bad:"),
        ("algorithms", "acme_bad.:Class"),
        ("algorithms", ""),
        ("plugins", "1acme"),
        ("practices", "acme_bad:object"),
        ("calibration", "acme bad"),
    ],
)
def test_a_malformed_value_is_broken_and_quoted(install: Install, kind: str, value: str) -> None:
    install("acme-bad", {f"modelslim.{kind}": {"bad": value}})
    registry = Registry.scan({})
    entry = row(registry, "bad")
    assert (entry.status, repr(value) in entry.reason) == ("broken", True)
    assert "bad" not in registry.names(kind)
    with pytest.raises(PluginError, match=r"acme-bad 1\.0 is broken"):
        registry.load(kind, "bad")


def test_misspelt_group_is_a_broken_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "acme-group", {"modelslim.adapter": {"acme": "x:Y"}})
    monkeypatch.syspath_prepend(tmp_path)
    entry = row(Registry.scan({}), "acme")
    assert entry.status == "broken"
    assert entry.reason == "there is no entry-point group modelslim.adapter; did you mean 'adapters'?"
    assert row(Registry.scan({}).check(), "acme").reason == entry.reason


def test_a_line_without_a_value_and_a_group_of_someone_else_harm_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_distribution(tmp_path, "acme-line", {"adapters": {"foreign": "x:Y"}, "modelslim.nonsense": {"odd": "x:Y"}})
    with (tmp_path / "acme_line-1.0.dist-info" / "entry_points.txt").open("a") as file:
        file.write("[modelslim.savers]\n# a comment\nlonely\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry.scan({})
    assert row(registry, "lonely").status == "broken"
    assert not {"foreign", "odd"} & {entry.name for entry in registry.entries}


def test_a_distribution_whose_metadata_was_lost_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "acme-torn", {"modelslim.savers": {"torn": "acme_torn:S"}})
    (tmp_path / "acme_torn-1.0.dist-info" / "METADATA").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    entry = row(Registry.scan({}), "torn")
    assert (entry.status, str(tmp_path) in entry.reason) == ("broken", True)


def test_a_vendor_plugin_may_be_a_module(install: Install) -> None:
    install("acme-mod", {"modelslim.plugins": {"acme": "acme_mod_hooks"}}, files={"acme_mod_hooks.py": "X = 1\n"})
    assert Registry.scan({}).load("plugins", "acme").X == 1


def test_an_unknown_name_offers_the_nearest_or_says_what_to_install(install: Install) -> None:
    install("acme-near", {"modelslim.savers": {"quite_near": "acme_near:S"}})
    registry = Registry.scan({"MODELSLIM_PLUGINS": "acme-near"})
    with pytest.raises(PluginError, match="no saver is called 'quite_naer'") as caught:
        registry.load("savers", "quite_naer")
    assert caught.value.hint == "did you mean 'quite_near'?"
    with pytest.raises(PluginError) as caught:
        registry.load("savers", "zzz")
    assert caught.value.hint.startswith("known: quite_near; or install")
    with pytest.raises(PluginError) as caught:
        registry.load("algorithms", "anything")
    assert caught.value.hint == ("install a distribution that offers it, e.g. `pip install modelslim-algorithm-<name>`")
    with pytest.raises(PluginError) as caught:
        registry.load("practices", "anything")
    assert caught.value.hint == "install a distribution that offers it"


def test_a_kind_that_does_not_exist_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="did you mean 'algorithms'"):
        Registry.scan({}).names("algorithm")


def test_modelslim_plugins_restricts_to_distributions_and_the_core(install: Install) -> None:
    install("acme-a", {"modelslim.savers": {"a": "acme_a:S"}})
    install("acme-b", {"modelslim.savers": {"b": "acme_b:S"}})
    everything = {entry.distribution for entry in Registry.scan({}).entries}
    assert {"acme-a", "acme-b", "modelslim"} <= everything
    only_a = Registry.scan({"MODELSLIM_PLUGINS": " Acme_A, "})
    assert {entry.distribution for entry in only_a.entries} == {"acme-a", "modelslim"}
    nobody = Registry.scan({"MODELSLIM_PLUGINS": ""})
    assert {entry.distribution for entry in nobody.entries} == {"modelslim"}
    with pytest.raises(PluginError) as caught:
        only_a.load("savers", "b")
    assert caught.value.hint == "acme-b offers it and MODELSLIM_PLUGINS leaves it out: add it there"
    with pytest.raises(PluginError, match="MODELSLIM_PLUGINS names acmea") as caught:
        Registry.scan({"MODELSLIM_PLUGINS": "acme-a,acmea"})
    assert "did you mean 'acme-a'" in caught.value.hint


def test_a_missing_schema_names_the_distribution_and_the_file(install: Install, tmp_path: Path) -> None:
    install(
        "acme-bare",
        {"modelslim.algorithms": {"bare": "acme_bare.x:A"}, "modelslim.runners": {"bare_runner": "acme_bare.x:A"}},
        files={"acme_bare/__init__.py": "", "acme_bare/x.py": "A = 1\n"},
    )
    registry = Registry.scan({"MODELSLIM_PLUGINS": "acme-bare"})
    with pytest.raises(PluginError, match=r"algorithm 'bare' of acme-bare 1\.0 has no JSON Schema") as caught:
        registry.schema("algorithms", "bare")
    assert str(tmp_path / "0-acme-bare" / "acme_bare" / "bare.schema.json") in caught.value.message
    assert row(registry.check(), "bare").status == "broken"
    assert registry.schema("runners", "bare_runner") is None
    assert row(registry.check(), "bare_runner").status == "ok"


def test_a_schema_of_a_package_that_is_not_there_says_so(install: Install) -> None:
    install("acme-gone", {"modelslim.savers": {"gone": "acme_gone:S"}})
    with pytest.raises(PluginError, match=r"gone.schema.json in the package acme_gone, which is not there"):
        Registry.scan({}).schema("savers", "gone")


@pytest.mark.parametrize(
    ("text", "wrong"), [("{", "not valid JSON"), ("\xff", "not valid JSON"), ("[]", "not a JSON object")]
)
def test_a_schema_that_is_no_json_object_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wrong: str
) -> None:
    write_distribution(
        tmp_path, "acme-json", {"modelslim.savers": {"j": "acme_json:S"}}, files={"acme_json/__init__.py": ""}
    )
    (tmp_path / "acme_json" / "j.schema.json").write_bytes(text.encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=f"saver 'j' of acme-json 1.0 is {wrong}"):
        Registry.scan({}).schema("savers", "j")


def test_the_folder_of_a_data_package_needs_no_init_file(install: Install, tmp_path: Path) -> None:
    install(
        "acme-data",
        {"modelslim.calibration": {"sets": "acme_space.data.sets", "none": "acme_space.data.none"}},
        files={"acme_space/data/sets/one.jsonl": json.dumps({"text": "x"})},
    )
    registry = Registry.scan({"MODELSLIM_PLUGINS": "acme-data"})
    assert registry.resource("calibration", "sets") == tmp_path / "0-acme-data" / "acme_space" / "data" / "sets"
    with pytest.raises(PluginError, match=r"there is no package acme_space\.data\.none"):
        registry.resource("calibration", "none")


def test_the_installed_plugins_are_found_by_their_first_party_entry_points() -> None:
    names = {(entry.kind, entry.name) for entry in Registry.scan({}).entries}
    assert {("adapters", "transformers"), ("algorithms", "linear_quant"), ("savers", "ascendv1_saver")} <= names
    assert {kind for kind, _ in names} <= set(KINDS)
