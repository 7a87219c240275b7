"""`darkroom demo`: train ESPCN x3 on photographs in two minutes and compare it with bicubic in a table and an image."""

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from callbacks.metrics.psnr_ssim import protocols, psnr_y
from datamodules.io.image_io import read_image
from datamodules.io.image_refs import ImageRef, list_image_refs
from datamodules.io.user_images import merge_channels
from datamodules.superresolution_datasets import SREvalImages
from datamodules.transforms.color import rgb_to_ycbcr
from datamodules.transforms.resize import imresize
from experiments.run.execute import execute
from experiments.run.recipes import find_recipe
from experiments.run.run_dir import program_name
from modules.bicubic import Bicubic
from modules.tasks.superresolution import SuperResolutionMethod

TEST = "photographs/test"
# Detail of each test photograph that is shown enlarged: left, top, side length in pixels of the original.
DETAILS = {"astronaut": (168, 60, 108), "chelsea": (120, 75, 108), "china": (150, 60, 108)}


def demo() -> None:
    """Train ESPCN x3 on the embedded photographs, evaluate it and bicubic on three others, and save a comparison image."""
    cli = execute("fit", find_recipe("espcn/demo"), ["--trainer.devices", "1"])
    network = cli.model.cpu().eval()
    scale = network.scale
    metrics = {"bicubic": evaluate(Bicubic(scale), scale), "ESPCN": evaluate(network, scale)}
    table = Table("", *metrics["ESPCN"], title=f"{TEST}, x{scale}", title_justify="left")
    for name, row in metrics.items():
        table.add_row(
            name, *(f"{value:.4f}" if protocol.startswith("ssim") else f"{value:.2f} dB" for protocol, value in row.items())
        )
    console = Console()
    console.print(table)
    path = cli.run.folder / "comparison.png"
    comparison(network, list_image_refs(TEST)).save(path)
    console.print(f"image     {path}  (input, bicubic, ESPCN, original)", soft_wrap=True)
    console.print(f"run       {cli.run.folder}  (configuration, metrics, samples, weights, record)", soft_wrap=True)
    command = program_name()
    console.print(f"next      {command} predict espcn --input YOUR_PHOTO.jpg --output out/", soft_wrap=True)
    console.print(f"          {command} reproduce espcn      the paper's tables with our values", soft_wrap=True)
    console.print(f"          {command} list                 all methods", soft_wrap=True)


def evaluate(method: SuperResolutionMethod, scale: int) -> dict[str, float]:
    """Compute the mean of each protocol over the test photographs."""
    images = SREvalImages(list_image_refs(TEST), scale)
    means = {}
    for name, protocol in protocols(scale).items():
        values = []
        for batch in (images[i] for i in range(len(images))):
            with torch.no_grad():
                values.append(protocol(method(batch["input"]), batch["target"]).item())
        means[name] = sum(values) / len(values)
    return means


def comparison(network: SuperResolutionMethod, images: list[ImageRef]) -> Image.Image:
    """Draw one row per photograph: the photograph with a marked detail, then the detail in the input, outputs and original."""
    rows = [_row(network, image) for image in images]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(other.height for other in rows[:i])))
    return sheet


def _row(network: SuperResolutionMethod, image: ImageRef) -> Image.Image:
    scale, zoom, gap, caption = network.scale, 3, 8, 24
    pixels = read_image(image.path)
    height, width = (length - length % scale for length in pixels.shape[-2:])
    original = pixels[:, :height, :width].float() / 255
    low = imresize(original, (height // scale, width // scale)).clamp(0, 1)
    luma, chroma = rgb_to_ycbcr(low).split([1, 2])
    empty = torch.empty(0)
    with torch.no_grad():
        enlarged = {
            "bicubic": merge_channels(Bicubic(scale)(luma[None])[0], chroma, empty),
            "ESPCN": merge_channels(network(luma[None])[0], chroma, empty),
        }
    batch = SREvalImages([image], scale)[0]
    with torch.no_grad():
        psnr = {
            name: psnr_y(method(batch["input"]), batch["target"], scale).item()
            for name, method in (("bicubic", Bicubic(scale)), ("ESPCN", network))
        }
    full = _to_pil(original)
    views = {
        "input": _to_pil(low).resize(full.size, Image.Resampling.NEAREST),
        **enlarged,
        "original": full,
    }
    left, top, side = DETAILS[image.name]
    box = (left, top, left + side, top + side)
    tile = side * zoom
    thumbnail = full.copy()
    ImageDraw.Draw(thumbnail).rectangle(box, outline="red", width=3)
    thumbnail.thumbnail((10_000, tile))
    thumbnail = thumbnail.crop((0, 0, min(thumbnail.width, tile * 4 // 3), thumbnail.height))
    row = Image.new("RGB", (tile * 4 // 3 + 4 * (tile + gap), tile + caption + gap), "white")
    row.paste(thumbnail, (0, caption))
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(size=16)
    draw.text((2, 2), image.name, "black", font)
    for i, (name, view) in enumerate(views.items()):
        x = tile * 4 // 3 + gap + i * (tile + gap)
        row.paste(view.crop(box).resize((tile, tile), Image.Resampling.NEAREST), (x, caption))
        text = f"{name}  {psnr[name]:.2f} dB" if name in psnr else name
        draw.text((x + 2, 2), text, "black", font)
    return row


def _to_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy())
