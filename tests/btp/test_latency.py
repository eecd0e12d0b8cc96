"""A latency measured by its protocol: real runs, real busy processes, and naive loops for the statistics."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch

from btp import BusyDeviceError, Plan, PlanError, Stage, device_key, latency, measure
from btp.capture import CaptureError
from btp.device_lock import computing, device_lock, lock_name
from btp.device_state import CpuWatch, DeviceState, GpuWatch, bearable_share, watch
from btp.graphs import GraphedPrefill
from btp.intervals import percentile, ratio_interval, repetition_interval, stretch_length, theil_sen_slope
from btp.latency import LatencyBlocks, WarmUp, Window
from btp.timing import Run
from tests.btp.tape import Tape

pytestmark = pytest.mark.alone

PLAN = Plan(stages=(Stage(layer=1, keep=0.5),))
CPU = torch.device("cpu")
BUSY = "print(flush=True)\nwhile True: pass"


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("BTP_LOCK_DIR", str(tmp_path / "locks"))


@contextmanager
def processes(code, count=1):
    """Python processes that have each printed a line."""
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            process.stdout.readline()
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def test_measure_returns_blocks_and_leaves_the_model_alone(llava, inputs_for, device):
    model, inputs = llava(device=device), inputs_for(2, padding="left", device=device)
    with torch.no_grad():
        before = model(**inputs).logits
        blocks = measure(model, inputs, PLAN, repeats=4, max_warmup=5, max_others=1.0)
        assert torch.equal(model(**inputs).logits, before)
    for metric in ("prefill", "first_token"):
        assert len(blocks.dense_ms(metric)) == len(blocks.pruned_ms(metric)) == 4
        assert min(*blocks.dense_ms(metric), *blocks.pruned_ms(metric)) > 0
        interval = blocks.ratio(0.5, metric)
        assert interval.low <= interval.value <= interval.high
    assert all(run.first_token_ms > run.prefill_ms for window in blocks.windows for run in window.pruned)
    assert 3 <= blocks.warmup.num_pairs <= 5
    assert blocks.key == device_key(model, inputs)


def test_graphs_are_measured_against_graphs(llava, inputs_for, monkeypatch):
    made, model, inputs = [], llava(), inputs_for(2, padding="left")

    def graphed(*args):
        made.append(GraphedPrefill(*args, capture=Tape))
        return made[-1]

    monkeypatch.setattr(latency, "GraphedPrefill", graphed)
    blocks = measure(model, inputs, PLAN, repeats=3, min_warmup=1, max_warmup=1, max_others=1.0, launch="graphs")
    assert blocks.launch == "graphs"
    dense, pruned = made
    assert (dense.num_graphs, pruned.num_graphs) == (1, 1)
    assert (dense.trace.counts, pruned.trace.counts) == ((25,) * 4, (25, 13, 13, 13))
    for metric in ("prefill", "first_token"):
        assert len(blocks.dense_ms(metric)) == len(blocks.pruned_ms(metric)) == 3
    assert all(run.first_token_ms > run.prefill_ms > 0 for window in blocks.windows for run in window.pruned)
    assert measure(model, inputs, PLAN, repeats=1, max_warmup=3, max_others=1.0).launch == "eager"
    assert len(made) == 2


def test_a_graph_is_never_measured_against_an_eager_launch(llava, inputs_for, monkeypatch):
    with pytest.raises(CaptureError, match=r"the dense one has no graph: only a CUDA device .* launch='eager'"):
        measure(llava(), inputs_for(), PLAN, launch="graphs")
    monkeypatch.setattr(latency, "GraphedPrefill", partial(GraphedPrefill, capture=Tape))
    conditional = Plan(stages=(Stage(layer=1, keep=0.0, attention_below=0.1),))
    with pytest.raises(CaptureError, match=r"the pruned one has no graph: the stage before layer 1 is conditional"):
        measure(llava(), inputs_for(), conditional, launch="graphs")


def test_windows_are_unbroken_and_long_enough_to_watch(llava, inputs_for, monkeypatch):
    monkeypatch.setattr(latency, "timed_run", clocked([0.05] * 100))
    blocks = measure(llava(), inputs_for(), PLAN, repeats=8, min_warmup=0, max_warmup=0, max_others=1.0)
    assert len(blocks.windows) >= 2
    assert sum(len(window.pruned) for window in blocks.windows) == 8
    for window in blocks.windows:
        assert len(window.dense) == len(window.pruned) + 1 >= 3
        assert window.state.others is not None
    assert blocks.windows[0].dense[-1] == blocks.windows[1].dense[0]
    assert blocks.warmup == WarmUp(num_pairs=0, settled=False, slope=0.0)


def clocked(seconds):
    """Stands for the model's runs: each takes what comes next."""
    durations = iter(seconds)

    def timed(model, inputs, plan, graph):
        lasting = next(durations)
        time.sleep(lasting)
        return Run(lasting * 1e3, lasting * 1e3)

    return timed


