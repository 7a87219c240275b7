import json
from itertools import repeat

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datamodules.catalog.domains import load_domains
from datamodules.errors import UserError
from datamodules.random.noise import uniform
from experiments.bench.cyclegan_baseline import reference_cyclegan_step
from experiments.bench.reference_loop import make_optimizers, make_reference_step
from experiments.cli.main import main
from modules.cyclegan import CycleGAN
from modules.networks.weights import inference_state_dict, load_weights
from modules.training.image_pool import ImagePool
from modules.training.phases import bind_phases, train_only
from tests.helpers.subprocess_helpers import forked
from tests.tasks.translation import TranslationContract, write_translation_recipe


def write_tinted_textures(folder):
    """Write orange grass and blue gravel. The domains differ in color, so that a translation must change every pixel."""
    for split in ("train", "test"):
        pairs = zip("AB", load_domains(f"textures/grass2gravel/{split}"), ((1.0, 0.6, 0.2), (0.2, 0.6, 1.0)), strict=True)
        for domain, (image,), tint in pairs:
            target = folder / f"{split}{domain}"
            target.mkdir(parents=True)
            pixels = image.pixels()[:, : 128 if split == "test" else None] * torch.tensor(tint).view(3, 1, 1)
            Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()).save(target / "texture.png")


SMALL = {"crop": 32, "n_residual_blocks": 1, "base_channels": 4, "pool_size": 6, "identity_weight": 0.5}


class TestCycleGAN(TranslationContract):
    learns_slowly = True
    model = {"class_path": "modules.cyclegan.CycleGAN", "init_args": SMALL}
    deterministic_model = "tests.helpers.deterministic_variants.DeterministicCycleGAN"
    bf16_images = 8
    bf16_rtol = 0.15  # large, because the losses on fakes are small
    # For 32 x 32 crops, instance normalization over 3 x 3 values amplifies rounding errors.
    # Images of 72 pixels also bound the time of the evaluation, in which convolutions in bf16 may be emulated.
    bf16_overrides = ("--model.crop", "64", "--data.crop", "64", "--data.resize", "72")
    training_overrides = [
        "--model.total_images",
        "1200",
        "--val_every_images",
        "60",
        "--model.learning_rate",
        "2e-3",
        "--model.identity_weight",
        "0",
        "--data.train",
        "tinted/train",
        "--data.val",
        "tinted/test",
        "--data.test",
        "[]",
    ]

    def test_training_improves_the_metric(self, workdir, recipe):
        write_tinted_textures(workdir / "tinted")
        super().test_training_improves_the_metric(workdir, recipe)

    def has_learned(self, log):
        """Require a cycle error that is small compared with the change by translation. The networks are then not the identity.

        The ratio of cycle error to change, over both directions: 8 seeds, AVX-512: 0.12 ... 0.14; 4 seeds, AVX2: 0.12 ... 0.13;
        untrained networks: 1.0. The cycle error decreases to 0.44 ... 0.57 of its first value.
        """
        first, last = {}, {}
        for row in log:
            name = row["name"].partition("/")[2]
            first.setdefault(name, float(row["value"]))
            last[name] = float(row["value"])
        errors, changes = ([f"{name}-l1/{direction}" for direction in ("AtoB", "BtoA")] for name in ("cycle", "change"))
        error = sum(last[name] for name in errors)
        return error < 0.4 * sum(last[name] for name in changes) and error < 0.8 * sum(first[name] for name in errors)


@pytest.mark.parametrize(("blocks", "size", "parameters"), [(6, 128, 7_837_699), (9, 256, 11_378_179)])
def test_parameter_counts_match_the_paper(blocks, size, parameters):
    method = CycleGAN(size, blocks)
    for network in (method.G_AB, method.G_BA):
        assert sum(p.numel() for p in network.parameters()) == parameters
    for network in (method.D_A, method.D_B):
        assert sum(p.numel() for p in network.parameters()) == 2_764_737


