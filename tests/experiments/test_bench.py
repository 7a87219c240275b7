import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from datamodules import base
from experiments.bench import timing
from experiments.bench.bench import plan_intervals, profile_steps
from experiments.bench.feed import FEED_RECIPES, images_per_second
from experiments.bench.held_batch import HeldBatch
from experiments.bench.step_profile import STEP, covered_us, summarize
from experiments.bench.timing import count_flops, matmul_gflops, median_seconds
from experiments.cli.main import main
from experiments.run.lightning_cli import build_cli
from experiments.run.recipes import find_recipe
from experiments.tasks.registry import task_of
from tests.helpers.subprocess_helpers import forked

CPU = torch.device("cpu")


def test_operations_of_a_convolution_are_counted():
    """Forward, gradient of the weight and gradient of the input: 2 x 4 x 5 x 3 x 3 operations for each of 2 x 6 x 6 outputs."""
    layer, image = nn.Conv2d(4, 5, 3), torch.rand(2, 4, 8, 8)
    forward = 2 * 4 * 5 * 9 * 2 * 36
    assert count_flops(lambda: layer(image)) == forward
    assert count_flops(lambda: layer(image).sum().backward()) == 2 * forward
    image.requires_grad = True
    assert count_flops(lambda: layer(image).sum().backward()) == 3 * forward


def test_peak_is_measured_in_the_precision_of_the_run():
    seen = []

    def precision():
        seen.append("bf16")
        return torch.autocast("cpu", torch.bfloat16)

    assert matmul_gflops(CPU, precision) > 0
    assert seen == ["bf16"]


def test_profile_counts_operators_and_reads_of_values():
    x = torch.arange(6.0)

    def step():
        time.sleep(0.02)
        y = x + 1
        y.sum().item()
        y.prod().item()
        y[y > 3]  # nonzero

    found = profile_steps(step, 3, CPU)
    # add; sum, item; prod, item; gt, index
    assert (found.operators, found.waits) == (7, 3)
    assert (found.kernels, found.copies) == (None, None)
    assert found.launch_ms >= 20
    assert 0 < found.busy_ms <= found.wall_ms - 20
    assert found.busy_share(step_ms=1.0) == found.busy_ms / found.wall_ms


def test_duration_includes_the_work_that_is_queued(monkeypatch):
    """Here, a list is the queue of a device, and waiting for the device works it off."""
    queue = []
    monkeypatch.setattr(timing, "synchronize", lambda device: [queue.pop()() for _ in range(len(queue))])
    assert median_seconds(lambda: queue.append(lambda: time.sleep(0.02)), CPU) >= 0.02


def infer_on_meta(name):
    cli = build_cli("fit", find_recipe(name), ["--trainer.accelerator", "cpu"])
    cli.datamodule.setup("fit")
    speeds = task_of(cli.datamodule).bench_inference(cli.model.to("meta").eval(), cli.datamodule)
    assert speeds
    assert all(value > 0 for value in speeds.values() if isinstance(value, float))


# Not on "meta": bicubic matrices, which need its autocast; detections; the fused optimizer in CycleGAN's comparison.
NOT_ON_META = {"espcn/demo", "mask_rcnn/demo", "cyclegan/demo"}


@pytest.mark.parametrize("name", sorted({*FEED_RECIPES} - NOT_ON_META))
def test_inference_is_timed_on_the_device_of_the_method(workdir, name):
    """Torch refuses operators whose tensors are on "meta" and on the CPU."""
    assert forked(infer_on_meta, name) == 0


def event(name, start, end, device=DeviceType.CPU, scope=0, is_annotation=False):
    interval = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=interval, device_type=device, scope=scope, cpu_parent=None, is_user_annotation=is_annotation
    )


def test_profile_of_a_gpu_is_summarized():
    """Two steps of 1 ms on the host; the events have the names of CUDA's profiler."""
    gpu = DeviceType.CUDA
    events = [
        *(event(STEP, start, start + 1000, scope=7, is_annotation=True) for start in (0, 1000)),
        event(STEP, 100, 2500, gpu, is_annotation=True),  # the mark on the GPU
        event("cudaMemcpyAsync", 100, 110),
        event("Memcpy HtoD (Pinned -> Device)", 120, 150, gpu),
        event("aten::add", 290, 320),
        event("cudaLaunchKernel", 300, 310),
        event("cudaLaunchKernelExC", 400, 410),
        event("void add_kernel", 500, 900, gpu),
        event("void mul_kernel", 700, 1300, gpu),  # on another stream
        event("cudaLaunchKernel", 1100, 1110),
        event("gemm", 1500, 1700, gpu),
        event("Memcpy DtoH (Device -> Pageable)", 1800, 1900, gpu),
        event("cudaStreamSynchronize", 1750, 1950),
    ]
    found = summarize(events, "cuda")
    assert found.busy_ms == pytest.approx((800 + 200) / 2 / 1000)
    assert found.launch_ms == pytest.approx((300 + 100) / 2 / 1000)
    assert (found.operators, found.kernels, found.copies, found.waits) == (0.5, 1.5, 0.5, 0.5)
    assert found.busy_share(step_ms=2.0) == pytest.approx(0.25)  # the profiler does not slow kernels down
    unknown = summarize([item for item in events if item.device_type == DeviceType.CPU and "cuda" not in item.name], "mps")
    assert (unknown.busy_ms, unknown.launch_ms, unknown.busy_share(1.0)) == (None, None, None)


