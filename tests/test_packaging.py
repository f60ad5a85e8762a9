"""The wheel claims one top-level name, and works from where it is unpacked."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("uv") is None:
        pytest.skip("uv is not on the PATH")
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(["uv", "build", "--wheel", "-o", folder], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def python(code: str, cwd: Path, *first: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with the directories `first` ahead of this environment's packages (and without our checkout)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, first))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_wheel_has_one_top_level_name_and_carries_the_tree(unpacked: Path) -> None:
    assert [p.name for p in unpacked.iterdir() if not p.name.endswith(".dist-info")] == ["cookbook"]
    assert sorted(p.name for p in (unpacked / "cookbook/_tree").iterdir()) == ["conf", "core", "envs", "recipes"]
    assert (unpacked / "cookbook/_tree/conf/sft.yaml").exists()
    assert {"charts.js", "page.css", "report.css", "report.js"} <= {p.name for p in (unpacked / "cookbook/templates").iterdir()}


@pytest.mark.slow
def test_the_unpacked_wheel_imports_its_own_core_and_composes_its_own_conf(unpacked: Path, tmp_path: Path) -> None:
    done = python(
        "import cookbook, core; print(core.__file__); from cookbook.keys import CONF; print(CONF)", tmp_path, unpacked
    )
    tree = unpacked / "cookbook/_tree"
    assert done.stdout.split() == [str(tree / "core/__init__.py"), str(tree / "conf")], done.stderr


def test_a_foreign_recipes_package_on_the_path_loses_to_ours(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/__init__.py").touch()
    done = python("import cookbook, recipes; print(recipes.__file__)", tmp_path, tmp_path, ROOT)
    assert done.stdout.strip() == str(ROOT / "recipes/__init__.py"), done.stderr


def test_a_foreign_core_imported_before_us_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "core.py").touch()
    done = python("import core, cookbook", tmp_path, tmp_path, ROOT)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: package 'core' is already imported from {tmp_path / 'core.py'}, "
        f"cookbook needs its own in {ROOT}: "
        "import cookbook first, or run it in an environment without the other 'core'"
    )


def test_the_engine_is_reached_through_the_one_name_too() -> None:
    import cookbook
    import core

    assert "ServiceClient" in core.__all__
    with pytest.raises(AttributeError, match="module 'cookbook' has no attribute 'Servcie'"):
        cookbook.Servcie  # noqa: B018