def test_discriminator_receptive_field_is_70_pixels():
    discriminator = CycleGAN(256, 1, 4).D_A
    for layer in discriminator:
        if isinstance(layer, torch.nn.InstanceNorm2d):  # depends on the full image
            layer.forward = lambda maps: maps
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    values = discriminator(image)
    values[0, 0, values.shape[2] // 2, values.shape[3] // 2].backward()
    rows, columns = image.grad[0].abs().sum(0).nonzero().T
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (70, 70)


@pytest.mark.parametrize(
    ("objective", "identity", "terms"),
    [
        ("full", 0.5, {"adversarial/A", "adversarial/B", "cycle/A", "cycle/B", "identity/A", "identity/B"}),
        ("full", 0.0, {"adversarial/A", "adversarial/B", "cycle/A", "cycle/B"}),
        ("cycle", 0.0, {"cycle/A", "cycle/B"}),
        ("gan", 0.0, {"adversarial/A", "adversarial/B"}),
        ("gan-cycle-A", 0.0, {"adversarial/A", "adversarial/B", "cycle/A"}),
        ("gan-cycle-B", 0.0, {"adversarial/A", "adversarial/B", "cycle/B"}),
    ],
)
def test_objective_selects_loss_terms_and_phases(objective, identity, terms):
    method = CycleGAN(**{**SMALL, "objective": objective, "identity_weight": identity})
    batch = {"A": torch.rand(2, 3, 32, 32), "B": torch.rand(2, 3, 32, 32), "sample_ids": range(2)}
    batch_with_shared = {**batch, **method.shared_forward(batch)}
    assert set(method.generator_losses(batch_with_shared)) == terms
    assert [phase.name for phase in method.phases()] == ["generators", "discriminators"][: 1 + (objective != "cycle")]


def test_losses_match_equations_2_and_3():
    """Each network is called separately on one image at a time."""
    torch.manual_seed(0)
    method = CycleGAN(**SMALL).double()
    a, b = torch.rand(2, 2, 3, 32, 32, dtype=torch.float64).unbind(0)
    batch = {"A": a, "B": b, "sample_ids": range(2)}
    batch_with_shared = {**batch, **method.shared_forward(batch)}
    terms = method.generator_losses(batch_with_shared)
    expected = dict.fromkeys(terms, 0.0)
    for x, y in zip(a[:, None] * 2 - 1, b[:, None] * 2 - 1, strict=True):
        to_b, to_a = method.G_AB, method.G_BA
        expected["adversarial/B"] += (method.D_B(to_b(x)) - 1).pow(2).mean() / 2
        expected["adversarial/A"] += (method.D_A(to_a(y)) - 1).pow(2).mean() / 2
        expected["cycle/A"] += 10 * (to_a(to_b(x)) - x).abs().mean() / 2
        expected["cycle/B"] += 10 * (to_b(to_a(y)) - y).abs().mean() / 2
        expected["identity/A"] += 5 * (to_a(x) - x).abs().mean() / 2
        expected["identity/B"] += 5 * (to_b(y) - y).abs().mean() / 2
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), abs=1e-12), name
    discriminator_terms = method.discriminator_losses(batch_with_shared)
    real = (method.D_B(b * 2 - 1) - 1).pow(2).mean() / 2
    fake = method.D_B(method.G_AB(a * 2 - 1)).pow(2).mean() / 2
    assert (discriminator_terms["real/B"].item(), discriminator_terms["fake/B"].item()) == pytest.approx(
        (real.item(), fake.item()), abs=1e-12
    )


@pytest.mark.parametrize("identity", [0.0, 0.5])
def test_reference_step_gives_the_same_weights(identity):
    """`bench` uses the reference step for comparison. Three steps of both give the same weights."""
    batch = {"A": torch.rand(1, 3, 32, 32).double(), "B": torch.rand(1, 3, 32, 32).double()}
    states = []
    for order in ("ours", "classic"):
        torch.manual_seed(0)
        method = CycleGAN(**{**SMALL, "pool_size": 0, "identity_weight": identity}).double()
        if order == "classic":
            step = reference_cyclegan_step(method, batch)
        else:
            step = make_reference_step(method, repeat(batch), make_optimizers(method))
        for _ in range(3):
            step()
        states.append(method.state_dict())
    torch.manual_seed(0)
    initial = CycleGAN(**SMALL).double().state_dict()
    # Biases before a normalization change only by rounding errors.
    for name in (name for name in initial if name.endswith("weight")):
        assert (states[0][name] - states[1][name]).abs().max() < 1e-9, name
        assert not torch.equal(states[0][name], initial[name]), name


