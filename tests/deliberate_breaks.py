"""Three deliberate breaks of each library, and copies of the tree that contain them.

Each is a replacement in one source file. If that line is rewritten, `break_tree` fails: adapt the break to the new
line, so that it still proves that the release tools find breaks.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tools.release.workspace import ROOT


@dataclass(frozen=True)
class Break:
    """One break.

    Args:
        library: which library.
        what: "renamed keyword", "changed shape" or "changed meaning".
        file: under the library's package.
        edits: pairs (old text, new text); every occurrence is replaced.
        finding: part of the sentence that must report it.
        part: the golden cases that detect it; None if comparing signatures is enough.
    """

    library: str
    what: str
    file: str
    edits: tuple[tuple[str, str], ...]
    finding: str
    part: str | None = None

    def __str__(self) -> str:
        return f"{self.library}: {self.what}"


BREAKS = (
    Break(
        "grpo-contracts",
        "renamed keyword",
        "_completions.py",
        (("max_new_tokens", "token_limit"),),
        "from_completions(max_new_tokens)",
    ),
    Break(
        "grpo-contracts",
        "changed shape",
        "_stages.py",
        (('unweighted; 0 where unscored", "float32", "B N")', 'unweighted; 0 where unscored", "float32", "N B")'),),
        "Scored.reward_BN",
    ),
    # A reward that could not be computed counts as zero.
    Break(
        "grpo-contracts",
        "changed meaning",
        "_stages.py",
        (("scored_B = (scored_BN | (weight_N == 0)).all(1) & scored_BN.any(1)", "scored_B = scored_BN.any(1)"),),
        "from_rewards.scored_B",
        "stages",
    ),
    Break(
        "grpo-loss",
        "renamed keyword",
        "_objectives.py",
        (("dual_clip", "second_clip"),),
        "ppo(dual_clip)",
    ),
    Break(
        "grpo-loss",
        "changed shape",
        "_kl.py",
        (
            ("        return half_square_RT\n", "        return half_square_RT.sum(1)\n"),
            ("    return value_RT\n", "    return value_RT.sum(1)\n"),
        ),
        "kl_estimate k3: was float32[6, 5], is float32[6]",
        "averages",
    ),
    # Dr.GRPO's fixed denominator becomes a mean over tokens, which it was made to avoid.
    Break(
        "grpo-loss",
        "changed meaning",
        "_aggregate.py",
        (
            (
                "return mask_RT, _sequences(sequence_sum(mask_RT, segment_RT), mask_RT) * horizon",
                "return mask_RT, mask_RT.sum()",
            ),
        ),
        "aggregate fixed",
        "averages",
    ),
    Break(
        "grpo-mesh",
        "renamed keyword",
        "_mesh.py",
        (("slice_count", "slices"),),
        "parse_mesh(slice_count)",
    ),
    Break(
        "grpo-mesh",
        "changed shape",
        "_pad.py",
        (
            (
                "-shape[dimension] % shard_count(mesh, rules.resolve(name, entry, mesh))",
                "-shape[dimension] % (8 * shard_count(mesh, rules.resolve(name, entry, mesh)))",
            ),
        ),
        "pad ['embed']",
        "shardings",
    ),
    # Every digest in a checkpoint or rollout would identify other parameters.
    Break(
        "grpo-mesh",
        "changed meaning",
        "_digest.py",
        (("0x85EBCA6B", "0x85EBCA6D"),),
        "digest",
        "digests",
    ),
    Break(
        "grpo-sampler",
        "renamed keyword",
        "_sampler.py",
        (("max_prompt_length", "longest_prompt"),),
        "Sampler.__init__(max_prompt_length)",
    ),
    Break(
        "grpo-sampler",
        "changed shape",
        "_network.py",
        (
            ('def unembedding(self) -> Float[Array, "V D"]:', 'def unembedding(self) -> Float[Array, "D V"]:'),
            ("return self.embed[...] if self.config.tied", "return self.embed[...].T if self.config.tied"),
        ),
        "Transformer.unembedding",
    ),
    # min-p is ignored: tokens it excludes are drawn.
    Break(
        "grpo-sampler",
        "changed meaning",
        "_sampling.py",
        (("    floor_B = jnp.maximum(floor_B, sampling.min_p)", "    floor_B = jnp.maximum(floor_B, 0.0)"),),
        "log_probabilities/min-p",
        "log_probabilities",
    ),
)


def copy_libraries(target: Path, root: Path = ROOT) -> Path:
    """Copy what the tools read: metadata, changelog and sources of every library."""
    for source in (root / "libs").iterdir():
        folder = target / "libs" / source.name
        folder.mkdir(parents=True)
        for name in ("pyproject.toml", "CHANGELOG.md"):
            shutil.copy(source / name, folder)
        shutil.copytree(source / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def break_tree(tree: Path, broken: Break) -> None:
    """Apply one break to a copy of the tree.

    Raises:
        ValueError: the text to replace is not there.
    """
    path = tree / "libs" / broken.library / "src" / broken.library.replace("-", "_") / broken.file
    text = path.read_text()
    for old, new in broken.edits:
        if old not in text:
            raise ValueError(
                f"{path.name} must contain {old!r} for the break of {broken}: adapt the break to the new line."
            )
        text = text.replace(old, new)
    path.write_text(text)
