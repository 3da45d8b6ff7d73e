"""The states of the random number generators, which Lightning does not put into a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from swincompress_pl.interrupts import put_back_after
from swincompress_pl.stored_data import from_plain, reading


def rng_states() -> dict[str, Any]:
    """The states of the global generators of torch, NumPy and Python, as data that `weights_only=True` loads."""
    numpy: Any = np.random.get_state(legacy=True)  # a tuple; annotated as a dictionary too
    name, keys, position, has_gauss, gauss = numpy
    version, state, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "state": torch.tensor(state), "gauss": gauss_next},
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """Sets what `rng_states` returned; the generators of CUDA only if the number of devices is the same."""
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    of_numpy, of_python = states["numpy"], states["python"]
    keys = of_numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((of_numpy["name"], keys, of_numpy["position"], of_numpy["has_gauss"], of_numpy["gauss"]))
    random.setstate((of_python["version"], tuple(of_python["state"].tolist()), of_python["gauss"]))


@contextmanager
def isolated() -> Iterator[None]:
    """Restores the global random numbers after the context, even after an exception, unlike `isolate_rng`."""
    with put_back_after(partial(set_rng_states, rng_states())):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global random numbers inside the context, and restores them afterwards.

    It is for images that are read in the middle of a fit. A resumed fit has drawn the order of its epoch by then, and
    an uninterrupted one has not, so the images must not depend on the state of the generators.
    """
    with isolated():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


class RandomNumbers:
    """Sets a resumed fit's generators so that it draws what an uninterrupted one would have drawn.

    They are set twice, because an epoch's data iterator draws from them. Lightning makes that of the first epoch before
    training starts, and those of later epochs after `on_train_epoch_start`. A checkpoint written after validation
    resumes at the end of its epoch, so its next epoch is not the first of the new fit. A checkpoint that an exception
    wrote before the fit's first batch has the numbers of the fit's start, because that iterator is made again.

    In a distributed fit only rank 0's numbers are saved, so nothing is set.
    """

    def __init__(self) -> None:
        self._states: dict[str, Any] | None = None
        self._at_start: dict[str, Any] | None = None
        self._first_epoch = -1

    def states(self) -> dict[str, Any]:
        """Returns the states for a checkpoint that is written now."""
        return self._at_start or rng_states()

    def on_fit_start(self) -> None:
        """Remembers the states, as nothing is drawn yet."""
        self._at_start = rng_states()

    def on_train_batch_start(self) -> None:
        """Forgets the states of the start, as the first epoch is under way."""
        self._at_start = None

    def resume(self, trainer: Trainer, states: Any) -> None:
        """Sets the states of a checkpoint; call it in `on_load_checkpoint`, before anything is drawn."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.world_size == 1:
            self._states = states
            with reading("the checkpoint's states of random numbers (rng)"):
                set_rng_states(states)

    def on_train_start(self, trainer: Trainer) -> None:
        """Remembers which epoch's iterator exists already."""
        self._first_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Sets the states again if the iterator is still to be made."""
        if self._states is not None and trainer.current_epoch != self._first_epoch:
            set_rng_states(self._states)
        self._states = None


def leave_out_unbegun_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Lets a checkpoint that an exception wrote while an epoch began resume at the end of the epoch before.

    Lightning counts that epoch as ready and resumes after its last batch, which is the last batch of the epoch before.
    So nothing would be trained in it.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
    for counts in progress.values():
        if counts["ready"] == counts["started"] + 1 == counts["completed"] + 1:
            counts["ready"] = counts["started"]


def stored_state(checkpoint: Mapping[str, Any], key: str, version: int) -> Mapping[str, Any] | None:
    """The state of the callback `key` in a checkpoint; None if there is none, or one of another version."""
    state = from_plain(Mapping[str, Any] | None, checkpoint["callbacks"].get(key), f"the state of {key}")
    return None if state is None or state.get("version") != version else state
