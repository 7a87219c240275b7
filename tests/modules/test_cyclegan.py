import json
from itertools import repeat

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from callbacks.run.checkpoints import inference_state_dict, load_weights
from datamodules.errors import UserError
from datamodules.random.noise import uniform
from experiments.bench.inference import classic_step
from experiments.bench.reference_loop import loop, optimizers_of
from experiments.cli.main import main
from modules.cyclegan import CycleGAN
from modules.training.image_pool import ImagePool
from modules.training.phases import ActivePhase, train_only
from tests.helpers.method_contract import TranslationContract
from tests.helpers.subprocess_helpers import forked
from tests.helpers.tiny_recipes import write_translation_recipe

SMALL = {"crop": 32, "n_residual_blocks": 1, "base_channels": 4, "pool_size": 6, "identity_weight": 0.5}


class TestCycleGAN(TranslationContract):
    model = {"class_path": "modules.cyclegan.CycleGAN", "init_args": SMALL}
    steady = "tests.helpers.deterministic_variants.SteadyCycleGAN"
    rounding = 0.15  # of what is nearly nothing: fakes that are told
    rounded_at = ("--model.crop", "64", "--data.crop", "64")  # at 32, instance normalisation over 3 x 3 values enlarges it
    learns = [
        "--model.total_images",
        "1200",
        "--val_every_images",
        "60",
        "--model.learning_rate",
        "2e-3",
        "--model.identity_weight",
        "0",
    ]

    def has_learned(self, log):
        """What comes back is nearer than at first, and nearer than what was in between: it is not the way of doing nothing."""
        found = {}
        for row in log:
            found.setdefault(row["name"].removeprefix("textures-grass2gravel-test/"), []).append(float(row["value"]))
        errors, changes = ([found[f"{name}-l1/{direction}"] for direction in ("AtoB", "BtoA")] for name in ("cycle", "change"))
        return all(error[-1] < min(0.7 * error[0], change[-1]) for error, change in zip(errors, changes, strict=True))


@pytest.mark.parametrize(("blocks", "size", "parameters"), [(6, 128, 7_837_699), (9, 256, 11_378_179)])
def test_parameters_are_the_papers(blocks, size, parameters):
    method = CycleGAN(size, blocks)
    for network in (method.G_AB, method.G_BA):
        assert sum(p.numel() for p in network.parameters()) == parameters
    for network in (method.D_A, method.D_B):
        assert sum(p.numel() for p in network.parameters()) == 2_764_737


def test_a_discriminators_value_sees_70_pixels():
    discriminator = CycleGAN(256, 1, 4).D_A
    for layer in discriminator:
        if isinstance(layer, torch.nn.InstanceNorm2d):  # which sees the whole picture
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
def test_objectives(objective, identity, terms):
    method = CycleGAN(**{**SMALL, "objective": objective, "identity_weight": identity})
    batch = {"A": torch.rand(2, 3, 32, 32), "B": torch.rand(2, 3, 32, 32), "positions": range(2)}
    joined = {**batch, **method.shared_forward(batch)}
    assert set(method.generator_losses(joined)) == terms
    assert [phase.name for phase in method.phases()] == ["generators", "discriminators"][: 1 + (objective != "cycle")]


def test_losses_are_those_written_out():
    """Equations 2 and 3, each network called by itself on one picture at a time."""
    torch.manual_seed(0)
    method = CycleGAN(**SMALL).double()
    a, b = torch.rand(2, 2, 3, 32, 32, dtype=torch.float64).unbind(0)
    batch = {"A": a, "B": b, "positions": range(2)}
    joined = {**batch, **method.shared_forward(batch)}
    terms = method.generator_losses(joined)
    found = dict.fromkeys(terms, 0.0)
    for x, y in zip(a[:, None] * 2 - 1, b[:, None] * 2 - 1, strict=True):
        to_b, to_a = method.G_AB, method.G_BA
        found["adversarial/B"] += (method.D_B(to_b(x)) - 1).pow(2).mean() / 2
        found["adversarial/A"] += (method.D_A(to_a(y)) - 1).pow(2).mean() / 2
        found["cycle/A"] += 10 * (to_a(to_b(x)) - x).abs().mean() / 2
        found["cycle/B"] += 10 * (to_b(to_a(y)) - y).abs().mean() / 2
        found["identity/A"] += 5 * (to_a(x) - x).abs().mean() / 2
        found["identity/B"] += 5 * (to_b(y) - y).abs().mean() / 2
    for name, value in found.items():
        assert terms[name].item() == pytest.approx(value.item(), abs=1e-12), name
    judged = method.discriminator_losses(joined)
    real = (method.D_B(b * 2 - 1) - 1).pow(2).mean() / 2
    fake = method.D_B(method.G_AB(a * 2 - 1)).pow(2).mean() / 2
    assert (judged["real/B"].item(), judged["fake/B"].item()) == pytest.approx((real.item(), fake.item()), abs=1e-12)


