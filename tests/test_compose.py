"""docker-compose.yml keeps the rules that make it safe to start: pinned, watched, and with no secret in it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

PINNED = re.compile(r"^[\w./-]+:v?\d+\.\d+[\w.-]*$")
REQUIRED_VARIABLE = re.compile(r"^\$\{(\w+):\?[^}]+\}$")
URL_WITH_PASSWORD = re.compile(r"://[^/\s:@]+:[^/\s@]+@")

each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())


@each_service
def test_images_are_pinned(service: dict[str, Any]) -> None:
    assert PINNED.match(service["image"])


def test_base_image_is_pinned_and_every_target_leaves_root() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", dockerfile, flags=re.MULTILINE)[1:]
    base, *targets = stages
    assert PINNED.match(base.split()[0])
    assert all("\nUSER autotune\n" in target for target in targets)
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built == {target.split()[2] for target in targets}


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
        if re.search(r"PASS|SECRET|TOKEN|KEY", key):
            match = REQUIRED_VARIABLE.match(value)
            assert match, f"{key} must read ${{VARIABLE:?why}}, got {value!r}"
            assert match.group(1) in offered


def test_no_url_carries_a_password() -> None:
    assert not URL_WITH_PASSWORD.search((ROOT / "docker-compose.yml").read_text())


def test_example_environment_has_no_values() -> None:
    assert not re.search(r"^\w+=.+", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)


@each_service
def test_ports_are_published_to_this_host_only(service: dict[str, Any]) -> None:
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@each_service
def test_named_volumes_are_declared_and_mounted_files_exist(service: dict[str, Any]) -> None:
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert (ROOT / source).is_file() if source.startswith("./") else source in COMPOSE["volumes"]
