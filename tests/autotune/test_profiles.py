"""Promotions on a real MLflow and real databases: gates, races, kills in the middle, and the way back."""

import multiprocessing as mp
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

pytest.importorskip("mlflow")

from mlflow import MlflowClient
from sqlalchemy import insert

from autotune import profiles as profiles_module
from autotune.config import AutotuneError
from autotune.profiles import Profiles, Promotion, promotion_database, stack_of
from autotune.registered import GateError, NotRegisteredError, RegistryError, Version
from autotune.registry import Registry
from autotune.store import Database, StoreError
from autotune.store.promotions import Promotions
from autotune.store.tables import promotion
from tests.autotune.registries import (
    CERTIFIED,
    UNCERTIFIED,
    promote_and_die,
    promote_together,
    register,
    save_profile,
)

CHAMPION = "champion-cpu"
NEW_PROCESS = mp.get_context("forkserver")
NEW_PROCESS.set_forkserver_preload(["mlflow", "mlflow.store.tracking.sqlalchemy_store", "autotune.profiles"])


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db")


@pytest.fixture
def client(registry: Registry) -> MlflowClient:
    return MlflowClient(tracking_uri=registry.tracking_uri)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:120]


@pytest.fixture
def profiles(registry: Registry, tmp_path: Path) -> Profiles:
    return Profiles(registry, Database(f"sqlite:///{tmp_path / 'log.db'}"))


def registered(registry: Registry, name: str, folder: Path, num: int = 1, **changes: Any) -> list[Version]:
    """That many certified versions."""
    arguments = {"certificate": CERTIFIED, **changes}
    paths = [save_profile(folder / f"{layer}.json", layer, **arguments) for layer in range(num)]
    return [register(registry, name, path) for path in paths]


def assert_chained(profiles: Profiles, name: str, num: int, alias: str = CHAMPION) -> None:
    """Each row starts where the one above ended, all took hold, and the alias is where the last one says."""
    rows = profiles.log(name, alias)[::-1]
    assert len(rows) == num
    assert [later.before for later in rows] == [None, *(earlier.after for earlier in rows[:-1])]
    assert all(earlier.id < later.id and earlier.at <= later.at for earlier, later in pairwise(rows))
    assert all(row.applied for row in rows)
    assert profiles.registry.pointed(name, alias) == rows[-1].after


def test_a_certified_version_becomes_champion_and_the_log_says_so(
    profiles: Profiles, name: str, tmp_path: Path
) -> None:
    (version,) = registered(profiles.registry, name, tmp_path)
    done = profiles.promote(version, who="me@here", why="it is good")
    assert (done.name, done.alias, done.kind, done.before, done.after) == (name, CHAMPION, "promote", None, 1)
    assert (done.who, done.why, done.applied) == ("me@here", "it is good", True)
    found = profiles.find(f"models:/{name}@{CHAMPION}")
    assert (found.version, found.aliases) == (1, ("candidate-cpu", CHAMPION))
    assert profiles.log(name) == [done]
    assert profiles.profile(found).certified


def test_what_is_champion_already_is_left_alone(profiles: Profiles, name: str, tmp_path: Path) -> None:
    (version,) = registered(profiles.registry, name, tmp_path)
    first = profiles.promote(version, who="me", why="once")
    assert profiles.promote(version, who="me", why="twice") == first
    assert profiles.log(name) == [first]


SLOW = {"value": 0.9, "low": 0.8, "high": 1.1}