@pytest.mark.parametrize("identity", [0.0, 0.5])
def test_the_classic_order_of_passes_comes_to_the_same(identity):
    """What `bench` compares with: three steps end in the same weights."""
    batch = {"A": torch.rand(1, 3, 32, 32).double(), "B": torch.rand(1, 3, 32, 32).double()}
    found = []
    for order in ("ours", "classic"):
        torch.manual_seed(0)
        method = CycleGAN(**{**SMALL, "pool_size": 0, "identity_weight": identity}).double()
        step = classic_step(method, batch) if order == "classic" else loop(method, repeat(batch), optimizers_of(method))
        for _ in range(3):
            step()
        found.append(method.state_dict())
    torch.manual_seed(0)
    untouched = CycleGAN(**SMALL).double().state_dict()
    for name in (name for name in untouched if name.endswith("weight")):  # biases before a normalisation move by rounding alone
        assert (found[0][name] - found[1][name]).abs().max() < 1e-9, name
        assert not torch.equal(found[0][name], untouched[name]), name


def test_bench_of_pairs_names_its_figures(workplace, capfd):
    recipe = workplace / "tiny.yaml"
    write_translation_recipe(recipe, {"class_path": "modules.cyclegan.CycleGAN", "init_args": SMALL})
    assert forked(main, ["bench", str(recipe), "--pairs", "6", "--steps", "1", "--json"]) == 0
    figures = json.loads(capfd.readouterr().out)
    for name in ("ratio_to_bare", "ratio_to_pil", "ratio_to_classic", "images_per_second", "gflops", "translations_per_second"):
        assert figures[name] > 0


def test_no_gradient_of_the_standing_networks_is_computed():
    method = CycleGAN(**SMALL)
    active_phases = [ActivePhase(phase, phase.optimizer(phase.parameters)) for phase in method.phases()]
    batch = {"A": torch.rand(1, 3, 32, 32), "B": torch.rand(1, 3, 32, 32), "positions": range(1)}
    with train_only(active_phases, active_phases):
        joined = {**batch, **method.shared_forward(batch)}
    for moving, standing in (active_phases, active_phases[::-1]):
        method.zero_grad()
        with train_only([moving], active_phases):
            sum(moving.phase.losses(joined).values()).backward()
        assert all(p.grad is not None for p in moving.parameters)
        assert all(p.grad is None for p in standing.parameters)


def test_learning_rate_is_constant_and_then_falls_along_a_line():
    method = CycleGAN(**SMALL, total_images=200)
    rates = [method.linear_decay_after_half(images)["lr"] for images in (0, 99, 100, 150, 200)]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4, 1e-4, 0])


