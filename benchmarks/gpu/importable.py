"""``kvquant_hf`` from a checkout that nobody installed: a tree of links that has the layout of the wheel.

    build/bench/kvquant_hf/<name>          -> kvquant_hf/<name>, for every file and folder
    build/bench/kvquant_hf/triton_kernels  -> triton_kernels

A Python that has torch, triton and transformers can then run the benchmarks and the tests with this one folder on its
path; the mapping in pyproject.toml would otherwise need ``pip install -e .``.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def link_tree(root: Path = ROOT) -> Path:
    """Make or refresh the tree of links for the checkout ``root``; returns the folder to put on the path."""
    tree = root / "build" / "bench"
    package = tree / "kvquant_hf"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (root / "kvquant_hf").iterdir() if path.name != "__pycache__"}
    wanted["triton_kernels"] = root / "triton_kernels"
    for link in package.iterdir():
        if link.is_symlink() and (link.name not in wanted or link.resolve() != wanted[link.name].resolve()):
            link.unlink()
    for name, target in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(os.path.relpath(target, package))
    return tree


def environment(root: Path = ROOT) -> dict[str, str]:
    """This process's environment with the tree and ``benchmarks/`` on the path, and without Triton's interpreter."""
    path = [str(link_tree(root)), str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
