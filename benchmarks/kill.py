"""Kills a training run many times; tests/train/test_kill.py does it ten times.

    JAX_PLATFORMS=cpu python -m benchmarks.kill --kills 50

Fails if a checkpoint cannot be read or the final adapter is not, bit for bit, that of a
run nobody killed.
"""

import argparse
import pathlib
import tempfile
import time

from tests.kill_run import kill_runs


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        outcome = kill_runs(pathlib.Path(folder), arguments.kills, arguments.seed)
        seconds = time.perf_counter() - begun
    print(
        f"{outcome.kills} kills, {outcome.writing} while a checkpoint was being "
        f"written; {outcome.checkpoints} checkpoints read after them; {outcome.runs} "
        "runs finished, each adapter equal to the unbroken run's bit for bit; "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
