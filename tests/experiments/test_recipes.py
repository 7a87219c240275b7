"""Every recipe of the project is parsed, built and trained for a few steps, on small images in the layout of its dataset."""

import re
import shutil

import pytest
import torch
from PIL import Image

from datamodules.catalog.masked_images import list_masked_images
from experiments.cli.errors import parameters
from experiments.cli.main import main
from experiments.results.tables import load_table
from experiments.run.config_checks import check_sources
from experiments.run.lightning_cli import ParseOnlyCLI
from experiments.run.recipes import methods, recipes
from modules.networks.feature_extractors import Inception
from modules.networks.vgg import URLS, FeatureNetwork
from modules.style_transfer import VGG16_STYLE_LAYERS
from tests.helpers.fake_datasets import accept_what_is_laid_out, lay_out
from tests.helpers.recipe_results import assert_losses_are_documented, assert_results_are_recorded
from tests.helpers.subprocess_helpers import forked
from tests.helpers.tiny_recipes import inception_weights

ALL = recipes()
TRAINED = [recipe for recipe in ALL if "total_images" in parameters(recipe.class_path("model"))]
# Recipes that differ from another one by the dataset, the painting, the scale, a size, or a row of a table. Their tests are slow.
VARIANTS = re.compile(
    "autoencoder/exclude_[1-9]|"
    "colorization/((.*_)?(class|l2)|.*_finetuned|photographs.*|stl10|released_code|cifar10|cifar10_jpeg_full|coco|places)|"
    "colorization/.*probe_random|"
    "cyclegan/(camvid_gan_backward|faces|maps|monet2photo)|"
    "dcgan/(celeba|cifar10|imagenet|svhn)|"
    "espcn/(t91_x2|t91_x4|imagenet_x3_relu|imagenet_x4)|"
    "perceptual_sr/(x4_pixel|x8_feature|paper_x4_.*|paper_x8_pixel)|"
    "progan/(lsun_.*|celeba_[bcdefh].*|cifar10|cifar10_jpeg_[bcdef].*|celebahq_tensorflow|faces)|"
    "srcnn/t91_x4|"
    "style/(wave|composition_vii|the_scream|starry_night)|"
    "unet/phc_u373|"
    "vae/(figure2_(5|10|20|200)|.*_200_epochs|omniglot_vae|two_layers_vae)"
)


def datamodule_of(recipe):
    return recipe.class_path("data").rpartition(".")[2]


def name_of(recipe):
    return recipe.name


def trained_on(datamodule, method=""):
    """Return the recipes of a datamodule that are trained, and the names of their tests."""
    return [
        pytest.param(recipe, marks=pytest.mark.slow if VARIANTS.fullmatch(recipe.name) else [], id=recipe.name)
        for recipe in TRAINED
        if datamodule_of(recipe) == datamodule and recipe.name.startswith(method)
    ]


@pytest.mark.parametrize("recipe", ALL, ids=name_of)
def test_header_states_cell_value_time_and_command(recipe):
    header = recipe.header
    assert len(header) >= 4
    for prefix in ("Expected: ", "Time: ", "Command: darkroom "):
        assert sum(line.startswith(prefix) for line in header) == 1, prefix
    assert any(line.startswith("Command:") and recipe.name in line for line in header)


def build(recipes):
    for recipe in recipes:
        print(recipe.name)
        is_toy = recipe.class_path("data").startswith("datamodules.toys.")
        device = "cpu" if is_toy else "meta"  # points are computed when they are built
        cli = ParseOnlyCLI("fit", recipe, [])
        with torch.device(device):
            model = cli.parser.instantiate_classes(cli.config)["model"]  # and the data and the callbacks
        if recipe.name != "unet/folder":  # its folders are the user's
            check_sources(cli.config.data.init_args, elsewhere=True)
        assert type(model).__name__ in recipe.content["model"]["class_path"]
        assert all(parameter.device.type == device for parameter in model.parameters())


def accepted(recipe, overrides):
    """Drop the overrides of model keys that the method does not have."""
    known = parameters(recipe.class_path("model"))
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    kept = [pair for pair in pairs if not pair[0].startswith("--model.") or pair[0].removeprefix("--model.") in known]
    return [word for pair in kept for word in pair]


@pytest.mark.parametrize("method", sorted({recipe.name.partition("/")[0] for recipe in ALL}))
def test_recipes_are_built_at_full_size(method, workdir):
    assert forked(build, [recipe for recipe in ALL if recipe.name.startswith(f"{method}/")]) == 0


LUMA_SR = [*trained_on("SuperResolution", "espcn/"), *trained_on("SuperResolution", "srcnn/")]


