"""Learning rate schedules that several methods use."""

from collections.abc import Mapping


def step_schedule(learning_rate: float, steps: Mapping[int, float], images_seen: int) -> float:
    """Return the learning rate of the last step that is passed.

    Args:
        learning_rate: learning rate before the first step.
        steps: learning rate after a number of images, in ascending order.
        images_seen: images seen so far.
    """
    passed = [rate for start, rate in steps.items() if start <= images_seen]
    return passed[-1] if passed else learning_rate
