"""The state of a run on disk: whole or not at all, and exactly as it was."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Where orbax renames what is to be deleted: a checkpoint goes in one instant too.
_DELETED = "deleted"


class CheckpointError(OSError):
    """A checkpoint could not be written; says which one is the last that was."""


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
    """A folder of checkpoints, written by orbax; the last ones and the best are kept.

    A checkpoint is written while training goes on, and appears when it is whole: a
    process killed while it writes leaves the one before. What is deleted disappears in
    one instant too, so that every checkpoint in the folder can be read at any moment.

    Args:
        folder: made when the first one is saved.
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2):
        self.folder, self.keep = pathlib.Path(folder).absolute(), keep
        self._open_manager: Any = None
        self._best: int | None = None
        self._last_whole: int | None = None

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in their order."""
        return sorted(self._manager.all_steps()) if self.folder.is_dir() else []

    def latest(self) -> int | None:
        """Returns the step of the last checkpoint, None if there is none."""
        return self._manager.latest_step() if self.folder.is_dir() else None

    def check_room(self, tree: Any) -> None:
        """Checks that the disk has room for the checkpoints that will be kept.

        What a killed process left of one is deleted first.

        Raises:
            CheckpointError: if it has not, with both numbers.
        """
        self._clear()
        # The last ones, the best, and the one that is being written.
        wanted = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) * (self.keep + 2)
        held = 0
        if self.folder.exists():
            files = self.folder.rglob("*")
            held = sum(f.stat().st_size for f in files if f.is_file())
        free = self._free() + held
        if free < wanted:
            raise CheckpointError(
                f"{self.folder} needs room for {self.keep + 2} checkpoints, "
                f"{_size(wanted)}, and the disk has {_size(free)} left. "
                "Free some, choose another folder, or keep fewer checkpoints."
            )

    def _clear(self) -> None:
        """Deletes what a process that was killed, or a save that failed, left of one.

        orbax would do so in a thread of its own: what counts files, or what is left of
        the disk, would meet it half way. Nothing is being written when this is called.
        """
        from orbax.checkpoint.path import atomicity_types

        for path in self.folder.glob("*" + atomicity_types.TMP_DIR_SUFFIX):
            shutil.rmtree(path)

    def _free(self) -> int:
        """Returns how many bytes the disk of the folder has left."""
        parent = self.folder
        while not parent.exists():
            parent = parent.parent
        return shutil.disk_usage(parent).free

    def save(
        self,
        step: int,
        tree: Any,
        notes: Mapping[str, Any],
        *,
        best: int | None = None,
    ) -> None:
        """Begins to write the arrays of a tree, wherever they live, and notes for JSON.

        Returns when the arrays are copied: they may then be donated. What went wrong
        with the one before is raised here, or in `wait`.

        Args:
            step: optimizer steps done; there is no checkpoint of that step yet.
            tree: any tree of arrays.
            notes: what JSON can hold.
            best: the step of a checkpoint, this or an earlier one, that stays though it
                is none of the last.

        Raises:
            CheckpointError: if one could not be written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        self._clear()
        # orbax would find out too, in many threads, each with a word of its own.
        wanted = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        if (free := self._free()) < wanted:
            raise self._not_written(
                f"the disk is full, it has {_size(free)} left and {_size(wanted)} are "
                "needed"
            )
        # Copies: the view of a buffer of the CPU would change when the step reuses it.
        # One at a time, so that one at most of those on the host is on the device too.
        leaves = [np.array(_on_device(leaf)) for leaf in jax.tree.leaves(tree)]
        self._best = best
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(_numbered(leaves)),
                    notes=ocp.args.JsonSave({**notes, "leaves": _described(tree)}),
                ),
            )
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise self._failure(error) from error

    def wait(self) -> None:
        """Waits until what was begun is on disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        if self._open_manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise self._failure(error) from error
        self._last_whole = self._manager.latest_step()
        shutil.rmtree(self.folder / _DELETED, ignore_errors=True)

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
        notes = self.notes(step)
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

    def notes(self, step: int) -> dict[str, Any]:
        """Returns the notes of a checkpoint; `leaves` describes its arrays.

        Raises:
            ValueError: if there is no such checkpoint.
        """
        import orbax.checkpoint as ocp

        if step not in self.steps():
            raise ValueError(f"There is no checkpoint of step {step} in {self.folder}.")
        args = ocp.args.Composite(notes=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["notes"]

    def _failure(self, error: Exception) -> CheckpointError:
        # Of the whole tale of tensorstore the user needs the reason.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        reason = "the disk is full" if _is_full(error) else reason or repr(error)
        return self._not_written(reason)

    def _not_written(self, reason: str) -> CheckpointError:
        last = "There is no whole one yet"
        if self._last_whole is not None:
            last = f"The last whole one is of step {self._last_whole}"
        return CheckpointError(
            f"A checkpoint could not be written into {self.folder}: {reason}. {last}. "
            "When that is mended, the same command goes on from there."
        )

    @property
    def _manager(self) -> Any:
        # orbax takes a second to import, hence only where it is used.
        if self._open_manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._Kept(self),
                todelete_subdir=_DELETED,
            )
            self._open_manager = ocp.CheckpointManager(self.folder, options=options)
            self._last_whole = self._open_manager.latest_step()
        return self._open_manager

    @dataclasses.dataclass
    class _Kept:
        """Tells orbax which checkpoints stay."""

        owner: "Checkpoints"

        def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
            first = len(checkpoints) - self.owner.keep
            best = self.owner._best
            return [i >= first or c.step == best for i, c in enumerate(checkpoints)]


def _on_device(leaf: jax.Array) -> jax.Array:
    """Returns the array in its device's memory, where it is in that of the host.

    What numpy sees of an array in a GPU's pinned host memory is a view, which the array
    keeps, and a buffer that is viewed cannot be donated.
    """
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
        return jax.device_put(leaf, jax.memory.Space.Device)
    return leaf


def _is_full(error: BaseException) -> bool:
    """Whether there was no room, on the disk, in a quota or under a file's limit."""
    words = ("No space left", "Disk quota exceeded", "File too large", "ENOSPC")
    return any(word in str(error) for word in words)


def _size(nbytes: int) -> str:
    unit, name = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{nbytes / unit:.1f} {name}"


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}


def _described(tree: Any) -> list[list[Any]]:
    """Returns path, shape and dtype of each leaf, as JSON can hold them."""
    return [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]