def test_blocks_pair_a_pruned_run_with_the_dense_run_after_it():
    def runs(*values):
        return tuple(Run(value, 2 * value) for value in values)

    windows = (
        Window(dense=runs(10.0, 20.0, 40.0), pruned=runs(15.0, 16.0), state=DeviceState()),
        Window(dense=runs(99.0, 30.0), pruned=runs(18.0), state=DeviceState()),  # 99: after a refused window
    )
    warmup = WarmUp(num_pairs=3, settled=True, slope=0.0)
    blocks = LatencyBlocks(key=None, warmup=warmup, windows=windows, refused=())
    assert blocks.dense_ms() == (20.0, 40.0, 30.0)
    assert blocks.pruned_ms("first_token") == (30.0, 32.0, 36.0)
    assert blocks.ratio().value == 16 / 30
    assert blocks.ratio(0.95).value == pytest.approx(17.8 / 39)
    assert blocks.repeated_ratio().value == blocks.ratio().value


@pytest.mark.parametrize(
    ("seconds", "num_pairs", "settled"),
    [
        ([0.002] * 40, 4, True),
        ([0.02 * 0.6 ** (i // 2) + 0.002 for i in range(40)], range(9, 20), True),  # slows down, then is flat
        ([0.0002 * 1.2 ** (i // 2) for i in range(40)], 12, False),  # slower and slower
    ],
)
def test_warm_up_ends_when_the_slope_is_flat(llava, inputs_for, monkeypatch, seconds, num_pairs, settled):
    monkeypatch.setattr(latency, "timed_run", clocked([*seconds[: 2 * 20], *[0.002] * 40]))
    limits = {"min_warmup": 4, "max_warmup": 12 if not settled else 20}
    blocks = measure(llava(), inputs_for(), PLAN, repeats=1, max_others=1.0, **limits)
    assert blocks.warmup.num_pairs in (num_pairs if isinstance(num_pairs, range) else [num_pairs])
    assert blocks.warmup.settled is settled
    assert (blocks.warmup.slope < latency.MAX_SLOPE) is settled


def test_illegal_numbers_are_refused(llava, inputs_for):
    for wrong in ({"repeats": 0}, {"min_warmup": 4, "max_warmup": 3}, {"min_warmup": -1}):
        with pytest.raises(PlanError, match="repeats must be at least 1 and 0 <= min_warmup <= max_warmup"):
            measure(llava(), inputs_for(), PLAN, **wrong)


# ------------------------------------------------------------------------------------------------- another process


def test_a_busy_process_is_seen_and_refused(llava, inputs_for, monkeypatch):
    monkeypatch.setattr(latency, "timed_run", clocked([0.02] * 200))
    with processes(BUSY, len(os.sched_getaffinity(0))):
        with pytest.raises(
            BusyDeviceError, match=r"2 windows were refused, the last because other processes used \d\d"
        ):
            measure(llava(), inputs_for(), PLAN, repeats=12, max_warmup=3, max_others=0.4, max_refused=1)
        blocks = measure(llava(), inputs_for(), PLAN, repeats=12, max_warmup=3, max_others=1.0)
    assert blocks.refused == ()
    assert all(window.state.others > 0.4 for window in blocks.windows)


def test_what_was_refused_is_run_again_once_the_device_is_free(llava, inputs_for, monkeypatch):
    shares = chain([0.02, 0.5, 0.3], repeat(0.0))
    watcher = SimpleNamespace(start=lambda: None, stop=lambda: DeviceState(others=next(shares)))
    monkeypatch.setattr(latency, "watch", lambda device: watcher)
    seconds = [0.05 + 0.0001 * run for run in range(100)]  # no two runs take the same
    monkeypatch.setattr(latency, "timed_run", clocked(seconds))
    blocks = measure(llava(), inputs_for(), PLAN, repeats=15, min_warmup=0, max_warmup=0)
    more = "of the cores, more than 10%"
    assert blocks.refused == (f"other processes used 50% {more}", f"other processes used 30% {more}")
    first, second, third, *_ = blocks.windows
    assert [window.state.others for window in (first, second, third)] == [0.02, 0.0, 0.0]
    assert second.dense[0] not in first.dense  # its neighbours ran right beside it
    assert third.dense[0] == second.dense[-1]
    assert len(set(blocks.pruned_ms())) == len(set(blocks.dense_ms())) == 15


def test_own_work_is_not_anothers():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        watcher = CpuWatch()
        watcher.start()
        start, own = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < 0.5:
            pass
        own_share = (time.process_time() - own) / (time.perf_counter() - start)
        assert watcher.stop().others == pytest.approx(1 - own_share, abs=0.08)
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_stretch_too_short_for_the_kernels_ticks_says_nothing_of_others():
    watcher = CpuWatch()
    watcher.start()
    state = watcher.stop()
    assert (state.others, state.steal) == (None, None)
    assert state.refusal(0.0) is None


def test_others_may_have_the_cores_that_threads_leave_free(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    assert [bearable_share(threads) for threads in (1, 2, 4, 16)] == pytest.approx([0.8, 0.6, 0.2, 0.2])


def test_the_state_of_a_cpu_is_read_from_proc_and_sys(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    ticks = "cpu  0\ncpu0 {0} 0 0 1000 0 0 0 {1} 0 0\ncpu1 0 0 0 {2} 10 0 0 0 0 0\ncpu2 9 9 9 9 9 9 9 9 9 9\n"
    files = {
        "proc/stat": ticks.format(100, 5, 1000),
        "proc/cpuinfo": "cpu MHz\t: 2000.0\ncpu MHz\t: 3000.0\ncpu MHz\t: 9000.0\n",
        "sys/class/thermal/thermal_zone0/temp": "41000\n",
        "sys/class/thermal/thermal_zone1/temp": "52500\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "7\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    watcher = CpuWatch(tmp_path / "proc", tmp_path / "sys")
    watcher.start()
    time.sleep(0.4)
    (tmp_path / "proc/stat").write_text(ticks.format(130, 15, 1020))
    (tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count").write_text("8\n")
    state = watcher.stop()
    assert (state.clock_mhz, state.temperature_c, state.throttled) == (2500.0, 52.5, ("hardware thermal",))
    assert state.steal == pytest.approx(0.1 / 0.8, rel=0.1)
    assert state.others == pytest.approx((0.8 - 0.2) / 0.8, rel=0.1)
    nothing = CpuWatch(tmp_path / "none", tmp_path / "none")
    nothing.start()
    assert nothing.stop() == DeviceState()


# ------------------------------------------------------------------------------------------------------------- GPU


class Nvml:
    """NVML's functions that are asked for, as a driver with these processes answers."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, listed, used=None):
        self.listed, self.used = listed, used

    def nvmlDeviceGetHandleByUUID(self, name):
        if name != "GPU-1234":
            raise self.NVMLError
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return 1980

    def nvmlDeviceGetTemperature(self, handle, kind):
        raise self.NVMLError  # not supported

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0x01 | 0x04 | 0x40

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in self.listed]

    def nvmlDeviceGetProcessUtilization(self, handle, since_us):
        if self.used is None:
            raise self.NVMLError  # no samples
        return [SimpleNamespace(pid=pid, smUtil=share) for pid, share in self.used.items()]


OWN, PARENT, FOREIGN, FOREIGN_TOO = os.getpid(), os.getppid(), 2**22 + 1, 2**22 + 2


@pytest.mark.parametrize(
    ("listed", "used", "others"),
    [
        ([], None, ()),
        ([OWN], {OWN: 90}, ()),
        ([OWN, PARENT], {OWN: 90, PARENT: 0}, ()),  # its model is there, and rests
        ([OWN, PARENT], {OWN: 90, PARENT: 3}, (PARENT,)),
        ([OWN, PARENT], None, (PARENT,)),  # no samples: what may compute counts
        ([FOREIGN], {FOREIGN: 90}, ()),  # ours, by its number outside this container
        ([FOREIGN, FOREIGN_TOO], {FOREIGN: 20, FOREIGN_TOO: 70}, (FOREIGN,)),
        ([FOREIGN, FOREIGN_TOO], {FOREIGN: 0, FOREIGN_TOO: 70}, ()),
        ([OWN, FOREIGN], {OWN: 50, FOREIGN: 50}, (FOREIGN,)),
    ],
)
def test_other_processes_on_a_gpu_are_told_from_ours(listed, used, others):
    watcher = GpuWatch("1234", Nvml(listed, used))
    watcher.start()
    state = watcher.stop()
    assert state.other_pids == others
    assert (state.refusal(1.0) is None) == (not others)
    assert (state.clock_mhz, state.temperature_c) == (1980, None)
    assert state.throttled == ("power cap", "hardware thermal")


def test_a_gpu_that_nvml_does_not_know_has_no_figures():
    watcher = GpuWatch("5678", Nvml([OWN]))
    watcher.start()
    assert watcher.stop() == DeviceState()


@pytest.mark.gpu
def test_a_real_gpu_is_watched_and_named():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    device = torch.device("cuda:0")
    watcher = watch(device)
    watcher.start()
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(50):
        matrix = (matrix @ matrix).clamp(-1, 1)
    torch.cuda.synchronize()
    state = watcher.stop()
    assert state.clock_mhz > 0
    assert state.other_pids == ()
    assert lock_name(device).startswith("gpu-")


# ------------------------------------------------------------------------------------------------------------- lock

HOLD = """
import sys, time, torch
from btp.device_lock import device_lock
with device_lock(torch.device("cpu"), 20.0):
    print("held", flush=True)
    time.sleep({seconds})
"""


def test_a_second_process_is_told_who_holds_the_device(llava, inputs_for):
    with processes(HOLD.format(seconds=60)) as (holder,):
        with pytest.raises(BusyDeviceError, match=f"process {holder.pid} has held cpu-.* for the 0.2 s waited"):
            measure(llava(), inputs_for(), PLAN, repeats=1, lock_timeout_s=0.2)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with device_lock(CPU, 5.0):  # it falls with the process
            pass


def test_a_second_process_waits_its_turn():
    with processes(HOLD.format(seconds=0.6)) as (holder,):
        start = time.monotonic()
        with device_lock(CPU, 20.0):
            assert time.monotonic() - start > 0.2
        assert holder.wait() == 0


COMPUTE = HOLD.replace("import device_lock", "import computing").replace("with device_lock", "with computing")


def test_who_measures_waits_for_those_who_compute_and_they_do_not_begin_meanwhile():
    with processes(COMPUTE.format(seconds=2.0), 2) as both:
        with device_lock(CPU, 20.0):
            assert [each.wait(timeout=5) for each in both] == [0, 0]
            code = COMPUTE.format(seconds=0).replace("20.0", "0.2")
            third = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "BusyDeviceError" in third.stderr


def test_computing_is_shared_and_gives_up_in_time():
    with processes(COMPUTE.format(seconds=60)) as (other,):
        inside = pytest.raises(RuntimeError, match=r"outside of `computing`")
        with computing(CPU, 0.5), computing(CPU, 0.5), inside, device_lock(CPU, 0.5):
            pass
        with pytest.raises(BusyDeviceError, match="waits until nobody else computes"), device_lock(CPU, 0.3):
            pass
        other.kill()
        other.wait()
        with device_lock(CPU, 5.0), computing(CPU, 0.1):  # who measures may compute
            pass


def test_the_holder_may_measure_again(llava, inputs_for):
    with device_lock(CPU, 1.0):
        measure(llava(), inputs_for(), PLAN, repeats=1, max_warmup=3, max_others=1.0, lock_timeout_s=0.2)
        code = "import torch; from btp.device_lock import device_lock\nwith device_lock(torch.device('cpu'), 0.1): pass"
        still = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"BusyDeviceError: one process at a time may measure on a device, but process {OWN}" in still.stderr


# ------------------------------------------------------------------------------------------------------- statistics


def test_percentiles_interpolate():
    assert percentile((3.0, 1.0, 2.0), 50) == 2.0
    assert percentile((1.0, 2.0), 95) == pytest.approx(1.95)
    assert percentile((7.0,), 95) == 7.0


def test_one_wild_run_does_not_bend_the_slope():
    values = [10 + 0.5 * i for i in range(8)]
    assert theil_sen_slope(values) == pytest.approx(0.5)
    values[3] = 1000.0
    assert theil_sen_slope(values) == pytest.approx(0.5, abs=0.1)
    assert theil_sen_slope([7.0]) == 0.0


@pytest.mark.parametrize(("num_pairs", "length"), [(1, 1), (2, 2), (8, 2), (9, 3), (27, 3), (28, 4), (1000, 10)])
def test_stretches_grow_with_the_cube_root(num_pairs, length):
    assert stretch_length(num_pairs) == length


def slowed(draw, num, ratio=0.6):
    """Pairs on a machine that is now and then slower for a while, and more so for the pruned run."""
    dense, pruned, slow = [], [], 0.0
    for _ in range(num):
        slow = 0.4 * slow + 0.03 * draw.gauss(0, 1)
        dense.append(30 * math.exp(slow + 0.01 * draw.gauss(0, 1)))
        pruned.append(30 * ratio * math.exp(2 * slow + 0.01 * draw.gauss(0, 1)))
    return dense, pruned


@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_the_interval_is_that_of_a_naive_circular_block_bootstrap(quantile):
    dense, pruned = slowed(random.Random(1), 40)
    draw, ratios = random.Random(2), []
    for _ in range(4000):
        places = []
        while len(places) < 40:
            start = draw.randrange(40)
            places += [(start + step) % 40 for step in range(4)]
        tops = [pruned[place] for place in places[:40]]
        bottoms = [dense[place] for place in places[:40]]
        ratios.append(percentile(tops, 100 * quantile) / percentile(bottoms, 100 * quantile))
    found = ratio_interval(dense, pruned, quantile, 0.9)
    assert found.value == percentile(pruned, 100 * quantile) / percentile(dense, 100 * quantile)
    assert found.low == pytest.approx(percentile(ratios, 5), rel=0.01)
    assert found.high == pytest.approx(percentile(ratios, 95), rel=0.01)
    assert found == ratio_interval(dense, pruned, quantile, 0.9)


def test_the_interval_holds_the_devices_own_ratio_most_of_the_time():
    draw, covered = random.Random(3), 0
    for _ in range(100):
        interval = ratio_interval(*slowed(draw, 60))
        covered += interval.low <= 0.6 <= interval.high
    assert covered >= 83


def test_a_repetition_lands_inside_nine_times_of_ten():
    draw, inside = random.Random(4), {ratio_interval: 0, repetition_interval: 0}
    for _ in range(150):
        first, again = slowed(draw, 60), slowed(draw, 60)
        value = ratio_interval(*again).value
        for interval_of in inside:
            interval = interval_of(*first)
            inside[interval_of] += interval.low <= value <= interval.high
    assert inside[repetition_interval] >= 0.88 * 150
    assert inside[ratio_interval] < inside[repetition_interval]


def test_intervals_refuse_what_is_no_measurement():
    for dense, pruned in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(PlanError, match="must come in pairs"):
            ratio_interval(dense, pruned)
    for numbers in ((95, 0.9), (0.5, 1.0)):
        with pytest.raises(PlanError, match=r"must be in \(0, 1\), got"):
            ratio_interval([1.0], [1.0], *numbers)


# -------------------------------------------------------------------------------------------------------- device key


def test_the_device_key_names_the_workload(llava, inputs_for):
    inputs = inputs_for(2)
    key = device_key(llava("eager"), inputs)
    assert (key.attention, key.dtype, key.batch_size, key.image_tokens) == ("eager", "float32", 2, 25)
    assert key.prompt_tokens == inputs["input_ids"].shape[1]
    assert key.torch == str(torch.__version__)
    assert (key.cuda, key.driver) == ("none", "none")
    assert key.slug != "unknown-device"
