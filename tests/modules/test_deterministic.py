"""Operations in a form that is deterministic on GPUs have the values and the gradients of torch's own."""

import pytest
import torch
import torch.nn.functional as F

from modules.networks import deterministic
from modules.networks.deterministic import ReflectionPad2d, reflect


def with_gradient(function, image, generator):
    """Return the output and the gradient of its product with random numbers."""
    image = image.clone().requires_grad_()
    output = function(image)
    (output * torch.rand(output.shape, dtype=torch.float64, generator=generator)).sum().backward()
    return output.detach(), image.grad


@pytest.mark.parametrize("padding", [(3, 3, 3, 3), (1, 0, 2, 4), (0, 0, 0, 0)])
def test_reflection_by_flips_equals_that_of_torch(padding):
    image = torch.rand(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        with_gradient(function, image, torch.Generator().manual_seed(1))
        for function in (lambda image: reflect(image, padding), lambda image: F.pad(image, padding, mode="reflect"))
    )
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)


def test_cross_entropy_by_pixel_equals_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (2, 5, 6), generator=generator)
    labels[0, :2] = 255
    ours, theirs = (
        with_gradient(lambda logits, function=function: function(logits, labels, 255), logits, torch.Generator().manual_seed(1))
        for function in (deterministic._pixel_cross_entropy, deterministic.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (ours[0][0, :2] == 0).all()


def test_convolution_with_reflection_equals_that_of_torch(monkeypatch):
    layer = deterministic.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", dtype=torch.float64)
    image = torch.rand(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = with_gradient(layer, image, torch.Generator().manual_seed(1))
    monkeypatch.setattr(deterministic, "is_required", lambda tensor: True)
    ours = with_gradient(layer, image, torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours[1], torch.zeros_like(image))


def test_the_form_is_selected_by_the_device_and_the_setting(monkeypatch):
    """On a CPU, torch's own operations are deterministic."""
    image = torch.rand(1, 1, 4, 4)
    calls = []
    monkeypatch.setattr(deterministic, "reflect", lambda image, padding: calls.append(padding))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    ReflectionPad2d(1)(image)
    assert calls == []
    monkeypatch.setattr(deterministic, "is_required", lambda tensor: True)
    ReflectionPad2d(1)(image)
    assert calls == [(1, 1, 1, 1)]