@pytest.mark.parametrize(
    ("changes", "alias", "reason"),
    [
        (
            {"certificate": UNCERTIFIED},
            None,
            "not certified: it may be no faster than dense; the guard is broken",
        ),
        ({"certificate": None}, None, "it is not certified: it carries no certificate; its certificate has no latency"),
        (
            {"certificate": {**CERTIFIED, "limit": 0.55}},
            None,
            "as high as 0.600 of dense, and its limit is 0.550",
        ),
        ({"certificate": {**CERTIFIED, "limit": None}}, None, "its certificate has no latency that was held against"),
        (
            {"certificate": {**CERTIFIED, "latency": SLOW, "limit": 1.2}},
            None,
            "no faster than dense: .* 1.100",
        ),
        ({"latency": {"ratio": SLOW}}, None, "it may be no faster than dense: its latency may be as high as 1.100"),
        ({"latency": {"device_key": "0" * 64}}, None, "its latency was measured on another device key than its own"),
        ({}, "champion-nvidia-h200", "its latency was measured on cpu, whose champion is champion-cpu"),
        ({}, "Champion-cpu", "its latency was measured on cpu, whose champion is champion-cpu"),
    ],
)
def test_each_gate_holds_by_itself(
    profiles: Profiles, name: str, tmp_path: Path, changes: dict[str, Any], alias: str | None, reason: str
) -> None:
    good, bad = registered(profiles.registry, name, tmp_path) + registered(profiles.registry, name, tmp_path, **changes)
    profiles.promote(good, who="me", why="good", alias=alias and CHAMPION)
    with pytest.raises(GateError, match=f"/2 must not be {alias or CHAMPION}: [^;]*{reason}"):
        profiles.promote(bad, who="me", why="bad", alias=alias)
    assert_chained(profiles, name, 1)


def test_every_gate_that_failed_is_named(profiles: Profiles, name: str, tmp_path: Path) -> None:
    worst = {**UNCERTIFIED, "latency": SLOW}
    (version,) = registered(profiles.registry, name, tmp_path, certificate=worst)
    with pytest.raises(GateError) as raised:
        profiles.promote(version, who="me", why="bad", alias="champion-gpu")
    for gate in ("not certified", "measured on cpu", "its limit is 0.700", "no faster than dense"):
        assert gate in str(raised.value)
    assert profiles.log(name) == []


@pytest.mark.parametrize(
    "words",
    [{"alias": alias} for alias in ("latest", "Latest", "v1", "a b", "a\n", "é", "-a", "_a", "a" * 251)]
    + [{"alias": alias} for alias in ("candidate-cpu", "Candidate-x")]
    + [{"who": " "}, {"who": "x" * 256}, {"why": ""}, {"why": "nul \0"}],
)
def test_what_registry_or_log_could_not_take_is_refused_first(
    profiles: Profiles, tmp_path: Path, words: dict[str, str]
) -> None:
    name = "words"
    (version,) = registered(profiles.registry, name, tmp_path)
    with pytest.raises(AutotuneError, match=r"an alias is made of letters|a text of at most"):
        profiles.promote(version, **{"who": "me", "why": "for a test", **words})
    assert profiles.log(name) == []


def test_a_version_that_no_database_counts_to_is_not_there(profiles: Profiles, name: str, tmp_path: Path) -> None:
    registered(profiles.registry, name, tmp_path)
    for number in (0, 2, 2**31, 10**30):
        with pytest.raises(NotRegisteredError, match=f"has no version {number};"):
            profiles.find(f"models:/{name}/{number}")


def test_a_name_may_have_a_quote_in_it(profiles: Profiles, tmp_path: Path) -> None:
    registered(profiles.registry, "o'hara's", tmp_path)
    assert [version.name for version in profiles.list("o'hara's")] == ["o'hara's"]


def test_an_alias_that_names_no_device_takes_any(profiles: Profiles, name: str, tmp_path: Path) -> None:
    (version,) = registered(profiles.registry, name, tmp_path)
    profiles.promote(version, who="me", why="for everybody", alias="production")
    assert profiles.find(f"{name}@production").version == 1


