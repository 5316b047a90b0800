"""Renders launchers from one small file: `python -m grpo_mesh.render jobset|gcloud|slurm launch.toml`.

The file is TOML with the fields of `Launch`:

    name = "grpo-7b"
    command = ["python", "train.py", "--config", "7b.yaml"]
    slice = "v5e-16"                # or gpus = 16
    image = "registry/grpo:1"       # jobset
    project = "my-project"          # gcloud
    zone = "us-west4-a"
    [env]
    HF_HOME = "/data/hf"
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from grpo_contracts import GrpoError
from grpo_mesh._render import read_launch, render_gcloud, render_jobset, render_slurm

RENDERERS = {"jobset": render_jobset, "gcloud": render_gcloud, "slurm": render_slurm}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see `--help`."""
    parser = argparse.ArgumentParser("python -m grpo_mesh.render", description="A launcher on standard output.")
    parser.add_argument("engine", choices=RENDERERS, help="what runs the job")
    parser.add_argument("file", type=Path, help="TOML file, see `python -c 'import grpo_mesh.render as r; help(r)'`")
    options = parser.parse_args(arguments)
    try:
        text = RENDERERS[options.engine](read_launch(tomllib.loads(options.file.read_text())))
    except (GrpoError, OSError, tomllib.TOMLDecodeError) as error:
        print(f"grpo_mesh.render: {options.file}: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