@pytest.mark.parametrize("recipe", LUMA_SR)
def test_super_resolution_recipe_trains_a_few_steps(recipe, workdir):
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], *data.get("test", [])}:
        lay_out(name)
    batch = min(data.get("batch_size", 16), 4)
    overrides = ["--model.total_images", str(3 * batch), "--data.batch_size", str(batch), "--val_every_images", str(2 * batch)]
    if data.get("num_workers"):
        overrides += ["--data.num_workers", "1", "--data.val_every_nth", "3"]
    if data["train"] == "photographs/train":
        overrides += ["--data.val", "photographs/test", "--data.train", "photographs/val"]
    elif not data.get("num_workers"):
        overrides += ["--data.val_every_nth", "3"]
    monitor = "photographs-test" if data["train"] == "photographs/train" else f"{data['train']}-holdout"
    overrides += ["--monitor", f"{monitor}/psnr-y/crop{data['scale']}"]
    assert forked(main, ["fit", recipe.name, "--run", "short", *accepted(recipe, overrides)]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert (folder / "record.json").exists()
    assert_losses_are_documented(recipe, folder)


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory):
    """Return a torch cache folder with random weights of Inception and VGG-16."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub/checkpoints").mkdir(parents=True)
    vgg16 = FeatureNetwork("vgg16", VGG16_STYLE_LAYERS)
    torch.save(vgg16.state_dict(), home / "hub/checkpoints" / str(URLS["vgg16"]).rpartition("/")[2])
    torch.save(inception_weights(), home / "hub/checkpoints" / Inception.url.rpartition("/")[2])
    return home


def refuse_download(url, *args, **kwargs):
    raise OSError(f"no connection to {url}")


def main_with_fake_datasets(argv):
    """Run a command with the files of `lay_out`, and without a network."""
    with pytest.MonkeyPatch.context() as patch:
        accept_what_is_laid_out(patch)
        patch.setattr(torch.hub, "download_url_to_file", refuse_download)
        return main(argv)


@pytest.mark.parametrize("recipe", trained_on("SuperResolution", "perceptual_sr/"))
def test_perceptual_super_resolution_recipe_trains_a_few_steps(recipe, workdir, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    data, model = (recipe.content[section]["init_args"] for section in ("data", "model"))
    for name in {data["train"], *data["test"]}:
        lay_out(name)
    link_feature_weights(model, workdir, torch_home)
    overrides = ["--model.total_images", "4", "--data.batch_size", "2", "--val_every_images", "2", "--model.base_channels", "2"]
    overrides += ["--data.patch_size", "8", "--trainer.precision", "32-true"]
    overrides += ["--model.pixel_images", "2"] if "pixel_images" in model else []
    overrides += ["--data.num_workers", "1"] if data.get("num_workers") else []
    assert forked(main_with_fake_datasets, ["fit", recipe.name, "--run", "short", *overrides]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert_results_are_recorded(folder)
    assert_losses_are_documented(recipe, folder)


def link_feature_weights(model, workdir, torch_home):
    """Link the random weights of VGG-16 to the file that a recipe names."""
    if weights := model.get("feature_weights"):
        (workdir / "data" / weights).parent.mkdir(parents=True)
        (workdir / "data" / weights).symlink_to(torch_home / "hub/checkpoints" / str(URLS["vgg16"]).rpartition("/")[2])


@pytest.mark.parametrize("recipe", trained_on("Generation"))
def test_generation_recipe_trains_a_few_steps(recipe, workdir, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    monkeypatch.setenv("DARKROOM_CACHE", str(workdir / "cache"))
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], *data.get("test", [])}:
        lay_out(name)
    overrides = ["--model.total_images", "12", "--data.batch_size", "4", "--val_every_images", "8", "--data.val_samples", "10"]
    if data.get("test", [""])[0].startswith("mnist"):
        overrides += ["--data.test_samples", "60"]
        if "LinearProbe" in recipe.path.read_text():  # the last callback
            overrides += ["--trainer.callbacks.init_args.repeats", "1", "--trainer.callbacks.init_args.per_class", "10"]
    else:
        overrides += ["--data.test", "[]"]  # metrics of a random Inception are slow and meaningless
    if data.get("num_workers"):
        overrides += ["--data.num_workers", "1"]
    if "DCGAN" in recipe.class_path("model"):
        overrides += ["--model.base_channels", "8"]
    if "ProGAN" in recipe.class_path("model"):
        overrides += ["--model.base_channels", "64", "--model.max_channels", "4", "--model.batch_sizes", "{}"]
        overrides += ["--model.learning_rates", "{}", "--model.stable_images", "1", "--model.fade_images", "1"]
        size = str(min(data["size"], 32))  # the images in place of the datasets have 64 pixels
        overrides += ["--data.crop", size, "--data.crop_center", "[32, 32]"] if data.get("crop") else []
        overrides += ["--model.size", size, "--data.size", size]
    assert forked(main_with_fake_datasets, ["fit", recipe.name, "--run", "short", *accepted(recipe, overrides)]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert (folder / "record.json").exists()
    assert {path.name for path in (folder / "samples").iterdir()} == {"reals.png", "000000008.png", "000000012.png"}
    assert_losses_are_documented(recipe, folder)


@pytest.mark.parametrize("recipe", trained_on("Reconstruction"))
def test_reconstruction_recipe_trains_a_few_steps(recipe, workdir):
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], data.get("val", data["train"]), *data.get("test", [])}:
        lay_out(name)
    overrides = ["--model.total_images", "8", "--data.batch_size", "4", "--val_every_images", "4"]
    if "Likelihood" in recipe.path.read_text():
        overrides += ["--trainer.callbacks.init_args.n_samples", "2"]
    assert forked(main, ["fit", recipe.name, "--run", "short", *accepted(recipe, overrides)]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert_results_are_recorded(folder)
    assert {path.name for path in (folder / "samples").iterdir()} == {"reals.png", "000000004.png", "000000008.png"}
    assert_losses_are_documented(recipe, folder)


def write_coins(folder):
    """Write crops of the embedded image of coins to `images`, and their masks to `masks`."""
    pixels, mask = list_masked_images("coins/train")[0].read(1)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(5):
        rows = slice(40 * i, 40 * i + 120)
        Image.fromarray(pixels[0, rows].numpy()).save(folder / f"images/{i}.png")
        Image.fromarray((mask[rows] > 0).astype("uint8")).save(folder / f"masks/{i}.png")


@pytest.mark.parametrize("recipe", trained_on("Segmentation"))
def test_segmentation_recipe_trains_a_few_steps(recipe, workdir):
    data, model = (recipe.content[section]["init_args"] for section in ("data", "model"))
    if data["train"]:
        for name in {data["train"], data.get("val", data["train"]), *data.get("test", [])}:
            lay_out(name)
    else:
        write_coins(workdir)
    batch = 2 if data.get("batch_size") else 1
    overrides = ["--model.total_images", str(2 * batch), "--val_every_images", str(batch)]
    overrides += ["--trainer.limit_val_batches", "3", "--trainer.limit_test_batches", "3"]
    if batch > 1:
        overrides += ["--data.batch_size", "2"]
    if data.get("num_workers"):
        overrides += ["--data.num_workers", "1"]
    if "UNet" in recipe.class_path("model"):
        crop = 4 + 2 ** model.get("depth", 4)
        overrides += ["--model.base_channels", "2", "--model.tta_views", "1", "--model.tile_size", "100"]
        overrides += ["--data.crop", str(crop)]
    else:
        overrides += ["--model.encoder_weights", "null", "--model.encoder_name", "tu-mobilenetv3_small_050"]
        overrides += ["--model.tile_size", "96", "--data.crop", "64"]
    assert forked(main, ["fit", recipe.name, "--run", "short", *accepted(recipe, overrides)]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert_results_are_recorded(folder)
    assert len(list((folder / "samples").iterdir())) == 2
    assert (folder / "test_images.csv").exists()
    assert_losses_are_documented(recipe, folder)


@pytest.mark.parametrize("recipe", trained_on("Unpaired"))
def test_translation_recipe_trains_a_few_steps(recipe, workdir):
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], data.get("val", data["train"]), *data.get("test", [])}:
        lay_out(name)
    overrides = ["--model.total_images", "2", "--val_every_images", "1", "--data.max_val_images", "1"]
    overrides += ["--model.base_channels", "2", "--model.n_residual_blocks", "1"]
    overrides += ["--model.crop", "32", "--data.crop", "32"]
    overrides += [] if data.get("resize", 286) is None else ["--data.resize", "36"]
    if len(recipe.content.get("trainer", {}).get("callbacks", [])) > 1:  # they require weights of a segmenter or of Inception
        overrides += ["--data.test", "[]"]
    assert forked(main, ["fit", recipe.name, "--run", "short", *accepted(recipe, overrides)]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert (folder / "record.json").exists()
    assert len(list((folder / "samples").iterdir())) == 2
    assert_losses_are_documented(recipe, folder)


@pytest.mark.parametrize("recipe", trained_on("Stylization"))
def test_stylization_recipe_trains_a_few_steps(recipe, workdir, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    data, model = (recipe.content[section]["init_args"] for section in ("data", "model"))
    for name in {data["train"], data["val"], *data["test"]}:
        lay_out(name)
    link_feature_weights(model, workdir, torch_home)
    overrides = ["--model.total_images", "4", "--data.batch_size", "2", "--val_every_images", "2", "--model.base_channels", "2"]
    overrides += ["--data.size", "64", "--data.resize", "64", "--model.style_size", "64", "--trainer.precision", "32-true"]
    overrides += ["--data.num_workers", "1"] if data.get("num_workers") else []
    assert forked(main_with_fake_datasets, ["fit", recipe.name, "--run", "short", *overrides]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert_results_are_recorded(folder)
    assert list((folder / "samples").iterdir())
    assert_losses_are_documented(recipe, folder)


def short_crops(data):
    """Return the overrides of small crops; the validation split of CIFAR-10 begins after the images in its place."""
    words = ["--data.size", "16", "--data.resize", "24", "--data.num_workers", str(min(1, data.get("num_workers", 0)))]
    return [*words, "--data.val", data["test"][0]] if data["train"].startswith("cifar10") else words


@pytest.mark.parametrize("recipe", trained_on("Colorization"))
def test_colorization_recipe_trains_a_few_steps(recipe, workdir, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(workdir / "torch"))
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], data["val"], *data["test"]}:
        lay_out(name)
    overrides = ["--model.total_images", "8", "--data.batch_size", "4", "--val_every_images", "4", "--model.base_channels", "2"]
    overrides += short_crops(data)
    overrides += ["--model.initial_weights", "null"] if "initial_weights" in recipe.content["model"]["init_args"] else []
    assert forked(main_with_fake_datasets, ["fit", recipe.name, "--run", "short", *overrides]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert_results_are_recorded(folder)
    assert list((folder / "samples").iterdir())
    assert_losses_are_documented(recipe, folder)


@pytest.mark.parametrize("recipe", trained_on("Classification"))
def test_classification_recipe_trains_a_few_steps(recipe, workdir):
    data = recipe.content["data"]["init_args"]
    for name in {data["train"], data["val"], *data["test"]}:
        lay_out(name)
    n_classes = "10" if data["train"].startswith("cifar10") else "7"
    overrides = ["--model.total_images", "8", "--data.batch_size", "4", "--val_every_images", "4", "--model.base_channels", "2"]
    overrides += short_crops(data)
    overrides += ["--model.size", "16", "--model.n_classes", n_classes, "--model.weights", "null"]
    if not data["train"].startswith("cifar10"):  # the images in place of the validation set are in one folder
        overrides += ["--data.val", data["train"], "--data.test", f"[{data['train']}]"]
    assert forked(main_with_fake_datasets, ["fit", recipe.name, "--run", "short", *overrides]) == 0
    folder = workdir / "runs" / recipe.name / "short"
    assert_results_are_recorded(folder)
    assert_losses_are_documented(recipe, folder)


WITHOUT_TRAINING = [recipe for recipe in ALL if recipe not in TRAINED and datamodule_of(recipe) != "Detection"]


@pytest.mark.parametrize("recipe", WITHOUT_TRAINING, ids=name_of)
def test_recipe_without_training_is_evaluated(recipe, workdir, photos, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(workdir / "torch"))
    if datamodule_of(recipe) == "Colorization":
        lay_out(recipe.content["data"]["init_args"]["train"])
    argv = ["test", recipe.name, "--record", "record.json", "--data.test", f"[{photos}]"]
    assert forked(main_with_fake_datasets, argv) == 0
    assert (workdir / "record.json").exists()


def test_every_method_has_a_page_and_every_trained_method_has_a_demo():
    for method in {recipe.name.partition("/")[0] for recipe in ALL}:
        method_recipes = [recipe for recipe in ALL if recipe.name.startswith(f"{method}/")]
        assert (method_recipes[0].path.parent.parent / "README.md").exists()
        assert f"{method}/demo" in map(name_of, method_recipes) or not set(method_recipes) & set(TRAINED)


def test_recipes_of_table_rows_exist():
    known = set(map(name_of, ALL))
    for method in methods():
        for table in load_table(method)["tables"]:
            for row in table["rows"]:
                assert row.get("recipe") in known or "reason" in row


@pytest.mark.slow
def test_demo_exceeds_bicubic(workdir, capfd):
    assert forked(main, ["demo"]) == 0
    output = capfd.readouterr().out
    psnr = {line.split()[1]: float(line.split()[3]) for line in output.splitlines() if " dB " in line}
    assert psnr["ESPCN"] > psnr["bicubic"] + 0.5
    shutil.rmtree(workdir / "runs")