def test_a_version_that_was_changed_or_deleted_is_refused(
    profiles: Profiles, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    bad, gone = registered(profiles.registry, name, tmp_path, 2, certificate=UNCERTIFIED)
    client.set_model_version_tag(name, "1", "certified", "true")  # a tag proves nothing
    with pytest.raises(GateError, match="not certified"):
        profiles.promote(bad, who="me", why="by its tag")
    stored = Path(client.get_run(bad.run_id).info.artifact_uri.removeprefix("file://")) / "profile" / "profile.json"
    stored.write_bytes(save_profile(tmp_path / "b.json", 0, certificate=CERTIFIED).read_bytes())
    with pytest.raises(RegistryError, match=f"must have SHA-256 {bad.sha256}"):
        profiles.promote(bad, who="me", why="changed")
    client.delete_model_version(name, "2")
    with pytest.raises(NotRegisteredError, match=r"has no version 2; it has: 1$"):
        profiles.promote(gone, who="me", why="gone", alias="production")
    assert profiles.log(name) == []


@pytest.mark.parametrize("damage", ["altered", "without manifest"])
def test_a_version_whose_evidence_cannot_be_trusted_is_refused(
    profiles: Profiles, client: MlflowClient, name: str, tmp_path: Path, damage: str
) -> None:
    path = save_profile(tmp_path / "profile.json", 0, certificate=CERTIFIED)
    version = register(profiles.registry, name, path, evidence={"select.json": path})
    if damage == "altered":
        folder = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://")) / "profile"
        (folder / "select.json").write_text("{}")
    else:
        client.delete_model_version_tag(name, "1", "manifest")
    told = r"select\.json must have SHA-256" if damage == "altered" else "must have its manifest's SHA-256 as a tag"
    with pytest.raises(RegistryError, match=told):
        profiles.promote(version, who="me", why="its profile is sound")
    assert profiles.log(name) == []


def test_rolling_back_goes_down_the_stack(profiles: Profiles, name: str, tmp_path: Path) -> None:
    versions = registered(profiles.registry, name, tmp_path, 3)
    for version in versions:
        profiles.promote(version, who="me", why="up")
    assert profiles.rollback(name, CHAMPION, who="me", why="down").after == 2
    done = profiles.rollback(name, CHAMPION, who="me", why="further down")
    assert (done.kind, done.before, done.after) == ("rollback", 2, 1)
    with pytest.raises(GateError, match="was on no other version"):
        profiles.rollback(name, CHAMPION, who="me", why="too far")
    profiles.promote(versions[2], who="me", why="up again")
    assert profiles.rollback(name, CHAMPION, who="me", why="down again").after == 1
    assert_chained(profiles, name, 7)


def test_rolling_back_goes_through_the_gates(
    profiles: Profiles, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    bad, good = (*registered(profiles.registry, name, tmp_path, certificate=UNCERTIFIED),
                 *registered(profiles.registry, name, tmp_path))  # fmt: skip
    client.set_registered_model_alias(name, CHAMPION, str(bad.version))  # past the log
    assert profiles.promote(good, who="me", why="good").before == bad.version
    with pytest.raises(GateError, match=r"/1 must not be champion-cpu: it is not certified"):
        profiles.rollback(name, CHAMPION, who="me", why="was better")
    assert profiles.find(f"{name}@{CHAMPION}").version == good.version


def row(kind: str, before: int | None, after: int) -> Promotion:
    return Promotion(
        id=0, name="m", alias="a", kind=kind, before=before, after=after, who="", why="", at=0.0, applied=True
    )


@pytest.mark.parametrize(
    ("log", "stack"),
    [
        ([], []),
        ([row("promote", None, 1), row("promote", 1, 2), row("rollback", 2, 1)], [1]),
        ([row("promote", 7, 8)], [7, 8]),
        ([row("promote", None, 1), row("promote", 1, 2), row("rollback", 2, 1), row("promote", 1, 3)], [1, 3]),
        ([row("promote", None, 1), row("promote", 5, 2), row("rollback", 2, 5)], [1, 5]),
        ([row("promote", None, 1), row("promote", 1, 2), row("rollback", 3, 2)], [1, 2]),
    ],
)
def test_promotions_push_and_rollbacks_pop(log: list[Promotion], stack: list[int]) -> None:
    assert stack_of(log) == stack


def test_a_name_that_comes_again_has_a_log_of_its_own(
    profiles: Profiles, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    first, second = registered(profiles.registry, name, tmp_path, 2)
    profiles.promote(first, who="me", why="first")
    profiles.promote(second, who="me", why="second")
    client.delete_registered_model(name)
    with pytest.raises(NotRegisteredError, match=f"no profile is registered as '{name}'"):
        profiles.log(name)
    registered(profiles.registry, name, tmp_path, 1)
    assert profiles.log(name) == []


@pytest.mark.timeout(170)
def test_six_processes_race_and_the_log_names_the_winner(
    registry: Registry, storage: str, name: str, tmp_path: Path
) -> None:
    versions = registered(registry, name, tmp_path, 6)
    start = NEW_PROCESS.Barrier(6)
    arguments = [(registry.tracking_uri, storage, name, version.version, start) for version in versions]
    racers = [NEW_PROCESS.Process(target=promote_together, args=each) for each in arguments]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert [racer.exitcode for racer in racers] == [0] * 6
    profiles = Profiles(registry, Database(storage))
    assert_chained(profiles, name, 6)
    assert {each.who for each in profiles.log(name)} == {f"racer {number}" for number in range(1, 7)}


@pytest.mark.parametrize(
    ("storage", "then"),
    [("sqlite", then) for then in ("find", "list", "log", "promote", "rollback", "deleted")]
    + [("postgresql", "promote")],
    indirect=["storage"],
)
@pytest.mark.timeout(120)
def test_a_promotion_that_is_killed_before_the_alias_follows_is_made_good(
    registry: Registry, storage: str, name: str, client: MlflowClient, tmp_path: Path, then: str
) -> None:
    profiles = Profiles(registry, Database(storage))
    versions = registered(registry, name, tmp_path, 3)
    profiles.promote(versions[0], who="me", why="before")
    victim = NEW_PROCESS.Process(target=promote_and_die, args=(registry.tracking_uri, storage, name, 2))
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert registry.pointed(name, CHAMPION) == 1  # the log says 2
    if then == "find":
        assert profiles.find(f"models:/{name}@{CHAMPION}").version == 2
    elif then == "list":
        assert CHAMPION in profiles.list(name)[1].aliases
    elif then == "log":
        assert profiles.log(name)[0].applied
    elif then == "promote":
        assert profiles.promote(versions[2], who="me", why="after").before == 2
    elif then == "rollback":
        assert profiles.rollback(name, CHAMPION, who="me", why="after").before == 2
    else:
        client.delete_model_version(name, "2")
        assert profiles.find(f"models:/{name}@{CHAMPION}").version == 1
    assert_chained(profiles, name, {"promote": 3, "rollback": 3, "deleted": 1}.get(then, 2))


def one_row(database: Database, registry: Registry, name: str, after: int) -> Promotions:
    """A log with a row that its alias has not followed yet."""
    made = registry.made(name)
    log = Promotions(database, f"made {round(1000 * made)}", name, address=registry.tracking_uri, made=made)
    log.write(alias=CHAMPION, kind="promote", before=None, after=after, who="slow", why="still at it")
    return log


def test_who_reads_does_not_wait_for_a_promotion_and_who_promotes_not_for_ever(
    registry: Registry, storage: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = registered(registry, name, tmp_path, 2)
    log = one_row(Database(storage), registry, name, 1)
    profiles = Profiles(registry, Database(storage))
    monkeypatch.setattr(profiles_module, "WAIT_S", 0.5)
    with ThreadPoolExecutor(1) as others, log.locked(CHAMPION, 0.0):
        began = time.monotonic()
        listed, rows = others.submit(profiles.list, name).result(20), others.submit(profiles.log, name).result(20)
        assert others.submit(profiles.find, f"{name}/2").result(20).version == 2
        assert CHAMPION not in listed[1].aliases
        assert [row.applied for row in rows] == [False]
        assert time.monotonic() - began < 10
        with pytest.raises(StoreError, match=rf"may promote .*@{CHAMPION}, and another has been at it for 0\.5 s"):
            others.submit(profiles.promote, versions[1], who="me", why="impatient").result(20)
    assert CHAMPION in profiles.list(name)[1].aliases
    assert_chained(profiles, name, 1)


@contextmanager
def paused(registry: Registry) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A registry that waits before it first moves an alias: set when it does, and for it to go on."""
    reached, go_on, point = threading.Event(), threading.Event(), registry.point

    def wait(name: str, alias: str, number: int) -> None:
        if not reached.is_set():
            reached.set()
            assert go_on.wait(60)
        point(name, alias, number)

    registry.point = wait  # type: ignore[method-assign]
    try:
        yield reached, go_on
    finally:
        go_on.set()


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
def test_a_lock_that_is_lost_leaves_the_alias_where_the_log_says(
    registry: Registry, storage: str, name: str, tmp_path: Path
) -> None:
    first, second = registered(registry, name, tmp_path, 2)
    slow, quick = (Profiles(Registry(registry.tracking_uri), Database(storage)) for _ in range(2))
    with ThreadPoolExecutor(1) as others, paused(slow.registry) as (reached, go_on):
        promoting = others.submit(slow.promote, first, who="slow", why="was first")
        assert reached.wait(30)
        with psycopg.connect(storage.replace("+psycopg", ""), autocommit=True) as connection:
            ended = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            assert connection.execute(ended).fetchall() == [(True,)]
        quick.promote(second, who="quick", why="got in between")
        assert registry.pointed(name, CHAMPION) == 2
        go_on.set()
        assert promoting.result(30).after == 1
    assert_chained(quick, name, 2)
    assert registry.pointed(name, CHAMPION) == 2


def test_only_rows_up_to_the_one_that_was_followed_count_as_applied(
    registry: Registry, name: str, tmp_path: Path
) -> None:
    registered(registry, name, tmp_path, 2)
    log = one_row(Database(f"sqlite:///{tmp_path}/log.db"), registry, name, 1)
    (first,) = log.rows()
    log.write(alias=CHAMPION, kind="promote", before=1, after=2, who="another", why="in between")
    log.applied(CHAMPION, first.id)
    assert [row.applied for row in log.rows()] == [False, True]


def test_a_log_from_before_names_had_homes_is_kept(profiles: Profiles, name: str, tmp_path: Path) -> None:
    registered(profiles.registry, name, tmp_path, 2)
    values = {"registry": profiles.registry.tracking_uri, "name": name, "alias": CHAMPION, "kind": "promote"}
    values |= {"to_version": 1, "who": "before", "why": "long ago", "applied": True}
    made, database = profiles.registry.made(name), profiles._database
    for when in (made - 60, made + 0.1):  # the first is of another model of this name
        row = insert(promotion).values({**values, "promoted": when})
        database.run(lambda connection, row=row: connection.execute(row))
    assert [row.at for row in profiles.log(name)] == [made + 0.1]


def test_the_log_lies_beside_a_local_registry_unless_it_is_named(tmp_path: Path) -> None:
    local = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    assert promotion_database(local, None).file == tmp_path / "study.db"
    assert promotion_database(local, f"sqlite:///{tmp_path}/other.db").file == tmp_path / "other.db"
    with pytest.raises(
        RegistryError, match=r"needs a database beside a server, got none for http://host:1; .*--storage"
    ):
        promotion_database(Registry("http://me:secret@host:1"), None)


def test_where_the_registry_fails_in_the_middle_the_log_stands(
    profiles: Profiles, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (version,) = registered(profiles.registry, name, tmp_path)

    def fail(*_: object) -> None:
        raise RegistryError("away")

    with monkeypatch.context() as away:
        away.setattr(Registry, "point", fail)
        with pytest.raises(RegistryError, match="away"):
            profiles.promote(version, who="me", why="unlucky")
    assert profiles.registry.pointed(name, CHAMPION) is None
    assert profiles.find(f"{name}@{CHAMPION}").version == version.version
    assert_chained(profiles, name, 1)


def test_the_best_is_certified_within_the_limit_and_keeps_most(profiles: Profiles, name: str, tmp_path: Path) -> None:
    def version(macro: float, high_ms: float, device: str = "NVIDIA H200", **changes: Any) -> Version:
        rows = [{"name": "dense", "macro": {"value": 0.9}}, {"name": "tuned", "macro": {"value": macro}}]
        latency = {"ratio": CERTIFIED["latency"], "ms": {"value": high_ms - 1, "low": high_ms - 2, "high": high_ms}}
        arguments = {"device": device, "rows": rows, "latency": latency, **changes}
        return registered(profiles.registry, name, tmp_path, **arguments)[0]

    version(0.80, 40.0)
    good = version(0.85, 58.0)
    version(0.89, 61.0)
    version(0.89, 50.0, certificate=UNCERTIFIED)
    version(0.89, 30.0, device="NVIDIA A100")
    version(0.89, 30.0, latency={})
    found = profiles.best(max_latency_ms=60.0, device="h200", name=name)
    assert (found.version, found.latency_ms, found.latency_high_ms) == (good.version, 57.0, 58.0)
    assert found.retention == pytest.approx(0.9444)
    assert profiles.best(max_latency_ms=60.0, name=name).device == "nvidia-a100"
    assert profiles.best(max_latency_ms=60.0, device="nvidia-h", name=name) == found
    with pytest.raises(
        NotRegisteredError, match=r"within 39 ms prefill p50 on a device named 'h200'; the fastest is .*/1 .* 40\.0 ms"
    ):
        profiles.best(max_latency_ms=39.0, device="h200", name=name)
    with pytest.raises(RegistryError, match=r"no certified version with a latency .* named 'tpu', got 0 others"):
        profiles.best(max_latency_ms=60.0, device="tpu", name=name)


def measured(high_ms: float, **how: str) -> dict[str, Any]:
    rows = [{"name": "dense", "macro": {"value": 0.9}}, {"name": "tuned", "macro": {"value": 0.8}}]
    ms = {"value": high_ms - 1, "low": high_ms - 2, "high": high_ms}
    return {"rows": rows, "latency": {"ratio": CERTIFIED["latency"], "ms": ms, **how}}


def test_the_best_is_so_by_its_profile_and_not_by_its_tags(
    profiles: Profiles, client: MlflowClient, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = profiles.registry
    honest = registered(registry, name, tmp_path, **measured(50.0))[0]
    assert honest.retention == 0.8889
    for tags, evidence in (
        ({"retention": "nan"}, {}),
        ({"retention": "inf"}, {}),
        ({"retention": "1.0"}, {}),
        ({"certified": "true", "retention": "1.0"}, {"certificate": UNCERTIFIED}),
        ({"latency_high_ms": "1.0", "retention": "1.0"}, measured(90.0)),
        ({"metric": "prefill", "retention": "1.0"}, measured(40.0, metric="ttft", quantile="p50")),
    ):
        (liar,) = registered(registry, name, tmp_path, **{**measured(50.5), **evidence})
        for key, value in tags.items():
            client.set_model_version_tag(name, str(liar.version), key, value)
    (gone,) = registered(registry, name, tmp_path, **measured(10.0))
    path = Path(client.get_run(gone.run_id).info.artifact_uri.removeprefix("file://")) / "profile" / "profile.json"
    path.unlink()
    found = profiles.best(max_latency_ms=60.0, name=name)
    assert (found.version, found.retention, found.latency_high_ms) == (honest.version, 0.8889, 50.0)
    assert f"left out: could not read {gone.uri} " in caplog.text


def test_only_latencies_of_one_kind_are_held_against_each_other(profiles: Profiles, name: str, tmp_path: Path) -> None:
    registry = profiles.registry
    (prefill,) = registered(registry, name, tmp_path, **measured(50.0, metric="prefill", quantile="p50"))
    (ttft,) = registered(registry, name, tmp_path, **measured(40.0, metric="ttft", quantile="p95"))
    assert (ttft.metric, ttft.quantile) == ("ttft", "p95")
    assert profiles.best(max_latency_ms=60.0, name=name).uri == prefill.uri
    assert profiles.best(max_latency_ms=60.0, name=name, metric="ttft", quantile="p95").uri == ttft.uri
    with pytest.raises(NotRegisteredError, match="latency in milliseconds, ttft p50, is there, got 0 others"):
        profiles.best(max_latency_ms=60.0, name=name, metric="ttft")


def test_every_name_is_listed_newest_first(profiles: Profiles, name: str, tmp_path: Path) -> None:
    registered(profiles.registry, f"{name}-a", tmp_path)
    registered(profiles.registry, f"{name}-b", tmp_path)
    newest = profiles.list()[:2]
    assert [version.name for version in newest] == [f"{name}-b", f"{name}-a"]
    with pytest.raises(NotRegisteredError):
        profiles.list("nobody")
    nowhere = Registry(f"sqlite:///{tmp_path}/none.db")
    assert replace(newest[0], aliases=()) == replace(profiles.list(f"{name}-b")[0], aliases=())
    assert Profiles(nowhere, Database(f"sqlite:///{tmp_path}/none-log.db")).list() == []
    assert not (tmp_path / "none-log.db").exists()
