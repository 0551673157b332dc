"""The state of a run on disk: whole or not at all, and exactly as it was."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        step: optimizer steps done.
        tree: the arrays, in the structure they were saved in.
        notes: what was written beside them.
    """

    step: int
    tree: Any
    notes: dict[str, Any]


class Checkpoints:
    """A folder of checkpoints, written by orbax; the last ones are kept.

    A checkpoint appears when it is whole: a process killed while it writes leaves the
    one before.

    Args:
        folder: made when the first one is saved.
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2):
        self.folder, self._keep = pathlib.Path(folder).absolute(), keep
        self._open_manager: Any = None

    def latest(self) -> int | None:
        """Returns the step of the last checkpoint, None if there is none."""
        return self._manager.latest_step() if self.folder.is_dir() else None

    def save(self, step: int, tree: Any, notes: Mapping[str, Any]) -> None:
        """Writes the arrays of a tree, wherever they live, and notes for JSON."""
        import orbax.checkpoint as ocp

        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(_numbered(leaves)),
                notes=ocp.args.JsonSave({**notes, "leaves": _described(tree)}),
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> Saved:
        """Reads a checkpoint.

        Args:
            like: a tree of the same structure; each array is put where its counterpart
                lives (device, sharding, kind of memory).
            step: which one; None for the last.

        Raises:
            ValueError: if there is none, or it is of a tree of another structure.
        """
        import orbax.checkpoint as ocp

        step = self.latest() if step is None else step
        if step is None:
            raise ValueError(f"There is no checkpoint in {self.folder}.")
        notes = self._manager.restore(
            step, args=ocp.args.Composite(notes=ocp.args.JsonRestore())
        )["notes"]
        saved, expected = notes.pop("leaves"), _described(like)
        if saved != expected:
            differing = [e for s, e in zip(saved, expected, strict=False) if s != e]
            raise ValueError(
                f"The checkpoint in {self.folder} is of another model or optimizer: it "
                f"has {len(saved)} arrays for {len(expected)}, and differs at "
                f"{(differing or ['the end'])[0]}. Start anew in another folder."
            )
        leaves, structure = jax.tree.flatten(like)
        target = _numbered([np.empty(leaf.shape, leaf.dtype) for leaf in leaves])
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        )["arrays"]
        placed = [
            jax.device_put(arrays[name], leaf.sharding)
            for name, leaf in zip(target, leaves, strict=True)
        ]
        return Saved(step, jax.tree.unflatten(structure, placed), notes)

    @property
    def _manager(self) -> Any:
        # orbax takes a second to import, hence only where it is used.
        if self._open_manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, enable_async_checkpointing=False
            )
            self._open_manager = ocp.CheckpointManager(self.folder, options=options)
        return self._open_manager


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}


def _described(tree: Any) -> list[list[Any]]:
    """Returns path, shape and dtype of each leaf, as JSON can hold them."""
    return [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]
