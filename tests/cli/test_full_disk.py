"""A disk that fills up while a run saves: a process of its own, as users have."""

import json
import resource
import subprocess
import sys

import pytest
import yaml

from tests.cli.test_finetune import SMALL
from tests.conftest import ROOT
from tests.examples.test_finetune_llama import ENVIRONMENT
from tests.interop.folders import write_folder

# No file may grow beyond the limit: to a process that is a full disk.
LIMITED = """
import os, resource, sys
limit, *arguments = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
os.execv(sys.executable, [sys.executable, "-m", "qlora_jax.cli", *arguments])
"""


@pytest.mark.slow
def test_it_is_said_once_and_the_same_command_goes_on(tmp_path):
    write_folder(tmp_path / "model")
    rows = [{"instruction": f"Say {i}", "output": f"{i}."} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = SMALL | {"model": str(tmp_path / "model"), "rank": 8}
    settings |= {"data": str(tmp_path / "rows.jsonl"), "eval_every": 0, "samples": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["finetune", str(tmp_path / "config.yaml")]
    arguments += ["--out", str(tmp_path / "run")]
    more = {"QLORA_JAX_CACHE": str(tmp_path / "cache")}
    more["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # what is compiled here runs once

    def run(limit):
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT | more,
        )

    full = run(20_000)
    assert full.returncode == 1
    # A machine that is busy tells how far reading the model is.
    said = [x for x in full.stderr.splitlines() if not x.startswith("Loading ")]
    assert len(said) == 1, full.stderr
    (line,) = said
    assert line.startswith("qlora-jax: A checkpoint could not be written into ")
    assert "the disk is full. There is no whole one yet." in line
    mended = run(resource.RLIM_INFINITY)
    assert mended.returncode == 0, mended.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
