"""The plan of a training's stages, against a simulation of its steps."""

import pytest

from datamodules.errors import UserError
from modules.training.stages import Stage, StagePlan


def test_stage_plan_equals_a_simulation():
    stages = [Stage(), Stage(10, batch_size=3), Stage(11, batch_size=5), Stage(40)]
    plan = StagePlan(stages, 4)
    position, steps, starts = 0, 0, []
    while position < 80:
        stage = next(stage for stage in reversed(stages) if stage.start <= position)
        if not starts or starts[-1][1] != stage:
            starts.append((position, stage))
        assert plan.stages[plan.index(position)] == stage
        assert plan.batch_size(position) == (stage.batch_size or 4)
        assert plan.steps(position) == steps
        position, steps = position + (stage.batch_size or 4), steps + 1
    assert [start for start, _ in starts] == [0, 12, 42]  # the second stage ends before its first step
    assert plan.starts == [0, 12, 12, 42]


@pytest.mark.parametrize("stages", [[], [Stage(1)], [Stage(), Stage(5), Stage(5)], [Stage(batch_size=0)]])
def test_invalid_stages_are_refused(stages):
    with pytest.raises(UserError, match="stages: "):
        StagePlan(stages, 4)