@pytest.mark.slow
def test_bench_of_unpaired_images_reports_metrics(workdir, capfd):
    recipe = workdir / "tiny.yaml"
    write_translation_recipe(recipe, {"class_path": "modules.cyclegan.CycleGAN", "init_args": SMALL})
    assert forked(main, ["bench", str(recipe), "--pairs", "6", "--steps", "1", "--json"]) == 0
    metrics = json.loads(capfd.readouterr().out)
    for name in ("ratio_to_bare", "ratio_to_pil", "ratio_to_classic", "images_per_second", "gflops", "translations_per_second"):
        assert metrics[name] > 0


def test_frozen_networks_get_no_gradients():
    method = CycleGAN(**SMALL)
    phases = bind_phases(method.phases(), method.make_optimizers())
    batch = {"A": torch.rand(1, 3, 32, 32), "B": torch.rand(1, 3, 32, 32), "sample_ids": range(1)}
    with train_only(phases, phases):
        batch_with_shared = {**batch, **method.shared_forward(batch)}
    for trained, frozen in (phases, phases[::-1]):
        method.zero_grad()
        with train_only([trained], phases):
            sum(trained.phase.losses(batch_with_shared).values()).backward()
        assert all(p.grad is not None for p in trained.parameters)
        assert all(p.grad is None for p in frozen.parameters)


def test_learning_rate_decays_linearly_in_the_second_half():
    method = CycleGAN(**SMALL, total_images=200)
    rates = [method.schedule(images) for images in (0, 99, 100, 150, 200)]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4, 1e-4, 0])


def test_translate_accepts_any_size():
    method = CycleGAN(**SMALL).eval()
    with torch.no_grad():
        for height, width in ((37, 50), (3, 2), (33, 4)):
            translation = method.translate(torch.rand(1, 3, height, width), "BtoA")
            assert translation.shape == (1, 3, height, width)
            assert 0 <= translation.min() <= translation.max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "none"}, r"model\.objective: none"),
        ({"crop": 30}, r"model\.crop: 30"),
        ({"crop": 20}, r"model\.crop: 20"),
        ({"pool_size": -1}, r"model\.pool_size: -1"),
        ({"base_channels": 0}, r"model\.base_channels: 0"),
    ],
)
def test_invalid_arguments_raise_user_error(settings, message):
    with pytest.raises(UserError, match=message):
        CycleGAN(**{**SMALL, **settings})


def test_inference_weights_exclude_the_image_pools(tmp_path):
    method = CycleGAN(**SMALL)
    weights = inference_state_dict(method, method.state_dict())
    assert {name.partition(".")[0] for name in method.state_dict().keys() - weights.keys()} == {"pool_a", "pool_b"}
    save_file(weights, tmp_path / "used.safetensors")
    other = CycleGAN(**{**SMALL, "pool_size": 2})
    load_weights(other, tmp_path / "used.safetensors")
    assert all(torch.equal(other.state_dict()[name], values) for name, values in weights.items())
    del weights["G_AB.1.weight"]
    save_file(weights, tmp_path / "used.safetensors")
    with pytest.raises(UserError, match=r"used\.safetensors .*'G_AB\.1\.weight'"):
        load_weights(other, tmp_path / "used.safetensors")