def test_overlapping_ranges_count_once():
    ranges = [SimpleNamespace(start=start, end=end) for start, end in ((5, 9), (0, 4), (3, 6), (7, 8), (20, 21))]
    assert covered_us(ranges) == 10


def test_rate_of_a_loader_that_sleeps():
    def loader():
        while True:
            time.sleep(0.01)
            loader.images += 5
            yield {"image": torch.zeros(5)}

    loader.images = 0
    started = time.perf_counter()
    rate = images_per_second(loader(), 0.1)
    assert loader.images / (time.perf_counter() - started) <= rate <= 5 / 0.01
    assert loader.images >= 5


def test_one_batch_is_held_on_request():
    class Data:
        def train_dataloader(self):
            return iter({"image": torch.full((2,), float(i))} for i in range(100))

        def on_after_batch_transfer(self, batch, index):
            return {"image": batch["image"] / 2}

    data = Data()
    held = HeldBatch(data)
    batches = iter(data.train_dataloader())
    seen = []
    for held.is_held in (False, False, True, True, False):
        prepared = data.on_after_batch_transfer(next(batches), 0)
        held.batch = held.batch or prepared
        seen.append(prepared["image"][0].item())
    assert seen == [0, 0.5, 0, 0, 1]
    assert next(held.original().train_dataloader())["image"].tolist() == [0, 0]


def test_intervals_of_both_kinds_are_planned():
    intervals = plan_intervals(13)
    assert (intervals[0], intervals[-1]) == ("warm-up", "profile")
    assert [intervals.count(kind) for kind in ("real", "held", "profile")] == [13, 2, 1]


FIELDS = ["step_ms", "busy_share", "launch_ms", "operators", "images_per_second", "images_per_second_held", "share_of_peak"]


def test_bench_passes_keys_and_names_what_a_cpu_does_not_have(workdir, capfd):
    options = ["--pairs", "6", "--steps", "2", "--trainer.accelerator", "cpu"]
    assert forked(main, ["bench", "gan/demo", *options, "--json", "--trainer.precision", "bf16-mixed"]) == 0
    results = json.loads(capfd.readouterr().out)
    assert (results["precision"], results["device"]) == ("bf16-mixed", "cpu")
    assert results["inference_device"] == "cpu"
    for field in FIELDS:
        assert results[field] > 0
        assert results[f"{field}_bare"] > 0
    assert results["busy_share"] < 1
    assert results["copies"] is results["kernels"] is None
    assert results["peak_memory_mib"] > 0
    assert forked(main, ["bench", "vae/demo", *options]) == 0
    output = capfd.readouterr().out
    (row,) = [line for line in output.splitlines() if "inference_device" in line]
    assert row.replace("│", " ").split() == ["inference_device", "cpu"]
    assert max(map(len, output.splitlines())) <= 80
    (row,) = [line for line in output.splitlines() if "copies to the device" in line]
    assert row.replace("│", " ").split()[-3:] == ["-", "-", "-"]


@pytest.mark.slow
def test_bench_of_compiled_networks(workdir, capfd):
    options = ["--pairs", "6", "--steps", "2", "--json", "--compile"]
    operators = []
    for compiled in ("false", "true"):
        assert forked(main, ["bench", "vae/demo", *options, compiled]) == 0
        results = json.loads(capfd.readouterr().out)
        operators.append(results["operators"])
        assert results["gflop_per_step"] == pytest.approx(results["gflops"] * results["step_ms"] / 1000)
    assert operators[1] < operators[0]


def bench_stored_data(argv):
    base.fits = lambda n_bytes, device: True
    return main(argv)


def test_bench_of_data_on_the_device(workdir, capfd):
    """Here on the CPU; on a GPU, data that fit lie in its memory."""
    assert forked(bench_stored_data, ["bench", "gan/demo", "--pairs", "6", "--steps", "2", "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    assert min(results[f"images_per_second{kind}"] for kind in ("", "_bare", "_held", "_held_bare")) > 0


def test_feed_of_several_recipes(workdir, capfd):
    assert forked(main, ["bench", "--feed", "gan/demo", "vae/demo", "--pairs", "6", "--json", "--data.batch_size", "50"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [(row["recipe"], row["datamodule"], row["batch_size"]) for row in rows] == [
        ("gan/demo", "Generation", 50),
        ("vae/demo", "Reconstruction", 50),
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert min(row["images_per_second"], row["images_per_second_pil"]) > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--feed", "gan/xy"], "there is no baseline for DummyBatches"),
        (["bench", "gan/demo", "vae/demo"], "2 recipes. Give one"),
        (["bench", "--feed", "gan/demo", "--pairs", "2"], "--pairs must be from 6"),
    ],
)
def test_wrong_arguments_are_named(argv, message, workdir, capfd):
    assert forked(main, argv) == 2
    assert message in capfd.readouterr().err
