"""Compiling the kernels: no compiler, a compiler that fails, several processes at once, and what users are told."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import prompt, tiny_llama

from kvquant_hf import QuantizedPagedCache
from kvquant_hf.errors import ImplementationError
from kvquant_hf.transformers_api.names import with_cache
from kvquant_hf.triton_kernels import choice
from kvquant_hf.triton_kernels.codecs import CODECS, integer
from kvquant_hf.triton_kernels.cpu import build, native
from kvquant_hf.triton_kernels.ops import PagedSide, choose


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache folder, and a process that has not looked for a compiler yet."""
    caches = (build.load, native.library, choice._choose)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield
    for cached in caches:
        cached.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A program that says its version, and otherwise does what ``script`` says; each run leaves a line in ``runs``."""
    path = folder / "compiler"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && {{ echo pretend 1.0; exit 0; }}\necho run >> {folder}/runs\n{script}\n'
    )
    path.chmod(0o755)
    return str(path)


def sides(dtype: torch.dtype = torch.float32) -> tuple[PagedSide, PagedSide]:
    tail = torch.zeros(1, 1, 16, 64, dtype=dtype)
    return PagedSide(CODECS["int8-channel"], (), tail, 16), PagedSide(CODECS["int8-affine"], (), tail, 16)


def refused(*words: str) -> None:
    """Explicitly asked for it is one sentence with these words; else plain torch runs, and the report says them."""
    with pytest.raises(ImplementationError, match=r"^impl='cpu' cannot run here: .*use impl='auto'\.$") as caught:
        choose("cpu", torch.float32, *sides())
    assert all(word in str(caught.value) for word in words)
    model = tiny_llama()
    cache = QuantizedPagedCache(model.config, "int8")
    model.generate(prompt(1, 70), **with_cache(cache), max_new_tokens=3, do_sample=False)
    report = cache.report()
    assert report.implementation == "reference"
    assert all(word in report.implementation_reason for word in words)
    assert str(report).count(report.implementation_reason) == 1
    explicit = QuantizedPagedCache(model.config, "int8", impl="cpu")
    with pytest.raises(ImplementationError, match="impl='cpu'"):
        model.generate(prompt(1, 70), **with_cache(explicit), max_new_tokens=3)
    assert explicit.get_seq_length() == 0


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("no C++ compiler was found", "set CXX")


def test_the_compiler_named_by_the_user_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused("CXX", "'no-such-compiler'")


def test_the_compiler_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its first error is passed on, it is asked once per process, and nothing is left behind."""
    script = "echo In file included from x >&2; echo 'x.h:1: error: boom' >&2; echo more >&2; exit 1"
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    refused("failed: x.h:1: error: boom;", "set CXX")
    assert (tmp_path / "runs").read_text() == "run\n"
    assert list(build.cache_folder().iterdir()) == []


def test_what_was_compiled_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo junk > "$2"'))
    refused("cannot be loaded", "delete")


def test_the_cache_folder_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    refused("cannot be kept", "XDG_CACHE_HOME")


def test_compiling_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever is late replaces a complete file by the same: no reader sees half a library."""
    script = 'while [ "$1" != -o ]; do shift; done; printf half > "$2"; sleep 0.3; printf " and half" >> "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: build.build(), range(4)))
    assert len(set(paths)) == 1 and paths[0].read_text() == "half and half"
    assert list(paths[0].parent.iterdir()) == [paths[0]]
    runs = (tmp_path / "runs").read_text()
    assert build.build() == paths[0] and (tmp_path / "runs").read_text() == runs, "compiled again"


def test_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo > "$2"'))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            build.build()
    assert [record.getMessage() for record in caplog.records if "compiling the CPU kernels" in record.getMessage()] == [
        f"compiling the CPU kernels with {tmp_path}/compiler, once for this machine, into {tmp_path}/cache/kvquant_hf"
    ]


def test_another_compiler_or_source_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo > "$2"'))
    first = build.build()
    assert build.build((*build.FLAGS, "-g")) != first
    monkeypatch.setattr(build, "_features", lambda: "another processor")
    assert build.build() != first


def test_dtypes_and_codecs_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "library", lambda: None)
    assert choose("auto", torch.float32, *sides()) == ("cpu", "")
    for dtype, stored in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        chosen = choose("auto", dtype, *sides(stored))
        assert chosen.name == "reference" and "float64; cast the model" in chosen.reason
    silent = type("Silent", (integer.IntegerCodec,), {"cpu": lambda self, head_dim: None})
    values = replace(CODECS["int8-affine"])
    monkeypatch.setitem(CODECS, "int8-affine", silent(**vars(values)))
    choice._choose.cache_clear()
    assert "'int8-affine' does not say" in choose("auto", torch.float32, *sides()).reason
    with pytest.raises(ImplementationError, match="'int8-affine' does not say"):
        choose("cpu", torch.float32, *sides())


def test_elsewhere_than_on_the_cpu() -> None:
    on_meta = [side._replace(tail=side.tail.to("meta")) for side in sides()]
    with pytest.raises(ImplementationError, match="'meta'"):
        choose("cpu", torch.float32, *on_meta)
    assert choose("auto", torch.float32, *on_meta).name == "reference"
