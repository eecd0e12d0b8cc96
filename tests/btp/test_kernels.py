"""The Triton kernels: under the interpreter on the CPU, compiled for devices that are not here, and on CUDA.

Shapes: B batch, N image tokens, D features, K picked.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from btp import ops

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
FLAGS = [  # by feature, bonus, restart
    (False, False, True),
    (False, True, False),
    (True, True, False),
    (True, False, True),
]


@needs_triton
def test_the_kernels_pass_their_tests_under_the_interpreter():
    """In a process of its own: the interpreter replaces every kernel of the process it is switched on in."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("padded", [32, 1024, 4096, 8192])
@pytest.mark.parametrize(("by_feature", "bonus", "restart"), FLAGS)
def test_the_kernel_compiles_without_a_device(capability, padded, by_feature, bonus, restart, monkeypatch, tmp_path):
    """What the interpreter runs, the compiler need not take."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from btp import kernels

    tensors = dict.fromkeys(("source", "closeness", "bonus", "row"), "*fp32")
    constants = {
        "NUM_COLUMNS": 4096 if by_feature else 0,
        "BY_FEATURE": by_feature,
        "BONUS": bonus,
        "RESTART": restart,
        "PADDED": padded,
        "TOKENS": 32,
        "COLUMNS": 256,
    }
    signature = {**tensors, "picks": "*i64", "num_tokens": "i32", "num_pick": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernels._max_min.arg_names
    places = {(list(signature).index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernels._max_min, signature, places),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 16 if by_feature else 8},
    )
    assert compiled.asm["cubin"]


def test_triton_is_not_loaded_where_there_is_no_device():
    code = (
        "import sys, torch; from btp import ops; "
        "print(ops.farthest_first(torch.eye(4)[None], 2).tolist(), *{'triton', 'btp.kernels'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=True)
    assert done.stdout.strip() == "[[0, 1]]"


@pytest.mark.parametrize("missing", ["triton", "compiler", "headers"])
def test_torch_stands_in_where_triton_cannot_build(missing, monkeypatch, tmp_path):
    if missing == "triton":
        monkeypatch.setattr(ops, "find_spec", lambda name: None)
    if missing == "compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    if missing == "headers":
        monkeypatch.setattr(ops.sysconfig, "get_path", lambda name: str(tmp_path))
    assert ops._kernels.__wrapped__() is None


@needs_triton
def test_kernels_are_used_where_triton_can_build(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(ops.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    assert ops._kernels.__wrapped__().max_min


@needs_triton
def test_the_square_pays_from_few_picks_on():
    from btp import kernels

    def few(batch, num_pick):
        return kernels.few(torch.empty(batch, 576, 4096, device="meta"), num_pick)

    assert few(1, 1)
    assert not few(1, 144)
    assert few(32, 25)
    assert not few(32, 144)


@pytest.mark.gpu
class TestOnCuda:
    @pytest.fixture(autouse=True)
    def _needs_cuda(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")
        if ops._kernels() is None:
            pytest.skip("Triton cannot build kernels on this machine")

    @staticmethod
    def features(num_tokens, batch=2, size=4096, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, num_tokens, size, generator=generator).to("cuda", dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("num_tokens", [576, 2880])
    @pytest.mark.parametrize("with_bonus", [False, True])
    def test_triton_picks_what_torch_picks(self, num_tokens, dtype, with_bonus, monkeypatch):
        feature_BND = self.features(num_tokens, dtype=dtype)
        bonus_BN = feature_BND[:, :, 0].float().sigmoid() if with_bonus else None
        ours = ops.farthest_first(feature_BND, num_tokens // 4, bonus_BN=bonus_BN)
        monkeypatch.setattr(ops, "_kernels_for", lambda unit_BND: None)
        assert torch.equal(ours, ops.farthest_first(feature_BND, num_tokens // 4, bonus_BN=bonus_BN))

    @pytest.mark.parametrize("num_tokens", [576, 2880])
    @pytest.mark.parametrize("few", [True, False], ids=["features", "square"])
    def test_triton_keeps_away_from_what_is_taken(self, num_tokens, few, monkeypatch):
        """Over distances that no rounding reaches: every cosine is a multiple of 1/8, exactly."""
        from btp import kernels

        monkeypatch.setattr(kernels, "few", lambda unit_BND, num_pick: few)
        generator = torch.Generator().manual_seed(0)
        sign_BND = torch.randint(2, (2, num_tokens, 16), generator=generator) * 2.0 - 1
        feature_BND = torch.nn.functional.pad(sign_BND, (0, 4096 - 16)).cuda()
        taken_BM = torch.arange(5, device="cuda").expand(2, -1)
        ours = ops.farthest_first(feature_BND, num_tokens // 8, taken_BM)
        monkeypatch.setattr(ops, "_kernels_for", lambda unit_BND: None)
        assert torch.equal(ours, ops.farthest_first(feature_BND, num_tokens // 8, taken_BM))
        assert torch.equal(ours.cpu(), ops.farthest_first(feature_BND.cpu(), num_tokens // 8, taken_BM.cpu()))

    @pytest.mark.parametrize("with_taken", [False, True])
    def test_nothing_waits_for_the_device(self, with_taken):
        feature_BND = self.features(576)
        taken = (torch.arange(5, device="cuda").expand(2, -1),) if with_taken else ()
        ops.farthest_first(feature_BND, 144, *taken)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.farthest_first(feature_BND, 144, *taken)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_all_steps_of_all_rows_are_one_launch(self):
        feature_BND = self.features(576, batch=8)
        launches = {}
        for num_pick in (2, 144):
            ops.farthest_first(feature_BND, num_pick)  # compiles
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                ops.farthest_first(feature_BND, num_pick)
                torch.cuda.synchronize()
            kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            assert sum("_max_min" in name for name in kernels) == 1
            launches[num_pick] = len(kernels)
        assert launches[2] == launches[144]
