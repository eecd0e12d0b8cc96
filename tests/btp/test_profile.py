"""Profiles: what is saved is what is loaded, and nothing altered gets through."""

import dataclasses
import json

import pytest

from btp import DeviceKey, ModelIdentity, Plan, Profile, ProfileError, Stage, Workload
from btp.sealed import seal

PROFILE = Profile(
    plan=Plan(stages=(Stage(layer=3, keep=0.5), Stage(layer=9, keep=0.1)), positions="reset"),
    model=ModelIdentity(
        architecture="LlavaForConditionalGeneration", num_layers=32, hidden_size=4096, num_image_tokens=576
    ),
    workload=Workload(image_tokens=576, prompt_tokens=640, batch_size=1, dtype="bfloat16", attention="sdpa"),
    device=DeviceKey(
        threads=1,
        name="NVIDIA H200",
        driver="570.1",
        cuda="12.8",
        torch="2.13.0",
        transformers="5.23.0",
        attention="sdpa",
        dtype="bfloat16",
        batch_size=1,
        prompt_tokens=640,
        image_tokens=576,
    ),
    evidence={"accuracy": {"value": 0.61, "interval": [0.6, 0.62]}, "dense": None, "note": "naïve"},
)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    assert Profile.load(path) == PROFILE
    assert Plan.load(path) == PROFILE.plan
    assert json.loads(path.read_text())["sha256"] == PROFILE.digest == Profile.load(path).digest


@pytest.mark.parametrize(
    "tamper",
    [
        lambda data: data["plan"]["stages"][0].update(keep=0.9),
        lambda data: data["evidence"]["accuracy"].update(value=0.99),
        lambda data: data["model"].update(num_layers=40),
        lambda data: data.update(extra=1),
        lambda data: data.pop("sha256"),
        lambda data: data.update(sha256="0" * 64),
        lambda data: data.pop("device"),
    ],
)
@pytest.mark.parametrize("load", [Profile.load, Plan.load])
def test_altered_files_are_refused(tamper, load, tmp_path):
    data = PROFILE.to_dict()
    tamper(data)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=r"profile\.json: the content's SHA-256 must be"):
        load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("load", [Profile.load, Plan.load])
def test_cut_files_are_refused(share, load, tmp_path):
    path = tmp_path / "profile.json"
    text = PROFILE.to_json()
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(ProfileError, match=r"profile\.json: must be JSON.*fetch it again"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema_version=2), "newer than 1.*upgrade btp"),
        (lambda data: data.update(schema_version=True), "must be a whole number"),
        (lambda data: data.pop("schema_version"), "must be a whole number"),
        (lambda data: data.pop("device"), "must hold exactly"),
        (lambda data: data["model"].update(depth=3), "model must hold exactly"),
        (lambda data: data["model"].update(num_layers="32"), "model.num_layers must be"),
        (lambda data: data["plan"]["stages"][0].update(keep=7), "the plan in it is not legal: keep must be"),
        (lambda data: data.update(evidence=[]), "evidence must be an object"),
    ],
)
def test_foreign_files_are_refused_even_when_sealed(change, message, tmp_path):
    data = PROFILE.to_dict()
    change(data)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(seal(data)))
    with pytest.raises(ProfileError, match=rf"profile\.json: .*{message}"):
        Profile.load(path)


def test_evidence_must_be_json():
    for evidence in ({"loss": float("nan")}, {"loss": {1, 2}}):
        with pytest.raises(ProfileError, match="plain JSON"):
            dataclasses.replace(PROFILE, evidence=evidence).to_json()


def test_profiles_fit_their_model_only():
    PROFILE.check_fits(PROFILE.model)
    other = dataclasses.replace(PROFILE.model, num_layers=40, hidden_size=5120)
    with pytest.raises(ProfileError, match="num_layers 32, here 40; hidden_size 4096, here 5120"):
        PROFILE.check_fits(other)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("AMD EPYC", "amd-epyc"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-cpu"),
        ("", "unknown-device"),
    ],
)
def test_slugs_are_aliases(name, slug):
    assert dataclasses.replace(PROFILE.device, name=name).slug == slug


@pytest.mark.parametrize(
    ("certificate", "reasons"),
    [
        ({"certified": True, "reasons": []}, ()),
        ({"certified": False, "reasons": ["too slow", "too few pictures"]}, ("too slow", "too few pictures")),
        ({"certified": False}, ("its certificate says so",)),
        ({"certified": 1, "reasons": []}, ("its certificate says so",)),
        ({"certified": "yes", "reasons": "none"}, ("its certificate says so",)),
        ({}, ("its certificate says so",)),
        ("certified", ("it carries no certificate",)),
        (None, ("it carries no certificate",)),
    ],
)
def test_a_loaded_profile_tells_whether_it_is_certified(certificate, reasons, tmp_path):
    dataclasses.replace(PROFILE, evidence={"certificate": certificate}).save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json")
    assert loaded.uncertified_because == reasons
    assert loaded.certified == (not reasons)


def test_a_profile_from_before_certificates_is_read_and_not_certified(tmp_path):
    assert "certificate" not in PROFILE.evidence
    PROFILE.save(tmp_path / "profile.json")
    assert not Profile.load(tmp_path / "profile.json").certified