def test_predict_translates_user_images(workdir, capfd):
    """Images can have any size, one channel, or alpha. They are resized to a short side of 32, as in training."""
    method, recipe = CycleGAN(**SMALL).eval(), workdir / "tiny.yaml"
    save_file(inference_state_dict(method, method.state_dict()), workdir / "weights.safetensors")
    write_translation_recipe(recipe, {"class_path": "modules.cyclegan.CycleGAN", "init_args": SMALL}, resize=36)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (48, 60, 4), dtype=np.uint8)
    pixels[..., 3] = np.maximum(pixels[..., 3], 1)  # the color of a fully transparent pixel is replaced
    (workdir / "mine").mkdir()
    Image.fromarray(pixels).save(workdir / "mine" / "clear.png")
    Image.fromarray(pixels[..., 0]).save(workdir / "mine" / "gray.png")
    argv = ["--ckpt", "weights.safetensors", "--input", "mine", "--output", "out", "--direction", "BtoA"]
    assert forked(main, ["predict", str(recipe), *argv]) == 0
    assert "mine/clear.png  60x48  ->  out/clear.png  40x32" in capfd.readouterr().out
    rgb = torch.from_numpy(pixels[..., :3]).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(rgb, (32, 40), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
    with torch.no_grad():
        expected = (method.G_BA(resized * 2 - 1) * 127.5 + 127.5)[0].permute(1, 2, 0).numpy()
    translation = np.asarray(Image.open(workdir / "out" / "clear.png"))
    assert translation.shape == (32, 40, 4)
    assert np.abs(translation[..., :3] - expected).max() < 0.51  # rounded, not truncated
    assert np.asarray(Image.open(workdir / "out" / "gray.png")).shape == (32, 40, 3)


def test_direction_option_requires_a_translation_method(workdir, photos):
    assert forked(main, ["predict", "espcn/t91_x3", "--input", str(photos), "--direction", "BtoA"]) == 2


# Image pool


def numbered_fakes(sample_ids):
    return torch.tensor([float(sample_id + 1) for sample_id in sample_ids]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_pool_with_batch_size_one_matches_the_reference():
    """The reference code fills the pool. Then, with probability 1/2, it returns a stored fake and replaces it."""
    pool, stored, swaps = ImagePool(5, (3, 2, 2), "pool/A", seed=3), [], 0
    for sample_id in range(300):
        output = pool.query(numbered_fakes([sample_id]), range(sample_id, sample_id + 1), sample_id)[0, 0, 0, 0].item()
        pool.update(1)
        keep_draw, slot_draw = uniform(3, "pool/A", range(sample_id, sample_id + 1), 2)[0]
        expected = sample_id + 1
        if len(stored) < 5:
            stored.append(sample_id + 1)
        elif keep_draw < 0.5:
            swaps += 1
            expected, stored[int(slot_draw * 5)] = stored[int(slot_draw * 5)], sample_id + 1
        assert output == expected
        assert pool.fakes[: len(stored), 0, 0, 0].tolist() == stored
    assert 110 < swaps < 185


@pytest.mark.parametrize("n_micro_batches", [1, 2, 4])
def test_pool_is_independent_of_micro_batches(n_micro_batches):
    pools = [ImagePool(6, (3, 2, 2), "pool/A") for _ in range(2)]
    for start in range(0, 80, 4):
        full = pools[0].query(numbered_fakes(range(start, start + 4)), range(start, start + 4), start)
        size = 4 // n_micro_batches
        micro_batches = [
            pools[1].query(numbered_fakes(range(first, first + size)), range(first, first + size), start)
            for first in range(start, start + 4, size)
        ]
        assert torch.equal(full, torch.cat(micro_batches))
        for pool in pools:
            pool.update(4)
        assert torch.equal(pools[0].fakes, pools[1].fakes)
    assert np.unique(pools[0].fakes[:, 0, 0, 0]).size == 6  # all slots are filled


def test_pool_of_capacity_zero_returns_its_input_detached():
    pool = ImagePool(0, (3, 2, 2), "pool/A")
    fakes = numbered_fakes(range(4)).requires_grad_()
    assert torch.equal(pool.query(fakes, range(4), 0), fakes)
    assert not pool.query(fakes, range(4), 0).requires_grad
    pool.update(4)
