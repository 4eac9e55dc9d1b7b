"""Where a bundle came from, among checkouts that share one environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

from fl_app.runs import folder as runs
from fl_app.util import origin as origins
from fl_app.util.origin import FlwrRun, Origin, choose, code_digest, editable_folder, flwr_runs

ROOT = origins.ROOT


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return the folder of an unpacked bundle of this project."""
    target = tmp_path / "apps" / "flowleak.flowleak.0.1.0.0a1b2c3d"
    _copy(target)
    shutil.rmtree(target / "fl_app" / "benchmarks")
    return target


def _copy(target: Path) -> Path:
    for folder in (*origins.PACKAGES, "conf"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def _edited(checkout: Path, words: str = "edited") -> Path:
    with (checkout / "fl_app" / "config.py").open("a") as file:
        file.write(f"# {words}\n")
    return checkout


def test_a_bundle_belongs_to_the_checkout_of_the_same_code(bundle: Path, tmp_path: Path) -> None:
    ours, other = _copy(tmp_path / "ours"), _edited(_copy(tmp_path / "other"))
    typed = tmp_path / "typed"  # where `flwr run ../ours` was typed
    living = [FlwrRun(other, other, "", 3), FlwrRun(typed, ours, "/all", 2)]
    assert choose(bundle, living, []) == Origin(typed, ours, "/all")
    # It has ended.
    places = [(other, "the first"), (ours, "the second")]
    found = choose(bundle, living[:1], places, "/env")
    assert (found.folder, found.checkout, found.runs) == (ours, ours, "/env")
    assert found.doubt == f"`flwr run` has ended; {ours} is the second"
    # No folder that is known holds this code.
    found = choose(bundle, living[:1], places[:1])
    assert (found.folder, found.checkout) == (other, None) and "no folder here" in found.doubt
    # Two checkouts are alike: the latest command is taken, and it is told.
    twin = _copy(tmp_path / "twin")
    found = choose(bundle, [FlwrRun(ours, ours, "", 1), FlwrRun(twin, twin, "", 2)], [])
    assert found.folder == twin and str(ours) in found.doubt


@contextmanager
def _flwr_run(folder: Path, *arguments: str, **variables: str) -> Iterator[None]:
    """Run a process that looks like `flwr run`."""
    script = folder.parent / "bin" / "flwr"
    script.parent.mkdir(exist_ok=True)
    script.write_text("import sys; print(flush=True); sys.stdin.read()")
    with subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=folder, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout and process.stdin
        process.stdout.readline()
        yield
        process.stdin.close()


_ASK = """
import json
from fl_app.util import origin as origins
found = origins.origin()
from fl_app.util.files import runs_folder
from fl_app.runs.folder import git_commit
commit = git_commit()
print(json.dumps([str(found.folder), str(runs_folder()), found.doubt, commit, str(origins.ROOT)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_two_checkouts_that_share_an_environment_have_their_own_runs(
    bundle: Path, tmp_path: Path
) -> None:
    # Neither is what is installed here.
    first, second = (_edited(_copy(tmp_path / name), name) for name in ("first", "second"))
    other = _edited(Path(shutil.copytree(bundle, f"{bundle}"[:-1] + "e")), "second")
    _edited(bundle, "first")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b",
                    "commit", "-qm", "a"]):  # fmt: skip
        subprocess.run(["git", *command], cwd=first, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=first, capture_output=True, text=True)
    commit = head.stdout.strip()

    def ask(root: Path) -> list[str]:
        """Ask a process of a SuperLink that was started in the second checkout."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FLOWLEAK")}
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ASK], cwd=second, text=True, check=True,
            env=environment | {"PYTHONPATH": str(root), "PWD": str(second)}, capture_output=True,
        )  # fmt: skip
        return list(json.loads(done.stdout))

    with _flwr_run(second, "run", "."), _flwr_run(first, "run", "--stream", ".", "-c", "a=1"):
        assert ask(bundle) == [str(first), str(first / "runs"), "", commit, str(bundle)]
        (first / "fl_app" / "new.py").touch()  # the commit lacks it, and the bundle too
        assert ask(bundle)[3] == f"{commit}-dirty"
    with _flwr_run(first, "list"):  # whatever it is that works there
        found = ask(bundle)
        assert found[0] == str(first) and found[2].endswith("the folder of a process of yours")
    assert ask(bundle)[0] == str(second)  # where nobody knows
    doubt = f"`flwr run` has ended; {second} is where Flower was first started"
    assert ask(other)[:3] == [str(second), str(second / "runs"), doubt]
    with _flwr_run(second, "run", FLOWLEAK_RUNS="/all"):
        assert ask(other)[1] == "/all"
    with _flwr_run(first, "list"):
        assert not [run for run in flwr_runs() if run.folder == first]


def test_a_copy_that_is_installed_never_reads_what_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for editable in (True, False):
        facts = {"url": tmp_path.as_uri(), "dir_info": {"editable": editable}}

        class Installed:
            def __init__(self, _: object) -> None: ...

            def read_text(self, _: str, facts: object = facts) -> str:
                return json.dumps(facts)

        monkeypatch.setattr(metadata, "distribution", Installed)
        assert editable_folder() == (tmp_path if editable else None)
    monkeypatch.setattr(runs, "origin", lambda: Origin(tmp_path, None))
    (tmp_path / ".git").mkdir()
    assert runs.git_commit() is None


def test_the_hash_of_the_code_is_that_of_the_files(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = code_digest()
    monkeypatch.setattr(origins, "ROOT", bundle)
    assert code_digest() == ours
    monkeypatch.setattr(origins, "ROOT", _edited(_copy(bundle.parent / "edited")))
    assert code_digest() != ours
