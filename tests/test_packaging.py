"""What is installed and what an import costs: `btp` stays slim, and each extra brings only what it says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
INSTALLED = re.findall(r"-e '\.\[(.+)\]'", (ROOT / "Makefile").read_text())[0].split(",")
TUNER_ONLY = {"datasets", "fastapi", "matplotlib", "mlflow", "optuna", "plotly", "ray", "scipy", "sqlalchemy", "typer"}


def names(requirements: list[str]) -> set[str]:
    """Bare project names, normalised: `ray[tune]>=2.60` is `ray`."""
    return {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in requirements}  # type: ignore[union-attr]


def requirements_of(extra: str) -> list[str]:
    """All that an extra installs beside `btp` itself, what it takes from another extra included."""
    own = [re.fullmatch(r"btp-autotune\[(.+)\]", line) for line in EXTRAS[extra]]
    inner = [line for match in own if match for name in match[1].split(",") for line in requirements_of(name)]
    return [line for line, match in zip(EXTRAS[extra], own, strict=True) if not match] + inner


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter that ran `statement`."""
    code = f"{statement}\nimport sys; print(*sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=True)
    return set(done.stdout.split())


def test_importing_btp_waits_with_torch_until_something_needs_it() -> None:
    assert not modules_after("import btp") & ({"torch", "transformers", "numpy"} | TUNER_ONLY)


def test_a_plan_needs_the_standard_library_only() -> None:
    assert not modules_after("import btp; btp.Plan, btp.presets") & ({"torch", "transformers", "numpy"} | TUNER_ONLY)


def test_pruning_needs_nothing_of_the_tuner() -> None:
    # transformers itself loads scipy where it is installed.
    assert not modules_after("import btp; btp.prune") & (TUNER_ONLY - {"scipy"} | {"autotune"})


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    heavy = TUNER_ONLY - {"typer"} | {"torch", "transformers"}
    assert not modules_after("import autotune.cli") & heavy


def test_a_score_is_reproduced_without_the_tuner() -> None:
    needed = {"datasets", "scipy"}  # of the extra `score`
    assert not modules_after("import autotune.plan_file") & (TUNER_ONLY - needed)


def test_base_install_is_torch_transformers_and_what_torch_brings_along() -> None:
    assert names(PROJECT["dependencies"]) == {"filelock", "torch", "transformers"}


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("optuna", "tune"),
        ("mlflow", "tune"),
        ("mlflow-skinny", "registry"),
        ("sqlalchemy", "tune"),
        ("pillow", "score"),
        ("ray", "ray"),
        ("fastapi", "serve"),
        ("uvicorn", "serve"),
        ("pytest", "dev"),
        ("ruff", "dev"),
    ],
)
def test_each_package_belongs_to_one_extra(package: str, extra: str) -> None:
    assert [name for name, requirements in EXTRAS.items() if package in names(requirements)] == [extra]


def test_constraints_pin_every_requirement_of_the_checks_and_name_no_address() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    wanted = PROJECT["dependencies"] + [name for extra in INSTALLED for name in requirements_of(extra)]
    assert names(wanted) <= names(lines)
    assert "torchvision" not in names(lines)


def test_every_module_has_a_place_in_the_layers() -> None:
    (layers,) = (item["layers"] for item in PYPROJECT["tool"]["importlinter"]["contracts"] if item["id"] == "layers")
    placed = set(re.findall(r"[\w.]+", " ".join(layers)))
    files = [path for package in ("autotune", "btp") for path in (ROOT / package).iterdir()]
    modules = {f"{path.parent.name}.{path.stem}" for path in files if path.suffix == ".py" and path.stem != "__init__"}
    modules |= {f"{path.parent.name}.{path.name}" for path in files if (path / "__init__.py").exists()}
    assert modules <= placed
