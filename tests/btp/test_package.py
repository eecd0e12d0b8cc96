"""What `import btp` gives, and what it does not cost."""

import importlib.util
import subprocess
import sys

import btp


def test_importing_does_not_load_torch():
    code = (
        "import sys, btp; btp.Plan, btp.Stage, btp.Profile, btp.presets.btp_released(32), btp.PlanError;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_exported_names_are_sorted_and_exist():
    constants = [name for name in btp.__all__ if name.isupper()]
    classes = [name for name in btp.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in btp.__all__ if name[0].islower()]
    assert btp.__all__ == [*sorted(constants), *sorted(classes), *sorted(functions)]
    assert all(hasattr(btp, name) for name in btp.__all__)
    assert set(btp.__all__) == {*btp._HOME, "presets"}
    assert set(btp.__all__) <= set(dir(btp))


def test_unknown_names_are_attribute_errors():
    assert not hasattr(btp, "prune_everything")


def test_no_submodule_shadows_a_function():
    assert callable(btp.prune)
    for name in btp.__all__:
        is_module = importlib.util.find_spec(f"btp.{name}") is not None
        assert is_module == (name == "presets")
