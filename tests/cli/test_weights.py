"""``--weights``: what the commands take, say and refuse."""

import json
from pathlib import Path

import pytest
from command import Run, is_one_sentence
from gguf_files import save_gguf

from kvquant_hf.batching.hooks import unsupported
from kvquant_hf.cli import chat, serve

pytest.importorskip("gguf", reason="gguf is not installed")

PROMPT = ("--prompt", "What is a page?", "--max-new-tokens", "4", "--no-chat")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_generate(file: Path, run: Run) -> None:
    """The text is that of plain weights; the report says what the weights take."""
    found = {}
    for weights in ("full", "packed"):
        code, out, err = run("generate", "--model", file, *PROMPT, "--policy", "exact", "--weights", weights, "--json")
        assert code == 0, err
        found[weights] = json.loads(out)
    assert found["full"]["text"] == found["packed"]["text"]
    full, packed = found["full"]["weights"], found["packed"]["weights"]
    assert full["kind"] == "full" and packed["kind"] == "packed"
    assert packed["bytes"] < full["bytes"] / 2 and packed["formats"]["Q4_0"] == 5
    code, _, err = run("generate", "--model", file, *PROMPT, "--weights", "packed", "--dtype", "bfloat16")
    assert code == 0 and "weights: 0.1 MB, packed: " in err and "5 Q4_0" in err


def test_refused(file: Path, tiny: Path, run: Run) -> None:
    for arguments, says in (
        (("--model", tiny, "--weights", "packed"), "none; leave out --weights"),
        (("--model", "some/name", "--weights", "packed"), "none; leave out --weights"),
        (("--model", file, "--weights", "int4"), "use one of full, packed"),
    ):
        code, out, err = run("generate", *PROMPT, *arguments)
        assert code == 2 and not out and is_one_sentence(err) and says in err, err


def test_what_cannot_stay_packed_is_one_sentence(tmp_path: Path, run: Run) -> None:
    file = save_gguf(tmp_path / "other.gguf", ffn_gate=None)
    code, _, err = run("generate", "--model", file, *PROMPT, "--weights", "packed")
    assert code != 0 and is_one_sentence(err.splitlines()[-1] + "\n") and "--weights full" in err, err


def test_chat_hands_it_to_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    server = pytest.importorskip("kvquant_hf.clients.server", reason="a server's packages are not installed")
    monkeypatch.setattr(chat, "import_serving", lambda: None)
    monkeypatch.setattr(server, "started", lambda arguments, key: started.append(arguments) or _Nothing())
    with chat.server_for("m.gguf", None, None, None, "packed"):
        assert started == [["m.gguf", "--weights", "packed"]]


@pytest.mark.skipif(bool(unsupported()), reason="this transformers is too old for a server")
def test_serve_loads_it_packed(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    application = pytest.importorskip("kvquant_hf.serving.application", reason="a server's packages are not installed")
    made = []
    monkeypatch.setattr(application, "Application", lambda *arguments: made.append(arguments))
    serve.build(str(file), "tiny", "bfloat16", "options", "packed")
    ((name, model, _, options),) = made
    assert (name, options) == ("tiny", "options") and model.packed_formats["Q4_0"] == 5
    assert "weights: 0.1 MB, packed: " in capsys.readouterr().err


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        pass