def test_translates_any_size():
    method = CycleGAN(**SMALL).eval()
    with torch.no_grad():
        for height, width in ((37, 50), (3, 2), (33, 4)):
            made = method.translate(torch.rand(1, 3, height, width), "BtoA")
            assert made.shape == (1, 3, height, width)
            assert 0 <= made.min() <= made.max() <= 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "none"}, r"model\.objective: none; take full, cycle, gan, gan-cycle-A, gan-cycle-B"),
        ({"crop": 30}, r"model\.crop: 30 is not a multiple of 4 from 24 on"),
        ({"crop": 20}, r"model\.crop: 20 is not a multiple of 4 from 24 on"),
        ({"pool_size": -1}, r"model\.pool_size: -1 is less than 0"),
        ({"base_channels": 0}, r"model\.base_channels: 0 is less than 1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, says):
    with pytest.raises(UserError, match=says):
        CycleGAN(**{**SMALL, **settings})


def test_weights_for_use_are_without_the_pools(tmp_path):
    method = CycleGAN(**SMALL)
    used = inference_state_dict(method, method.state_dict())
    assert {name.partition(".")[0] for name in method.state_dict().keys() - used.keys()} == {"pool_a", "pool_b"}
    save_file(used, tmp_path / "used.safetensors")
    other = CycleGAN(**{**SMALL, "pool_size": 2})
    load_weights(other, tmp_path / "used.safetensors")
    assert all(torch.equal(other.state_dict()[name], values) for name, values in used.items())
    del used["G_AB.1.weight"]
    save_file(used, tmp_path / "used.safetensors")
    with pytest.raises(UserError, match=r"'G_AB\.1\.weight' is nothing there"):
        load_weights(other, tmp_path / "used.safetensors")


def test_predict_translates_what_a_user_has(workplace, capfd):
    """Of any size, grey or with alpha; the weights are of a run whose pictures were resized to 32."""
    method, recipe = CycleGAN(**SMALL).eval(), workplace / "tiny.yaml"
    save_file(inference_state_dict(method, method.state_dict()), workplace / "weights.safetensors")
    write_translation_recipe(recipe, {"class_path": "modules.cyclegan.CycleGAN", "init_args": SMALL}, resize=36)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (48, 60, 4), dtype=np.uint8)
    (workplace / "mine").mkdir()
    Image.fromarray(pixels).save(workplace / "mine" / "clear.png")
    Image.fromarray(pixels[..., 0]).save(workplace / "mine" / "grey.png")
    words = ["--ckpt", "weights.safetensors", "--input", "mine", "--output", "out", "--direction", "BtoA"]
    assert forked(main, ["predict", str(recipe), *words]) == 0
    assert "mine/clear.png  60x48  ->  out/clear.png  40x32" in capfd.readouterr().out
    colours = torch.from_numpy(pixels[..., :3]).permute(2, 0, 1)[None].float()
    seen = torch.nn.functional.interpolate(colours, (32, 40), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
    with torch.no_grad():
        expected = (method.G_BA(seen * 2 - 1) * 127.5 + 127.5)[0].permute(1, 2, 0).numpy()
    made = np.asarray(Image.open(workplace / "out" / "clear.png"))
    assert made.shape == (32, 40, 4)
    assert np.abs(made[..., :3] - expected).max() < 0.51  # rounded, not cut
    assert np.asarray(Image.open(workplace / "out" / "grey.png")).shape == (32, 40, 3)


def test_a_direction_is_for_translations(workplace, photos):
    assert forked(main, ["predict", "espcn/t91_x3", "--input", str(photos), "--direction", "BtoA"]) == 2


# The pool


def fakes_of(positions):
    return torch.tensor([float(position + 1) for position in positions]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_pool_of_single_fakes_is_the_authors():
    """Shrivastava's history as CycleGAN's code has it: full first, then an even chance of an old one, which the new one replaces."""
    pool, held, swaps = ImagePool(5, (3, 2, 2), "pool/A", seed=3), [], 0
    for position in range(300):
        shown = pool.query(fakes_of([position]), range(position, position + 1), position)[0, 0, 0, 0].item()
        pool.update(1)
        chance, place = uniform(3, "pool/A", range(position, position + 1), 2)[0]
        expected = position + 1
        if len(held) < 5:
            held.append(position + 1)
        elif chance < 0.5:
            swaps += 1
            expected, held[int(place * 5)] = held[int(place * 5)], position + 1
        assert shown == expected
        assert pool.fakes[: len(held), 0, 0, 0].tolist() == held
    assert 110 < swaps < 185


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_pool_is_the_same_for_any_parts_of_a_batch(parts):
    pools = [ImagePool(6, (3, 2, 2), "pool/A") for _ in range(2)]
    for start in range(0, 80, 4):
        whole = pools[0].query(fakes_of(range(start, start + 4)), range(start, start + 4), start)
        size = 4 // parts
        pieces = [
            pools[1].query(fakes_of(range(first, first + size)), range(first, first + size), start)
            for first in range(start, start + 4, size)
        ]
        assert torch.equal(whole, torch.cat(pieces))
        for pool in pools:
            pool.update(4)
        assert torch.equal(pools[0].fakes, pools[1].fakes)
    assert np.unique(pools[0].fakes[:, 0, 0, 0]).size == 6  # no place was left empty


def test_no_pool():
    pool = ImagePool(0, (3, 2, 2), "pool/A")
    newest = fakes_of(range(4)).requires_grad_()
    assert torch.equal(pool.query(newest, range(4), 0), newest)
    assert not pool.query(newest, range(4), 0).requires_grad
    pool.update(4)
