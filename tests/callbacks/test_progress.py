"""The progress bar is legible in 80 columns."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from callbacks.run.progress import BAR_WIDTH, ProgressBar


@pytest.mark.parametrize("total", [800, 1_200_000])
def test_bar_and_metric_fit_into_80_columns(total):
    bar = ProgressBar("photographs-val/psnr-y/crop3")
    bar.console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    trainer = SimpleNamespace(is_global_zero=True, callback_metrics={"photographs-val/psnr-y/crop3": 28.1234})
    module = SimpleNamespace(total_images=total, images_seen=0)
    bar.on_train_start(trainer, module)
    module.images_seen = total // 2
    bar.on_train_end(trainer, module)
    last = bar.console.file.getvalue().rpartition("\x1b[2K")[2].partition("\n")[0]
    assert last.count("━") == BAR_WIDTH // 2
    assert f"{total // 2:,} of {total:,} images" in last
    assert "psnr-y/crop3 28.123" in last
