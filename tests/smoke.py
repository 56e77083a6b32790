"""What an installed wheel must do, in an environment that knows nothing of the repository and has compiled nothing.

Run by `make test-wheel` with the packages of .venv, and by `make test-pythons` in an empty environment of each Python:
import, the command, a model that generates on the C++ kernels, `kvquant demo` on a tiny model of its own.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run(*command: object) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


def generates() -> None:
    """A random Llama: `exact` as DynamicCache does, `int4` on kernels that are compiled here."""
    import torch
    from models import tiny_llama

    import kvquant_hf
    from kvquant_hf.transformers_api.names import CACHE_ARGUMENT

    assert Path(kvquant_hf.__file__).is_relative_to(sys.prefix), f"{kvquant_hf.__file__} is not what was installed"
    model, ids = tiny_llama(), torch.arange(3, 153).unsqueeze(0) % 97

    def generate(**options: object) -> list[int]:
        return list(model.generate(ids, max_new_tokens=20, do_sample=False, **options)[0])

    options = {"cache_implementation": "kvquant", "cache_config": {"policy": "exact"}}
    assert generate(**options) == generate()
    assert len(generate(**options | {"cache_config": {"policy": "int4", "impl": "cpu"}})) == 170
    cache = kvquant_hf.QuantizedPagedCache(model.config, "int4")
    with torch.inference_mode():
        for part in ids.split(50, dim=1):
            model(part, **{CACHE_ARGUMENT: cache})
    assert "in pages (cpu)" in str(cache.report()), cache.report()


def main() -> None:
    sys.path.insert(0, str(TESTS))  # the tiny models
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"XDG_CACHE_HOME": folder, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
        generates()
        assert list(Path(folder).rglob("*.so")), "nothing was compiled"
        from command import save_tiny_model

        kvquant = Path(sys.executable).with_name("kvquant")
        assert "int4" in run(kvquant, "policies")
        tiny = save_tiny_model(Path(folder) / "model")
        shown = run(kvquant, "demo", "--model", tiny, "--context", 300, "--tokens", 4, "--dtype", "float32")
        assert "turboquant" in shown
    versions = ", ".join(f"{name} {version(name)}" for name in ("kvquant-hf", "torch", "transformers"))
    print(f"Python {sys.version.split()[0]}: {versions}: works")


if __name__ == "__main__":
    main()
