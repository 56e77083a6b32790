"""``kvquant qparams``: scales and zero points for policy ``int8-static`` from what ``kvquant calibrate`` measured."""

from typing import Annotated

import typer

from .terminal import InputError


def qparams(
    statistics: Annotated[str, typer.Argument(help="What `kvquant calibrate` wrote: the folder, or the file.")],
    out: Annotated[
        str | None, typer.Option(help="Folder for qparams.safetensors; default: where the statistics are.")
    ] = None,
    per: Annotated[
        str, typer.Option(help="tensor: one range for a layer's keys, one for its values; channel: of each head.")
    ] = "tensor",
    sym: Annotated[bool, typer.Option("--sym", help="Symmetric: no zero point.")] = False,
    turbomind: Annotated[bool, typer.Option("--turbomind", help="LMDeploy's raw files too (per tensor).")] = False,
    tp: Annotated[int, typer.Option(min=1, help="Ranks of tensor parallelism in LMDeploy's files.")] = 1,
) -> None:
    """Turn a calibration into quantization parameters; use them with --policy int8-static --qparams FOLDER, or as a
    prior with policies that round keys by queries, such as kv3.

    The paths of the files are printed on stdout.
    """
    from pathlib import Path

    from ..calibration import Statistics, compute, write_turbomind

    if turbomind and per != "tensor":
        raise InputError("LMDeploy's files hold one range per tensor; leave out --turbomind, or use --per tensor.")
    if tp != 1 and not turbomind:
        raise InputError("--tp is for LMDeploy's files; add --turbomind.")
    place = Path(statistics)
    found = Statistics.load(place)
    folder = Path(out) if out is not None else place if place.is_dir() else place.parent
    print(compute(found, per=per, symmetric=sym).save(folder))
    if turbomind:
        for path in write_turbomind(found, folder, tp=tp, symmetric=sym):
            print(path)
