"""What becomes of a certified profile when a job has registered it: champion, or held back with a reason."""

from dataclasses import replace
from pathlib import Path

from autotune.config import JobConfig, Limit
from autotune.delivery import promoted, registry_of
from autotune.profiles import Profiles, promotion_database
from autotune.registered import Version
from autotune.registry import Registry
from autotune.store import Database
from tests.autotune.registries import CERTIFIED, register, save_profile


def config(folder: Path) -> JobConfig:
    return JobConfig(
        model="unused",
        data=None,
        limit=Limit.parse("prefill_p50<=0.7x"),
        out=folder / "out",
        name="tiny",
        space=folder / "unused.yaml",
    )


def registered(registry: Registry, folder: Path, layer: int) -> Version:
    return register(registry, "tiny", save_profile(folder / f"{layer}.json", layer, certificate=CERTIFIED))


def test_a_certified_plan_becomes_champion_by_name_and_the_log_is_where_the_registry_is(tmp_path: Path) -> None:
    settings = replace(config(tmp_path), who="ann")
    registry = registry_of(settings)
    version, held_back = promoted(settings, registry, registered(registry, tmp_path, 1), "certified by s")
    assert (version.aliases, held_back) == (("champion-cpu",), "")
    (row,) = Profiles(registry, Database(f"sqlite:///{settings.out / 'study.db'}")).log("tiny")
    assert (row.who, row.why, row.after) == ("ann", "certified by s", version.version)
    elsewhere = replace(settings, out=tmp_path / "other", tracking_uri=registry.tracking_uri)
    second, _ = promoted(elsewhere, registry, registered(registry, tmp_path, 2), "certified by t")
    rows = Profiles(registry, promotion_database(registry, None)).log("tiny")
    assert [(row.before, row.after) for row in rows] == [(version.version, second.version), (None, version.version)]
    assert not (elsewhere.out / "study.db").exists()


def test_a_job_without_the_right_leaves_a_candidate(tmp_path: Path) -> None:
    settings = replace(config(tmp_path), promote=False)
    registry = registry_of(settings)
    version, held_back = promoted(settings, registry, registered(registry, tmp_path, 1), "certified by s")
    assert version.aliases == ("candidate-cpu",)
    assert "--no-promote" in held_back


def test_who_shares_no_log_with_others_at_a_server_leaves_a_candidate(tmp_path: Path) -> None:
    settings = replace(config(tmp_path), tracking_uri="http://127.0.0.1:9")
    here = registry_of(config(tmp_path))
    version = registered(here, tmp_path, 1)
    assert promoted(settings, registry_of(settings), version, "certified by s")[0] is version
    assert "--storage" in promoted(settings, registry_of(settings), version, "certified by s")[1]


def test_a_gate_that_refuses_is_the_reason(tmp_path: Path) -> None:
    settings = config(tmp_path)
    registry = registry_of(settings)
    path = save_profile(tmp_path / "slow.json", 1, certificate={**CERTIFIED, "limit": 0.55})
    version, held_back = promoted(settings, registry, register(registry, "tiny", path), "certified by s")
    assert version.aliases == ("candidate-cpu",)
    assert "as high as 0.600" in held_back
