"""A training that ends as a killed process would."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

MOMENTS = ("step_begin", "step_end", "save")


class Kill(TrainerCallback):  # type: ignore[misc]
    """Raises KeyboardInterrupt once so many steps are done.

    Args:
        step: as many.
        at: the moment, of MOMENTS: before the next step, by when what is saved at this one is saved; at the end of
            this one, before anything is; or right after the checkpoint.
    """

    def __init__(self, step: int, at: str = "step_begin") -> None:
        assert at in MOMENTS
        self.step, self.at = step, at

    def _moment(self, at: str, state: Any) -> None:
        if at == self.at and state.global_step == self.step:
            raise KeyboardInterrupt

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._moment("step_begin", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._moment("step_end", state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._moment("save", state)
