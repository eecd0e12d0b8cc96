"""docker-compose.yml keeps the rules that make it safe to start: pinned, watched, confined, no secret in it."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name

from tests.test_packaging import requirements_of

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
STAGES = re.split(r"^FROM ", (ROOT / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()

PINNED = re.compile(r"^[\w./-]+:v?\d+\.\d+[\w.-]*$")
REQUIRED_VARIABLE = re.compile(r"^\$\{(\w+):\?[^}]+\}$")
URL_WITH_PASSWORD = re.compile(r"://[^/\s:@]+:[^/\s@]+@")
SECRET = re.compile(r"PASS|SECRET|TOKEN|KEY")

each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())


def checked_against_the_specification(path: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_it_is_what_the_compose_specification_describes() -> None:
    done = checked_against_the_specification(ROOT / "docker-compose.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_specification_finds_what_is_misspelt(tmp_path: Path) -> None:
    path = tmp_path / "docker-compose.yml"
    path.write_text((ROOT / "docker-compose.yml").read_text().replace("cap_drop:", "drop_caps:"))
    done = checked_against_the_specification(path)
    assert done.returncode == 1
    assert "drop_caps" in done.stdout


@each_service
def test_images_are_pinned(service: dict[str, Any]) -> None:
    assert PINNED.match(service["image"])


def test_base_image_is_pinned_and_every_target_leaves_root() -> None:
    base, *targets = STAGES
    assert PINNED.match(base.split()[0])
    assert all(re.findall(r"^USER (\w+)$", target, flags=re.MULTILINE)[-1:] == ["autotune"] for target in targets)
    assert {target.split()[0] for target in targets} <= {stage.split()[2] for stage in STAGES}
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built == {target.split()[2] for target in targets}


def test_images_install_the_versions_that_the_checks_run_with() -> None:
    pinned = {canonicalize_name(line.partition("==")[0]) for line in CONSTRAINTS}
    installs = [line for stage in STAGES for line in re.findall(r"pip install (.*)", stage)]
    assert len(installs) == len(STAGES) - 1
    for line in installs:
        option, constraints, *requirements = shlex.split(line)
        assert (option, Path(constraints).name) == ("-c", "constraints.txt")
        for requirement in requirements:
            own = re.fullmatch(r"(?:\.|/src)\[(.+)\]", requirement)
            wanted = [name for extra in own[1].split(",") for name in requirements_of(extra)] if own else [requirement]
            assert {canonicalize_name(re.match(r"[\w-]+", name)[0]) for name in wanted} <= pinned


def test_constraints_are_sorted_and_exact() -> None:
    pins = [line for line in CONSTRAINTS if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert pins == sorted(set(pins), key=str.lower)


def test_what_an_image_copies_is_let_into_the_build_and_holds_what_the_package_names() -> None:
    let_in = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE))
    lines = re.findall(r"^COPY (.+) \S+$", "\n".join(STAGES), flags=re.MULTILINE)
    copied = {name for line in lines for name in line.split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml"} <= copied
    assert copied <= let_in
    assert all((ROOT / name).exists() for name in copied)


@each_service
def test_services_are_confined(service: dict[str, Any]) -> None:
    assert service["user"] not in ("root", "0")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "network_mode", "devices"} & set(service)


@each_service
def test_whatever_another_service_waits_for_has_a_health_check(service: dict[str, Any]) -> None:
    for name, wait in service.get("depends_on", {}).items():
        assert wait["condition"] == "service_healthy"
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


@each_service
def test_servers_restart_and_are_watched(service: dict[str, Any]) -> None:
    if "profiles" not in service:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["retries"] > 0


@each_service
def test_passwords_come_from_the_environment_and_are_required(service: dict[str, Any]) -> None:
    offered = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    for key, value in service.get("environment", {}).items():
        if SECRET.search(key):
            match = REQUIRED_VARIABLE.match(value)
            assert match, f"{key} must read ${{VARIABLE:?why}}, got {value!r}"
            assert match.group(1) in offered


def test_a_service_is_given_its_own_password_alone() -> None:
    given = {name: str(service.get("environment")) for name, service in SERVICES.items() if name != "postgres"}
    assert [name for name, text in given.items() if "MLFLOW_DB_PASSWORD" in text] == ["mlflow"]
    assert not [name for name, text in given.items() if "POSTGRES_PASSWORD" in text]
    assert "AUTOTUNE_DB_PASSWORD" not in given["mlflow"]


def test_no_url_carries_a_password() -> None:
    assert not URL_WITH_PASSWORD.search((ROOT / "docker-compose.yml").read_text())


def test_example_environment_has_no_values() -> None:
    assert not re.search(r"^\w+=.+", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)


@each_service
def test_ports_are_published_to_this_host_only(service: dict[str, Any]) -> None:
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_database_has_no_way_out() -> None:
    assert SERVICES["postgres"]["networks"] == ["backend"]
    assert COMPOSE["networks"]["backend"] == {"internal": True}


@each_service
def test_named_volumes_are_declared_and_mounted_files_exist(service: dict[str, Any]) -> None:
    for volume in service.get("volumes", []):
        if isinstance(volume, dict):
            assert volume["read_only"] is True
            continue
        source = volume.split(":")[0]
        if source.startswith("./"):
            assert (ROOT / source).is_file()
            assert volume.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", ["tune", "worker", "ray-head", "ray-worker"])
def test_who_measures_on_one_device_holds_one_lock(name: str) -> None:
    service = SERVICES[name]
    assert service["hostname"] == SERVICES["tune"]["hostname"]
    assert f"locks:{service['environment']['BTP_LOCK_DIR']}" in service["volumes"]
